"""Smaller updates: the largest entries alone, or eight bits for each; and what was left out is sent with the next one.

Both are plain functions of the update: the same question gets the same bytes. With a guarantee an owner encodes what is
noised already, and a server that adds the noise decodes before it clips (`compatibility.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays

__all__ = ["Codec", "Int8", "TopK", "codec_named", "wire_bytes"]

Wire = dict[str, npt.NDArray[Any]]
WireForm = dict[str, tuple[str, tuple[int, ...]]]  # of each array dtype and shape

_INDICES, _ENTRIES = "top-k.indices", "top-k.values"
_SCALES, _LEVELS = "8-bit.scales", "8-bit.values"
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TopK:
    """The entries of largest magnitude over the whole update; of equals, those that come first.

    On the wire: "top-k.indices", (k,) int32, ascending positions in all arrays one after another, and "top-k.values",
    (k,) float32, with k = ⌈fraction·entries⌉. At a fraction above ½ that is more than the update itself.

    Attributes:
        fraction: above 0, at most 1.

    Raises:
        ValueError: a fraction out of its range.

    >>> wire, left = TopK(0.5).encode({"w": np.float32([1.0, -3.0]), "b": np.float32([0.5, 2.0])}, None)
    >>> {name: array.tolist() for name, array in wire.items()}
    {'top-k.indices': [1, 3], 'top-k.values': [-3.0, 2.0]}
    >>> {name: array.tolist() for name, array in left.items()}
    {'w': [1.0, 0.0], 'b': [0.5, 0.0]}
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"expected a share above 0 and at most 1, got fraction={self.fraction}")

    def encode(self, update: Arrays, residual: Arrays | None) -> tuple[Wire, Arrays]:
        """What is sent of an update, and what is not.

        With error feedback (Karimireddy et al. 2019, algorithm 2) the residual of one call is given to the next.

        Args:
            update: float32 arrays by name.
            residual: what the last call did not send, added beforehand; None for no error feedback.

        Returns:
            The arrays on the wire, and the residual, of the update's names and shapes.

        Raises:
            ValueError: a value that is not finite, a residual of another model, or more entries than int32 can count.
        """
        values = _flat(update, residual)
        if len(values) > np.iinfo(np.int32).max:
            raise ValueError(f"expected at most {np.iinfo(np.int32).max} entries, got {len(values)}")
        chosen = _largest(np.abs(values), self._kept(len(values)))
        wire: Wire = {_INDICES: chosen.astype(np.int32), _ENTRIES: values[chosen]}
        values[chosen] = 0.0
        return wire, _shaped(values, update)

    def decode(self, wire: Wire, like: Arrays) -> Arrays:
        """The update that arrived, zero where nothing was sent; whatever may come, it is finite or refused.

        Args:
            wire: as `encode` makes it, from anybody.
            like: arrays of the update's names and shapes.

        Returns:
            float32 arrays.

        Raises:
            ValueError: anything that `encode` does not make.
        """
        _expect(self.wire_like(like), wire)
        indices, entries = wire[_INDICES], wire[_ENTRIES]
        size = _size(like)
        if len(indices) and not (indices[0] >= 0 and indices[-1] < size and bool((np.diff(indices) > 0).all())):
            raise ValueError(f"expected ascending positions from 0 to below {size} in {_INDICES}, got others")
        if not np.isfinite(entries).all():
            raise ValueError(f"expected finite values in {_ENTRIES}, got others")
        values = np.zeros(size, np.float32)
        values[indices] = entries
        return _shaped(values, like)

    def wire_like(self, like: Arrays) -> WireForm:
        """The arrays on the wire, exactly: dtype and shape of each.

        >>> TopK(0.25).wire_like({"w": np.zeros((2, 4), np.float32)})
        {'top-k.indices': ('int32', (2,)), 'top-k.values': ('float32', (2,))}
        """
        kept = self._kept(_size(like))
        return {_INDICES: ("int32", (kept,)), _ENTRIES: ("float32", (kept,))}

    def _kept(self, size: int) -> int:
        # A fraction is meant as it is written: 0.07 of 100 is 7, though 0.07 * 100 is 7.000000000000001.
        return math.ceil(Fraction(str(float(self.fraction))) * size)


@dataclass(frozen=True)
class Int8:
    """Each array in whole multiples of its own scale, from -127 to 127.

    On the wire: "8-bit.scales", (arrays,) float32, the largest magnitude of each array over 127, and "8-bit.values",
    (entries,) int8, all arrays one after another. An entry is off by at most half a scale.

    Values are rounded to the nearest, ties to even, and not at random. Random rounding would be right on average, but
    its error is twice as large in the mean square, error feedback makes up for a bias anyway, and an owner that must
    answer the same question with the same bytes would have to keep one more secret.

    >>> wire, left = Int8().encode({"w": np.float32([127.0, -2.25])}, None)
    >>> {name: array.tolist() for name, array in wire.items()}, left["w"].tolist()
    ({'8-bit.scales': [1.0], '8-bit.values': [127, -2]}, [0.0, -0.25])
    """

    def encode(self, update: Arrays, residual: Arrays | None) -> tuple[Wire, Arrays]:
        """What is sent of an update, and what is not.

        With error feedback (Seide et al. 2014) the residual of one call is given to the next.

        Args:
            update: float32 arrays by name.
            residual: what the last call did not send, added beforehand; None for no error feedback.

        Returns:
            The arrays on the wire, and the residual, of the update's names and shapes.

        Raises:
            ValueError: a value that is not finite, or a residual of another model.
        """
        values = _flat(update, residual)
        scales = np.array([_scale(array) for array in _shaped(values, update).values()], np.float32)
        steps = np.repeat(scales.astype(np.float64), [array.size for array in update.values()])
        levels = np.rint(np.divide(values, steps, out=np.zeros(len(values)), where=steps > 0.0)).astype(np.int8)
        return {_SCALES: scales, _LEVELS: levels}, _shaped(values - _sent(levels, steps), update)

    def decode(self, wire: Wire, like: Arrays) -> Arrays:
        """The update that arrived; whatever may come, it is finite or refused.

        Args:
            wire: as `encode` makes it, from anybody.
            like: arrays of the update's names and shapes.

        Returns:
            float32 arrays.

        Raises:
            ValueError: anything that `encode` does not make.
        """
        _expect(self.wire_like(like), wire)
        scales, levels = wire[_SCALES], wire[_LEVELS]
        if not (np.isfinite(scales).all() and bool((scales >= 0.0).all())):
            raise ValueError(f"expected finite scales of at least 0 in {_SCALES}, got others")
        if bool((levels == -128).any()):
            raise ValueError(f"expected values from -127 to 127 in {_LEVELS}, got -128")
        steps = np.repeat(scales.astype(np.float64), [array.size for array in like.values()])
        return _shaped(_sent(levels, steps), like)

    def wire_like(self, like: Arrays) -> WireForm:
        """The arrays on the wire, exactly: dtype and shape of each.

        >>> Int8().wire_like({"w": np.zeros((2, 4), np.float32)})
        {'8-bit.scales': ('float32', (1,)), '8-bit.values': ('int8', (8,))}
        """
        return {_SCALES: ("float32", (len(like),)), _LEVELS: ("int8", (_size(like),))}


Codec = TopK | Int8


def codec_named(name: str, fraction: float) -> Codec | None:
    """The codec of a recipe's name: "none", "top-k" with its fraction, or "8-bit".

    Raises:
        ValueError: another name, or a fraction that top-k cannot have.

    >>> codec_named("top-k", 0.1), codec_named("8-bit", 0.1), codec_named("none", 0.1)
    (TopK(fraction=0.1), Int8(), None)
    """
    if name == "top-k":
        return TopK(fraction)
    if name not in ("none", "8-bit"):
        raise ValueError(f"expected none, top-k or 8-bit, got codec={name!r}")
    return Int8() if name == "8-bit" else None


def wire_bytes(wire: Mapping[str, npt.NDArray[Any]]) -> int:
    """How many bytes the values of an update take, encoded or not.

    >>> wire_bytes({"w": np.zeros(10, np.float32)}), wire_bytes(Int8().encode({"w": np.zeros(10, np.float32)}, None)[0])
    (40, 14)
    """
    return sum(array.nbytes for array in wire.values())


def _flat(update: Arrays, residual: Arrays | None) -> npt.NDArray[np.float32]:
    """All arrays one after another, with what was not sent before."""
    parts = [np.ravel(array).astype(np.float32) for array in update.values()]
    if residual is not None:
        if {n: a.shape for n, a in residual.items()} != {n: a.shape for n, a in update.items()}:
            raise ValueError(f"expected a residual of the update's names and shapes, got {list(residual)[:8]}")
        parts = [part + np.ravel(residual[name]) for part, name in zip(parts, update, strict=True)]
    values = np.concatenate([np.zeros(0, np.float32), *parts])
    if not np.isfinite(values).all():
        raise ValueError("expected finite values in an update and its residual, got others")
    return values


def _shaped(values: npt.NDArray[np.floating], like: Arrays) -> Arrays:
    values, start, result = values.astype(np.float32, copy=False), 0, {}
    for name, array in like.items():
        # A copy: arrays that share memory would all be kept for the sake of one.
        result[name] = values[start : start + array.size].reshape(array.shape).copy()
        start += array.size
    return result


def _size(arrays: Arrays) -> int:
    return sum(array.size for array in arrays.values())


def _largest(magnitudes: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Positions of the largest, ascending; of equals at the threshold, the first."""
    if count == 0:
        return np.zeros(0, np.int64)
    threshold = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _scale(array: npt.NDArray[np.float32]) -> np.float32:
    """The least float32 whose 127-fold reaches an array's largest magnitude, so that no level is above 127."""
    largest = float(np.max(np.abs(array), initial=0.0))
    scale = np.float32(largest / 127.0)
    return scale if float(scale) * 127.0 >= largest else np.nextafter(scale, np.float32(np.inf))


def _sent(levels: npt.NDArray[np.int8], steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    # 127 times the scale of the largest float is a little more than a float: kept within.
    return np.clip(levels * steps, -_LARGEST, _LARGEST).astype(np.float32)


def _expect(form: WireForm, wire: Wire) -> None:
    if set(wire) != set(form):
        raise ValueError(f"expected arrays {', '.join(form)} on the wire, got {len(wire)} others")
    for name, (dtype, shape) in form.items():
        array = wire[name]
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype) or array.shape != shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"expected {name} to be {dtype} {shape}, got {found}")
