"""A model beside which canaries live: records whose gradient is a direction that the auditor has chosen.

Heads without bias are added to a model, and their sum to the loss. A record's extra inputs are then exactly its
gradient for the heads, whatever the weights are: the canary of Andrew et al. 2024, through the run's own layers, clip
and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tacit.devices.interface import Interface
from tacit.federated.clipping import Arrays
from tacit.federated.task import Data, DataProblem, Records, Task

__all__ = ["CanaryModel", "CanaryTask", "along", "canary_records", "canary_task", "head_directions", "head_names"]

HEADS = 4  # clipped one by one instead of together, a canary over four heads of equal weight would count twice


class CanaryModel(nn.Module):
    """A model with linear heads: the first inputs are the model's, the others the canary's.

    >>> model = CanaryModel(None, shape=(), dimension=8)
    >>> model(torch.ones(2, 8)).shape  # two idle classes and the heads' sum
    torch.Size([2, 3])
    """

    def __init__(self, inner: nn.Module | None, *, shape: Sequence[int], dimension: int) -> None:
        """Adds heads.

        Args:
            inner: the model, or None for the heads alone.
            shape: one example of the model's; empty without one.
            dimension: the canary's, a multiple of 4.
        """
        super().__init__()
        self.inner = inner
        self._shape = tuple(shape)
        self.width = int(np.prod(self._shape)) if self._shape else 0
        self.dimension = dimension
        self.heads = nn.ModuleList(nn.Linear(dimension // HEADS, 1, bias=False) for _ in range(HEADS))
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]  # a Linear's weight is a tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of the inner model, and in the last column the heads' sum: (records, classes + 1)."""
        pieces = inputs[:, self.width :].chunk(HEADS, dim=1)
        value = sum(head(piece) for head, piece in zip(self.heads, pieces, strict=True))
        if self.inner is None:
            logits = inputs.new_zeros(len(inputs), 2)
        else:
            logits = self.inner(inputs[:, : self.width].reshape(-1, *self._shape))
        return torch.cat([logits, torch.as_tensor(value)], dim=1)


@dataclass(frozen=True, kw_only=True)
class CanaryTask(Task):
    """A task whose loss is that of the inner model's logits plus the heads' sum."""

    classes: int = field(default=2)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over records, each of which has its own gradient: the inner model's, and its extra inputs."""
        inner = nn.functional.cross_entropy(logits[:, :-1], labels.clamp(max=self.classes - 1), reduction="sum")
        return inner + logits[:, -1].sum()


def canary_task(model: CanaryModel, classes: int) -> CanaryTask:
    """The task of a canary model with so many classes; its records come from the auditor."""

    def load() -> Data:
        raise DataProblem("expected records from the auditor, got a request to load some")

    labels = tuple(str(label) for label in range(classes + 1))
    return CanaryTask(
        name="canaries",
        title="Canaries",
        interface=Interface(shape=(model.width + model.dimension,), labels=labels),
        load=load,
        build=lambda _: model,
        classes=classes,
    )


def head_names() -> list[str]:
    """The heads' names among a canary model's arrays, in the order of the canary's inputs."""
    return [f"heads.{index}.weight" for index in range(HEADS)]


def head_directions(count: int, dimension: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Random unit vectors with the same weight on each head, (count, dimension), nearly orthogonal to each other."""
    drawn = generator.standard_normal((count, HEADS, dimension // HEADS))
    drawn /= np.sqrt(HEADS) * np.linalg.norm(drawn, axis=2, keepdims=True)
    return drawn.reshape(count, dimension).astype(np.float32)


def along(arrays: Arrays) -> npt.NDArray[np.float64]:
    """The heads of a canary model's arrays as one vector, (dimension,)."""
    return np.concatenate([arrays[name].ravel() for name in head_names()]).astype(np.float64)


def canary_records(
    directions: npt.NDArray[np.float32], *, width: int, scale: float, beside: Records | None = None
) -> Records:
    """Records of chosen gradients, and after them others that have none for the heads.

    Args:
        directions: unit vectors, (canaries, dimension).
        width: inputs of the inner model, which are zero for a canary.
        scale: norm of a canary's gradient before it is clipped.
        beside: records of the inner model.
    """
    count, dimension = directions.shape
    rows = np.zeros((count + (0 if beside is None else len(beside)), width + dimension), np.float32)
    rows[:count, width:] = directions * np.float32(scale)
    labels = np.zeros(len(rows), np.int64)
    if beside is not None:
        rows[count:, :width] = beside.inputs.reshape(len(beside), width)
        labels[count:] = beside.labels
    return Records(rows, labels)
