"""Canaries in the run's own rounds: planted by a secret coin, trained on, and watched as an adversary would."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from tacit.federated.canary_model import CanaryModel, CanaryTask, along, canary_records, canary_task, head_directions
from tacit.federated.client_app import CohortGate
from tacit.federated.clipping import Arrays
from tacit.federated.federation import run_plan, view
from tacit.federated.ledger import Ledger, Reservation
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import SecretGenerator
from tacit.federated.owner import Owner
from tacit.federated.server_app import ServerPlan
from tacit.federated.task import Model, Records
from tacit.federated.train import LocalTrainer, write_arrays

__all__ = ["CanaryRun", "Planted", "affordable_rounds", "plant", "train_with_canaries"]

_DIMENSION = 1024  # random directions of so many numbers are nearly orthogonal
_LENGTH = 1e6  # of a canary's gradient over C: after any learning rate it still has to be clipped
_MOST_STEPS = 6_000  # of owners, all rounds together
_MOST_OWNERS, _MOST_OTHERS = 10, 32  # owners and records that keep the canaries company

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CanaryRun:
    """What canaries are put into.

    Attributes:
        owners: of the run, with their records; at most a few of each are trained on beside the canaries.
        model: of the run, untrained.
        shape: one example of the model's.
        classes: of the model.
        trainer: makes what takes an owner's steps, on all its records where an owner is the unit.
        plan: the run's, in a scratch folder; its model, rounds and evaluation are replaced.
        ledger: a scratch one with the run's budget.
    """

    owners: Sequence[Owner]
    model: Model
    shape: tuple[int, ...]
    classes: int
    trainer: Callable[[CanaryTask, Model], LocalTrainer]
    plan: ServerPlan
    ledger: Ledger

    @property
    def mechanism(self) -> Mechanism:
        """Of the training."""
        return self.owners[0].mechanism


def affordable_rounds(mechanism: Mechanism, canaries: int, owners: int) -> int:
    """As many of the planned rounds as can be run in minutes.

    >>> plan = {"steps_per_round": 1, "rounds": 100, "reference_size": 64, "delta": 1e-5, "max_grad_norm": 1.0}
    >>> affordable_rounds(Mechanism(unit="record", sample_rate=0.5, noise_multiplier=2.0, **plan), 1000, 10)
    100
    """
    trainings = {
        "record": float(min(owners, _MOST_OWNERS)),
        "client": mechanism.sample_rate * (canaries / 2.0 + _MOST_OWNERS),
        "local": float(canaries),
    }[mechanism.unit]
    return int(max(1, min(mechanism.rounds, _MOST_STEPS // math.ceil(trainings * mechanism.steps_per_round))))


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Canaries and the owners that would hold them.

    Attributes:
        coins: whether each is in, (canaries,); secret.
        directions: unit vectors, (canaries, dimension).
        homes: position of the owner whose uploads would carry each, (canaries,).
        owners: everybody who takes part.
        model: the run's, with heads.
    """

    coins: npt.NDArray[np.bool_]
    directions: Vectors
    homes: npt.NDArray[np.int64]
    owners: list[Owner]
    model: CanaryModel


def plant(run: CanaryRun, canaries: int) -> Planted:
    """Throws a fair coin for each canary, and gives those that are in to owners."""
    coins = SecretGenerator().bernoulli(canaries, 0.5)
    # Directions are known to the adversary; they only must not depend on the coins.
    directions = head_directions(canaries, _DIMENSION, np.random.default_rng(secrets.randbits(128)))
    model = CanaryModel(run.model, shape=run.shape, dimension=_DIMENSION)
    trainer = run.trainer(canary_task(model, run.classes), model)
    company = [_few(owner.records()) for owner in run.owners[:_MOST_OWNERS]]
    ours, homes = _shares(run.mechanism, coins, directions, len(company))

    def owner(index: int, vectors: Vectors) -> Owner:
        records = canary_records(
            vectors,
            width=math.prod(run.shape),
            scale=_LENGTH * max(1.0, run.mechanism.max_grad_norm),
            beside=company[index] if index < len(company) else None,
        )
        return replace(
            run.owners[0],
            name=f"canaries-{index:04d}",
            index=index,
            trainer=trainer,
            records=lambda: records,
            gate=None,
            log=_log(run),
            evaluation=None,
        )

    owners = [owner(index, vectors) for index, vectors in enumerate(ours)]
    return Planted(coins=coins, directions=directions, homes=homes, owners=owners, model=model)


def _few(records: Records) -> Records:
    return records.take(np.arange(min(len(records), _MOST_OTHERS)))


def _shares(
    mechanism: Mechanism, coins: npt.NDArray[np.bool_], directions: Vectors, company: int
) -> tuple[list[Vectors], npt.NDArray[np.int64]]:
    """Each owner's canaries, and at which owner each canary would be."""
    indices, nobody = np.arange(len(coins)), np.zeros((0, directions.shape[1]), np.float32)
    if mechanism.unit == "record":
        homes = indices % company
        return [directions[(homes == home) & coins] for home in range(company)], homes
    if mechanism.unit == "client":  # a client that is out is not there
        return [nobody] * company + [directions[[i]] for i in indices[coins]], np.zeros(len(coins), np.int64)
    signed = np.where(coins, 1.0, -1.0).astype(np.float32)[:, None] * directions  # replaced, not removed
    return [nobody] * company + [signed[[i]] for i in indices], indices + company


@dataclass(kw_only=True)
class _WatchedGate(CohortGate):
    """A gate that shows an adversary everything that leaves through it."""

    watch: Callable[[str, Arrays], None] = field(default=lambda owner, arrays: None)

    def release(self, request: Reservation, payload: bytes) -> None:
        """As a gate's."""
        super().release(request, payload)
        self.watch(request.owner, load(payload))


def train_with_canaries(
    run: CanaryRun, planted: Planted, rounds: int, marks: set[int], progress: Callable[[int, int], None]
) -> dict[int, npt.NDArray[np.float64]]:
    """Runs the rounds; returns after which of them how far the adversary saw things go each canary's way.

    Args:
        run: what the canaries are in.
        planted: the canaries.
        rounds: how many.
        marks: rounds after which scores are read.
        progress: told of rounds done, and rounds altogether.

    Returns:
        By round, (canaries,).

    Raises:
        RuntimeError: an owner could not train.
    """
    initial = write_arrays(planted.model)
    sent = along(initial)
    seen = np.zeros((len(planted.owners), _DIMENSION))  # each owner's way against its canaries' gradients
    numbers = {owner.name: owner.index for owner in planted.owners}
    scores: dict[int, npt.NDArray[np.float64]] = {}
    from_uploads = run.mechanism.unit != "client"

    def watch(owner: str, arrays: Arrays) -> None:
        seen[numbers[owner]] += sent - along(arrays)

    def after_round(number: int, arrays: Arrays) -> None:
        nonlocal sent
        sent = along(arrays)
        if number in marks:
            way = seen[planted.homes] if from_uploads else (along(initial) - sent)[None]
            scores[number] = np.einsum("cd,cd->c", np.broadcast_to(way, planted.directions.shape), planted.directions)
        progress(number, rounds)

    gate = None
    if from_uploads:
        owners = planted.owners
        gate = _WatchedGate(run.ledger, lambda found: owners[int(found.node_config["partition-id"])], watch=watch)
    plan = replace(
        run.plan,
        initial=initial,
        rounds=rounds,
        quorum=len(planted.owners) if from_uploads else 0,
        resumed=False,
        ledger=view(run.ledger),
        evaluate=after_round,
        progress=lambda row: None,
        owner_names=[owner.name for owner in planted.owners],
        doors=None,  # the model holds canaries besides, and all of its owners are ours
        wait_s=0.0,
    )
    run_plan(plan, planted.owners, gate)
    if _log(run).exists():
        raise RuntimeError(f"expected canaries that train, got an error: {_log(run).read_text()[-300:]}")
    return scores


def _log(run: CanaryRun) -> Path:
    """Where owners note errors that they do not send: an audit whose canaries were never trained on finds nothing."""
    return run.plan.folder / "canaries.log"
