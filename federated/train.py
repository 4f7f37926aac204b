"""How one owner learns: per-record gradients from Opacus, everything private from the mechanism."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.clipping import Arrays, clip_update, update_norm
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.task import Records, Task

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

__all__ = ["Arrays", "LocalTrainer", "read_arrays", "refuse_mixing_layers", "write_arrays"]


class LocalTrainer:
    """Takes an owner's local steps; one per process, because hooking a model takes longer than a step."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        mechanism: Mechanism,
        *,
        learning_rate: float,
        batch_rate: float = 1.0,
        chunk: int = 256,
    ) -> None:
        """Prepares a model.

        Args:
            task: gives the loss.
            model: its weights are overwritten at each call.
            mechanism: sampler, clip and noise.
            learning_rate: of plain local SGD.
            batch_rate: probability with which a record joins a local step's batch where records are not the unit.
            chunk: records whose gradients are held at once; a larger batch is taken in pieces, never cut.

        Raises:
            PrivacyRefused: a layer mixes records.
        """
        self._task, self._model, self._mechanism = task, model, mechanism
        self._learning_rate, self._chunk = learning_rate, chunk
        self._batch_rate = batch_rate
        self._hooked: GradSampleModule | None = None
        if mechanism.private or mechanism.per_record:
            refuse_mixing_layers(model)
        if mechanism.per_record:
            self._hooked = _hook(model)

    def update(self, arrays: Arrays, records: Records, randomness: Randomness) -> Arrays:
        """The model after this owner's steps: a function of noised gradients and public constants only.

        Args:
            arrays: the global model, by parameter name.
            records: the owner's.
            randomness: secret for a guarantee.

        Returns:
            Arrays of the same names and shapes.
        """
        update = self._walk(arrays, records, randomness)
        if self._mechanism.unit == "local":
            return _moved(arrays, self._mechanism.release_locally(update, randomness))
        return write_arrays(self._model)

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
        update = self._walk(arrays, records, randomness)
        changed = clip_update(update, clip_norm)
        return _moved(arrays, changed), update_norm(update) <= clip_norm

    def _walk(self, arrays: Arrays, records: Records, randomness: Randomness) -> Arrays:
        """Takes the local steps; returns how far the model moved."""
        read_arrays(self._model, arrays)
        self._model.train()
        self._forget()
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        per_record = self._mechanism.per_record
        for _ in range(self._mechanism.steps_per_round):
            batch = records.take(self._draw_batch(len(records), randomness))
            steps = self._private_step(batch, parameters, randomness) if per_record else self._plain_step(batch)
            with torch.no_grad():
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.sub_(step, alpha=self._learning_rate)
        after = write_arrays(self._model)
        return {name: after[name] - arrays[name] for name in arrays}

    def _forget(self) -> None:
        """Drops what an owner whose step raised left in the hooks: Opacus would count it to the next owner's."""
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for parameter in self._model.parameters():
            parameter.grad = None
            vars(parameter).pop("_current_grad_sample", None)
            vars(parameter).update(grad_sample=None, _forward_counter=0)

    def _private_step(
        self, batch: Records, parameters: Sequence[torch.nn.Parameter], randomness: Randomness
    ) -> list[torch.Tensor]:
        shapes = [parameter.shape for parameter in parameters]
        return self._mechanism.noisy_mean(self._gradients(batch, parameters), shapes, randomness)

    def _gradients(self, batch: Records, parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.Tensor]]:
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
            yield [_per_record(parameter, len(logits)) for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
                parameter.grad_sample = None  # type: ignore[attr-defined]  # as above

    def _plain_step(self, batch: Records) -> list[torch.Tensor]:
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if len(batch) == 0:
            return [torch.zeros_like(p) for p in parameters]
        loss = self._task.loss(self._model(torch.from_numpy(batch.inputs)), torch.from_numpy(batch.labels))
        return list(torch.autograd.grad(loss / len(batch), parameters))


def _moved(arrays: Arrays, change: Mapping[str, npt.NDArray[np.float64]]) -> Arrays:
    return {name: np.asarray(arrays[name] + change[name], dtype=np.float32) for name in arrays}


def _per_record(parameter: torch.nn.Parameter, records: int) -> torch.Tensor:
    """What Opacus' hooks left at a parameter, (records, *shape); one that the model does not use has no gradient."""
    gradients: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    return torch.zeros(records, *parameter.shape) if gradients is None else gradients


def refuse_mixing_layers(model: torch.nn.Module) -> None:
    """Refuses layers in which more than a record's own gradient depends on it, or on randomness that is not secret.

    Batch statistics mix the records of a batch; a buffer may carry what it saw past clip and noise; dropout draws from
    torch's global generator, whose default seed is a constant.

    Raises:
        PrivacyRefused: names the layers and what to use instead.

    >>> refuse_mixing_layers(torch.nn.Linear(2, 2))
    >>> refuse_mixing_layers(torch.nn.Sequential(torch.nn.Dropout()))
    Traceback (most recent call last):
        ...
    tacit.federated.mechanism.PrivacyRefused: expected no dropout, got layer(s) 0; its randomness is not secret
    """
    mixing = [
        name or "model"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or any(True for _ in module.buffers(recurse=False))
    ]
    if mixing:
        raise PrivacyRefused(
            f"expected a model whose records do not mix, got batch statistics or buffers in layer(s) "
            f"{', '.join(mixing)}; "
            'use GroupNorm (in a recipe: [model] norm = "group")'
        )
    seeded = [
        n or "model"
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0.0
    ]
    if seeded:
        raise PrivacyRefused(f"expected no dropout, got layer(s) {', '.join(seeded)}; its randomness is not secret")


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
