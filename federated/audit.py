"""Does one step leak more than its formula says? The mechanism is run thousands of times on neighbouring inputs.

A correct mechanism of noise multiplier z can be told from its neighbour no better than N(0, z²) from N(1, z²): for any
event, P ≤ e^ε·Q + δ(ε) with the closed form δ(ε). Here the inputs are the worst that anybody could choose, the events
are fixed in advance, and P and Q are bounded from counts. A violation proves a fault; none proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from tacit.federated.audit_cases import Case, mechanism_cases
from tacit.federated.lower_bounds import clopper_pearson, epsilon_from_rates, gaussian_delta, gaussian_epsilon
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness

__all__ = ["FAMILY_ALPHA", "WARNING_ALPHA", "Finding", "Verdict", "audit_mechanism", "default_trials", "judge_cases"]

Verdict = Literal["pass", "warn", "fail"]

# A verdict of "fail" is wrong with at most 1e-6 over a whole audit; half of that is this test's, half the canaries'.
FAMILY_ALPHA = 0.5e-6
WARNING_ALPHA = 0.05
# Where a score is cut, in standard deviations from halfway between the neighbours; fixed before anything is drawn.
_CUTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_MIDDLE = _CUTS.index(0.0)
_FEWEST_TRIALS, _MOST_TRIALS = 4_000, 25_000

_Scores = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # without and with the canary, (trials,) each


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What neighbouring inputs showed.

    Attributes:
        trials: releases on each of the two inputs of a case; fewer where a case is slow.
        cases: their names.
        epsilon: the largest ε that a case proves at the run's δ, at 95 % over all cases; a lower bound.
        claim: the closed form's ε of one release at that δ.
        estimate: ε at that δ if the noise is Gaussian (Dong et al. 2022), a 95 % interval from the first case; it
            decides nothing.
        verdict: "fail" on a violation at 1 - 5e-7 over all cases and cuts, "warn" on one at 95 %.
        reason: the case and the (ε, δ) that it rests on, in words; empty for "pass".
        noticed: the largest share of the claimed noise at which that many trials show on average that some is missing.
    """

    trials: int
    cases: tuple[str, ...]
    epsilon: float
    claim: float
    estimate: tuple[float, float]
    verdict: Verdict
    reason: str
    noticed: float


def default_trials(noise_multiplier: float) -> int:
    """Enough releases to notice that half of the noise is missing, within reason: their number grows with z².

    >>> default_trials(2.0), default_trials(8.0)
    (4000, 16000)
    """
    return int(min(max(_FEWEST_TRIALS, 250.0 * noise_multiplier**2), _MOST_TRIALS))


def audit_mechanism(
    mechanism: Mechanism,
    randomness: Randomness,
    *,
    trials: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Finding:
    """Runs one step, q = 1, of a mechanism on neighbouring inputs and compares the counts with its closed form.

    *Guarantees*: a mechanism whose releases are as private as a Gaussian's of multiplier z fails with probability at
    most 5e-7, and warns with at most 5 %.

    Args:
        mechanism: the run's; clip, noise, divisor and code path are its own.
        randomness: where the run's noise comes from.
        trials: releases on each input; by default as many as `default_trials` says.
        progress: told of cases done, cases altogether, and the name of the next one.

    Raises:
        PrivacyRefused: a mechanism that claims nothing.

    >>> from tacit.federated.noise import SecretGenerator
    >>> plan = {"steps_per_round": 1, "rounds": 1, "reference_size": 8, "delta": 1e-5}
    >>> local = Mechanism(unit="local", sample_rate=1.0, max_grad_norm=2.0, noise_multiplier=1.0, **plan)
    >>> audit_mechanism(local, SecretGenerator(), trials=200).verdict == "fail"
    False
    """
    if not mechanism.private:
        raise PrivacyRefused("expected a mechanism with a guarantee, got one that claims nothing; there is no claim")
    one_step = replace(mechanism, sample_rate=1.0, steps_per_round=1)
    count = trials or default_trials(mechanism.noise_multiplier)
    return judge_cases(one_step, mechanism_cases(one_step, randomness), trials=count, progress=progress)


def judge_cases(
    mechanism: Mechanism,
    cases: Sequence[Case],
    *,
    trials: int,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Finding:
    """Plays cases and judges what came out against the closed form of one Gaussian release."""
    scores = []
    for done, case in enumerate(cases):
        progress(done, len(cases), case.name)
        scores.append(_play(case, min(trials, case.most_trials)))
    z, delta, bounds = mechanism.noise_multiplier, mechanism.delta, 2 * len(cases) * len(_CUTS)
    verdict, reason = _verdict([case.name for case in cases], scores, z, bounds)
    rates = [pair for score in scores for pair in _rates(score, z, WARNING_ALPHA / bounds)]
    return Finding(
        trials=trials,
        cases=tuple(case.name for case in cases),
        epsilon=max(epsilon_from_rates(low, high, delta) for low, high in rates),
        claim=gaussian_epsilon(delta, z),
        estimate=_gaussian_estimate(scores[0], z, delta),
        verdict=verdict,
        reason=reason,
        noticed=_noticed_share(z, trials, FAMILY_ALPHA / bounds),
    )


def _play(case: Case, trials: int) -> _Scores:
    # Taken in turn: a generator that repeats itself meets both sides.
    pairs = np.array([(case.score(False), case.score(True)) for _ in range(trials)])
    pairs[np.isnan(pairs)] = math.inf  # a release that is no number is a sign that anybody can read
    return pairs[:, 0], pairs[:, 1]


def _verdict(names: Sequence[str], scores: Sequence[_Scores], z: float, bounds: int) -> tuple[Verdict, str]:
    levels: tuple[tuple[Verdict, float], ...] = (("fail", FAMILY_ALPHA), ("warn", WARNING_ALPHA))
    for verdict, alpha in levels:
        found = [_violation(name, pair, z, alpha / bounds) for name, pair in zip(names, scores, strict=True)]
        excess, reason = max(found)
        if excess > 0.0:
            return verdict, reason
    return "pass", ""


def _violation(name: str, pair: _Scores, z: float, alpha: float) -> tuple[float, str]:
    """By how much counts exceed the closed form at the worst cut, each at the ε where a Gaussian is just that bad."""
    found = []
    for cut, (low, high) in zip(_CUTS, _rates(pair, z, alpha), strict=True):
        allowed = abs(cut) / z  # the logarithm of the ratio of densities at the cut
        delta = gaussian_delta(allowed, z)
        proven = epsilon_from_rates(low, high, delta)
        words = f"{name}: ε ≥ {proven:.3f} at δ = {delta:.3g}, where the formula allows {allowed:.3f}"
        found.append((proven - allowed, words))
    return max(found)


def _rates(pair: _Scores, z: float, alpha: float) -> list[tuple[float, float]]:
    """For each cut, a lower bound of its event where that is likelier and an upper bound where it is rarer."""
    without, with_it = pair
    rates = []
    for cut in _CUTS:
        threshold = 0.5 + cut * z
        # Above the middle "more" speaks for the canary, below it "less" speaks against: both directions are claimed.
        likely, rare = with_it > threshold, without > threshold
        if cut < 0.0:
            likely, rare = ~rare, ~likely
        low, _ = clopper_pearson(int(likely.sum()), len(likely), alpha)
        _, high = clopper_pearson(int(rare.sum()), len(rare), alpha)
        rates.append((low, high))
    return rates


def _gaussian_estimate(pair: _Scores, z: float, delta: float) -> tuple[float, float]:
    """ε of the Gaussian whose neighbours the middle cut tells apart just so well: μ = Φ⁻¹(P) - Φ⁻¹(Q)."""
    from scipy.special import ndtri

    without, with_it = pair
    hits, false = int((with_it > 0.5).sum()), int((without > 0.5).sum())
    hit_low, hit_high = clopper_pearson(hits, len(with_it), WARNING_ALPHA / 4.0)
    false_low, false_high = clopper_pearson(false, len(without), WARNING_ALPHA / 4.0)
    distances = ndtri(hit_low) - ndtri(false_high), ndtri(hit_high) - ndtri(false_low)
    low, high = (gaussian_epsilon(delta, 1.0 / d) if 0.0 < d < math.inf else max(0.0, d) for d in map(float, distances))
    return low, high


def _noticed_share(z: float, trials: int, alpha: float) -> float:
    """Bisects for the noise at which the expected counts of the middle cut just violate the closed form."""
    from scipy.special import ndtr

    low, high, delta = 0.0, 1.0, gaussian_delta(0.0, z)
    for _ in range(20):
        share = 0.5 * (low + high)
        hits = round(trials * float(ndtr(0.5 / (share * z))))
        hit_low, _ = clopper_pearson(hits, trials, alpha)
        _, false_high = clopper_pearson(trials - hits, trials, alpha)
        missed = epsilon_from_rates(hit_low, false_high, delta) == 0.0
        low, high = (low, share) if missed else (share, high)
    return low
