"""Accountants against published figures, the closed form and each other."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from tacit.federated import accounting
from tacit.federated.accounting import (
    Event,
    calibrate_noise,
    cross_check,
    epsilon_pld,
    epsilon_rdp,
    merge,
    reported_epsilon,
    spend,
)

# q, noise multiplier, steps, delta, dp-accounting RDP, dp-accounting PLD at 1e-4, Opacus PRV; Poisson, add/remove.
# A to D are the settings of Opacus' and Microsoft's own unit tests, E is Abadi et al. 2016, K and J are exact.
KNOWN = {
    "A": (0.04, 1.5, 2250, 1e-5, 7.32933470, 6.76879, 6.77913),
    "B": (0.001, 0.8, 1000, 1e-6, 1.46188, 0.467695, 0.477771),
    "C": (0.05, 1.5, 1000, 1e-6, 6.66795, 6.19970, 6.20997),
    "D": (0.2, 3.0, 100, 1e-6, 3.63967, 3.37106, 3.38122),
    "E": (0.01, 4.0, 10000, 1e-5, 1.03549, 0.946999, 0.956936),
    "F": (256 / 60000, 1.1, 3515, 1e-5, 1.28114, 1.13374, 1.14379),
    "G": (256 / 60000, 1.1, 14062, 1e-5, 2.59656, 2.38169, 2.39174),
    "H": (0.08192, 3.0, 2500, 1e-5, 7.09849, 6.57890, 6.58923),
    "I": (0.1, 1.0, 100, 1e-3, 5.65505, 4.78435, 4.79489),
    "J": (1.0, 5.0, 20, 1e-5, 4.16162, 3.84861, 3.85882),
    "K": (1.0, 1.0, 1, 1e-5, 4.72851, 4.37718, 4.38741),
    "L": (0.01, 0.5, 1000, 1e-5, 15.47213, 13.36083, 13.37176),
    "M": (0.064, 1.0, 160, 1e-3, 4.40188, 3.72005, 3.73049),
}


def history(rate, noise, steps):
    return {Event(sample_rate=rate, noise_multiplier=noise): steps}


def closed_form_epsilon(noise, steps, delta):
    """Balle and Wang 2018, theorem 5, for `steps` Gaussians: together one with noise / sqrt(steps)."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0.0, 100.0)


@pytest.mark.parametrize("case", KNOWN)
def test_rdp_is_the_published_figure(case):
    rate, noise, steps, delta, rdp, _, _ = KNOWN[case]
    assert epsilon_rdp(history(rate, noise, steps), delta) == pytest.approx(rdp, abs=1e-4)


@pytest.mark.parametrize("case", KNOWN)
def test_pld_is_the_published_figure(case):
    rate, noise, steps, delta, _, pld, _ = KNOWN[case]
    assert epsilon_pld(history(rate, noise, steps), delta) == pytest.approx(pld, abs=1e-3)


@pytest.mark.parametrize("case", ["B", "E", "K", "M"])
def test_the_spend_states_three_accountants_that_agree(case):
    rate, noise, steps, delta, rdp, pld, prv = KNOWN[case]
    cost = spend(history(rate, noise, steps), delta)
    assert (cost.epsilon, cost.epsilon_rdp) == (pytest.approx(pld, abs=1e-3), pytest.approx(rdp, abs=1e-4))
    assert cost.epsilon_prv == pytest.approx(prv, abs=1e-4)
    assert cost.accountant.startswith("PLD (dp-accounting ")


@pytest.mark.parametrize(
    ("noise", "steps", "delta"), [(1.0, 1, 1e-5), (5.0, 20, 1e-5), (2.0, 3, 1e-3), (0.6, 1, 1e-6), (30.0, 400, 1e-8)]
)
def test_without_sampling_pld_is_the_closed_form_from_above(noise, steps, delta):
    exact = closed_form_epsilon(noise, steps, delta)
    found = epsilon_pld(history(1.0, noise, steps), delta)
    assert exact <= found <= exact + 1e-3
    assert epsilon_rdp(history(1.0, noise, steps), delta) > exact


@settings(max_examples=3, deadline=None)
@given(st.sampled_from([0.1, 1.0]), st.floats(1.2, 4.0), st.integers(1, 40), st.sampled_from([1e-3, 1e-5, 1e-6]))
def test_epsilon_rises_with_rate_and_steps_and_falls_with_noise_and_delta(rate, noise, steps, delta):
    for epsilon in (epsilon_rdp, partial(epsilon_pld, discretisation=1e-3)):
        here = epsilon(history(rate, noise, steps), delta)
        assert epsilon(history(rate, noise * 1.2, steps), delta) < here
        assert epsilon(history(rate, noise, steps + 10), delta) > here
        assert epsilon(history(rate * 0.8, noise, steps), delta) < here
        assert epsilon(history(rate, noise, steps), delta * 2) < here
    assert epsilon_pld(history(rate, noise, steps), delta) <= epsilon_rdp(history(rate, noise, steps), delta) + 1e-3


A, B = Event(sample_rate=1.0, noise_multiplier=4.0), Event(sample_rate=1.0, noise_multiplier=7.0)


def test_composition_does_not_depend_on_order_or_grouping():
    parts = [(A, 2), (B, 3), (A, 1), (B, 1)]
    assert merge(parts) == merge(parts[::-1]) == merge([(A, 3), (B, 4)]) == {A: 3, B: 4}
    assert merge([(A, 0)]) == {}
    for epsilon in (epsilon_pld, epsilon_rdp):
        assert epsilon({A: 3, B: 4}, 1e-5) == pytest.approx(epsilon({B: 4, A: 3}, 1e-5), abs=1e-6)
        assert epsilon({A: 3, B: 4}, 1e-5) > epsilon({A: 3, B: 3}, 1e-5) > epsilon({A: 3}, 1e-5)


def test_gaussians_of_two_kinds_compose_as_the_closed_form():
    mu = math.sqrt(3 / 16 + 4 / 49)
    assert epsilon_pld({A: 3, B: 4}, 1e-5) == pytest.approx(closed_form_epsilon(1 / mu, 1, 1e-5), abs=1e-3)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(4.377178, 1.0, 1), (1.0, 1.0, 20), (8.0, 0.1, 50), (0.3, 0.05, 10)]
)
def test_noise_is_calibrated_from_above(epsilon, rate, steps):
    noise = calibrate_noise(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=steps)
    assert epsilon_pld(history(rate, noise, steps), 1e-5) <= epsilon
    assert epsilon_pld(history(rate, noise * 0.995, steps), 1e-5) > epsilon


def test_calibrated_noise_for_one_gaussian_is_the_closed_form():
    noise = calibrate_noise(epsilon=closed_form_epsilon(1.0, 1, 1e-5), delta=1e-5, sample_rate=1.0, steps=1)
    assert 1.0 <= noise <= 1.003


def test_a_budget_near_the_end_of_pld_is_kept_by_the_figure_that_is_reported(monkeypatch):
    """Noise that PLD alone allows at 48 has an RDP above 50: the report would state that, and the ledger refuse.

    PLD takes many seconds up there; nine tenths of RDP stand in for it.
    """
    monkeypatch.setattr(accounting, "epsilon_pld", lambda h, delta, **_: 0.9 * epsilon_rdp(h, delta))
    noise = calibrate_noise(epsilon=48.0, delta=1e-5, sample_rate=0.001, steps=1)
    assert 49.9 < epsilon_rdp(history(0.001, noise, 1), 1e-5) <= 50.0
    assert reported_epsilon(history(0.001, noise, 1), 1e-5) <= 48.0
    assert reported_epsilon(history(0.001, 0.12, 1), 1e-5) == pytest.approx(51.1225, abs=1e-3)


def test_no_noise_meets_an_impossible_budget():
    with pytest.raises(ValueError, match="raise epsilon or plan fewer rounds"):
        calibrate_noise(epsilon=1e-7, delta=1e-12, sample_rate=1.0, steps=100)


def test_above_fifty_rdp_is_reported_and_pld_is_not_computed(monkeypatch):
    monkeypatch.setattr(accounting, "epsilon_pld", _must_not_run)
    monkeypatch.setattr(accounting, "epsilon_prv", _must_not_run)
    cost = spend(history(1.0, 0.5, 30), 1e-5)
    assert cost.epsilon == cost.epsilon_rdp > 50
    assert cost.epsilon == reported_epsilon(history(1.0, 0.5, 30), 1e-5)
    assert cost.epsilon_prv is None
    assert cost.accountant.startswith("RDP")


def _must_not_run(*_, **__):
    raise AssertionError("expected RDP alone")


def test_nothing_done_costs_nothing():
    cost = spend({}, 1e-5)
    assert (cost.epsilon, cost.epsilon_rdp, cost.epsilon_prv, cost.delta) == (0.0, 0.0, 0.0, 1e-5)


def test_an_accountant_that_did_not_finish_is_not_a_disagreement(monkeypatch):
    assert accounting.epsilon_prv(history(0.01, 1.0, 10), 1e-5, timeout_s=0.0) is None
    cross_check(pld=1.0, rdp=1.2, prv=None)


@pytest.mark.parametrize(
    ("rdp", "prv"),
    [(0.99, None), (0.99, 1.01), (1.2, 1.02), (1.2, 0.99), (math.nan, 1.0), (1.2, math.nan)],
)
def test_accountants_that_disagree_stop_the_run(rdp, prv):
    with pytest.raises(ArithmeticError, match="do not release"):
        cross_check(pld=1.0, rdp=rdp, prv=prv)


@pytest.mark.parametrize(("pld", "rdp", "prv"), [(1.0, 1.0, 1.0125), (1.0, 0.9995, 0.9995), (20.0, 30.0, 20.039)])
def test_accountants_within_their_error_budgets_agree(pld, rdp, prv):
    cross_check(pld=pld, rdp=rdp, prv=prv)


def test_the_spend_is_refused_when_an_accountant_is_wrong(monkeypatch):
    """A broken library, stood in for by one that is asked about half the steps."""
    real = accounting.epsilon_prv
    monkeypatch.setattr(accounting, "epsilon_prv", lambda h, delta: real({e: n // 2 for e, n in h.items()}, delta))
    with pytest.raises(ArithmeticError, match="PRV"):
        spend(history(1.0, 5.0, 20), 1e-5)


@pytest.mark.parametrize(("rate", "noise"), [(0.0, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)])
def test_events_without_privacy_or_sense_are_refused(rate, noise):
    with pytest.raises(ValueError, match="expected"):
        Event(sample_rate=rate, noise_multiplier=noise)
