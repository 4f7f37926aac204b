"""How one owner learns: clipped sums of per-record gradients, everything private from the mechanism."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.clipping import Arrays, clip_update, update_norm
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

__all__ = ["Arrays", "LocalTrainer", "read_arrays", "refuse_mixing_layers", "refuse_mixing_loss", "write_arrays"]

# Coordinates that are noised at once: noise and its sum should stay in the processor's cache.
_NOISE_BLOCK = 2**16


class LocalTrainer:
    """Takes an owner's local steps; one per process, because preparing a model takes longer than a step."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        mechanism: Mechanism,
        *,
        learning_rate: float,
        batch_rate: float = 1.0,
        weight_cap: int | None = None,
        chunk: int = 256,
    ) -> None:
        """Prepares a model.

        Args:
            task: gives the loss.
            model: its weights are overwritten at each call.
            mechanism: sampler, clip and noise.
            learning_rate: of plain local SGD.
            batch_rate: probability with which a record joins a local step's batch where records are not the unit.
            weight_cap: n_cap of a client's weight min(n, n_cap)/n_cap; every client weighs 1 when None.
            chunk: records whose gradients are held at once; a larger batch is taken in pieces, never cut.

        Raises:
            PrivacyRefused: a layer, the model or the loss mixes records.
        """
        self._task, self._model, self._mechanism = task, model, mechanism
        self._learning_rate, self._chunk = learning_rate, chunk
        self._batch_rate, self._weight_cap = batch_rate, weight_cap
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sum: PerRecordSum | None = None
        self._hooked: GradSampleModule | None = None
        if mechanism.private or mechanism.per_record:
            refuse_mixing_layers(model)
        if mechanism.per_record:
            self._prepare()

    def _prepare(self) -> None:
        """Makes ready for gradients by record: summed where the layers allow; one by one otherwise and for the grid."""
        task, model, classes = self._task, self._model.train(), len(self._task.interface.labels)
        refuse_mixing_loss(task.loss, classes)
        inputs, labels = trial_records(task.interface.shape, classes)
        refuse_mixing_records(model, inputs)
        trials = [Records(inputs[[i]].numpy(), labels[[i]].numpy()) for i in range(len(inputs))]
        wanted = [_flat(self._plain_gradients(trial)) for trial in trials]
        if not (self._mechanism.hardened and self._mechanism.private) and not unsupported_layers(model):
            adder = PerRecordSum(model, task.loss, chunk=self._chunk)
            if _sums_agree(adder, inputs, labels, wanted):
                self._sum = adder
                return
        self._hooked = _hook(model)
        pieces = list(self._gradients(Records(inputs.numpy(), labels.numpy())))
        found = [torch.cat([g.reshape(len(g), -1) for g in piece], dim=1) for piece in pieces]
        if not near(torch.cat(found), torch.stack(wanted)):
            raise PrivacyRefused(
                "expected a gradient for each record, got others from layers that are used in an unusual way; "
                "call layers instead of using their parameters, and leave the first dimension to the records"
            )

    def under(self, mechanism: Mechanism) -> LocalTrainer:
        """The same trainer, with the same model, for an owner whose mechanism has a rate and noise of its own."""
        other = copy.copy(self)
        other._mechanism = mechanism
        return other

    def update(self, arrays: Arrays, records: Records, randomness: Randomness) -> Arrays:
        """The model after this owner's steps: a function of noised gradients and public constants only.

        Args:
            arrays: the global model, by parameter name.
            records: the owner's.
            randomness: secret for a guarantee.

        Returns:
            Arrays of the same names and shapes.
        """
        after = self._walk(arrays, records, randomness)
        if self._mechanism.unit == "local":
            return _moved(arrays, self._mechanism.release_locally(_change(arrays, after), randomness))
        return after

    def _draw_batch(self, size: int, randomness: Randomness) -> npt.NDArray[np.int64]:
        if self._mechanism.unit in ("client", "local"):
            return np.flatnonzero(randomness.bernoulli(size, self._batch_rate))
        return self._mechanism.draw_batch(size, randomness)

    def client_update(
        self, arrays: Arrays, records: Records, randomness: Randomness, *, clip_norm: float
    ) -> tuple[Arrays, bool]:
        """The model after a client's steps, its whole update clipped; the server adds the noise.

        Args:
            arrays: the global model, by parameter name.
            records: the client's.
            randomness: secret for a guarantee.
            clip_norm: this round's C.

        Returns:
            The model, and whether the update's norm was at most C before it was clipped.
        """
        update = self._weighed(_change(arrays, self._walk(arrays, records, randomness)), len(records))
        changed = clip_update(update, clip_norm)
        return _moved(arrays, changed), update_norm(update) <= clip_norm

    def _weighed(self, update: Arrays, size: int) -> Arrays:
        """A client's weight is part of what is clipped, so a large client moves the sum by no more than C either."""
        if self._weight_cap is None:
            return update
        weight = np.float32(min(size, self._weight_cap) / self._weight_cap)
        return {name: array * weight for name, array in update.items()}

    def _walk(self, arrays: Arrays, records: Records, randomness: Randomness) -> Arrays:
        """Takes the local steps; returns where the model is then."""
        read_arrays(self._model, arrays)
        self._model.train()
        self._forget()
        for _ in range(self._mechanism.steps_per_round):
            self.step(records.take(self._draw_batch(len(records), randomness)), randomness)
        return write_arrays(self._model)

    def step(self, batch: Records, randomness: Randomness) -> None:
        """Moves the model by one step on a batch; what it moves by is noised where records are the unit.

        Args:
            batch: drawn by the mechanism, for a guarantee; it may be empty.
            randomness: secret for a guarantee.
        """
        batch = self._classified(batch)
        private = self._mechanism.per_record
        steps = self._private_gradients(batch, randomness) if private else self._plain_gradients(batch)
        with torch.no_grad():
            for parameter, step in zip(self._parameters, steps, strict=True):
                parameter.sub_(step, alpha=self._learning_rate)

    def _classified(self, batch: Records) -> Records:
        """Without records of no class: one would end the whole batch with an error, and tell that it is there."""
        known = (batch.labels >= 0) & (batch.labels < len(self._task.interface.labels))
        return batch if known.all() else batch.take(np.flatnonzero(known))

    def _forget(self) -> None:
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

    def _private_gradients(self, batch: Records, randomness: Randomness) -> list[torch.Tensor]:
        mechanism, adder = self._mechanism, self._sum
        if adder is None:
            shapes = [parameter.shape for parameter in self._parameters]
            return mechanism.noisy_mean(self._gradients(batch), shapes, randomness)
        total = adder(torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels), mechanism.max_grad_norm)
        # The noise of each coordinate is independent of the others', so that blocks are noised as the whole would be.
        return adder.split(torch.cat(mechanism.noised(list(torch.split(total, _NOISE_BLOCK)), randomness)))

    def _gradients(self, batch: Records) -> Iterator[list[torch.Tensor]]:
        """Per-record gradients of a batch, in pieces of at most `chunk` records: per parameter (records, *shape)."""
        model = self._hooked
        if model is None:
            raise RuntimeError("expected a hooked model for per-record gradients")
        for start in range(0, len(batch), self._chunk):
            piece = slice(start, start + self._chunk)
            logits = model(torch.from_numpy(batch.inputs[piece]))
            loss = self._task.loss(logits, torch.from_numpy(batch.labels[piece]))
            with warnings.catch_warnings():
                # Opacus hooks layers whose inputs, the records, need no gradient.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield [_per_record(parameter, len(logits)) for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
                parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus' own

    def _plain_gradients(self, batch: Records) -> list[torch.Tensor]:
        if len(batch) == 0:
            return [torch.zeros_like(p) for p in self._parameters]
        loss = self._task.loss(self._model(torch.from_numpy(batch.inputs)), torch.from_numpy(batch.labels))
        return list(torch.autograd.grad(loss / len(batch), self._parameters, materialize_grads=True))


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _sums_agree(
    adder: PerRecordSum, inputs: torch.Tensor, labels: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> bool:
    """Whether unclipped sums, of one record and of all, are plain autograd's: not if a model goes around its layers."""
    try:
        alone = [adder(inputs[[i]], labels[[i]], math.inf) for i in range(len(inputs))]
        together = adder(inputs, labels, math.inf)
    except RecordsUnclear:
        return False
    return all(map(near, alone, wanted)) and near(together, torch.stack(list(wanted)).sum(0))


def _change(before: Arrays, after: Arrays) -> Arrays:
    return {name: after[name] - before[name] for name in before}


def _moved(arrays: Arrays, change: Mapping[str, npt.NDArray[np.float64]]) -> Arrays:
    return {name: np.asarray(arrays[name] + change[name], dtype=np.float32) for name in arrays}


def _per_record(parameter: torch.nn.Parameter, records: int) -> torch.Tensor:
    """What Opacus' hooks left at a parameter, (records, *shape); one that the model does not use has no gradient."""
    gradients: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    return torch.zeros(records, *parameter.shape) if gradients is None else gradients


def read_arrays(model: torch.nn.Module, arrays: Arrays) -> None:
    """Sets a model's float parameters and buffers; integer buffers stay as they are and never travel.

    Raises:
        ValueError: names or shapes that are not the model's.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> read_arrays(model, {"weight": np.float32([[2.0]])})
    >>> model.weight.item()
    2.0
    """
    state = _travelling(model)
    if list(arrays) != list(state):
        raise ValueError(f"expected arrays named {', '.join(state)}, got {', '.join(arrays)}")
    with torch.no_grad():
        for name, tensor in state.items():
            if tuple(arrays[name].shape) != tuple(tensor.shape):
                raise ValueError(f"expected {name} of shape {tuple(tensor.shape)}, got {tuple(arrays[name].shape)}")
            tensor.copy_(torch.from_numpy(arrays[name]))


def write_arrays(model: torch.nn.Module) -> Arrays:
    """A model's float parameters and buffers, copied.

    >>> {name: array.shape for name, array in write_arrays(torch.nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: tensor.detach().numpy().copy() for name, tensor in _travelling(model).items()}


def _travelling(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}


def _hook(model: torch.nn.Module) -> GradSampleModule:
    from opacus.grad_sample import GradSampleModule

    # loss_reduction="sum": the loss is a sum over records, so grad_sample is each record's own gradient, unscaled.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GradSampleModule(model, loss_reduction="sum")
