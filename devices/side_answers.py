"""Judges the answers to what is asked beside the timed run: cold starts, sustained runs, profiles.

As in ``answers.py``, a device is not believed.
"""

from dataclasses import dataclass
from typing import Any

from tacit.devices.answers import believe_integer, printable
from tacit.devices.sandbox import ArtifactRefused

_MAX_BUCKETS = 4096
_MAX_OPERATORS = 256


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """What a first inference took in a fresh process; importing is that of the runtime."""

    import_ns: int
    load_ns: int
    first_ns: int


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A second or so of a sustained run; one without runs is a second of rest before it."""

    start_s: float
    spent_s: float
    runs: int
    median_us: float | None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What all runs of one operator of a model took, by its runtime's own profiler."""

    name: str
    kind: str
    count: int
    total_ns: int


def believe_cold(answer: dict[str, Any], wall_ns: int) -> ColdStart:
    """Check the answer to ``cold``: its parts cannot have taken longer than the whole request took here.

    Raises:
        ArtifactRefused: A figure is missing, of another type or out of range.

    >>> believe_cold({"import_ns": 300, "load_ns": 500, "first_ns": 100}, wall_ns=1000)
    ColdStart(import_ns=300, load_ns=500, first_ns=100)
    """
    start = ColdStart(
        import_ns=believe_integer(answer, "import_ns", low=0, high=wall_ns),
        load_ns=believe_integer(answer, "load_ns", low=1, high=wall_ns),
        first_ns=believe_integer(answer, "first_ns", low=1, high=wall_ns),
    )
    if start.import_ns + start.load_ns + start.first_ns > wall_ns:
        raise ArtifactRefused("expected a cold start within the wall-clock time, got a longer one; measure again")
    return start


def believe_buckets(answer: dict[str, Any], wall_s: float) -> list[Bucket]:
    """Check the answer to ``sustain``: seconds one after the other, with no more work in them than they are long.

    Raises:
        ArtifactRefused: A figure cannot be true, or is of another type.

    >>> believe_buckets({"buckets": [[0, 10**9, 0, None], [10**9, 10**9, 4, 240_000_000]]}, wall_s=2.5)[1]
    Bucket(start_s=1.0, spent_s=1.0, runs=4, median_us=240000.0)
    """
    rows, free_from_ns = answer.get("buckets"), 0
    if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_BUCKETS or not all(_is_bucket(row) for row in rows):
        raise ArtifactRefused(f"expected 1 to {_MAX_BUCKETS} buckets of four whole numbers from the device")
    for start_ns, spent_ns, *_ in rows:
        if start_ns < free_from_ns:
            raise ArtifactRefused("expected buckets one after the other from the device, got others; measure again")
        free_from_ns = start_ns + spent_ns
    if free_from_ns > wall_s * 1e9:
        raise ArtifactRefused("expected buckets within the wall-clock time from the device, got others; measure again")
    return [
        Bucket(start_s=row[0] / 1e9, spent_s=row[1] / 1e9, runs=row[2], median_us=row[3] / 1e3 if row[2] else None)
        for row in rows
    ]


def _is_bucket(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 4 or any(type(value) is not int for value in row[:3]):
        return False
    start_ns, spent_ns, runs, median_ns = row
    # Half of the runs take the median or longer.
    fits = runs == 0 or (type(median_ns) is int and median_ns > 0 and median_ns * (runs // 2) <= spent_ns)
    return start_ns >= 0 and spent_ns > 0 and runs >= 0 and fits


def believe_operators(answer: dict[str, Any], wall_ns: int) -> list[Operator] | None:
    """Check the answer to ``profile``; None where the runtime has no profiler.

    Raises:
        ArtifactRefused: A figure cannot be true, or is of another type.

    >>> believe_operators({"operators": [["conv1", "Conv", 30, 600]]}, wall_ns=1000)
    [Operator(name='conv1', kind='Conv', count=30, total_ns=600)]
    >>> believe_operators({"operators": None}, wall_ns=1000) is None
    True
    """
    rows = answer.get("operators")
    if rows is None:
        return None
    if not isinstance(rows, list) or len(rows) > _MAX_OPERATORS or not all(_is_operator(row) for row in rows):
        raise ArtifactRefused("expected operators of a name, a type, runs and nanoseconds from the device")
    if sum(row[3] for row in rows) > wall_ns:
        raise ArtifactRefused("expected operators within the wall-clock time from the device; measure again")
    return [
        Operator(name=printable(name), kind=printable(kind), count=count, total_ns=total_ns)
        for name, kind, count, total_ns in rows
    ]


def _is_operator(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 4
        and all(isinstance(word, str) for word in row[:2])
        and all(type(number) is int and 0 <= number < 1 << 62 for number in row[2:])
    )
