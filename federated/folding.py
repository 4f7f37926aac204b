"""From a round's answers to one model: means take up each answer as it comes and let go of it, ranks wait for all.

A mean holds its sum, two models' worth in float64, however many answers there are. Rules by rank or distance need all
answers at once: all that came, and once more their largest array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays
from tacit.federated.robust import aggregate

__all__ = ["Answer", "Combine", "Fold", "bounded", "by_rule", "combined", "fairly", "mean", "weighted"]

_NEEDS = {"krum": 2, "multi-krum": 2, "bulyan": 4}  # answers for each hostile one, besides three
_BLOCK = 2**16  # values that are worked on at once

_Wide = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an owner came back with.

    Attributes:
        owner: its index.
        arrays: the model after its steps.
        loss: of the model before them, where it was asked for.
    """

    owner: int
    arrays: Arrays
    loss: float | None = None


class Fold(Protocol):
    """What becomes of a round's answers."""

    def add(self, answer: Answer) -> None:
        """Takes up an answer."""
        ...

    def result(self) -> Arrays:
        """The model, once; at least one answer was added."""
        ...


# From the model that a round began with to what takes up its answers.
Combine = Callable[[Arrays], Fold]


def combined(combine: Combine, centre: Arrays, answers: Iterable[Answer]) -> Arrays:
    """All answers at once.

    >>> answers = [Answer(owner=i, arrays={"w": np.float32([w])}) for i, w in enumerate((1.0, 3.0))]
    >>> combined(weighted(), {"w": np.float32([0.0])}, answers)["w"].tolist()
    [2.0]
    """
    fold = combine(centre)
    for answer in answers:
        fold.add(answer)
    return fold.result()


def mean(updates: Sequence[Arrays], weights: Sequence[float] | None = None) -> Arrays:
    """The mean, summed in the order given so that the same replies give the same bytes.

    Args:
        updates: one for each reply.
        weights: public constants, one for each; uniform when None.

    >>> mean([{"w": np.float32([1.0])}, {"w": np.float32([3.0])}])["w"].tolist()
    [2.0]
    """
    shares = None if weights is None else dict(enumerate(weights))
    return combined(weighted(shares), updates[0], (Answer(owner=i, arrays=a) for i, a in enumerate(updates)))


def weighted(weights: Mapping[int, float] | None = None) -> Combine:
    """The mean, by public weights of the owners; uniform when None.

    >>> answers = [Answer(owner=0, arrays={"w": np.float32([1.0])}), Answer(owner=1, arrays={"w": np.float32([4.0])})]
    >>> combined(weighted({0: 2.0, 1: 1.0}), {"w": np.float32([0.0])}, answers)["w"].tolist()
    [2.0]
    """
    return lambda centre: _Mean(centre, weights)


def bounded(bound: float) -> Combine:
    """The mean after each answer's step from the centre is scaled to a length of at most `bound` (Sun et al. 2019).

    Args:
        bound: L2 norm over all arrays together.

    Raises:
        ValueError: a bound that is not above 0.

    >>> answers = [Answer(owner=i, arrays={"w": np.float32([w])}) for i, w in enumerate((1.0, 900.0))]
    >>> combined(bounded(1.0), {"w": np.float32([0.0])}, answers)["w"].tolist()
    [1.0]
    """
    if not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"expected a finite norm above 0, got bound={bound}")
    return lambda centre: _Bounded(centre, bound)


def fairly(q: float, learning_rate: float) -> Combine:
    """q-FedAvg, which listens the more to an owner the higher its loss (Li et al. 2020, algorithm 2).

    With L = 1 / learning_rate, Δw_k = L(w - w_k) and F_k the loss of w at owner k,

        w ← w - Σ F_k^q Δw_k / Σ (q F_k^(q-1) ‖Δw_k‖² + L F_k^q)

    Each answer needs its loss, at least 0; 1e-10 is added, as by its authors, so that 0 has powers. Losses are of
    records: with a guarantee they must be noised and charged.

    Args:
        q: fairness; 0 is plain averaging. The higher, the more alike the owners' losses.
        learning_rate: of the owners' steps.

    Raises:
        ValueError: a setting out of its range.

    >>> answers = [Answer(owner=i, arrays={"w": np.float32([w])}, loss=0.5) for i, w in enumerate((1.0, 3.0))]
    >>> combined(fairly(0.0, 0.1), {"w": np.float32([0.0])}, answers)["w"].tolist()
    [2.0]
    """
    if not (math.isfinite(q) and q >= 0.0):
        raise ValueError(f"expected a finite number of at least 0, got q={q}")
    if not (math.isfinite(learning_rate) and learning_rate > 0.0):
        raise ValueError(f"expected a finite number above 0, got learning_rate={learning_rate}")
    return lambda centre: _Fair(centre, q, 1.0 / learning_rate)


def by_rule(rule: str, *, hostile: int = 0, trim: float = 0.1, bound: float | None = None) -> Combine:
    """One of the robust rules of `robust.aggregate`.

    An answer that is missing, or was set aside, may be one of the hostile ones: where fewer came than a rule needs for
    `hostile` of them, it tolerates as many as it can; three answers at least, or it is the median.

    >>> answers = [Answer(owner=i, arrays={"w": np.float32([w])}) for i, w in enumerate((1.0, 2.0, 900.0))]
    >>> combined(by_rule("median"), {"w": np.float32([0.0])}, answers)["w"].tolist()
    [2.0]
    """
    if rule == "norm-bounded" and bound is not None:
        return bounded(bound)

    def apply(centre: Arrays, stacked: Arrays, answers: int) -> Arrays:
        spare = (answers - 3) // _NEEDS.get(rule, 1)
        if rule in _NEEDS and spare < 0:
            return aggregate("median", stacked, centre)
        return aggregate(rule, stacked, centre, hostile=min(hostile, max(spare, 0)), trim=trim, bound=bound)

    return lambda centre: _Gathered(centre, apply)


class _Mean:
    def __init__(self, centre: Arrays, weights: Mapping[int, float] | None) -> None:
        self._total = {name: np.zeros(array.shape) for name, array in centre.items()}
        self._weights, self._share = weights, 0.0

    def add(self, answer: Answer) -> None:
        share = 1.0 if self._weights is None else self._weights[answer.owner]
        for name, total in self._total.items():
            _add(total, answer.arrays[name], share)
        self._share += share

    def result(self) -> Arrays:
        return {name: _quotient(self._total.pop(name), self._share) for name in list(self._total)}


class _Bounded:
    def __init__(self, centre: Arrays, bound: float) -> None:
        self._centre, self._bound, self._answers = centre, bound, 0
        self._total = {name: np.zeros(array.shape) for name, array in centre.items()}

    def add(self, answer: Answer) -> None:
        norm = math.sqrt(_squared_step(self._centre, answer.arrays))
        factor = self._bound / norm if norm > self._bound else 1.0
        for name, total in self._total.items():
            _add_step(total, answer.arrays[name], self._centre[name], factor)
        self._answers += 1

    def result(self) -> Arrays:
        return _moved(self._centre, self._total, self._answers)


class _Fair:
    def __init__(self, centre: Arrays, q: float, lipschitz: float) -> None:
        self._centre, self._q, self._lipschitz = centre, q, lipschitz
        self._total = {name: np.zeros(array.shape) for name, array in centre.items()}
        self._largest, self._divisor = 0.0, 0.0

    def add(self, answer: Answer) -> None:
        if answer.loss is None or not math.isfinite(answer.loss) or answer.loss < 0.0:
            raise ValueError(f"expected a finite loss of at least 0 from owner {answer.owner}, got {answer.loss}")
        loss, q, lipschitz = answer.loss + 1e-10, self._q, self._lipschitz
        if loss > self._largest:  # the largest loss cancels: its power may be too large for a float
            for total in self._total.values():
                total *= (self._largest / loss) ** q
            self._divisor *= (self._largest / loss) ** q
            self._largest = loss
        power = (loss / self._largest) ** q
        squared = lipschitz**2 * _squared_step(self._centre, answer.arrays)
        for name, total in self._total.items():
            _add_step(total, answer.arrays[name], self._centre[name], power * lipschitz)
        self._divisor += power * (q / loss * squared + lipschitz)

    def result(self) -> Arrays:
        return _moved(self._centre, self._total, self._divisor)


class _Gathered:
    """All answers, for a rule that needs them at once; in the order of their owners, whichever came first."""

    def __init__(self, centre: Arrays, rule: Callable[[Arrays, Arrays, int], Arrays]) -> None:
        self._centre, self._rule = centre, rule
        self._owners: list[int] = []
        self._arrays: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in centre}

    def add(self, answer: Answer) -> None:
        self._owners.append(answer.owner)
        for name, arrays in self._arrays.items():
            arrays.append(answer.arrays[name])

    def result(self) -> Arrays:
        order = np.argsort(self._owners, kind="stable")
        stacked = {}
        for name in self._centre:  # what is stacked is let go of
            arrays = self._arrays.pop(name)
            stacked[name] = np.stack([arrays[place] for place in order])
        return self._rule(self._centre, stacked, len(order))


def _blocks(size: int) -> Iterable[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _add(total: _Wide, values: npt.NDArray[np.float32], share: float) -> None:
    """Adds share·values to a sum, without a copy of either."""
    if share == 1.0:
        np.add(total, values, out=total)
        return
    wide, narrow = total.reshape(-1), values.reshape(-1)
    for block in _blocks(wide.size):
        wide[block] += share * narrow[block].astype(np.float64)


def _add_step(total: _Wide, values: npt.NDArray[np.float32], centre: npt.NDArray[np.float32], factor: float) -> None:
    """Adds factor·(values - centre) to a sum."""
    wide, after, before = total.reshape(-1), values.reshape(-1), centre.reshape(-1)
    for block in _blocks(wide.size):
        wide[block] += factor * (after[block].astype(np.float64) - before[block])


def _squared_step(centre: Arrays, arrays: Arrays) -> float:
    """Squared L2 norm of the way from the centre, over all arrays together."""
    total = 0.0
    for name, start in centre.items():
        before, after = start.reshape(-1), arrays[name].reshape(-1)
        for block in _blocks(before.size):
            step = after[block].astype(np.float64) - before[block]
            total += float(step @ step)
    return total


def _moved(centre: Arrays, total: dict[str, _Wide], divisor: float) -> Arrays:
    """The centre, moved by a sum of steps from it over the divisor; the sum is used up."""
    return {name: _quotient(total.pop(name), divisor, centre[name]) for name in list(total)}


def _quotient(total: _Wide, divisor: float, centre: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """A sum over a divisor, from the centre on; in place, as the sum is used up."""
    np.divide(total, divisor, out=total)
    if centre is not None:
        np.add(total, centre, out=total)
    return total.astype(np.float32)
