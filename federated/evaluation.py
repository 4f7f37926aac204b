"""Accuracy on the owners' own records: two noised counts from each owner, charged like a training step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from tacit.federated.clipping import Arrays
from tacit.federated.mechanism import Mechanism
from tacit.federated.model_arrays import joined, read_arrays
from tacit.federated.noise import Randomness
from tacit.federated.noisy_sum import client_mean, noisy_sum, sum_mechanism
from tacit.federated.task import Model, Records

__all__ = [
    "Evaluations",
    "Evaluator",
    "Share",
    "ask",
    "count_evaluations",
    "evaluation_mechanism",
    "owners_accuracy",
    "reply_metrics",
    "share_of_correct",
]

_COUNTS = "counts"
_COLUMNS = ("owner", "owner-accuracy", "owner-low", "owner-high")
_QUANTILE = 1.959964  # of the standard normal, for an interval of 95 %


def evaluation_mechanism(mechanism: Mechanism, noise_multiplier: float, evaluations: int) -> Mechanism:
    """What an evaluation does to records, under the unit of the training that it belongs to.

    A record contributes (1, 0) where the model is right and (0, 1) where it is wrong: the L2 norm is 1 either way,
    where (right, 1) has √2. Unit client: a client contributes its shares of right and wrong, at most 1 together. Unit
    local: the same less ½ each, within √½, because how many owners there are is public.

    Args:
        mechanism: the training's.
        noise_multiplier: z of one evaluation.
        evaluations: how many are planned, as `count_evaluations` has it.

    >>> training = Mechanism(unit="record", sample_rate=0.1, max_grad_norm=4.0, noise_multiplier=1.0,
    ...                      steps_per_round=5, rounds=10, reference_size=64, delta=1e-5)
    >>> evaluation_mechanism(training, 10.0, count_evaluations(10, 4)).plan
    {Event(sample_rate=1.0, noise_multiplier=10.0): 3}
    """
    bound = math.sqrt(0.5) if mechanism.unit == "local" else 1.0
    return sum_mechanism(mechanism, norm_bound=bound, noise_multiplier=noise_multiplier, sums=evaluations)


def count_evaluations(rounds: int, every: int) -> int:
    """How many evaluations a run plans: one every so many rounds, and one after the last; 0 for every = 0.

    >>> count_evaluations(10, 4), count_evaluations(10, 5), count_evaluations(10, 0)
    (3, 2, 0)
    """
    return sum(_is_due(server_round, rounds, every) for server_round in range(1, rounds + 1))


def _is_due(server_round: int, rounds: int, every: int) -> bool:
    return every > 0 and (server_round % every == 0 or server_round == rounds)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """An owner's side: what its records say of a model.

    Attributes:
        mechanism: of `evaluation_mechanism`.
        model: its weights are overwritten at each call; not the model that trains.
    """

    mechanism: Mechanism
    model: Model

    def release(self, arrays: Arrays, records: Records, randomness: Randomness) -> Arrays:
        """The counts that leave an owner, noised where the owner is the one who adds noise.

        Args:
            arrays: the global model, by parameter name.
            records: the owner's; read after the charge.
            randomness: secret for a guarantee.

        Returns:
            "counts", (2,): of right and wrong answers (units record and none), or their shares (client, local).
        """
        read_arrays(self.model, joined(self.model, {}, arrays))
        self.model.eval()
        with torch.inference_mode():
            if self.mechanism.unit == "client":
                return {_COUNTS: client_mean(records, self._right_or_wrong, (2,), self.mechanism.max_grad_norm)}
            counts = noisy_sum(records, self._right_or_wrong, (2,), self.mechanism, randomness)
        return {_COUNTS: counts.numpy() + np.float32(0.5 if self.mechanism.unit == "local" else 0.0)}

    def _right_or_wrong(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        right = (self.model(inputs).argmax(1) == labels).to(torch.float32)
        counts = torch.cat([right, 1.0 - right])
        return counts - 0.5 if self.mechanism.unit == "local" else counts


def ask(nodes: Iterable[int], message_type: str, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
    """The same question for each node, in their order."""
    content = RecordDict({"arrays": arrays, "config": config})
    return [Message(content, node, message_type) for node in nodes]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """A strategy's side: when to ask, and what the answers come to.

    Attributes:
        mechanism: of `evaluation_mechanism`.
        rounds: planned.
        every: rounds between evaluations; the last round is always one.
    """

    mechanism: Mechanism
    rounds: int
    every: int

    def due(self, server_round: int) -> bool:
        """Whether the owners are asked after this round.

        >>> mechanism = Mechanism(unit="none", sample_rate=1.0, max_grad_norm=math.inf, noise_multiplier=0.0,
        ...                       steps_per_round=1, rounds=5, reference_size=1, delta=1e-5)
        >>> plan = Evaluations(mechanism=mechanism, rounds=5, every=2)
        >>> [server_round for server_round in range(1, 6) if plan.due(server_round)]
        [2, 4, 5]
        """
        return _is_due(server_round, self.rounds, self.every)

    def ask(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message for each node in a round whose evaluation was planned; each owner charges it."""
        if not self.due(server_round):
            return []
        asked = ConfigRecord({**config, "server-round": server_round})
        return ask(sorted(grid.get_node_ids()), MessageType.EVALUATE, arrays, asked)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the noise on each count of a release."""
        doubled = 2.0 if self.mechanism.unit == "local" else 1.0
        if self.mechanism.noise_multiplier == 0.0:
            return 0.0
        return doubled * self.mechanism.noise_multiplier * self.mechanism.max_grad_norm / self.mechanism.normaliser

    def noised(self, replies: Iterable[RecordDict], randomness: Randomness) -> Arrays:
        """What a server releases of its cohort's shares; a reply that breaks a rule of its own contributes zero."""
        shares = [{_COUNTS: counts} for counts in map(_read_counts, replies) if counts is not None]
        return self.mechanism.noisy_average(shares, {_COUNTS: np.zeros(2, np.float32)}, randomness)

    def of_cohort(self, counts: Arrays) -> MetricRecord:
        """What the shares that a server released say."""
        right, wrong = (float(count) for count in counts[_COUNTS])
        return _to_metrics(share_of_correct(right, wrong, self.noise_sd), self.noise_sd, {})

    def of_owners(self, replies: Iterable[RecordDict]) -> MetricRecord | None:
        """What the owners' counts say, one by one and together; None where nobody answered."""
        counts = dict(sorted(filter(None, map(_read_reply, replies))))
        if not counts:
            return None
        known = 1.0 if self.mechanism.unit == "local" else None  # a share's total is known
        by_owner = {index: share_of_correct(*pair, self.noise_sd, total=known) for index, pair in counts.items()}
        right, wrong = (math.fsum(pair[i] for pair in counts.values()) for i in (0, 1))
        total = None if known is None else known * len(counts)
        together = share_of_correct(right, wrong, self.noise_sd * math.sqrt(len(counts)), total=total)
        return _to_metrics(together, self.noise_sd, by_owner)


@dataclass(frozen=True)
class Share:
    """A share of right answers in [0, 1], and the interval of 95 % that its noise leaves.

    The interval speaks of the noise only: it says how many of these records were answered rightly, not how the model
    does on others. Where the noise leaves nothing it is all of [0, 1], and the value is NaN.
    """

    value: float
    low: float
    high: float


_NOTHING = Share(math.nan, 0.0, 1.0)


def share_of_correct(right: float, wrong: float, noise_sd: float, *, total: float | None = None) -> Share:
    """The share of right answers behind two noised counts: post-processing, which costs nothing.

    With an unknown total the share is a ratio r = R/(R + W). (1 - r)·right - r·wrong is Gaussian around 0 with variance
    σ²((1 - r)² + r²), so the interval is where its square is within the quantile: exact for any noise (Fieller 1954,
    "Some problems in interval estimation"), where a first-order standard error holds only for large counts.

    Args:
        right: noised count of right answers.
        wrong: noised count of wrong ones, with independent noise.
        noise_sd: σ, on each count.
        total: right + wrong before the noise, where it is public.

    >>> share_of_correct(90.0, 10.0, 0.0).value
    0.9
    >>> noised = share_of_correct(90.0, 10.0, 5.0)
    >>> round(noised.low, 3), round(noised.high, 3)
    (0.818, 0.998)
    >>> share_of_correct(-3.0, 1.0, 5.0)
    Share(value=nan, low=0.0, high=1.0)
    """
    if total is not None:
        value = 0.5 + (right - wrong) / (2.0 * total)
        half = _QUANTILE * noise_sd / (math.sqrt(2.0) * total)
        return _within_bounds(value, value - half, value + half)
    count, spread = right + wrong, (_QUANTILE * noise_sd) ** 2
    if not count > 0.0:
        return _NOTHING
    value = right / count

    def inside(share: float) -> bool:
        return share == value or (right - share * count) ** 2 <= spread * ((1.0 - share) ** 2 + share**2)

    # The difference of the two sides is a·r² + b·r + c.
    a, b, c = count**2 - 2.0 * spread, 2.0 * (spread - right * count), right**2 - spread
    root = math.sqrt(max(0.0, b * b - 4.0 * a * c))
    ends = [] if a == 0.0 else [(-b - root) / (2.0 * a), (-b + root) / (2.0 * a)]
    found = [r for r in ends if 0.0 <= r <= 1.0] + [r for r in (0.0, value, 1.0) if 0.0 <= r <= 1.0 and inside(r)]
    return _within_bounds(value, min(found), max(found)) if found else _NOTHING


def _within_bounds(value: float, low: float, high: float) -> Share:
    """An interval cut to [0, 1]; one that misses it, or covers it, says nothing."""
    if high < 0.0 or low > 1.0 or (low <= 0.0 and high >= 1.0):
        return _NOTHING
    return Share(min(max(value, 0.0), 1.0), max(low, 0.0), min(high, 1.0))


def owners_accuracy(record: MetricRecord, names: Sequence[str]) -> dict[str, object]:
    """An evaluation as a row of rounds.jsonl states it; what the noise left nothing of is None.

    Args:
        record: of `Evaluations`, or of another Flower strategy.
        names: of the owners, by index.

    >>> exact = Share(0.9, 0.9, 0.9)
    >>> stated = owners_accuracy(_to_metrics(exact, 0.0, {1: exact}), ["anna", "ben"])
    >>> stated["mean"], stated["by_owner"]
    (0.9, {'ben': {'accuracy': 0.9, 'low': 0.9, 'high': 0.9}})
    """
    columns = [column for name in _COLUMNS if isinstance(column := record.get(name), list)]
    if len(columns) < len(_COLUMNS):
        return {name: _number(value) for name, value in record.items()}
    by_owner = {
        names[index] if 0 <= index < len(names) else str(index): _stated(value, low, high)
        for index, value, low, high in zip(*columns, strict=True)
    }
    mean = {"mean": _number(record["accuracy"]), "low": _number(record["low"]), "high": _number(record["high"])}
    return {**mean, "confidence": 0.95, "noise_sd": _number(record["noise-sd"]), "by_owner": by_owner}


def _stated(value: object, low: object, high: object) -> dict[str, object]:
    return {"accuracy": _number(value), "low": _number(low), "high": _number(high)}


def reply_metrics(index: int, counts: Arrays) -> MetricRecord:
    """What an owner's reply carries: the released counts beside two public constants."""
    right, wrong = (float(count) for count in counts[_COUNTS])
    return MetricRecord({"num-examples": 1, "owner": index, "right": right, "wrong": wrong})


def _read_counts(content: RecordDict) -> npt.NDArray[np.float32] | None:
    """The counts of a reply, (2,), or None when it breaks a rule that looks at this reply alone."""
    metrics = content.metric_records.get("metrics")
    pair = [None if metrics is None else metrics.get(name) for name in ("right", "wrong")]
    numbers = [number for number in pair if isinstance(number, float) and math.isfinite(number)]
    return np.asarray(numbers, dtype=np.float32) if len(numbers) == 2 else None


def _read_reply(content: RecordDict) -> tuple[int, tuple[float, float]] | None:
    counts, metrics = _read_counts(content), content.metric_records.get("metrics")
    index = None if metrics is None else metrics.get("owner")
    return (index, (float(counts[0]), float(counts[1]))) if counts is not None and isinstance(index, int) else None


def _to_metrics(together: Share, noise_sd: float, by_owner: Mapping[int, Share]) -> MetricRecord:
    shares = list(by_owner.values())
    return MetricRecord(
        {
            "accuracy": together.value,
            "low": together.low,
            "high": together.high,
            "noise-sd": noise_sd,
            "owner": list(by_owner),
            "owner-accuracy": [share.value for share in shares],
            "owner-low": [share.low for share in shares],
            "owner-high": [share.high for share in shares],
        }
    )


def _number(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
