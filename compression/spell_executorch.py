"""A model spelled in operators that XNNPACK takes: each one that it leaves out cuts an ExecuTorch program in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

aten = torch.ops.aten


class SpelledGroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018, arXiv 1803.08494) of (1, channels, height, width) or (1, channels, time).

    ExecuTorch runs its own GroupNorm outside of XNNPACK, with a transposition before and one after it. Here the mean
    of a group is a global average pooling and then a constant 1x1 convolution of a 1x1 map. The variance is that of
    the centred values: the mean of squares less the square of the mean loses every digit where the mean is large.

    Example:
        >>> norm, values = nn.GroupNorm(2, 6), 100.0 + torch.arange(24.0).view(1, 6, 2, 2)
        >>> bool((SpelledGroupNorm(2, norm.weight, norm.bias, norm.eps)(values) - norm(values)).abs().max() < 1e-5)
        True
    """

    def __init__(self, groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        channels = len(weight)
        self.register_buffer("weight", weight.detach().view(1, channels, 1, 1).clone())
        self.register_buffer("bias", bias.detach().view(1, channels, 1, 1).clone())
        self.weight: Tensor
        self.bias: Tensor
        self.there: Tensor
        self.back: Tensor
        self.eps, self.groups = eps, groups
        size = channels // groups
        # One grouped convolution has channels * size weights, one there and one back have 2 * channels * groups.
        self.at_once = size <= 4 * groups
        member = torch.eye(groups).repeat_interleave(size, dim=1)  # (groups, channels)
        if self.at_once:
            self.register_buffer("there", torch.full((channels, size, 1, 1), 1.0 / size))
        else:
            self.register_buffer("there", (member / size)[:, :, None, None].contiguous())
            self.register_buffer("back", member.T[:, :, None, None].contiguous())

    def _mean(self, values: Tensor) -> Tensor:
        """Of each channel's group, (1, channels, 1, 1)."""
        means = values.mean((2, 3), keepdim=True)
        if self.at_once:
            return F.conv2d(means, self.there, groups=self.groups)
        return F.conv2d(F.conv2d(means, self.there), self.back)

    def forward(self, values: Tensor) -> Tensor:
        """The normalised values, of the same shape."""
        if values.dim() == 3:
            rows: Tensor = self(values.unsqueeze(3))
            return rows.view(values.shape)
        centred = values - self._mean(values)
        scale = torch.rsqrt(self._mean(centred * centred) + self.eps) * self.weight
        return centred * scale + self.bias


class SpelledLayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) over the last axis, whose mean is a linear layer of one output.

    Example:
        >>> norm, values = nn.LayerNorm(6), torch.arange(12.0).view(1, 2, 6)
        >>> bool((SpelledLayerNorm(norm.weight, norm.bias, norm.eps)(values) - norm(values)).abs().max() < 1e-5)
        True
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())
        self.weight: Tensor
        self.bias: Tensor
        self.average: Tensor
        self.register_buffer("average", torch.full((1, len(weight)), 1.0 / len(weight)))
        self.eps = eps

    def forward(self, values: Tensor) -> Tensor:
        """The normalised values, of the same shape."""
        centred = values - F.linear(values, self.average)
        variance = F.linear(centred * centred, self.average)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def spelled(model: nn.Module, examples: tuple[Tensor, ...]) -> fx.GraphModule:
    """The model's graph for inputs of these shapes, in the operators that XNNPACK takes, and otherwise the same.

    Args:
        model: In evaluation mode; left as it is.
        examples: One example of each input, (1, *shape).
    """
    traced = torch.export.export(model, examples, strict=False).module(check_guards=False)
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
        elif node.target in _NORMS:
            _swap(traced, node, _NORMS[node.target](traced, *node.args))
    graph.lint()
    traced.recompile()
    return traced


def without_detours(graph: fx.Graph) -> fx.Graph:
    """Takes out what leads from four axes to three and back: sequences stay images of width 1, as XNNPACK has them.

    Args:
        graph: Of `torch.export`, with the values of its nodes; changed.

    Returns:
        The same.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node.op != "call_function":
            continue
        if node.target in _ALONE and _is_flattened(source):
            with graph.inserting_before(node):
                ahead = graph.call_function(node.target, (source.args[0], *node.args[1:]), node.kwargs)
                behind = graph.call_function(aten.view.default, (ahead, list(node.meta["val"].shape)))
            ahead.meta, behind.meta = {**node.meta, "val": node.meta["val"].unsqueeze(3)}, node.meta
            node.replace_all_uses_with(behind)
        elif _is_lifted(node) and _is_flattened(source):
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()
    return graph


def _is_lifted(node: fx.Node) -> bool:
    """Whether it only adds an axis of length 1 behind three."""
    if node.target not in (aten.view.default, aten.unsqueeze.default):
        return False
    source, made = node.args[0], node.meta["val"].shape
    return isinstance(source, fx.Node) and len(made) == 4 and (*source.meta["val"].shape, 1) == tuple(made)


def _is_flattened(node: fx.Node) -> bool:
    """Whether it only takes an axis of length 1 away behind three."""
    if node.target is not aten.view.default:
        return False
    source, made = node.args[0], node.meta["val"].shape
    return isinstance(source, fx.Node) and len(made) == 3 and tuple(source.meta["val"].shape) == (*made, 1)


def is_spelled(node: fx.Node) -> bool:
    """Whether a node of an exported graph is part of a norm, which stays float32 in every form.

    Example:
        >>> is_spelled(fx.Graph().placeholder("input"))
        False
    """
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in (SpelledGroupNorm, SpelledLayerNorm)}
    stack = node.meta.get("nn_module_stack", {}).values()
    return any(
        (kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}") in kinds for _, kind in stack
    )


def _swap(traced: fx.GraphModule, node: fx.Node, module: nn.Module | None) -> None:
    if module is None:
        return
    name = f"spelled_{node.name}"
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        node.replace_all_uses_with(traced.graph.call_module(name, (node.args[0],)))
    traced.graph.erase_node(node)


def _value(traced: fx.GraphModule, node: Any) -> Tensor | None:
    """The constant that a node gets; None for what is computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    found = getattr(traced.get_submodule(path), name)
    return found if isinstance(found, Tensor) else None


def _affine(traced: fx.GraphModule, weight: Any, bias: Any, width: int) -> tuple[Tensor, Tensor] | None:
    scale = torch.ones(width) if weight is None else _value(traced, weight)
    shift = torch.zeros(width) if bias is None else _value(traced, bias)
    return None if scale is None or shift is None else (scale, shift)


def _group_norm(
    traced: fx.GraphModule,
    values: fx.Node,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> nn.Module | None:
    shape = values.meta["val"].shape
    affine = _affine(traced, weight, bias, shape[1])
    return SpelledGroupNorm(groups, *affine, eps) if affine and len(shape) in (3, 4) else None


def _layer_norm(
    traced: fx.GraphModule,
    values: fx.Node,
    over: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> nn.Module | None:
    affine = _affine(traced, weight, bias, over[-1])
    return SpelledLayerNorm(*affine, eps) if affine and len(over) == 1 and values.meta["val"].dim() > 1 else None


def _mean(values: Tensor, over: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """XNNPACK averages the last two of four axes, and keeps them."""
    axes = sorted(axis % values.dim() for axis in over or range(values.dim()))
    plain: Tensor = aten.mean.dim(values, over, keepdim, dtype=dtype)
    if dtype is not None or (values.dim(), axes) not in ((4, [2, 3]), (3, [2])):
        return plain
    image = values if values.dim() == 4 else values.unsqueeze(3)
    return image.mean((2, 3), keepdim=True).view(plain.shape)


def _pad(values: Tensor, sides: Sequence[int], mode: str = "constant", fill: float | None = None) -> Tensor:
    """Zeros as a concatenation: a convolution that is quantised at run time does not follow XNNPACK's own padding."""
    if mode != "constant" or fill or any(side < 0 for side in sides):
        left: Tensor = aten.pad.default(values, sides, mode, fill)
        return left
    for place, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        axis = values.dim() - 1 - place
        shapes = [
            [wide if number == axis else size for number, size in enumerate(values.shape)] for wide in (before, after)
        ]
        first, last = ([values.new_zeros(shape)] if shape[axis] else [] for shape in shapes)
        values = torch.cat([*first, values, *last], axis) if first or last else values
    return values


def _conv1d(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Of images of width 1."""
    sides = (*stride, 1), (*padding, 0), (*dilation, 1)
    image = F.conv2d(values.unsqueeze(3), weight.unsqueeze(3), bias, *sides, groups)
    return image.view(image.shape[:3])


def _conv_same(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: str = "valid",
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """A convolution whose padding is a word, with numbers: only those are quantised."""
    axes = values.dim() - 2
    each = list(dilation) * axes if len(dilation) == 1 else list(dilation)
    missing = [far * (side - 1) for far, side in zip(each, weight.shape[2:], strict=True)]
    if padding == "same":
        sides = [side for total in reversed(missing) for side in (total // 2, total - total // 2)]
        values = _pad(values, sides) if any(sides) else values
    if axes == 1:
        return _conv1d(values, weight, bias, stride, (0,), dilation, groups)
    return F.conv2d(values, weight, bias, tuple(stride), 0, tuple(dilation), groups)


def _select(values: Tensor, axis: int, index: int) -> Tensor:
    """As a slice, which XNNPACK takes. A split is left: as slices, gates of an int8 LSTM came out wrong."""
    shape = [size for place, size in enumerate(values.shape) if place != axis % values.dim()]
    return values.narrow(axis, index % values.shape[axis], 1).reshape(shape)


def _unbind(values: Tensor, axis: int = 0) -> list[Tensor]:
    return [_select(values, axis, index) for index in range(values.shape[axis])]


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        aten.mean.dim: _mean,
        aten.unbind.int: _unbind,
        aten.conv1d.default: _conv1d,
        aten.conv1d.padding: _conv_same,
        aten.conv2d.padding: _conv_same,
        aten.pad.default: _pad,
        aten.select.int: _select,
    }
)
# What changes each value by itself.
_ALONE = (
    aten.relu.default,
    aten.relu6.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
)
_NORMS: Mapping[Any, Callable[..., nn.Module | None]] = MappingProxyType(
    {aten.group_norm.default: _group_norm, aten.layer_norm.default: _layer_norm}
)
