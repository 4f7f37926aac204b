"""A Flower grid between a server and its owners on which things go wrong as `failures.py` says."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from tacit.federated.averaging import from_record, to_record
from tacit.federated.checkpoint import State
from tacit.federated.clipping import Arrays
from tacit.federated.failures import Corruption, Failures
from tacit.federated.noise import public_seed
from tacit.federated.replies import arrays_in, metrics_in
from tacit.federated.update_codec import Codec

__all__ = ["DROPPED", "LATE", "FaultyGrid", "corrupt"]

DROPPED, LATE = 101, 102  # error codes, apart from Flower's own
_FALSE_COUNT = 10**12
_ON_THE_WIRE = ("nan", "shape", "keys", "count", "replay")  # the others alter what an update means
_Array = npt.NDArray[np.float32]


def corrupt(
    update: Arrays, origin: Arrays, kind: Corruption, *, scale: float, seed: int, stale: Arrays | None = None
) -> Arrays:
    """What a broken or hostile client sends instead of its update. Integers on the wire are left as they are.

    - "nan": one NaN in each array. "keys": the first name is another. "shape": the first array is (1,), which NumPy
      would broadcast.
    - "sign-flip", "scale", "random", "zero", with d = update - origin: origin - d, origin + scale·d, origin +
      scale·rms(d)·N(0, 1), origin.
    - "replay": what it sent the first time; that time the origin. "count": the update itself, beside a false number.

    Args:
        update: what it would have sent.
        origin: what it was sent; an array that it lacks, or of another shape, counts as zeros.
        kind: see above.
        scale: of "scale" and "random"; -10 is a flip of ten times the length.
        seed: of "random".
        stale: for "replay".

    >>> update, origin = {"w": np.float32([3.0])}, {"w": np.float32([1.0])}
    >>> [float(corrupt(update, origin, k, scale=10.0, seed=7)["w"][0]) for k in ("sign-flip", "scale", "zero")]
    [-1.0, 21.0, 1.0]
    >>> float(corrupt(update, origin, "scale", scale=-10.0, seed=7)["w"][0])
    -19.0
    """
    first = next(iter(update))
    if kind == "keys":
        return {f"{name}." if name == first else name: array for name, array in update.items()}
    if kind == "shape":
        return {**update, first: _of_another_shape(update[first])}
    if kind == "replay" and stale is not None:
        return dict(stale)
    generator = np.random.Generator(np.random.PCG64DXSM(seed))
    # A scale may lift values out of float32's range: that is the front door's business, not a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: _altered(array, _base(origin.get(name), array), kind, scale, generator)
            for name, array in update.items()
        }


def _of_another_shape(array: _Array) -> _Array:
    shape = (1, 1) if array.shape == (1,) else (1,)
    return np.full(shape, array.flat[0] if array.size else 0, array.dtype)


def _base(origin: _Array | None, array: _Array) -> _Array:
    same = origin is not None and (origin.shape, origin.dtype) == (array.shape, array.dtype)
    return origin if origin is not None and same else np.zeros_like(array)


def _altered(array: _Array, base: _Array, kind: Corruption, scale: float, generator: np.random.Generator) -> _Array:
    if array.dtype.kind != "f" or kind == "count":
        return array
    if kind == "nan":
        spoilt = array.copy()
        spoilt.reshape(-1)[:1] = np.nan
        return spoilt
    step = array.astype(np.float64) - base
    if kind == "random":
        size = math.sqrt(float(np.mean(step**2))) if step.size else 0.0
        step = size * generator.standard_normal(step.shape)
    factor = {"sign-flip": -1.0, "scale": scale, "random": scale}.get(kind, 0.0)
    return np.asarray(base + factor * step, dtype=array.dtype)


class FaultyGrid(Grid):
    """Any Flower grid, with failures between it and the server.

    A dropped owner's message is answered with an error and never sent. A late or corrupt owner is asked, so what it did
    is charged; then its reply is replaced. Evaluations are dropped, but neither late nor corrupt.

    *Guarantees*: only public randomness decides, so failures say nothing of records. With secret cohorts
    `last_round_s` does: the slowest device tells who was drawn. Keep it in a file that only the server opens.

    Attributes:
        last_round_s: simulated seconds of the last round of training; 0 before.
    """

    def __init__(self, grid: Grid, failures: Failures, indices: Mapping[int, int], codec: Codec | None = None) -> None:
        """Wraps a grid.

        Args:
            grid: reaches the owners.
            failures: what goes wrong.
            indices: node id → owner index.
            codec: what replies are sent as; None for whole models.
        """
        self._grid, self._failures, self._indices, self._codec = grid, failures, dict(indices), codec
        self._corrupted = failures.corrupted(list(self._indices.values()))
        self._asked: dict[str, Message] = {}
        self._dropped: dict[str, Message] = {}
        self._stale: dict[int, Arrays] = {}
        self.last_round_s = 0.0

    def state(self) -> State:
        """What a checkpoint keeps: what owners that replay sent the first time."""
        return {f"{owner}.{name}": array for owner, sent in self._stale.items() for name, array in sent.items()}

    def restore(self, state: State) -> None:
        """Takes up what `state` kept."""
        self._stale = {}
        for key, array in state.items():
            owner, _, name = key.partition(".")
            self._stale.setdefault(int(owner), {})[name] = array

    def set_run(self, run: Run) -> None:
        """As the wrapped grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the wrapped grid's."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the wrapped grid's."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """As the wrapped grid's: who will be away is known only when it is asked."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends to those who are there."""
        asked = list(messages)
        present = self._drop(asked)
        pushed = set(self._grid.push_messages(present))
        self._asked |= {m.metadata.message_id: m for m in present if m.metadata.message_id in pushed}
        known = pushed | set(self._dropped)
        return [m.metadata.message_id for m in asked if m.metadata.message_id in known]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that there are, each once."""
        wanted = list(message_ids)
        errors = [self._dropped.pop(name) for name in wanted if name in self._dropped]
        replies = self._grid.pull_messages([name for name in wanted if name in self._asked])
        return [*errors, *(self._failed(reply, self._question(reply)) for reply in replies)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends to those who are there and returns what comes of it, in the order of the messages."""
        asked = list(messages)
        present = self._drop(asked)
        received = list(self._grid.send_and_receive(present, timeout=timeout))
        questions = {message.metadata.message_id: message for message in asked}
        places = {name: place for place, name in enumerate(questions)}
        replies = [self._dropped.pop(name) for name in questions if name in self._dropped]
        replies += [self._failed(reply, questions.get(reply.metadata.reply_to_message_id)) for reply in received]
        self._keep_time(asked)
        return sorted(replies, key=lambda reply: places.get(reply.metadata.reply_to_message_id, len(places)))

    def _drop(self, messages: Sequence[Message]) -> list[Message]:
        """Those that are sent; the others get their error."""
        present = []
        for message in messages:
            if self._failures.drops(self._owner(message), _round(message)):
                # Flower has no setter: its own links write the same field.
                message.metadata.__dict__["_message_id"] = secrets.token_hex(16)
                self._dropped[message.metadata.message_id] = Message(Error(DROPPED, "dropped"), reply_to=message)
            else:
                present.append(message)
        return present

    def _failed(self, reply: Message, question: Message | None) -> Message:
        """A reply as the server gets it."""
        if question is None or not reply.has_content() or not _is_training(question):
            return reply
        owner, server_round = self._owner(question), _round(question)
        if self._failures.is_late(owner, server_round):
            return Message(Error(LATE, "late"), reply_to=question)
        if owner not in self._corrupted:
            return reply
        return Message(self._spoilt(reply.content, question, owner, server_round), reply_to=question)

    def _spoilt(self, content: RecordDict, question: Message, owner: int, server_round: int) -> RecordDict:
        sent = from_record(arrays_in(content))
        origin = from_record(arrays_in(question.content))
        arrays = self._altered(sent, origin, owner, server_round)
        false = {"num-examples": _FALSE_COUNT} if self._failures.corruption == "count" else {}
        metrics = MetricRecord({**metrics_in(content), **false})
        return RecordDict({"arrays": to_record(arrays), "metrics": metrics})

    def _altered(self, sent: Arrays, origin: Arrays, owner: int, server_round: int) -> Arrays:
        kind, failures = self._failures.corruption, self._failures
        alter = functools.partial(
            corrupt,
            kind=kind,
            scale=failures.corruption_scale,
            seed=public_seed(failures.seed, "corruption", server_round, owner),
            stale=self._stale.get(owner),
        )
        if kind == "replay":
            self._stale.setdefault(owner, sent)
        if self._codec is None or kind in _ON_THE_WIRE:
            return alter(sent, origin)
        return self._codec.encode(alter(self._codec.decode(sent, origin), {}), None)[0]

    def _keep_time(self, asked: Sequence[Message]) -> None:
        if asked and _is_training(asked[0]):
            owners = [self._owner(message) for message in asked]
            self.last_round_s = self._failures.round_seconds(owners, _round(asked[0]))

    def _question(self, reply: Message) -> Message | None:
        return self._asked.pop(reply.metadata.reply_to_message_id, None)

    def _owner(self, message: Message) -> int:
        node = message.metadata.dst_node_id
        if node not in self._indices:
            raise ValueError(f"expected a node whose owner is known, got node={node}; add it to indices")
        return self._indices[node]


def _round(message: Message) -> int:
    config = message.content.config_records.get("config", ConfigRecord())
    value = config.get("server-round")
    if not isinstance(value, int):
        raise ValueError(f"expected server-round in a message's config, got {value!r}; send it with each round")
    return value


def _is_training(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
