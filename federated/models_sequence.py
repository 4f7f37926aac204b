"""Models of sequences of shape (channels, time), made of layers whose records stay apart and that every exporter knows.

torch.nn.LSTM and GRU hide their steps from whoever needs each record's gradient. Here a recurrent
layer is two linear layers, one over all inputs at once and one called at each time step, so that gradients by record
come from sums, without Opacus. The loop over time is unrolled when a model is exported: file and start-up time grow
with the length. `patch` joins time steps to shorten it, by default to 64 steps at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from tacit.federated.models_attention import Encoder
from tacit.federated.models_parts import Norm, activation_layer, check_shape, norm_layers

__all__ = ["GruLayer", "LstmLayer", "conv1d", "gru", "lstm", "transformer"]

Tensor = torch.Tensor
_AXES = ("channels", "time")
# A convolution does not halve a sequence that would become shorter than this.
_SHORTEST = 5
# Steps that a recurrent layer or an encoder takes, at most, unless a recipe says otherwise.
_STEPS = 64


def conv1d(
    *,
    shape: tuple[int, int],
    outputs: int,
    channels: Sequence[int] = (32, 64, 64),
    groups: int = 4,
    norm: Norm = "group",
    activation: str = "relu",
) -> nn.Sequential:
    """Convolutions over time, the mean over time, one linear layer.

    After Wang et al. 2017 (arXiv 1611.06455), smaller; each layer but the first halves the time where enough is left.

    Args:
        shape: one example, (channels, time).
        outputs: width of the output.
        channels: width of each convolution.
        groups: of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.
        activation: by name.

    Raises:
        ValueError: a shape or width that does not fit.

    >>> conv1d(shape=(9, 128), outputs=6)(torch.zeros(2, 9, 128)).shape
    torch.Size([2, 6])
    """
    check_shape("conv1d", shape, _AXES)
    previous, time = shape
    layers: list[nn.Module] = []
    for index, out in enumerate(channels):
        stride = 2 if index and time >= 2 * _SHORTEST else 1
        layers.append(nn.Conv1d(previous, out, 5, stride=stride, padding=2))
        layers += [*norm_layers(norm, groups, out, dimensions=1), activation_layer(activation)]
        previous, time = out, math.ceil(time / stride)
    return nn.Sequential(*layers, MeanOverTime(), nn.Linear(previous, outputs))


class MeanOverTime(nn.Module):
    """From (records, channels, time) to (records, channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean of each channel."""
        return inputs.mean(2)


class _JoinSteps(nn.Module):
    """From (records, channels, time) to (records, steps, features): `patch` time steps together, zeros at the end."""

    def __init__(self, patch: int, time: int) -> None:
        super().__init__()
        self.patch, self.missing = patch, -time % patch

    def forward(self, inputs: Tensor) -> Tensor:
        rows = F.pad(inputs, (0, self.missing)) if self.missing else inputs
        rows = rows.transpose(1, 2)  # (records, time, channels)
        return rows if self.patch == 1 else rows.reshape(rows.shape[0], -1, self.patch * rows.shape[2])


class LstmLayer(nn.Module):
    """One layer of torch.nn.LSTM's mathematics, gates in its order: input, forget, cell, output.

    >>> LstmLayer(3, 4)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(features, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, inputs: Tensor) -> Tensor:
        """The state after each step: from (records, steps, features) to (records, steps, width)."""
        state = cell = inputs.new_zeros(inputs.shape[0], self.of_state.in_features)
        states = []
        for step in self.of_input(inputs).unbind(1):
            enter, forget, new, leave = (step + self.of_state(state)).chunk(4, dim=1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states, dim=1)


class GruLayer(nn.Module):
    """One layer of torch.nn.GRU's mathematics, gates in its order: reset, update, new.

    >>> GruLayer(3, 4)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(features, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, inputs: Tensor) -> Tensor:
        """The state after each step: from (records, steps, features) to (records, steps, width)."""
        state = inputs.new_zeros(inputs.shape[0], self.of_state.in_features)
        states = []
        for step in self.of_input(inputs).unbind(1):
            (reset, update, new), (reset_by, update_by, new_by) = step.chunk(3, 1), self.of_state(state).chunk(3, 1)
            proposed = (new + (reset + reset_by).sigmoid() * new_by).tanh()
            kept = (update + update_by).sigmoid()
            state = kept * state + (1.0 - kept) * proposed
            states.append(state)
        return torch.stack(states, dim=1)


class _LastStep(nn.Module):
    """From (records, steps, width) to (records, width)."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, -1]


def lstm(
    *, shape: tuple[int, int], outputs: int, width: int = 64, depth: int = 1, patch: int | None = None
) -> nn.Sequential:
    """LSTM layers (Hochreiter and Schmidhuber 1997) and a linear layer on the last state.

    Args:
        shape: one example, (channels, time).
        outputs: width of the output.
        width: of each layer's state.
        depth: layers.
        patch: time steps that enter together; None for as many as make at most 64 steps.

    Raises:
        ValueError: a shape that is not a sequence.

    >>> lstm(shape=(9, 12), outputs=6)(torch.zeros(2, 9, 12)).shape
    torch.Size([2, 6])
    """
    return _recurrent("lstm", LstmLayer, shape, outputs, widths=[width] * depth, patch=patch)


def gru(
    *, shape: tuple[int, int], outputs: int, width: int = 64, depth: int = 1, patch: int | None = None
) -> nn.Sequential:
    """GRU layers (Cho et al. 2014, arXiv 1406.1078) and a linear layer on the last state.

    Args:
        shape: one example, (channels, time).
        outputs: width of the output.
        width: of each layer's state.
        depth: layers.
        patch: time steps that enter together; None for as many as make at most 64 steps.

    Raises:
        ValueError: a shape that is not a sequence.

    >>> gru(shape=(9, 12), outputs=6, patch=2)(torch.zeros(2, 9, 12)).shape
    torch.Size([2, 6])
    """
    return _recurrent("gru", GruLayer, shape, outputs, widths=[width] * depth, patch=patch)


def _recurrent(
    family: str,
    kind: type[LstmLayer] | type[GruLayer],
    shape: tuple[int, int],
    outputs: int,
    *,
    widths: Sequence[int],
    patch: int | None,
) -> nn.Sequential:
    check_shape(family, shape, _AXES)
    channels, time = shape
    joined = patch or math.ceil(time / _STEPS)
    features = [channels * joined, *widths[:-1]]
    layers = [kind(*sizes) for sizes in zip(features, widths, strict=True)]
    return nn.Sequential(_JoinSteps(joined, time), *layers, _LastStep(), nn.Linear(widths[-1], outputs))


def transformer(
    *,
    shape: tuple[int, int],
    outputs: int,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    patch: int | None = None,
    activation: str = "gelu",
) -> nn.Sequential:
    """A transformer's encoder over time and a linear layer on the mean of its positions.

    Args:
        shape: one example, (channels, time).
        outputs: width of the output.
        width: of each position; a multiple of the heads.
        depth: encoder layers.
        heads: of attention.
        patch: time steps that make one position; None for as many as make at most 64 positions.
        activation: of the feed-forward layers, by name.

    Raises:
        ValueError: a shape that is not a sequence, or a width that the heads do not divide.

    >>> transformer(shape=(9, 30), outputs=6, patch=4)(torch.zeros(2, 9, 30)).shape
    torch.Size([2, 6])
    """
    check_shape("transformer", shape, _AXES)
    channels, time = shape
    joined = patch or math.ceil(time / _STEPS)
    encoder = Encoder(math.ceil(time / joined), width=width, depth=depth, heads=heads, activation=activation)
    return nn.Sequential(
        _JoinSteps(joined, time), nn.Linear(channels * joined, width), encoder, nn.Linear(width, outputs)
    )
