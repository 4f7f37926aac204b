"""Weights of an ONNX file in fewer bits: float16, or whole numbers with a scale for each channel or block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tacit.compression.forms import FormRefused

__all__ = ["RECURRENT", "Stored", "shrink_weights"]

Array = npt.NDArray[np.float32]

# Smaller ones would not pay for the nodes that restore them, and are stored so only where there are no others.
_LEAST_VALUES = 64
_BLOCK = 32
# Shares of the greatest value that four bits may clip at.
_CLIPS = np.linspace(0.6, 1.0, 9, dtype=np.float32)
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


@dataclass(frozen=True)
class _Weight:
    """One to be stored: which of its axes have a scale for each index, for its operator adds up along the others."""

    tensor: TensorProto
    values: Array
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as a file holds it: `tensor`, which `nodes` turn into floats of the old name with `others`."""

    tensor: TensorProto
    others: tuple[TensorProto, ...]
    nodes: tuple[onnx.NodeProto, ...]


def shrink_weights(
    model: onnx.ModelProto, *, bits: int, operators: frozenset[str] | None = None, refuse_none: bool = True
) -> None:
    """Store the weights of a float32 model in fewer bits, in place; it computes with floats as before.

    They are restored by Cast and Mul. onnxruntime does those once, when it loads the file, where DequantizeLinear of
    weights is done anew in every call.

    Args:
        model: With its weights inside.
        bits: 16 for floats; 8 or 4 for whole numbers, symmetric, with a scale for each output channel, in 4 bits for
            each 32 of its weights where that divides them.
        operators: Whose weights; None for all.
        refuse_none: Refuse a model of which nothing is stored otherwise.

    Raises:
        FormRefused: A weight is not finite, or too great for float16; or there is none to store.

    Example:
        >>> weight = numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
        >>> node = helper.make_node("MatMul", ["x", "w"], ["y"])
        >>> model = helper.make_model(helper.make_graph([node], "graph", [], [], [weight]))
        >>> shrink_weights(model, bits=8)
        >>> [node.op_type for node in model.graph.node], model.graph.initializer[0].data_type == TensorProto.INT8
        (['Cast', 'Mul', 'MatMul'], True)
    """
    graph = model.graph
    found = list(_weights(graph, operators, wherever=bits == 16))
    if not found and refuse_none:
        raise FormRefused("expected weights to store in fewer bits, got none; ship float32")
    large = [weight for weight in found if weight.values.size >= _LEAST_VALUES]
    weights = large or found if refuse_none else large
    store = _as_float16 if bits == 16 else _as_integers(bits)
    nodes: list[onnx.NodeProto] = []
    for weight in weights:
        stored = store(weight)
        graph.initializer.remove(weight.tensor)
        graph.initializer.extend((stored.tensor, *stored.others))
        nodes += stored.nodes
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _weights(graph: onnx.GraphProto, operators: frozenset[str] | None, *, wherever: bool) -> Iterator[_Weight]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    seen: set[str] = set()
    for node in graph.node:
        if operators is not None and node.op_type not in operators:
            continue
        for place, name in enumerate(node.input):
            tensor = tensors.get(name)
            if tensor is None or name in seen or tensor.data_type != TensorProto.FLOAT:
                continue
            kept = () if wherever else _kept(node, place, len(tensor.dims))
            if kept is None or not tensor.dims:
                continue
            seen.add(name)
            values = numpy_helper.to_array(tensor)
            if not np.isfinite(values).all():
                raise FormRefused(f"expected finite weights, got NaN or infinity in {name!r}; train again")
            yield _Weight(tensor, values, kept)


def _kept(node: onnx.NodeProto, place: int, axes: int) -> tuple[int, ...] | None:
    """The axes of a weight that its operator does not add up along; None if it is no weight."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv" and place == 1:
        return (0,)
    if node.op_type == "ConvTranspose" and place == 1:
        return (1,)
    if node.op_type == "Gemm" and place == 1:
        return (0,) if flags.get("transB") else (1,)
    if node.op_type == "MatMul" and axes >= 2:
        return tuple(axis for axis in range(axes) if axis != axes - 1 - place)
    if node.op_type == "Gather" and place == 0 and axes >= 2:
        axis = flags.get("axis", 0)
        return (axis,) if axis >= 0 else None
    if node.op_type in RECURRENT and place in (1, 2):
        return (0, 1)
    return None


def _as_float16(weight: _Weight) -> Stored:
    name = weight.tensor.name
    if np.abs(weight.values).max() > np.finfo(np.float16).max:
        raise FormRefused(f"expected weights within float16, got {np.abs(weight.values).max():g} in {name!r}; use int8")
    tensor = numpy_helper.from_array(weight.values.astype(np.float16), f"{name}.f16")
    cast = helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT)
    return Stored(tensor=tensor, others=(), nodes=(cast,))


def _as_integers(bits: int) -> Callable[[_Weight], Stored]:
    greatest = 2 ** (bits - 1) - 1

    def store(weight: _Weight) -> Stored:
        name, view = weight.tensor.name, weight.values
        summed = tuple(axis for axis in range(view.ndim) if axis not in weight.kept)
        if bits == 4:
            view, summed = _blocks(weight, summed)
        scale = _scales(view, summed, greatest)
        whole = np.clip(np.rint(view / scale), -greatest, greatest).astype(np.int8)
        tensor = (
            helper.make_tensor(f"{name}.i4", TensorProto.INT4, whole.shape, _pairs(whole), raw=True)
            if bits == 4
            else numpy_helper.from_array(whole, f"{name}.i8")
        )
        others = [numpy_helper.from_array(scale, f"{name}.scale")]
        restored = name if view.shape == weight.values.shape else f"{name}.blocks"
        nodes = [
            helper.make_node("Cast", [tensor.name], [f"{name}.whole"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.whole", others[0].name], [restored]),
        ]
        if restored != name:
            others.append(numpy_helper.from_array(np.array(weight.values.shape), f"{name}.shape"))
            nodes.append(helper.make_node("Reshape", [restored, others[1].name], [name]))
        return Stored(tensor=tensor, others=tuple(others), nodes=tuple(nodes))

    return store


def _pairs(whole: npt.NDArray[np.int8]) -> bytes:
    """Two numbers of four bits a byte, the first one low."""
    flat = whole.ravel().view(np.uint8) & 0xF
    padded = np.pad(flat, (0, flat.size % 2))
    return bytes((padded[0::2] | padded[1::2] << 4).astype(np.uint8).tobytes())


def _blocks(weight: _Weight, summed: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """The values with each run of 32 that is added up as an axis of its own, and the axes to scale over."""
    values, shape = weight.values, weight.values.shape
    first, count = min(summed), math.prod(shape[axis] for axis in summed)
    if summed != tuple(range(first, first + len(summed))) or count % _BLOCK or count == _BLOCK:
        return values, summed
    after = shape[first + len(summed) :]
    return values.reshape(*shape[:first], count // _BLOCK, _BLOCK, *after), (first + 1,)


def _scales(view: Array, summed: tuple[int, ...], greatest: int) -> Array:
    """A scale for each channel or block; of four bits the one that leaves the least squared error."""
    widest = np.abs(view).max(axis=summed, keepdims=True)
    full = np.where(widest > 0, widest, 1.0).astype(np.float32) / np.float32(greatest)
    if greatest > 7:
        return full
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for clip in _CLIPS:
        scale = full * clip
        rounded = np.clip(np.rint(view / scale), -greatest, greatest) * scale
        error = np.square(rounded - view).sum(axis=summed, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best
