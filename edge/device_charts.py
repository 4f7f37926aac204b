"""The report's charts of one device: ratios, curves under load, heat and cold starts; `svg.py` makes them elements."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tacit.edge.svg import GRID, INK, SERIES, Chart, Point, render
from tacit.edge.wording import duration, finite, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PARTS",
    "Entries",
    "Ratio",
    "cold_limit",
    "curve_of",
    "draw_device_charts",
    "ratio_text",
    "ratios_of",
    "spread_of",
]

Entries = Mapping[str, Mapping[str, Any]]  # of one device: a variant's name, and what was measured of it
PARTS = (("import", "import of the runtime"), ("load", "load of the file"), ("first", "first inference"))
_MOST_ROWS, _MOST_CURVES, _MOST_GROUPS, _MOST_POINTS = 40, 8, 6, 400
_BINS, _FEWEST_SAMPLES = 48, 16
_DASHES = ("-", "--")
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)


@dataclass(frozen=True)
class Ratio:
    """A variant's latency over that of the first one of its runtime; None where that is not known."""

    variant: str
    estimate: float | None
    low: float | None
    high: float | None


# What there is to draw.


def ratios_of(entries: Entries) -> dict[str, list[Ratio]]:
    """Return the ratios of each runtime that has any; the variant that they are to stands first, with a ratio of 1.

    Example:
        >>> slow = {"runtime": "litert", "relative": {"to": "a", "estimate": 2.0, "low": 1.9, "high": 2.1}}
        >>> found = ratios_of({"a": {"runtime": "litert", "relative": None}, "b": slow})
        >>> [(ratio.variant, ratio.estimate) for ratio in found["litert"]]
        [('a', 1.0), ('b', 2.0)]
    """
    groups: dict[tuple[str, str], list[Ratio]] = {}
    for name, entry in entries.items():
        relative = entry.get("relative")
        if isinstance(relative, Mapping):
            row = Ratio(name, *(_positive(relative.get(key)) for key in ("estimate", "low", "high")))
            groups.setdefault((plain(entry.get("runtime")), plain(relative.get("to"))), []).append(row)
    found: dict[str, list[Ratio]] = {}
    for (runtime, first), rows in groups.items():
        heading = runtime if runtime not in found else f"{runtime}, beside {first}"
        found[heading] = [Ratio(first, 1.0, None, None), *rows]
    return found


def ratio_text(ratio: Ratio) -> str:
    """Return a ratio with its interval.

    Example:
        >>> ratio_text(Ratio("b", 1.987, 1.95, 2.02)), ratio_text(Ratio("c", None, None, None))
        ('1.99× (1.95 to 2.02)', 'not measured')
    """
    if ratio.estimate is None:
        return plain(None)
    if ratio.low is None or ratio.high is None:
        return f"{ratio.estimate:.3g}×"
    return f"{ratio.estimate:.3g}× ({ratio.low:.3g} to {ratio.high:.3g})"


def curve_of(entry: Mapping[str, Any], key: str = "median_us") -> list[Point]:
    """Return (second, value) of a run under load, as far as there are values.

    Example:
        >>> curve_of({"sustained": {"start_s": [0.0, 1.0], "median_us": [20.0, None]}})
        [(0.0, 20.0)]
    """
    run = entry.get("sustained")
    values, times = (run.get(key), run.get("start_s")) if isinstance(run, Mapping) else (None, None)
    if not isinstance(values, list) or not isinstance(times, list):
        return []
    pairs = [(finite(x), finite(y)) for x, y in zip(times, values, strict=False)]
    points = [(x, y) for x, y in pairs if x is not None and y is not None and (y > 0 or key != "median_us")]
    return points[:: 1 + len(points) // _MOST_POINTS]


def spread_of(entry: Mapping[str, Any]) -> list[float]:
    """Return runs over their median, in order, as far as they are kept.

    Example:
        >>> spread_of({"p50_us": 20.0, "samples_us": [19.0, 20.0, 30.0]})
        [0.95, 1.0, 1.5]
    """
    middle, kept = _positive(entry.get("p50_us")), entry.get("samples_us")
    if middle is None or not isinstance(kept, list):
        return []
    return sorted(value / middle for sample in kept if (value := _positive(sample)) is not None)


def _positive(value: object) -> float | None:
    number = finite(value)
    return number if number is not None and 0 < number < 1e9 else None


# Drawing.


def draw_device_charts(device: str, entries: Entries, *, number: int) -> dict[str, str]:
    """Return the SVG of every chart of a device that there is data for; the number makes their names different."""
    charts = []
    for index, (runtime, rows) in enumerate(list(ratios_of(entries).items())[:_MOST_GROUPS]):
        draw = partial(_draw_ratios, rows=rows[:_MOST_ROWS])
        title = f"Latency over that of {rows[0].variant} on {device}, {runtime}"
        charts.append(Chart(f"ratio-{number}-{index}", title, draw, _height(len(rows[:_MOST_ROWS]))))
    spreads = {name: ratios for name, entry in entries.items() if len(ratios := spread_of(entry)) >= _FEWEST_SAMPLES}
    if spreads:
        rows_drawn = list(spreads)[:_MOST_ROWS]
        ends = [_ends(entries[name]) for name in rows_drawn]
        draw = partial(_draw_spreads, names=rows_drawn, spreads=[spreads[name] for name in rows_drawn], ends=ends)
        charts.append(
            Chart(f"spread-{number}", f"Runs around their median on {device}", draw, _height(len(rows_drawn)))
        )
    changing = sorted(entries, key=lambda name: -abs(_relative_change(entries[name])))
    kept = [name for name in entries if name in changing[:_MOST_CURVES]]
    curves = [(name, [(x, y / curve[0][1]) for x, y in curve]) for name in kept if (curve := curve_of(entries[name]))]
    if curves:
        draw = partial(_draw_curves, curves=curves, label="median over its first", line=1.0)
        charts.append(Chart(f"sustained-{number}", f"Median latency under load over time on {device}", draw, 3.6))
    heat = [(name, curve) for name in kept if (curve := curve_of(entries[name], "temperature_c"))]
    if heat:
        draw = partial(_draw_curves, curves=heat, label="temperature in °C", line=None)
        charts.append(Chart(f"heat-{number}", f"Temperature under load over time on {device}", draw, 3.2))
    colds = list(_cold_rows(entries).items())[:_MOST_ROWS]
    if colds:
        draw = partial(_draw_cold, rows=colds, limit=cold_limit(entries))
        charts.append(Chart(f"cold-{number}", f"Cold start on {device}", draw, _height(len(colds))))
    return {chart.name: render(chart) for chart in charts}


def _height(rows: int) -> float:
    return 0.9 + (0.42 if rows < 8 else 0.34) * rows


def _relative_change(entry: Mapping[str, Any]) -> float:
    curve = curve_of(entry)
    return curve[-1][1] / curve[0][1] - 1 if curve else 0.0


def cold_limit(entries: Entries) -> float | None:
    """Return the microseconds at which bars of cold starts are cut, where few would make all others invisible.

    Example:
        >>> starts = [{"cold": {f"{part}_us": {"estimate": us} for part, _ in PARTS}} for us in (1e3, 2e3, 9e5)]
        >>> cold_limit(dict(zip("abc", starts, strict=True))), cold_limit({"a": starts[0]})
        (7500.0, None)
    """
    totals = [math.fsum(parts) for parts in _cold_rows(entries).values()]
    usual = [total for total in totals if total <= 6 * statistics.median(totals)]
    return 1.25 * max(usual) if len(usual) < len(totals) else None


def _cold_rows(entries: Entries) -> dict[str, list[float]]:
    """Return each variant's parts of a cold start, in microseconds, with one import for all files of a runtime.

    That part knows nothing of the file: where files differ in it, the machine was busier with one than with another.
    """
    parts = {name: found for name, entry in entries.items() if (found := _cold_parts(entry))}
    imports: dict[str, list[float]] = {}
    for name, (import_us, *_) in parts.items():
        imports.setdefault(plain(entries[name].get("runtime")), []).append(import_us)
    shared = {runtime: statistics.median(found) for runtime, found in imports.items()}
    return {name: [shared[plain(entries[name].get("runtime"))], *rest] for name, (_, *rest) in parts.items()}


def _cold_parts(entry: Mapping[str, Any]) -> list[float] | None:
    """Return the microseconds of each part of a cold start."""
    cold = entry.get("cold")
    found = [cold.get(f"{part}_us") for part, _ in PARTS] if isinstance(cold, Mapping) else []
    values = [finite(part.get("estimate")) if isinstance(part, Mapping) else None for part in found]
    known = [value for value in values if value is not None and value >= 0]
    return known if len(known) == len(PARTS) else None


def _draw_ratios(axes: "Axes", *, rows: Sequence[Ratio]) -> None:
    """Draw a mark and its interval for each variant, to the right of 1 where it is slower."""
    axes.set_xscale("log")
    axes.axvline(1.0, color=INK, linewidth=1)
    ends = [1.0]
    for number, ratio in enumerate(rows):
        if ratio.estimate is None:
            continue
        ends += [value for value in (ratio.estimate, ratio.low, ratio.high) if value is not None]
        if ratio.low is not None and ratio.high is not None:
            axes.plot([ratio.low, ratio.high], [number, number], color=SERIES[0], linewidth=2.5)
        axes.plot([ratio.estimate], [number], marker="o" if number else "D", markersize=6, color=SERIES[0])
    low, high = min(ends) / 1.12, max(ends) * 1.12
    ticks = [tick for tick in (_FINE_TICKS if high / low < 3 else _TICKS) if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(_apart(ticks, gap=math.log(high / low) / 4.5))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    axes.tick_params(which="minor", length=0)
    _name_rows(axes, [ratio.variant for ratio in rows])
    _name_right(axes, [ratio_text(ratio) for ratio in rows])


def _ends(entry: Mapping[str, Any]) -> str:
    """From the shortest run to the 99th percentile, where there were runs enough for one."""
    low, high = finite(entry.get("min_us")), finite(entry.get("p99_us"))
    if low is None:
        return ""
    return f"from {duration(low)}" if high is None else f"{duration(low)} to {duration(high)}"


def _apart(ticks: Sequence[float], *, gap: float) -> list[float]:
    """Ticks with room for their labels on a logarithmic axis; 1 is always one of them."""
    kept = [1.0]
    for tick in ticks:
        if all(abs(math.log(tick / other)) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


def _draw_spreads(
    axes: "Axes", *, names: Sequence[str], spreads: Sequence[Sequence[float]], ends: Sequence[str]
) -> None:
    """Draw how often runs took how much of their median: the wider a shape, the more of them."""
    low = max(0.5, min(ratios[len(ratios) // 100] for ratios in spreads) - 0.02)
    high = min(2.0, max(1.1, *(1.1 * ratios[len(ratios) * 9 // 10] for ratios in spreads)))
    edges = [low + (high - low) * step / _BINS for step in range(_BINS + 1)]
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    for row, ratios in enumerate(spreads):
        counts = [bisect_left(ratios, right) - bisect_left(ratios, left) for left, right in pairwise(edges)]
        most = max(*counts, 1)
        inside = [index for index, count in enumerate(counts) if count]
        if not inside:
            continue
        kept = slice(max(0, inside[0] - 1), inside[-1] + 2)
        halves = [0.42 * count / most for count in counts[kept]]
        tops, bottoms = [row - half for half in halves], [row + half for half in halves]
        axes.fill_between(middles[kept], tops, bottoms, color=SERIES[0], linewidth=0)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    _name_rows(axes, names)
    _name_right(axes, ends)


def _draw_curves(
    axes: "Axes", *, curves: Sequence[tuple[str, Sequence[Point]]], label: str, line: float | None
) -> None:
    from matplotlib.ticker import MaxNLocator

    if line is not None:
        axes.axhline(line, color=GRID, linewidth=2)
    for index, (name, points) in enumerate(curves):
        color, dash = SERIES[index % 4], _DASHES[index // 4 % 2]
        marker = "o" if len(points) < 3 else None
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linestyle=dash, linewidth=2, marker=marker, label=_short(name))
    if line is not None:  # a curve that wavers by a thousandth shall look flat
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, line - 0.05), max(high, line + 0.05))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}×")
    axes.set_xlabel(f"seconds under load; {label}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    key = axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=10.5, labelcolor=INK)
    for text in key.get_texts():
        text.set_parse_math(False)


def _draw_cold(axes: "Axes", *, rows: Sequence[tuple[str, Sequence[float]]], limit: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    starts = [0.0] * len(rows)
    for part in range(len(PARTS)):
        widths = [parts[part] for _, parts in rows]
        axes.barh(range(len(rows)), widths, left=starts, height=0.6, color=SERIES[part])
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    _name_rows(axes, [name for name, _ in rows])
    _name_right(axes, [duration(total) for total in starts])
    axes.set_xlim(0, limit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    for label in axes.set_yticks(range(len(names)), [_short(name) for name in names]):
        label.label1.set_parse_math(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _name_right(axes: "Axes", texts: Sequence[str]) -> None:
    """Write a figure at the right end of each row, outside of the axes."""
    right = axes.twinx()
    right.spines[:].set_visible(False)
    right.grid(visible=False)
    right.set_yticks(range(len(texts)), texts)
    right.set_ylim(axes.get_ylim())
    right.tick_params(length=0, pad=7, labelcolor=INK, labelsize=10.5)


def _short(text: str, length: int = 20) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
