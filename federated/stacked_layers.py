"""Layers of which every client has weights of its own: how each kind is called with all clients' records at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tacit.federated.per_record_layers import KINDS

__all__ = ["CALLS", "Order", "Out", "max_pool", "trainable", "unstackable_layers"]

Tensor = torch.Tensor
# From so many channels on, it pays to have a pixel's channels beside each other while the largest is looked for.
_SOME_CHANNELS = 4
# What came out, and what the layer's gradient needs (as `Kind.call` has it).
Out = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Order:
    """In which order the records of all clients stand in the first dimension.

    Attributes:
        clients: how many there are; each has as many records as the others.
        mixed: the first record of every client, then the second of every client: so convolutions copy nothing, in which
            clients are groups of channels. Otherwise one client's records after another's: so products copy nothing.

    >>> records = torch.tensor([1, 2, 3, 4])
    >>> Order(2, mixed=False).apart(records).tolist(), Order(2, mixed=True).apart(records).tolist()
    ([[1, 2], [3, 4]], [[1, 3], [2, 4]])
    """

    clients: int
    mixed: bool

    @staticmethod
    def mixes(model: nn.Module) -> bool:
        """Whether mixed is the order that should copy less."""
        layers = [type(layer) for layer in model.modules()]
        convolutions = layers.count(nn.Conv1d) + layers.count(nn.Conv2d)
        return convolutions > 0 and convolutions >= layers.count(nn.Linear)

    def apart(self, values: Tensor) -> Tensor:
        """From (all records, ...) to (clients, records, ...), a view."""
        if self.mixed:
            return values.view(-1, self.clients, *values.shape[1:]).transpose(0, 1)
        return values.view(self.clients, -1, *values.shape[1:])

    def joined(self, values: Tensor) -> Tensor:
        """From (clients, records, ...) to (all records, ...)."""
        return (values.transpose(0, 1) if self.mixed else values).flatten(0, 1)


def unstackable_layers(model: nn.Module) -> list[str]:
    """Names of layers with trainable parameters that have no stacked form here.

    >>> unstackable_layers(nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4)))
    ['1']
    """
    seen: set[nn.Parameter] = set()
    names = []
    for name, layer in model.named_modules():
        own = trainable(layer)
        kind = KINDS.get(type(layer))
        whole = type(layer) in CALLS and kind is not None and kind.suits(layer) and not seen & set(own)
        whole = whole and not (isinstance(layer, nn.Embedding) and layer.padding_idx is not None)
        if own and not (whole and len(own) == sum(1 for _ in layer.parameters(recurse=False))):
            names.append(name or "model")
        seen |= set(own)
    return names


def trainable(layer: nn.Module) -> list[nn.Parameter]:
    """A layer's own trainable parameters, those of layers inside it left out."""
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]


def _linear(layer: nn.Linear, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Out:
    apart, weight = order.apart(inputs), own["weight"].mT
    rows = apart.flatten(1, -2)  # (clients, records x positions, in)
    out = rows @ weight if layer.bias is None else torch.baddbmm(own["bias"][:, None], rows, weight)
    return order.joined(out.view(*apart.shape[:-1], layer.out_features)), ()


def _convolution(layer: Any, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Out:
    """Each client's channels are groups of their own: a record becomes one of the n-th records of all clients."""
    inputs = inputs.contiguous()
    if layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    rows = order.apart(inputs).transpose(0, 1).flatten(1, 2)  # (records, clients x channels, ...)
    convolve = {1: F.conv1d, 2: F.conv2d}[len(layer.kernel_size)]
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    bias = None if layer.bias is None else own["bias"].flatten()
    groups = order.clients * layer.groups
    out = convolve(rows, own["weight"].flatten(0, 1), bias, layer.stride, padding, layer.dilation, groups)
    return order.joined(out.view(len(out), order.clients, layer.out_channels, *out.shape[2:]).transpose(0, 1)), ()


def _group_norm(layer: nn.GroupNorm, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Out:
    """Every record's channels are channels of one large record, so that each has its own client's weight and bias."""
    inputs = inputs.contiguous()
    records, channels = inputs.shape[:2]
    weight, bias = (_of_each_record(own.get(name), order, records) for name in ("weight", "bias"))
    sizes = (1, records * channels, math.prod(inputs.shape[2:]), records * layer.num_groups)
    out, *kept = torch.native_group_norm(inputs.view(1, records * channels, -1), weight, bias, *sizes, layer.eps)
    return out.view(inputs.shape), tuple(kept)


def _of_each_record(values: Tensor | None, order: Order, records: int) -> Tensor | None:
    """From (clients, channels) to (records x channels,)."""
    if values is None:
        return None
    return order.joined(values[:, None].expand(-1, records // order.clients, -1)).flatten()


def _layer_norm(layer: nn.LayerNorm, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Out:
    plain, *kept = torch.native_layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    between = inputs.dim() - len(layer.normalized_shape)
    weight, bias = (
        own[name].view(order.clients, *[1] * between, *layer.normalized_shape) if name in own else None
        for name in ("weight", "bias")
    )
    if weight is not None:
        rows = order.apart(plain)
        plain = order.joined(rows * weight if bias is None else torch.addcmul(bias, rows, weight))
    return plain, tuple(kept)


def _embedding(layer: nn.Embedding, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Out:
    apart = order.apart(inputs)
    first = len(layer.weight) * torch.arange(order.clients, device=inputs.device)
    places = apart + first.view(-1, *[1] * (apart.dim() - 1))
    return F.embedding(order.joined(places), own["weight"].flatten(0, 1)), ()


Stacked = Callable[[Any, Mapping[str, Tensor], Order, Tensor], Out]
# From a layer, its parameters (clients, *shape) by name, the records' order and what goes in.
CALLS: Mapping[type[nn.Module], Stacked] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def max_pool(layer: nn.MaxPool2d, inputs: Tensor) -> Tensor:
    """What the layer returns, from torch's kernel for channels that lie together: the other compares one by one.

    On 16 channels of 8x8 that is a fourth of the time, and the same places are found where several are the largest.

    >>> images = torch.rand(2, 4, 6, 6)
    >>> torch.equal(max_pool(nn.MaxPool2d(2), images), nn.MaxPool2d(2)(images))
    True
    """
    if inputs.dim() != 4 or inputs.shape[1] < _SOME_CHANNELS or inputs.device.type != "cpu" or layer.return_indices:
        return type(layer).forward(layer, inputs)  # type: ignore[no-any-return]  # torch leaves it untyped
    window = [_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]
    return _MaxPool.apply(inputs, *window, layer.ceil_mode)  # type: ignore[no-untyped-call, no-any-return]  # torch's


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *window: Any) -> Tensor:
        together = inputs.contiguous(memory_format=torch.channels_last)
        largest, places = torch.ops.aten.max_pool2d_with_indices(together, *window)
        ctx.save_for_backward(inputs, places.contiguous())  # a place is a pixel's, however channels lie
        ctx.window = window
        return largest.contiguous()  # type: ignore[no-any-return]  # torch leaves its operators untyped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, places = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward(gradient, inputs, *ctx.window, places)
        return (back, *[None] * len(ctx.window))
