"""Which layer of an artifact departs from its model first: the model is exported again, cut off after one layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

__all__ = ["Departure", "first_departure"]

Values = npt.NDArray[np.generic]
# Writes a model in the form in question, and says what that file answers.
Answer = Callable[[nn.Module, Path], Values]


class Departure(ValueError):
    """An artifact that does not answer as its model does."""


class _Until(nn.Module):
    """A model that ends with the output of one of its layers."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self._kept: list[torch.Tensor] = []
        self.model.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, output: Any) -> None:
        self._kept.append(output if isinstance(output, torch.Tensor) else output[0])

    def forward(
        self,
        first: torch.Tensor,
        second: torch.Tensor | None = None,
        third: torch.Tensor | None = None,
        fourth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the layer gives, the first time that it is called; exporters want to know arguments one by one."""
        self._kept.clear()
        self.model(*(given for given in (first, second, third, fourth) if given is not None))
        return self._kept[0]


def first_departure(
    model: nn.Module, inputs: Sequence[Values], answer: Answer, *, tolerance: float
) -> tuple[str, float] | None:
    """Find the first layer after which an artifact departs from its model.

    A search by halves: it takes for granted that what has departed stays so, and exports a few times.

    Args:
        model: Left as it is.
        inputs: Of the model, one array each, (n, *shape).
        answer: Writes a model, cut off after a layer, in the form in question to a path, and gives its outputs on the
            same inputs; what it raises counts as a departure.
        tolerance: Departed is what differs by more than this share, in L2 norm.

    Returns:
        The layer's name and by which share it differs (infinite where it cannot be written or run); None where none
        of them departs.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> def broken_relu(part, path):  # an artifact whose ReLU does nothing
        ...     with torch.no_grad():
        ...         return np.asarray(part.model[0](torch.ones(3, 2)))
        >>> first_departure(model, (np.ones((3, 2), np.float32),), broken_relu, tolerance=0.01)[0] in {"1", "2"}
        True
    """
    names = [name for name, layer in model.named_modules() if name and not any(layer.children())]
    with TemporaryDirectory() as scratch:
        parts = _Parts(model, inputs, answer, Path(scratch))
        low, high, found = 0, len(names) - 1, None
        while low <= high:
            middle = (low + high) // 2
            share = parts.share(names[middle])
            if share > tolerance:
                found, high = (names[middle], share), middle - 1
            else:
                low = middle + 1
    return found


class _Parts:
    def __init__(self, model: nn.Module, inputs: Sequence[Values], answer: Answer, scratch: Path) -> None:
        self._model, self._answer, self._scratch = model, answer, scratch
        self._inputs = [torch.from_numpy(np.ascontiguousarray(values)) for values in inputs]

    def share(self, name: str) -> float:
        """By which share of its norm a layer's output differs."""
        part = _Until(self._model, name)
        try:
            with torch.no_grad():
                wanted = part(*self._inputs).numpy().astype(np.float64)
        except IndexError:  # never called
            return 0.0
        try:
            found = self._answer(part, self._scratch / "part").astype(np.float64)
        except (ValueError, RuntimeError):
            return np.inf
        if found.shape != wanted.shape or not np.isfinite(found).all():
            return np.inf
        return float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), 1e-12)
