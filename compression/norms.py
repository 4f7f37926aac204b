"""GroupNorm in the spellings that ONNX Runtime can be given, and the one that it runs fastest."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Spelling", "respell_norms"]

Spelling = Literal["exporter", "layer", "instance", "batch"]


class _Grouped(nn.Module):
    """One GroupNorm; its groups are normalised as channels, or rows, of their own before each channel is scaled."""

    zeros: torch.Tensor
    ones: torch.Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.num_channels, self.eps, self.affine = (
            norm.num_groups, norm.num_channels, norm.eps, norm.affine,
        )  # fmt: skip
        self.weight, self.bias = norm.weight, norm.bias
        like = norm.weight if norm.affine else torch.empty(norm.num_channels)
        self.register_buffer("zeros", torch.zeros_like(like))
        self.register_buffer("ones", torch.ones_like(like))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        grouped = inputs.reshape(inputs.shape[0], self.num_groups, -1)  # (records, groups, values of a group)
        # -1 for the records: their number may be free, and any other size asked for at run time costs a node.
        normed = self._normalise(grouped).reshape(-1, *inputs.shape[1:])
        return self._scale(normed) if self.affine else normed

    def _normalise(self, grouped: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(grouped, eps=self.eps)

    def _scale(self, normed: torch.Tensor) -> torch.Tensor:
        channels = (-1, *[1] * (normed.dim() - 2))
        scaled = normed * self.weight.view(channels)
        return scaled if self.bias is None else scaled + self.bias.view(channels)


class _Batch(_Grouped):
    def _scale(self, normed: torch.Tensor) -> torch.Tensor:
        # Of mean 0 and variance 1, which leaves a product and a sum: one node and one pass where those are two.
        bias = self.zeros if self.bias is None else self.bias
        return F.batch_norm(normed, self.zeros, self.ones, self.weight, bias, eps=0.0)


class _Layer(_Grouped):
    def _normalise(self, grouped: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(grouped, grouped.shape[2:], eps=self.eps)


_SPELLINGS: Mapping[str, type[_Grouped]] = MappingProxyType({"layer": _Layer, "instance": _Grouped, "batch": _Batch})


def respell_norms(model: nn.Module, spelling: Spelling = "batch") -> nn.Module:
    """A copy of a model with its `nn.GroupNorm` layers spelled otherwise: the same mathematics, other operators.

    *Guarantees*: each spelling is exact but for rounding. GroupNorm by `torch.nn.functional`, and subclasses of
    `nn.GroupNorm`, stay as the exporter lowers them: right, and slower.

    Args:
        model: In evaluation mode; left as it is.
        spelling: "exporter" changes nothing. "instance": InstanceNormalization over the groups as channels, then a
            product and a sum. "batch": the same, but a BatchNormalization of mean 0 and variance 1 for product and
            sum. "layer": LayerNormalization over each group, which takes as many ones as a group has values.

    Returns:
        The copy.

    Raises:
        ValueError: No such spelling.

    Example:
        >>> model, inputs = nn.Sequential(nn.GroupNorm(2, 4)), torch.randn(3, 4, 5, 5)
        >>> bool(torch.allclose(respell_norms(model)(inputs), model(inputs), atol=1e-5))
        True
    """
    if spelling not in get_args(Spelling):
        raise ValueError(
            f"expected spelling to be one of {', '.join(get_args(Spelling))}, got spelling={spelling!r}; choose one"
        )
    copied = copy.deepcopy(model)
    if spelling == "exporter":
        return copied
    kind = _SPELLINGS[spelling]
    if _is_plain(copied):
        return kind(copied).eval()  # type: ignore[arg-type]  # it is a GroupNorm
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child):
                setattr(parent, name, kind(child).eval())  # type: ignore[arg-type]  # as above
    return copied


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.GroupNorm and not module._forward_hooks and not module._forward_pre_hooks
