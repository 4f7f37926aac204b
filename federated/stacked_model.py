"""One model with weights of its own for each of many clients, calculated at once.

The model's own code runs with all clients' records one after another in its first dimension; only layers that have
parameters are replaced, by batched products in which each client's records meet its own weights. Whatever a record's
own gradient norm needs is taken as in `per_record`: what went into a layer and the gradient at what came out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from tacit.federated.clipping import clip_factors
from tacit.federated.per_record import Call, uses_of
from tacit.federated.per_record_layers import KINDS
from tacit.federated.per_record_parts import Part, masked, norm_from_above

__all__ = ["StackedModel", "unstackable_layers"]

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor], Tensor]
# What came out, and what the layer's gradient needs (as `Kind.call` has it).
Out = tuple[Tensor, tuple[Tensor, ...]]


class StackedModel:
    """A model of which every client has its own weights.

    *Guarantees*: a client's gradient depends on its own records and weights alone; with a norm, each of its records
    moves it by at most that (up to float32 summing), and one whose gradient is not finite by nothing.

    Weights are rows of one matrix (clients, parameters): the trainable parameters one after another.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Prepares a model.

        Args:
            model: of layers that are known here; its own weights are not used.
            loss: from outputs and targets to a sum over records, in which each has a term of its own.

        Raises:
            ValueError: layers that are not known here.
        """
        unknown = unstackable_layers(model)
        if unknown:
            raise ValueError(f"expected layers of kinds that can be stacked, got {', '.join(unknown)}")
        self._model, self._loss = model, loss
        self._layers = {layer: own for layer in model.modules() if (own := _own(layer))}
        self._shapes = [p.shape for p in model.parameters() if p.requires_grad]
        self.size = sum(shape.numel() for shape in self._shapes)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows as views, per trainable parameter (clients, *shape)."""
        pieces = torch.split(rows, [shape.numel() for shape in self._shapes], dim=1)
        return [piece.view(len(rows), *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def record_bytes(self, inputs: Tensor) -> int:
        """What a record leaves between forward and backward pass, about.

        Args:
            inputs: of one record, (1, *shape).
        """
        zeros = torch.zeros(1, self.size)
        with self._stacked(zeros) as (_, calls), torch.enable_grad():
            self._model(inputs)
        return 4 * sum(call.elements for call in calls)

    def weighted_sum(self, weights: Tensor, inputs: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        """Each client's sum of its records' gradients times factors, (clients, parameters).

        Args:
            weights: (clients, parameters).
            inputs: (clients, records, *shape), padded with anything finite.
            targets: (clients, records, ...).
            factors: (clients, records); 0 for what only pads.
        """
        with self._stacked(weights) as (leaves, _), torch.enable_grad():
            out = self._model(inputs.flatten(0, 1))
            gradient = self._at_output(out, targets)
        return self._summed(out, leaves, gradient * _spread(factors.flatten(), gradient))

    def clipped_sum(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, there: Tensor, max_grad_norm: float
    ) -> Tensor:
        """Each client's sum of its records' clipped gradients, (clients, parameters).

        Args:
            weights: (clients, parameters).
            inputs: (clients, records, *shape), padded with anything finite.
            targets: (clients, records, ...).
            there: (clients, records); False for what only pads.
            max_grad_norm: C.
        """
        present, records = there.flatten(), inputs.shape[0] * inputs.shape[1]
        with self._stacked(weights) as (leaves, calls), torch.enable_grad():
            out = self._model(inputs.flatten(0, 1))
            gradient = self._at_output(out, targets)
            end = _with(out, gradient)
        uses = uses_of(calls, end, records=records, keep_graph=True)
        with torch.no_grad():
            parts = [KINDS[type(layer)].part(layer, its_uses) for layer, its_uses in uses.items()]
            norms = norm_from_above(parts, records=records, parameters=self.size)
            factors, usable = clip_factors(norms, max_grad_norm)
        mask = None if bool(usable.all()) else usable
        sums = self._direct(dict(zip(uses, parts, strict=True)), len(weights), factors * present, mask)
        if sums is not None:
            return sums
        if not bool((usable | ~present).all()):
            # A record that is not finite would make a NaN of everybody's sum: it goes, and the others are as they were.
            clean = masked(inputs.flatten(0, 1), usable).view_as(inputs)
            return self.clipped_sum(weights, clean, targets, there & usable.view_as(there), max_grad_norm)
        return self._summed(out, leaves, gradient * _spread(factors * present, gradient))

    def _direct(
        self, parts: Mapping[nn.Module, Part], clients: int, factors: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """The clipped sums from what the norms were made of; None where a layer needs another backward pass."""
        by_parameter: dict[nn.Parameter, Tensor] = {}
        for layer, own in self._layers.items():
            part = parts.get(layer)
            if part is None or part.sums is None:
                return None
            by_parameter |= dict(zip(own, part.sums(clients, factors, mask), strict=True))
        return torch.cat([by_parameter[p] for p in self._model.parameters() if p.requires_grad], dim=1)

    def _at_output(self, out: Tensor, targets: Tensor) -> Tensor:
        """The gradient of each record's loss at its own output."""
        (gradient,) = torch.autograd.grad(self._loss(out, targets.flatten(0, 1)), out, retain_graph=True)
        return gradient

    def _summed(self, out: Tensor, leaves: list[Tensor], gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            end = _with(out, gradient)
        gradients = torch.autograd.grad(end, leaves, materialize_grads=True)
        return torch.cat([g.flatten(1) if g.dim() > 1 else g[:, None] for g in gradients], dim=1)

    @contextmanager
    def _stacked(self, weights: Tensor) -> Iterator[tuple[list[Tensor], list[Call]]]:
        """While it lasts, layers use the clients' weights and every call is noted."""
        leaves = [piece.detach().requires_grad_() for piece in self.split(weights)]
        of = dict(zip((p for p in self._model.parameters() if p.requires_grad), leaves, strict=True))
        calls: list[Call] = []
        try:
            for layer in self._layers:
                own = {name: of.get(p, p) for name, p in layer.named_parameters(recurse=False)}
                vars(layer)["forward"] = partial(_noted, calls, layer, own, len(weights))
            yield leaves, calls
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def _with(out: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient at the outputs is the given one; to give it to torch would import SymPy, for 0.4 s."""
    return (out * gradient.detach()).sum()


def _noted(calls: list[Call], layer: nn.Module, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Tensor:
    out, kept = _CALLS[type(layer)](layer, own, clients, inputs)
    edge = get_gradient_edge(out)
    calls.append(Call(layer, inputs.detach(), inputs._version, edge, kept, inputs.numel() + 2 * out.numel()))
    return out


def unstackable_layers(model: nn.Module) -> list[str]:
    """Names of layers with trainable parameters that have no stacked form here.

    >>> unstackable_layers(nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4)))
    ['1']
    """
    seen: set[nn.Parameter] = set()
    names = []
    for name, layer in model.named_modules():
        own = _own(layer)
        kind = KINDS.get(type(layer))
        whole = type(layer) in _CALLS and kind is not None and kind.suits(layer) and not seen & set(own)
        whole = whole and not (isinstance(layer, nn.Embedding) and layer.padding_idx is not None)
        if own and not (whole and len(own) == sum(1 for _ in layer.parameters(recurse=False))):
            names.append(name or "model")
        seen |= set(own)
    return names


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]


def _spread(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _linear(layer: nn.Linear, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Out:
    rows, weight = inputs.reshape(clients, -1, layer.in_features), own["weight"].mT
    out = rows @ weight if layer.bias is None else torch.baddbmm(own["bias"][:, None], rows, weight)
    return out.view(*inputs.shape[:-1], layer.out_features), ()


def _convolution(layer: Any, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Out:
    """Each client's channels are groups of their own: a record becomes one of the n-th records of all clients."""
    records = len(inputs) // clients
    inputs = inputs.contiguous()
    if layer.padding_mode != "zeros":
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    rows = (
        inputs.reshape(clients, records, *inputs.shape[1:]).transpose(0, 1).flatten(1, 2)
    )  # (records, clients·channels, ...)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    bias = None if layer.bias is None else own["bias"].flatten()
    out = convolve(
        rows, own["weight"].flatten(0, 1), bias, layer.stride, padding, layer.dilation, clients * layer.groups
    )
    return out.reshape(records, clients, layer.out_channels, *out.shape[2:]).transpose(0, 1).flatten(0, 1), ()


def _group_norm(layer: nn.GroupNorm, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Out:
    inputs = inputs.contiguous()
    sizes = (len(inputs), inputs.shape[1], math.prod(inputs.shape[2:]))
    plain, *kept = torch.native_group_norm(inputs, None, None, *sizes, layer.num_groups, layer.eps)
    return _scaled(plain, own, clients, dims=inputs.dim() - 2), tuple(kept)


def _layer_norm(layer: nn.LayerNorm, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Out:
    plain, *kept = torch.native_layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    between = inputs.dim() - 1 - len(layer.normalized_shape)
    return _scaled(plain, own, clients, dims=0, between=between), tuple(kept)


def _scaled(plain: Tensor, own: Mapping[str, Tensor], clients: int, *, dims: int, between: int = 0) -> Tensor:
    """Times weight plus bias, each client's own."""
    rows = plain.reshape(clients, -1, *plain.shape[1:])

    def spread(values: Tensor) -> Tensor:
        shape = (clients, *[1] * (1 + between), *values.shape[1:], *[1] * dims)
        return values.reshape(shape)

    if "weight" not in own:
        return plain
    out = rows * spread(own["weight"])
    return (out + spread(own["bias"]) if "bias" in own else out).flatten(0, 1)


def _embedding(layer: nn.Embedding, own: Mapping[str, Tensor], clients: int, inputs: Tensor) -> Out:
    tokens = len(layer.weight)
    rows = inputs.reshape(clients, -1, *inputs.shape[1:])
    places = rows + tokens * torch.arange(clients).view(-1, *[1] * (rows.dim() - 1))
    return F.embedding(places.flatten(0, 1), own["weight"].flatten(0, 1)), ()


_CALLS: Mapping[type[nn.Module], Callable[[Any, Mapping[str, Tensor], int, Tensor], Out]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
