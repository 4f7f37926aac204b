"""Failures as inputs: who drops out, is slow or sends garbage is a public function of seed, round and owner.

The same run fails in the same way every time (`faulty_grid.py`). Time is simulated; nobody waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from tacit.federated.noise import public_generator

__all__ = ["Corruption", "Failures", "choose", "over_select"]

Corruption = Literal["nan", "sign-flip", "scale", "random", "zero", "shape", "count", "replay", "keys"]


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What goes wrong in a run; nothing by default. No secret rests on it: it is drawn from the recipe's seed.

    Attributes:
        dropout: probability that an owner is away in a round. It is sent nothing, so it computes and charges nothing.
        straggler_share: probability that an owner's device is slow, drawn once for the run.
        slowdown: factor on a slow device's time.
        base_seconds: median time of a round on a device that is not slow.
        jitter: standard deviation of the logarithm of that time, over rounds.
        deadline_s: replies after it are late: computed and charged, but not used. None waits for everybody.
        corrupt_share: share of owners that send corrupted updates in all rounds; exactly so many, rounded, because
            robust rules promise something for a number of them.
        corruption: what they send; `faulty_grid.corrupt` says how.
        corruption_scale: factor of "scale" (below 0, a flip that is also scaled), and size of "random" in sizes of the
            update.
        seed: the recipe's.

    Raises:
        ValueError: a setting out of its range.

    >>> failures = Failures(dropout=0.5, seed=7)
    >>> [owner for owner in range(6) if failures.drops(owner, 1)] == [
    ...     owner for owner in range(6) if failures.drops(owner, 1)]
    True
    """

    dropout: float = 0.0
    straggler_share: float = 0.0
    slowdown: float = 4.0
    base_seconds: float = 1.0
    jitter: float = 0.2
    deadline_s: float | None = None
    corrupt_share: float = 0.0
    corruption: Corruption = "nan"
    corruption_scale: float = 10.0
    seed: int

    def __post_init__(self) -> None:
        for name in ("dropout", "straggler_share", "corrupt_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"expected a share in [0, 1], got {name}={getattr(self, name)}; correct it")
        for name, least in (("slowdown", 1.0), ("jitter", 0.0), ("corruption_scale", -math.inf)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"expected a finite number of at least {least}, got {name}={value}; correct it")
        for name in ("base_seconds", "deadline_s"):
            seconds = getattr(self, name)
            if seconds is not None and not 0.0 < seconds < math.inf:
                raise ValueError(f"expected seconds above 0, got {name}={seconds}; correct it")
        if self.corruption not in get_args(Corruption):
            raise ValueError(f"expected one of {get_args(Corruption)}, got corruption={self.corruption!r}; choose one")

    def drops(self, owner: int, server_round: int) -> bool:
        """Whether an owner is away in a round."""
        return bool(public_generator(self.seed, "dropout", server_round, owner).random() < self.dropout)

    def is_slow(self, owner: int) -> bool:
        """Whether an owner's device is slow, in every round."""
        return bool(public_generator(self.seed, "slow device", owner).random() < self.straggler_share)

    def duration(self, owner: int, server_round: int) -> float:
        """Simulated seconds from the question to the reply: log-normal around its median.

        >>> Failures(base_seconds=2.0, jitter=0.0, straggler_share=1.0, slowdown=3.0, seed=7).duration(0, 1)
        6.0
        """
        normal = float(public_generator(self.seed, "duration", server_round, owner).standard_normal())
        return self.base_seconds * (self.slowdown if self.is_slow(owner) else 1.0) * math.exp(self.jitter * normal)

    def is_late(self, owner: int, server_round: int) -> bool:
        """Whether an owner's reply comes after the deadline."""
        return self.deadline_s is not None and self.duration(owner, server_round) > self.deadline_s

    def corrupted(self, owners: Collection[int]) -> frozenset[int]:
        """Which of these owners send corrupted updates.

        >>> len(Failures(corrupt_share=0.2, seed=7).corrupted(range(20)))
        4
        """
        scores = {owner: public_generator(self.seed, "corrupt", owner).random() for owner in owners}
        ranked = sorted(scores, key=lambda owner: (scores[owner], owner))
        return frozenset(ranked[: round(self.corrupt_share * len(scores))])

    def round_seconds(self, owners: Iterable[int], server_round: int) -> float:
        """Simulated seconds that a server waits for the owners it asks: for the slowest, or to the deadline."""
        asked = list(owners)
        present = [owner for owner in asked if not self.drops(owner, server_round)]
        slowest = max((self.duration(owner, server_round) for owner in present), default=0.0)
        if self.deadline_s is None:
            return slowest
        return self.deadline_s if len(present) < len(asked) else min(slowest, self.deadline_s)


def over_select(count: int, factor: float, available: int) -> int:
    """How many owners to ask so that enough answer in time: count x factor, rounded up, at most all.

    Args:
        count: replies wanted.
        factor: from 1.
        available: owners that can be asked.

    Raises:
        ValueError: fewer available than wanted, or a factor below 1.

    >>> over_select(10, 1.3, 100), over_select(100, 1.1, 500), over_select(10, 2.0, 15)
    (13, 110, 15)
    """
    if not 1.0 <= factor < math.inf:
        raise ValueError(f"expected a factor of at least 1, got factor={factor}; 1.3 is usual")
    if not 1 <= count <= available:
        raise ValueError(f"expected 1 to {available} replies wanted, got count={count}; ask for fewer")
    # 100 x 1.1 is 110.00000000000001 in binary.
    return min(available, math.ceil(count * factor - 1e-9))


def choose(owners: Collection[int], count: int, *, seed: int, server_round: int) -> list[int]:
    """Which owners a round asks: a public choice, so it hides nobody and amplifies nothing (unit record, local, none).

    Args:
        owners: indices.
        count: how many, without replacement.
        seed: the recipe's.
        server_round: from 1.

    Returns:
        Their indices, sorted.

    Raises:
        ValueError: more than there are.

    >>> chosen = choose(range(10), 3, seed=7, server_round=1)
    >>> len(chosen), chosen == choose(reversed(range(10)), 3, seed=7, server_round=1)
    (3, True)
    """
    pool = sorted(set(owners))
    if not 0 <= count <= len(pool):
        raise ValueError(f"expected 0 to {len(pool)} owners to choose, got count={count}; ask for fewer")
    picked = public_generator(seed, "owners of a round", server_round).choice(len(pool), count, replace=False)
    return sorted(pool[position] for position in picked)
