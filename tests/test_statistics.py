"""Latency statistics against naive versions, published counts, and their claimed coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.devices.statistics import (
    coefficient_of_variation,
    drift,
    early_stopping_count,
    percentile_estimate,
    percentile_interval,
    ratio_interval,
)

SAMPLES = st.lists(st.floats(1, 1e6), min_size=1, max_size=300).map(np.array)


@pytest.mark.parametrize(("percentile", "count"), [(50, 11), (90, 64), (95, 130), (97, 219), (99, 662), (99.9, 6636)])
def test_early_stopping_counts_are_those_of_mlperf(percentile, count):
    """662 is the MultiStream minimum of MLPerf Inference's mlperf.conf; the others follow from the same rule."""
    assert early_stopping_count(percentile) == count


@given(st.floats(5, 99), st.floats(0.5, 0.999))
def test_early_stopping_count_is_the_least_that_keeps_the_confidence(percentile, confidence):
    def tail(count: int) -> float:
        return sum(
            math.comb(count, k) * (1 - percentile / 100) ** k * (percentile / 100) ** (count - k) for k in (0, 1)
        )

    count = early_stopping_count(percentile, confidence)
    assert tail(count) <= 1 - confidence
    assert count == 1 or tail(count - 1) > 1 - confidence


@given(SAMPLES, st.sampled_from([50, 90, 99]))
def test_percentile_is_the_nearest_rank_or_refused(samples, percentile):
    naive = sorted(samples)[-(-percentile * len(samples) // 100) - 1]
    expected = naive if len(samples) >= early_stopping_count(percentile) else None
    assert percentile_estimate(samples, percentile) == expected


@pytest.mark.parametrize(("count", "supported"), [(63, False), (64, True)])
def test_p90_is_refused_just_below_the_count_that_supports_it(count, supported):
    samples = np.arange(1.0, count + 1)
    assert (percentile_estimate(samples, 90) is not None) == supported
    assert (percentile_interval(samples[::-1], 90) is not None) <= supported


def test_interval_of_the_median_is_the_textbook_pair_of_ranks():
    """n = 100 at 95 %: the 40th and the 61st value (Conover, Practical Nonparametric Statistics, table A3)."""
    samples = np.random.default_rng(0).permutation(np.arange(1, 101))
    assert _is_independent(samples)
    assert percentile_interval(samples, 50) == (40, 61)


def _is_independent(samples: np.ndarray) -> bool:
    """Whether blocks of time of this very permutation vary no more than chance would have them."""
    shares = [np.mean(block <= 50) for block in np.array_split(samples, 25)]
    return bool(np.var(shares, ddof=1) / 25 <= 0.25 / 100)


@given(SAMPLES, st.sampled_from([50, 90]))
def test_interval_contains_its_estimate(samples, percentile):
    interval = percentile_interval(samples, percentile)
    if interval is not None:
        assert interval[0] <= percentile_estimate(samples, percentile) <= interval[1]


def _coverage(draw, percentile: float, *, truth: float, repeats: int = 200) -> float:
    intervals = [percentile_interval(draw(), percentile) for _ in range(repeats)]
    return float(np.mean([interval is not None and interval[0] <= truth <= interval[1] for interval in intervals]))


@pytest.mark.parametrize("percentile", [50, 90])
@pytest.mark.parametrize("count", [320, 5000])
def test_interval_covers_the_truth_on_independent_samples(percentile, count):
    rng = np.random.default_rng(percentile + count)
    truth = -math.log(1 - percentile / 100)
    assert _coverage(lambda: rng.exponential(size=count), percentile, truth=truth) >= 0.92


@pytest.mark.parametrize("percentile", [50, 90])
def test_interval_covers_the_truth_on_a_device_that_changes_its_pace(percentile):
    rng = np.random.default_rng(percentile)

    def stretches() -> np.ndarray:
        return np.repeat(rng.exponential(size=200), 50)

    truth = -math.log(1 - percentile / 100)
    assert _coverage(stretches, percentile, truth=truth) >= 0.90
    # Negative control: shuffled, the same samples look independent, and the interval fails.
    shuffled = _coverage(lambda: rng.permutation(stretches()), percentile, truth=truth)
    assert shuffled < 0.5


def test_one_preemption_in_a_thousand_does_not_make_a_steady_model_noisy():
    samples = np.full(1000, 100.0)
    samples[500] = 4_000_000.0
    assert coefficient_of_variation(samples) == 0
    assert coefficient_of_variation(samples, trim=0) > 1


@given(SAMPLES)
def test_untrimmed_variation_is_the_textbook_one(samples):
    assert coefficient_of_variation(samples, trim=0) == pytest.approx(np.std(samples) / np.mean(samples))


def test_drift_is_seen_in_either_direction_and_not_in_noise():
    steps = np.repeat([100.0, 110.0, 120.0], 50)
    assert drift(steps) == pytest.approx(0.2)
    assert drift(steps[::-1]) == pytest.approx(-1 / 6)
    assert abs(drift(np.random.default_rng(0).permutation(steps))) < 0.11


@settings(max_examples=30)
@given(st.floats(0.2, 5))
def test_ratio_of_a_scaled_copy_is_the_factor(factor):
    samples = np.random.default_rng(1).exponential(size=400) + 1
    ratio = ratio_interval(samples * factor, samples)
    assert ratio.low == pytest.approx(factor) == ratio.high


def test_ratio_survives_a_drift_that_both_models_share():
    rng = np.random.default_rng(2)
    pace = np.linspace(1, 3, 2000)
    a, b = 2 * pace * rng.normal(10, 0.5, 2000), pace * rng.normal(10, 0.5, 2000)
    ratio = ratio_interval(a, b)
    assert ratio.low <= 2 <= ratio.high
    assert ratio.high - ratio.low < 0.05
    # Negative control: measured one after the other, b meets a slower device and the ratio is wrong.
    assert ratio_interval(a, b + 20).high < 2


def test_ratio_covers_one_for_equal_models_as_often_as_it_claims():
    rng = np.random.default_rng(3)
    pairs = [ratio_interval(*rng.exponential(size=(2, 1000)) + 1, resamples=500) for _ in range(100)]
    assert np.mean([pair.low <= 1 <= pair.high for pair in pairs]) >= 0.88


def test_ratio_is_reproducible_and_refused_for_too_few_samples():
    a, b = np.random.default_rng(4).exponential(size=(2, 100)) + 1
    assert ratio_interval(a, b) == ratio_interval(a, b)
    assert ratio_interval(a[:39], b) is None


@pytest.mark.parametrize("samples", [np.array([]), np.array([1.0, math.nan]), np.array([[1.0]])])
def test_samples_that_are_no_finite_series_are_refused(samples):
    for judge in (lambda: percentile_estimate(samples, 50), lambda: percentile_interval(samples, 50)):
        with pytest.raises(ValueError, match="expected finite samples"):
            judge()
    with pytest.raises(ValueError, match="expected finite samples"):
        drift(samples)


@pytest.mark.parametrize("percentile", [0, 100, -1, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match="percentile"):
        percentile_estimate(np.ones(10), percentile)
