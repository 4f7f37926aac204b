"""Where randomness comes from: the secret class, which nobody can replay, and the public class, which anybody can.

Batches, noise and everything else that the guarantee rests on draw from `SecretGenerator`. Partitions, initial weights
and runs without a guarantee draw from `public_generator`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Randomness", "SecretGenerator", "SeededGenerator", "public_generator"]

# Gaussians from which on drawing them ahead is worth a thread: about a millisecond of work.
_MUCH = 2**16


class Randomness(Protocol):
    """What a mechanism draws from."""

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Independent coins, (count,)."""
        ...

    def gaussian(self, count: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        """Independent centred Gaussians, (count,)."""
        ...


class SeededGenerator:
    """Reproducible randomness: public by construction, so nothing private may rest on it.

    >>> bool((SeededGenerator(7).gaussian(4, 1.0) == SeededGenerator(7).gaussian(4, 1.0)).all())
    True
    """

    def __init__(self, seed: int | np.random.SeedSequence) -> None:
        self._generator = np.random.Generator(np.random.PCG64DXSM(seed))

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Independent coins, (count,)."""
        return self._generator.random(count) < probability

    def gaussian(self, count: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        """Independent centred Gaussians, (count,)."""
        return self._generator.standard_normal(count) * standard_deviation


class _Ahead(SeededGenerator):
    """Draws much noise before it is asked for, in a second thread, while a step computes what the noise is added to.

    What is drawn ahead comes from a stream of its own: it is the same noise, only earlier. What is never asked for is
    never seen.
    """

    def __init__(self, seed: np.random.SeedSequence) -> None:
        super().__init__(seed)
        self._stream = np.random.Generator(np.random.PCG64DXSM(seed.spawn(1)[0]))
        self._thread: ThreadPoolExecutor | None = None
        self._ready: Future[npt.NDArray[np.float64]] | None = None
        self._count = 0

    def gaussian(self, count: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        """Independent centred Gaussians, (count,)."""
        if count < _MUCH:
            return super().gaussian(count, standard_deviation)
        again = count == self._count
        drawn = self._ready.result() if again and self._ready is not None else self._stream.standard_normal(count)
        self._count = count
        self._ready = None
        if again:  # who asked twice for as much asks again
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="noise")
            self._ready = self._thread.submit(self._stream.standard_normal, count)
        drawn *= standard_deviation
        return drawn


class SecretGenerator:
    """Randomness keyed with 256 bits of the operating system's entropy inside the process that uses it.

    *Guarantees*: two instances, two processes, and a process and its fork never share a stream; no seed reaches it; its
    state is never written, sent or restored (copying or pickling it raises).

    >>> a, b = SecretGenerator(), SecretGenerator()
    >>> bool((a.gaussian(4, 1.0) == b.gaussian(4, 1.0)).any())
    False
    """

    def __init__(self) -> None:
        self._process = -1
        self._stream: SeededGenerator | None = None

    def _keyed(self) -> SeededGenerator:
        # A forked child inherits this object's memory: without a new key it would repeat its parent's noise.
        process = os.getpid()
        if self._stream is None or process != self._process:
            # NumPy mixes a seed down to a pool of 128 bits unless the pool is made larger.
            self._stream = _Ahead(np.random.SeedSequence(secrets.randbits(256), pool_size=8))
            self._process = process
        return self._stream

    def bernoulli(self, count: int, probability: float) -> npt.NDArray[np.bool_]:
        """Independent coins, (count,)."""
        return self._keyed().bernoulli(count, probability)

    def gaussian(self, count: int, standard_deviation: float) -> npt.NDArray[np.float64]:
        """Independent centred Gaussians, (count,)."""
        return self._keyed().gaussian(count, standard_deviation)

    def __reduce__(self) -> NoReturn:
        raise TypeError("expected a generator that stays in its process, got a request to copy it; make a new one")


def public_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one public purpose of a recipe's seed; different purposes get independent streams.

    >>> int(public_generator(7, "partition").integers(1000)) == int(public_generator(7, "partition").integers(1000))
    True
    """
    return np.random.Generator(np.random.PCG64DXSM(public_seed(seed, *purpose)))


def public_seed(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for one public purpose of a recipe's seed.

    >>> public_seed(7, "partition") == public_seed(7, "initial weights")
    False
    """
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
