"""A chart as an SVG element of the page: no script, no embedded font, the same bytes for the same drawing."""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GRID", "INK", "SERIES", "Chart", "Point", "render", "write_text"]

# report.css recolours exactly these for the dark theme, by the attribute's value.
INK, GRID, SERIES = "#1b1f24", "#d9dde2", ("#2f5fd0", "#b4540a", "#0f766e", "#8b3fae")

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A chart to be drawn; its name makes its identifiers unique on the page."""

    name: str
    title: str
    draw: "Callable[[Axes], None]"
    height_in: float


def write_text(axes: "Axes", text: str, xy: Point, *, offset: Point, color: str = INK, left: bool = False) -> None:
    """Write beside a point, at an offset in points; text is never read as mathematics."""
    side = "right" if left else "left"
    axes.annotate(
        text, xy, offset, textcoords="offset points", ha=side, va="center", color=color, fontsize=11.5, parse_math=False
    )


def render(chart: Chart) -> str:
    """Return a chart as an SVG element whose identifiers are its own and whose style is only attributes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    target = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # The reader's browser draws the text, so it does not matter that DejaVu lacks the glyphs of a name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tacit", "font.size": 11.5, "text.color": INK})
        figure = Figure(figsize=(5.0, chart.height_in), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(length=0, pad=7, labelcolor=INK)
        axes.grid(color=GRID, linewidth=0.8)
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
