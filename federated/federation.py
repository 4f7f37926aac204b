"""Simulated owners, and what may be asked of them together: a sum over their records, or more rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context, RecordDict

from tacit.federated.client_app import CohortGate, make_client_app
from tacit.federated.clipping import Arrays
from tacit.federated.cohorts import ServerCharge
from tacit.federated.grid import InProcessGrid
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.noisy_sum import Statistic, client_mean, noisy_sum
from tacit.federated.owner import Owner, note_error, under_charge
from tacit.federated.rounds import FederationFailed
from tacit.federated.server_app import LedgerView, Resumable, ServerPlan, make_server_app
from tacit.federated.task import Model
from tacit.federated.train import LocalTrainer
from tacit.federated.turns import Book, Refused, Reservation

__all__ = ["Federation", "Sum", "run_plan", "sum_of", "view"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_SUM = "sum"


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Simulated owners whose training is over, or pauses, and what it takes to ask them again.

    Attributes:
        owners: with the training's mechanism; of one source.
        gate: charges owners (units record and local), or None.
        ledger: the owners' or, at client level, the server's; None without a guarantee.
        randomness: the server's, by round; secret for a guarantee.
        trainer: makes what takes an owner's steps on another model with another loss.
        strategy: makes a fresh strategy for so many rounds.
        quorum: owners that must answer.
        run: the run's identity.
        folder: where further training keeps its checkpoints.
        progress: told of each round and of notes.
    """

    owners: Sequence[Owner]
    gate: CohortGate | None
    ledger: Book | None
    randomness: Callable[[int], Randomness]
    trainer: Callable[[Model, Loss], LocalTrainer]
    strategy: Callable[[int], Resumable]
    quorum: int
    run: str
    folder: Path
    progress: Callable[[Mapping[str, object]], None] = lambda row: None

    @property
    def mechanism(self) -> Mechanism:
        """Of the training."""
        return self.owners[0].mechanism


@dataclass(frozen=True, kw_only=True)
class Sum:
    """One sum that was asked for.

    Attributes:
        round: above any of training, so that settling those keeps what was released here.
        body: SHA-256 of what was asked; the same body is answered with the same bytes.
        mechanism: of `sum_mechanism`.
        statistic: of one record.
        shape: of its result.
    """

    round: int
    body: str
    mechanism: Mechanism
    statistic: Statistic
    shape: tuple[int, ...]


def sum_of(federation: Federation, asked: Sum) -> torch.Tensor:
    """What the owners come to together, float32; charged, computed and released in this order.

    Raises:
        PrivacyRefused: a budget is spent, or owners have no ledger.
        FederationFailed: fewer owners answered than the quorum.
    """
    return (_sum_of_cohort if asked.mechanism.unit == "client" else _sum_of_owners)(federation, asked)


def _sum_of_owners(federation: Federation, asked: Sum) -> torch.Tensor:
    """Units record, local and none: each owner's release, added up in the owners' order."""
    gate, total = federation.gate, torch.zeros(asked.shape, dtype=torch.float64)
    if gate is None:
        if asked.mechanism.private:
            raise PrivacyRefused("expected owners with a ledger, got none; nothing could be charged")
        for owner in federation.owners:
            total += _of_owner(owner, asked)
        return total.float()
    requests = [_request(federation.run, owner, asked) for owner in federation.owners]
    gate.begin_requests(requests)
    answers = [_answer(gate, owner, request, asked) for owner, request in zip(federation.owners, requests, strict=True)]
    gate.commit()
    _check_answers(federation, answers)
    for answer in answers:
        if not isinstance(answer, Refused):
            total += torch.from_numpy(answer[_SUM]).reshape(asked.shape)
    return total.float()


def _answer(gate: CohortGate, owner: Owner, request: Reservation, asked: Sum) -> Arrays | Refused:
    try:
        return under_charge(gate, request, lambda: {_SUM: _of_owner(owner, asked).numpy()})
    except Exception:  # noqa: BLE001  # its text may hold a record's values
        note_error(owner.log)
        return Refused("unavailable")


def _of_owner(owner: Owner, asked: Sum) -> torch.Tensor:
    return noisy_sum(owner.records(), asked.statistic, asked.shape, asked.mechanism, owner.randomness(asked.round))


def _request(run: str, owner: Owner, asked: Sum) -> Reservation:
    return Reservation(
        owner=owner.name,
        source=owner.source,
        run=run,
        round=asked.round,
        body=asked.body,
        mechanism=asked.mechanism.describe(),
    )


def _check_answers(federation: Federation, answers: Sequence[Arrays | Refused]) -> None:
    reasons = [answer.reason for answer in answers if isinstance(answer, Refused)]
    answered = len(answers) - len(reasons)
    if answered >= max(1, federation.quorum):
        return
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    if set(reasons) <= {"exhausted", "refused"}:
        raise PrivacyRefused(f"expected {federation.quorum} owners whose budget allows a sum, got {counts}; plan less")
    raise FederationFailed(f"expected {federation.quorum} owners for a sum, got {answered} ({counts}); try again")


def _sum_of_cohort(federation: Federation, asked: Sum) -> torch.Tensor:
    """Unit client: a cohort of its own, charged before it is drawn and noised at the server."""
    charge = ServerCharge.reserve(
        federation.ledger,
        asked.mechanism,
        source=federation.owners[0].source,
        run=federation.run,
        round_number=asked.round,
        body=asked.body,
    )

    def compute() -> Arrays:
        clients = list(range(len(federation.owners)))
        cohort = asked.mechanism.draw_cohort(clients, federation.randomness(asked.round))
        means = [_of_client(federation.owners[client], asked) for client in cohort]
        return asked.mechanism.noisy_average(
            [{_SUM: mean} for mean in means if mean is not None],
            {_SUM: np.zeros(asked.shape, np.float32)},
            federation.randomness(-asked.round),
        )

    release = charge.release(asked.round, compute)
    if release is None:
        raise PrivacyRefused("expected a budget that allows a sum, got a refusal of the server's ledger; plan less")
    return torch.from_numpy(np.array(release[_SUM])).reshape(asked.shape)


def _of_client(owner: Owner, asked: Sum) -> npt.NDArray[np.float32] | None:
    try:
        return client_mean(owner.records(), asked.statistic, asked.shape, asked.mechanism.max_grad_norm)
    except Exception:  # noqa: BLE001  # a client's trouble is its own: it contributes zero
        note_error(owner.log)
        return None


def run_plan(plan: ServerPlan, owners: Sequence[Owner], gate: CohortGate | None) -> None:
    """Carries out a plan in this process, each owner behind the gate."""

    def context(index: int) -> Context:
        return Context(1, index + 2, {"partition-id": index, "num-partitions": len(owners)}, RecordDict(), {})

    guarded = [replace(owner, gate=gate) for owner in owners]
    app = make_client_app(lambda found: guarded[int(found.node_config["partition-id"])])
    grid = InProcessGrid(app, {index + 2: context(index) for index in range(len(owners))}, gate)
    make_server_app(lambda _: plan)(grid, context(-1))


def view(ledger: Book | None) -> LedgerView | None:
    """What a server may know of a ledger."""
    return None if ledger is None else LedgerView(lambda: ledger.head, ledger.seen, ledger.discard_before)
