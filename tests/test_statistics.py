"""Latency statistics against naive versions, published counts, and their claimed coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.devices.comparison import compare
from tacit.devices.ratios import block_medians, joined_ratio, ratio_interval, student_t, thinned, unpaired_ratio
from tacit.devices.statistics import (
    coefficient_of_variation,
    drift,
    early_stopping_count,
    median_interval,
    percentile_estimate,
    percentile_interval,
    standard_error,
    wilson_interval,
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

    def found() -> tuple[bool, float, bool]:
        a, b = 2 * pace * rng.normal(10, 0.5, 2000), pace * rng.normal(10, 0.5, 2000)
        ratio = ratio_interval(a, b)
        # Negative control: measured one after the other, b meets a slower device and the ratio is wrong.
        return ratio.low <= 2 <= ratio.high, ratio.high - ratio.low, ratio_interval(a, b + 20).high < 2

    covered, widths, wrong = zip(*(found() for _ in range(50)), strict=True)
    assert np.mean(covered) >= 0.88
    assert max(widths) < 0.06
    assert all(wrong)


def test_ratio_covers_one_for_equal_models_as_often_as_it_claims():
    rng = np.random.default_rng(3)
    pairs = [ratio_interval(*rng.exponential(size=(2, 1000)) + 1) for _ in range(300)]
    assert np.mean([pair.low <= 1 <= pair.high for pair in pairs]) >= 0.93


def _autoregressive(rng: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """Standard normal noise, correlated by 1 / e at a distance of ``memory`` samples."""
    keep = math.exp(-1 / memory)
    noise = rng.normal(size=count)
    for place in range(1, count):
        noise[place] = keep * noise[place - 1] + math.sqrt(1 - keep**2) * noise[place]
    return noise


@pytest.mark.parametrize("memory", [0.2, 2, 10, 20])
def test_ratio_covers_the_truth_on_a_device_that_remembers(memory):
    """400 blocks of a slow and a fast model, the slow one of which meets what lasts for up to a twentieth of it all."""
    rng = np.random.default_rng(int(10 * memory))

    def pair() -> tuple[np.ndarray, np.ndarray]:
        noise = rng.normal(scale=0.02, size=(2, 400))
        return 200 * np.exp(0.1 * _autoregressive(rng, 400, memory) + noise[0]), 100 * np.exp(noise[1])

    pairs = [pair() for _ in range(400)]
    covered = [_covers(ratio_interval(*series, block_samples=(1, 1)), 2) for series in pairs]
    assert np.mean(covered) >= 0.93
    assert np.mean([_covers(unpaired_ratio(*series), 2) for series in pairs]) >= 0.93
    if memory == 20:
        # Negative control: as the interval of a mean of forty batches that know nothing of each other.
        logs = [np.log(a / b) for a, b in pairs]
        batches = [np.array([np.median(batch) for batch in np.array_split(series, 40)]) for series in logs]
        reach = [2.02 * series.std(ddof=1) / math.sqrt(40) for series in batches]
        naive = [abs(s.mean() - math.log(2)) <= r for s, r in zip(batches, reach, strict=True)]
        assert np.mean(naive) < 0.85


def _covers(interval: object, truth: float) -> bool:
    return interval is not None and interval.low <= truth <= interval.high


@pytest.mark.parametrize("memory", [2, 10, 20])
def test_interval_of_the_median_covers_the_truth_on_a_device_that_remembers(memory):
    rng = np.random.default_rng(memory)
    found = [percentile_interval(np.exp(0.1 * _autoregressive(rng, 400, memory)), 50) for _ in range(300)]
    given_ = [interval for interval in found if interval is not None]
    assert np.mean([low <= 1 <= high for low, high in given_]) >= 0.93
    assert len(given_) > 150  # it does not hide behind None


def test_few_effective_samples_do_not_make_the_slowest_run_a_bound_of_the_median():
    """400 runs of a device that remembers are worth half a dozen; one of them took a thousand times as long."""
    rng, bounds = np.random.default_rng(3), []
    for _ in range(300):
        series = np.exp(0.1 * _autoregressive(rng, 400, 20))
        series[123] = 1000.0
        bounds += [interval for interval in (percentile_interval(series, 50),) if interval is not None]
    assert len(bounds) > 150
    assert max(high for _, high in bounds) < 2


@given(st.lists(st.floats(1, 1e6), min_size=11, max_size=400).map(sorted), st.integers(0, 9))
def test_an_interval_never_reaches_beyond_the_samples(samples, seed):
    """However far the effective number of samples is from the true one."""
    series = np.concatenate([samples, np.random.default_rng(seed).permutation(samples)])
    interval = percentile_interval(series, 50)
    assert interval is None or (min(samples) <= interval[0] <= interval[1] <= max(samples))


def test_standard_error_of_independent_means_is_the_textbook_one_and_of_alike_ones_greater():
    rng = np.random.default_rng(8)
    independent = np.mean([standard_error(rng.normal(size=40)) for _ in range(400)])
    assert independent == pytest.approx(1 / math.sqrt(40), rel=0.15)
    assert standard_error(np.repeat([1.0, -1.0], 20)) > 2.9 * standard_error(np.tile([1.0, -1.0], 20))
    assert standard_error(np.ones(40)) == 0


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (39, 2.023), (120, 1.980)]
)
def test_students_t_is_that_of_the_tables(freedom, value):
    assert student_t(freedom, 0.95) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize(("count", "ranks", "covered"), [(5, (1, 5), 0.9375), (10, (2, 9), 0.9785)])
def test_median_of_a_few_has_the_narrowest_pair_of_ranks_that_covers_it(count, ranks, covered):
    """Conover, Practical Nonparametric Statistics, table A3."""
    interval, confidence = median_interval(np.random.default_rng(0).permutation(np.arange(1, count + 1)))
    assert (interval.low, interval.high) == ranks
    assert confidence == pytest.approx(covered, abs=5e-4)
    assert median_interval(np.arange(4)) is None


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.278), (10, 0.722, 1.0), (9, 0.596, 0.982)])
def test_wilson_interval_is_that_of_the_tables(successes, low, high):
    """n = 10 at 95 % (Brown, Cai and DasGupta, Interval Estimation for a Binomial Proportion)."""
    interval = wilson_interval(successes, 10)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    with pytest.raises(ValueError, match="successes=11"):
        wilson_interval(11, 10)


def test_block_medians_keep_the_order_of_time_and_leave_out_an_unfinished_block():
    assert block_medians(np.array([1, 2, 3, 40, 50, 60, 7]), 3).tolist() == [2, 50]
    assert block_medians(np.array([5, 1]), 3).tolist() == [3]
    assert thinned(block_medians(np.arange(1000), 2), 10).tolist() == [49.5 + 100 * place for place in range(10)]


@given(st.lists(st.floats(1, 9), min_size=12, max_size=12), st.sets(st.integers(0, 11)))
def test_block_medians_are_those_of_what_was_not_disturbed(samples, disturbed):
    found = block_medians(np.array(samples), 4, np.array(sorted(disturbed), dtype=np.int64))
    for block, median in enumerate(found):
        calm = [samples[place] for place in range(4 * block, 4 * block + 4) if place not in disturbed]
        assert (median == np.median(calm)) if calm else math.isnan(median)


def test_a_ratio_on_a_busy_machine_is_that_of_the_runs_that_were_left_alone():
    """A run of 2 ms loses the processor for 3 ms four times as often as one of 0.5 ms."""
    rng = np.random.default_rng(6)
    slow, fast = 2.0 + rng.normal(0, 0.01, 800), 0.5 + rng.normal(0, 0.002, 3200)
    lost = [rng.random(800) < 0.6, rng.random(3200) < 0.15]
    a, b = slow + 3 * lost[0], fast + 3 * lost[1]
    blocks, places = (8, 32), (np.flatnonzero(lost[0]), np.flatnonzero(lost[1]))
    ratio = ratio_interval(a, b, block_samples=blocks, disturbed=places)
    assert ratio.low <= 4 <= ratio.high
    assert ratio.high - ratio.low < 0.05
    assert ratio_interval(a, b, block_samples=blocks).estimate > 6  # negative control
    # Where hardly anything was left alone, all runs speak.
    everything = (np.arange(700), np.arange(3200))
    assert ratio_interval(a, b, block_samples=blocks, disturbed=everything).estimate > 6


def test_blocks_that_only_one_model_had_time_for_are_left_out_of_the_ratio():
    a, b = np.full(60, 200.0), np.concatenate([np.full(120, 100.0), np.full(400, 900.0)])
    ratio = ratio_interval(a, b, block_samples=(1, 2))
    assert (round(ratio.low, 6), round(ratio.high, 6)) == (2, 2)


def test_the_ratio_of_several_processes_covers_what_each_was_dealt():
    """Each process is faster or slower by 1 %, which none of them can see in itself."""
    rng = np.random.default_rng(7)

    def logs() -> list[np.ndarray]:
        return [math.log(2) + rng.normal(0, 0.01) + rng.normal(0, 0.005, 30) for _ in range(3)]

    found = [logs() for _ in range(500)]
    assert np.mean([_covers(joined_ratio(three), 2) for three in found]) >= 0.93
    assert np.mean([_covers(joined_ratio(three[:1]), 2) for three in found]) < 0.3  # negative control
    assert joined_ratio([found[0][0], found[0][1][:0]]) is None
    assert joined_ratio([]) is None


def test_processes_that_happen_to_agree_claim_no_more_than_their_blocks():
    blocks = np.random.default_rng(9).normal(0, 0.1, 30)
    alone, thrice = joined_ratio([blocks]), joined_ratio([blocks] * 3)
    assert alone.low < thrice.low < thrice.high < alone.high
    assert thrice.high - thrice.low > 0.3 * (alone.high - alone.low)


def test_ratio_is_reproducible_and_refused_for_too_few_samples():
    a, b = np.random.default_rng(4).exponential(size=(2, 100)) + 1
    assert ratio_interval(a, b) == ratio_interval(a, b)
    assert ratio_interval(a[:19], b) is None
    assert unpaired_ratio(a[:19], b) is None


# Two results beside each other.


def _result(**artifacts: list[float]) -> dict[str, object]:
    entries = {name: {"sha256": name, "block_medians_us": medians} for name, medians in artifacts.items()}
    return {"artifacts": entries}


def test_two_results_are_compared_by_artifact():
    rng = np.random.default_rng(5)
    steady, slow = (rng.normal(level, 2, 100).tolist() for level in (100, 120))
    earlier = _result(a=steady, b=slow, c=steady, few=steady, gone=steady)
    later = _result(a=slow, b=steady, c=rng.normal(100, 2, 100).tolist(), few=steady[:5], new=steady)
    found = {one.name: one for one in compare(earlier, later)}
    assert list(found) == ["a", "b", "c", "few"]
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts == {
        "a": "slower", "b": "faster", "c": "no difference beyond the interval", "few": "not measured",
    }  # fmt: skip
    assert found["a"].ratio.estimate == pytest.approx(1.2, abs=0.02)
    assert found["few"].as_json() == {"name": "few", "same_file": True, "ratio": None, "verdict": "not measured"}


def test_what_sessions_differ_by_widens_a_comparison():
    earlier, later = (_result(a=(level + np.arange(40) % 3).tolist()) for level in (100, 104))
    [alone] = compare(earlier, later)
    [known] = compare(earlier, later, between_sessions=0.05)
    assert (alone.verdict, known.verdict) == ("slower", "no difference beyond the interval")


@pytest.mark.parametrize("medians", [[0.0] * 40, [-1.0] * 40, [math.nan] * 40, ["1"] * 40])
def test_results_that_hold_no_latencies_are_refused(medians):
    with pytest.raises(ValueError, match="expected positive block_medians_us of 'a'"):
        compare(_result(a=medians), _result(a=[1.0] * 40))
    with pytest.raises(ValueError, match="expected two results"):
        compare({}, _result(a=medians))


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
