"""What latency samples support, and nothing more: percentiles, their intervals, spread, drift.

Distribution-free throughout: latencies have heavy tails and several modes, so nothing here assumes a shape. Nor
are consecutive samples independent on a real device: intervals are estimated from blocks of time.
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

# So many blocks that even fully dependent ones leave the 36 samples that the interval of a p90 needs; and half as many,
# between which shows what changes more slowly.
BLOCK_COUNTS = (20, 40)
_MOST_ALIKE = 0.8
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
    ordered = in_order(samples)
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
    (462.0, 537.0)
    """
    ordered, fraction = in_order(samples), _fraction(percentile)
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
    # The share of all samples that stands for a rank among the effective ones, with a correction for continuity: the
    # last of six is the 91.7th hundredth, not the slowest run of all. Among as many as there are it is the rank itself.
    low, high = (math.ceil((rank - 0.5) * len(ordered) / count) for rank in (low_rank, high_rank))
    return float(ordered[low - 1]), float(ordered[high - 1])


def _effective_count(is_below: npt.NDArray[np.bool_]) -> int:
    """How many independent samples would tell the share of trues as well as these do, by the spread between blocks."""
    share = float(is_below.mean())
    counts = {min(blocks, len(is_below) // 4) for blocks in BLOCK_COUNTS}
    errors = [
        standard_error(np.array([block.mean() for block in np.array_split(is_below, blocks)]))
        for blocks in counts
        if blocks > 1
    ]
    error = max(errors, default=0.0)
    return min(len(is_below), int(share * (1 - share) / error**2)) if error > 0 else len(is_below)


def standard_error(means: npt.NDArray[np.float64]) -> float:
    """Return the standard error of the mean of the means of consecutive blocks, which may depend on their neighbours.

    What changes more slowly than a block makes neighbours alike; then fewer of them count. As for a first-order
    autoregressive series, the variance is (1 + r) / (1 - r) times that of independent blocks, where r is the
    correlation of neighbours, with Kendall's correction for its bias in short series, and at most 0.8.

    >>> alternating, slow = np.array([1.0, -1.0] * 10), np.repeat([1.0, -1.0], 10)
    >>> round(standard_error(alternating), 2), round(standard_error(slow), 2)
    (0.24, 0.69)
    """
    apart = means - means.mean()
    total = float(apart @ apart)
    if total == 0:
        return 0.0
    r = max(0.0, float(apart[1:] @ apart[:-1]) / total)
    r = min(_MOST_ALIKE, r + (1 + 3 * r) / len(means))
    return math.sqrt(total / (len(means) - 1) / len(means) * (1 + r) / (1 - r))


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
    ordered = in_order(samples)
    kept = ordered[: max(1, len(ordered) - int(trim * len(ordered)))]
    return float(kept.std() / kept.mean()) if kept.mean() else 0.0


def drift(samples: Samples) -> float:
    """Return the relative change of the median from the first to the last third of the samples, in order of time.

    Raises:
        ValueError: The samples are empty or not finite.

    >>> drift(np.repeat([100.0, 105.0, 110.0], 20))
    0.1
    """
    in_order(samples)
    third = max(1, len(samples) // 3)
    first, last = float(np.median(samples[:third])), float(np.median(samples[-third:]))
    return (last - first) / first if first else 0.0


def median_interval(values: Samples, *, confidence: float = 0.93) -> tuple[Interval, float] | None:
    """Return the median of a few independent values, the narrowest pair of ranks around it, and what that covers.

    Args:
        values: One-dimensional; five have the coverage that is asked for by default, less have not.
        confidence: The least coverage, between 0 and 1, both excluded.

    >>> median_interval(np.array([3.0, 1.0, 2.0, 5.0, 4.0]))
    (Interval(estimate=3.0, low=1.0, high=5.0), 0.9375)
    """
    sorted_values = in_order(values)
    below = _binomial_cdf(len(sorted_values), 0.5)
    for rank in range(len(sorted_values) // 2, 0, -1):
        covered = 1 - 2 * float(below[rank - 1])
        if covered >= confidence:
            low, high = float(sorted_values[rank - 1]), float(sorted_values[-rank])
            return Interval(estimate=float(np.median(sorted_values)), low=low, high=high), round(covered, 4)
    return None


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Return a share and its interval by Wilson (1927), which holds for few trials and for shares near 0 and 1.

    >>> interval = wilson_interval(90, 100)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.826, 0.945)
    """
    if not 0 <= successes <= trials or trials < 1:
        found = f"successes={successes} trials={trials}"
        raise ValueError(f"expected 0 <= successes <= trials, trials >= 1, got {found}; count again")
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return Interval(estimate=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def in_order(samples: Samples) -> npt.NDArray[np.float64]:
    """The samples by size; raises ValueError unless they are one-dimensional, finite and at least one."""
    values = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    if np.ndim(samples) != 1 or not len(values) or not np.isfinite(values[[0, -1]]).all():
        raise ValueError(f"expected finite samples (n,), n >= 1, got samples of shape {np.shape(samples)}; check them")
    return values


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
