"""Averaging and server momentum: pure functions on arrays, and the thin Flower strategy that uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tacit.federated.evaluation import Evaluations
from tacit.federated.train import Arrays

__all__ = ["FederatedAveraging", "ServerOptimizer", "ask", "from_record", "mean", "momentum_step", "to_record"]


def mean(updates: Sequence[Arrays], weights: Sequence[float] | None = None) -> Arrays:
    """The mean, summed in the order given so that the same replies give the same bytes.

    Args:
        updates: one for each reply.
        weights: public constants, one for each; uniform when None.

    >>> mean([{"w": np.float32([1.0])}, {"w": np.float32([3.0])}])["w"].tolist()
    [2.0]
    """
    shares = [1.0] * len(updates) if weights is None else weights
    total = {name: np.zeros(array.shape) for name, array in updates[0].items()}
    for share, update in zip(shares, updates, strict=True):
        for name in total:
            total[name] += share * update[name].astype(np.float64)
    # asarray: NumPy's arithmetic turns arrays of no dimension into scalars, which Flower does not send.
    return {name: np.asarray(array / sum(shares), dtype=np.float32) for name, array in total.items()}


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """SGD with momentum on the pseudo-gradient (FedAvgM, Hsu et al. 2019).

    Attributes:
        learning_rate: 1 and no momentum is plain FedAvg.
        momentum: in [0, 1).
        schedule: "constant", or "cosine" to zero over the planned rounds.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    def rate(self, server_round: int, rounds: int) -> float:
        """The learning rate of a round, from 1.

        >>> ServerOptimizer(schedule="cosine").rate(1, 10)
        1.0
        """
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (server_round - 1) / rounds))


def momentum_step(
    weights: Arrays, averaged: Arrays, velocity: Arrays | None, *, learning_rate: float, momentum: float
) -> tuple[Arrays, Arrays]:
    """One server step: v ← momentum·v + (w - averaged), w ← w - learning_rate·v.

    Returns:
        New weights and new velocity.

    >>> weights, averaged = {"w": np.float32([1.0])}, {"w": np.float32([0.5])}
    >>> moved, velocity = momentum_step(weights, averaged, None, learning_rate=0.5, momentum=0.9)
    >>> moved["w"].tolist(), velocity["w"].tolist()
    ([0.75], [0.5])
    """
    gradient = {name: weights[name] - averaged[name] for name in weights}
    fresh = gradient if velocity is None else {n: momentum * velocity[n] + gradient[n] for n in weights}
    moved = {n: np.asarray(weights[n] - np.float32(learning_rate) * fresh[n], dtype=np.float32) for n in weights}
    return moved, {n: np.asarray(v, dtype=np.float32) for n, v in fresh.items()}


@dataclass
class FederatedAveraging(Strategy):
    """Every node, every round, uniform public weights; replies are taken in the order of their owners.

    Attributes:
        rounds: planned, for the schedule.
        optimizer: what the server does with the mean.
        velocity: its momentum, part of a checkpoint.
        weights: public weight of each owner, by index; uniform when None.
        evaluations: when to ask the owners how often the model is right; never when None.
    """

    rounds: int
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    velocity: Arrays | None = None
    evaluations: Evaluations | None = None
    weights: Mapping[int, float] | None = None
    _weights: Arrays | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each node, all carrying the same record."""
        self._weights = from_record(arrays)
        config = ConfigRecord({**config, "server-round": server_round})
        return ask(sorted(grid.get_node_ids()), MessageType.TRAIN, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of what came back, through the server's optimizer; nothing when nothing came."""
        contents = sorted((reply.content for reply in replies if reply.has_content()), key=_owner_index)
        if not contents or self._weights is None:
            return None, None
        shares = None if self.weights is None else [self.weights[_owner_index(content)] for content in contents]
        averaged = mean([from_record(content.array_records["arrays"]) for content in contents], shares)
        weights, self.velocity = momentum_step(
            self._weights,
            averaged,
            self.velocity,
            learning_rate=self.optimizer.rate(server_round, self.rounds),
            momentum=self.optimizer.momentum,
        )
        return to_record(weights), MetricRecord({"clients": len(contents)})

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        return dict(self.velocity or {})

    def restore(self, state: Arrays) -> None:
        """Takes up what `state` kept."""
        self.velocity = dict(state) or None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each node in a round whose evaluation was planned; each owner charges it."""
        if self.evaluations is None or not self.evaluations.due(server_round):
            return []
        config = ConfigRecord({**config, "server-round": server_round})
        return ask(sorted(grid.get_node_ids()), MessageType.EVALUATE, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the owners' noised counts come to; None when nobody was asked or nobody answered."""
        if self.evaluations is None:
            return None
        return self.evaluations.of_owners(reply.content for reply in replies if reply.has_content())

    def summary(self) -> None:
        """Nothing to log: the recipe says it all."""


def ask(nodes: Iterable[int], message_type: str, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
    """The same question for each node, in their order."""
    content = RecordDict({"arrays": arrays, "config": config})
    return [Message(content, node, message_type) for node in nodes]


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays as Flower sends them.

    >>> to_record({"w": np.float32([1.0, 2.0])})["w"].numpy().tolist()
    [1.0, 2.0]
    """
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> Arrays:
    """Arrays as NumPy reads them (never a pickle: Flower's wire format is .npy).

    >>> from_record(to_record({"w": np.float32([1.0, 2.0])}))["w"].tolist()
    [1.0, 2.0]
    """
    return {name: array.numpy() for name, array in record.items()}


def _owner_index(content: RecordDict) -> int:
    index = content.metric_records["metrics"]["owner"]
    if not isinstance(index, int):
        raise ValueError(f"expected an owner's index in a reply, got {index!r}")
    return index
