"""What all model families are made of: activations by name, normalisations, and shapes refused in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

__all__ = ["ACTIVATIONS", "Norm", "activation_layer", "check_shape", "linear_layers", "norm_layers"]

Norm = Literal["group", "batch", "none"]

# None is in place: an activation in place rewrites what a layer returned, for nothing that a small model would notice.
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky-relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
_BATCH_NORMS: Mapping[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def activation_layer(name: str) -> nn.Module:
    """A new layer of an activation.

    Raises:
        ValueError: no such activation.

    >>> activation_layer("leaky-relu")
    LeakyReLU(negative_slope=0.01)
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"expected an activation among {', '.join(ACTIVATIONS)}, got activation={name!r}; choose one")
    return ACTIVATIONS[name]()


def norm_layers(norm: Norm, groups: int, channels: int, *, dimensions: int = 2) -> list[nn.Module]:
    """The normalisation after a convolution: one layer, or none.

    Args:
        norm: "group", "none", or "batch", which differential privacy refuses.
        groups: of a GroupNorm; must divide the channels.
        channels: what is normalised.
        dimensions: 2 for images, 1 for sequences.

    Raises:
        ValueError: no such normalisation, or channels that the groups do not divide.

    >>> norm_layers("group", 4, 16)[0].num_groups, norm_layers("none", 4, 16)
    (4, [])
    """
    if norm not in ("group", "batch", "none"):
        raise ValueError(f"expected a norm among group, batch, none, got norm={norm!r}; choose one")
    if norm == "none":
        return []
    if norm == "batch":
        return [_BATCH_NORMS[dimensions](channels)]
    if channels % groups:
        raise ValueError(f"expected channels that groups={groups} divides, got channels={channels}; change one of them")
    return [nn.GroupNorm(groups, channels)]


def check_shape(family: str, shape: Sequence[int], axes: Sequence[str], *, smallest: int = 1) -> None:
    """Refuses examples that a family is not made for.

    Args:
        family: its name.
        shape: of one example.
        axes: what each of its dimensions must be.
        smallest: the least size of all dimensions but the first.

    Raises:
        ValueError: says which shapes the family takes.

    >>> check_shape("conv1d", (6, 128), ("channels", "time"))
    >>> check_shape("conv1d", (1, 8, 8), ("channels", "time"))
    Traceback (most recent call last):
        ...
    ValueError: expected examples of shape (channels, time) for family='conv1d', got shape=(1, 8, 8); reshape the \
examples or choose another family
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"expected examples of shape ({', '.join(axes)}) for family={family!r}, got shape={tuple(shape)}; "
            "reshape the examples or choose another family"
        )
    if min(shape[1:], default=smallest) < smallest:
        raise ValueError(
            f"expected {' and '.join(axes[1:])} of at least {smallest} for family={family!r}, got "
            f"shape={tuple(shape)}; give larger examples or choose another family"
        )


def linear_layers(widths: Sequence[int], activation: str) -> list[nn.Module]:
    """Linear layers from each width to the next, an activation between them and none at the end.

    >>> linear_layers((4, 3, 2), "tanh")[1:]
    [Tanh(), Linear(in_features=3, out_features=2, bias=True)]
    """
    layers: list[nn.Module] = []
    for previous, width in pairwise(widths):
        layers += [nn.Linear(previous, width), activation_layer(activation)]
    return layers[:-1]
