"""The report's charts of training, privacy and latency; `svg.py` turns them into elements of the page."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tacit.edge.metric_words import metric_title, metric_value
from tacit.edge.svg import SERIES, Chart, Point, render, write_text
from tacit.edge.timings import (
    Mark,
    Timing,
    charted_devices,
    end_of,
    latency_limit,
    marks_of,
    timings_of,
)
from tacit.edge.wording import duration, epsilon, finite, plain, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["begins_at", "draw_charts", "spent_by_owner"]

_MOST_NAMED_OWNERS, _MOST_INTERVALS, _MOST_LABELS = 24, 40, 16


def spent_by_owner(privacy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (owner, ε), the largest first.

    Example:
        >>> spent_by_owner({"epsilon_by_owner": {"anna": 1.2, "ben": 3.4}})
        [('ben', 3.4), ('anna', 1.2)]
    """
    by_owner = privacy.get("epsilon_by_owner")
    found = [(str(o), e) for o, v in by_owner.items() if (e := finite(v)) is not None] if by_owner else []
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _trace(rounds: object, key: str) -> list[Point]:
    """Return (round, value) of the rounds at which the value was taken."""
    if not isinstance(rounds, list):
        return []
    pairs = ((finite(r.get("round")), finite(r.get(key))) for r in rounds if isinstance(r, Mapping))
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def begins_at(summary: Mapping[str, Any]) -> float | None:
    """Return where the axis of an R² is cut, or None: before it learns, a model may be far below 0, without a bound.

    Example:
        >>> rounds = [{"round": 1, "accuracy": -40.0}, {"round": 2, "accuracy": 0.5}]
        >>> begins_at({"metric": "R2", "training": {"rounds": rounds}})
        -1.0
    """
    curves = [_trace(summary["training"].get(key), "accuracy") for key in ("rounds", "twin")]
    below = any(y < -1.0 for curve in curves for _, y in curve)
    ends_above = all(curve[-1][1] > -1.0 for curve in curves if curve)
    return -1.0 if summary.get("metric") == "R2" and below and ends_above else None


# Drawing.


def draw_charts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of every chart that there is data for; front and latency are drawn per device."""
    training, spent = summary["training"], spent_by_owner(summary["privacy"])
    private, twin = _trace(training.get("rounds"), "accuracy"), _trace(training.get("twin"), "accuracy")
    budget = _trace(training.get("rounds"), "epsilon")
    charts: list[Chart] = []
    metric = summary.get("metric")
    shown = partial(metric_value, metric=metric)
    if private or twin:
        # Neither the owners' table nor a round's ε says it: both may be empty at client level.
        protected = summary["privacy"].get("unit", "none") != "none"
        curves = [("private" if protected else "this run", private), ("twin", twin)]
        draw = partial(_draw_curves, curves=curves, text=shown, bottom=begins_at(summary))
        charts.append(Chart("accuracy", f"{metric_title(metric)} over the rounds of training", draw, 3.1))
    if budget:
        draw = partial(_draw_curves, curves=[("ε", budget)], text=epsilon)
        charts.append(Chart("budget", "ε spent after each round", draw, 3.1))
    if spent:
        height = 0.8 + 0.27 * min(len(spent), _MOST_NAMED_OWNERS)
        charts.append(Chart("owners", "ε per owner", partial(_draw_owners, spent=spent), height))
    charts += _device_charts(timings_of(summary), shown)
    return {chart.name: render(chart) for chart in charts}


def _device_charts(timings: Sequence[Timing], shown: Callable[[object], str]) -> Iterator[Chart]:
    marks = marks_of(timings)
    for index, device in enumerate(charted_devices(timings)[0]):
        here = [t for t in timings if t.device == device]
        sized = [t for t in here if t.size_bytes is not None]
        if sized:
            draw = partial(_draw_front, timings=sized, marks=marks, shown=shown)
            yield Chart(f"front-{index}", f"Size against median latency on {device}", draw, 3.9)
        rows = here[:_MOST_INTERVALS]
        draw = partial(_draw_intervals, timings=rows, marks=marks, limit=latency_limit(here))
        height = 0.9 + (0.5 if len(rows) < 8 else 0.36) * len(rows)
        yield Chart(f"latency-{index}", f"Latency from median to 90th percentile on {device}", draw, height)


def _draw_curves(
    axes: "Axes",
    *,
    curves: Sequence[tuple[str, Sequence[Point]]],
    text: Callable[[object], str],
    bottom: float | None = None,
) -> None:
    drawn = [(name, xy, color) for (name, xy), color in zip(curves, SERIES, strict=False) if xy]
    for _, xy, color in drawn:
        axes.plot(*zip(*xy, strict=True), color=color, linewidth=2, marker="o" if len(xy) < 3 else None)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    low, high = axes.get_ylim()
    ends = [(name, xy[-1], color) for name, xy, color in drawn]
    shifts = _spread([(y - low) / (high - low) * 190 for _, (_, y), _ in ends], gap=16)
    for (name, (x, y), color), shift in zip(ends, shifts, strict=True):
        write_text(axes, f"{name} {text(y)}", (x, y), offset=(7, shift), color=color)
    axes.yaxis.set_major_formatter(lambda y, _: plain(float(y)) if text is epsilon else text(float(y)))
    axes.set_xlabel("round")


def _draw_owners(axes: "Axes", *, spent: Sequence[tuple[str, float]]) -> None:
    """Draw one bar an owner, or the distribution where the owners are too many to name."""
    if len(spent) > _MOST_NAMED_OWNERS:
        axes.hist([value for _, value in spent], bins=20, color=SERIES[0])
        axes.set_ylabel("owners")
        axes.set_xlabel("ε")
        return
    rows = range(len(spent))
    axes.barh(rows, [value for _, value in spent], color=SERIES[0], height=0.62)
    for row, (_, value) in zip(rows, spent, strict=True):
        write_text(axes, epsilon(value), (value, row), offset=(5, 0))
    _name_rows(axes, [owner for owner, _ in spent])
    axes.set_xlim(0, spent[0][1] * 1.14 or 1)
    axes.set_xlabel("ε")


def _draw_front(
    axes: "Axes", *, timings: Sequence[Timing], marks: Mapping[str, Mark], shown: Callable[[object], str]
) -> None:
    xs, ys = [t.p50_us for t in timings], [t.size_bytes or 0.0 for t in timings]
    if min(xs) > 0 and max(xs) / min(xs) > 15:
        axes.set_xscale("log")
    axes.margins(0.2)
    for t, y in zip(timings, ys, strict=True):
        _put_mark(axes, marks[t.runtime], t.p50_us, y, size=8)
    axes.set_ylim(bottom=0)
    if len(timings) <= _MOST_LABELS:
        _label_points(axes, list(zip(xs, ys, strict=True)), [_label(t, shown) for t in timings])
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.yaxis.set_major_formatter(lambda y, _: size(y))
    axes.set_xlabel("median latency")


def _label(timing: Timing, shown: Callable[[object], str]) -> str:
    reached = " wrong here" if timing.is_wrong else "" if timing.accuracy is None else f" {shown(timing.accuracy)}"
    return _short(timing.variant) + reached


def _put_mark(axes: "Axes", mark: Mark, x: float, y: float, *, size: float) -> None:
    color = SERIES[mark.series]
    face = color if mark.is_filled else "none"
    axes.plot([x], [y], mark.marker, markersize=size, color=color, markerfacecolor=face, markeredgewidth=1.6)


def _draw_intervals(axes: "Axes", *, timings: Sequence[Timing], marks: Mapping[str, Mark], limit: float | None) -> None:
    """Draw p50 to p90 as a bar and both confidence intervals as whiskers, one row a variant; an arrow at the limit."""
    for row, t in enumerate(timings):
        color = SERIES[marks[t.runtime].series]
        axes.plot([t.p50_us, t.p90_us or t.p50_us], [row, row], color=color, linewidth=7, alpha=0.45)
        for interval in (t.p50_ci_us, t.p90_ci_us):
            if interval is not None:
                axes.plot(interval, [row, row], color=color, linewidth=2)
        if t.p90_us is not None:
            axes.plot([t.p90_us], [row], marker="|", markersize=13, markeredgewidth=2, color=color)
        _put_mark(axes, marks[t.runtime], t.p50_us, row, size=6)
        if limit is not None and end_of(t) > limit:
            said = f"p90 at {duration(t.p90_us)}" if t.p90_us and t.p90_us > limit else f"to {duration(end_of(t))}"
            axes.plot([limit], [row], marker=">", markersize=8, color=color, clip_on=False)
            write_text(axes, said, (limit, row), offset=(-7, 10), left=True)
    _name_rows(axes, [t.variant for t in timings])
    axes.set_xlim(0, limit)
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))


def _label_points(axes: "Axes", places: Sequence[Point], names: Sequence[str]) -> None:
    """Write each name beside its point, at the first place that covers no point and no other name."""
    width, height = 285.0, 225.0  # points, about what the layout leaves for the axes
    spots = axes.transAxes.inverted().transform(axes.transData.transform(places)) * (width, height)
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in spots]
    for (x, y), place, name in zip(spots, places, names, strict=True):
        length = 5.8 * len(name)
        offers = [(side * 9, rise) for rise in (0, 14, -14, 28, -28, 42) for side in (1, -1)]
        boxes = [(x + dx - length * (dx < 0), x + dx + length * (dx > 0), y + dy - 7, y + dy + 7) for dx, dy in offers]
        free = [box[0] > -10 and box[1] < width and all(_apart(box, other) for other in taken) for box in boxes]
        best = free.index(True) if True in free else 0
        taken.append(boxes[best])
        write_text(axes, name, place, offset=offers[best], left=offers[best][0] < 0)


def _apart(box: Sequence[float], other: Sequence[float]) -> bool:
    return box[1] <= other[0] or other[1] <= box[0] or box[3] <= other[2] or other[3] <= box[2]


def _spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Return shifts that keep labels at the given heights at least a gap apart."""
    shifts, floor = [0.0] * len(heights), -math.inf
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        floor = max(heights[index], floor + gap)
        shifts[index] = floor - heights[index]
    return shifts


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    for label in axes.set_yticks(range(len(names)), [_short(name) for name in names]):
        label.label1.set_parse_math(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
