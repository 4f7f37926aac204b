"""Two results beside each other: of two devices, or of one at two dates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tacit.devices.ratios import Series, unpaired_ratio
from tacit.devices.statistics import Interval

Verdict = Literal["slower", "faster", "no difference beyond the interval", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An artifact in two results: ``ratio`` above one means that the second is slower; None where it cannot be told."""

    name: str
    same_file: bool
    ratio: Interval | None
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        interval = (
            None
            if self.ratio is None
            else {"estimate": self.ratio.estimate, "low": self.ratio.low, "high": self.ratio.high}
        )
        return {"name": self.name, "same_file": self.same_file, "ratio": interval, "verdict": self.verdict}


def compare(earlier: Mapping[str, Any], later: Mapping[str, Any], *, between_sessions: float = 0.0) -> list[Comparison]:
    """Compare the latencies of the artifacts that two results have in common, by name.

    The interval is that of the two sessions as they were: from blocks of time, as the ratio within a session is, but
    nothing cancels here. What a process or a day changes for all runs alike is in neither of them; a caller who knows
    how much that is, from earlier sessions, says so in ``between_sessions``.

    Args:
        earlier: What ``measure`` returned.
        later: What it returned another time, or for another device.
        between_sessions: The relative standard deviation of medians from session to session.

    Returns:
        One comparison for each name that is in both, in the order of ``later``.

    Raises:
        ValueError: A result has no artifacts, or block medians that are no latencies.

    >>> entry = {"sha256": "ab", "block_medians_us": [100.0, 101.0, 99.0, 100.0] * 10}
    >>> slow = {**entry, "block_medians_us": [1.2 * median for median in entry["block_medians_us"]]}
    >>> [found] = compare({"artifacts": {"a": entry}}, {"artifacts": {"a": slow}})
    >>> found.verdict, round(found.ratio.estimate, 3)
    ('slower', 1.2)
    """
    before, after = earlier.get("artifacts"), later.get("artifacts")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        raise ValueError("expected two results with artifacts, got another table; give what tacit measure wrote")
    if not 0 <= between_sessions < 1:
        raise ValueError(f"expected 0 <= between_sessions < 1, got between_sessions={between_sessions}; give a share")
    return [
        _compare_entries(name, before[name], entry, between_sessions)
        for name, entry in after.items()
        if name in before
    ]  # fmt: skip


def _compare_entries(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], between_sessions: float
) -> Comparison:
    ratio = unpaired_ratio(
        _series(name, after.get("block_medians_us")),
        _series(name, before.get("block_medians_us")),
        extra=math.sqrt(2) * between_sessions,
    )
    same_file = before.get("sha256") is not None and before.get("sha256") == after.get("sha256")
    return Comparison(name=name, same_file=same_file, ratio=ratio, verdict=_verdict(ratio))


def _verdict(ratio: Interval | None) -> Verdict:
    if ratio is None:
        return "not measured"
    return "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "no difference beyond the interval"


def _series(name: str, medians: object) -> Series:
    values: Sequence[object] = medians if isinstance(medians, list) else []
    if not all(isinstance(value, int | float) and math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"expected positive block_medians_us of {name!r}, got others; measure again")
    return np.array(values, dtype=np.float64)
