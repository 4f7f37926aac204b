"""FedBuff: owners that train at their own pace, and a server that steps whenever enough of them have come back.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (arXiv 2106.06639), algorithm 1. In a
simulation the pace comes from a virtual clock: a round is what fills the buffer once, each of its owners is asked with
the model that was the newest when it began, and nothing waits for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tacit.federated.averaging import decoded, from_record, part, to_record, views_of
from tacit.federated.checkpoint import State
from tacit.federated.clipping import Arrays
from tacit.federated.evaluation import Evaluations
from tacit.federated.noise import public_generator
from tacit.federated.replies import arrays_in
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.update_codec import Codec

__all__ = ["BufferedAveraging", "Flight"]


@dataclass(frozen=True, order=True)
class Flight:
    """An owner at work.

    Attributes:
        finish_s: on the virtual clock.
        node: which.
        version: of the model that it began with: rounds that were over then.
    """

    finish_s: float
    node: int
    version: int


@dataclass(kw_only=True)
class BufferedAveraging(Strategy):
    """w ← w + η·Σ s(τ)·Δ / K over the K owners that came back first; s(τ) = (1 + τ)^-½ for an update τ rounds old.

    Attributes:
        rounds: planned.
        optimizer: what the server does with the mean.
        buffer: K.
        concurrency: owners at work at any time.
        duration_s: of an owner's work, by node and the round in which it began.
        seed: the recipe's, for who begins when one has come back.
        codec: what answers are sent as; None for whole models.
        evaluations: when to ask the owners how often the model is right; never when None.
        clock_s: virtual seconds that have passed.
        last_round_s: virtual seconds that the last round took.
        folds: replies may be a stream that is read once.
    """

    rounds: int
    optimizer: ServerOptimizer
    buffer: int
    concurrency: int
    duration_s: Callable[[int, int], float]
    seed: int
    codec: Codec | None = None
    evaluations: Evaluations | None = None
    clock_s: float = 0.0
    last_round_s: float = 0.0
    folds: ClassVar[bool] = True
    optimizer_state: Arrays = field(default_factory=dict)
    _flights: list[Flight] = field(default_factory=list)
    _models: dict[int, Arrays] = field(default_factory=dict)
    _asked: dict[int, int] = field(default_factory=dict)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks the owners that come back next, each with the model that it began with."""
        self._models[server_round - 1] = from_record(arrays)
        nodes = sorted(grid.get_node_ids())
        arrived: list[Flight] = []
        began_s = self.clock_s
        generator = public_generator(self.seed, "buffer", server_round)
        self._begin(nodes, arrived, server_round, generator)
        while self._flights and len(arrived) < self.buffer:
            landed = min(self._flights)
            self._flights.remove(landed)
            self.clock_s = landed.finish_s
            arrived.append(landed)
            self._begin(nodes, arrived, server_round, generator)
        self.last_round_s = self.clock_s - began_s
        self._asked = {flight.node: flight.version for flight in arrived}
        records = {v: to_record(self._models[v]) for v in {flight.version for flight in arrived}}
        asked = ConfigRecord({**config, "server-round": server_round})
        return [
            Message(RecordDict({"arrays": records[f.version], "config": asked}), f.node, MessageType.TRAIN)
            for f in arrived
        ]

    def _begin(
        self, nodes: Sequence[int], arrived: Sequence[Flight], server_round: int, generator: np.random.Generator
    ) -> None:
        """Fills the places at work with owners that are idle; one whose answer is in the buffer waits for the step."""
        busy = {flight.node for flight in [*self._flights, *arrived]}
        idle = [node for node in nodes if node not in busy]
        places = min(self.concurrency - len(self._flights), len(idle))
        for node in generator.choice(idle, max(0, places), replace=False).tolist() if idle else []:
            finish_s = self.clock_s + self.duration_s(node, server_round)
            self._flights.append(Flight(finish_s, node, server_round - 1))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One step with what came back; nothing when nothing did."""
        weights, count = self._models[server_round - 1], 0
        total = {name: np.zeros(array.shape) for name, array in weights.items()}
        for reply in replies:
            if not reply.has_content():
                continue
            version = self._asked[reply.metadata.src_node_id]
            before = self._models[version]
            after = decoded(views_of(arrays_in(reply.content)), before, self.codec)
            share = (server_round - version) ** -0.5  # one round old is as fresh as can be
            for name in total:
                total[name] += share * (after[name].astype(np.float64) - before[name])
            count += 1
            del reply, after
        self._forget()
        if not count:
            return None, None
        averaged = {n: np.asarray(weights[n] + total[n] / count, dtype=np.float32) for n in weights}
        moved, self.optimizer_state = self.optimizer.step(
            weights, averaged, self.optimizer_state, server_round=server_round, rounds=self.rounds
        )
        return to_record(moved), MetricRecord({"clients": count})

    def _forget(self) -> None:
        """Drops the models that nobody is working on."""
        needed = {flight.version for flight in self._flights}
        self._models = {version: model for version, model in self._models.items() if version in needed}

    def state(self) -> State:
        """What a checkpoint keeps: who is at work since when, and the models that they began with."""
        flights = {
            "clock": np.array([self.clock_s]),
            "finish": np.array([flight.finish_s for flight in self._flights]),
            "node": np.array([flight.node for flight in self._flights], np.uint64),
            "version": np.array([flight.version for flight in self._flights], np.int64),
        }
        models = {f"model.{version}.{n}": a for version, model in self._models.items() for n, a in model.items()}
        optimizer = {f"optimizer.{name}": array for name, array in self.optimizer_state.items()}
        return {**flights, **models, **optimizer}

    def restore(self, state: State) -> None:
        """Takes up what `state` kept."""
        if "clock" not in state:
            return
        self.clock_s = float(state["clock"][0])
        columns = zip(state["finish"], state["node"], state["version"], strict=True)
        self._flights = [Flight(float(finish), int(node), int(version)) for finish, node, version in columns]
        self.optimizer_state, self._models = part(state, "optimizer."), {}
        for key, array in part(state, "model.").items():
            version, _, name = key.partition(".")
            self._models.setdefault(int(version), {})[name] = array

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each node in a round whose evaluation was planned; each owner charges it."""
        if self.evaluations is None:
            return []
        return self.evaluations.ask(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the owners' noised counts come to; None when nobody was asked or nobody answered."""
        if self.evaluations is None:
            return None
        return self.evaluations.of_owners(reply.content for reply in replies if reply.has_content())

    def summary(self) -> None:
        """Nothing to log: the recipe says it all."""
