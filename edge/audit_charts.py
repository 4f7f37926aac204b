"""The audit's chart: how well an attack tells members from others, beside chance and what the guarantee allows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tacit.edge.svg import GRID, INK, SERIES, Chart, Point, render
from tacit.edge.wording import epsilon, finite, plain
from tacit.federated.membership import allowed_hit_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_audit_charts", "membership_of"]

_MOST_CURVES = 12
_LEFTMOST = 1e-4  # false positive rate at which the axes begin
_DASHES = ("-", "--", ":", "-.")
Curve = tuple[str, list[Point]]


def membership_of(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the membership tests of an audit, one for each model that was asked.

    Example:
        >>> membership_of({"audit": {"tests": [{"name": "noise"}, {"name": "membership", "artifact": "small"}]}})
        [{'name': 'membership', 'artifact': 'small'}]
    """
    audit = summary.get("audit")
    tests = audit.get("tests") if isinstance(audit, Mapping) else None
    listed = tests if isinstance(tests, list) else []
    return [test for test in listed if isinstance(test, Mapping) and test.get("name") == "membership"]


def draw_audit_charts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of the membership curves, or nothing where no model was asked."""
    curves = [(_short(test.get("artifact")), points) for test in membership_of(summary) if (points := _curve(test))]
    if not curves:
        return {}
    draw = partial(_draw_curves, curves=curves[:_MOST_CURVES], allowed=_allowed(summary))
    return {"membership": render(Chart("membership", "How well an attack finds members", draw, 5.2))}


def _curve(test: Mapping[str, Any]) -> list[Point]:
    """Return (false positive rate, hit rate) where both can stand on a logarithmic axis."""
    details = test.get("details")
    listed = details.get("curve") if isinstance(details, Mapping) else None
    points = []
    for pair in listed if isinstance(listed, list) else []:
        x, y = (finite(value) for value in pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if x is not None and y is not None and 0 < x <= 1 and 0 < y <= 1:
            points.append((x, y))
    return points


def _allowed(summary: Mapping[str, Any]) -> Curve | None:
    """Return the most that the guarantee allows, where its unit covers the membership of one record."""
    privacy = summary.get("privacy") or {}
    bound, delta = finite(privacy.get("epsilon")), finite(privacy.get("delta"))
    covered = privacy.get("unit") in ("record", "local") and "VOID" not in str(privacy.get("noise"))
    if bound is None or delta is None or bound < 0 or not covered:
        return None
    xs = [_LEFTMOST ** (1 - step / 100) for step in range(101)]
    points = [(x, allowed_hit_rate(x, epsilon=bound, delta=delta)) for x in xs]
    return f"the most that ε = {epsilon(bound)} allows", points


def _draw_curves(axes: "Axes", *, curves: Sequence[Curve], allowed: Curve | None) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([_LEFTMOST, 1.0], [_LEFTMOST, 1.0], color=GRID, linewidth=5, label="chance")
    for index, (name, points) in enumerate(curves):
        color, dash = SERIES[index % 3], _DASHES[index // 3 % len(_DASHES)]
        width, above = (2.4, 3) if index == 0 else (1.5, 2)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linestyle=dash, linewidth=width, label=name, zorder=above)
    if allowed is not None:
        name, points = allowed
        axes.plot(*zip(*points, strict=True), color=SERIES[3], linewidth=2, label=name)
    axes.set_xlim(_LEFTMOST, 1.0)
    axes.set_ylim(_LEFTMOST, 1.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: plain(float(value)))
        axis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("members recognised")
    axes.tick_params(which="minor", length=0)
    key = axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=10.5, labelcolor=INK)
    for text in key.get_texts():
        text.set_parse_math(False)


def _short(name: object, length: int = 30) -> str:
    text = plain(name)
    return text if len(text) <= length else text[: length - 1] + "…"
