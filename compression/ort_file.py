"""Files of ONNX Runtime's own format, read as plain values and written anew in one order: the same bytes each time."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tacit.compression.forms import FormRefused

__all__ = ["read_ort", "read_properties", "write_ort", "write_properties"]

Table = dict[int, Any]
_IDENTIFIER = b"ORTM"
_SCALARS = MappingProxyType({"i8": "b", "u8": "B", "i32": "i", "u32": "I", "i64": "q", "f32": "f"})
_ALIGNMENT = 8
_EDGE = struct.Struct("<Iii")  # node, argument there, argument here


def _kinds(spelled: str) -> Mapping[int, str]:
    """The kinds of a table's fields in the order of the schema; "-" is one of no use any more."""
    return MappingProxyType({4 + 2 * number: kind for number, kind in enumerate(spelled.split())})


# onnxruntime/core/flatbuffers/schema/ort.fbs, version 6. "[x]" is a vector, "=" a union by the field before it.
_TABLES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "InferenceSession": _kinds("str Model - KernelTypeStrResolver"),
        "Model": _kinds("i64 [OperatorSetId] str str str i64 str Graph str [StringStringEntry]"),
        "OperatorSetId": _kinds("str i64"),
        "StringStringEntry": _kinds("str str"),
        "Graph": _kinds("[Tensor] [ValueInfo] [Node] u32 [NodeEdge] [str] [str] [SparseTensor] RuntimeOptimizations"),
        "Tensor": _kinds("str str [i64] i32 [u8] [str] i64"),
        "SparseTensor": _kinds("Tensor Tensor [i64]"),
        "ValueInfo": _kinds("str str TypeInfo"),
        "TypeInfo": _kinds("str u8 ="),
        "TensorTypeAndShape": _kinds("i32 Shape"),
        "Shape": _kinds("[Dimension]"),
        "Dimension": _kinds("DimensionValue str"),
        "DimensionValue": _kinds("i8 i64 str"),
        "SequenceType": _kinds("TypeInfo"),
        "MapType": _kinds("i32 TypeInfo"),
        "Node": _kinds("str str str i32 u32 str i32 str [str] [str] [Attribute] [i32] [str]"),
        "NodeEdge": _kinds("u32 [Edge] [Edge]"),
        "Attribute": _kinds("str str i32 f32 i64 str Tensor Graph [f32] [i64] [str] [Tensor] [Graph]"),
        "KernelTypeStrResolver": _kinds("[OpIdKernelTypeStrArgsEntry]"),
        "OpIdKernelTypeStrArgsEntry": _kinds("str [KernelTypeStrArgsEntry]"),
        "KernelTypeStrArgsEntry": _kinds("str [ArgTypeAndIndex]"),
        "ArgTypeAndIndex": _kinds("i8 u32"),
        "RuntimeOptimizations": _kinds("[RuntimeOptimizationRecordContainerEntry]"),
        # Holds records only in files that are to be optimised on the device; ours are not.
        "RuntimeOptimizationRecordContainerEntry": _kinds(""),
    }
)
_UNION = MappingProxyType({1: "TensorTypeAndShape", 2: "SequenceType", 3: "MapType"})
# Sets and maps, which onnxruntime writes in the order of its memory: by their first field, a name or a number.
_UNORDERED = frozenset(
    {"Tensor", "ValueInfo", "OperatorSetId", "StringStringEntry", "NodeEdge", "Edge"}
    | {"OpIdKernelTypeStrArgsEntry", "KernelTypeStrArgsEntry"}
)
_SESSION_MODEL, _MODEL_PROPERTIES = 6, 22


def read_ort(content: bytes) -> Table:
    """Every field of a file, by its place in the schema; sets in order.

    Raises:
        FormRefused: The file is of a format that this does not know, so something would be lost.
    """
    if content[4:8] != _IDENTIFIER:
        raise FormRefused("expected a file of the ORT format, got another; convert it again")
    return _read_table("InferenceSession", content, _u32(content, 0))


def write_ort(session: Table) -> bytes:
    """The bytes of a file, a function of its fields."""
    import flatbuffers  # type: ignore[import-untyped]  # ships no types; onnxruntime brings it

    builder = flatbuffers.Builder(1 << 16)
    builder.ForceDefaults(True)
    builder.Finish(_write_table(builder, "InferenceSession", session), _IDENTIFIER)
    return bytes(builder.Output())


def read_properties(session: Table) -> dict[str, str]:
    """A file's metadata."""
    entries = session[_SESSION_MODEL].get(_MODEL_PROPERTIES, [])
    return {entry[4]: entry.get(6, "") for entry in entries}


def write_properties(session: Table, properties: Mapping[str, str]) -> None:
    """Replace a file's metadata.

    Example:
        >>> session = {_SESSION_MODEL: {}}
        >>> write_properties(session, {"b": "2", "a": "1"})
        >>> read_properties(session)
        {'a': '1', 'b': '2'}
    """
    session[_SESSION_MODEL].pop(_MODEL_PROPERTIES, None)
    if properties:
        session[_SESSION_MODEL][_MODEL_PROPERTIES] = [{4: key, 6: value} for key, value in sorted(properties.items())]


def _u32(content: bytes, place: int) -> int:
    (value,) = struct.unpack_from("<I", content, place)
    return int(value)


def _read_table(name: str, content: bytes, place: int) -> Table:
    (back,) = struct.unpack_from("<i", content, place)
    (length,) = struct.unpack_from("<H", content, place - back)
    fields: Table = {}
    kinds = _TABLES[name]
    for slot in range(4, length, 2):
        (offset,) = struct.unpack_from("<H", content, place - back + slot)
        if not offset or kinds.get(slot) == "-":
            continue
        if slot not in kinds:
            raise FormRefused(f"expected no field {slot} of {name} in the ORT format, got one; use onnxruntime 1.32")
        kind = _UNION[fields[slot - 2]] if kinds[slot] == "=" else kinds[slot]
        fields[slot] = _read(kind, content, place + offset)
    return fields


def _read(kind: str, content: bytes, place: int) -> Any:
    if kind in _SCALARS:
        return struct.unpack_from(f"<{_SCALARS[kind]}", content, place)[0]
    target = place + _u32(content, place)
    if kind == "str":
        return content[target + 4 : target + 4 + _u32(content, target)].decode()
    if not kind.startswith("["):
        return _read_table(kind, content, target)
    inner, count, first = kind[1:-1], _u32(content, target), target + 4
    if inner == "u8":
        return content[first : first + count]
    if inner == "Edge":
        return sorted(_EDGE.unpack_from(content, first + number * _EDGE.size) for number in range(count))
    size = struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 4
    values = [_read(inner, content, first + number * size) for number in range(count)]
    return sorted(values, key=lambda value: value.get(4, 0)) if inner in _UNORDERED else values


def _write_table(builder: Any, name: str, fields: Table) -> int:
    kinds = _TABLES[name]
    kind_of = {slot: _UNION[fields[slot - 2]] if kinds[slot] == "=" else kinds[slot] for slot in fields}
    offsets = {slot: _write(builder, kind, fields[slot]) for slot, kind in kind_of.items() if kind not in _SCALARS}
    builder.StartObject(len(kinds))
    for slot, kind in kind_of.items():
        if kind in _SCALARS:
            _prepend(builder, kind, fields[slot])
        else:
            builder.PrependUOffsetTRelative(offsets[slot])
        builder.Slot((slot - 4) // 2)
    return int(builder.EndObject())


def _prepend(builder: Any, kind: str, value: float) -> None:
    named = {"i8": "Int8", "u8": "Uint8", "i32": "Int32", "u32": "Uint32", "i64": "Int64", "f32": "Float32"}
    getattr(builder, f"Prepend{named[kind]}")(value)


def _write(builder: Any, kind: str, value: Any) -> int:
    if kind == "str":
        return int(builder.CreateSharedString(value))
    if not kind.startswith("["):
        return _write_table(builder, kind, value)
    inner = kind[1:-1]
    if inner in ("u8", "Edge"):
        packed = value if inner == "u8" else b"".join(_EDGE.pack(*edge) for edge in value)
        return _write_packed(builder, packed, len(value), alignment=_ALIGNMENT if inner == "u8" else 4)
    if inner in _SCALARS:
        packed = struct.pack(f"<{len(value)}{_SCALARS[inner]}", *value)
        return _write_packed(builder, packed, len(value), alignment=struct.calcsize(_SCALARS[inner]))
    offsets = [_write(builder, inner, one) for one in value]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _write_packed(builder: Any, packed: bytes, count: int, *, alignment: int) -> int:
    builder.StartVector(1, len(packed), alignment)
    builder.head -= len(packed)
    builder.Bytes[builder.head : builder.head + len(packed)] = packed
    builder.vectorNumElems = count
    return int(builder.EndVector())
