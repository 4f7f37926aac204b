"""A TFLite file as a graph: its operators, the layers they come from, and what can be left out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import ModelT

__all__ = ["Operator", "layer_paths", "operators", "read_model", "simplify", "write_model"]


@dataclass(frozen=True)
class Operator:
    """An operator of the first subgraph.

    Attributes:
        kind: Such as "CONV_2D".
        inputs: Tensors by number; -1 for one that is left out.
        outputs: Tensors by number.
        name: Of its first output, by which the quantiser knows it.
        layer: Of the model, as it was exported; "" if unknown.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str
    layer: str


def read_model(path: Path) -> ModelT:
    """A TFLite file as objects."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model(path)


def write_model(model: ModelT, path: Path) -> None:
    """Objects as a TFLite file, with every buffer inside the flatbuffer."""
    from ai_edge_litert.tools import flatbuffer_utils

    flatbuffer_utils.write_model(model, path)


def operators(model: ModelT) -> list[Operator]:
    """The operators of the first subgraph, in the order in which they run."""
    from ai_edge_litert.tools import flatbuffer_utils

    graph, found = model.subgraphs[0], []
    for operator in graph.operators:
        name = bytes(graph.tensors[operator.outputs[0]].name).decode()
        kind = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
        inputs, outputs = (tuple(int(number) for number in side) for side in (operator.inputs, operator.outputs))
        found.append(Operator(kind, inputs, outputs, name, name.partition(":")[2]))
    return found


def layer_paths(model: nn.Module) -> dict[str, str]:
    """How the converter spells each layer of a model -> its own name.

    >>> layer_paths(nn.Sequential(nn.ReLU()))
    {'torch.nn.modules.container.Sequential/torch.nn.modules.activation.ReLU_0': '0'}
    """
    paths = {"": _spelled(model)}
    for name, module in model.named_modules():
        if name:
            parent, _, own = name.rpartition(".")
            paths[name] = f"{paths[parent]}/{_spelled(module)}_{own}"
    return {path: name for name, path in paths.items() if name}


def _spelled(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def simplify(model: ModelT) -> None:
    """Leave out transpositions that undo each other, which the converter writes around layers it knows nothing of."""
    graph = model.subgraphs[0]
    makers = {number: operator for operator in graph.operators for number in operator.outputs}
    kinds = {id(made): operator.kind for made, operator in zip(graph.operators, operators(model), strict=True)}

    def order_of(operator: Any) -> list[int] | None:
        if kinds[id(operator)] != "TRANSPOSE":
            return None
        content = model.buffers[graph.tensors[operator.inputs[1]].buffer].data
        return None if content is None else [int(axis) for axis in np.frombuffer(bytes(bytearray(content)), np.int32)]

    for second in graph.operators:
        first = makers.get(second.inputs[0]) if len(second.inputs) else None
        if first is None or second.outputs[0] in list(graph.outputs):
            continue
        orders = order_of(first), order_of(second)
        if orders[0] and orders[1] and [orders[0][axis] for axis in orders[1]] == sorted(orders[0]):
            _replace(graph, second.outputs[0], first.inputs[0])
    _drop_unused(graph, lambda operator: kinds[id(operator)] == "TRANSPOSE")
    _renumber(model)


def _replace(graph: Any, old: int, new: int) -> None:
    for operator in graph.operators:
        operator.inputs = [new if number == old else number for number in operator.inputs]


def _drop_unused(graph: Any, droppable: Callable[[Any], bool]) -> None:
    for operator in list(graph.operators)[::-1]:
        used = {number for other in graph.operators for number in other.inputs} | set(graph.outputs)
        if droppable(operator) and not used & set(operator.outputs):
            graph.operators = [other for other in graph.operators if other is not operator]


def _renumber(model: ModelT) -> None:
    """Leave out tensors that nothing uses: interpreters give them no memory, and fail where it is asked for."""
    graph = model.subgraphs[0]
    used = {int(number) for operator in graph.operators for number in (*operator.inputs, *operator.outputs)}
    used |= {int(number) for number in (*graph.inputs, *graph.outputs)}
    kept = sorted(used - {-1})
    number_of = {old: new for new, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[old] for old in kept]
    for operator in graph.operators:
        operator.inputs = [number_of[int(number)] for number in operator.inputs]
        operator.outputs = [number_of[int(number)] for number in operator.outputs]
    graph.inputs, graph.outputs = ([number_of[int(n)] for n in side] for side in (graph.inputs, graph.outputs))
    for signature in model.signatureDefs:
        for port in (*signature.inputs, *signature.outputs):
            port.tensorIndex = number_of[port.tensorIndex]
