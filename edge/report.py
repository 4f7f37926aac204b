"""Renders summary.json as one self-contained HTML page: no script, no network, the same bytes for the same summary."""

import base64
import hashlib
import io
import json
import math
import re
import statistics
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATES = Path(__file__).with_name("templates")
_UNMEASURED = "not measured"
_SPACE = "\u00a0"  # between a number and its unit: never breaks the line
# Control characters and lone surrogates break XML or UTF-8; bidirectional overrides make a name read as another one.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
# What a layperson would say that the model does; any other task is introduced by its title.
_ABILITIES = {"digits": "reads handwritten digits"}
_COUNTS = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve"]
_LABELS = {
    "relation": "neighbour relation",
    "epsilon": "ε",
    "delta": "δ",
    "epsilon_rdp": "ε by RDP",
    "epsilon_prv": "ε by PRV",
    "max_grad_norm": "clipping norm",
}
# report.css recolours exactly these for the dark theme, by the attribute's value.
_INK, _GRID, _SERIES = "#1b1f24", "#d9dde2", ("#2f5fd0", "#b4540a", "#0f766e", "#8b3fae")
_MARKERS = (("o", "●"), ("D", "◆"), ("^", "▲"), ("s", "■"))
_MOST_NAMED_OWNERS, _MOST_LISTED_OWNERS, _MOST_INTERVALS, _MOST_LABELS, _MOST_DEVICES = 24, 200, 40, 16, 4

Point = tuple[float, float]


@dataclass(frozen=True)
class _Timing:
    """One variant on one device; what was not measured is None."""

    variant: str
    device: str
    runtime: str
    p50_us: float
    p90_us: float | None
    p50_ci_us: Point | None
    p90_ci_us: Point | None
    size_bytes: float | None
    accuracy: float | None


@dataclass(frozen=True)
class _Chart:
    """A chart to be drawn; its name makes its identifiers unique on the page."""

    name: str
    title: str
    draw: "Callable[[Axes], None]"
    height_in: float


def write_report(summary: Mapping[str, Any], path: Path) -> None:
    """Write the report of a run as one HTML file that needs no network, no script and no other file.

    Every part of the summary may be missing but ``schema_version``: what is absent or null reads "not measured".
    Every string in it is treated as untrusted.

    Args:
        summary: The content of ``summary.json``, schema version 1 (sizes in bytes, latencies in microseconds).
        path: The file to write; its folder must exist.

    Raises:
        ValueError: If the summary has another schema version, or a part of it is the wrong kind of container.
        OSError: If the file cannot be written.
    """
    path.write_text(_render(_checked(_printable(summary))), encoding="utf-8", newline="\n")


def _printable(value: Any) -> Any:  # any JSON value, of the type it came in
    """Return a JSON value whose strings, keys included, hold nothing that a page or an SVG cannot hold."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


def _checked(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with every part present, or refuse it."""
    version = summary.get("schema_version")
    if version != 1:
        raise ValueError(f"expected schema_version 1, got schema_version={version!r}; run the report's stage again")
    parts: dict[str, Any] = {name: {} for name in ("privacy", "training", "devices", "versions", "wall_s")}
    parts |= {"variants": [], "failed": []}
    for name, empty in parts.items():
        part = summary.get(name)
        whole = isinstance(part, type(empty)) and (not isinstance(part, list) or all(isinstance(p, dict) for p in part))
        if part is not None and not whole:
            expected = "a list of objects" if isinstance(empty, list) else "an object"
            raise ValueError(f"expected {name} as {expected}, got {name}={part!r:.60}; run the report's stage again")
        parts[name] = part or empty
    parts["privacy"] = parts["privacy"] or {"unit": "none"}
    return {**summary, **parts, **{key: _number(summary.get(key)) for key in ("accuracy", "accuracy_without_privacy")}}


def _render(summary: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    css = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: _UNMEASURED if value is None or isinstance(value, jinja2.Undefined) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for text_of in (percent, points, size, duration, epsilon, plain, moment):
        environment.filters[text_of.__name__] = text_of
    privacy, timings, spent = summary["privacy"], _timings(summary), _spent(summary["privacy"])
    return environment.get_template("report.html.j2").render(
        s=summary,
        css=Markup(css),  # noqa: S704  our own file
        css_sha256=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        charts={name: Markup(svg) for name, svg in _charts(summary).items()},  # noqa: S704  escaped by ElementTree
        void="VOID" in str(privacy.get("noise")),
        private=privacy.get("unit", "none") != "none",
        ability=_ABILITIES.get(str(summary.get("task"))),
        owners=_owner_count(summary),
        accuracy_interval=_wilson(summary["accuracy"], _number(summary.get("test_examples"))),
        baselines={v.get("format"): v.get("bytes") for v in summary["variants"] if v.get("label") == "float32"},
        fastest=min(timings, key=lambda t: t.p50_us, default=None),
        runtimes=[(_MARKERS[i % 4][1], f"series-{i % 4}", name) for i, name in enumerate(_runtimes(timings))],
        timed_devices=_devices(timings),
        privacy_facts=_privacy_facts(privacy),
        spent=spent,
        spent_median=statistics.median(value for _, value in spent) if spent else None,
        most_listed=_MOST_LISTED_OWNERS,
    )


# Numbers as text.


def _number(value: object) -> float | None:
    """Return a finite number, or None: what is no number was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: object) -> str:
    """Return a share as a percentage with one decimal; only 1.0 itself reads "100 %".

    Example:
        >>> percent(0.9996).replace("\u00a0", " "), percent(None)
        ('99.9 %', 'not measured')
    """
    share = _number(value)
    if share is None:
        return _UNMEASURED
    hundredths = round(100 * share, 1)
    return f"{99.9 if hundredths == 100 and share < 1 else hundredths:g}{_SPACE}%"


def points(value: object, reference: object) -> str:
    """Return the difference of two shares in percentage points, with its sign, or an empty string."""
    share, other = _number(value), _number(reference)
    if share is None or other is None:
        return ""
    difference = round(100 * (share - other), 1)
    sign = "±" if not difference else "+" if difference > 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(difference):g}{_SPACE}pt"


def _scaled(value: object, units: Sequence[str]) -> str:
    number = _number(value)
    if number is None:
        return _UNMEASURED
    step = 0
    while abs(number) >= 999.5 and step < len(units) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.0f}{_SPACE}{units[step]}" if abs(number) >= 100 else f"{number:.3g}{_SPACE}{units[step]}"


def size(size_bytes: object) -> str:
    """Return a size in decimal units with three digits (42440 bytes: 42.4 kB)."""
    return _scaled(size_bytes, ("B", "kB", "MB", "GB"))


def duration(value: object, unit_us: float = 1.0) -> str:
    """Return a duration in units of `unit_us` microseconds with three digits and its unit."""
    number = _number(value)
    return _UNMEASURED if number is None else _scaled(number * unit_us, ("µs", "ms", "s"))


def epsilon(value: object) -> str:
    """Return ε rounded up to two decimals: a guarantee is never made to look stronger."""
    if value == math.inf:
        return "∞"
    bound = _number(value)
    return _UNMEASURED if bound is None else f"{math.ceil(bound * 100 - 1e-7) / 100:.2f}"


def plain(value: object, digits: int = 6) -> str:
    """Return any JSON value as a reader expects it (1e-05 as 1e-5, lists with commas, null as not measured).

    Example:
        >>> plain(1e-05), plain(10026), plain(["a", "b"]), plain(True), plain(None)
        ('1e-5', '10,026', 'a, b', 'yes', 'not measured')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.{digits}g}")
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return _UNMEASURED if value is None else str(value) or _UNMEASURED


def moment(value: object) -> str:
    """Return an ISO 8601 time in words, or what there is of it."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return plain(value)
    return f"{when.day} {when:%B %Y, %H:%M %Z}".strip()


def _wilson(share: float | None, examples: float | None) -> Point | None:
    """Return the 95 % interval of a share (Wilson 1927), which stays inside [0, 1] where the normal one does not."""
    if share is None or not examples:
        return None
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples * examples))
    return middle - half, middle + half


# What the page says about privacy.


def _owner_count(summary: Mapping[str, Any]) -> str:
    count = summary["training"].get("owners") or len(_spent(summary["privacy"]))
    if not isinstance(count, int) or count < 1:
        return "Several owners"
    return f"{_COUNTS[count] if count < len(_COUNTS) else count} owner{'s' if count > 1 else ''}"


def _spent(privacy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (owner, ε), the largest first."""
    by_owner = privacy.get("epsilon_by_owner")
    found = [(str(o), e) for o, v in by_owner.items() if (e := _number(v)) is not None] if by_owner else []
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _privacy_facts(privacy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every field but the statement and the owners' table, with δ beside each ε."""
    facts = []
    for key, value in privacy.items():
        if key in ("statement", "epsilon_by_owner"):
            continue
        text = plain(value)
        if key.startswith("epsilon"):
            text = f"{epsilon(value)} at δ = {plain(privacy.get('delta'))}"
            if value is None:
                text = "not cross-checked" if key != "epsilon" else _UNMEASURED
        facts.append((_LABELS.get(key, key.replace("_", " ")), text))
    return facts


# Charts.


def _timings(summary: Mapping[str, Any]) -> list[_Timing]:
    timings = []
    for variant in summary["variants"]:
        for device, found in (variant.get("latency") or {}).items():
            p50_us = _number((found or {}).get("p50_us"))
            if p50_us is None:
                continue
            interval = found.get("ci") or {}
            timings.append(
                _Timing(
                    variant=plain(variant.get("name")),
                    device=plain(device),
                    runtime=plain(found.get("runtime") or variant.get("format")),
                    p50_us=p50_us,
                    p90_us=_number(found.get("p90_us")),
                    p50_ci_us=_pair(interval.get("p50_us")),
                    p90_ci_us=_pair(interval.get("p90_us")),
                    size_bytes=_number(variant.get("bytes")),
                    accuracy=_number(variant.get("accuracy")),
                )
            )
    return timings


def _pair(value: object) -> Point | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = _number(value[0]), _number(value[1])
    return None if low is None or high is None else (low, high)


def _devices(timings: Sequence[_Timing]) -> list[str]:
    return list(dict.fromkeys(t.device for t in timings))


def _runtimes(timings: Sequence[_Timing]) -> list[str]:
    return list(dict.fromkeys(t.runtime for t in timings))


def _trace(rounds: object, key: str) -> list[Point]:
    """Return (round, value) of the rounds at which the value was taken."""
    if not isinstance(rounds, list):
        return []
    pairs = ((_number(r.get("round")), _number(r.get(key))) for r in rounds if isinstance(r, Mapping))
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _charts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of every chart that there is data for; front and latency are drawn per device."""
    training, spent = summary["training"], _spent(summary["privacy"])
    private, twin = _trace(training.get("rounds"), "accuracy"), _trace(training.get("twin"), "accuracy")
    budget = _trace(training.get("rounds"), "epsilon")
    charts: list[_Chart] = []
    if private or twin:
        curves = [("private" if spent or budget else "this run", private), ("twin", twin)]
        draw = partial(_draw_curves, curves=curves, text=percent)
        charts.append(_Chart("accuracy", "Accuracy over the rounds of training", draw, 3.1))
    if budget:
        draw = partial(_draw_curves, curves=[("ε", budget)], text=epsilon)
        charts.append(_Chart("budget", "ε spent after each round", draw, 3.1))
    if spent:
        height = 0.8 + 0.27 * min(len(spent), _MOST_NAMED_OWNERS)
        charts.append(_Chart("owners", "ε per owner", partial(_draw_owners, spent=spent), height))
    charts += _device_charts(_timings(summary))
    return {chart.name: _svg(chart) for chart in charts}


def _device_charts(timings: Sequence[_Timing]) -> Iterator[_Chart]:
    runtimes = _runtimes(timings)
    for index, device in enumerate(_devices(timings)[:_MOST_DEVICES]):
        here = [t for t in timings if t.device == device]
        sized = [t for t in here if t.size_bytes is not None]
        if sized:
            draw = partial(_draw_front, timings=sized, runtimes=runtimes)
            yield _Chart(f"front-{index}", f"Size against median latency on {device}", draw, 3.9)
        rows = here[:_MOST_INTERVALS]
        draw = partial(_draw_intervals, timings=rows, runtimes=runtimes)
        height = 0.9 + (0.5 if len(rows) < 8 else 0.36) * len(rows)
        yield _Chart(f"latency-{index}", f"Latency from median to 90th percentile on {device}", draw, height)


def _draw_curves(axes: "Axes", *, curves: Sequence[tuple[str, Sequence[Point]]], text: Callable[[object], str]) -> None:
    drawn = [(name, xy, color) for (name, xy), color in zip(curves, _SERIES, strict=False) if xy]
    for _, xy, color in drawn:
        axes.plot(*zip(*xy, strict=True), color=color, linewidth=2, marker="o" if len(xy) < 3 else None)
    low, high = axes.get_ylim()
    ends = [(name, xy[-1], color) for name, xy, color in drawn]
    shifts = _spread([(y - low) / (high - low) * 190 for _, (_, y), _ in ends], gap=16)
    for (name, (x, y), color), shift in zip(ends, shifts, strict=True):
        _write(axes, f"{name} {text(y)}", (x, y), offset=(7, shift), color=color)
    axes.yaxis.set_major_formatter(lambda y, _: percent(y) if text is percent else plain(float(y)))
    axes.set_xlabel("round")


def _draw_owners(axes: "Axes", *, spent: Sequence[tuple[str, float]]) -> None:
    """Draw one bar an owner, or the distribution where the owners are too many to name."""
    if len(spent) > _MOST_NAMED_OWNERS:
        axes.hist([value for _, value in spent], bins=20, color=_SERIES[0])
        axes.set_ylabel("owners")
        axes.set_xlabel("ε")
        return
    rows = range(len(spent))
    axes.barh(rows, [value for _, value in spent], color=_SERIES[0], height=0.62)
    for row, (_, value) in zip(rows, spent, strict=True):
        _write(axes, epsilon(value), (value, row), offset=(5, 0))
    _name_rows(axes, [owner for owner, _ in spent])
    axes.set_xlim(0, spent[0][1] * 1.14 or 1)
    axes.set_xlabel("ε")


def _draw_front(axes: "Axes", *, timings: Sequence[_Timing], runtimes: Sequence[str]) -> None:
    xs, ys = [t.p50_us for t in timings], [t.size_bytes or 0.0 for t in timings]
    if min(xs) > 0 and max(xs) / min(xs) > 15:
        axes.set_xscale("log")
    axes.margins(0.2)
    for t, y in zip(timings, ys, strict=True):
        index = runtimes.index(t.runtime) % 4
        axes.plot([t.p50_us], [y], linestyle="", marker=_MARKERS[index][0], markersize=8, color=_SERIES[index])
    axes.set_ylim(bottom=0)
    if len(timings) <= _MOST_LABELS:
        names = [f"{_short(t.variant)} {percent(t.accuracy)}" for t in timings]
        _label_points(axes, list(zip(xs, ys, strict=True)), names)
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.yaxis.set_major_formatter(lambda y, _: size(y))
    axes.set_xlabel("median latency")


def _draw_intervals(axes: "Axes", *, timings: Sequence[_Timing], runtimes: Sequence[str]) -> None:
    """Draw p50 to p90 as a bar and both confidence intervals as whiskers, one row a variant."""
    for row, t in enumerate(timings):
        color = _SERIES[runtimes.index(t.runtime) % 4]
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
        _write(axes, name, place, offset=offers[best], left=offers[best][0] < 0)


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


def _write(axes: "Axes", text: str, xy: Point, *, offset: Point, color: str = _INK, left: bool = False) -> None:
    side = "right" if left else "left"
    axes.annotate(
        text, xy, offset, textcoords="offset points", ha=side, va="center", color=color, fontsize=11.5, parse_math=False
    )


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    for label in axes.set_yticks(range(len(names)), [_short(name) for name in names]):
        label.label1.set_parse_math(False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _svg(chart: _Chart) -> str:
    """Return a chart as an SVG element whose identifiers are its own and whose style is only attributes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    target = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # The reader's browser draws the text, so it does not matter that DejaVu lacks the glyphs of a name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tacit", "font.size": 11.5, "text.color": _INK})
        figure = Figure(figsize=(5.0, chart.height_in), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, pad=7, labelcolor=_INK)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        chart.draw(axes)
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inlined(ET.fromstring(target.getvalue()), name=chart.name, title=chart.title)  # noqa: S314  matplotlib's own output


def _inlined(svg: ET.Element, *, name: str, title: str) -> str:
    for parent in list(svg.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for marker in svg.findall(".//{*}defs/{*}path"):
        marker.attrib.pop("style", None)  # inherited from each use of it, which the theme can recolour
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        declarations = (d.partition(":") for d in attributes.pop("style", "").split(";") if d.strip())
        attributes |= {key.strip(): value.strip() for key, _, value in declarations}
        attributes.pop("font-family", None)  # the page's
        for key, value in attributes.items():
            own = f"{name}-{value}" if key == "id" else value.replace("url(#", f"url(#{name}-")
            attributes[key] = f"#{name}-{value[1:]}" if key == "href" else own
        element.attrib = attributes
    svg.attrib = {"viewBox": svg.get("viewBox", ""), "role": "img", "aria-labelledby": f"{name}-title"}
    svg.attrib |= {"stroke-linejoin": "round", "class": "chart"}
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = title
    svg.insert(0, heading)
    return ET.tostring(svg, encoding="unicode")
