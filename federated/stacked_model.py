"""One model with weights of its own for each of many clients, calculated at once.

The model's own code runs with all clients' records one after another in its first dimension; only layers that have
parameters are replaced, by batched products in which each client's records meet its own weights. Whatever a record's
own gradient norm needs is taken as in `per_record`: what went into a layer and the gradient at what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from tacit.federated.clipping import clip_factors
from tacit.federated.per_record import Call, uses_of
from tacit.federated.per_record_layers import KINDS
from tacit.federated.per_record_parts import Part, masked, norm_from_above
from tacit.federated.stacked_layers import CALLS, Order, max_pool, trainable, unstackable_layers

__all__ = ["StackedModel"]

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor], Tensor]


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
        self._layers = {layer: own for layer in model.modules() if (own := trainable(layer))}
        self._named = {layer: dict(layer.named_parameters(recurse=False)) for layer in self._layers}
        self._order = partial(Order, mixed=Order.mixes(model))
        self._pools = [layer for layer in model.modules() if type(layer) is nn.MaxPool2d]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._shapes = [p.shape for p in self._parameters]
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
        order = self._order(len(weights))
        with self._stacked(weights) as (leaves, _), torch.enable_grad():
            out = self._model(order.joined(inputs))
            gradient = self._at_output(out, order.joined(targets))
        return self._summed(out, leaves, gradient * _spread(order.joined(factors), gradient))

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
        order, records = self._order(len(weights)), there.numel()
        present = order.joined(there)
        with self._stacked(weights) as (leaves, calls), torch.enable_grad():
            out = self._model(order.joined(inputs))
            gradient = self._at_output(out, order.joined(targets))
            end = _with(out, gradient)
        uses = uses_of(calls, end, records=records, keep_graph=True)
        with torch.no_grad():
            parts = [KINDS[type(layer)].part(layer, its_uses) for layer, its_uses in uses.items()]
            norms = norm_from_above(parts, records=records, parameters=self.size)
            factors, usable = (found.to(there.device) for found in clip_factors(norms, max_grad_norm))
        mask = None if bool(usable.all()) else usable
        sums = self._direct(dict(zip(uses, parts, strict=True)), order, factors * present, mask)
        if sums is not None:
            return sums
        if not bool((usable | ~present).all()):
            # A record that is not finite would make a NaN of everybody's sum: it goes, and the others are as they were.
            fine = order.apart(usable)
            clean = masked(inputs.flatten(0, 1), fine.flatten()).view_as(inputs)
            return self.clipped_sum(weights, clean, targets, there & fine, max_grad_norm)
        return self._summed(out, leaves, gradient * _spread(factors * present, gradient))

    def _direct(
        self, parts: Mapping[nn.Module, Part], order: Order, factors: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """The clipped sums from what the norms were made of; None where a layer needs another backward pass."""
        by_parameter: dict[nn.Parameter, Tensor] = {}
        for layer, own in self._layers.items():
            part = parts.get(layer)
            if part is None or part.sums is None:
                return None
            by_parameter |= dict(zip(own, part.sums(order.apart, factors, mask), strict=True))
        return torch.cat([by_parameter[p] for p in self._parameters], dim=1)

    def _at_output(self, out: Tensor, targets: Tensor) -> Tensor:
        """The gradient of each record's loss at its own output."""
        (gradient,) = torch.autograd.grad(self._loss(out, targets), out, retain_graph=True)
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
        of = dict(zip(self._parameters, leaves, strict=True))
        calls: list[Call] = []
        try:
            for layer in self._layers:
                own = {name: of[p] for name, p in self._named[layer].items()}
                vars(layer)["forward"] = partial(_noted, calls, layer, own, self._order(len(weights)))
            for pool in self._pools:
                vars(pool)["forward"] = partial(max_pool, pool)
            yield leaves, calls
        finally:
            for layer in (*self._layers, *self._pools):
                vars(layer).pop("forward", None)


def _with(out: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient at the outputs is the given one; to give it to torch would import SymPy, for 0.4 s."""
    return (out * gradient.detach()).sum()


def _noted(calls: list[Call], layer: nn.Module, own: Mapping[str, Tensor], order: Order, inputs: Tensor) -> Tensor:
    out, kept = CALLS[type(layer)](layer, own, order, inputs)
    if out._is_view():  # an activation in place would rewrite the history of what it is a view of, and hide the layer
        out = torch.ops.aten._unsafe_view(out, out.shape)
    edge = get_gradient_edge(out)
    calls.append(Call(layer, inputs.detach(), inputs._version, edge, kept, inputs.numel() + 2 * out.numel()))
    return out


def _spread(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
