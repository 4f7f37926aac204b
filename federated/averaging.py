"""The Flower strategy that asks owners and combines their answers, and arrays as Flower sends them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tacit.federated.admission import checked_view
from tacit.federated.checkpoint import State
from tacit.federated.clipping import Arrays
from tacit.federated.evaluation import Evaluations, ask
from tacit.federated.folding import Answer, Combine, weighted
from tacit.federated.replies import Cohort, arrays_in, metrics_in
from tacit.federated.scaffold import ControlVariates
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.update_codec import Codec

__all__ = [
    "CORRECTION",
    "LOSS",
    "FederatedAveraging",
    "decoded",
    "from_record",
    "owner_index",
    "part",
    "to_record",
    "views_of",
]

CORRECTION = "correction"  # the record that carries SCAFFOLD's c - c_i
LOSS = "loss"  # the key that asks for a loss, and the one that carries it


@dataclass(kw_only=True)
class FederatedAveraging(Strategy):
    """Asks owners, combines what comes back in the order of the owners, and takes a step of the server's optimizer.

    Attributes:
        rounds: planned, for the schedule.
        optimizer: what the server does with the combined model.
        combine: takes up answers; the uniform mean unless given.
        evaluations: when to ask the owners how often the model is right; never when None.
        select: which of the nodes take part in a round, by public randomness; all when None.
        codec: what answers are sent as; None for whole models.
        variates: SCAFFOLD's, or None.
        asks_loss: whether answers come with a loss.
        optimizer_state: part of a checkpoint.
        folds: replies may be a stream that is read once.
    """

    rounds: int
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    combine: Combine = field(default_factory=weighted)
    evaluations: Evaluations | None = None
    select: Callable[[Sequence[int], int], Sequence[int]] | None = None
    codec: Codec | None = None
    variates: ControlVariates | None = None
    asks_loss: bool = False
    optimizer_state: Arrays = field(default_factory=dict)
    folds: ClassVar[bool] = True
    _weights: Arrays = field(default_factory=dict)
    _owner_of: dict[int, int] = field(default_factory=dict)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each chosen node, all carrying the same record."""
        self._weights = views_of(arrays)
        nodes: Sequence[int] = sorted(grid.get_node_ids())
        if self.select is not None:
            nodes = self.select(nodes, server_round)
        asked = ConfigRecord({**config, "server-round": server_round, **({LOSS: True} if self.asks_loss else {})})
        if self.variates is None:
            return ask(nodes, MessageType.TRAIN, arrays, asked)
        return [Message(self._corrected(node, arrays, asked), node, MessageType.TRAIN) for node in nodes]

    def _corrected(self, node: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        variates = self.variates or ControlVariates(owners=1, scale=1.0)
        # A node that has never answered has no variate of its own yet.
        correction = to_record(variates.correction(self._owner_of.get(node), self._weights))
        return RecordDict({"arrays": arrays, "config": config, CORRECTION: correction})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What came back, combined, through the server's optimizer; nothing when nothing came.

        Replies are taken up as they come: what follows from all of them follows once there are no more.
        """
        fold, clients = self.combine(self._weights), 0
        moved = None if self.variates is None else self.variates.begin(self._weights)
        for answer in self._answers_of(replies) if isinstance(replies, Cohort) else self._answers(replies):
            fold.add(answer)
            if moved is not None:
                moved.add(answer.owner, answer.arrays)
            clients += 1
            del answer  # the next one is made without it
        if not clients or not self._weights:
            return None, None
        if moved is not None:
            moved.finish()
        weights, self.optimizer_state = self.optimizer.step(
            self._weights, fold.result(), self.optimizer_state, server_round=server_round, rounds=self.rounds
        )
        return to_record(weights), MetricRecord({"clients": clients})

    def _answers_of(self, cohort: Cohort) -> Iterator[Answer]:
        self._owner_of |= dict(zip(cohort.nodes, cohort.owners, strict=True))
        for place in sorted(range(len(cohort)), key=cohort.owners.__getitem__):
            yield Answer(owner=cohort.owners[place], arrays=cohort.unfold(cohort.rows[place]))

    def _answers(self, replies: Iterable[Message]) -> Iterator[Answer]:
        for reply in replies:
            if reply.has_content():
                self._owner_of[reply.metadata.src_node_id] = owner_index(reply.content)
                yield self._answer(reply.content)
            del reply

    def _answer(self, content: RecordDict) -> Answer:
        loss = metrics_in(content).get(LOSS)
        return Answer(
            owner=owner_index(content),
            arrays=decoded(views_of(arrays_in(content)), self._weights, self.codec),
            loss=float(loss) if isinstance(loss, int | float) else None,
        )

    def state(self) -> State:
        """What a checkpoint keeps."""
        control = {} if self.variates is None else self.variates.state()
        nodes = np.array(sorted(self._owner_of.items()), np.uint64).reshape(-1, 2)  # Flower's ids take all 64 bits
        return {
            **{f"optimizer.{name}": array for name, array in self.optimizer_state.items()},
            **{f"control.{name}": array for name, array in control.items()},
            **({"nodes": nodes} if control else {}),
        }

    def restore(self, state: State) -> None:
        """Takes up what `state` kept."""
        self.optimizer_state = part(state, "optimizer.")
        if self.variates is not None:
            self.variates.restore(part(state, "control."))
        self._owner_of = {int(node): int(owner) for node, owner in state.get("nodes", np.zeros((0, 2)))}

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


def decoded(sent: Arrays, before: Arrays, codec: Codec | None) -> Arrays:
    """The model after an owner's steps, from what it sent: itself, or its update in a codec's form.

    Raises:
        ValueError: not what the codec makes.
    """
    if codec is None:
        return sent
    update = codec.decode(sent, before)
    return {name: np.asarray(before[name] + update[name], dtype=np.float32) for name in before}


def part(state: State, prefix: str) -> State:
    """The entries of a state whose names begin with a prefix, without it.

    >>> part({"a.w": np.float32([1.0]), "b.w": np.float32([2.0])}, "b.")["w"].tolist()
    [2.0]
    """
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


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


def views_of(record: ArrayRecord) -> Arrays:
    """As `from_record`, without a copy where the bytes are as NumPy writes them: read-only.

    >>> views_of(to_record({"w": np.float32([1.0, 2.0])}))["w"].tolist()
    [1.0, 2.0]
    """
    found = {}
    for name, array in record.items():
        view = checked_view(array, array.dtype, array.shape)
        found[name] = array.numpy() if view is None else view
    return found


def owner_index(content: RecordDict) -> int:
    """The index of the owner that an answer is from.

    Raises:
        ValueError: it says none.
    """
    index = metrics_in(content)["owner"]
    if not isinstance(index, int):
        raise ValueError(f"expected an owner's index in a reply, got {index!r}")
    return index
