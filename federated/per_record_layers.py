"""Each kind of layer's part in a clipped sum, from what went in and the gradient of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tacit.federated.per_record_parts import (
    Apart,
    Part,
    from_factors,
    from_gradients,
    ghost_is_cheaper,
    masked,
    with_doubles,
)

__all__ = ["KINDS", "Kind", "Use"]

Tensor = torch.Tensor
# With fewer channels than this, a convolution of one group for each record leaves vector registers empty.
_FEW_CHANNELS = 8


@dataclass(frozen=True, kw_only=True)
class Use:
    """One call of a layer.

    Attributes:
        inputs: what went in, (records, ...).
        gradient: the loss's gradient at what came out, (records, ...).
        kept: what the layer computed on the way and its gradient needs: a normalisation's means and scales.
    """

    inputs: Tensor
    gradient: Tensor
    kept: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a kind of layer is called and how its part is made.

    Attributes:
        call: the layer's forward pass: what comes out, and what to keep.
        part: from all uses of the layer in one pass; their gradients add up before a norm is taken.
        suits: whether a layer of this kind can be handled with its settings.
    """

    call: Callable[[Any, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
    part: Callable[[Any, Sequence[Use]], Part]
    suits: Callable[[Any], bool] = lambda _: True


def _added(gradients: Sequence[list[Tensor]]) -> Part:
    """From several uses of a layer, each with its per-record gradients."""
    first, *others = gradients
    for other in others:
        first = [a + b for a, b in zip(first, other, strict=True)]
    return from_gradients(first)


def _linear_part(layer: nn.Linear, uses: Sequence[Use]) -> Part:
    records = len(uses[0].inputs)
    inputs = _joined([use.inputs.view(records, -1, layer.in_features) for use in uses])  # (records, positions, in)
    gradient = _joined([use.gradient.reshape(records, -1, layer.out_features) for use in uses])
    of_bias = [gradient.sum(1) if gradient.shape[1] > 1 else gradient[:, 0]] if _learns(layer.bias) else []
    if not layer.weight.requires_grad:
        return from_gradients(of_bias)
    if not ghost_is_cheaper(inputs.shape[1], layer.in_features, layer.out_features):
        return from_gradients([gradient.mT @ inputs, *of_bias])

    def add(place: Tensor, factors: Tensor, usable: Tensor | None) -> None:
        scaled = factors.view(-1, 1, 1) * masked(gradient, usable)
        place.view_as(layer.weight).addmm_(scaled.flatten(0, 1).mT, masked(inputs, usable).flatten(0, 1))

    def total(apart: Apart, factors: Tensor, usable: Tensor | None) -> Tensor:
        scaled = factors.view(-1, 1, 1) * masked(gradient, usable)
        of_group = apart(scaled).flatten(1, 2).mT @ apart(masked(inputs, usable)).flatten(1, 2)
        return of_group.flatten(1)

    return from_factors(inputs, gradient, of_bias, add, total)


def _joined(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _convolution_part(layer: _Convolution, uses: Sequence[Use]) -> Part:
    padded = [_padded(layer, use.inputs) for use in uses]
    of_bias = [[use.gradient.flatten(2).sum(2)] if _learns(layer.bias) else [] for use in uses]
    if not layer.weight.requires_grad:
        return _added(of_bias)
    (inputs, padding), gradient = padded[0], uses[0].gradient
    ghost = ghost_is_cheaper(gradient[0, 0].numel(), layer.weight[0].numel(), layer.out_channels)
    if not ghost or layer.groups > 1 or len(uses) > 1:
        weights = [_convolution_weights(layer, use.gradient, *pair) for use, pair in zip(uses, padded, strict=True)]
        return _added([[weight, *bias] for weight, bias in zip(weights, of_bias, strict=True)])

    def add(place: Tensor, factors: Tensor, usable: Tensor | None) -> None:
        scaled = factors.view(-1, *[1] * (gradient.dim() - 1)) * masked(gradient, usable)
        place += _weight_gradient(layer, scaled, masked(inputs, usable), padding, records=1).flatten()

    return from_factors(_windows(layer, inputs, padding).mT, gradient.flatten(2).mT, of_bias[0], add)


def _convolution_weights(layer: _Convolution, gradient: Tensor, inputs: Tensor, padding: list[int]) -> Tensor:
    """Each record's weight gradient, (records, out, channels x kernel)."""
    if layer.groups == 1 and layer.in_channels < _FEW_CHANNELS:
        return gradient.flatten(2) @ _windows(layer, inputs, padding).mT
    # A record becomes a group of channels of one large record: a group's weights meet its own channels only.
    one, many = gradient.reshape(1, -1, *gradient.shape[2:]), inputs.reshape(1, -1, *inputs.shape[2:])
    return _weight_gradient(layer, one, many, padding, records=len(inputs)).view(len(inputs), layer.out_channels, -1)


def _weight_gradient(
    layer: _Convolution, gradient: Tensor, inputs: Tensor, padding: list[int], *, records: int
) -> Tensor:
    weight = gradient.new_empty(records * layer.out_channels, *layer.weight.shape[1:])  # only its shape counts
    none = [0] * len(padding)
    convolution = (list(layer.stride), padding, list(layer.dilation), False, none, records * layer.groups)
    gradients = torch.ops.aten.convolution_backward(gradient, inputs, weight, None, *convolution, [False, True, False])
    return gradients[1]  # type: ignore[no-any-return]  # torch leaves its operators untyped


def _padded(layer: _Convolution, inputs: Tensor) -> tuple[Tensor, list[int]]:
    """The inputs, and the zeros that a convolution shall add on both sides of each dimension."""
    around = layer._reversed_padding_repeated_twice  # of the last dimension first: before, after
    before, after = around[-2::-2], around[::-2]
    if layer.padding_mode == "zeros" and before == after:
        return inputs, before
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, around, mode=mode), [0] * len(before)


def _windows(layer: _Convolution, inputs: Tensor, padding: list[int]) -> Tensor:
    """What each output position sees, (records, channels x kernel, positions)."""
    windows = F.pad(inputs, [size for each in reversed(padding) for size in (each, each)]) if any(padding) else inputs
    for place, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + place, dilation * (size - 1) + 1, stride)
        windows = windows[..., ::dilation] if dilation > 1 else windows
    dimensions = len(padding)
    order = [0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions)]
    return windows.permute(order).flatten(2 + dimensions).flatten(1, -2)


def _embedding_part(layer: nn.Embedding, uses: Sequence[Use]) -> Part:
    """Each record's gradient row by row: the rows that it uses, each once."""
    records, (tokens, width) = len(uses[0].inputs), layer.weight.shape
    used = _joined([use.inputs.reshape(records, -1) for use in uses])  # (records, positions)
    gradient = _joined([use.gradient.reshape(records, -1, width) for use in uses]).flatten(0, 1)
    keys = (used + tokens * torch.arange(records, device=used.device)[:, None]).flatten()
    if layer.padding_idx is not None:
        learned = used.flatten() != layer.padding_idx
        keys, gradient = keys[learned], gradient[learned]
    distinct, place = torch.unique(keys, return_inverse=True)
    record, token = distinct // tokens, distinct % tokens
    rows = gradient.new_zeros(len(distinct), width).index_add_(0, place, gradient)

    def add(places: Sequence[Tensor], factors: Tensor, usable: Tensor | None) -> None:
        scaled = factors[record, None] * masked(rows, None if usable is None else usable[record])
        places[0].view_as(layer.weight).index_add_(0, token, scaled)

    wide, whose = with_doubles(rows).double(), with_doubles(record)
    squares = wide.new_zeros(records).index_add_(0, whose, wide.square_().sum(1))
    return Part(norms=[squares.sqrt_().float()[:, None].to(rows.device)], additions=0, add=add)


def _group_norm_call(layer: nn.GroupNorm, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = inputs.contiguous()
    sizes = (inputs.shape[0], inputs.shape[1], math.prod(inputs.shape[2:]))
    out, *kept = torch.native_group_norm(inputs, layer.weight, layer.bias, *sizes, layer.num_groups, layer.eps)
    return out, tuple(kept)


def _group_norm_gradients(layer: nn.GroupNorm, use: Use) -> list[Tensor]:
    """By torch's own kernel, which sums over records: so each record becomes channels of one large record."""
    records, channels = len(use.inputs), layer.num_channels
    gradient, inputs, mean, scale = (t.reshape(1, -1) for t in (use.gradient, use.inputs, *use.kept))
    sizes = (1, records * channels, inputs.numel() // (records * channels), records * layer.num_groups)
    weight = gradient.new_ones(records * channels)  # what is asked for does not depend on it
    gradients = torch.ops.aten.native_group_norm_backward(
        gradient, inputs, mean, scale, weight, *sizes, [False, True, True]
    )
    return _chosen(layer, *(g.view(records, channels) for g in gradients[1:]))


def _layer_norm_call(layer: nn.LayerNorm, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out, *kept = torch.native_layer_norm(inputs, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    return out, tuple(kept)


def _layer_norm_gradients(layer: nn.LayerNorm, use: Use) -> list[Tensor]:
    shape = (len(use.inputs), -1, layer.weight.numel())
    mean, scale = (k.reshape(len(use.inputs), -1, 1) for k in use.kept)
    gradient = use.gradient.reshape(shape)
    return _chosen(layer, ((use.inputs.reshape(shape) - mean) * scale * gradient).sum(1), gradient.sum(1))


def _rms_norm_gradients(layer: nn.RMSNorm, use: Use) -> list[Tensor]:
    shape = (len(use.inputs), -1, layer.weight.numel())
    normalised = F.rms_norm(use.inputs, layer.normalized_shape, None, layer.eps)
    return [(normalised.reshape(shape) * use.gradient.reshape(shape)).sum(1)]


def _chosen(layer: nn.Module, of_weight: Tensor, of_bias: Tensor) -> list[Tensor]:
    return [g for p, g in ((layer.weight, of_weight), (layer.bias, of_bias)) if _learns(p)]  # type: ignore[arg-type]


def _plain(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return type(layer).forward(layer, inputs), ()


def _of_each_use(gradients: Callable[[Any, Use], list[Tensor]]) -> Callable[[Any, Sequence[Use]], Part]:
    return lambda layer, uses: _added([gradients(layer, use) for use in uses])


_CONVOLUTION = Kind(call=_plain, part=_convolution_part)
# By exact type: a subclass may compute something else.
KINDS: Mapping[type[nn.Module], Kind] = {
    nn.Linear: Kind(call=_plain, part=_linear_part),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.Embedding: Kind(
        call=_plain,
        part=_embedding_part,
        # max_norm changes the weight in the forward pass; the others mix records or give another kind of gradient.
        suits=lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse,
    ),
    nn.GroupNorm: Kind(call=_group_norm_call, part=_of_each_use(_group_norm_gradients)),
    nn.LayerNorm: Kind(call=_layer_norm_call, part=_of_each_use(_layer_norm_gradients)),
    nn.RMSNorm: Kind(call=_plain, part=_of_each_use(_rms_norm_gradients)),
}
