"""The audit must find every deliberate fault, and find none where there is none."""

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from tacit.federated import mechanism as mechanism_module
from tacit.federated.accounting import epsilon_pld
from tacit.federated.audit import audit_mechanism, default_trials, judge_cases
from tacit.federated.audit_cases import Case, mechanism_cases
from tacit.federated.canaries import guess
from tacit.federated.clipping import clip_update, clipped_sum
from tacit.federated.lower_bounds import (
    clopper_pearson,
    epsilon_from_guesses,
    epsilon_from_rates,
    gaussian_delta,
    gaussian_epsilon,
    guesses_p_value,
)
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.noise_audit import audit_noise, released_noise
from tacit.federated.secure_noise import SecureGenerator

pytestmark = pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning")

TRIALS = 500
UNITS = ["record", "client", "local"]
PLAINEST = ["a record alone", "a client alone", "an owner with the opposite update"]
NOT_FINITE = ["a record that is not finite", "a client that is not finite", "an owner that is not finite"]


def make(unit="record", **changed):
    settings = {
        "unit": unit,
        "sample_rate": 1.0,
        "max_grad_norm": 2.5,  # not 1: a factor C that is forgotten must show
        "noise_multiplier": 0.7,
        "steps_per_round": 1,
        "rounds": 1,
        "reference_size": 20,
        "delta": 1e-5,
    }
    return Mechanism(**{**settings, **changed})


def audited(mechanism, randomness=None, *, trials=TRIALS, only=None):
    """The cases of some names; all but the trainer's, whose trials are slow, when none are given."""
    cases = mechanism_cases(mechanism, randomness or generator(mechanism))
    chosen = [c for c in cases if (c.name in only if only else c.name != "a step of the trainer")]
    return judge_cases(mechanism, chosen, trials=trials)


def generator(mechanism):
    """As a run's, but with a known key, so that a test says the same each time."""
    return SecureGenerator._with_known_key(bytes(32)) if mechanism.hardened else SeededGenerator(11)


class Altered(SeededGenerator):
    """A generator with a fault in its Gaussians."""

    def __init__(self, fault):
        super().__init__(12)
        self.fault = fault

    def gaussian(self, count, standard_deviation):
        return self.fault(super().gaussian(count, standard_deviation), standard_deviation)


# The bounds.


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (1, 50), (25, 50), (49, 50), (50, 50)])
def test_a_clopper_pearson_bound_is_where_the_binomial_tail_has_exactly_the_error_probability(hits, trials):
    low, high = clopper_pearson(hits, trials, 1e-6)
    if hits:
        assert stats.binom.sf(hits - 1, trials, low) == pytest.approx(1e-6, rel=1e-6)
    if hits < trials:
        assert stats.binom.cdf(hits, trials, high) == pytest.approx(1e-6, rel=1e-6)
    assert (low == 0.0) == (hits == 0)
    assert (high == 1.0) == (hits == trials)


@pytest.mark.parametrize("noise", [0.3, 1.0, 7.0])
def test_the_closed_form_is_the_integral_that_defines_delta(noise):
    for epsilon in (0.0, 0.1, 1.0, 3.0):
        grid = np.linspace(-40.0, 40.0, 400_001) * max(1.0, noise)
        excess = stats.norm.pdf(grid, 1.0, noise) - math.exp(epsilon) * stats.norm.pdf(grid, 0.0, noise)
        integral = np.trapezoid(np.maximum(excess, 0.0), grid)
        assert gaussian_delta(epsilon, noise) == pytest.approx(integral, rel=1e-4, abs=1e-9)


def test_the_closed_form_has_its_published_values_and_agrees_with_the_accountant():
    assert gaussian_epsilon(1e-5, 1.0) == pytest.approx(4.377178, abs=1e-5)
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126937, abs=1e-6)  # dp-accounting's tests
    step = make(noise_multiplier=2.0).event
    pld = epsilon_pld({step: 1}, 1e-5)
    assert pld - 1e-3 <= gaussian_epsilon(1e-5, 2.0) <= pld


def test_the_closed_form_does_not_lose_itself_far_out():
    assert 0.0 < gaussian_delta(60.0, 0.1) < 1.0
    assert gaussian_delta(500.0, 1.0) >= 0.0
    assert gaussian_epsilon(0.5, 10.0) == 0.0


def naive_p_value(m, r, v, epsilon, delta):
    """Step by step as the paper's appendix gives it."""
    q = math.exp(epsilon) / (1.0 + math.exp(epsilon))
    beta = sum(stats.binom.pmf(k, r, q) for k in range(v, r + 1))
    worst, total = 0.0, 0.0
    for i in range(1, v + 1):
        total += stats.binom.pmf(v - i, r, q)
        worst = max(worst, total / i)
    return min(1.0, beta + 2 * m * delta * worst)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize(("m", "r", "v"), [(10, 10, 9), (100, 30, 30), (100, 100, 55), (50, 1, 0), (50, 0, 0)])
def test_the_p_value_of_guesses_is_the_papers(m, r, v, delta):
    for epsilon in (0.0, 0.5, 2.0):
        found = guesses_p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)
        assert found == pytest.approx(naive_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-12)


def test_the_bound_from_guesses_has_jax_privacys_known_answer():
    """10,000 evenly spaced normal scores a side, 4 apart, δ = 1e-6, 5 % over the corners of the curve's hull."""
    shift, expected = 4.0, 4.395568
    out = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    thresholds = np.append(np.union1d(out, out + shift), np.inf)
    corners = []
    for point in zip(np.searchsorted(out + shift, thresholds), np.searchsorted(out, thresholds), strict=True):
        while len(corners) > 1 and cross(corners[-2], corners[-1], point) >= 0:
            corners.pop()
        corners.append(point)
    counts = [(int(20_000 - a - b), int(10_000 - a)) for a, b in corners if a + b < 20_000]
    precise = [(r, v) for r, v in counts if 0.998 < v / r < 0.9995]
    bounds = [
        epsilon_from_guesses(canaries=20_000, guesses=r, correct=v, delta=1e-6, alpha=0.05 / len(corners))
        for r, v in precise
    ]
    assert max(bounds) == pytest.approx(expected, abs=1e-5)


def cross(origin, a, b):
    return (a[0] - origin[0]) * (b[1] - origin[1]) - (a[1] - origin[1]) * (b[0] - origin[0])


def test_randomised_response_is_bounded_below_its_epsilon_and_near_it():
    coins = SeededGenerator(1).bernoulli(20_000, 0.5)
    told = coins ^ SeededGenerator(2).bernoulli(20_000, 1.0 / (1.0 + math.e))  # ε = 1
    bound = guess(told + 0.0, coins, 0.0, 1e-6)
    assert 0.8 < bound < 1.0


def test_events_that_are_as_likely_on_both_sides_prove_nothing():
    assert epsilon_from_rates(0.2, 0.2, 0.0) == 0.0
    assert epsilon_from_rates(0.2, 0.1, 0.3) == 0.0
    assert epsilon_from_guesses(canaries=1000, guesses=500, correct=250, delta=0.0, alpha=0.05) == 0.0


# One step against its formula.


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_a_correct_mechanism_does_not_fail(unit, hardened):
    found = audited(make(unit, hardened=hardened))
    assert found.verdict != "fail"
    assert found.epsilon < found.claim == gaussian_epsilon(1e-5, 0.7)


@pytest.mark.parametrize("unit", UNITS)
def test_a_correct_step_of_the_trainer_does_not_fail_and_one_with_a_quarter_of_the_noise_does(unit):
    mechanism = make(unit)
    assert audited(mechanism, trials=200, only=["a step of the trainer"]).verdict != "fail"
    short = Altered(lambda noise, _: noise / 4.0)
    assert audited(mechanism, short, trials=200, only=["a step of the trainer"]).verdict == "fail"


@pytest.mark.parametrize("unit", UNITS)
def test_the_bound_is_not_vacuous(unit):
    found = audited(make(unit, noise_multiplier=1.0), trials=1000, only=PLAINEST)
    assert found.epsilon > 0.2 * found.claim
    assert found.estimate[0] > 0.6 * found.claim
    assert found.noticed > 0.5


FAULTS = {
    "no noise": lambda noise, _: np.zeros_like(noise),
    "half the noise": lambda noise, _: noise / 2.0,
    "noise without the clip's factor": lambda noise, _: noise / 2.5,
    "the same noise for all coordinates": lambda noise, _: np.full_like(noise, noise[0]),
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_noise_fails(unit, fault):
    found = audited(make(unit), Altered(FAULTS[fault]), only=PLAINEST)
    assert found.verdict == "fail"
    assert "where the formula allows" in found.reason


@pytest.mark.parametrize("unit", UNITS)
def test_noise_that_comes_again_fails(unit):
    class Again(SecretGenerator):
        def gaussian(self, count, standard_deviation):
            return SeededGenerator(7).gaussian(count, standard_deviation)

    found = audited(make(unit), Again(), only=["two releases, one subtracted"])
    assert found.verdict == "fail"


def each_tensor_clipped(gradients, bound):
    return [clipped_sum([g], bound)[0] for g in gradients]


def those_of_no_dimension_left_alone(gradients, bound):
    return [c if g.ndim > 1 else g.sum(0) for g, c in zip(gradients, clipped_sum(gradients, bound), strict=True)]


def nothing_clipped(gradients, bound):
    return [g.sum(0) for g in gradients]


@pytest.mark.parametrize("fault", [each_tensor_clipped, those_of_no_dimension_left_alone, nothing_clipped])
def test_a_faulty_clip_of_records_fails(fault, monkeypatch):
    monkeypatch.setattr(mechanism_module, "clipped_sum", fault)
    assert audited(make("record"), only=["a record among others"]).verdict == "fail"


def each_array_clipped(update, bound):
    return {name: clip_update({name: array}, bound)[name] for name, array in update.items()}


def scalars_left_alone(update, bound):
    return {n: c if c.ndim else np.asarray(update[n], np.float64) for n, c in clip_update(update, bound).items()}


def twice_the_bound(update, bound):
    return clip_update(update, 2.0 * bound)


@pytest.mark.parametrize("unit", ["client", "local"])
@pytest.mark.parametrize("fault", [each_array_clipped, scalars_left_alone, twice_the_bound])
def test_a_faulty_clip_of_updates_fails(unit, fault, monkeypatch):
    monkeypatch.setattr(mechanism_module, "clip_update", fault)
    assert audited(make(unit)).verdict == "fail"


def test_records_clipped_after_they_were_averaged_fail(monkeypatch):
    def noisy_mean(self, chunks, shapes, randomness):
        total = [torch.zeros(1, *shape) for shape in shapes]
        for chunk in chunks:
            total = [a + g.sum(0, keepdim=True) for a, g in zip(total, chunk, strict=True)]
        mean = [t / self.normaliser for t in total]
        return self.noised(clipped_sum(mean, self.max_grad_norm), randomness)

    monkeypatch.setattr(Mechanism, "noisy_mean", noisy_mean)
    assert audited(make("record"), only=["a record among others"]).verdict == "fail"


def test_updates_clipped_after_they_were_averaged_fail(monkeypatch):
    def noisy_average(self, updates, like, randomness, *, clip_norm=None, noise_multiplier=None):
        bound = clip_norm or self.max_grad_norm
        mean = {n: sum((u[n] for u in updates), np.zeros_like(a)) / self.normaliser for n, a in like.items()}
        deviation = self.noise_multiplier * bound
        noise = {n: randomness.gaussian(a.size, deviation).reshape(a.shape) for n, a in like.items()}
        return {n: np.float32((a + noise[n]) / self.normaliser) for n, a in clip_update(mean, bound).items()}

    monkeypatch.setattr(Mechanism, "noisy_average", noisy_average)
    assert audited(make("client")).verdict == "fail"


def test_noise_for_c_where_two_c_is_due_fails(monkeypatch):
    def release_locally(self, update, randomness):
        clipped = clip_update(update, self.max_grad_norm)
        deviation = self.noise_multiplier * self.max_grad_norm
        return {n: a + randomness.gaussian(a.size, deviation).reshape(a.shape) for n, a in clipped.items()}

    monkeypatch.setattr(Mechanism, "release_locally", release_locally)
    assert audited(make("local")).verdict == "fail"


def test_noise_that_does_not_follow_a_learned_clip_fails():
    mechanism = make("client")
    stale = Altered(lambda noise, deviation: noise * (0.3 if deviation < 1.0 else 1.0))  # only the case with C/3
    found = audited(mechanism, stale)
    assert found.verdict == "fail"
    assert found.reason.startswith("a round with another clip")


@pytest.mark.parametrize("unit", UNITS)
def test_a_record_that_is_not_finite_and_is_not_masked_fails(unit, monkeypatch):
    def unmasked_sum(gradients, bound):
        norms = torch.sqrt(sum((g.double() ** 2).reshape(len(g), -1).sum(1) for g in gradients))
        factors = (bound / norms).clamp(max=1.0).float()
        return [torch.einsum("n,n...->...", factors, g) for g in gradients]

    def unmasked_update(update, bound):
        norm = math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in update.values()))
        return {n: np.asarray(a * min(1.0, bound / norm) if norm else a, np.float64) for n, a in update.items()}

    monkeypatch.setattr(mechanism_module, "clipped_sum", unmasked_sum)
    monkeypatch.setattr(mechanism_module, "clip_update", unmasked_update)
    assert audited(make(unit), only=NOT_FINITE).verdict == "fail"


def test_more_noise_than_claimed_is_no_violation():
    assert audited(make("client"), Altered(lambda noise, _: 1.5 * noise)).verdict == "pass"


def test_false_alarms_are_as_rare_as_the_confidence_says():
    """Plain Gaussians at the claim: 95 % warns in at most one of twenty, and seldom in these forty."""
    generator = np.random.default_rng(3)
    case = Case(name="exact", score=lambda canary: float(generator.standard_normal() + canary))
    verdicts = [judge_cases(make(noise_multiplier=1.0), [case], trials=300).verdict for _ in range(40)]
    assert verdicts.count("fail") == 0
    assert verdicts.count("warn") <= 6  # of binomial(40, 0.05) that is beyond 0.995


def test_a_slight_fault_warns_before_it_fails():
    generator = np.random.default_rng(4)
    case = Case(name="short", score=lambda canary: float(0.8 * generator.standard_normal() + canary))
    verdicts = [judge_cases(make(noise_multiplier=1.0), [case], trials=n).verdict for n in (2000, 20_000)]
    assert verdicts == ["warn", "fail"]


def test_there_is_nothing_to_audit_where_nothing_is_claimed():
    nothing = make("none", noise_multiplier=0.0)
    for audit in (audit_mechanism, audit_noise):
        with pytest.raises(PrivacyRefused, match="expected a mechanism with a guarantee"):
            audit(nothing, SecretGenerator())


def test_the_default_number_of_trials_notices_half_the_noise():
    for noise in (0.5, 2.0, 8.0):
        case = Case(name="one", score=lambda canary: 0.0)
        found = judge_cases(make(noise_multiplier=noise), [case] * 7, trials=2)
        assert found.noticed == 0.0  # two trials notice nothing
    assert default_trials(1.0) == 4000
    assert default_trials(100.0) == 25_000


# The noise.


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_the_noise_of_a_correct_mechanism_is_what_it_claims(unit, hardened):
    found = audit_noise(
        make(unit, hardened=hardened), SecureGenerator() if hardened else SecretGenerator(), draws=50_000
    )
    assert found.verdict == "pass", found.reason
    assert found.measured == pytest.approx(1.0, abs=0.03)
    assert len(found.p_values) == (9 if hasattr(os, "fork") else 6)


SHAPES_OF_NOISE = {
    "two thirds": lambda noise, deviation: noise * 2.0 / 3.0,
    "three halves": lambda noise, deviation: noise * 1.5,
    "three per cent short": lambda noise, deviation: noise * 0.97,
    "uniform": lambda noise, deviation: np.sqrt(12.0) * deviation * (stats.norm.cdf(noise / deviation) - 0.5),
    "cut at three": lambda noise, deviation: np.clip(noise, -3.0 * deviation, 3.0 * deviation),
    "shifted": lambda noise, deviation: noise + 0.03 * deviation,
    "coarse": lambda noise, deviation: np.round(noise / deviation, 3) * deviation,
}


@pytest.mark.parametrize("fault", SHAPES_OF_NOISE)
def test_noise_of_another_size_or_shape_fails(fault):
    found = audit_noise(make("local"), Altered(SHAPES_OF_NOISE[fault]), draws=200_000)
    assert found.verdict == "fail"
    assert "standard deviation" in found.reason


def test_a_release_that_repeats_an_earlier_one_from_the_middle_fails():
    class Loops:
        """A stream of 60,000 draws that begins again."""

        def __init__(self):
            self.loop, self.at = SecretGenerator().gaussian(60_000, 1.0), 0

        def gaussian(self, count, standard_deviation):
            drawn = np.take(self.loop, np.arange(self.at, self.at + count), mode="wrap") * standard_deviation
            self.at += count
            return drawn

    found = audit_noise(make("client"), Loops(), draws=40_000)
    assert found.verdict == "fail"
    assert found.p_values["two releases"] < 1e-12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_generator_that_is_keyed_before_a_fork_fails():
    found = audit_noise(make("client"), SeededGenerator(1), draws=20_000)
    assert found.verdict == "fail"
    assert found.p_values["two forks"] < 1e-12
    assert min(found.p_values[name] for name in ("mean", "size", "shape", "tails")) > 1e-9


def test_a_fork_that_draws_what_its_parent_draws_next_fails():
    class Inherits(SecretGenerator):
        def _keyed(self):
            if self._stream is None:
                super()._keyed()
            return self._stream

    found = audit_noise(make("client"), Inherits(), draws=20_000)
    assert found.verdict == "fail"


@pytest.mark.parametrize("unit", UNITS)
def test_the_released_noise_is_measured_in_what_the_mechanism_claims(unit):
    class Ones(SecretGenerator):
        def gaussian(self, count, standard_deviation):
            return np.full(count, standard_deviation)

    np.testing.assert_allclose(released_noise(make(unit), Ones(), 5), 1.0, rtol=1e-6)
