"""Reads an ONNX file's structure with the standard library alone: run in the sandbox, as a script, by ``examine``.

ONNX is protobuf: a message is a sequence of fields, each a number, a wire type and a value. We walk every message in
which a tensor can stand (graphs, nodes, attributes, functions, training information, sparse tensors) and look at
nothing else. Where protobuf's readers could differ about a file, it is refused. ``onnx.checker`` then reads it too,
where it is installed.
"""

import json
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_DEPTH = 100  # protobuf's own
# For each message the fields that lead to a tensor, as in onnx.proto of IR version 13.
_CHILDREN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_GRAPH, _GRAPH_INITIALIZER, _GRAPH_INPUT = 7, 5, 11


class Field(NamedTuple):
    """A field of a message: its number and wire type, and its value or the bounds of its bytes."""

    number: int
    wire: int
    value: int
    start: int
    end: int


Buffer = mmap.mmap | bytes


def examine(path: Path) -> dict[str, object]:
    """Refuse a file that is not one whole ONNX model in itself.

    Raises:
        ValueError: Says why.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        refuse_external_data(content)
        refuse_free_dimensions(content)
    _run_checker(path)
    return {}


def refuse_external_data(content: Buffer) -> None:
    """Refuse a model of which any tensor, wherever it stands, lies or claims to lie in another file.

    Raises:
        ValueError: Names the tensor and the other file, or says what is wrong with the structure.

    >>> refuse_external_data(bytes([8, 10, 58, 4, 42, 2, 112, 1]))  # a graph with a tensor stored elsewhere
    Traceback (most recent call last):
        ...
    ValueError: expected one file that holds all weights, got tensor '' stored in ''; save the model as one file
    """
    unread = [("model", 0, len(content), 0)]
    while unread:
        kind, start, end, depth = unread.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"expected at most {_MAX_DEPTH} nested messages, got more; export the model again")
        if kind == "tensor":
            _refuse_external_tensor(content, start, end)
            continue
        children = _CHILDREN[kind]
        for field in fields(content, start, end):
            if field.number in children and field.wire == _BYTES:
                unread.append((children[field.number], field.start, field.end, depth + 1))


def _refuse_external_tensor(content: Buffer, start: int, end: int) -> None:
    name, location, external = "", "", False
    for field in fields(content, start, end):
        if field.number == _TENSOR_NAME and field.wire == _BYTES:
            name = _text(content, field)
        elif field.number == _TENSOR_EXTERNAL:
            external = True
            location = _location(content, field) or location
        # Any value: readers cut an enumeration down to 32 bits, each in its own way.
        external |= field.number == _TENSOR_LOCATION and (field.wire != _VARINT or field.value != 0)
    if external:
        raise ValueError(
            f"expected one file that holds all weights, got tensor {name[:40]!r} stored in {location[:80]!r}; "
            "save the model as one file"
        )


def _location(content: Buffer, entry: Field) -> str:
    pair = {field.number: field for field in fields(content, entry.start, entry.end) if field.wire == _BYTES}
    return _text(content, pair[2]) if 1 in pair and 2 in pair and _text(content, pair[1]) == "location" else ""


def refuse_free_dimensions(content: Buffer) -> None:
    """Refuse a model with an input whose sizes, but for the first, are not all fixed.

    Raises:
        ValueError: Names the input and the dimension.
    """
    graphs = [graph for graph in fields(content, 0, len(content)) if graph.number == _GRAPH and graph.wire == _BYTES]
    if not graphs:
        raise ValueError("expected an ONNX model, got one without a graph; export the model again")
    parts = [part for graph in graphs for part in fields(content, graph.start, graph.end) if part.wire == _BYTES]
    tensors = [part for part in parts if part.number == _GRAPH_INITIALIZER]
    # Up to IR version 3 a weight was declared as an input too.
    weights = {_text(content, name) for part in tensors for name in _inside(content, part, _TENSOR_NAME)}
    for part in parts:
        if part.number != _GRAPH_INPUT:
            continue
        name = "".join(_text(content, field) for field in _inside(content, part, 1))
        if name not in weights:
            _refuse_free(content, part, name)


def _refuse_free(content: Buffer, declared: Field, name: str) -> None:
    """ValueInfoProto.type (2) .tensor_type (1) .shape (2) .dim (1), of which dim_value (1) is the size."""
    dimensions = _inside(content, declared, 2, 1, 2, 1)
    for place, dimension in enumerate(dimensions):
        inner = list(fields(content, dimension.start, dimension.end))
        if place and not any(field.number == 1 and field.wire == _VARINT and field.value > 0 for field in inner):
            label = "".join(_text(content, field) for field in inner if field.number == 2 and field.wire == _BYTES)
            raise ValueError(
                f"expected fixed sizes but for the batch, got input {name[:40]!r} with dimension {place} free "
                f"({label[:40]!r}); export it with a fixed shape"
            )


def _inside(content: Buffer, field: Field, *numbers: int) -> list[Field]:
    """The length-delimited fields that a path of field numbers leads to."""
    found = [field]
    for number in numbers:
        found = [
            inner
            for outer in found
            for inner in fields(content, outer.start, outer.end)
            if inner.number == number and inner.wire == _BYTES
        ]
    return found


def fields(content: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of a message.

    Raises:
        ValueError: The bytes are no message, or one that readers may take differently.

    >>> [tuple(field) for field in fields(bytes([8, 150, 1]), 0, 3)]
    [(1, 0, 150, 3, 3)]
    """
    place = start
    while place < end:
        tag, place = _varint(content, place, end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"expected field numbers of protobuf, got {number}; this is no ONNX file")
        value, first = 0, place
        if wire == _VARINT:
            value, place = _varint(content, place, end)
            first = place
        elif wire == _BYTES:
            length, first = _varint(content, place, end)
            place = first + length
        elif wire in _FIXED_BYTES:
            place += _FIXED_BYTES[wire]
        else:
            raise ValueError(f"expected wire types 0, 1, 2 or 5, got {wire}; this is no ONNX file")
        if place > end:
            raise ValueError("expected whole fields, got one that ends early; the file is cut off or damaged")
        yield Field(number, wire, value, first, place)


def _varint(content: Buffer, place: int, end: int) -> tuple[int, int]:
    """A number of at most 64 bits in groups of seven, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise ValueError("expected whole fields, got one that ends early; the file is cut off or damaged")
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                break
            return value, place
    raise ValueError("expected numbers of at most 64 bits, got a longer one; this is no ONNX file")


def _text(content: Buffer, field: Field) -> str:
    return content[field.start : min(field.end, field.start + 4096)].decode("utf-8", errors="replace")


def _run_checker(path: Path) -> None:
    try:
        from onnx import checker
    except ImportError:  # a device need not have it
        return
    try:
        checker.check_model(str(path))
    except (checker.ValidationError, RuntimeError, ValueError) as error:
        raise ValueError(f"expected a valid ONNX model; onnx.checker says: {error}") from None


if __name__ == "__main__":
    try:
        answer = examine(Path(sys.argv[1]))
    except ValueError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))
