"""Noise that survives floating point: sums on an integer grid, and Gaussians from a cipher's keystream.

Floats have more digits near zero than away from it, and their sums depend on the order. The low digits of "sum plus
noise" can therefore tell which sum the noise was added to, although no formula says so (Mironov 2012, "On significance
of the least significant bits for differential privacy"). Here the sum is an integer and the noise is rounded to an
integer, so that the low digits carry nothing that the accounting has not counted.

What this does not do: the Gaussians are float64 draws, not the exact sampler of Canonne, Kamath and Steinke 2020 ("The
discrete Gaussian for differential privacy"), and neither they nor the clipping take constant time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import NoReturn
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms

from tacit.federated.noise import Randomness

__all__ = ["SecureGenerator", "clipped_grid_sum", "grid_step", "secure_noisy_sum", "to_grid"]

Floats = npt.NDArray[np.float64] | npt.NDArray[np.float32] | torch.Tensor

# Rounding of norm and factor in float64 is parts in 1e8 even at 1e8 parameters; clipping a little lower outweighs it.
_CLIP_SLACK = 1.0 - 1e-6
_GRID_BITS = 30
# A record's coordinate is below 2^31 grid steps, so a sum of fewer than 2^31 records stays below 2^62.
_MOST_RECORDS = 2**31 - 1
# Up to here noise is below 2^53 grid steps, where float64 still tells neighbouring integers apart.
_LARGEST_NOISE_MULTIPLIER = 2.0**18
# Between these, C, a record's norm and their ratio stay clear of denormal and of infinite float64.
_SMALLEST_CLIP_NORM, _LARGEST_CLIP_NORM = 1e-100, 1e100

# What is worked on at once should stay in the processor's cache: whole-array temporaries take twice the time.
_BLOCK_PAIRS = 2**15
_BLOCK_VALUES = 2**17
_ZEROS = bytes(16 * _BLOCK_PAIRS)
# A ChaCha20 key gives 2^38 bytes before its 32-bit counter wraps; a new one is drawn long before.
_BYTES_PER_KEY = 2**36


class SecureGenerator:
    """Randomness from the keystream of ChaCha20 (RFC 8439), keyed with 256 bits of the operating system's entropy.

    Gaussians are Box and Muller's, in float64, from 64-bit uniforms: a radius √(-2 ln u), where u is one of 1, ..., 2⁶⁴
    over 2⁶⁴, and an angle. |x| is at most √(128 ln 2) = 9.42 standard deviations; a true Gaussian exceeds that with
    probability 5e-21.

    *Guarantees*: two instances, two processes, and a process and its fork never share a stream; a forked child drops
    the key that it inherits; no seed reaches it; its state is never written, sent or restored (copying or pickling it
    raises).

    >>> a, b = SecureGenerator(), SecureGenerator()
    >>> bool((a.gaussian(4, 1.0) == b.gaussian(4, 1.0)).any())
    False
    """

    def __init__(self) -> None:
        self._process = -1
        self._stream: CipherContext | None = None
        self._left_bytes = 0
        _LIVE.add(self)

    @classmethod
    def _with_known_key(cls, key: bytes) -> SecureGenerator:
        """For known-answer tests only: whoever knows the key knows every draw."""
        generator = cls()
        generator._use(key)
        return generator

    def _use(self, key: bytes) -> CipherContext:
        # A key serves one stream only, so that the nonce (four bytes of counter, twelve of nonce) may be all zeros.
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._stream, self._process, self._left_bytes = stream, os.getpid(), _BYTES_PER_KEY
        return stream

    def _forget(self) -> None:
        self._stream = None

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        stream, length_bytes = self._stream, 8 * count
        # The process is compared here too because code outside Python may fork without running Python's hooks.
        if stream is None or self._process != os.getpid() or self._left_bytes < length_bytes:
            stream = self._use(os.urandom(32))
        self._left_bytes -= length_bytes
        return np.frombuffer(stream.update(_ZEROS[:length_bytes]), dtype="<u8")

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Independent coins, (count,); one is true with the probability, rounded down to a multiple of 2⁻⁶⁴."""
        if not (count >= 0 and 0.0 <= probability <= 1.0):
            raise ValueError(
                f"expected count >= 0 and 0 <= probability <= 1, got count={count}, probability={probability}"
            )
        if probability == 1.0:
            return np.ones(count, dtype=np.bool_)
        coins = np.empty(count, dtype=np.bool_)
        threshold = np.uint64(int(math.ldexp(probability, 64)))
        for start in range(0, count, 2 * _BLOCK_PAIRS):
            part = coins[start : start + 2 * _BLOCK_PAIRS]
            np.less(self._words(len(part)), threshold, out=part)
        return coins

    def gaussian(self, count: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        """Independent centred Gaussians, (count,)."""
        if not (count >= 0 and 0.0 <= standard_deviation < math.inf):
            raise ValueError(
                f"expected count >= 0 and a finite standard_deviation >= 0, got count={count}, "
                f"standard_deviation={standard_deviation}"
            )
        values = np.empty(count + count % 2, dtype=np.float64)
        for start in range(0, len(values), 2 * _BLOCK_PAIRS):
            self._fill(values[start : start + 2 * _BLOCK_PAIRS])
        values *= standard_deviation
        return values[:count]

    def _fill(self, values: npt.NDArray[np.float64]) -> None:
        pairs = len(values) // 2
        words = self._words(2 * pairs)
        radii = words[:pairs].astype(np.float64)
        radii += 1.0  # u is never 0, whose logarithm is infinite
        radii *= 2.0**-64
        np.log(radii, out=radii)
        radii *= -2.0
        np.sqrt(radii, out=radii)
        angles = words[pairs:].view("<i8") * (math.pi * 2.0**-63)  # in [-π, π]
        np.multiply(radii, np.cos(angles), out=values[:pairs])
        np.multiply(radii, np.sin(angles, out=angles), out=values[pairs:])

    def __reduce__(self) -> NoReturn:
        raise TypeError("expected a generator that stays in its process, got a request to copy it; make a new one")


_LIVE: WeakSet[SecureGenerator] = WeakSet()


def _forget_all() -> None:
    for generator in list(_LIVE):
        generator._forget()


# A forked child that kept the key could repeat its parent's noise, or tell it.
os.register_at_fork(after_in_child=_forget_all)


def grid_step(clip_norm: float) -> float:
    """The grid's step g = 2^(⌊log₂ C⌋ - 30), a power of two, so that dividing by it is exact.

    Raises:
        ValueError: C is outside [1e-100, 1e100].

    >>> grid_step(1.0) == 2.0**-30, grid_step(0.99) == 2.0**-31
    (True, True)
    """
    if not _SMALLEST_CLIP_NORM <= clip_norm <= _LARGEST_CLIP_NORM:
        raise ValueError(f"expected 1e-100 <= clip_norm <= 1e100, got clip_norm={clip_norm}")
    _, exponent = math.frexp(clip_norm)  # C = m·2^exponent with m in [½, 1); a rounded log₂ may miss a power of two
    return math.ldexp(1.0, exponent - 1 - _GRID_BITS)


def to_grid(vectors: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.int64]:
    """Truncates clipped records toward zero to whole grid steps, so that no record's norm can grow.

    Args:
        vectors: (records, parameters), each record already clipped to at most C.
        clip_norm: C.

    Returns:
        Multiples of `grid_step(clip_norm)`, (records, parameters).

    Raises:
        ValueError: a record is not finite, or its norm is above C.

    >>> to_grid(np.array([[0.5, -(2.0**-31), 1.7 * 2.0**-30]]), 1.0).tolist()
    [[536870912, 0, 1]]
    """
    step = grid_step(clip_norm)
    if not bool(np.all(_norms(vectors) <= clip_norm)):  # false for NaN as well
        raise ValueError(f"expected records of norm <= clip_norm={clip_norm}, got a larger one; clip them first")
    return _truncated(vectors, step)


def clipped_grid_sum(chunks: Iterable[Floats], *, size: int, clip_norm: float) -> npt.NDArray[np.int64]:
    """Clips each record to C(1 - 1e-6) in float64, truncates it to the grid and adds the integers up. Without noise.

    A record that is not finite, or whose squared norm overflows float64, contributes nothing: it is masked.

    *Guarantees*: the sum is exact, whatever the order and the grouping into chunks; adding or removing one record moves
    it by that record's own grid vector, whose L2 norm is at most C/g. Of fewer than 2³¹ records it stays below 2⁶².

    Args:
        chunks: (records, parameters) each, float32 or float64; none at all is an empty batch.
        size: parameters.
        clip_norm: C.

    Returns:
        Multiples of `grid_step(clip_norm)`, (parameters,).

    Raises:
        ValueError: a chunk's shape or type is another, or there are 2³¹ records or more.

    >>> int(clipped_grid_sum([np.array([[0.25], [float("nan")]])], size=1, clip_norm=1.0)[0]) * grid_step(1.0)
    0.25
    """
    step = grid_step(clip_norm)
    total = np.zeros(size, dtype=np.int64)
    rows = max(1, _BLOCK_VALUES // max(1, size))
    records = 0
    for chunk in chunks:
        vectors = _checked(chunk, size)
        records += len(vectors)
        if records > _MOST_RECORDS:
            raise ValueError(f"expected at most {_MOST_RECORDS} records, got records={records}; use a smaller batch")
        for start in range(0, len(vectors), rows):
            total += _truncated(_clipped(vectors[start : start + rows], clip_norm), step).sum(axis=0)
    return total


def secure_noisy_sum(
    chunks: Iterable[Floats], *, size: int, clip_norm: float, noise_multiplier: float, generator: Randomness
) -> npt.NDArray[np.float64]:
    """The sum of clipped per-record gradients on the grid, plus Gaussian noise rounded to the grid.

    Let S be the sum, a multiple of the step g, and Z ~ N(0, (zC)²). Because S is on the grid,

        round(S + Z) = S + round(Z)

    so the right side, which is computed here in integers, is a function of S + Z alone: post-processing of the
    continuous Gaussian mechanism on S. A discrete Gaussian (Canonne et al. 2020) would need an accounting of its own.
    Rounding matters because Z in float64 has its own pattern of low digits; added to an unrounded S it would leave a
    trace of S in them (Mironov 2012). Here every result is a multiple of g whatever S is. That the float64 sampler is
    not exact remains (see `SecureGenerator`), and time is not constant.

    *Guarantees*: one record moves S by at most C in L2, for truncation toward zero shortens vectors; hence the
    accounting of the continuous mechanism at noise multiplier z holds unchanged, with or without Poisson sampling.

    Args:
        chunks: per-record gradients, all parameters flat, (records, parameters) each, float32 or float64; none at all
            is an empty batch, which releases noise.
        size: parameters.
        clip_norm: C, in [1e-100, 1e100].
        noise_multiplier: z, the noise's standard deviation over C; at most 2¹⁸.
        generator: where the noise comes from: a `SecureGenerator`, unless the guarantee is void.

    Returns:
        Multiples of `grid_step(clip_norm)`, (parameters,).

    Raises:
        ValueError: an argument is outside its range, or a chunk's shape or type is another.

    >>> noisy = secure_noisy_sum([], size=3, clip_norm=1.0, noise_multiplier=2.0, generator=SecureGenerator())
    >>> (noisy / grid_step(1.0) % 1.0).tolist()
    [0.0, 0.0, 0.0]
    """
    if not 0.0 < noise_multiplier <= _LARGEST_NOISE_MULTIPLIER:
        raise ValueError(f"expected 0 < noise_multiplier <= 2**18, got noise_multiplier={noise_multiplier}")
    step = grid_step(clip_norm)
    total = clipped_grid_sum(chunks, size=size, clip_norm=clip_norm)
    # Halves, where rounding to even would depend on S, have probability zero in the continuous mechanism.
    total += np.rint(generator.gaussian(size, noise_multiplier * clip_norm) / step).astype(np.int64)
    return total.astype(np.float64) * step


def _checked(chunk: Floats, size: int) -> npt.NDArray[np.float64] | npt.NDArray[np.float32]:
    right = chunk.dtype in ((torch.float32, torch.float64) if isinstance(chunk, torch.Tensor) else ("f4", "f8"))
    if not right or chunk.ndim != 2 or chunk.shape[1] != size:
        raise ValueError(
            f"expected float32 or float64 of shape (records, {size}), got {chunk.dtype} of shape {tuple(chunk.shape)}; "
            "flatten the gradients of one record into one row"
        )
    return chunk.detach().cpu().numpy() if isinstance(chunk, torch.Tensor) else chunk


def _norms(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        norms: npt.NDArray[np.float64] = np.sqrt(np.square(vectors).sum(axis=1))  # (records,)
    return norms


def _clipped(block: npt.NDArray[np.float64] | npt.NDArray[np.float32], clip_norm: float) -> npt.NDArray[np.float64]:
    # A copy in C order: a row's norm must have the same last digit however the caller's memory is laid out.
    vectors = np.array(block, dtype=np.float64, order="C")
    norms = _norms(vectors)
    usable = np.isfinite(norms)
    if not usable.all():
        vectors[~usable] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.minimum(1.0, clip_norm * _CLIP_SLACK / norms)  # a norm of 0 gives 1
    vectors *= np.where(usable, factors, 0.0)[:, None]
    return vectors


def _truncated(vectors: npt.NDArray[np.float64], step: float) -> npt.NDArray[np.int64]:
    return (vectors / step).astype(np.int64)  # towards zero
