"""How long to measure what: the two modes."""

from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["quick", "full"]
_LIMIT_MARGIN_S = 30.0  # to start Python, import a runtime and load models on a slow board


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure each artifact: both minima hold, ``max_s`` of timed work ends it in any case.

    All that is divided among ``processes``, one after the other, because where a process happens to put its memory
    makes it faster or slower for as long as it lives. In each of them a warm-up takes ``warmup_s`` and
    ``min_warmup_runs`` and until the median has settled, at most ``max_warmup_s``.
    """

    mode: Mode
    min_runs: int
    min_s: float
    max_s: float
    warmup_s: float
    max_warmup_s: float
    min_warmup_runs: int
    processes: int
    cold_runs: int
    memory_runs: int = 20
    profile_runs: int = 50

    def timed(self, models: int) -> dict[str, Any]:
        """What a request to time so many models in one of the processes says about time."""
        share_s = {"min_s": self.min_s / self.processes, "max_s": self.max_s / self.processes}
        limit_s = _LIMIT_MARGIN_S + models * (self.max_warmup_s + 2 * share_s["max_s"])
        return {"min_runs": -(-self.min_runs // self.processes), **share_s, **self.warm_up(limit_s)}

    def warm_up(self, limit_s: float) -> dict[str, Any]:
        """What a request that warms a model up says about it, and about its own end."""
        names = ("warmup_s", "max_warmup_s", "min_warmup_runs")
        return {**{name: getattr(self, name) for name in names}, "limit_s": limit_s}

    def sustained(self, seconds: float, idle_s: float) -> dict[str, Any]:
        """What a request to run a model for minutes says about time."""
        limit_s = _LIMIT_MARGIN_S + self.max_warmup_s + idle_s + 1.5 * seconds
        return {"seconds": seconds, "idle_s": idle_s, "min_s": 1.0, **self.warm_up(limit_s)}


def plan(mode: Mode) -> Plan:
    """Return how long to measure.

    "quick" supports a p90 by MLPerf's early-stopping rule (64 samples) and takes about ten seconds for two artifacts,
    "full" a p99 (662) and takes about a minute for two.

    Raises:
        ValueError: The mode is unknown.

    >>> plan("quick").min_runs, plan("full").min_runs
    (64, 662)
    """
    if mode == "quick":
        return Plan(
            mode=mode, min_runs=64, min_s=2.0, max_s=20.0,
            warmup_s=0.2, max_warmup_s=1.0, min_warmup_runs=10, processes=3, cold_runs=5,
        )  # fmt: skip
    if mode == "full":
        return Plan(
            mode=mode, min_runs=662, min_s=24.0, max_s=120.0,
            warmup_s=0.5, max_warmup_s=10.0, min_warmup_runs=10, processes=5, cold_runs=10,
        )  # fmt: skip
    raise ValueError(f"expected mode quick or full, got mode={mode!r}; give one of them")
