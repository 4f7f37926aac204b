"""LiteRT's own ``benchmark_model``: how it is called, what it prints, and what of that to believe.

It prints a summary and no samples: count, minimum, maximum, mean and standard deviation, newer versions also the 5th,
50th and 95th percentile. Source: tensorflow/lite/tools/benchmark/benchmark_model.cc, tsl/util/stats_calculator.h.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tacit.devices.adb_shell import Said
from tacit.devices.answers import printable
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, ArtifactTimeout
from tacit.devices.side_answers import Operator

__all__ = ["Round", "Turn", "believe_operators_csv", "believe_round", "elf_abi", "refuse_failed", "tool_arguments"]

Abi = Literal["arm64-v8a", "armeabi-v7a", "x86_64", "x86", "riscv64"]
_MACHINES: dict[int, Abi] = {183: "arm64-v8a", 40: "armeabi-v7a", 62: "x86_64", 3: "x86", 243: "riscv64"}
_NUMBER = r"(-?[0-9][0-9.]{0,18}(?:e[+-]?[0-9]{1,3})?)"
_COUNT = re.compile(r"\bcount=([0-9]{1,12})\b")
_TIMINGS = re.compile(rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, ")
_MEMORY = re.compile(rf"(?:Memory footprint delta|Peak memory footprint)[^\n=]{{0,60}}init={_NUMBER} overall={_NUMBER}")
_RUN_ORDER = "node type, start, first, avg_ms, %, cdf%, mem KB, times called, name"
_MAX_OPERATORS = 256
MAX_OUTPUT_BYTES = 1 << 20
_SIGNALS = {129: "SIGHUP", 132: "SIGILL", 134: "SIGABRT", 135: "SIGBUS", 136: "SIGFPE", 137: "SIGKILL", 139: "SIGSEGV"}
_MAX_MIB = 1 << 20
_ROUNDING = 1.01  # of what is printed with six digits


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How long one process of the tool warms up and runs: at least so many runs and seconds, at most ``max_s``."""

    min_runs: int
    warmup_s: float
    min_s: float
    max_s: float


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one process of the tool showed, in microseconds; percentiles are None where its version has none."""

    count: int
    min_us: float
    max_us: float
    mean_us: float
    std_us: float
    p5_us: float | None
    median_us: float | None
    p95_us: float | None
    init_us: float | None
    first_us: float | None
    peak_bytes: int | None

    @property
    def typical_us(self) -> float:
        """The median, or else the mean."""
        return self.mean_us if self.median_us is None else self.median_us


def tool_arguments(tool: str, model: str, turn: Turn, *, threads: int, profile: str | None = None) -> list[str]:
    """Return a command line; ``profile`` names the file for the time of each operator, which costs time itself.

    >>> tool_arguments("/t", "/m", Turn(min_runs=9, warmup_s=0.2, min_s=0.5, max_s=20.0), threads=1)[1:4]
    ['--graph=/m', '--num_threads=1', '--warmup_runs=1']
    """
    operators = [f"--profiling_output_csv_file={profile}"] if profile else []
    return [
        tool,
        f"--graph={model}",
        f"--num_threads={threads}",
        "--warmup_runs=1",
        f"--warmup_min_secs={turn.warmup_s:g}",
        f"--num_runs={turn.min_runs}",
        f"--min_secs={turn.min_s:g}",
        f"--max_secs={turn.max_s:g}",
        f"--enable_op_profiling={'true' if profile else 'false'}",
        *operators,
    ]


def refuse_failed(said: Said, limit_s: float) -> None:
    """Raise why the tool did not succeed.

    Raises:
        ArtifactCrashed: A signal ended it.
        ArtifactTimeout: It was given up after so many seconds.
        ArtifactRefused: It failed, or wrote too much.

    >>> refuse_failed(Said(ended="exit", returncode=139, stdout=b"", stderr=b""), limit_s=9.0)
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactCrashed: the model file crashed benchmark_model (SIGSEGV)
    """
    if said.ended == "time":
        raise ArtifactTimeout(f"the model file kept benchmark_model busy for more than {limit_s:g} s")
    if said.ended == "output":
        raise ArtifactRefused(f"benchmark_model wrote more than {MAX_OUTPUT_BYTES} bytes of output")
    if said.returncode in _SIGNALS:
        raise ArtifactCrashed(f"the model file crashed benchmark_model ({_SIGNALS[said.returncode]})")
    if said.returncode != 0:
        complaint = _end_of((said.stderr or said.stdout).decode("utf-8", errors="replace"))
        raise ArtifactRefused(
            f"benchmark_model could not run the model file (exit status {said.returncode}): {complaint}"
        )


def believe_round(said: str, wall_s: float) -> Round:
    """Read the tool's output; the last line of counts is that of the timed runs.

    Args:
        said: Its output and complaints.
        wall_s: Seconds that it took by this computer's clock.

    Raises:
        ArtifactRefused: It holds no such line, or what cannot be true.

    >>> found = believe_round("count=64 first=9 curr=8 min=7 max=12 avg=8.5 std=1 p5=7 median=8 p95=10", wall_s=1.0)
    >>> found.count, found.mean_us, found.median_us, found.init_us
    (64, 8.5, 8.0, None)
    >>> believe_round("count=3 first=1 curr=1 min=-5 max=4 avg=nan std=0", wall_s=1.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactRefused: expected times of benchmark_model that are numbers, got others: count=3 ...
    """
    line = next((line for line in reversed(said.splitlines()) if _COUNT.search(line)), None)
    if line is None:
        raise ArtifactRefused(f"expected a line of counts from benchmark_model, got: {_end_of(said)}; try it by hand")
    told = {name: _number(text) for name, text in re.findall(r"\b([a-z0-9]{1,8})=([^\s(]{1,24})", line)}
    count = int((_COUNT.search(line) or [0, 0])[1])
    if "min" not in told:  # all runs took equally long
        told |= dict.fromkeys(("min", "max", "avg"), told.get("curr")) | {"std": 0.0}
    smallest, largest, mean, spread = (told.get(name) for name in ("min", "max", "avg", "std"))
    middle = [told[name] for name in ("p5", "median", "p95") if name in told]
    ordered = [value for value in (smallest, *middle, largest) if value is not None]
    if smallest is None or largest is None or mean is None or spread is None or None in middle:
        raise ArtifactRefused(f"expected times of benchmark_model that are numbers, got others: {printable(line)}")
    if not _can_be(count, ordered, mean, spread, wall_s):
        raise ArtifactRefused(f"expected times of benchmark_model that can be true, got others: {printable(line)}")
    timings, memory = _last(_TIMINGS, said), _last(_MEMORY, said)
    init_us, first_us = (_within(timings, place, wall_s * 1e6) for place in (1, 2))
    mib = _within(memory, 2, _MAX_MIB)
    return Round(
        count=count,
        min_us=smallest,
        max_us=largest,
        mean_us=mean,
        std_us=spread,
        p5_us=told.get("p5"),
        median_us=told.get("median"),
        p95_us=told.get("p95"),
        init_us=init_us,
        first_us=first_us,
        peak_bytes=None if mib is None else int(mib * (1 << 20)),
    )


def believe_operators_csv(text: str, runs: int, wall_s: float) -> list[Operator]:
    r"""Read the file of ``--profiling_output_csv_file``: the mean nanoseconds of each operator in a run.

    Raises:
        ArtifactRefused: It holds no operators, or times that cannot be true.

    >>> row = "CONV_2D, 0, 0.11, 0.09, 44.9%, 44.9%, 0, 1, [conv2d]:0"
    >>> believe_operators_csv(f"Regular Benchmark Runs:\n{_RUN_ORDER}\n{row}\n\n", runs=50, wall_s=1.0)
    [Operator(name='[conv2d]:0', kind='CONV_2D', count=1, total_ns=90000)]
    """
    _, _, regular = text.rpartition("Regular Benchmark Runs:")
    rows = regular.partition(_RUN_ORDER)[2].partition("\n\n")[0].strip().splitlines()
    found = [operator for row in rows[:_MAX_OPERATORS] if (operator := _operator(row)) is not None]
    total_ns = sum(operator.total_ns for operator in found)
    if not found or total_ns * runs > wall_s * 1e9:
        raise ArtifactRefused("expected the times of operators from benchmark_model, got none that can be true")
    return found


def elf_abi(head: bytes) -> Abi | None:
    r"""Return the kind of Android processor that a program is for, by its first 20 bytes; None where it is no program.

    >>> elf_abi(b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\x00"), elf_abi(b"#!/bin/sh") is None
    ('arm64-v8a', True)
    """
    return _MACHINES.get(int.from_bytes(head[18:20], "little")) if head[:4] == b"\x7fELF" else None


def _can_be(count: int, ordered: Sequence[float], mean: float, spread: float, wall_s: float) -> bool:
    """Whether a summary, from minimum to maximum, is one of that many runs within that time."""
    low, high = ordered[0], ordered[-1]
    return (
        count > 0
        and low >= 0  # what takes less than a microsecond is printed as 0
        and mean > 0
        and list(ordered) == sorted(ordered)
        and low / _ROUNDING <= mean <= high * _ROUNDING
        and 0 <= spread <= max(1.0, (high - low) * _ROUNDING)
        and count * mean <= wall_s * 1e6 * _ROUNDING
    )


def _operator(row: str) -> Operator | None:
    cells = [cell.strip() for cell in row.split(",", 8)]
    mean_ms = _number(cells[3]) if len(cells) == 9 else None
    if mean_ms is None or mean_ms < 0 or not re.fullmatch(r"[0-9]{1,9}", cells[7]):
        return None
    return Operator(
        name=printable(cells[8]), kind=printable(cells[0]), count=int(cells[7]), total_ns=int(mean_ms * 1e6)
    )


def _within(found: "re.Match[str] | None", place: int, most: float) -> float | None:
    value = _number(found[place]) if found else None
    return value if value is not None and 0 < value <= most else None


def _last(pattern: "re.Pattern[str]", text: str) -> "re.Match[str] | None":
    return next(reversed(list(pattern.finditer(text))), None)


def _number(text: str) -> float | None:
    try:
        value = float(text) if re.fullmatch(_NUMBER, text) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e15 else None


def _end_of(said: str) -> str:
    return printable(said.strip()[-200:]) or "nothing"
