"""One owner's side of a run, and the order that every access to its records keeps: charge, read, release."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import load, save

from tacit.devices.failpoint import reach
from tacit.federated.clipping import Arrays
from tacit.federated.evaluation import Evaluator
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.personal import Kept
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer
from tacit.federated.turns import Refused, Replay, Reservation, Turn

__all__ = ["Gate", "Owner", "note_error", "under_charge"]


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
        evaluation: counts what a model gets right; None where no evaluation is planned, and every one is refused.
        kept: what stays with this owner, and what its updates are sent as.
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
    evaluation: Evaluator | None = None
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        evaluated = self.mechanism if self.evaluation is None else self.evaluation.mechanism
        if (evaluated.unit, evaluated.private) != (self.mechanism.unit, self.mechanism.private):
            raise PrivacyRefused(
                f"expected an evaluation under unit {self.mechanism.unit!r} as the training, got {evaluated.unit!r}, "
                f"private={evaluated.private}; make it with evaluation_mechanism"
            )


def under_charge(gate: Gate, request: Reservation, compute: Callable[[], Arrays]) -> Arrays | Refused:
    """The only order in which records are touched: charge on disk, compute, outbox and release on disk, then leave.

    *Guarantees*: `compute` runs only after the charge. If it raises, or gives what is not finite, nothing leaves and
    the charge stays: trying until it works would condition what leaves on the data. The same request again is answered
    with the same bytes, without reading.

    Args:
        gate: of the owner.
        request: what is asked.
        compute: reads the records.

    Returns:
        What may leave, or why nothing does.
    """
    turn = gate.reserve(request)
    if isinstance(turn, Refused):
        return turn
    if isinstance(turn, Replay):
        return load(turn.payload)
    try:
        reach("client.before_records")
        arrays = compute()
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("expected finite results, got NaN or infinity; lower the learning rate")
        payload = save(dict(arrays))
    except Exception:
        gate.fail(request)
        raise
    reach("client.after_training")
    gate.release(request, payload)
    return load(payload)


def note_error(log: Path) -> None:
    """Appends the exception being handled to an owner's log, in a folder that only its user may open; never raises."""
    with contextlib.suppress(OSError):  # a full disk: even that must not raise, or Flower would send its text
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(traceback.format_exc() + "\n")
