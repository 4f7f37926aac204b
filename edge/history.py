"""What was measured before on this computer's devices, and what has become slower or faster since.

A table of SQLite in `$TACIT_HOME/measurements.sqlite`: a row for each artifact in each measurement. The interval of a
median says nothing of the next session, on a warmer device or beside other work, so the spread between sessions
decides. Few sessions may lie close together by chance: what sessions usually differ by counts as well.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

__all__ = ["Change", "History"]

_TABLE = """create table if not exists measured (
    taken text not null, device text not null, cpu text not null, task text not null, artifact text not null,
    runtime text not null, sha256 text not null, mode text not null, p50_us real not null, low_us real not null,
    high_us real not null)"""
# What is supposed of the spread before anything was seen: 2.5 %, and worth as much as three sessions' deviations.
_USUAL_SPREAD, _USUAL_FREEDOM = 0.025, 3
_LATEST = 20
Verdict = Literal["slower", "faster", "no difference"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An artifact's median beside those of earlier sessions.

    Attributes:
        artifact: Its name.
        sessions: Earlier ones of the same device, task, artifact and runtime, the latest 20.
        ratio: To their geometric mean; above 1 is slower.
        low: The least ratio that the spread between sessions would explain.
        high: The greatest.
        verdict: What follows, at 95 %.
        same_file: Whether all of them measured the same bytes: then the device or the runtime has changed.
    """

    artifact: str
    sessions: int
    ratio: float
    low: float
    high: float
    verdict: Verdict
    same_file: bool

    def words(self) -> str:
        """A line for people.

        Example:
            >>> spread = {"sessions": 4, "ratio": 1.2, "low": 0.95, "high": 1.05}
            >>> Change(artifact="a", **spread, verdict="slower", same_file=True).words()
            'a: 20 % slower than in 4 earlier measurements of the same file (-5 % to +5 % is no news)'
        """
        what = f"{100 * abs(self.ratio - 1):.0f} % {'slower' if self.ratio > 1 else 'faster'}"
        times = f"{self.sessions} earlier measurement{'s' if self.sessions > 1 else ''}"
        file = " of the same file" if self.same_file else ", of other bytes"
        spread = f"{100 * (self.low - 1):+.0f} % to {100 * (self.high - 1):+.0f} %"
        return f"{self.artifact}: {what} than in {times}{file} ({spread} is no news)"


class History:
    """The table of a home folder.

    Example:
        >>> import tempfile
        >>> entry = {"p50_us": 10.0, "ci": {"p50_us": [9.9, 10.1]}, "runtime": "litert", "sha256": "ab"}
        >>> result = {"device": "local", "mode": "quick", "facts": {"cpu": "x"}, "artifacts": {"small": entry}}
        >>> slow = {**result, "artifacts": {"small": {**entry, "p50_us": 12.0, "ci": {"p50_us": [11.8, 12.2]}}}}
        >>> with tempfile.TemporaryDirectory() as home:
        ...     history = History(Path(home))
        ...     history.add(result, task="digits")
        ...     [change.verdict for change in history.changes(slow, task="digits")]
        ['slower']
    """

    def __init__(self, home: Path) -> None:
        """Opens the table of a home folder, or begins one, which nobody else may read.

        Raises:
            sqlite3.DatabaseError: The file is no such table.
        """
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = home / "measurements.sqlite"
        if not self.path.exists():
            self.path.touch(mode=0o600)
        with closing(self._connect()) as table, table:
            table.execute(_TABLE)

    def add(self, result: Mapping[str, object], *, task: str) -> None:
        """Keeps what was measured, if it has a median with an interval.

        Args:
            result: Of `tacit.devices.protocol.measure`.
            task: Whose artifacts they are.
        """
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [
            (
                taken,
                *_where(result, entry),
                task,
                name,
                str(entry["runtime"]),
                str(entry["sha256"]),
                result["mode"],
                *median,
            )
            for name, entry in _entries(result)
            if (median := _median(entry)) is not None
        ]
        with closing(self._connect()) as table, table:
            table.executemany("insert into measured values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def changes(self, result: Mapping[str, object], *, task: str) -> list[Change]:
        """Each artifact that was measured before, beside its earlier medians; before `add`."""
        found = []
        with closing(self._connect()) as table:
            for name, entry in _entries(result):
                median = _median(entry)
                earlier = table.execute(
                    "select p50_us, low_us, high_us, sha256 from measured where device = ? and cpu = ? and task = ? "
                    "and artifact = ? and runtime = ? and mode = ? order by taken desc, rowid desc limit ?",
                    (*_where(result, entry), task, name, str(entry["runtime"]), result["mode"], _LATEST),
                ).fetchall()
                if median is not None and earlier:
                    same = {row[3] for row in earlier} == {str(entry["sha256"])}
                    found.append(_change(name, median, [row[:3] for row in earlier], same_file=same))
        return found

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30.0)


def _where(result: Mapping[str, object], entry: Mapping[str, object]) -> tuple[str, str]:
    """The device and its processor, or the phone that was there; a browser's name is that of the phone, too."""
    facts, device = result.get("facts"), str(result["device"])
    cpu = facts.get("cpu") if isinstance(facts, Mapping) else ""
    kind = "browser" if device.startswith("browser") else device
    return kind, str(entry.get("phone") or entry.get("cpu") or cpu)


def _entries(result: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    artifacts = result["artifacts"]
    return list(artifacts.items()) if isinstance(artifacts, Mapping) else []


def _median(entry: Mapping[str, object]) -> tuple[float, float, float] | None:
    """In microseconds, with its interval."""
    bounds, middle = entry.get("ci"), entry.get("p50_us")
    interval = bounds.get("p50_us") if isinstance(bounds, Mapping) else None
    if not isinstance(middle, float | int) or not isinstance(interval, list | tuple):
        return None
    return float(middle), float(interval[0]), float(interval[1])


def _change(
    name: str, now: tuple[float, float, float], earlier: Sequence[tuple[float, float, float]], *, same_file: bool
) -> Change:
    """Whether a median lies outside of what earlier ones let expect of another session.

    The prediction interval of a normal distribution of logarithms, widened by the new median's own interval. Its
    variance is moderated: the mean of the usual one and that of the sessions, by their degrees of freedom, so that the
    quantile is of Student's t with the sum of these (Smyth 2004, Statistical Applications in Genetics and Molecular
    Biology 3:3).
    """
    from scipy.stats import t

    logs = [math.log(row[0]) for row in earlier]
    middle, own = sum(logs) / len(logs), [math.log(value) for value in now]
    freedom = _USUAL_FREEDOM + len(logs) - 1
    squares = _USUAL_FREEDOM * _USUAL_SPREAD**2 + sum((value - middle) ** 2 for value in logs)
    reach = float(t.ppf(0.975, freedom)) * math.sqrt(squares / freedom * (1 + 1 / len(logs)))
    low, high = middle - math.hypot(reach, own[2] - own[0]), middle + math.hypot(reach, own[0] - own[1])
    verdict: Verdict = "slower" if own[0] > high else "faster" if own[0] < low else "no difference"
    ratios = [math.exp(value - middle) for value in (own[0], low, high)]
    return Change(
        artifact=name,
        sessions=len(logs),
        ratio=ratios[0],
        low=ratios[1],
        high=ratios[2],
        verdict=verdict,
        same_file=same_file,
    )
