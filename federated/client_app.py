"""The Flower ClientApp: reserve, train, release, reply."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.numpy import load, save

from tacit.devices.failpoint import reach
from tacit.federated.averaging import from_record, to_record
from tacit.federated.ledger import Granted, Ledger, Refused, Replay, Reservation, Turn
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import Randomness
from tacit.federated.task import Records
from tacit.federated.train import Arrays, LocalTrainer

__all__ = ["REFUSAL", "CohortGate", "Gate", "Owner", "OwnerGate", "make_client_app", "reservation"]

_LOG = logging.getLogger("tacit")
REFUSAL = 4  # the error code of a reply whose reason is one of three constants


class Gate(Protocol):
    """What stands between a message and an owner's records."""

    def reserve(self, request: Reservation) -> Turn:
        """Charges, or says why not."""
        ...

    def release(self, request: Reservation, payload: bytes) -> None:
        """Makes the payload ready to leave."""
        ...

    def fail(self, request: Reservation) -> None:
        """Says that nothing will leave."""
        ...


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One owner's side of a run.

    Attributes:
        name: whose records.
        index: position among the owners, for a fixed order of summation; public.
        source: which data set.
        mechanism: what is done to a record.
        trainer: does it.
        records: reads the records; called only after the charge.
        randomness: makes the generator for a round; secret when private.
        gate: the ledger, or None without a guarantee.
        log: where this owner's errors go, on its own disk.
    """

    name: str
    index: int
    source: str
    mechanism: Mechanism
    trainer: LocalTrainer
    records: Callable[[], Records]
    randomness: Callable[[int], Randomness]
    gate: Gate | None
    log: Path


def make_client_app(find_owner: Callable[[Context], Owner]) -> ClientApp:
    """A ClientApp that trains on the records of the owner that a context names."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            owner = find_owner(context)
        except Exception as error:  # noqa: BLE001  # whose records is not known, so they are treated as private
            _LOG.error("no owner for this node: %s", type(error).__name__)
            return Message(Error(REFUSAL, "refused"), reply_to=message)
        if owner.mechanism.unit == "client":
            return _train_for_cohort(message, owner)
        if owner.gate is not None:
            return _train_privately(message, owner, owner.gate)
        if owner.mechanism.private:  # without a ledger nothing would be charged
            return Message(Error(REFUSAL, "refused"), reply_to=message)
        return _train(message, owner)

    return app


def reservation(message: Message, owner: Owner) -> Reservation:
    """The request that a training message amounts to."""
    config = message.content.config_records["config"]
    return Reservation(
        owner=owner.name,
        source=owner.source,
        run=str(config["run"]),
        round=_round(config),
        body=_body_digest(message.content.array_records["arrays"], config),
        mechanism=owner.mechanism.describe(),
    )


def _train(message: Message, owner: Owner) -> Message:
    arrays = from_record(message.content.array_records["arrays"])
    randomness = owner.randomness(_round(message.content.config_records["config"]))
    return _reply(message, owner, owner.trainer.update(arrays, owner.records(), randomness))


def _train_for_cohort(message: Message, owner: Owner) -> Message:
    """A member of a cohort: clipped here, noised and charged at the server, which is trusted at client level."""
    try:
        config = message.content.config_records["config"]
        arrays = from_record(message.content.array_records["arrays"])
        clip_norm = config["clip_norm"]
        if not isinstance(clip_norm, float):
            raise TypeError(f"expected clip_norm as a float, got {clip_norm!r}")
        after, unclipped = owner.trainer.client_update(
            arrays, owner.records(), owner.randomness(_round(config)), clip_norm=clip_norm
        )
    except Exception:  # noqa: BLE001  # a client's trouble is its own: it contributes zero
        _note(owner.log)
        return Message(Error(REFUSAL, "unavailable"), reply_to=message)
    metrics = MetricRecord({"num-examples": 1, "owner": owner.index, "unclipped": int(unclipped)})
    ordered = {name: after[name] for name in _order(message)}
    return Message(RecordDict({"arrays": to_record(ordered), "metrics": metrics}), reply_to=message)


def _train_privately(message: Message, owner: Owner, gate: Gate) -> Message:
    """No text of ours or of an exception may leave but three constants: Flower would send the exception's own."""
    try:
        request = reservation(message, owner)
        turn = gate.reserve(request)
        if isinstance(turn, Refused):
            return Message(Error(REFUSAL, turn.reason), reply_to=message)
        if isinstance(turn, Replay):
            return _reply(message, owner, load(turn.payload))
        payload = _compute(message, owner, request, gate)
        return _reply(message, owner, load(payload))
    except Exception:  # noqa: BLE001  # whatever happened, its text stays on the owner's disk
        _note(owner.log)
        return Message(Error(REFUSAL, "unavailable"), reply_to=message)


def _compute(message: Message, owner: Owner, request: Reservation, gate: Gate) -> bytes:
    try:
        reach("client.before_records")
        arrays = from_record(message.content.array_records["arrays"])
        update = owner.trainer.update(arrays, owner.records(), owner.randomness(request.round))
        if not all(np.isfinite(array).all() for array in update.values()):
            raise ValueError("expected a finite update, got NaN or infinity; lower the learning rate")
        payload = save(dict(update))
    except Exception:
        # Charged and not tried again: retrying until it works would condition what leaves on the data.
        gate.fail(request)
        raise
    reach("client.after_training")
    gate.release(request, payload)
    return payload


def _reply(message: Message, owner: Owner, arrays: Arrays) -> Message:
    # num-examples is a constant: an owner's size must not leave, and Flower's own strategies ask for the key.
    metrics = MetricRecord({"num-examples": 1, "owner": owner.index})
    content = RecordDict({"arrays": to_record({n: arrays[n] for n in _order(message)}), "metrics": metrics})
    return Message(content, reply_to=message)


def _order(message: Message) -> list[str]:
    return list(message.content.array_records["arrays"])


def _round(config: ConfigRecord) -> int:
    value = config["server-round"]
    if not isinstance(value, int):
        raise ValueError(f"expected server-round as an integer, got {value!r}")
    return value


def _body_digest(arrays: ArrayRecord, config: ConfigRecord) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {tuple(array.shape)} {len(array.data)}\n".encode())
        digest.update(array.data)
    digest.update(json.dumps({name: str(config[name]) for name in sorted(config)}).encode())
    return digest.hexdigest()


def _note(log: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk: even that must not raise, or Flower would send its text
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc() + "\n")


@dataclass
class OwnerGate:
    """One owner in a process of its own: its ledger is held from the charge until the payload may leave."""

    open_ledger: Callable[[], Ledger]
    _ledger: Ledger | None = None

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
    def _held(self) -> Iterator[Ledger]:
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

    A `Transaction` of the grid and the `Gate` of its clients. Nothing leaves the process before `commit`.
    """

    ledger: Ledger
    find_owner: Callable[[Context], Owner]
    _turns: dict[str, Turn] = field(default_factory=dict)
    _payloads: dict[str, bytes] = field(default_factory=dict)
    _failed: list[str] = field(default_factory=list)
    _round: int = 0

    def begin(self, work: Iterable[tuple[Message, Context]]) -> None:
        """Reserves for every client of the cohort."""
        requests = [reservation(message, self.find_owner(context)) for message, context in work]
        turns = self.ledger.reserve(requests)
        self._turns = {}
        for request, turn in zip(requests, turns, strict=True):
            self._turns.setdefault(request.key, turn)  # a message that came twice is refused the second time
        self._payloads, self._failed = {}, []

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
        self.ledger.fail([*self._failed, *unused])
        self.ledger.release(self._round, self._payloads)
        self._turns = {}
        reach("cohort.after_commit")


def describe_channels(unit: str) -> Mapping[str, str]:
    """Everything that leaves an owner, and how it is protected."""
    fixed = {"num-examples": "the constant 1", "owner index": "public", "errors": "3 constants"}
    if unit == "client":
        return {
            "model arrays": "clipped; noised by the server within its ledger",
            "unclipped bit": "to the server only; enters the noised sum where the clip is learned",
            **fixed,
        }
    return {"model arrays": "as computed" if unit == "none" else "noised within the ledger", **fixed}
