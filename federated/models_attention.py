"""A transformer's encoder of plain linear layers, for sequences and for patches of images.

torch.nn.MultiheadAttention keeps its weights as bare parameters; of linear layers, gradients by record come from sums.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tacit.federated.models_parts import activation_layer

__all__ = ["Encoder", "EncoderLayer"]

Tensor = torch.Tensor


class EncoderLayer(nn.Module):
    """Attention and feed-forward layer, each after a LayerNorm and added to what came in.

    The mathematics of torch.nn.TransformerEncoderLayer(norm_first=True, dropout=0); Vaswani et al. 2017 (arXiv
    1706.03762), with the norms before as in Xiong et al. 2020 (arXiv 2002.04745), which needs no warm-up.
    """

    def __init__(self, width: int, heads: int, *, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.up, self.activation = nn.Linear(width, 4 * width), activation_layer(activation)
        self.down = nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """From and to (records, positions, width)."""
        middle = inputs + self._attention(self.before_attention(inputs))
        after: Tensor = middle + self.down(self.activation(self.up(self.before_feedforward(middle))))
        return after

    def _attention(self, inputs: Tensor) -> Tensor:
        parts = (layer(inputs) for layer in (self.query, self.key, self.value))
        # (records, heads, positions, width of a head)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = F.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[3]), dim=-1)
        joined: Tensor = self.joined((weights @ value).transpose(1, 2).flatten(2))
        return joined


class Encoder(nn.Module):
    """Adds a learned vector for each position, then encoder layers, a LayerNorm, and the mean over positions.

    Positions are an embedding and not a bare parameter: its rows are looked up for each record, so that each record
    has its own gradient there.

    >>> Encoder(7, width=8, depth=1, heads=2, activation="gelu")(torch.zeros(3, 7, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(self, positions: int, *, width: int, depth: int, heads: int, activation: str) -> None:
        """Checks that the heads divide the width.

        Raises:
            ValueError: they do not.
        """
        if width % heads:
            raise ValueError(f"expected a width that heads={heads} divides, got width={width}; change one of them")
        super().__init__()
        self.position = nn.Embedding(positions, width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, activation=activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """From (records, positions, width) to (records, width)."""
        places = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[0], -1)
        pooled: Tensor = self.norm(self.layers(inputs + self.position(places))).mean(1)
        return pooled
