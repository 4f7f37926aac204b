"""Reads a safetensors header with the standard library alone: run in the sandbox, as a script, by ``weights.py``.

The format: eight bytes with the length of the header, little-endian; the header, a JSON object of ``name: {"dtype",
"shape", "data_offsets": [begin, end]}`` and perhaps ``__metadata__``, padded with spaces; the data, without gaps.
Names that come twice are refused, because readers differ in whose wins.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

MAX_HEADER_BYTES = 8 << 20  # some 80,000 tensors
_SIZES_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_AXES = 16


def examine(path: Path) -> dict[str, object]:
    """Return where each tensor lies, and the metadata.

    Raises:
        ValueError: Says what is wrong with the header.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(
                f"expected a header of 2 to {min(MAX_HEADER_BYTES, size_bytes - 8)} bytes, got {length}; the file is "
                "cut off, damaged or no safetensors file"
            )
        return parse(file.read(length), size_bytes - 8 - length)


def parse(header: bytes, data_bytes: int) -> dict[str, object]:
    """Check a header against the number of bytes of data that follow it.

    Returns:
        ``data_start``, ``metadata`` and ``tensors``, a list of ``[name, dtype, shape, begin]`` in the data's order.

    Raises:
        ValueError: Says what is wrong with it.

    >>> parse(b'{"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', 2)["tensors"]
    [['w', 'U8', [2], 0]]
    >>> parse(b'{"w": 1, "w": 2}', 0)
    Traceback (most recent call last):
        ...
    ValueError: expected each name once, got 'w' twice; readers would differ: write the file again
    """
    if header[:1] != b"{":
        raise ValueError("expected a header that begins with a brace, got another; this is no safetensors file")
    try:
        found = json.loads(header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("expected a flat header, got a deeply nested one; write the file again") from None
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("expected __metadata__ of texts, got others; write the file again")
    tensors = sorted((_tensor(name, value) for name, value in found.items()), key=lambda tensor: tensor[3:])
    _refuse_gaps(tensors, data_bytes)
    listed = [[name, dtype, shape, begin] for name, dtype, shape, begin, _ in tensors]
    return {"data_start": 8 + len(header), "metadata": metadata, "tensors": listed}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(
                f"expected each name once, got {name[:40]!r} twice; readers would differ: write the file again"
            )
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected whole numbers, got {name}; write the file again")


def _tensor(name: str, value: Any) -> tuple[str, str, list[int], int, int]:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets of tensor {name[:40]!r}, got others")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES_BYTES:
        raise ValueError(f"expected a known dtype of tensor {name[:40]!r}, got dtype={str(dtype)[:20]!r}")
    if not _counts(shape) or len(shape) > _MAX_AXES or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"expected shape and data_offsets of tensor {name[:40]!r} as whole numbers, got others")
    if math.prod(max(1, size) for size in shape) >= 1 << 60:  # no array can have such a shape, even with a size of zero
        raise ValueError(f"expected a shape of tensor {name[:40]!r} that memory can hold, got a larger one")
    begin, end = offsets
    if end - begin != math.prod(shape) * _SIZES_BYTES[dtype]:
        raise ValueError(
            f"expected as many bytes as tensor {name[:40]!r} has by dtype and shape, got {str(end - begin)[:24]}"
        )
    return name, dtype, shape, begin, end


def _counts(values: Any) -> bool:
    # Not isinstance: true and false are integers in Python, and no sizes.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _refuse_gaps(tensors: list[tuple[str, str, list[int], int, int]], data_bytes: int) -> None:
    """Tensors lie one after the other and fill the file: no overlap, and no bytes that are in none of them."""
    place = 0
    for name, _, _, begin, end in tensors:
        if begin != place:
            raise ValueError(f"expected tensor {name[:40]!r} at byte {place} of the data, got {begin}: overlap or gap")
        place = end
    if place != data_bytes:
        raise ValueError(f"expected {place} bytes of data, got {data_bytes}; the file is cut off or damaged")


if __name__ == "__main__":
    try:
        answer = examine(Path(sys.argv[1]))
    except ValueError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))
