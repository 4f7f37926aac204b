"""Models of images, ready for differential privacy: no layer mixes the records of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

__all__ = ["cnn"]

Norm = Literal["group", "batch", "none"]


def cnn(
    *,
    shape: tuple[int, int, int],
    classes: int,
    channels: Sequence[int] = (16, 32),
    groups: int = 4,
    norm: Norm = "group",
) -> nn.Sequential:
    """Convolution, normalisation and ReLU for each width, one 2x2 max pooling, one linear layer.

    Args:
        shape: one example, (channels, height, width).
        classes: width of the output.
        channels: width of each convolution.
        groups: groups of each GroupNorm; must divide every width.
        norm: "group", "none", or "batch", which differential privacy refuses.

    Raises:
        ValueError: a width that the groups do not divide.

    >>> sum(p.numel() for p in cnn(shape=(1, 8, 8), classes=10).parameters())
    10026
    """
    layers: list[nn.Module] = []
    previous, height, width = shape
    for out in channels:
        if norm == "group" and out % groups:
            raise ValueError(f"expected channels that groups={groups} divides, got channels={out}; change one of them")
        layers += [nn.Conv2d(previous, out, 3, padding=1), *_norm(norm, groups, out), nn.ReLU()]
        previous = out
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(previous * (height // 2) * (width // 2), classes)]
    return nn.Sequential(*layers)


def _norm(norm: Norm, groups: int, channels: int) -> list[nn.Module]:
    if norm == "group":
        return [nn.GroupNorm(groups, channels)]
    return [nn.BatchNorm2d(channels)] if norm == "batch" else []
