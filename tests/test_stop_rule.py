"""When an account is full: against closed forms, and against the worst adversary that the rule lets play."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import binom
from scipy.stats import norm

from tacit.federated.accounting import Event, epsilon_pld, epsilon_rdp
from tacit.federated.stop_rule import filter_epsilon, fits, open_account, plan_fits

DELTA = 1e-5
ONE = Event(sample_rate=1.0, noise_multiplier=4.0)
TWO = Event(sample_rate=1.0, noise_multiplier=2.0)
SAMPLED = Event(sample_rate=0.1, noise_multiplier=1.0)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle & Wang 2018, theorem 8, for sensitivity over noise `mu`."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def divergence(event: Event, order: int) -> float:
    """Mironov, Talwar & Zhang 2019, equation 11: the sum over how often the record was drawn."""
    q, z = event.sample_rate, event.noise_multiplier
    terms = [
        binom(order, k) * (1 - q) ** (order - k) * q**k * math.exp((k * k - k) / (2 * z * z)) for k in range(order + 1)
    ]
    return math.log(sum(terms)) / (order - 1)


def converted(total: float, order: float, delta: float) -> float:
    """Canonne, Kamath & Steinke 2020, proposition 12."""
    return total + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)


@pytest.mark.parametrize("order", [2, 5, 17])
def test_the_filter_adds_up_divergences_of_one_order(order):
    total = 3 * divergence(ONE, order) + 7 * divergence(SAMPLED, order)
    assert divergence(ONE, order) == pytest.approx(order / (2 * 4.0**2))
    found = filter_epsilon({ONE: 3, SAMPLED: 7}, float(order), DELTA)
    assert found == pytest.approx(converted(total, order, DELTA), rel=1e-9)


def test_the_filter_costs_next_to_nothing_against_the_least_over_all_orders():
    """Its one order is the one at which the plan could be repeated most often; PLD would allow 80."""
    noise = 2.3070586609503976
    event = Event(sample_rate=0.4, noise_multiplier=noise)
    opening = open_account({event: 8}, 8.0, DELTA)
    assert opening.share == 1.0
    for count, within in ((68, True), (69, False)):
        assert (filter_epsilon({event: count}, opening.order, DELTA) <= 8.0) == within
        assert (epsilon_rdp({event: count}, DELTA) <= 8.0) == within


MIXED = {ONE: 4, SAMPLED: 6}
MIXED_EPSILON = epsilon_pld(MIXED, DELTA) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 9))
def test_within_a_plan_every_part_of_it_is_granted_and_more_only_by_the_filter(ones, samples):
    opening = open_account(MIXED, MIXED_EPSILON, DELTA)
    assert opening.share < 0.01, "PLD decides"
    history = {event: count for event, count in ((ONE, ones), (SAMPLED, samples)) if count}
    by_filter = filter_epsilon(history, opening.order, opening.share * DELTA) <= MIXED_EPSILON
    assert fits(history, opening, MIXED_EPSILON, DELTA) == ((ones <= 4 and samples <= 6) or by_filter)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("slack", [1.001, 1.02, 1.1])
def test_a_plan_and_what_is_besides_share_one_delta(mu, slack):
    """A Gaussian's δ is known exactly: what the plan leaves of δ is all that the filter gets, and not much less."""
    event = Event(sample_rate=1.0, noise_multiplier=1.0 / mu)
    epsilon = slack * epsilon_pld({event: 1}, DELTA)
    opening = open_account({event: 1}, epsilon, DELTA)
    if opening.share == 1.0:
        assert filter_epsilon({event: 1}, opening.order, DELTA) <= epsilon
        return
    spent = gaussian_delta(epsilon, mu) / DELTA
    assert opening.share + spent <= 1.0
    assert opening.share + spent > 0.98


def test_a_plan_of_two_kinds_is_decided_as_a_whole_by_pld():
    plan = {ONE: 10, SAMPLED: 20}
    tight = epsilon_pld(plan, DELTA)
    assert plan_fits(plan, tight + 1e-9, DELTA)
    assert not plan_fits(plan, tight - 1e-3, DELTA)
    assert epsilon_rdp(plan, DELTA) > tight + 0.05


def test_a_smaller_budget_takes_the_plan_away_and_a_larger_one_keeps_it():
    opening = open_account({ONE: 4}, epsilon_pld({ONE: 4}, DELTA) + 1e-9, DELTA)
    assert fits({ONE: 4}, opening, opening.epsilon, DELTA)
    assert fits({ONE: 4}, opening, 2 * opening.epsilon, DELTA)
    assert not fits({ONE: 4}, opening, 0.9 * opening.epsilon, DELTA)
    assert not fits({ONE: 4}, opening, opening.epsilon, DELTA / 10)


def test_without_an_opening_one_kind_of_event_goes_as_far_as_pld():
    epsilon = epsilon_pld({ONE: 3}, DELTA) + 1e-9
    assert [fits({ONE: n}, None, epsilon, DELTA) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert not fits({ONE: 3, TWO: 1}, None, epsilon, DELTA)
    assert fits({ONE: 1, TWO: 1}, None, 3 * epsilon, DELTA)
    other = {ONE: 2, Event(sample_rate=1.0, noise_multiplier=8.0): 2}
    assert plan_fits(other, epsilon, DELTA), "had it been planned"
    assert not fits(other, None, epsilon, DELTA)


def test_without_a_plan_the_filter_decides_alone():
    opening = open_account({}, 2.0, DELTA)
    assert (opening.plan, opening.share) == ({}, 1.0)
    for n in range(1, 40):
        assert fits({ONE: n}, opening, 2.0, DELTA) == (filter_epsilon({ONE: n}, opening.order, DELTA) <= 2.0)


# The worst adversary. It sees every output, and so the privacy loss so far, before it picks the next event; whoever
# tells two neighbouring data sets apart best reaches δ(ε) = E[(1 − exp(ε − loss))⁺]. Backward induction over a grid.

GRID = np.linspace(-12.0, 16.0, 1401)
COARSE = 0.01  # δ, large enough for a grid


def losses(event: Event, *, removed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probability and privacy loss of each output of a sampled Gaussian, on a grid of outputs."""
    z, q = event.noise_multiplier, event.sample_rate
    x = np.linspace(-14.0, 14.0, 1601) * z
    without, drawn = np.exp(-(x**2) / (2 * z * z)), np.exp(-((x - 1) ** 2) / (2 * z * z))
    mixed = (1 - q) * without + q * drawn
    here, there = (mixed, without) if removed else (without, mixed)
    here, there = here / here.sum(), there / there.sum()
    return here, np.log(here) - np.log(there)


def worst(allowed, events: tuple[Event, ...], epsilon: float, *, removed: bool) -> float:
    kernels = [losses(event, removed=removed) for event in events]
    known: dict[tuple[int, ...], np.ndarray] = {}

    def value(counts: tuple[int, ...]) -> np.ndarray:
        if counts not in known:
            best = np.maximum(1.0 - np.exp(epsilon - GRID), 0.0)  # stop here
            for place, (probability, loss) in enumerate(kernels):
                after = tuple(count + (place == other) for other, count in enumerate(counts))
                if allowed({event: count for event, count in zip(events, after, strict=True) if count}):
                    ahead = np.interp(GRID[:, None] + loss[None, :], GRID, value(after)) @ probability
                    best = np.maximum(best, ahead)
            known[counts] = best
        return known[counts]

    return float(np.interp(0.0, GRID, value((0,) * len(events))))


RARE = Event(sample_rate=0.05, noise_multiplier=0.4)  # mostly harmless, sometimes very revealing
STEADY = Event(sample_rate=1.0, noise_multiplier=2.0)


def test_no_choice_of_events_by_earlier_outputs_exceeds_delta():
    """The negative control decides by PLD what may be added, each time anew: an adversary gains 40 % of δ by that."""
    epsilon = epsilon_pld({STEADY: 3}, COARSE) + 1e-6
    opening = open_account({STEADY: 3}, epsilon, COARSE)
    rule = partial(fits, opening=opening, epsilon=epsilon, delta=COARSE)
    for removed in (True, False):
        assert worst(rule, (STEADY, RARE), epsilon, removed=removed) < 1.005 * COARSE

    def naive(history):
        return epsilon_pld(history, COARSE, discretisation=1e-3) <= epsilon

    assert worst(naive, (STEADY, RARE), epsilon, removed=True) > 1.3 * COARSE


def test_an_account_that_leaves_its_plan_stays_within_delta():
    """A plan that uses 0.98 of δ at ε; the adversary may leave it for other events as far as the filter lets it."""
    epsilon = 1.015 * epsilon_pld({STEADY: 3}, COARSE)
    opening = open_account({STEADY: 3}, epsilon, COARSE)
    gentle = Event(sample_rate=1.0, noise_multiplier=5.0)
    assert 0.0 < opening.share < 0.2
    rule = partial(fits, opening=opening, epsilon=epsilon, delta=COARSE)
    assert rule({STEADY: 1, gentle: 1}), "there is something besides the plan"
    assert max(worst(rule, (STEADY, gentle), epsilon, removed=side) for side in (True, False)) < 1.005 * COARSE
