"""The Flower ClientApp: reserve, train or evaluate, release, reply."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tacit.devices.failpoint import reach
from tacit.federated.averaging import CORRECTION, LOSS, from_record, to_record
from tacit.federated.evaluation import Evaluator, reply_metrics
from tacit.federated.mechanism import Mechanism
from tacit.federated.owner import Gate, Owner, note_error, under_charge
from tacit.federated.personal import Asked
from tacit.federated.replies import arrays_in
from tacit.federated.train import Arrays
from tacit.federated.turns import Book, Granted, Refused, Reservation, Turn

__all__ = [
    "REFUSAL",
    "CohortGate",
    "Gate",
    "Owner",
    "OwnerGate",
    "asked_of",
    "describe_channels",
    "make_client_app",
    "reply_of",
    "reservation",
    "wants_loss",
]

_LOG = logging.getLogger("tacit")
REFUSAL = 4  # the error code of a reply whose reason is one of three constants


def make_client_app(find_owner: Callable[[Context], Owner]) -> ClientApp:
    """A ClientApp that trains and evaluates on the records of the owner that a context names."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        owner = _find(find_owner, context)
        return _refusal(message, "refused") if owner is None else _train(message, owner)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        owner = _find(find_owner, context)
        if owner is None or owner.evaluation is None:  # what was not planned is not read
            return _refusal(message, "refused")
        return _evaluate(message, owner, owner.evaluation)

    return app


def reservation(message: Message, owner: Owner, *, body: str | None = None) -> Reservation | None:
    """The request that a message amounts to, or None for an evaluation that nobody planned.

    Args:
        message: received.
        owner: who received it.
        body: its digest, where it is known already: in one process a cohort's messages share their content.
    """
    mechanism = _mechanism(message, owner)
    if mechanism is None:
        return None
    config = message.content.config_records["config"]
    return Reservation(
        owner=owner.name,
        source=owner.source,
        run=str(config["run"]),
        round=_round(message),
        body=_body_digest(message) if body is None else body,
        mechanism=mechanism.describe(),
    )


def _mechanism(message: Message, owner: Owner) -> Mechanism | None:
    if not _is_evaluation(message):
        # A loss on records has no noise: nobody with a guarantee answers a question that asks for one.
        return None if owner.mechanism.private and wants_loss(message) else owner.mechanism
    return None if owner.evaluation is None else owner.evaluation.mechanism


def _find(find_owner: Callable[[Context], Owner], context: Context) -> Owner | None:
    try:
        return find_owner(context)
    except Exception as error:  # noqa: BLE001  # whose records is not known, so they are treated as private
        _LOG.error("no owner for this node: %s", type(error).__name__)
        return None


def _train(message: Message, owner: Owner) -> Message:
    if owner.mechanism.unit == "client":
        return _within_cohort(message, owner, lambda: _clipped_update(message, owner))

    losses: dict[str, float] = {}

    def compute() -> Arrays:
        asked, records = asked_of(message), owner.records()
        if wants_loss(message):
            losses["loss"] = owner.trainer.mean_loss(asked.arrays, records)
        return owner.kept.train(owner.trainer, asked, records, owner.randomness(asked.server_round))[0]

    return _from_owner(message, owner, compute, lambda sent: _reply(message, owner, sent, losses))


def _evaluate(message: Message, owner: Owner, evaluation: Evaluator) -> Message:
    def compute() -> Arrays:
        # Where randomness has a seed, the round's own stream is the training's.
        # A model of the owner's own has no noise: at record level one record would change how all others are counted.
        own = owner.mechanism.unit != "record"
        arrays = owner.kept.model(_arrays(message), _round(message), personal=own)
        return evaluation.release(arrays, owner.records(), owner.randomness(-_round(message)))

    def reply(counts: Arrays) -> Message:
        return Message(RecordDict({"metrics": reply_metrics(owner.index, counts)}), reply_to=message)

    if owner.mechanism.unit == "client":
        return _within_cohort(message, owner, lambda: reply(compute()))
    return _from_owner(message, owner, compute, reply)


def _from_owner(
    message: Message, owner: Owner, compute: Callable[[], Arrays], reply: Callable[[Arrays], Message]
) -> Message:
    """No text of ours or of an exception may leave but three constants: Flower would send the exception's own."""
    if owner.gate is None:
        # Without a ledger nothing would be charged.
        return _refusal(message, "refused") if owner.mechanism.private else reply(compute())
    try:
        request = reservation(message, owner)
        outcome = Refused("refused") if request is None else under_charge(owner.gate, request, compute)
        return _refusal(message, outcome.reason) if isinstance(outcome, Refused) else reply(outcome)
    except Exception:  # noqa: BLE001  # whatever happened, its text stays on the owner's disk
        note_error(owner.log)
        return _refusal(message, "unavailable")


def _within_cohort(message: Message, owner: Owner, answer: Callable[[], Message]) -> Message:
    """A member of a cohort: noised and charged at the server, which is trusted at client level."""
    try:
        return answer()
    except Exception:  # noqa: BLE001  # a client's trouble is its own: it contributes zero
        note_error(owner.log)
        return _refusal(message, "unavailable")


def _clipped_update(message: Message, owner: Owner) -> Message:
    clip_norm = message.content.config_records["config"]["clip_norm"]
    if not isinstance(clip_norm, float):
        raise TypeError(f"expected clip_norm as a float, got {clip_norm!r}")
    asked = asked_of(message, clip_norm)
    sent, unclipped = owner.kept.train(owner.trainer, asked, owner.records(), owner.randomness(asked.server_round))
    return _reply(message, owner, sent, {"unclipped": int(unclipped)})


def _reply(message: Message, owner: Owner, sent: Arrays, extra: Mapping[str, float]) -> Message:
    codec, asked = owner.kept.codec, arrays_in(message.content)
    ordered = {name: sent[name] for name in (asked if codec is None else codec.wire_like(_arrays(message)))}
    return reply_of(message, owner.index, ordered, extra)


def reply_of(message: Message, index: int, ordered: Arrays, extra: Mapping[str, float] | None = None) -> Message:
    """What an owner answers: arrays in the order in which they are expected, and public numbers."""
    # num-examples is a constant: an owner's size must not leave, and Flower's own strategies ask for the key.
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": 1,
        "owner": index,
        "server-round": _round(message),
        **(extra or {}),
    }
    return Message(RecordDict({"arrays": to_record(ordered), "metrics": MetricRecord(metrics)}), reply_to=message)


def _refusal(message: Message, reason: str) -> Message:
    return Message(Error(REFUSAL, reason), reply_to=message)


def _arrays(message: Message) -> Arrays:
    return from_record(arrays_in(message.content))


def asked_of(message: Message, clip_norm: float | None = None, arrays: Arrays | None = None) -> Asked:
    """What a training message asks of an owner; its arrays need not be decoded again where somebody has them."""
    correction = arrays_in(message.content, CORRECTION) if CORRECTION in message.content else None
    return Asked(
        arrays=_arrays(message) if arrays is None else arrays,
        server_round=_round(message),
        correction=None if correction is None else from_record(correction),
        clip_norm=clip_norm,
    )


def wants_loss(message: Message) -> bool:
    """Whether a message asks for the model's loss on records besides."""
    config = message.content.config_records.get("config")
    return bool(config is not None and config.get(LOSS, False))


def _is_evaluation(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == MessageType.EVALUATE


def _round(message: Message) -> int:
    value = message.content.config_records["config"]["server-round"]
    if not isinstance(value, int):
        raise ValueError(f"expected server-round as an integer, got {value!r}")
    return value


def _body_digest(message: Message) -> str:
    """SHA-256 of what was received; training and evaluation of the same arrays are different questions."""
    config: ConfigRecord = message.content.config_records["config"]
    digest = hashlib.sha256(b"evaluate\n" if _is_evaluation(message) else b"")
    records = {name: record for name, record in message.content.items() if isinstance(record, ArrayRecord)}
    for record in sorted(records):
        for name, array in records[record].items():
            digest.update(f"{record} {name} {array.dtype} {tuple(array.shape)} {len(array.data)}\n".encode())
            digest.update(array.data)
    digest.update(json.dumps({name: str(config[name]) for name in sorted(config)}).encode())
    return digest.hexdigest()


@dataclass
class OwnerGate:
    """One owner in a process of its own: its ledger is held from the charge until the payload may leave."""

    open_ledger: Callable[[], Book]
    _ledger: Book | None = None

    def reserve(self, request: Reservation) -> Turn:
        """Charges with one fsync."""
        ledger = self.open_ledger()
        turn: Turn = Refused("unavailable")
        try:
            turn = ledger.reserve([request])[0]
        finally:
            if isinstance(turn, Granted):
                self._ledger = ledger
            else:
                ledger.close()
        return turn

    def release(self, request: Reservation, payload: bytes) -> None:
        """Outbox, then ledger; payloads of earlier rounds can no longer be asked for."""
        with self._held() as ledger:
            ledger.release(request.round, {request.key: payload})
            ledger.discard_before(request.round)

    def fail(self, request: Reservation) -> None:
        """Charged, nothing left."""
        with self._held() as ledger:
            ledger.fail([request.key])

    @contextlib.contextmanager
    def _held(self) -> Iterator[Book]:
        """The ledger, given back even when it cannot be written: kept, it would lock this owner out."""
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            raise RuntimeError("expected a granted reservation; reserve first")
        try:
            yield ledger
        finally:
            ledger.close()


@dataclass
class CohortGate:
    """Many simulated owners in one process: a cohort is reserved with one write and released with another.

    A `Transaction` of the grid and the `Gate` of its clients. Nothing leaves the process before `commit`; payloads that
    are too large to wait for the others are released with a write of their own.

    Attributes:
        ledger: of the owners.
        find_owner: that of a context.
        much_bytes: of payloads that wait.
    """

    ledger: Book
    find_owner: Callable[[Context], Owner]
    much_bytes: int = 2**24
    _requests: dict[str, Reservation] = field(default_factory=dict)
    _turns: dict[str, Turn] = field(default_factory=dict)
    _payloads: dict[str, bytes] = field(default_factory=dict)
    _failed: list[str] = field(default_factory=list)
    _round: int = 0

    def begin(self, work: Iterable[tuple[Message, Context]]) -> None:
        """Reserves for every client of the cohort."""
        self._requests, bodies = {}, {}
        for message, context in work:
            shared = (id(message.content), message.metadata.message_type)
            if shared not in bodies:
                bodies[shared] = _body_digest(message)
            request = reservation(message, self.find_owner(context), body=bodies[shared])
            if request is not None:
                self._requests[message.metadata.message_id] = request
        self.begin_requests(list(self._requests.values()))

    def begin_requests(self, requests: Sequence[Reservation]) -> None:
        """Reserves for what has not come as messages."""
        turns = self.ledger.reserve(requests)
        self._turns = {}
        for request, turn in zip(requests, turns, strict=True):
            self._turns.setdefault(request.key, turn)  # a message that came twice is refused the second time
        self._payloads, self._failed = {}, []

    def granted(self, message: Message) -> Reservation | None:
        """What a message was granted, as long as nobody has taken it up; None where it may not be computed."""
        request = self._requests.get(message.metadata.message_id)
        return request if request and isinstance(self._turns.get(request.key), Granted) else None

    def reserve(self, request: Reservation) -> Turn:
        """The turn that `begin` got, once."""
        return self._turns.pop(request.key, Refused("unavailable"))

    def release(self, request: Reservation, payload: bytes) -> None:
        """Kept until `commit`."""
        self._round = request.round
        self._payloads[request.key] = payload

    def fail(self, request: Reservation) -> None:
        """Kept until `commit`."""
        self._failed.append(request.key)

    def commit(self) -> None:
        """Everything that may leave is on disk when this returns; what was granted and not used is a failure."""
        reach("cohort.before_commit")
        unused = [key for key, turn in self._turns.items() if isinstance(turn, Granted)]
        self._failed += unused
        self._turns = {}
        self._settle()
        reach("cohort.after_commit")

    def commit_if_much(self) -> bool:
        """Releases what waits if it is much; whether it did."""
        if sum(map(len, self._payloads.values())) < self.much_bytes:
            return False
        self._settle()
        return True

    def _settle(self) -> None:
        self.ledger.fail(self._failed)
        self.ledger.release(self._round, self._payloads)
        self._payloads, self._failed = {}, []


def describe_channels(unit: str, *, evaluated: bool = False) -> Mapping[str, str]:
    """Everything that leaves an owner, and how it is protected.

    Args:
        unit: whose contribution is hidden.
        evaluated: whether owners are asked how often the model is right.

    >>> sorted(set(describe_channels("record", evaluated=True)) - set(describe_channels("record")))
    ['evaluation counts']
    """
    fixed = {
        "num-examples": "the constant 1",
        "owner index": "public",
        "round": "public",
        "errors": "3 constants",
        "reply time": "not protected: how long the work took shows",
    }
    if unit == "client":
        how = "clipped; noised by the server within its ledger"
        counts = {"evaluation counts": f"shares of a second cohort, {how}"} if evaluated else {}
        return {
            "model arrays": how,
            **counts,
            "unclipped bit": "to the server only; enters the noised sum where the clip is learned",
            **fixed,
            "owners' error logs": "a folder of the server's own (train/private), in no report, bundle or JSON",
        }
    how = "as computed" if unit == "none" else "noised within the ledger"
    return {"model arrays": how, **({"evaluation counts": how} if evaluated else {}), **fixed}
