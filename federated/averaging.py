"""Averaging: pure functions on arrays, and the thin Flower strategy that asks owners and combines their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tacit.federated.checkpoint import State
from tacit.federated.clipping import Arrays
from tacit.federated.evaluation import Evaluations, ask
from tacit.federated.replies import Cohort
from tacit.federated.robust import aggregate, q_ffl_step
from tacit.federated.scaffold import ControlVariates
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.update_codec import Codec

__all__ = [
    "CORRECTION",
    "LOSS",
    "Answer",
    "Combine",
    "FederatedAveraging",
    "by_rule",
    "decoded",
    "fairly",
    "from_record",
    "mean",
    "owner_index",
    "part",
    "to_record",
    "weighted",
]

CORRECTION = "correction"  # the record that carries SCAFFOLD's c - c_i
_NEEDS = {"krum": 2, "multi-krum": 2, "bulyan": 4}  # answers for each hostile one, besides three
LOSS = "loss"  # the key that asks for a loss, and the one that carries it


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


# From the model that a round began with and its answers, in the order of their owners, to one model.
Combine = Callable[[Arrays, Sequence[Answer]], Arrays]


def weighted(weights: Mapping[int, float] | None = None) -> Combine:
    """The mean, by public weights of the owners; uniform when None.

    >>> answers = [Answer(owner=0, arrays={"w": np.float32([1.0])}), Answer(owner=1, arrays={"w": np.float32([4.0])})]
    >>> weighted({0: 2.0, 1: 1.0})({}, answers)["w"].tolist()
    [2.0]
    """

    def combine(_: Arrays, answers: Sequence[Answer]) -> Arrays:
        shares = None if weights is None else [weights[answer.owner] for answer in answers]
        return mean([answer.arrays for answer in answers], shares)

    return combine


def by_rule(rule: str, *, hostile: int = 0, trim: float = 0.1, bound: float | None = None) -> Combine:
    """One of the robust rules of `robust.aggregate`.

    An answer that is missing, or was set aside, may be one of the hostile ones: where fewer came than a rule needs for
    `hostile` of them, it tolerates as many as it can; three answers at least, or it is the median.

    >>> answers = [Answer(owner=i, arrays={"w": np.float32([w])}) for i, w in enumerate((1.0, 2.0, 900.0))]
    >>> by_rule("median")({"w": np.float32([0.0])}, answers)["w"].tolist()
    [2.0]
    """

    def combine(centre: Arrays, answers: Sequence[Answer]) -> Arrays:
        stacked = {name: np.stack([answer.arrays[name] for answer in answers]) for name in centre}
        spare = (len(answers) - 3) // _NEEDS.get(rule, 1)
        if rule in _NEEDS and spare < 0:
            return aggregate("median", stacked, centre)
        return aggregate(rule, stacked, centre, hostile=min(hostile, max(spare, 0)), trim=trim, bound=bound)

    return combine


def fairly(q: float, learning_rate: float) -> Combine:
    """q-FFL: owners with a higher loss weigh more (Li et al. 2020); each answer needs its loss.

    Args:
        q: fairness; 0 is plain averaging.
        learning_rate: of the owners' steps.
    """

    def combine(centre: Arrays, answers: Sequence[Answer]) -> Arrays:
        stacked = {name: np.stack([answer.arrays[name] for answer in answers]) for name in centre}
        losses = np.array([np.nan if answer.loss is None else answer.loss for answer in answers])
        return q_ffl_step(centre, stacked, losses, q=q, learning_rate=learning_rate)

    return combine


@dataclass(kw_only=True)
class FederatedAveraging(Strategy):
    """Asks owners, combines what comes back in the order of the owners, and takes a step of the server's optimizer.

    Attributes:
        rounds: planned, for the schedule.
        optimizer: what the server does with the combined model.
        combine: from answers to one model; the uniform mean unless given.
        evaluations: when to ask the owners how often the model is right; never when None.
        select: which of the nodes take part in a round, by public randomness; all when None.
        codec: what answers are sent as; None for whole models.
        variates: SCAFFOLD's, or None.
        asks_loss: whether answers come with a loss.
        optimizer_state: part of a checkpoint.
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
    _weights: Arrays = field(default_factory=dict)
    _owner_of: dict[int, int] = field(default_factory=dict)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each chosen node, all carrying the same record."""
        self._weights = from_record(arrays)
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
        """What came back, combined, through the server's optimizer; nothing when nothing came."""
        answers = self._answers_of(replies) if isinstance(replies, Cohort) else self._answers(replies)
        if not answers or not self._weights:
            return None, None
        if self.variates is not None:
            self.variates.take(self._weights, [(answer.owner, answer.arrays) for answer in answers])
        weights, self.optimizer_state = self.optimizer.step(
            self._weights,
            self.combine(self._weights, answers),
            self.optimizer_state,
            server_round=server_round,
            rounds=self.rounds,
        )
        return to_record(weights), MetricRecord({"clients": len(answers)})

    def _answers_of(self, cohort: Cohort) -> list[Answer]:
        self._owner_of |= dict(zip(cohort.nodes, cohort.owners, strict=True))
        order = sorted(range(len(cohort)), key=cohort.owners.__getitem__)
        return [Answer(owner=cohort.owners[place], arrays=cohort.unfold(cohort.rows[place])) for place in order]

    def _answers(self, replies: Iterable[Message]) -> list[Answer]:
        good = [reply for reply in replies if reply.has_content()]
        self._owner_of |= {reply.metadata.src_node_id: owner_index(reply.content) for reply in good}
        return [self._answer(content) for content in sorted((reply.content for reply in good), key=owner_index)]

    def _answer(self, content: RecordDict) -> Answer:
        loss = content.metric_records["metrics"].get(LOSS)
        return Answer(
            owner=owner_index(content),
            arrays=decoded(from_record(content.array_records["arrays"]), self._weights, self.codec),
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


def owner_index(content: RecordDict) -> int:
    """The index of the owner that an answer is from.

    Raises:
        ValueError: it says none.
    """
    index = content.metric_records["metrics"]["owner"]
    if not isinstance(index, int):
        raise ValueError(f"expected an owner's index in a reply, got {index!r}")
    return index
