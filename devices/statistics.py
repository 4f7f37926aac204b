"""What latency samples support, and nothing more: percentiles, their intervals, spread, drift, ratios.

Distribution-free throughout: latencies have heavy tails and several modes, so nothing here assumes a shape. Nor
are consecutive samples independent on a real device: intervals are estimated from blocks of time.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

_TIME_BLOCKS = 40  # so that even fully dependent blocks leave the 36 samples that the interval of a p90 needs
Samples = npt.NDArray[np.float64] | npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate between two bounds."""

    estimate: float
    low: float
    high: float


@cache
def early_stopping_count(percentile: float, confidence: float = 0.99) -> int:
    """Return the least number of samples from which a percentile may be reported.

    The early-stopping rule of MLPerf Inference (single stream): with n samples, the t - 1 largest are set aside and the
    largest of the rest is, with this confidence, no less than the percentile. t must be at least one, hence n is
    the least number for which at most one sample above the percentile has a probability of at most 1 - confidence.

    Args:
        percentile: Between 0 and 100, both excluded.
        confidence: Between 0 and 1, both excluded.

    Returns:
        The number of samples.

    Raises:
        ValueError: An argument is out of range.

    >>> early_stopping_count(90), early_stopping_count(99)
    (64, 662)
    """
    below = _fraction(percentile)
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got confidence={confidence}; give 0.99")
    low, high = 1, 2
    while _at_most_one_above(high, below) > 1 - confidence:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _at_most_one_above(middle, below) > 1 - confidence:
            low = middle + 1
        else:
            high = middle
    return low


def percentile_estimate(samples: Samples, percentile: float) -> float | None:
    """Return the nearest-rank percentile: always a value that occurred.

    Args:
        samples: One-dimensional, at least one.
        percentile: Between 0 and 100, both excluded.

    Returns:
        The percentile, or None when there are fewer samples than ``early_stopping_count`` asks for.

    Raises:
        ValueError: The samples are empty or not finite, or the percentile is out of range.

    >>> percentile_estimate(np.arange(1, 101), 90)
    90.0
    >>> percentile_estimate(np.arange(1, 51), 90) is None
    True
    """
    ordered = _ordered(samples)
    rank = math.ceil(_fraction(percentile) * len(ordered) - 1e-9)  # 0.9 * 100 is 90.00000000000001 in some orders
    if len(ordered) < early_stopping_count(percentile):
        return None
    return float(ordered[rank - 1])


def percentile_interval(samples: Samples, percentile: float, *, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return a distribution-free confidence interval of a percentile, made of two order statistics.

    The number of samples below the percentile is binomial whatever the distribution (David and Nagaraja, Order
    Statistics, section 7.1), if samples are independent. Consecutive latencies are not, so the binomial is that of the
    effective number of samples (Woodruff's interval with a design effect, estimated from blocks of time); on
    independent samples this is all of them, and 100,000 samples of a drifting device count as a few dozen.

    Args:
        samples: One-dimensional, in order of time; at least one.
        percentile: Between 0 and 100, both excluded.
        confidence: Between 0 and 1, both excluded.

    Returns:
        Lower and upper bound, or None when there are too few samples for the percentile, or too few effective ones
        for two bounds.

    Raises:
        ValueError: The samples are empty or not finite, or an argument is out of range.

    >>> percentile_interval(np.random.default_rng(0).permutation(1000), 50)
    (467.0, 532.0)
    """
    ordered, fraction = _ordered(samples), _fraction(percentile)
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got confidence={confidence}; give 0.95")
    if len(ordered) < early_stopping_count(percentile):
        return None
    count = _effective_count(np.asarray(samples) <= ordered[math.ceil(fraction * len(ordered) - 1e-9) - 1])
    below = _binomial_cdf(count, fraction)  # below[k] = P(at most k of the samples lie below)
    tail = (1 - confidence) / 2
    low_rank = int(np.searchsorted(below, tail, side="right"))  # the greatest l with P(fewer than l) <= tail
    high_rank = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # the least u with P(u or more) <= tail
    if low_rank < 1 or high_rank > count:
        return None
    scale = len(ordered) / count
    return float(ordered[math.floor(low_rank * scale) - 1]), float(ordered[math.ceil(high_rank * scale) - 1])


def _effective_count(is_below: npt.NDArray[np.bool_]) -> int:
    """How many independent samples would tell the share of trues as well as these do, by the spread between blocks."""
    share = float(is_below.mean())
    blocks = min(_TIME_BLOCKS, len(is_below) // 4)
    if blocks < 2 or share in {0.0, 1.0}:
        return len(is_below)
    shares = np.array([block.mean() for block in np.array_split(is_below, blocks)])
    between = float(shares.var(ddof=1)) / blocks
    return min(len(is_below), int(share * (1 - share) / between)) if between > 0 else len(is_below)


def coefficient_of_variation(samples: Samples, *, trim: float = 0.01) -> float:
    """Return standard deviation over mean, without the largest ``trim`` of the samples.

    One pre-emption of 4 ms among 100,000 runs of 5 us would otherwise decide it alone.

    Raises:
        ValueError: The samples are empty or not finite, or ``trim`` is not in [0, 1).

    >>> coefficient_of_variation(np.array([9.0, 11.0]))
    0.1
    """
    if not 0 <= trim < 1:
        raise ValueError(f"expected 0 <= trim < 1, got trim={trim}; give 0.01")
    ordered = _ordered(samples)
    kept = ordered[: max(1, len(ordered) - int(trim * len(ordered)))]
    return float(kept.std() / kept.mean()) if kept.mean() else 0.0


def drift(samples: Samples) -> float:
    """Return the relative change of the median from the first to the last third of the samples, in order of time.

    Raises:
        ValueError: The samples are empty or not finite.

    >>> drift(np.repeat([100.0, 105.0, 110.0], 20))
    0.1
    """
    _ordered(samples)
    third = max(1, len(samples) // 3)
    first, last = float(np.median(samples[:third])), float(np.median(samples[-third:]))
    return (last - first) / first if first else 0.0


def ratio_interval(
    a: Samples,
    b: Samples,
    *,
    confidence: float = 0.95,
    blocks: int = _TIME_BLOCKS,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Estimate the ratio of typical latencies, a over b, of two models timed side by side.

    Both series are cut in order of time into the same number of blocks. Block i of a and block i of b were measured
    at the same time, so what slows both cancels in the ratio of their medians. The estimate is the geometric mean of
    these ratios; its interval is the percentile bootstrap over blocks.

    Args:
        a: Positive samples in order of time.
        b: Positive samples in order of time; of the same session, perhaps of another number.
        confidence: Between 0 and 1, both excluded.
        blocks: Number of blocks, at least two.
        resamples: Number of bootstrap resamples.
        seed: Makes the interval reproducible.

    Returns:
        The ratio and its interval, or None when a block would have no sample.

    Raises:
        ValueError: The samples are empty, not finite or not positive, or an argument is out of range.

    >>> load = np.repeat([1.0, 3.0], 40)  # half-way, something else slows both models down
    >>> ratio = ratio_interval(200 * load, 100 * load)
    >>> round(ratio.low, 6), round(ratio.estimate, 6), round(ratio.high, 6)
    (2.0, 2.0, 2.0)
    """
    if not 0 < confidence < 1 or blocks < 2 or resamples < 1:
        found = f"confidence={confidence} blocks={blocks} resamples={resamples}"
        raise ValueError(f"expected 0 < confidence < 1, blocks >= 2, resamples >= 1, got {found}; use the defaults")
    if min(_ordered(a)[0], _ordered(b)[0]) <= 0:
        raise ValueError("expected positive samples, got one that is not; a latency is greater than zero")
    if min(len(a), len(b)) < blocks:
        return None
    logs = np.log(_block_medians(a, blocks)) - np.log(_block_medians(b, blocks))  # (blocks,)
    picks = np.random.default_rng(seed).integers(blocks, size=(resamples, blocks))
    tail = (1 - confidence) / 2
    low, high = np.quantile(logs[picks].mean(axis=1), [tail, 1 - tail])
    return Interval(estimate=math.exp(logs.mean()), low=math.exp(low), high=math.exp(high))


def _block_medians(samples: Samples, blocks: int) -> npt.NDArray[np.float64]:
    return np.array([np.median(block) for block in np.array_split(samples, blocks)])


def _ordered(samples: Samples) -> npt.NDArray[np.float64]:
    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    if np.ndim(samples) != 1 or not len(ordered) or not np.isfinite(ordered[[0, -1]]).all():
        raise ValueError(f"expected finite samples (n,), n >= 1, got samples of shape {np.shape(samples)}; check them")
    return ordered


def _fraction(percentile: float) -> float:
    if not 0 < percentile < 100:
        raise ValueError(f"expected 0 < percentile < 100, got percentile={percentile}; give 50, 90 or 99")
    return percentile / 100


def _at_most_one_above(count: int, below: float) -> float:
    """The probability that at most one of ``count`` samples exceeds a percentile."""
    return below**count + count * (1 - below) * float(below ** (count - 1))


def _binomial_cdf(count: int, probability: float) -> npt.NDArray[np.float64]:
    """P(X <= k) for k = 0 .. count, summed from logarithms so that large counts do not underflow."""
    k = np.arange(count)
    steps = np.log((count - k) / (k + 1)) + math.log(probability) - math.log1p(-probability)
    log_pmf = count * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(np.cumsum(np.exp(log_pmf)))
