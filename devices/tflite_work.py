"""Counts what one run of a TFLite file computes, with the standard library alone: run in the sandbox, as a script.

Multiply-accumulates (MACs) are counted for convolutions, fully connected and recurrent layers and matrix products, by
the numbers that they are made with. Of all other operators the elements that they write are counted. Nothing is run.
"""

import json
import math
import mmap
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Numbers of fields, operators and types in schema.fbs.
_CODES, _SUBGRAPHS = 1, 2
_OLD_BUILTIN, _BUILTIN = 0, 3
_TENSORS, _OPERATORS = 0, 3
_SHAPE, _TYPE = 0, 1
_OPCODE, _INPUTS, _OUTPUTS = 0, 1, 2
_CONV_2D, _DEPTHWISE, _FULL, _TRANSPOSED, _MATRIX, _CONV_3D, _LSTM = 3, 4, 9, 67, 126, 132, 44
# What they compute stands elsewhere (CALL, CUSTOM, IF, WHILE), or is more than we read (other recurrent ones, SVDF,
# CONV_3D_TRANSPOSE); from _FIRST_STABLEHLO on both are so.
_UNCOUNTED = frozenset({16, 24, 27, 31, 32, 35, 46, 52, 118, 119, 141})
_FIRST_STABLEHLO = 162
_MOVES = frozenset({22, 43, 70})  # RESHAPE, SQUEEZE, EXPAND_DIMS write nothing anew
_KINDS = {0: "float32", 1: "float32", 3: "int8", 9: "int8", 7: "int16"}
_WEIGHTS_WHOLE = frozenset({3, 9, 17, 19})  # uint8, int8, int4, int2
_MAX_AXES, _MAX_ITEMS = 16, 1 << 20

Buffer = mmap.mmap | bytes


class Tensor(NamedTuple):
    """The shape of a tensor, a free batch as one, and its type's number."""

    shape: tuple[int, ...]
    type: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def count(content: Buffer) -> dict[str, object]:
    """Count the work of the first subgraph.

    Returns:
        ``macs`` by kind of number ("float32", "int8", "int16", or "hybrid": whole weights, float activations);
        ``elements`` that the other operators write; how many ``operators`` run; ``whole``: whether each of them could
        be counted.

    Raises:
        ValueError: The structure is damaged.

    >>> count(bytes(8))
    Traceback (most recent call last):
        ...
    ValueError: expected offsets inside the file, got one outside; the file is cut off or damaged
    """
    try:
        return _count(content)
    except (struct.error, IndexError):
        raise ValueError("expected offsets inside the file, got one outside; the file is cut off or damaged") from None


def _count(content: Buffer) -> dict[str, object]:
    model = _u32(content, 0)
    codes = [_builtin(content, table) for table in _tables(content, model, _CODES)]
    graph = _tables(content, model, _SUBGRAPHS)[0]
    tensors = [_read_tensor(content, table) for table in _tables(content, graph, _TENSORS)]
    macs: dict[str, int] = {}
    elements, whole = 0, True
    operators = _tables(content, graph, _OPERATORS)
    for table in operators:
        place = _scalar(content, table, _OPCODE)
        code = codes[0 if place is None else _u32(content, place)]
        inputs = [tensors[n] if 0 <= n < len(tensors) else None for n in _numbers(content, table, _INPUTS)]
        outputs = [tensors[n] for n in _numbers(content, table, _OUTPUTS)]
        done = macs_of(code, inputs, outputs)
        if done is None:
            elements += 0 if code in _MOVES else sum(tensor.size for tensor in outputs)
            whole = whole and code not in _UNCOUNTED and code < _FIRST_STABLEHLO
        elif (kind := _kind(inputs)) is None:
            whole = False
        else:
            macs[kind] = macs.get(kind, 0) + done
    return {"macs": macs, "elements": elements, "operators": len(operators), "whole": whole}


def macs_of(code: int, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> int | None:
    """The multiply-accumulates of one operator; None of one that has none.

    Weights lie as in TFLite: convolution ``(out, height, width, in)``, depthwise ``(1, height, width, out)``, fully
    connected ``(out, in)``.

    >>> image, weights = Tensor((1, 8, 8, 3), 9), Tensor((16, 3, 3, 3), 9)
    >>> macs_of(3, [image, weights, None], [Tensor((1, 6, 6, 16), 9)])  # 6 x 6 places, 16 x 27 weights
    15552
    """
    source, weights = (*inputs, None, None)[:2]
    if code not in {_CONV_2D, _DEPTHWISE, _FULL, _TRANSPOSED, _MATRIX, _CONV_3D, _LSTM}:
        return None
    if code == _TRANSPOSED:  # inputs: the shape of the output, weights, source
        _, weights, source = (*inputs, None, None, None)[:3]
        return 0 if source is None or weights is None else source.size // max(1, source.shape[-1]) * weights.size
    if source is None or weights is None or not outputs or not source.shape or not outputs[0].shape:
        return 0
    if code == _LSTM:
        steps = source.size // max(1, source.shape[-1])
        return steps * sum(tensor.size for tensor in inputs[1:9] if tensor is not None)
    if code == _MATRIX:  # (..., m, k) or, turned round, (..., k, m)
        return outputs[0].size * math.prod(source.shape[-2:]) // math.prod(outputs[0].shape[-2:-1])
    if code == _FULL:
        return outputs[0].size * weights.shape[-1] if weights.shape else 0
    return outputs[0].size // max(1, outputs[0].shape[-1]) * weights.size


def _kind(inputs: Sequence[Tensor | None]) -> str | None:
    """By the activations, which are the first input or, of a transposed convolution, the third."""
    known = [tensor for tensor in inputs[:3] if tensor is not None and tensor.type in _KINDS]
    if not known:
        return None
    kind = _KINDS[known[0].type]
    weights = inputs[1] if len(inputs) > 1 else None
    if known[0] is weights and len(inputs) > 2 and inputs[2] is not None:
        kind = _KINDS.get(inputs[2].type, kind)
    return "hybrid" if kind == "float32" and weights is not None and weights.type in _WEIGHTS_WHOLE else kind


def _builtin(content: Buffer, table: int) -> int:
    # The newer field is an int, because a byte was too small; the larger of the two counts.
    old, new = _scalar(content, table, _OLD_BUILTIN), _scalar(content, table, _BUILTIN)
    return max(0 if old is None else content[old], 0 if new is None else _i32(content, new))


def _read_tensor(content: Buffer, table: int) -> Tensor:
    kind = _scalar(content, table, _TYPE)
    shape = tuple(max(1, size) for size in _numbers(content, table, _SHAPE)[:_MAX_AXES])
    return Tensor(shape, 0 if kind is None else content[kind])


def _scalar(content: Buffer, table: int, number: int) -> int | None:
    """Where a table's field lies; None where it is absent and has its default."""
    vtable, entry = table - _i32(content, table), 4 + 2 * number
    if vtable < 0:  # which Python would count from the end
        raise IndexError
    inside = entry < struct.unpack_from("<H", content, vtable)[0]
    offset = struct.unpack_from("<H", content, vtable + entry)[0] if inside else 0
    return table + offset if offset else None


def _places(content: Buffer, table: int, number: int) -> list[int]:
    """Where each of the four-byte elements of a table's vector lies."""
    place = _scalar(content, table, number)
    if place is None:
        return []
    vector = place + _u32(content, place)
    length = _u32(content, vector)
    if length > _MAX_ITEMS or vector + 4 + 4 * length > len(content):
        raise IndexError
    return [vector + 4 + 4 * index for index in range(length)]


def _tables(content: Buffer, table: int, number: int) -> list[int]:
    return [place + _u32(content, place) for place in _places(content, table, number)]


def _numbers(content: Buffer, table: int, number: int) -> list[int]:
    return [_i32(content, place) for place in _places(content, table, number)]


def _u32(content: Buffer, place: int) -> int:
    return int(struct.unpack_from("<I", content, place)[0])


def _i32(content: Buffer, place: int) -> int:
    return int(struct.unpack_from("<i", content, place)[0])


if __name__ == "__main__":
    try:
        with Path(sys.argv[1]).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            answer = count(mapped)
    except ValueError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))
