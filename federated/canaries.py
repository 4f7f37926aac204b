"""Canaries through the real round loop: records or owners that a secret coin put in, and whether one can tell which.

One training with m canaries gives m guesses (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training
run"). Their gradients are random directions (Andrew et al. 2024, "One-shot empirical privacy estimation for federated
learning"); the score of one is what was observed along its direction. All that they prove is a lower bound, and a loose
one: a smoke alarm for errors of ten times, not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tacit.federated.accounting import reported_epsilon
from tacit.federated.audit import FAMILY_ALPHA, WARNING_ALPHA, Verdict
from tacit.federated.canary_run import CanaryRun, affordable_rounds, plant, train_with_canaries
from tacit.federated.lower_bounds import epsilon_from_guesses
from tacit.federated.mechanism import Mechanism, PrivacyRefused

__all__ = ["CanaryFinding", "audit_canaries", "guess"]

# Shares of the canaries that are guessed to be in (the highest scores) and out (the lowest), fixed in advance.
_GUESSES = ((0.05, 0.0), (0.1, 0.0), (0.2, 0.0), (0.35, 0.0), (0.5, 0.0), (0.1, 0.1), (0.25, 0.25), (0.5, 0.5))
_MARKS = 2  # rounds after which the scores are read
_ALARM_DELTA = 1e-10


@dataclass(frozen=True, kw_only=True)
class CanaryFinding:
    """What guessing canaries proved.

    Attributes:
        canaries: m.
        rounds: that were run; no more than the recipe's, fewer where owners are many.
        epsilon: lower bound after these rounds at the run's δ, at 95 %.
        claim: ε of these rounds by the accountant.
        alarm_rounds: rounds after which a bound could exceed the claim if the mechanism were badly wrong.
        alarm_delta: the δ of the alarm, at most the run's.
        alarm_epsilon: lower bound after those rounds at that δ, at 1 - 5e-7.
        alarm_claim: ε of those rounds at that δ.
        provable: what an alarm could prove at best; where the claim is above it, more canaries are needed.
        verdict: "fail" on a bound above its claim at 1 - 5e-7 over both, "warn" at 95 %.
        reason: in words; empty for "pass".
    """

    canaries: int
    rounds: int
    epsilon: float
    claim: float
    alarm_rounds: int
    alarm_delta: float
    alarm_epsilon: float
    alarm_claim: float
    provable: float
    verdict: Verdict
    reason: str


def audit_canaries(
    run: CanaryRun, *, canaries: int = 2000, progress: Callable[[int, int], None] = lambda done, total: None
) -> CanaryFinding:
    """Trains with canaries that fair coins put in, guesses the coins, and bounds ε from below.

    At record level a canary is a record of one of the owners, and the adversary sees each owner's uploads. At client
    level it is a client, and the adversary sees the models. At unit local it is an owner that holds one of two opposite
    records, and the adversary sees its uploads.

    *Guarantees*: a mechanism that keeps its (ε, δ) fails with probability at most 5e-7, and warns with at most 5 %.

    Args:
        run: what they are put into.
        canaries: m, at least 40.
        progress: told of rounds done, and rounds altogether.

    Raises:
        PrivacyRefused: a mechanism that claims nothing.
        ValueError: too few canaries.
    """
    mechanism = run.mechanism
    if not mechanism.private:
        raise PrivacyRefused("expected a mechanism with a guarantee, got one that claims nothing; there is no claim")
    if canaries < 40:
        raise ValueError(f"expected at least 40 canaries, got {canaries}; the bound would be 0 whatever happens")
    rounds = affordable_rounds(mechanism, canaries, len(run.owners))
    alarm_rounds = _alarm_rounds(mechanism, canaries, rounds)
    planted = plant(run, canaries)
    scores = train_with_canaries(run, planted, rounds, {alarm_rounds, rounds}, progress)
    return _judge(mechanism, planted.coins, {marked: scores[marked] for marked in (alarm_rounds, rounds)})


def guess(scores: npt.NDArray[np.float64], coins: npt.NDArray[np.bool_], delta: float, alpha: float) -> float:
    """The best lower bound of ε over numbers of guesses that were fixed in advance, wrong with probability at most α.

    Args:
        scores: (canaries,), higher for those that seem to be in.
        coins: (canaries,), whether they were.
        delta: the δ of (ε, δ).
        alpha: over all numbers of guesses together.

    >>> coins = np.arange(1000) % 2 == 0
    >>> round(guess(coins.astype(np.float64), coins, 0.0, 0.05), 2)
    5.28
    """
    order, best = np.argsort(-scores, kind="stable"), 0.0
    for top, bottom in _GUESSES:
        highest, lowest = order[: round(top * len(order))], order[len(order) - round(bottom * len(order)) :]
        correct = int(coins[highest].sum()) + int((~coins[lowest]).sum())
        guesses = len(highest) + len(lowest)
        bound = epsilon_from_guesses(
            canaries=len(coins), guesses=guesses, correct=correct, delta=delta, alpha=alpha / len(_GUESSES)
        )
        best = max(best, bound)
    return best


def _claim(mechanism: Mechanism, rounds: int, delta: float) -> float:
    # A coarse grid reports more, never less: the claim that a bound has to exceed is on the safe side.
    return reported_epsilon({mechanism.event: rounds * mechanism.events_per_round}, delta, discretisation=1e-3)


def _provable(mechanism: Mechanism, canaries: int) -> float:
    """What an alarm would prove if every second canary were guessed and every guess were right."""
    half = round(0.5 * canaries)
    alpha = FAMILY_ALPHA / (_MARKS * len(_GUESSES))
    return epsilon_from_guesses(
        canaries=canaries, guesses=half, correct=half, delta=_alarm_delta(mechanism), alpha=alpha
    )


def _alarm_delta(mechanism: Mechanism) -> float:
    # Guesses refute a claim at δ with a confidence of about 1 - δ at best, so the alarm holds the mechanism to its
    # claim at a smaller one; that ε is larger, and just as much a claim.
    return min(mechanism.delta, _ALARM_DELTA)


def _alarm_rounds(mechanism: Mechanism, canaries: int, rounds: int) -> int:
    """The most rounds whose claim is half of what could be proven; after many more no guessing could exceed it."""
    most, delta = 0.5 * _provable(mechanism, canaries), _alarm_delta(mechanism)
    low, high = 1, rounds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _claim(mechanism, middle, delta) <= most else (low, middle - 1)
    return low


def _judge(
    mechanism: Mechanism, coins: npt.NDArray[np.bool_], scores: Mapping[int, npt.NDArray[np.float64]]
) -> CanaryFinding:
    verdict: Verdict = "pass"
    reason, bounds, claims = "", {}, {}
    levels: tuple[tuple[Verdict, float, float], ...] = (
        ("warn", WARNING_ALPHA, mechanism.delta),
        ("fail", FAMILY_ALPHA, _alarm_delta(mechanism)),
    )
    for level, alpha, delta in levels:
        for rounds in scores:
            bound = bounds[level, rounds] = guess(scores[rounds], coins, delta, alpha / _MARKS)
            claim = claims[level, rounds] = _claim(mechanism, rounds, delta)
            if bound > claim:
                verdict, reason = level, f"{rounds} rounds: ε ≥ {bound:.3f} at δ = {delta:g}, claimed {claim:.3f}"
    first, last = min(scores), max(scores)
    return CanaryFinding(
        canaries=len(coins),
        rounds=last,
        epsilon=bounds["warn", last],
        claim=claims["warn", last],
        alarm_rounds=first,
        alarm_delta=_alarm_delta(mechanism),
        alarm_epsilon=bounds["fail", first],
        alarm_claim=claims["fail", first],
        provable=_provable(mechanism, len(coins)),
        verdict=verdict,
        reason=reason,
    )
