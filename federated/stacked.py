"""Clients' arrays stacked by name: their checks, means, ranks and distances, which the rules of `robust.py` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays

__all__ = [
    "Stacked",
    "by_rank",
    "checked_weights",
    "count_clients",
    "gram_matrix",
    "mean_of",
    "squared_distances",
    "squared_steps",
]

Stacked = Mapping[str, npt.NDArray[np.float32]]  # of each array all clients': (clients, *shape), contiguous

_BLOCK = 2**18  # values that are worked on at once: 2 MB in float64
_Wide = npt.NDArray[np.float64]
_Rows = npt.NDArray[np.int64]


def count_clients(stacked: Stacked, *, at_least: int = 1, why: str = "one") -> int:
    """How many clients there are, once the input is checked.

    Raises:
        ValueError: too few clients, arrays of different numbers of clients, or a value that is not finite.

    >>> count_clients({"w": np.float32([[1.0], [2.0]])})
    2
    """
    counts = {array.shape[0] if array.ndim else 0 for array in stacked.values()}
    if len(counts) != 1:
        raise ValueError(f"expected arrays of one number of clients, got {sorted(counts)}")
    clients = counts.pop()
    if clients < at_least:
        raise ValueError(f"expected at least {at_least} clients ({why}), got {clients}")
    for name, _, block in _blocks(stacked):
        if not np.isfinite(block).all():
            raise ValueError(f"expected finite values, got others in {name!r}; leave such replies out beforehand")
    return clients


def checked_weights(weights: Sequence[float] | None, clients: int) -> list[float]:
    """A weight for each client; uniform when None.

    Raises:
        ValueError: another number of weights, one that is negative or not finite, or nothing but zeros.

    >>> checked_weights(None, 2)
    [1.0, 1.0]
    """
    found = [1.0] * clients if weights is None else [float(weight) for weight in weights]
    if len(found) != clients or not all(math.isfinite(w) and w >= 0.0 for w in found) or not sum(found) > 0.0:
        raise ValueError(
            f"expected {clients} finite weights of at least 0, not all of them 0, got {len(found)}: {found[:8]}"
        )
    return found


def mean_of(stacked: Stacked, shares: Sequence[float], *, clients: _Rows | None = None) -> Arrays:
    """The weighted mean, summed in the order of clients: the bytes of `averaging.mean`.

    Args:
        stacked: (clients, *shape) by name.
        shares: a weight for each of the clients that are averaged.
        clients: their positions; all when None.

    >>> mean_of({"w": np.float32([[1.0], [3.0]])}, [1.0, 3.0])["w"].tolist()
    [2.5]
    """
    result = {}
    for name, array in stacked.items():
        total = np.zeros(array.shape[1:])
        for share, client in zip(shares, range(len(array)) if clients is None else clients, strict=True):
            total += share * array[client].astype(np.float64)
        # asarray: NumPy's arithmetic turns arrays of no dimension into scalars, which Flower does not send.
        result[name] = np.asarray(total / sum(shares), dtype=np.float32)
    return result


def by_rank(
    stacked: Stacked,
    rule: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.floating]],
    *,
    clients: _Rows | None = None,
) -> Arrays:
    """What a rule makes of each coordinate's values in ascending order.

    Args:
        stacked: (clients, *shape) by name.
        rule: from (coordinates, clients), ascending along clients, to (coordinates,).
        clients: positions of those whose values count; all when None.

    >>> by_rank({"w": np.float32([[3.0], [1.0]])}, lambda ranked: ranked[:, 0])["w"].tolist()
    [1.0]
    """
    flat = {name: np.empty(math.prod(array.shape[1:]), np.float32) for name, array in stacked.items()}
    for name, where, block in _blocks(stacked):
        values = block if clients is None else block[clients]
        # Rows are sorted whole: NumPy does that with vector instructions, six times as fast as np.partition.
        flat[name][where] = rule(np.sort(values.T, axis=1))
    return {name: array.reshape(stacked[name].shape[1:]) for name, array in flat.items()}


def gram_matrix(stacked: Stacked) -> _Wide:
    """Inner products of all pairs of clients, (clients, clients).

    >>> gram_matrix({"w": np.float32([[1.0, 0.0], [2.0, 1.0]])}).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    clients = len(next(iter(stacked.values())))
    total = np.zeros((clients, clients))
    for _, _, block in _blocks(stacked):
        wide = block.astype(np.float64)
        total += wide @ wide.T
    return total


def squared_distances(gram: _Wide) -> _Wide:
    """‖a‖² + ‖b‖² - 2⟨a, b⟩: right to 1e-15 of ‖a‖² + ‖b‖², so that a client far away spoils only its own distances.

    >>> squared_distances(np.array([[1.0, 2.0], [2.0, 5.0]])).tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)


def squared_steps(stacked: Stacked, centre: Arrays) -> _Wide:
    """Squared L2 norm of each client's step from the centre, over all arrays together, (clients,).

    Raises:
        ValueError: clients' arrays of other names or shapes than the centre's.

    >>> squared_steps({"w": np.float32([[1.0, 1.0], [3.0, 4.0]])}, {"w": np.float32([0.0, 0.0])}).tolist()
    [2.0, 25.0]
    """
    found = {name: array.shape[1:] for name, array in stacked.items()}
    if found != {name: array.shape for name, array in centre.items()}:
        raise ValueError(f"expected clients' arrays of the model's names and shapes, got {found}")
    total = np.zeros(len(next(iter(stacked.values()))))
    for name, array in stacked.items():
        start = centre[name].astype(np.float64)
        total += [float(np.sum(np.square(model - start))) for model in array]
    return total


def _blocks(stacked: Stacked) -> Iterator[tuple[str, slice, npt.NDArray[np.float32]]]:
    """Pieces of the arrays, (clients, coordinates), of about `_BLOCK` values."""
    for name, array in stacked.items():
        flat = array.reshape(len(array), math.prod(array.shape[1:]))  # (clients, coordinates)
        step = max(1, _BLOCK // len(array))
        for start in range(0, flat.shape[1], step):
            yield name, slice(start, start + step), flat[:, start : start + step]
