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

from tacit.federated.train import Arrays

__all__ = ["FederatedAveraging", "ServerOptimizer", "from_record", "mean", "momentum_step", "to_record"]


def mean(updates: Sequence[Arrays]) -> Arrays:
    """The unweighted mean, summed in the order given so that the same replies give the same bytes.

    >>> mean([{"w": np.float32([1.0])}, {"w": np.float32([3.0])}])["w"].tolist()
    [2.0]
    """
    total = {name: array.astype(np.float64) for name, array in updates[0].items()}
    for update in updates[1:]:
        for name in total:
            total[name] += update[name]
    # asarray: NumPy's arithmetic turns arrays of no dimension into scalars, which Flower does not send.
    return {name: np.asarray(array / len(updates), dtype=np.float32) for name, array in total.items()}


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
    """

    rounds: int
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    velocity: Arrays | None = None
    _weights: Arrays | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each node, all carrying the same record."""
        self._weights = from_record(arrays)
        config = ConfigRecord({**config, "server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node_id, MessageType.TRAIN) for node_id in sorted(grid.get_node_ids())]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of what came back, through the server's optimizer; nothing when nothing came."""
        contents = sorted((reply.content for reply in replies if reply.has_content()), key=_owner_index)
        if not contents or self._weights is None:
            return None, None
        averaged = mean([from_record(content.array_records["arrays"]) for content in contents])
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
        """None: figures from an owner's records would have to be charged."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as above."""
        return None

    def summary(self) -> None:
        """Nothing to log: the recipe says it all."""


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
