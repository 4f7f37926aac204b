"""The only door from the other rooms to owners' records: sums and further training, planned, charged and noised."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from tacit.federated.accounting import Event
from tacit.federated.checkpoint import read_weights
from tacit.federated.federation import Federation, Loss, Sum, run_plan, sum_of, view
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noisy_sum import sum_mechanism
from tacit.federated.server_app import ServerPlan
from tacit.federated.task import Model, Task
from tacit.federated.train import read_arrays, write_arrays

__all__ = ["PrivateData", "with_loss"]

# Above any round that a recipe can plan: settling a round of training must not discard what a sum released.
_FIRST_SUM = 1_000_001


class PrivateData:
    """Owners' records, for whoever may have sums over them and models trained on them, and nothing else.

    Calls are numbered in their order: the same calls after a crash are answered with the same bytes, and a training
    goes on from its last checkpoint, free of charge. So one caller has one name, and asks in one fixed order.

    *Guarantees*: an access that was not planned before the run raises `PrivacyRefused` before anything is charged or
    read; every other is in the ledger before a record is read, and its noised result on disk before it is returned.
    """

    def __init__(
        self,
        federation: Federation,
        *,
        name: str,
        planned: Mapping[Event, int],
        noise_multiplier: float,
        example_inputs: torch.Tensor,
    ) -> None:
        """Opens the door as far as was planned.

        Args:
            federation: whom to ask.
            name: of the caller, one for each use of the door in a run.
            planned: accesses set aside for it in the plan that the ledger's budget was checked against.
            noise_multiplier: z of each sum.
            example_inputs: zeros or other public values in the shape of one record's input, (1, *shape).

        Raises:
            ValueError: a name that cannot be a folder's.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise ValueError(f"expected a name of letters, digits, '_', '.' and '-', got name={name!r}")
        self._federation, self._name, self._example = federation, name, example_inputs
        self._left, self._noise_multiplier = dict(planned), noise_multiplier
        self._calls = 0

    def noisy_sum(
        self, statistic: Callable[[torch.Tensor], torch.Tensor], norm_bound: float, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """The sum of `statistic(record)` over all owners' records, each clipped to `norm_bound`, with noise.

        Under units client and local a client contributes the mean of its records' vectors, so the sum is one of means
        over clients (estimated from a cohort under unit client). Who wants an average appends a constant to the vector
        and divides; an owner that does not answer is missing in both.

        Args:
            statistic: from one record's input, (1, *shape), to a vector; it may keep nothing between calls.
            norm_bound: of the vector, in L2.
            shape: of the vector.

        Returns:
            float32, of `shape`.

        Raises:
            PrivacyRefused: not planned, the budget is spent, or a statistic that remembers.
            FederationFailed: fewer owners answered than the quorum.
            ValueError: a bound or a shape that cannot be.
        """
        if not (math.isfinite(norm_bound) and norm_bound > 0.0):
            raise ValueError(f"expected a finite norm_bound > 0, got norm_bound={norm_bound}")
        _check_statistic(statistic, self._example, shape)
        mechanism = sum_mechanism(
            self._federation.mechanism, norm_bound=norm_bound, noise_multiplier=self._noise_multiplier, sums=1
        )
        self._take(mechanism, 1)
        number = self._next()
        asked = Sum(
            round=_FIRST_SUM + number,
            body=_digest(self._name, number, "sum", norm_bound, list(shape), self._noise_multiplier),
            mechanism=mechanism,
            statistic=lambda inputs, _: statistic(inputs),
            shape=shape,
        )
        return sum_of(self._federation, asked)

    def train(self, model: Model, rounds: int, loss: Loss) -> Model:
        """`model` after so many more rounds of the run's own training, charged like them.

        Args:
            model: where it begins; it stays as it is.
            rounds: how many.
            loss: `loss(logits, labels)`, a sum over records.

        Returns:
            A trained copy.

        Raises:
            PrivacyRefused: not planned, the budget is spent, or a model or loss in which records mix.
            FederationFailed: fewer owners answered than the quorum.
            ValueError: no rounds, or a checkpoint of another model in the same place.
        """
        federation, mechanism = self._federation, self._federation.mechanism
        if rounds < 1:
            raise ValueError(f"expected rounds of at least 1, got rounds={rounds}")
        trained = copy.deepcopy(model)
        trainer = federation.trainer(copy.deepcopy(model), loss)
        self._take(mechanism, rounds * mechanism.events_per_round)
        number, initial = self._next(), write_arrays(model)
        begins = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in initial.items()}
        folder = federation.folder / f"{self._name}-{number}"
        plan = ServerPlan(
            folder=folder,
            recipe=_digest(self._name, number, "train", rounds, begins),
            initial=initial,
            run=federation.run,
            purpose=folder.name,
            rounds=rounds,
            quorum=0 if mechanism.unit == "client" else federation.quorum,
            secret_cohorts=mechanism.unit == "client",
            resumed=folder.is_dir(),
            strategy=federation.strategy(rounds),
            ledger=view(federation.ledger),
            evaluate=lambda server_round, arrays: None,
            progress=federation.progress,
        )
        folder.mkdir(parents=True, exist_ok=True)
        owners = [replace(owner, trainer=trainer, evaluation=None) for owner in federation.owners]
        run_plan(plan, owners, federation.gate)
        read_arrays(trained, read_weights(folder / "weights.safetensors"))
        return trained

    def _take(self, mechanism: Mechanism, count: int) -> None:
        """Takes accesses from what was planned.

        Raises:
            PrivacyRefused: nothing, or less, is left.
        """
        if not mechanism.private:
            return
        left = self._left.get(mechanism.event, 0)
        if count > left:
            raise PrivacyRefused(
                f"expected at most {left} more planned accesses at noise_multiplier={mechanism.noise_multiplier:g} for "
                f"{self._name!r}, got {count}; plan them before the run: what follows a result cannot be planned by it"
            )
        self._left[mechanism.event] = left - count

    def _next(self) -> int:
        self._calls += 1
        return self._calls


def _check_statistic(
    statistic: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Tries a statistic on public values before anything is charged.

    Raises:
        ValueError: another shape.
        PrivacyRefused: what it says of an input depends on what it saw before.
    """
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(1))  # of zeros dropout makes zeros
    first, _, again = (statistic(probe.clone()).detach() for probe in (noise, example, noise))
    if tuple(first.shape) != shape:
        raise ValueError(f"expected a statistic of shape={shape}, got {tuple(first.shape)}; state the right shape")
    if not torch.equal(torch.nan_to_num(first), torch.nan_to_num(again)):
        raise PrivacyRefused(
            "expected a statistic of one record alone, got one that remembers what it saw; put models into eval mode"
        )


@dataclass(frozen=True, kw_only=True)
class _OtherLoss(Task):
    given: Loss

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss that was given."""
        return self.given(logits, labels)


def with_loss(task: Task, loss: Loss) -> Task:
    """The same task with another loss, a sum over records.

    >>> from tacit.federated.datasets import find_task
    >>> zero = with_loss(find_task("digits"), lambda logits, labels: logits.sum() * 0.0)
    >>> zero.loss(torch.ones(1, 10), torch.tensor([3])).item()
    0.0
    """
    return _OtherLoss(**vars(task), given=loss)


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
