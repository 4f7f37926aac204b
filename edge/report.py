"""Renders summary.json as one self-contained HTML page: no script, no network, the same bytes for the same summary."""

import base64
import hashlib
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tacit.edge.charts import MARKERS, devices_of, draw_charts, runtimes_of, spent_by_owner, timings_of
from tacit.edge.wording import UNMEASURED, duration, epsilon, finite, moment, percent, plain, points, size

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).with_name("templates")
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
_MOST_LISTED_OWNERS = 200


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
    return {**summary, **parts, **{key: finite(summary.get(key)) for key in ("accuracy", "accuracy_without_privacy")}}


def _render(summary: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    css = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: UNMEASURED if value is None or isinstance(value, jinja2.Undefined) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for text_of in (percent, points, size, duration, epsilon, plain, moment):
        environment.filters[text_of.__name__] = text_of
    privacy, timings, spent = summary["privacy"], timings_of(summary), spent_by_owner(summary["privacy"])
    return environment.get_template("report.html.j2").render(
        s=summary,
        css=Markup(css),  # noqa: S704  our own file
        css_sha256=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        charts={name: Markup(svg) for name, svg in draw_charts(summary).items()},  # noqa: S704  escaped by ElementTree
        void="VOID" in str(privacy.get("noise")),
        private=privacy.get("unit", "none") != "none",
        ability=_ABILITIES.get(str(summary.get("task"))),
        owners=_owner_count(summary),
        accuracy_interval=_wilson(summary["accuracy"], finite(summary.get("test_examples"))),
        baselines={v.get("format"): v.get("bytes") for v in summary["variants"] if v.get("label") == "float32"},
        fastest=min(timings, key=lambda t: t.p50_us, default=None),
        runtimes=[(MARKERS[i % 4][1], f"series-{i % 4}", name) for i, name in enumerate(runtimes_of(timings))],
        timed_devices=devices_of(timings),
        privacy_facts=_privacy_facts(privacy),
        spent=spent,
        spent_median=statistics.median(value for _, value in spent) if spent else None,
        most_listed=_MOST_LISTED_OWNERS,
    )


def _wilson(share: float | None, examples: float | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a share (Wilson 1927), which stays inside [0, 1] where the normal one does not."""
    if share is None or not examples:
        return None
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples * examples))
    return middle - half, middle + half


# What the page says about privacy.


def _owner_count(summary: Mapping[str, Any]) -> str:
    count = summary["training"].get("owners") or len(spent_by_owner(summary["privacy"]))
    if not isinstance(count, int) or count < 1:
        return "Several owners"
    return f"{_COUNTS[count] if count < len(_COUNTS) else count} owner{'s' if count > 1 else ''}"


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
                text = "not cross-checked" if key != "epsilon" else UNMEASURED
        facts.append((_LABELS.get(key, key.replace("_", " ")), text))
    return facts
