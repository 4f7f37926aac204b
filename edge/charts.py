"""The report's charts of training, privacy and devices; `svg.py` turns them into elements of the page."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tacit.edge.metric_words import metric_title, metric_value
from tacit.edge.svg import SERIES, Chart, Point, render, write_text
from tacit.edge.wording import duration, epsilon, finite, plain, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "MARKERS",
    "Timing",
    "begins_at",
    "devices_of",
    "draw_charts",
    "runtimes_of",
    "spent_by_owner",
    "timings_of",
]

MARKERS = (("o", "●"), ("D", "◆"), ("^", "▲"), ("s", "■"))  # matplotlib's name, and the same in a line of text
_MOST_NAMED_OWNERS, _MOST_INTERVALS, _MOST_LABELS, _MOST_DEVICES = 24, 40, 16, 4


@dataclass(frozen=True)
class Timing:
    """One variant on one device; what was not measured is None."""

    variant: str
    device: str
    runtime: str
    p50_us: float
    p90_us: float | None
    p50_ci_us: Point | None
    p90_ci_us: Point | None
    size_bytes: float | None
    accuracy: float | None  # the task's metric


# What there is to draw.


def spent_by_owner(privacy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (owner, ε), the largest first.

    Example:
        >>> spent_by_owner({"epsilon_by_owner": {"anna": 1.2, "ben": 3.4}})
        [('ben', 3.4), ('anna', 1.2)]
    """
    by_owner = privacy.get("epsilon_by_owner")
    found = [(str(o), e) for o, v in by_owner.items() if (e := finite(v)) is not None] if by_owner else []
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def timings_of(summary: Mapping[str, Any]) -> list[Timing]:
    """Return every median latency that was measured, in the order of the variants.

    Example:
        >>> small = {"name": "small", "latency": {"local": {"runtime": "litert", "p50_us": 42.0}}}
        >>> [(t.variant, t.device, t.runtime, t.p50_us) for t in timings_of({"variants": [small]})]
        [('small', 'local', 'litert', 42.0)]
    """
    timings = []
    for variant in summary["variants"]:
        for device, found in (variant.get("latency") or {}).items():
            p50_us = finite(found.get("p50_us")) if isinstance(found, Mapping) else None
            if p50_us is None:
                continue
            bounds = found.get("ci")
            interval = bounds if isinstance(bounds, Mapping) else {}
            timings.append(
                Timing(
                    variant=plain(variant.get("name")),
                    device=plain(device),
                    runtime=plain(found.get("runtime") or variant.get("format")),
                    p50_us=p50_us,
                    p90_us=finite(found.get("p90_us")),
                    p50_ci_us=_pair(interval.get("p50_us")),
                    p90_ci_us=_pair(interval.get("p90_us")),
                    size_bytes=finite(variant.get("bytes")),
                    accuracy=finite(variant.get("accuracy")),
                )
            )
    return timings


def _pair(value: object) -> Point | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def devices_of(timings: Sequence[Timing]) -> list[str]:
    """Return the devices, each once, in the order in which they appear.

    Example:
        >>> small = {"name": "small", "latency": {"phone": {"p50_us": 90.0}, "local": {"p50_us": 42.0}}}
        >>> devices_of(timings_of({"variants": [small, small]}))
        ['phone', 'local']
    """
    return list(dict.fromkeys(t.device for t in timings))


def runtimes_of(timings: Sequence[Timing]) -> list[str]:
    """Return the runtimes, each once; their order gives them colour and marker.

    Example:
        >>> latency = {"local": {"p50_us": 42.0}}
        >>> variants = [{"format": name, "latency": latency} for name in ("tflite", "onnx", "tflite")]
        >>> runtimes_of(timings_of({"variants": variants}))
        ['tflite', 'onnx']
    """
    return list(dict.fromkeys(t.runtime for t in timings))


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
    runtimes = runtimes_of(timings)
    for index, device in enumerate(devices_of(timings)[:_MOST_DEVICES]):
        here = [t for t in timings if t.device == device]
        sized = [t for t in here if t.size_bytes is not None]
        if sized:
            draw = partial(_draw_front, timings=sized, runtimes=runtimes, shown=shown)
            yield Chart(f"front-{index}", f"Size against median latency on {device}", draw, 3.9)
        rows = here[:_MOST_INTERVALS]
        draw = partial(_draw_intervals, timings=rows, runtimes=runtimes)
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
    axes: "Axes", *, timings: Sequence[Timing], runtimes: Sequence[str], shown: Callable[[object], str]
) -> None:
    xs, ys = [t.p50_us for t in timings], [t.size_bytes or 0.0 for t in timings]
    if min(xs) > 0 and max(xs) / min(xs) > 15:
        axes.set_xscale("log")
    axes.margins(0.2)
    for t, y in zip(timings, ys, strict=True):
        index = runtimes.index(t.runtime) % 4
        axes.plot([t.p50_us], [y], linestyle="", marker=MARKERS[index][0], markersize=8, color=SERIES[index])
    axes.set_ylim(bottom=0)
    if len(timings) <= _MOST_LABELS:
        names = [_short(t.variant) + ("" if t.accuracy is None else f" {shown(t.accuracy)}") for t in timings]
        _label_points(axes, list(zip(xs, ys, strict=True)), names)
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.yaxis.set_major_formatter(lambda y, _: size(y))
    axes.set_xlabel("median latency")


def _draw_intervals(axes: "Axes", *, timings: Sequence[Timing], runtimes: Sequence[str]) -> None:
    """Draw p50 to p90 as a bar and both confidence intervals as whiskers, one row a variant."""
    for row, t in enumerate(timings):
        color = SERIES[runtimes.index(t.runtime) % 4]
        axes.plot([t.p50_us, t.p90_us or t.p50_us], [row, row], color=color, linewidth=7, alpha=0.45)
        for value, interval in ((t.p50_us, t.p50_ci_us), (t.p90_us, t.p90_ci_us)):
            if value is not None:
                axes.plot([value], [row], marker="|", markersize=13, markeredgewidth=2, color=color)
            if interval is not None:
                axes.plot(interval, [row, row], color=color, linewidth=2)
    _name_rows(axes, [t.variant for t in timings])
    axes.set_xlim(left=0)
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
