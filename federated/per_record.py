"""The sum of a batch's clipped per-record gradients, from one forward and one backward pass ("book-keeping").

Opacus' hooks make every record's gradient of every parameter; its ghost clipping goes backward through the model twice.
Here the backward pass ends at the layers' outputs. Each layer's part in the norms and in the clipped sum follows from
what went in and the gradient at what came out, so that a step costs little more than one of plain SGD. Bu et al. 2022,
"Differentially Private Optimization on Large Model at Small Cost" (arXiv 2210.00038), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tacit.federated.clipping import clip_factors
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.per_record_layers import KINDS, Use
from tacit.federated.per_record_parts import norm_from_above

__all__ = ["Call", "PerRecordSum", "RecordsUnclear", "unsupported_layers", "uses_of"]

Tensor = torch.Tensor
Layer = torch.nn.Module
Loss = Callable[[Tensor, Tensor], Tensor]

# What a piece of a batch should leave between forward and backward pass: about what a processor's cache holds. Larger
# pieces are slower, because memory that was given back to the system has to be cleared by it when it is needed again.
_PIECE_BYTES = 2**25
_SMALLEST_PIECE = 16


class RecordsUnclear(PrivacyRefused):
    """What a layer did cannot be told apart by record."""


def unsupported_layers(model: Layer) -> list[str]:
    """Names of layers with trainable parameters whose part in a clipped sum is not known here.

    >>> unsupported_layers(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LSTM(3, 4)))
    ['1']
    """
    owners: dict[torch.nn.Parameter, int] = {}
    for layer in model.modules():
        for parameter in vars(layer)["_parameters"].values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    return [
        name or "model"
        for name, layer in model.named_modules()
        if (own := _trainable(layer)) and not (_is_known(layer) and all(owners[p] == 1 for p in own))
    ]


def _trainable(layer: Layer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]


def _is_known(layer: Layer) -> bool:
    kind = KINDS.get(type(layer))
    return kind is not None and kind.suits(layer) and all(p.dtype == torch.float32 for p in _trainable(layer))


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass, before its gradient is known.

    Attributes:
        layer: that was called.
        inputs: what went in, detached.
        version: of the inputs' memory, to notice a change in place.
        out: where the gradient of what came out is found.
        kept: what the layer's gradient needs besides.
        elements: that are held, to choose how many records are taken at once.
    """

    layer: Layer
    inputs: Tensor
    version: int
    out: GradientEdge
    kept: tuple[Tensor, ...]
    elements: int


class PerRecordSum:
    """Σ over records of gradient · min(1, C/‖gradient‖), the norm over all trainable parameters together.

    *Guarantees*: adding or removing one record, of any values, moves the sum by at most C in L2 (up to float32 summing
    over records). A record whose gradient, or anything that it is made from, is not finite contributes nothing. Nothing
    of a batch outlives a call, also one that raised.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> add = PerRecordSum(model, lambda outputs, labels: outputs.sum())
    >>> records = torch.tensor([[3.0, 4.0], [0.15, 0.2], [float("nan"), 0.0]])
    >>> add(records, torch.zeros(3), 1.0).round(decimals=4).tolist()  # of norms 5, 0.25 and none
    [0.75, 1.0]
    """

    def __init__(self, model: Layer, loss: Loss, *, chunk: int = 256) -> None:
        """Prepares a model; its trainable parameters are those of now.

        Args:
            model: of layers that are known here.
            loss: from outputs and labels to a *sum* over records, in which each has a term of its own.
            chunk: records whose gradients are held at once, at most; a larger batch is taken in pieces, never cut.

        Raises:
            ValueError: layers that are not known here.
        """
        unknown = unsupported_layers(model)
        if unknown:
            raise ValueError(f"expected layers among {', '.join(k.__name__ for k in KINDS)}, got {', '.join(unknown)}")
        self._model, self._loss, self._chunk = model, loss, chunk
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._layers = {layer: own for layer in model.modules() if (own := _trainable(layer))}
        self._pieces: dict[torch.Size, int] = {}

    def __call__(self, inputs: Tensor, labels: Tensor, max_grad_norm: float) -> Tensor:
        """The clipped sum of a batch: all trainable parameters one after another, (parameters,); zeros if it is empty.

        Args:
            inputs: (records, *shape).
            labels: (records, ...).
            max_grad_norm: C; infinite sums unclipped.

        Raises:
            RecordsUnclear: a layer's inputs or outputs are not one row for each record, or changed in place.
        """
        total = torch.zeros(sum(self._sizes))
        places = dict(zip(self._parameters, torch.split(total, self._sizes), strict=True))
        size = self._piece_size(inputs) if len(inputs) else 1
        for start in range(0, len(inputs), size):
            self._add(places, inputs[start : start + size], labels[start : start + size], max_grad_norm)
        return total

    def split(self, flat: Tensor) -> list[Tensor]:
        """What `__call__` returns, as views in the shapes of the trainable parameters."""
        pieces = torch.split(flat, self._sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._parameters, strict=True)]

    def _piece_size(self, inputs: Tensor) -> int:
        """Records taken at once: a function of shapes alone, so that equal batches are summed alike."""
        shape = inputs.shape[1:]
        if shape not in self._pieces:
            with _listening(self._layers) as calls, torch.enable_grad():
                self._model(inputs.new_zeros(1, *shape))
            record_bytes = 4 * sum(call.elements for call in calls)
            self._pieces[shape] = max(_PIECE_BYTES // max(record_bytes, 1), min(_SMALLEST_PIECE, self._chunk))
        return min(self._pieces[shape], self._chunk)

    def _add(
        self, places: dict[torch.nn.Parameter, Tensor], inputs: Tensor, labels: Tensor, max_grad_norm: float
    ) -> None:
        uses = self._uses(inputs, labels)
        with torch.no_grad():
            parts = {layer: KINDS[type(layer)].part(layer, its_uses) for layer, its_uses in uses.items()}
            norms = norm_from_above(list(parts.values()), records=len(inputs), parameters=sum(self._sizes))
            factors, usable = clip_factors(norms, max_grad_norm)
            mask = None if bool(usable.all()) else usable
            for layer, part in parts.items():
                part.add([places[parameter] for parameter in self._layers[layer]], factors, mask)

    def _uses(self, inputs: Tensor, labels: Tensor) -> dict[Layer, list[Use]]:
        """By layer, its inputs and output gradients: one forward pass, and a backward pass that ends at outputs."""
        with _listening(self._layers) as calls, torch.enable_grad():
            loss = self._loss(self._model(inputs), labels)
        if not calls:
            return {}
        return uses_of(calls, loss, records=len(inputs))


def uses_of(calls: Iterable[Call], end: Tensor, *, records: int, keep_graph: bool = False) -> dict[Layer, list[Use]]:
    """By layer, its inputs and output gradients: a backward pass that ends at the outputs of layers.

    Args:
        calls: of a forward pass.
        end: where the backward pass begins, a number.
        records: the first dimension of every input and output.
        keep_graph: whether another backward pass follows.

    Raises:
        RecordsUnclear: a layer's inputs or outputs are not one row for each record, or changed in place.
    """
    noted = list(calls)
    out = [call.out for call in noted]
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(end, out, allow_unused=True, retain_graph=keep_graph)
    uses: dict[Layer, list[Use]] = {}
    for call, found in zip(noted, gradients, strict=True):
        if found is None:
            continue
        if not len(call.inputs) == len(found) == records:
            raise RecordsUnclear("expected layers whose first dimension is the records, got another; leave it alone")
        if call.inputs._version != call.version:
            raise RecordsUnclear("expected a layer's inputs to stay as they were, got a change in place")
        uses.setdefault(call.layer, []).append(Use(inputs=call.inputs, gradient=found, kept=call.kept))
    return uses


@contextmanager
def _listening(layers: Iterable[Layer]) -> Iterator[list[Call]]:
    """While it lasts, every call of a layer is noted. Cheaper than hooks, and gone afterwards."""
    calls: list[Call] = []
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(_noted, calls, layer)
        yield calls
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _noted(calls: list[Call], layer: Layer, inputs: Tensor) -> Tensor:
    out, kept = KINDS[type(layer)].call(layer, inputs)
    if out._is_view():  # an activation in place would rewrite the history of what it is a view of
        out = torch.ops.aten._unsafe_view(out, out.shape)
    # The edge, not the tensor: an activation in place gives the tensor another node.
    edge = get_gradient_edge(out)
    # Where there are several positions, each record's gradient may be made.
    own = sum(parameter.numel() for parameter in _trainable(layer)) if inputs.dim() > 2 else 0
    elements = inputs.numel() + 2 * out.numel() + own
    calls.append(Call(layer, inputs.detach(), inputs._version, edge, kept, elements))
    return out
