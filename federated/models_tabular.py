"""Models that see an example as one row of numbers, whatever its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from tacit.federated.models_parts import linear_layers

__all__ = ["autoencoder", "mlp"]


def mlp(
    *, shape: Sequence[int], outputs: int, hidden: Sequence[int] = (128, 64), activation: str = "relu"
) -> nn.Sequential:
    """Fully connected layers on the flattened example.

    Args:
        shape: one example, any.
        outputs: width of the output.
        hidden: width of each hidden layer; none for a linear model.
        activation: by name.

    >>> sum(p.numel() for p in mlp(shape=(30,), outputs=2, hidden=(16,)).parameters())
    530
    """
    return nn.Sequential(nn.Flatten(), *linear_layers([math.prod(shape), *hidden, outputs], activation))


def autoencoder(
    *, shape: Sequence[int], outputs: int = 0, hidden: Sequence[int] = (128, 128, 8), activation: str = "relu"
) -> nn.Sequential:
    """Fully connected layers down to a bottleneck and back; what comes out has the example's shape.

    The defaults follow the anomaly detector of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597), two layers shorter
    on each side. The last layer has no activation, so that any value can be rebuilt.

    Args:
        shape: one example, any.
        outputs: ignored.
        hidden: widths down to the bottleneck, which is the last; the way back has the others in reverse.
        activation: by name.

    Raises:
        ValueError: no bottleneck.

    >>> import torch
    >>> autoencoder(shape=(2, 5), hidden=(8, 3))(torch.zeros(4, 2, 5)).shape
    torch.Size([4, 2, 5])
    """
    if not hidden:
        raise ValueError("expected the width of a bottleneck, got hidden=[]; give at least one")
    size = math.prod(shape)
    layers = linear_layers([size, *hidden, *reversed(hidden[:-1]), size], activation)
    return nn.Sequential(nn.Flatten(), *layers, nn.Unflatten(1, tuple(shape)))
