"""What counts of an attack's hits prove about ε: lower bounds that hold at a stated confidence, and the closed form.

A bound here is a statement about data, not about an algorithm: "unless something of probability α happened, the
mechanism is not (ε, δ)-DP for any smaller ε". Thresholds and numbers of guesses must be fixed before the data are seen.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "clopper_pearson",
    "epsilon_from_guesses",
    "epsilon_from_rates",
    "gaussian_delta",
    "gaussian_epsilon",
    "guesses_p_value",
]

_LARGEST_EPSILON = 1e4


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """The least δ at which one Gaussian release is (ε, δ)-DP (Balle and Wang 2018, theorem 8).

    δ(ε) = Φ(1/(2z) - εz) - e^ε Φ(-1/(2z) - εz)

    Args:
        epsilon: ε ≥ 0.
        noise_multiplier: z, the noise's standard deviation over the sensitivity, > 0.

    >>> round(gaussian_delta(1.0, 1.0), 6)  # dp-accounting's own known answer
    0.126937
    """
    from scipy.special import log_ndtr

    half, shift = 0.5 / noise_multiplier, epsilon * noise_multiplier
    first, second = float(log_ndtr(half - shift)), epsilon + float(log_ndtr(-half - shift))
    # In logarithms, because far out both terms are tiny and nearly equal.
    return math.exp(first) * -math.expm1(second - first) if second < first else 0.0


def gaussian_epsilon(delta: float, noise_multiplier: float) -> float:
    """The least ε at which one Gaussian release is (ε, δ)-DP, from above.

    >>> round(gaussian_epsilon(1e-5, 1.0), 4)  # exact: 4.377178
    4.3772
    """
    if gaussian_delta(0.0, noise_multiplier) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, noise_multiplier) > delta:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if gaussian_delta(middle, noise_multiplier) <= delta else (middle, high)
    return high


def clopper_pearson(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Bounds of a probability, each of them wrong with probability at most α (Clopper and Pearson 1934).

    Args:
        hits: successes.
        trials: independent attempts, at least 1.
        alpha: error probability of each bound; together they are wrong with at most 2α.

    Returns:
        Lower and upper bound.

    >>> low, high = clopper_pearson(0, 10, 0.05)
    >>> low, round(high, 4)  # 1 - 0.05^(1/10)
    (0.0, 0.2589)
    """
    from scipy.special import betaincinv

    if not 0 <= hits <= trials or trials < 1 or not 0.0 < alpha < 1.0:
        raise ValueError(f"expected 0 <= hits <= trials and 0 < alpha < 1, got {hits=}, {trials=}, {alpha=}")
    misses = trials - hits
    low = float(betaincinv(hits, misses + 1, alpha)) if hits else 0.0
    high = 1.0 - float(betaincinv(misses, hits + 1, alpha)) if misses else 1.0
    return low, high


def epsilon_from_rates(hit_rate_low: float, false_rate_high: float, delta: float) -> float:
    """The ε that an event proves: (ε, δ)-DP allows P(S) ≤ e^ε·Q(S) + δ, so ε ≥ ln((P - δ)/Q).

    Args:
        hit_rate_low: a lower bound of the event's probability on one data set.
        false_rate_high: an upper bound of it on the neighbour, > 0.
        delta: the δ.

    >>> round(epsilon_from_rates(0.5, 0.25, 0.0), 4), epsilon_from_rates(0.1, 0.2, 0.0)
    (0.6931, 0.0)
    """
    excess = hit_rate_low - delta
    return max(0.0, math.log(excess / false_rate_high)) if excess > 0.0 else 0.0


def guesses_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely an (ε, δ)-DP algorithm lets somebody guess so well (Steinke, Nasr and Jagielski 2023, theorem 5.2).

    Each canary is in or out by a fair coin of its own; for some of them one guesses which. With β = P[B ≥ v] for
    B ~ Binomial(r, e^ε/(1 + e^ε)), the probability of v correct guesses is at most

        β + 2mδ · max_i P[v - i ≤ B < v] / i

    Args:
        canaries: m, coins that were thrown.
        guesses: r ≤ m, how many coins were guessed; fixed in advance.
        correct: v ≤ r.
        epsilon: ε ≥ 0 of the claim.
        delta: δ of the claim.

    >>> round(guesses_p_value(canaries=100, guesses=50, correct=25, epsilon=0.0, delta=0.0), 4)
    0.5561
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"expected correct <= guesses <= canaries, got {correct=}, {guesses=}, {canaries=}")
    from scipy.special import expit
    from scipy.stats import binom

    tails = np.asarray(binom.sf(np.arange(correct, -1, -1) - 1, guesses, expit(epsilon)))  # P[B >= v], P[B >= v-1], ...
    spill = (tails[1:] - tails[0]) / np.arange(1, correct + 1)
    return min(1.0, float(tails[0] + 2.0 * canaries * delta * spill.max(initial=0.0)))


def epsilon_from_guesses(*, canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """The largest ε that so many correct guesses refute, wrong with probability at most α; 0 when they refute none.

    >>> round(epsilon_from_guesses(canaries=1000, guesses=1000, correct=1000, delta=0.0, alpha=0.05), 2)
    5.81
    """
    facts = {"canaries": canaries, "guesses": guesses, "correct": correct, "delta": delta}
    low, high = 0.0, 1.0
    if guesses == 0 or guesses_p_value(**facts, epsilon=0.0) > alpha:  # type: ignore[arg-type]  # counts are integers
        return 0.0
    while high < _LARGEST_EPSILON and guesses_p_value(**facts, epsilon=high) <= alpha:  # type: ignore[arg-type]  # as above
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        refuted = guesses_p_value(**facts, epsilon=middle) <= alpha  # type: ignore[arg-type]  # as above
        low, high = (middle, high) if refuted else (low, middle)
    return low
