"""What samples support, and what is wrong with them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tacit.devices.conditions import Conditions, is_hotter, is_throttled
from tacit.devices.statistics import (
    coefficient_of_variation,
    drift,
    percentile_estimate,
    percentile_interval,
)

PERCENTILES = {"p50_us": 50.0, "p90_us": 90.0, "p99_us": 99.0, "p999_us": 99.9}
_NOISY_CV = 0.10
_DRIFTING = 0.05
_STEAL_SHARE = 0.02
_WAITING_SHARE = 0.02
_SLOWED = 0.10


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What one artifact's samples support; a percentile that they do not support is None.

    ``cv`` leaves out the largest 1 % of the samples. Flags: ``noisy`` (cv above 10 %), ``drift`` (the median moved by
    more than 5 % between first and last third), ``few-samples`` (no p90), ``averaged`` (a sample is a mean of several
    runs, so the tail is flatter than a user would see), ``steal`` (a hypervisor took more than 2 % of the time),
    ``contended`` (other programs had the processor for more than 2 % of the time that it was wanted),
    ``throttled`` (the device slowed itself down: it says so, its clock fell by a tenth, or a sustained run became
    slower by a tenth while it grew hotter), ``governor`` (the clock may change: its governor is not "performance",
    and it is no phone that holds its clocks).
    """

    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    ci: dict[str, tuple[float, float] | None]
    min_us: float
    n: int
    cv: float
    drift: float
    flags: tuple[str, ...]


def judge(
    samples_ns: npt.NDArray[np.int64],
    *,
    runs_per_sample: int = 1,
    steal_share: float | None = None,
    before: Conditions | None = None,
    after: Conditions | None = None,
    waiting_share: float | None = None,
) -> Latency:
    """Say what samples support.

    Args:
        samples_ns: ``(n,)`` positive nanoseconds per run, in order of time; at least one.
        runs_per_sample: How many consecutive runs a sample is the mean of.
        steal_share: Share of time, 0 to 1, that a hypervisor gave to others; None where unknown.
        before: The device's conditions once the model had warmed up.
        after: Its conditions at the end.
        waiting_share: Share of time, 0 to 1, in which other programs had the processor.

    Returns:
        Percentiles in microseconds (None where there are too few samples) with 95 % intervals, spread, drift, flags.

    Raises:
        ValueError: There is no sample, or one is not positive.

    >>> latency = judge(np.full(64, 5000))
    >>> latency.p50_us, latency.p90_us, latency.p99_us, latency.flags
    (5.0, 5.0, None, ())
    """
    samples_us = np.asarray(samples_ns, dtype=np.float64) / 1000
    if samples_us.ndim != 1 or not len(samples_us) or samples_us.min() <= 0:
        raise ValueError(f"expected positive samples_ns (n,), n >= 1, got shape={samples_us.shape}; measure again")
    estimates = {name: percentile_estimate(samples_us, percentile) for name, percentile in PERCENTILES.items()}
    cv, moved = coefficient_of_variation(samples_us), drift(samples_us)
    before, after = before or {}, after or {}
    raised = {
        "noisy": cv > _NOISY_CV,
        "drift": abs(moved) > _DRIFTING,
        "few-samples": estimates["p90_us"] is None,
        "averaged": runs_per_sample > 1,
        "steal": (steal_share or 0) > _STEAL_SHARE,
        "contended": (waiting_share or 0) > _WAITING_SHARE,
        "throttled": is_throttled(before, after),
        "governor": after.get("governor", before.get("governor")) not in (None, "performance")
        and not after.get("fixed_performance"),
    }
    return Latency(
        **estimates,
        ci={name: percentile_interval(samples_us, percentile) for name, percentile in PERCENTILES.items()},
        min_us=float(samples_us.min()),
        n=len(samples_us),
        cv=round(cv, 4),
        drift=round(moved, 4),
        flags=tuple(flag for flag, is_raised in raised.items() if is_raised),
    )


def has_slowed(medians_us: npt.NDArray[np.float64], start: Conditions, end: Conditions) -> bool:
    """Tell whether a sustained run shows throttling: a device that says so, or a tenth slower when hotter at the end.

    Args:
        medians_us: ``(buckets,)`` in order of time.
        start: The conditions at the beginning.
        end: The conditions at the end.

    >>> heat = [{"temperature_c": 50.0}, {"temperature_c": 81.0}]
    >>> has_slowed(np.linspace(100, 140, 60), *heat), has_slowed(np.linspace(100, 140, 60), heat[0], heat[0])
    (True, False)
    """
    tenth = max(1, len(medians_us) // 10)
    rise = float(np.median(medians_us[-tenth:]) / np.median(medians_us[:tenth])) - 1
    return is_throttled(start, end) or (rise > _SLOWED and is_hotter(start, end))
