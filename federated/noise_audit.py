"""Is the noise what the ledger says: Gaussian, of the stated size, and never the same twice?

What a mechanism releases of nothing is its noise alone. Each check gives a p-value that is exact or nearly so for
correct noise; the alarm is at 1e-9 over all of them together.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness

__all__ = ["NOISE_ALARM", "NoiseFinding", "audit_noise", "released_noise"]

NOISE_ALARM = 1e-9
_DRAWS = 200_000
_COMPARED = 2**15  # draws of each stream that are compared at every lag
_CHILD_LIMIT_S = 60.0

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class NoiseFinding:
    """What the noise looked like.

    Attributes:
        draws: of each stream.
        p_values: by check; each small one is suspicious.
        measured: standard deviation over the claimed one.
        verdict: "fail" when the smallest p-value times their number is below 1e-9.
        reason: the check that failed, in words; empty otherwise.
    """

    draws: int
    p_values: Mapping[str, float]
    measured: float
    verdict: Literal["pass", "fail"]
    reason: str


def audit_noise(mechanism: Mechanism, randomness: Randomness, *, draws: int = _DRAWS) -> NoiseFinding:
    """Compares a mechanism's noise with N(0, (zC)²), and its streams with each other.

    Two releases of one generator, and those of two forks of this process, must have nothing in common at any lag: a
    child that repeats its parent's noise lets it be subtracted.

    *Guarantees*: correct noise fails with probability at most 1e-9; at 200,000 draws noise of 0.97 times the stated
    size fails, with a probability of about one.

    Args:
        mechanism: the run's.
        randomness: where the run's noise comes from.
        draws: coordinates of each release.

    Raises:
        PrivacyRefused: a mechanism that adds no noise.

    >>> from tacit.federated.noise import SecretGenerator
    >>> plan = {"steps_per_round": 1, "rounds": 1, "reference_size": 8, "delta": 1e-5}
    >>> local = Mechanism(unit="local", sample_rate=1.0, max_grad_norm=2.0, noise_multiplier=1.0, **plan)
    >>> audit_noise(local, SecretGenerator(), draws=5000).verdict
    'pass'
    """
    if not mechanism.private:
        raise PrivacyRefused("expected a mechanism with a guarantee, got one that adds no noise; there is no claim")
    first, second = (released_noise(mechanism, randomness, draws) for _ in range(2))
    p_values = {**_distribution(first), "two releases": _alike(first, second)}
    children = [values for _ in range(2) if (values := _in_a_fork(randomness, min(draws, _COMPARED))) is not None]
    for number, child in enumerate(children, 1):
        p_values[f"fork {number} and its parent"] = min(1.0, 2.0 * min(_alike(first, child), _alike(second, child)))
    if len(children) == 2:
        p_values["two forks"] = _alike(*children)
    p_values["values that come again"] = _repeats(randomness, draws)
    name = min(p_values, key=lambda key: p_values[key])
    failed = p_values[name] * len(p_values) < NOISE_ALARM
    measured = float(np.sqrt(np.mean(first**2)))
    words = f"{name}: p = {p_values[name]:.1g}, standard deviation {measured:.3f} times the stated one"
    return NoiseFinding(
        draws=draws,
        p_values=p_values,
        measured=measured,
        verdict="fail" if failed else "pass",
        reason=words if failed else "",
    )


def released_noise(mechanism: Mechanism, randomness: Randomness, draws: int) -> Values:
    """What a mechanism releases of nothing, in units of the noise that it claims: N(0, 1) each, (draws,)."""
    scale = mechanism.noise_multiplier * mechanism.max_grad_norm
    nothing = {"noise": np.zeros(draws, np.float32)}
    if mechanism.unit == "record":
        (mean,) = mechanism.noisy_mean([], [torch.Size([draws])], randomness)
        return mean.double().numpy() * mechanism.normaliser / scale
    if mechanism.unit == "client":
        average = mechanism.noisy_average([], nothing, randomness)["noise"]
        return average.astype(np.float64) * mechanism.normaliser / scale
    return mechanism.release_locally(nothing, randomness)["noise"] / (2.0 * scale)


def _distribution(values: Values) -> dict[str, float]:
    """p-values of N(0, 1): location, size, shape, and what lies far out, where δ lives."""
    from scipy.special import ndtr
    from scipy.stats import binomtest, chi2, kstest

    count = len(values)
    squares = float(np.sum(values**2))
    beyond = int(np.sum(np.abs(values) > 3.0))
    return {
        "mean": 2.0 * float(ndtr(-abs(math.sqrt(count) * values.mean()))),
        "size": 2.0 * float(min(chi2.sf(squares, count), chi2.cdf(squares, count))),
        "shape": float(kstest(values, "norm").pvalue),
        "tails": float(binomtest(beyond, count, 2.0 * float(ndtr(-3.0))).pvalue),
    }


def _alike(one: Values, other: Values) -> float:
    """p-value of independence, at every lag and in both directions of time.

    Given the second, the product of independent Gaussians with it, over its norm, is exactly N(0, 1) at each circular
    lag; the union bound makes one p-value of them.
    """
    from scipy.special import ndtr

    size = min(len(one), len(other), _COMPARED)
    x, y = one[:size], other[:size]
    spectrum = np.fft.rfft(x)
    products = [np.fft.irfft(spectrum * partner, n=size) for partner in (np.conj(np.fft.rfft(y)), np.fft.rfft(y))]
    largest = max(float(np.abs(product).max()) for product in products) / float(np.linalg.norm(y))
    return min(1.0, 4.0 * size * float(ndtr(-largest)))


def _repeats(randomness: Randomness, draws: int) -> float:
    """p-value of as many equal pairs of draws: 52 random bits hardly ever agree, a stream that begins again does."""
    from scipy.stats import poisson

    values = np.concatenate([randomness.gaussian(draws, 1.0) for _ in range(2)])
    pairs = len(values) - len(np.unique(values))
    return float(poisson.sf(pairs - 1, len(values) ** 2 / 2.0 * 2.0**-50))


def _in_a_fork(randomness: Randomness, draws: int) -> Values | None:
    """Noise that a forked child draws, or None where nothing forks."""
    if not hasattr(os, "fork"):
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child draws, writes and leaves: it waits for no thread of its parent's.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _draw_and_leave(randomness, draws, writer)
    os.close(writer)
    try:
        content = _read_all(reader)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # it has written everything, or will never
        os.waitpid(child, 0)
    if len(content) != 8 * draws:
        raise RuntimeError(f"expected {8 * draws} bytes of noise from a forked child, got {len(content)}; run it again")
    return np.frombuffer(content, dtype=np.float64)


def _draw_and_leave(randomness: Randomness, draws: int, writer: int) -> None:
    try:
        left = memoryview(randomness.gaussian(draws, 1.0).tobytes())
        while left:
            left = left[os.write(writer, left) :]
    finally:
        os._exit(0)


def _read_all(reader: int) -> bytes:
    """What a child writes until it is done, or until it has taken far too long."""
    pieces = []
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while selector.select(_CHILD_LIMIT_S) and (piece := os.read(reader, 1 << 16)):
            pieces.append(piece)
    return b"".join(pieces)
