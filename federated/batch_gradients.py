"""Gradients of a batch: clipped and noised by record, by whichever way the layers allow, or plain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.mixing import (
    near,
    refuse_mixing_layers,
    refuse_mixing_loss,
    refuse_mixing_records,
    trial_records,
)
from tacit.federated.noise import Randomness
from tacit.federated.per_record import PerRecordSum, RecordsUnclear, unsupported_layers
from tacit.federated.task import Records, Task

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

__all__ = ["WRAPPED", "BatchGradients"]

WRAPPED = "_module."  # what Opacus puts before the names of a model that it hooks
# Coordinates that are noised at once: noise and its sum should stay in the processor's cache.
_NOISE_BLOCK = 2**16


class BatchGradients:
    """What a model's batches say, each made once for a model and used for every owner's steps."""

    def __init__(self, task: Task, model: torch.nn.Module, mechanism: Mechanism, *, chunk: int) -> None:
        """Prepares a model.

        Args:
            task: gives the loss.
            model: whose parameters are trained.
            mechanism: whether records are clipped one by one, and what noise is added.
            chunk: records whose gradients are held at once; a larger batch is taken in pieces, never cut.

        Raises:
            PrivacyRefused: a layer, the model or the loss mixes records.
        """
        self._task, self._model, self._chunk = task, model, chunk
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sum: PerRecordSum | None = None
        self._hooked: GradSampleModule | None = None
        if mechanism.private or mechanism.per_record:
            refuse_mixing_layers(model)
        if mechanism.per_record:
            self._prepare(hardened=mechanism.hardened and mechanism.private)

    def _prepare(self, *, hardened: bool) -> None:
        """Makes ready for gradients by record: summed where the layers allow; one by one otherwise and for the grid."""
        task, model = self._task, self._model.train()
        shape = task.interface.shape if task.kind == "anomaly" else (task.outputs,)
        refuse_mixing_loss(task.loss, task.trial_targets(4), shape=shape)
        inputs = trial_records(task.interface.shape)
        refuse_mixing_records(model, inputs)
        tried = Records(inputs.numpy(), task.trial_targets(len(inputs)).numpy())
        targets = torch.from_numpy(task.targets(tried))
        wanted = [_flat(self.plain(tried.take(np.array([i])), model)) for i in range(len(tried))]
        if not hardened and not unsupported_layers(model):
            adder = PerRecordSum(model, task.loss, chunk=self._chunk)
            if _sums_agree(adder, inputs, targets, wanted):
                self._sum = adder
                return
        self._hooked = _hook(model)
        pieces = list(self._gradients(tried))
        found = [torch.cat([g.reshape(len(g), -1) for g in piece], dim=1) for piece in pieces]
        if not near(torch.cat(found), torch.stack(wanted)):
            raise PrivacyRefused(
                "expected a gradient for each record, got others from layers that are used in an unusual way; "
                "call layers instead of using their parameters, and leave the first dimension to the records"
            )

    def forget(self) -> None:
        """Drops what an owner whose step raised left in Opacus' hooks, which would count it to the next owner's."""
        if self._hooked is None:
            return
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for parameter in self._model.parameters():
            parameter.grad = None
            vars(parameter).pop("_current_grad_sample", None)
            vars(parameter).update(grad_sample=None, _forward_counter=0)

    def private(self, batch: Records, mechanism: Mechanism, randomness: Randomness) -> list[torch.Tensor]:
        """What a step may be of a batch: each record's gradient clipped, summed, noised, over the public normaliser.

        Args:
            batch: drawn by the mechanism; it may be empty.
            mechanism: the owner's.
            randomness: secret for a guarantee.
        """
        adder = self._sum
        if adder is None:
            shapes = [parameter.shape for parameter in self._parameters]
            return mechanism.noisy_mean(self._gradients(batch), shapes, randomness)
        total = adder(*self.tensors(batch), mechanism.max_grad_norm)
        # The noise of each coordinate is independent of the others', so that blocks are noised as the whole would be.
        return adder.split(torch.cat(mechanism.noised(list(torch.split(total, _NOISE_BLOCK)), randomness)))

    def _gradients(self, batch: Records) -> Iterator[list[torch.Tensor]]:
        """Per-record gradients of a batch, in pieces of at most `chunk` records: per parameter (records, *shape)."""
        model = self._hooked
        if model is None:
            raise RuntimeError("expected a hooked model for per-record gradients")
        for start in range(0, len(batch), self._chunk):
            inputs, targets = self.tensors(batch.take(np.arange(start, min(start + self._chunk, len(batch)))))
            loss = self._task.loss(model(inputs), targets)
            with warnings.catch_warnings():
                # Opacus hooks layers whose inputs, the records, need no gradient.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield [_per_record(parameter, len(inputs)) for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
                parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own

    def plain(self, batch: Records, model: torch.nn.Module | None = None) -> list[torch.Tensor]:
        """The gradient of the mean loss; zeros of an empty batch.

        Args:
            batch: any.
            model: another one of the same kind, or the one prepared.
        """
        model = model or self._model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if len(batch) == 0:
            return [torch.zeros_like(p) for p in parameters]
        inputs, targets = self.tensors(batch)
        loss = self._task.loss(model(inputs), targets)
        return list(torch.autograd.grad(loss / len(batch), parameters, materialize_grads=True))

    def tensors(self, batch: Records) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and what the loss compares outputs with."""
        return torch.from_numpy(batch.inputs), torch.from_numpy(self._task.targets(batch))


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _sums_agree(
    adder: PerRecordSum, inputs: torch.Tensor, targets: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> bool:
    """Whether unclipped sums, of one record and of all, are plain autograd's: not if a model goes around its layers."""
    try:
        alone = [adder(inputs[[i]], targets[[i]], math.inf) for i in range(len(inputs))]
        together = adder(inputs, targets, math.inf)
    except RecordsUnclear:
        return False
    return all(map(near, alone, wanted)) and near(together, torch.stack(list(wanted)).sum(0))


def _per_record(parameter: torch.nn.Parameter, records: int) -> torch.Tensor:
    """What Opacus' hooks left at a parameter, (records, *shape); one that the model does not use has no gradient."""
    gradients: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    return torch.zeros(records, *parameter.shape) if gradients is None else gradients


def _hook(model: torch.nn.Module) -> GradSampleModule:
    from opacus.grad_sample import GradSampleModule

    # loss_reduction="sum": the loss is a sum over records, so grad_sample is each record's own gradient, unscaled.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GradSampleModule(model, loss_reduction="sum")
