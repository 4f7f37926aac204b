"""GroupNorm as LiteRT runs it fastest, with the numbers that it had."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from torch import nn

__all__ = ["respell_for_tflite"]

_MONOTONE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity)


class _GroupNorm(nn.GroupNorm):
    """GroupNorm over four axes, (n, groups, channels of a group, places): half the operators of its usual spelling.

    With a pool, the largest values are taken before they are scaled and shifted: a quarter of the work for 2x2. That
    gives the same only where every scale is positive.
    """

    def __init__(self, norm: nn.GroupNorm, pool: nn.Module | None = None) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=norm.affine)
        self.load_state_dict(norm.state_dict())
        self.pool = pool

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """From (n, channels, ...) to the same shape, or a pooled one."""
        grouped = self._grouped(inputs)
        mean = grouped.mean((2, 3), keepdim=True)
        centred = grouped - mean
        # Twice through the values: the mean of the squares less the square of the mean would cancel in float32.
        scale = torch.rsqrt((centred * centred).mean((2, 3), keepdim=True) + self.eps)
        if self.affine:
            scale = scale * self._per_channel(self.weight)
        if self.pool is None:
            return self._shifted(centred * scale).reshape(inputs.shape)
        pooled: torch.Tensor = self.pool(inputs)
        return self._shifted((self._grouped(pooled) - mean) * scale).reshape(pooled.shape)

    def _shifted(self, values: torch.Tensor) -> torch.Tensor:
        return values + self._per_channel(self.bias) if self.affine else values

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(values.shape[0], self.num_groups, values.shape[1] // self.num_groups, -1)

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(1, self.num_groups, -1, 1)


def respell_for_tflite(model: nn.Module, examples: tuple[torch.Tensor, ...]) -> nn.Module:
    """A copy of a model that answers the same, with its GroupNorm layers spelled for LiteRT.

    Where a `nn.Sequential` has a GroupNorm, an activation that never falls and a max pooling in a row, and every scale
    of the norm is positive, the pooling comes first.

    Args:
        model: Left as it is. In the copy layers keep their names.
        examples: One example of each input; the copy is tried on inputs of their shapes.

    Returns:
        The copy, in evaluation mode; spelled as it was if it would not answer the same, as where a model calls parts
        of a `nn.Sequential` by themselves.

    Example:
        >>> model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
        >>> [type(layer).__name__ for layer in respell_for_tflite(model, (torch.zeros(1, 4, 6, 6),))]
        ['_GroupNorm', 'ReLU', 'Identity']
    """
    plain = copy.deepcopy(model).eval()
    if not any(type(module) is nn.GroupNorm for module in plain.modules()):
        return plain
    respelled = copy.deepcopy(plain)
    for row in [module for module in respelled.modules() if isinstance(module, nn.Sequential)]:
        _pool_first(row)
    respelled = _respelled(respelled)
    return respelled if _alike(plain, respelled, examples) else plain


def _pool_first(row: nn.Sequential) -> None:
    layers = list(row)
    for place, (norm, activation, pool) in enumerate(zip(layers, layers[1:], layers[2:], strict=False)):
        pools = isinstance(pool, nn.MaxPool1d | nn.MaxPool2d) and not pool.return_indices
        watched = any(layer._forward_hooks for layer in (norm, activation, pool))
        if _is_plain(norm) and isinstance(activation, _MONOTONE) and pools and _rises(norm) and not watched:
            row[place], row[place + 2] = _GroupNorm(norm, pool), nn.Identity()


def _is_plain(module: nn.Module) -> TypeGuard[nn.GroupNorm]:
    """One that nobody watches: a hook would be lost with the layer."""
    return type(module) is nn.GroupNorm and not module._forward_hooks and not module._forward_pre_hooks


def _rises(norm: nn.GroupNorm) -> bool:
    return not norm.affine or bool((norm.weight > 0).all())


def _respelled(model: nn.Module) -> nn.Module:
    if _is_plain(model):
        return _GroupNorm(model)
    for name, child in list(model.named_children()):
        if not isinstance(child, _GroupNorm):
            setattr(model, name, _respelled(child))
    return model


def _alike(model: nn.Module, other: nn.Module, examples: tuple[torch.Tensor, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(e.shape, generator=generator) if e.is_floating_point() else e for e in examples]
    with torch.no_grad():
        wanted, found = model(*inputs), other(*inputs)
    if isinstance(wanted, torch.Tensor):
        wanted, found = (wanted,), (found,)
    return all(
        w.shape == f.shape and torch.allclose(w, f, rtol=1e-4, atol=1e-4) for w, f in zip(wanted, found, strict=True)
    )
