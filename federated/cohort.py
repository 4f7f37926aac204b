"""Many owners' local steps at once: the same sampler, clip and noise as one by one, in fewer products.

Owners' batches are of different sizes, as Poisson batches are: they are filled up to those they go with, and what fills
has the factor 0. Each owner's draws come from its own generator in the order in which it would draw them alone, so with
public randomness the result is that of the sequential engine up to float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.accelerator import Accelerator
from tacit.federated.clipping import Arrays
from tacit.federated.cohort_passes import CohortPasses, CohortRecords, Shares
from tacit.federated.local_steps import LocalRule, LocalSteps
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import Randomness
from tacit.federated.stacked_layers import unstackable_layers
from tacit.federated.task import Records, Task

__all__ = ["CohortSteps", "Taken", "Walk", "cohort_refusal", "unfolded"]

# Coordinates that are noised at once: noise and its sum should stay in the processor's cache.
_NOISE_BLOCK = 2**17


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What one owner's steps begin with.

    Attributes:
        arrays: the model, by name; all that it has.
        records: the owner's.
        randomness: secret for a guarantee.
        mechanism: the owner's; of one kind and clip with the others'.
        correction: added to every gradient (SCAFFOLD), by name, or None.
    """

    arrays: Arrays
    records: Records
    randomness: Randomness
    mechanism: Mechanism
    correction: Arrays | None = None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One owner's steps, taken.

    Attributes:
        row: its model after them, one array after another, (parameters,).
        unfold: a row as arrays by name.
        walk: what they began with, where that is in this process.
    """

    row: npt.NDArray[np.float32]
    unfold: Callable[[npt.NDArray[np.float32]], Arrays]
    walk: Walk | None = None

    @property
    def arrays(self) -> Arrays:
        """The model by name."""
        return self.unfold(self.row)

    @classmethod
    def of(cls, arrays: Arrays) -> Taken:
        """Of a model that is at hand by name."""
        row = np.concatenate([array.ravel() for array in arrays.values()])
        return cls(row=row, unfold=partial(unfolded, {name: array.shape for name, array in arrays.items()}))


def unfolded(shapes: Mapping[str, tuple[int, ...]], row: npt.NDArray[np.float32]) -> Arrays:
    """A row as arrays by name, views of it.

    >>> unfolded({"w": (1, 2), "b": ()}, np.float32([1.0, 2.0, 3.0]))
    {'w': array([[1., 2.]], dtype=float32), 'b': array(3., dtype=float32)}
    """
    found, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        found[name] = row[start:end].reshape(shape)
        start = end
    return found


def cohort_refusal(model: torch.nn.Module, mechanism: Mechanism, *, augmented: bool) -> str | None:
    """Why owners cannot take their steps together, or None where they can.

    >>> plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> mechanism = Mechanism(unit="none", sample_rate=0.5, max_grad_norm=float("inf"), noise_multiplier=0.0,
    ...                       steps_per_round=1, rounds=1, reference_size=1, delta=1e-5)
    >>> cohort_refusal(plain, mechanism, augmented=False)
    >>> cohort_refusal(plain, mechanism, augmented=True)
    'augmentation'
    """
    if augmented:
        return "augmentation"
    if mechanism.hardened and mechanism.private:
        return "noise on a grid"
    unknown = unstackable_layers(model)
    if unknown:
        return f"layers without a stacked form ({', '.join(unknown[:3])})"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return None if floats == trained else "parameters that are not trained, or buffers"


class CohortSteps:
    """Takes the local steps of many owners at once."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        rule: LocalRule,
        *,
        batch_rate: float,
        device: Accelerator = "cpu",
        share: Shares | None = None,
    ) -> None:
        """Prepares a model for which `cohort_refusal` is None; its weights are not used.

        Args:
            task: gives the loss.
            model: of the owners.
            rule: what is done with a gradient.
            batch_rate: as in `LocalTrainer`.
            device: where gradients are computed; draws are the processor's, the same whatever it is.
            share: takes passes in other processes too; whoever made it ends it.
        """
        self._task, self._rule, self._batch_rate = task, rule, batch_rate
        self._device = torch.device(device)
        self._passes = CohortPasses(task, model, device=device, share=share)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __call__(self, walks: Sequence[Walk]) -> torch.Tensor:
        """Where each owner's model is after its steps, (owners, parameters).

        Args:
            walks: one for each owner, of mechanisms that differ in rate and noise at most.
        """
        corrections = None
        if any(walk.correction is not None for walk in walks):
            corrections = [self._rows([walk.correction or {} for walk in walks])]
        moved = torch.nn.Parameter(self._rows([walk.arrays for walk in walks]))
        steps = LocalSteps(self._rule, [moved], correction=corrections)
        records = CohortRecords.of([walk.records for walk in walks], self._task)
        for _ in range(walks[0].mechanism.steps_per_round):
            coins = [self._draw(walk) for walk in walks]
            steps.take([self._gradients(moved.detach(), walks, records, coins)])
        return moved.detach().cpu()

    def arrays(self, row: npt.NDArray[np.float32]) -> Arrays:
        """One owner's row as arrays by name."""
        return unfolded(self._shapes, row)

    def _rows(self, many: Sequence[Arrays]) -> torch.Tensor:
        """Arrays one after another, a row for each owner; those of one object are written once."""
        made: dict[int, npt.NDArray[np.float32]] = {}
        for arrays in many:
            if id(arrays) not in made:
                zero = {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items() if name not in arrays}
                made[id(arrays)] = np.concatenate([{**zero, **arrays}[name].ravel() for name in self._shapes])
        return torch.from_numpy(np.stack([made[id(arrays)] for arrays in many])).to(self._device)

    def _draw(self, walk: Walk) -> npt.NDArray[np.int64]:
        size = len(walk.records)
        if walk.mechanism.unit in ("client", "local"):
            return np.flatnonzero(walk.randomness.bernoulli(size, self._batch_rate))
        return walk.mechanism.draw_batch(size, walk.randomness)

    def _gradients(
        self, rows: torch.Tensor, walks: Sequence[Walk], records: CohortRecords, coins: Sequence[npt.NDArray[np.int64]]
    ) -> torch.Tensor:
        mechanism = walks[0].mechanism
        total = self._passes(rows, records, coins, mechanism.max_grad_norm if mechanism.per_record else None)
        return _noised(total.cpu(), walks).to(self._device) if mechanism.per_record else total


def _noised(total: torch.Tensor, walks: Sequence[Walk]) -> torch.Tensor:
    """What a step may be of each owner's clipped sum; owners of one secret generator share a draw."""
    first = walks[0]
    alike = all(w.randomness is first.randomness and w.mechanism == first.mechanism for w in walks)
    if alike:
        # The noise of each coordinate is independent of the others', so that blocks are noised as the whole would be.
        blocks = first.mechanism.noised(list(torch.split(total.flatten(), _NOISE_BLOCK)), first.randomness)
        return torch.cat(blocks).view_as(total)
    return torch.stack([w.mechanism.noised([row], w.randomness)[0] for w, row in zip(walks, total, strict=True)])
