"""Weights from outside, as arrays: the header is read in the sandbox, and no value but finite ones gets in."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.formats import ask_reader, require
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["Header", "Tensor", "read_header", "read_safetensors"]

_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies: its dtype in safetensors' words, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file states about itself: tensors in the order of their data."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Read and check a safetensors header, in a child with limits.

    *Guarantees.* No name comes twice, every tensor lies inside the file and has the bytes that its dtype and shape
    need, and the tensors neither overlap nor leave a gap. Any reader of the format then finds the same tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: It is no such file; says what is wrong.
    """
    require(path, "safetensors")
    return header_of(ask_reader("safetensors_header.py", path))


def header_of(answer: dict[str, Any]) -> Header:
    """What the reader in the sandbox answered, typed."""
    tensors = {
        name: Tensor(dtype=dtype, shape=tuple(shape), start=answer["data_start"] + begin)
        for name, dtype, shape, begin in answer["tensors"]
    }
    return Header(metadata=answer["metadata"], tensors=tensors)


def read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a safetensors file of unknown honesty: as ``read_header``, and with finite values only.

    Returns:
        Arrays of their own memory, in the order of the file's data.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: As of ``read_header``, or a tensor has NaN or infinity, or a dtype that NumPy does not hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     path = Path(folder, "weights.safetensors")
    ...     header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ...     _ = path.write_bytes(len(header).to_bytes(8, "little") + header + np.float32([1.0, np.nan]).tobytes())
    ...     read_safetensors(path)
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactRefused: expected finite weights, got NaN or infinity in 'w' of ...
    """
    return read_arrays(path, read_header(path))


def read_arrays(path: Path, header: Header) -> dict[str, npt.NDArray[Any]]:
    """The arrays that a checked header tells of; raises ``ArtifactRefused`` as ``read_safetensors`` does."""
    arrays = {}
    with path.open("rb") as file:
        for name, tensor in header.tensors.items():
            file.seek(tensor.start)
            arrays[name] = _array(path, name, tensor, file.read(_bytes_of(path, name, tensor)))
    return arrays


def _bytes_of(path: Path, name: str, tensor: Tensor) -> int:
    if tensor.dtype not in _DTYPES:
        raise ArtifactRefused(
            f"expected dtypes that NumPy holds, got {name[:40]!r} of {path.name!r} as {tensor.dtype}; convert to F32"
        )
    return math.prod(tensor.shape) * np.dtype(_DTYPES[tensor.dtype]).itemsize


def _array(path: Path, name: str, tensor: Tensor, data: bytes) -> npt.NDArray[Any]:
    if len(data) != _bytes_of(path, name, tensor):
        raise ArtifactRefused(f"expected a file that stays as it is, got {path.name!r}, cut off while it was read")
    if tensor.dtype == "BOOL" and not set(data) <= {0, 1}:
        raise ArtifactRefused(f"expected true or false, got other bytes in {name[:40]!r} of {path.name!r}; restore it")
    values: npt.NDArray[Any] = np.frombuffer(data, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape).copy()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ArtifactRefused(
            f"expected finite weights, got NaN or infinity in {name[:40]!r} of {path.name!r}; restore the file"
        )
    return values
