"""A model with its preprocessing and its answer inside the graph: raw values in, probabilities or real units out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tacit.devices.interface import Interface

__all__ = ["Whole", "raw_values", "whole_interface"]


class Whole(nn.Module):
    """What an interface says, as layers around a model: `(raw * scale - mean) / std`, then softmax or units.

    A reconstruction stays in the model's own units, with which its error is counted.

    Example:
        >>> interface = Interface(shape=(1, 2, 2), scale=0.5, mean=(1.0,), std=(2.0,), labels=("no", "yes"))
        >>> whole = Whole(nn.Flatten(), interface)
        >>> whole(torch.tensor([[[[2.0, 2.0], [2.0, 2.0]]]])).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        """Wraps a model, which is not copied."""
        super().__init__()
        per_channel = (1, -1, *[1] * (len(interface.shape) - 1))
        self.model, self.output = model, interface.output
        mean, std = torch.tensor(interface.mean).view(per_channel), torch.tensor(interface.std).view(per_channel)
        # One product and one sum: (raw * scale - mean) / std.
        self.register_buffer("factor", interface.scale / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("target_mean", torch.tensor(interface.target_mean), persistent=False)
        self.register_buffer("target_std", torch.tensor(interface.target_std), persistent=False)
        self.factor: torch.Tensor
        self.shift: torch.Tensor
        self.target_mean: torch.Tensor
        self.target_std: torch.Tensor

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw values (n, *shape) to probabilities, or values in the units of the data."""
        answer: torch.Tensor = self.model(raw * self.factor + self.shift)
        if self.output == "logits":
            return torch.softmax(answer, dim=-1)
        return answer * self.target_std + self.target_mean if self.output == "values" else answer


def raw_values(inputs: npt.NDArray[np.float32], interface: Interface) -> npt.NDArray[np.float32]:
    """Preprocessed inputs as the raw values that they were made of.

    Example:
        >>> table = Interface(shape=(2,), mean=(1.0,), std=(2.0,), labels=("no", "yes"))
        >>> raw_values(table.preprocess(np.array([[1, 5]])), table).tolist()
        [[1.0, 5.0]]
    """
    per_channel = (1, -1, *[1] * (inputs.ndim - 2))
    mean = np.array(interface.mean, np.float32).reshape(per_channel)
    std = np.array(interface.std, np.float32).reshape(per_channel)
    return np.ascontiguousarray((inputs * std + mean) / np.float32(interface.scale), dtype=np.float32)


def whole_interface(interface: Interface) -> Interface:
    """What is left to do outside: nothing before, and after it what is in the labels.

    Example:
        >>> whole_interface(Interface(shape=(2,), mean=(1.0,), labels=("no", "yes"))).output
        'probabilities'
    """
    plain = replace(interface, scale=1.0, mean=(0.0,), std=(1.0,), target_mean=(0.0,), target_std=(1.0,))
    return replace(plain, output="probabilities") if interface.output == "logits" else plain
