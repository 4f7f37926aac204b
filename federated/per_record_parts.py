"""What one layer adds to a clipped sum: every record's gradient norm, and the sum of gradients times clip factors.

Either each record's gradient is made and kept, or, where a weight is large and its positions are few, only its norm (a
"ghost norm") is made, and then the weighted sum directly. Goodfellow 2015 (arXiv 1510.01799) for one position; Li et
al. 2021 (arXiv 2110.05679) for sequences; Bu et al. 2022 (arXiv 2210.00038) for choosing between the two by shape.

A norm that came out too small would clip too little. So it is taken from above: `norm_from_above` adds what float32 may
have lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Part", "from_factors", "from_gradients", "ghost_is_cheaper", "masked", "norm_from_above", "with_doubles"]

Tensor = torch.Tensor
Add = Callable[[Tensor, Tensor, Tensor | None], None]
# From (all records, ...) to (groups, records of each, ...).
Apart = Callable[[Tensor], Tensor]
Sum = Callable[[Apart, Tensor, Tensor | None], Tensor]

# Half a unit in the last place of float32, and the root of the least square that float32 does not round to nothing.
_ROUNDING, _LOST = 2.0**-24, 2.0**-63
# The squares of more numbers than this are added up in float64.
_LONGEST_SUM = 4096
# Where squares overflow float32. With larger inputs of a layer, clip factor times output gradient might be denormal,
# too coarse for the clip's slack. So a larger norm counts as not finite also where squares are taken in float64.
_LARGEST_NORM = 2.0**64


@dataclass(frozen=True, kw_only=True)
class Part:
    """A layer's part in the sum over records.

    Attributes:
        norms: the squares of these add up to the squared norm of what `add` adds for each record at factor 1, over the
            layer's trainable parameters: (records, any), float32 each, and not finite where a record is not usable.
        additions: of squares, at most, behind each of `norms`; each may have rounded it down.
        add: adds the sum of gradients times factors, (records,), to places, each a trainable parameter's elements in a
            row. With a mask of the usable records, (records,), the others enter as zeros: 0·NaN is NaN.
        sums: the same sums for groups of as many records, each by itself: from what takes groups apart, factors and
            mask to (groups, elements) per trainable parameter; None where there is no short way.
    """

    norms: Sequence[Tensor]
    additions: int
    add: Callable[[Sequence[Tensor], Tensor, Tensor | None], None]
    sums: Callable[[Apart, Tensor, Tensor | None], list[Tensor]] | None = None


def norm_from_above(parts: Sequence[Part], *, records: int, parameters: int) -> Tensor:
    """Of each record over all layers, (records,), float64, never less than the true one.

    A float32 sum of n squares is, in any order, at most n + 2 roundings too small, and its root half as many; a product
    of two norms adds theirs, and converting rounds once more. Squares below 2⁻¹²⁶ may be lost.

    Args:
        parts: of all layers.
        records: of the batch.
        parameters: trainable ones altogether.

    >>> part = from_gradients([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [1.0]])])
    >>> norms = norm_from_above([part], records=2, parameters=2)
    >>> norms.round(decimals=5).tolist(), bool((norms >= torch.tensor([5.0, 1.0])).all())
    ([5.0, 1.0], True)
    """
    found = [norm for part in parts for norm in part.norms]
    norms = torch.cat(found, dim=1).cpu() if found else torch.zeros(records, 1)  # a few numbers a record
    roundings = max((part.additions for part in parts), default=0) / 2 + 8
    total: Tensor = torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64)
    return total * (1.0 + roundings * _ROUNDING) + math.sqrt(parameters) * _LOST


def masked(values: Tensor, usable: Tensor | None) -> Tensor:
    """Values with zeros for the records that are not usable; None for all usable.

    >>> masked(torch.tensor([[1.0], [float("nan")]]), torch.tensor([True, False])).tolist()
    [[1.0], [0.0]]
    """
    if usable is None:
        return values
    return values.masked_fill(~usable.view(-1, *[1] * (values.dim() - 1)), 0.0)


def _norms(values: Tensor) -> Tensor:
    """Over the last dimension, float32."""
    if values.shape[-1] <= _LONGEST_SUM:
        norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return norms
    sums = torch.linalg.vector_norm(with_doubles(values), dim=-1, dtype=torch.float64)
    return torch.where(sums < _LARGEST_NORM, sums, math.nan).float().to(values.device)


def with_doubles(values: Tensor) -> Tensor:
    """The same where there is float64, which Apple's graphics processors have not."""
    return values.cpu() if values.device.type == "mps" else values


def from_gradients(gradients: Sequence[Tensor]) -> Part:
    """From each record's own gradient.

    Args:
        gradients: per trainable parameter (records, ...), in the order of the parameter's elements.
    """

    def add(places: Sequence[Tensor], factors: Tensor, usable: Tensor | None) -> None:
        for place, gradient in zip(places, gradients, strict=True):
            place.addmv_(masked(gradient, usable).flatten(1).mT, factors)

    def sums(apart: Apart, factors: Tensor, usable: Tensor | None) -> list[Tensor]:
        weights = apart(factors).contiguous()[:, None]
        rows = [masked(gradient, usable).flatten(1) for gradient in gradients]
        return [(weights @ apart(row))[:, 0] for row in rows]

    norms = [_norms(gradient).view(len(gradient), -1) for gradient in gradients]
    return Part(norms=norms, additions=_additions(*gradients), add=add, sums=sums)


def _additions(*values: Tensor) -> int:
    return max((min(value.shape[-1], _LONGEST_SUM) for value in values), default=0)


def from_factors(
    inputs: Tensor, gradient: Tensor, of_bias: Sequence[Tensor], add_weight: Add, sum_weight: Sum | None = None
) -> Part:
    """From a weight whose gradient is Σ_t g_t a_tᵀ, of which only the norm is made.

    Args:
        inputs: a, (records, positions, in).
        gradient: g, (records, positions, out).
        of_bias: the bias' gradients, (records, out), or nothing.
        add_weight: adds the weight's sum of gradients times factors to the weight's place.
        sum_weight: the same sum of each group of records, (groups, elements); None where there is no short way.
    """
    rest = from_gradients(of_bias)
    of_rest, sums = rest.sums, None
    if sum_weight is not None and of_rest is not None:

        def sums(apart: Apart, factors: Tensor, usable: Tensor | None) -> list[Tensor]:
            return [sum_weight(apart, factors, usable), *of_rest(apart, factors, usable)]

    def add(places: Sequence[Tensor], factors: Tensor, usable: Tensor | None) -> None:
        add_weight(places[0], factors, usable)
        rest.add(places[1:], factors, usable)

    if inputs.shape[1] > 1:
        norms = [_gram_norms(inputs, gradient), *rest.norms]
        return Part(norms=norms, additions=rest.additions, add=add, sums=sums)
    lost = [math.sqrt(values.shape[2]) * _LOST for values in (inputs, gradient)]
    product = (_norms(inputs) + lost[0]) * (_norms(gradient) + lost[1])  # (records, 1)
    additions = _additions(inputs) + _additions(gradient)
    return Part(norms=[product, *rest.norms], additions=additions, add=add, sums=sums)


def ghost_is_cheaper(positions: int, width_in: int, width_out: int) -> bool:
    """Whether Gram matrices in float64 cost less than making each record's gradient: fitted to measurements.

    >>> ghost_is_cheaper(1, 784, 512), ghost_is_cheaper(64, 128, 128), ghost_is_cheaper(16, 768, 768)
    (True, False, True)
    """
    return positions == 1 or (width_in + width_out) * positions * (positions + 16) < 10 * width_in * width_out


def _gram_norms(inputs: Tensor, gradient: Tensor) -> Tensor:
    """‖Σ_t g_t a_tᵀ‖ from above, (records, 1).

    Its square is Σ_ts (a_t·a_s)(g_t·g_s), which may cancel. So it is taken in float64, and what rounding may add to the
    float32 sum over positions itself, at most (positions + 2)·2⁻²⁴·Σ_t ‖a_t‖‖g_t‖, is added.
    """
    device = inputs.device
    inputs, gradient = with_doubles(inputs).double(), with_doubles(gradient).double()
    of_inputs, of_gradient = inputs @ inputs.mT, gradient @ gradient.mT  # (records, positions, positions)
    squares = torch.diagonal(of_inputs, dim1=1, dim2=2)
    unsigned = (squares * torch.diagonal(of_gradient, dim1=1, dim2=2)).sqrt_().sum(1)
    norms = (of_inputs * of_gradient).sum((1, 2)).clamp_(min=0.0).sqrt_()
    norms += (inputs.shape[1] + 2) * _ROUNDING * unsigned
    return torch.where(squares.amax(1) < _LARGEST_NORM**2, norms, math.nan).float()[:, None].to(device)
