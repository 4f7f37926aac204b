"""Rules that make one update of many when some of the many lie: by rank, by distance, by length.

Each takes the clients' models (or updates) stacked by name, and returns float32 arrays. All sums are float64; the same
replies in the same order give the same bytes. With client-level privacy only the mean, and the norm bound where it is
the clip itself, keep the guarantee (`compatibility.py`).

Memory: beside its input and its result, a rule holds a few blocks of 2 MB, one model in float64 and, where it needs
distances, some matrices of (clients, clients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays
from tacit.federated.stacked import (
    Stacked,
    by_rank,
    checked_weights,
    count_clients,
    gram_matrix,
    mean_of,
    squared_distances,
    squared_steps,
)

__all__ = [
    "RULES",
    "aggregate",
    "bulyan",
    "geometric_median",
    "krum",
    "median",
    "multi_krum",
    "norm_bounded_mean",
    "trimmed_mean",
]

RULES = frozenset(
    {"mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median", "norm-bounded"}
)

_SMOOTHING, _TOLERANCE, _ITERATIONS = 1e-6, 1e-7, 1000

_Wide = npt.NDArray[np.float64]


def aggregate(
    rule: str,
    stacked: Stacked,
    centre: Arrays,
    *,
    weights: Sequence[float] | None = None,
    hostile: int = 0,
    trim: float = 0.1,
    bound: float | None = None,
) -> Arrays:
    """One update of many by the rule of a name.

    Args:
        rule: one of `RULES`.
        stacked: the clients' models, (clients, *shape) by name.
        centre: the model that they began with, for "norm-bounded".
        weights: public constants, one for each client, for "mean" and "norm-bounded"; uniform when None.
        hostile: how many clients may lie, for "krum", "multi-krum" (which keeps clients - hostile - 2) and "bulyan".
        trim: for "trimmed-mean".
        bound: for "norm-bounded".

    Raises:
        ValueError: an unknown rule, weights for a rule that has none, or what the rule itself refuses.

    >>> models = {"w": np.float32([[1.0], [2.0], [99.0]])}
    >>> aggregate("median", models, {"w": np.float32([0.0])})["w"].tolist()
    [2.0]
    """
    if rule not in RULES:
        raise ValueError(f"expected one of {', '.join(sorted(RULES))}, got rule={rule!r}")
    if weights is not None and rule not in ("mean", "norm-bounded"):
        raise ValueError(f"expected no weights with rule={rule!r}, which counts clients, got {len(weights)}")
    rules: dict[str, Callable[[], Arrays]] = {
        "mean": lambda: mean_of(stacked, checked_weights(weights, count_clients(stacked))),
        "median": lambda: median(stacked),
        "trimmed-mean": lambda: trimmed_mean(stacked, trim=trim),
        "krum": lambda: krum(stacked, hostile=hostile),
        "multi-krum": lambda: multi_krum(stacked, hostile=hostile, keep=count_clients(stacked) - hostile - 2),
        "bulyan": lambda: bulyan(stacked, hostile=hostile),
        "geometric-median": lambda: geometric_median(stacked),
        "norm-bounded": lambda: norm_bounded_mean(stacked, centre, bound=bound, weights=weights),
    }
    return rules[rule]()


def median(stacked: Stacked) -> Arrays:
    """The median of each coordinate (Yin et al. 2018, definition 1): fewer than half of the clients cannot move it far.

    Raises:
        ValueError: no client, arrays of different numbers of clients, or a value that is not finite.

    >>> median({"w": np.float32([[1.0], [9.0], [2.0], [4.0]])})["w"].tolist()
    [3.0]
    """
    count_clients(stacked)
    return by_rank(stacked, _middle)


def trimmed_mean(stacked: Stacked, *, trim: float) -> Arrays:
    """The mean of each coordinate without its ⌊trim·clients⌋ lowest and highest (Yin et al. 2018, definition 2).

    Args:
        stacked: the clients' models, (clients, *shape) by name.
        trim: share of the clients that is left out at each side, from 0 to below ½.

    Raises:
        ValueError: `trim` out of its range, or as for `median`.

    >>> trimmed_mean({"w": np.float32([[1.0], [2.0], [6.0], [99.0]])}, trim=0.25)["w"].tolist()
    [4.0]
    """
    if not 0.0 <= trim < 0.5:
        raise ValueError(f"expected a share from 0 to below 0.5, got trim={trim}")
    clients = count_clients(stacked)
    out = math.floor(trim * clients + 1e-9)  # 0.29·100 is 28.999999999999996
    return by_rank(stacked, lambda ranked: ranked[:, out : clients - out].mean(axis=1, dtype=np.float64))


def krum(stacked: Stacked, *, hostile: int) -> Arrays:
    """The model of one client: that with the least sum of squared distances to its n - f - 2 closest others.

    Blanchard et al. 2017, section 4. Of equals, the one closer to all others; then the first.

    Args:
        stacked: the clients' models, (clients, *shape) by name.
        hostile: f, how many may lie; n must be at least 2f + 3.

    Raises:
        ValueError: too few clients for `hostile`, or as for `median`.

    >>> krum({"w": np.float32([[1.0], [1.5], [2.0], [2.2], [99.0]])}, hostile=1)["w"].tolist()
    [2.0]
    """
    return multi_krum(stacked, hostile=hostile, keep=1)


def multi_krum(stacked: Stacked, *, hostile: int, keep: int) -> Arrays:
    """The mean of the `keep` clients that Krum likes best.

    Args:
        stacked: the clients' models, (clients, *shape) by name.
        hostile: f, how many may lie; n must be at least 2f + 3.
        keep: from 1 to n - f - 2; up to there the proof holds (Damaskinos et al. 2019, AggregaThor).

    Raises:
        ValueError: too few clients for `hostile`, `keep` out of its range, or as for `median`.

    >>> multi_krum({"w": np.float32([[1.0], [1.5], [2.0], [2.2], [99.0]])}, hostile=1, keep=2)["w"].tolist()
    [1.75]
    """
    clients = count_clients(
        stacked, at_least=2 * _count("hostile", hostile) + 3, why=f"2·hostile + 3, hostile={hostile}"
    )
    if not 1 <= keep <= clients - hostile - 2:
        raise ValueError(f"expected from 1 to {clients - hostile - 2} of {clients} clients, got keep={keep}")
    chosen = np.sort(_krum_order(squared_distances(gram_matrix(stacked)), hostile)[:keep])
    return mean_of(stacked, [1.0] * keep, clients=chosen)


def bulyan(stacked: Stacked, *, hostile: int) -> Arrays:
    """Krum, taken n - 2f times from those that are left; then, of each coordinate, the n - 4f closest to the median.

    El Mhamdi et al. 2018, section 4. A coordinate's mean is over what lies closest to its median among the selected; of
    two that are equally far, the lower. When so few are left that Krum's n - f - 2 is less than one, it looks at one.

    Args:
        stacked: the clients' models, (clients, *shape) by name.
        hostile: f, how many may lie; n must be at least 4f + 3.

    Raises:
        ValueError: too few clients for `hostile`, or as for `median`.

    >>> bulyan({"w": np.float32([[1.0], [2.0], [4.0], [4.5], [5.0], [8.0], [99.0]])}, hostile=1)["w"].tolist()
    [4.5]
    """
    clients = count_clients(
        stacked, at_least=4 * _count("hostile", hostile) + 3, why=f"4·hostile + 3, hostile={hostile}"
    )
    distances = squared_distances(gram_matrix(stacked))
    left = np.arange(clients)
    for _ in range(clients - 2 * hostile):
        left = np.delete(left, _krum_order(distances[np.ix_(left, left)], hostile)[0])
    selected = np.setdiff1d(np.arange(clients), left)
    return by_rank(stacked, lambda ranked: _around_the_middle(ranked, clients - 4 * hostile), clients=selected)


def geometric_median(stacked: Stacked) -> Arrays:
    """The point with the least sum of distances to all clients, by smoothed Weiszfeld steps (Pillutla et al. 2022).

    A step is a mean in which a client weighs 1 / max(its distance, ν). All points on the way are means of clients, so
    the steps need only their inner products. The first point is the mean of the smallest majority around the client
    with the least sum of distances: from the mean of all, it is many steps back when liars are very far away.

    ν is 1e-6, and steps end when they are shorter than 1e-7, of the distance from that client to the last of that
    majority; or after 1000 steps, each of which lowers the sum. Fewer than half of the clients cannot move the result
    far.

    Raises:
        ValueError: as for `median`.

    >>> corners = {"w": np.float32([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [1.0, 1.0]])}
    >>> geometric_median(corners)["w"].round(4).tolist()
    [1.0, 1.0]
    """
    clients = count_clients(stacked)
    gram = gram_matrix(stacked)
    distances = np.sqrt(squared_distances(gram))
    origin = int(np.argmin(distances.sum(axis=1)))
    half = np.argsort(distances[origin], kind="stable")[: clients // 2 + 1]
    shares = np.zeros(clients)
    shares[half] = 1.0 / len(half)
    scale = float(distances[origin, half[-1]])
    for _ in range(_ITERATIONS if scale > 0.0 else 0):
        squares = np.diag(gram) - 2.0 * (gram @ shares) + shares @ gram @ shares
        pulls = 1.0 / np.sqrt(np.maximum(squares, (_SMOOTHING * scale) ** 2))
        moved = pulls / pulls.sum() - shares
        shares += moved
        if moved @ gram @ moved <= (_TOLERANCE * scale) ** 2:
            break
    return mean_of(stacked, shares.tolist())


def norm_bounded_mean(
    stacked: Stacked, centre: Arrays, *, bound: float | None, weights: Sequence[float] | None = None
) -> Arrays:
    """The mean after each client's step from `centre` is scaled to a length of at most `bound` (Sun et al. 2019).

    Args:
        stacked: the clients' models, (clients, *shape) by name.
        centre: the model that they began with.
        bound: L2 norm over all arrays together; the median of the clients' norms when None.
        weights: public constants, one for each client; uniform when None.

    Raises:
        ValueError: a bound that is not above 0, weights that do not fit, or as for `median`.

    >>> models = {"w": np.float32([[1.0, 4.0], [4.0, 1.0], [-99.0, 1.0]])}
    >>> norm_bounded_mean(models, {"w": np.float32([1.0, 1.0])}, bound=None)["w"].tolist()
    [1.0, 2.0]
    """
    clients = count_clients(stacked)
    if bound is not None and not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"expected a finite norm above 0, got bound={bound}")
    shares = checked_weights(weights, clients)
    norms = np.sqrt(squared_steps(stacked, centre))
    limit = float(np.median(norms)) if bound is None else bound
    factors = [share * (limit / norm if norm > limit else 1.0) for share, norm in zip(shares, norms, strict=True)]
    return _moved(centre, stacked, factors, sum(shares))


def _moved(centre: Arrays, stacked: Stacked, factors: Sequence[float], divisor: float) -> Arrays:
    """The centre, moved by the sum of the clients' steps from it, each times its factor, over the divisor."""
    result = {}
    for name, array in stacked.items():
        start, total = centre[name].astype(np.float64), np.zeros(centre[name].shape)
        for factor, model in zip(factors, array, strict=True):
            total += factor * (model - start)
        result[name] = np.asarray(start + total / divisor, dtype=np.float32)
    return result


def _count(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"expected a count of at least 0, got {name}={value}")
    return value


def _middle(ranked: npt.NDArray[np.float32]) -> _Wide:
    clients = ranked.shape[1]
    low, high = ranked[:, (clients - 1) // 2], ranked[:, clients // 2]
    return (low.astype(np.float64) + high) / 2.0


def _around_the_middle(ranked: npt.NDArray[np.float32], keep: int) -> _Wide:
    """The mean of the `keep` values closest to the median; they are neighbours in the order."""
    middle = _middle(ranked)[:, None]
    spare = ranked.shape[1] - keep
    # The window moves up as long as what it would gain lies closer than what it would lose.
    starts = ((ranked[:, keep:] - middle) < (middle - ranked[:, :spare])).sum(axis=1)
    window = np.take_along_axis(ranked, starts[:, None] + np.arange(keep), axis=1)
    return np.asarray(window.mean(axis=1, dtype=np.float64))


def _krum_order(distances: _Wide, hostile: int) -> npt.NDArray[np.int64]:
    """Clients by the sum of squared distances to their closest others, the least first."""
    clients = len(distances)
    closest = min(max(clients - hostile - 2, 1), clients - 1)
    others = distances + np.diag(np.full(clients, np.inf))
    scores = np.sort(others, axis=1)[:, :closest].sum(axis=1)
    # Two that are each other's only closest always tie; not their places but the others decide between them.
    return np.lexsort((distances.sum(axis=1), scores))
