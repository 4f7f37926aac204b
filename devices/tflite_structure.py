"""Reads a TFLite file's structure with the standard library alone: run in the sandbox, as a script, by ``examine``.

TFLite is a flatbuffer: a table says in its vtable where each of its fields lies. Only what is needed is followed:
from the model to its first subgraph's inputs. Everything else is the runtime's to read, in its own child.
"""

import json
import mmap
import struct
import sys
from pathlib import Path

# Numbers of fields in schema.fbs.
_SUBGRAPHS, _EXTERNAL_GROUPS, _EXTERNAL_BUFFERS = 2, 8, 9
_TENSORS, _INPUTS = 0, 1
_SHAPE, _NAME, _SHAPE_SIGNATURE = 0, 3, 7
_MAX_INPUTS, _MAX_AXES = 1000, 16

Buffer = mmap.mmap | bytes


def examine(path: Path) -> dict[str, object]:
    """Refuse a file that names other files, or has inputs of sizes that are not fixed.

    Raises:
        ValueError: Says why.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        check(content)
    return {}


def check(content: Buffer) -> None:
    """Refuse a model that names other files, or has inputs of which any size but the first is free.

    Raises:
        ValueError: Names the input and the dimension, or says that the structure is damaged.

    >>> check(bytes(8))
    Traceback (most recent call last):
        ...
    ValueError: expected offsets inside the file, got one outside; the file is cut off or damaged
    """
    try:
        model = _u32(content, 0)
        if any(_field(content, model, number) is not None for number in (_EXTERNAL_GROUPS, _EXTERNAL_BUFFERS)):
            raise ValueError("expected one file that holds all weights, got external buffers; save the model as one")
        subgraph = _elements(content, model, _SUBGRAPHS, 1)[0]
        main = subgraph + _u32(content, subgraph)
        tensors = _field(content, main, _TENSORS)
        for element in _elements(content, main, _INPUTS, _MAX_INPUTS):
            _refuse_free(content, _tensor(content, tensors, _i32(content, element)))
    except (struct.error, IndexError):
        raise ValueError("expected offsets inside the file, got one outside; the file is cut off or damaged") from None


def _refuse_free(content: Buffer, tensor: int) -> None:
    # The shape of a free dimension is written as 1; only the signature tells the two apart.
    signature = _field(content, tensor, _SHAPE_SIGNATURE)
    axes = _elements(content, tensor, _SHAPE if signature is None else _SHAPE_SIGNATURE, _MAX_AXES)
    for place, element in enumerate(axes):
        if place and _i32(content, element) < 1:
            raise ValueError(
                f"expected fixed sizes but for the batch, got input {_text(content, tensor, _NAME)!r} with dimension "
                f"{place} free; export it with a fixed shape"
            )


def _tensor(content: Buffer, tensors: int | None, index: int) -> int:
    if tensors is None or not 0 <= index < _u32(content, tensors):
        raise IndexError
    element = tensors + 4 + 4 * index
    return element + _u32(content, element)


def _field(content: Buffer, table: int, number: int) -> int | None:
    """Where the vector or string of a table's field begins; None where the field is absent."""
    vtable = table - _i32(content, table)
    entry = 4 + 2 * number
    if vtable < 0:  # which Python would count from the end
        raise IndexError
    inside = entry < struct.unpack_from("<H", content, vtable)[0]
    offset = struct.unpack_from("<H", content, vtable + entry)[0] if inside else 0
    return table + offset + _u32(content, table + offset) if offset else None


def _elements(content: Buffer, table: int, number: int, limit: int) -> list[int]:
    """Where each of a vector's four-byte elements lies; at most so many."""
    vector = _field(content, table, number)
    count = 0 if vector is None else _u32(content, vector)
    return [] if vector is None else [vector + 4 + 4 * index for index in range(min(count, limit))]


def _text(content: Buffer, table: int, number: int) -> str:
    string = _field(content, table, number)
    length = 0 if string is None else min(_u32(content, string), 40)
    return "" if string is None else content[string + 4 : string + 4 + length].decode("utf-8", errors="replace")


def _u32(content: Buffer, place: int) -> int:
    return int(struct.unpack_from("<I", content, place)[0])


def _i32(content: Buffer, place: int) -> int:
    return int(struct.unpack_from("<i", content, place)[0])


if __name__ == "__main__":
    try:
        answer = examine(Path(sys.argv[1]))
    except ValueError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))
