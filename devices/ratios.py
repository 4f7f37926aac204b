"""How much slower one model is than another, from samples that are not independent of each other.

What a device does to one run it does to the next; so what counts is not the number of samples but that of the stretches
of time in which it did something new.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from tacit.devices.statistics import BLOCK_COUNTS, Interval, Samples, in_order, standard_error

_MOST_BLOCKS = 400
Series = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def ratio_interval(
    a: Samples,
    b: Samples,
    *,
    confidence: float = 0.95,
    block_samples: tuple[int, int] | None = None,
    disturbed: tuple[Places, Places] | None = None,
) -> Interval | None:
    """Estimate the ratio of typical latencies, a over b, of two models timed side by side.

    Both series are cut into blocks. Block i of a and block i of b were measured at the same time, so what slows both
    cancels in the ratio of their medians. The logarithms of these ratios are put together in batches of time, first 20,
    then 40; the interval is that of the mean of the batches by Student's t (batch means: Law and Kelton, Simulation
    Modeling and Analysis, section 9.5.3), the wider of the two, with ``standard_error`` for batches that depend on each
    other, since how long the device remembers is not known.

    Args:
        a: Positive samples in order of time.
        b: Positive samples in order of time; of the same session, perhaps of another number.
        confidence: Between 0 and 1, both excluded.
        block_samples: How many samples of a, and of b, were taken at a time; what one has more than the other at the
            end is left out. By default both are cut into as many blocks, at most 400, of the same share of the session.
        disturbed: The places of samples of a, and of b, during which other programs had the processor. They are left
            out where enough blocks remain: a long run is interrupted more often than a short one, so that on a busy
            machine they tell of the machine and not of the models. Needs ``block_samples``.

    Returns:
        The ratio and its interval, or None when there are fewer than 20 blocks.

    Raises:
        ValueError: The samples are empty, not finite or not positive, or an argument is out of range.

    >>> load = np.repeat([1.0, 3.0], 40)  # half-way, something else slows both models down
    >>> ratio = ratio_interval(200 * load, 100 * load)
    >>> round(ratio.low, 6), round(ratio.estimate, 6), round(ratio.high, 6)
    (2.0, 2.0, 2.0)
    """
    if not 0 < confidence < 1 or (block_samples is not None and min(block_samples) < 1):
        found = f"confidence={confidence} block_samples={block_samples}"
        raise ValueError(f"expected 0 < confidence < 1, block_samples >= 1, got {found}; use the defaults")
    if min(in_order(a)[0], in_order(b)[0]) <= 0:
        raise ValueError("expected positive samples, got one that is not; a latency is greater than zero")
    if block_samples is None:
        blocks = min(len(a), len(b), _MOST_BLOCKS)
        logs = _log_ratios(*(_split_medians(series, blocks) for series in (a, b)))
    else:
        logs = log_ratios(a, b, block_samples=block_samples, disturbed=disturbed, least=BLOCK_COUNTS[0])
    if len(logs) < BLOCK_COUNTS[0]:
        return None
    return _ratio(*_mean_of_dependent(logs, confidence))


def log_ratios(
    a: Samples, b: Samples, *, block_samples: tuple[int, int], disturbed: tuple[Places, Places] | None, least: int
) -> Series:
    """Return the logarithms of the ratios of blocks, of undisturbed samples where there are at least so many blocks."""
    if disturbed is not None:
        calm = _log_ratios(*(block_medians(*three) for three in zip((a, b), block_samples, disturbed, strict=True)))
        if len(calm) >= least:
            return calm
    return _log_ratios(*(block_medians(*two) for two in zip((a, b), block_samples, strict=True)))


def _log_ratios(a: Series, b: Series) -> Series:
    common = min(len(a), len(b))
    logs = np.log(a[:common]) - np.log(b[:common])  # (blocks,)
    return np.asarray(logs[np.isfinite(logs)])


def unpaired_ratio(a: Series, b: Series, *, confidence: float = 0.95, extra: float = 0.0) -> Interval | None:
    """Estimate the ratio of typical latencies, a over b, of two series that were not measured side by side.

    Args:
        a: ``(blocks,)`` positive medians of blocks, in order of time.
        b: The same of the other one, perhaps of another number.
        confidence: Between 0 and 1, both excluded.
        extra: A relative standard error that the series themselves cannot show.

    Returns:
        The ratio and its interval, or None when one has fewer than 20 blocks.

    Raises:
        ValueError: The series are not finite or not positive, or an argument is out of range.

    >>> ratio = unpaired_ratio(np.full(40, 3.0), np.full(30, 2.0), extra=0.01)
    >>> round(ratio.low, 3), round(ratio.estimate, 3), round(ratio.high, 3)
    (1.471, 1.5, 1.53)
    """
    if not 0 < confidence < 1 or extra < 0:
        raise ValueError(f"expected 0 < confidence < 1, extra >= 0, got confidence={confidence} extra={extra}")
    if min(len(a), len(b)) < BLOCK_COUNTS[0]:
        return None
    if min(in_order(a)[0], in_order(b)[0]) <= 0:
        raise ValueError("expected positive medians, got one that is not; a latency is greater than zero")
    (log_a, half_a), (log_b, half_b) = (_mean_of_dependent(np.log(series), confidence) for series in (a, b))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return _ratio(log_a - log_b, math.hypot(half_a, half_b, z * extra))


def _ratio(log: float, half: float) -> Interval:
    return Interval(estimate=math.exp(log), low=math.exp(log - half), high=math.exp(log + half))


def block_medians(samples: Samples, block_samples: int, disturbed: Places | None = None) -> Series:
    """Return the medians of consecutive blocks of so many samples; NaN where all of a block were disturbed.

    >>> block_medians(np.array([3, 1, 2, 9, 8, 7, 6, 6, 6]), 3, np.array([3, 6, 7, 8])).tolist()
    [2.0, 7.5, nan]
    """
    blocks = max(1, len(samples) // block_samples)
    values = np.array(samples, dtype=np.float64)
    if disturbed is not None:
        values[disturbed] = np.nan
    rows = np.sort(values[: blocks * block_samples].reshape(blocks, -1), axis=1)  # NaN goes to the end
    counts = np.isfinite(rows).sum(axis=1)
    each = np.arange(blocks)
    middle = (rows[each, np.maximum(counts - 1, 0) // 2] + rows[each, np.minimum(counts // 2, len(rows[0]) - 1)]) / 2
    return np.where(counts > 0, middle, np.nan)


def thinned(medians: Series, most: int) -> Series:
    """Return at most so many medians of neighbours, without NaN.

    >>> thinned(np.array([1.0, 3.0, np.nan, 8.0, 8.0]), 2).tolist()
    [2.0, 8.0]
    """
    finite = medians[np.isfinite(medians)]
    return _split_medians(finite, most) if len(finite) > most else finite


def _split_medians(samples: Samples, blocks: int) -> npt.NDArray[np.float64]:
    if len(samples) % blocks == 0:
        return np.asarray(np.median(np.reshape(samples, (blocks, -1)), axis=1))
    return np.array([np.median(block) for block in np.array_split(samples, blocks)])


def _mean_of_dependent(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The mean of a series in order of time, and half the width of its interval; single outliers move neither."""
    centre, halves = 0.0, []
    for count in (blocks for blocks in BLOCK_COUNTS if len(values) >= blocks):
        batches = np.array([np.median(batch) for batch in np.array_split(values, count)])
        centre = float(batches.mean())
        halves.append(student_t(count - 1, confidence) * standard_error(batches))
    return centre, max(halves)


def joined_ratio(processes: Sequence[Series], *, confidence: float = 0.95) -> Interval | None:
    """Put what several processes say of a ratio together.

    What a process was dealt, such as the addresses of its memory, holds for all its runs: it shows only between
    processes. So the interval is that of the mean over processes by Student's t (Kalibera and Jones, Rigorous
    benchmarking in reasonable time, 2013, section 8), or that of all blocks in a row as in ``ratio_interval``,
    whichever is wider.

    Args:
        processes: The ``log_ratios`` of each, in order of time.
        confidence: Between 0 and 1, both excluded.

    Returns:
        The ratio and its interval, or None when there are fewer than 20 blocks in all, or none in one of them.

    >>> ratio = joined_ratio([np.full(20, level) for level in (0.0, 0.1, -0.1)])
    >>> round(ratio.low, 2), round(ratio.estimate, 2), round(ratio.high, 2)
    (0.78, 1.0, 1.28)
    """
    if sum(map(len, processes)) < BLOCK_COUNTS[0] or not all(map(len, processes)):
        return None
    centre, within = _mean_of_dependent(np.concatenate(processes), confidence)
    if len(processes) == 1:
        return _ratio(centre, within)
    dealt = np.array([np.median(logs) for logs in processes])
    between = student_t(len(dealt) - 1, confidence) * float(dealt.std(ddof=1)) / math.sqrt(len(dealt))
    return _ratio(float(dealt.mean()), max(within, between))


def student_t(freedom: int, confidence: float) -> float:
    """Return how many standard errors a two-sided interval reaches.

    Found by halving, with the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    >>> round(student_t(2, 0.95), 3), round(student_t(39, 0.95), 3)
    (4.303, 2.023)
    """
    low, high = 0.0, math.pi / 2  # t = sqrt(freedom) * tan(angle)
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_share(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student_share(angle: float, freedom: int) -> float:
    """The probability of a t between -sqrt(freedom) * tan(angle) and its opposite."""
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for step in range(2 + freedom % 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (step - 1) / step
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
