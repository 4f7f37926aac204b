"""Renders summary.json as one self-contained HTML page: no script, no network, the same bytes for the same summary."""

import base64
import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tacit.edge.audit_charts import draw_audit_charts, membership_of
from tacit.edge.charts import begins_at, draw_charts, spent_by_owner
from tacit.edge.device_charts import PARTS, draw_device_charts
from tacit.edge.metric_words import (
    apart,
    metric_meaning,
    metric_name,
    metric_phrase,
    metric_title,
    metric_value,
    of_spread,
    points,
)
from tacit.edge.report_devices import (
    accuracy_there,
    asked_devices,
    badge_of,
    describe_devices,
    entries_on,
    group_failures,
    timed_cells,
)
from tacit.edge.report_fits import list_elsewhere, list_fits
from tacit.edge.report_rounds import describe_traffic, is_at_most, list_aside, list_refusals
from tacit.edge.timings import Timing, charted_devices, latency_limit, marks_of, timings_of
from tacit.edge.wording import (
    UNMEASURED,
    audit_claim,
    audit_finding,
    audit_question,
    audit_verdict,
    duration,
    epsilon,
    finite,
    moment,
    percent,
    plain,
    size,
)

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
_MOST_DEVICES = 8
_TABLES = ("privacy", "training", "devices", "measured", "versions", "wall_s", "audit")
_MOST_LISTED_FACTS = 24
# What a measurement's flags mean, by tacit.devices.protocol.Latency.
_FLAGS: Final = {
    "noisy": "the spread (relative standard deviation) is above 10\u00a0%",
    "drift": "the medians of the first and the last third of the measurement differ by more than 5\u00a0%",
    "averaged": "runs were timed in groups, because one is shorter than 100 clock ticks or there are too many to keep "
    "each; the tail is flatter than a user would see",
    "few-samples": "too few runs to support a 90th percentile",
    "steal": "other virtual machines took more than 2\u00a0% of the processor's time",
    "contended": "other programs had the processor for more than 2\u00a0% of the time that it was wanted",
    "throttled": "the device slowed itself down: it says so, or its clock fell, or it became slower as it grew hotter",
    "incomplete": "the page was closed before all runs were made",
    "slowed": "a browser became more than 10\u00a0% slower in a sustained run",
    "departs": "it is right much less often there than where it was judged: the device computes something else",
    "governor": "the clock may change while we measure: its governor is not \u201cperformance\u201d",
}


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

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report({"schema_version": 1}, Path(folder, "report.html"))
        ...     Path(folder, "report.html").read_text(encoding="utf-8")[:15]
        '<!doctype html>'
    """
    path.write_text(_render(_checked(_printable(summary))), encoding="utf-8", newline="\n")


def _printable(value: Any) -> Any:  # any JSON value, of the type it came in
    """Return a JSON value whose strings, keys included, hold nothing that a page cannot hold; NaN is no value."""
    if isinstance(value, float) and math.isnan(value):
        return None
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
    parts: dict[str, Any] = {name: {} for name in _TABLES}
    parts |= {"variants": [], "failed": []}
    for name, empty in parts.items():
        part = summary.get(name)
        whole = isinstance(part, type(empty)) and (not isinstance(part, list) or all(isinstance(p, dict) for p in part))
        if part is not None and not whole:
            expected = "a list of objects" if isinstance(empty, list) else "an object"
            raise ValueError(f"expected {name} as {expected}, got {name}={part!r:.60}; run the report's stage again")
        parts[name] = part or empty
    parts["privacy"] = parts["privacy"] or {"unit": "none"}
    metric = summary.get("metric")
    reached = {key: finite(summary.get(key)) for key in ("accuracy", "accuracy_without_privacy")}
    return {**summary, **parts, **reached, "metric": metric if isinstance(metric, str) and metric else "accuracy"}


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
    audited = (audit_question, audit_finding, audit_claim, audit_verdict)
    measured = (apart, points, of_spread, metric_meaning, metric_name, metric_phrase, metric_title, metric_value)
    there = (accuracy_there, badge_of)
    for text_of in (percent, size, duration, epsilon, plain, moment, *measured, *there, *audited):
        environment.filters[text_of.__name__] = text_of
    privacy, timings, variants = summary["privacy"], timings_of(summary), summary["variants"]
    spent, owners = spent_by_owner(privacy), _count_owners(summary)
    charts = {**draw_charts(summary), **draw_audit_charts(summary)}
    for number, device in enumerate(asked_devices(summary)[:_MOST_DEVICES]):
        charts |= draw_device_charts(device, entries_on(summary, device), number=number)
    return environment.get_template("report.html.j2").render(
        s=summary,
        css=Markup(css),  # noqa: S704  our own file
        css_sha256=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        charts={name: Markup(svg) for name, svg in charts.items()},  # noqa: S704  escaped by ElementTree
        void="VOID" in str(privacy.get("noise")),
        private=privacy.get("unit", "none") != "none",
        ability=_ABILITIES.get(str(summary.get("task"))),
        owners=_name_owners(owners),
        alone=owners == 1,
        accuracy_interval=_interval(summary),
        axis_from=begins_at(summary),
        at_most=is_at_most(summary),
        traffic=describe_traffic(summary["training"]),
        refusals=list_refusals(summary["training"]),
        aside=list_aside(summary["training"]),
        made_up=_made_up(variants),
        forms=_describe_forms(variants),
        baselines=_find_baselines(variants),
        flags=_explain_flags(variants),
        fastest=min((t for t in timings if not t.is_wrong), key=lambda t: t.p50_us, default=None),
        charted=_describe_charted(timings),
        uncharted=charted_devices(timings)[1],
        most_devices=_MOST_DEVICES,
        timed_cells=timed_cells(summary),
        devices=describe_devices(summary),
        parts=PARTS,
        elsewhere=list_elsewhere(summary),
        fits=list_fits(summary),
        failures=group_failures(summary),
        privacy_facts=_privacy_facts(privacy),
        spent=spent,
        spent_median=statistics.median(value for _, value in spent) if spent else None,
        most_listed=_MOST_LISTED_OWNERS,
        audit=_describe_audit(summary),
    )


def _interval(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the interval of an accuracy; other metrics are no shares."""
    if summary["metric"] != "accuracy":
        return None
    return _wilson(summary["accuracy"], finite(summary.get("test_examples")))


def _wilson(share: float | None, examples: float | None) -> tuple[float, float] | None:
    """Return the 95 % interval of a share (Wilson 1927), which stays inside [0, 1] where the normal one does not."""
    if share is None or not examples:
        return None
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples * examples))
    return middle - half, middle + half


# What the page says about the variants.


def _describe_charted(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Return each device with charts of size and latency: what its marks mean, and whether its axis of time is cut."""
    marks, described = marks_of(timings), []
    for device in charted_devices(timings)[0]:
        here = [t for t in timings if t.device == device]
        names = dict.fromkeys(t.runtime for t in here)
        key = [(marks[name].letter, f"series-{marks[name].series}", name) for name in names]
        described.append({"name": device, "key": key, "is_cut": latency_limit(here) is not None})
    return described


def _made_up(variants: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether agreement or latency were taken on synthetic inputs, for lack of public ones."""
    found = [v.get("parity") for v in variants]
    found += [timing for v in variants for timing in (v.get("latency") or {}).values()]
    return any(isinstance(f, Mapping) and f.get("input_source") == "synthetic" for f in found)


def _describe_forms(variants: Sequence[Mapping[str, Any]]) -> str:
    """Return what was made of the one training: "6 forms: some are pruned, distilled or quantised"."""
    names = {p.get("name") for v in variants for p in v.get("passes") or [] if isinstance(p, Mapping)}
    made = {
        "pruned": "prune" in names or any(finite(v.get("pruned")) for v in variants),
        "distilled": "distill" in names,
        "quantised": any("int8" in str(v.get("label")) for v in variants),
    }
    done = [word for word, is_true in made.items() if is_true]
    *others, last = done or ["as it was trained"]
    if len(variants) == 1:
        return f"one form, {', '.join(others)}{' and ' if others else ''}{last}"
    some = f": some are {', '.join(others)}{' or ' if others else ''}{last}" if done else ""
    return f"{len(variants)} forms{some}"


def _find_baselines(variants: Sequence[Mapping[str, Any]]) -> dict[object, object]:
    """Return each format's size in bytes of the float32 file that no pass has touched; the first one counts."""
    untouched = (v for v in variants if v.get("label") == "float32" and not v.get("passes"))
    baselines: dict[object, object] = {}
    for variant in untouched:
        baselines.setdefault(variant.get("format"), variant.get("bytes"))
    return baselines


def _explain_flags(variants: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the meaning of every flag that some measurement carries."""
    found = [timing for v in variants for timing in (v.get("latency") or {}).values() if isinstance(timing, Mapping)]
    listed = [timing.get("flags") for timing in found]
    raised = {str(flag) for flags in listed if isinstance(flags, list) for flag in flags}
    return {flag: meaning for flag, meaning in _FLAGS.items() if flag in raised}


# What the page says about privacy.


def _count_owners(summary: Mapping[str, Any]) -> int | None:
    count = summary["training"].get("owners") or len(spent_by_owner(summary["privacy"]))
    return count if isinstance(count, int) and count > 0 else None


def _name_owners(count: int | None) -> str:
    if count is None:
        return "Several owners"
    return f"{_COUNTS[count] if count < len(_COUNTS) else plain(count)} owner{'s' if count > 1 else ''}"


def _privacy_facts(privacy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every field but the statement and the owners' table, with δ beside each ε."""
    facts = []
    for key, value in privacy.items():
        if key in ("statement", "epsilon_by_owner"):
            continue
        text = plain(value)
        if key.startswith("epsilon"):
            text = _state_epsilon(key, privacy)
        elif isinstance(value, list) and len(value) > _MOST_LISTED_FACTS:  # such as the ledger heads of all owners
            first, more = plain(value[:_MOST_LISTED_FACTS]), plain(len(value) - _MOST_LISTED_FACTS)
            text = f"{first} and {more} more, in summary.json"
        facts.append((_LABELS.get(key, key.replace("_", " ")), text))
    return facts


def _state_epsilon(key: str, privacy: Mapping[str, Any]) -> str:
    """Return an ε with its δ and, where it is an accountant's second opinion, why it is not the reported one."""
    value = privacy[key]
    if value is None:
        return "not cross-checked" if key != "epsilon" else UNMEASURED
    # Where the reported ε is itself by RDP, no other figure is tighter.
    looser = ", looser" if value != privacy.get("epsilon") else ""
    reasons = {
        "epsilon_prv": " (its error margin of 0.01 is added on top)",
        "epsilon_rdp": f" (an upper bound{looser})",
    }
    return f"{epsilon(value)} at δ = {plain(privacy.get('delta'))}{reasons.get(key, '')}"


# What the page says about attacks.


def _describe_audit(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the audit's tests in the order of the page, with a row for each model; empty where none was made."""
    audit = summary["audit"]
    tests = [test for test in audit.get("tests") or [] if isinstance(test, Mapping)]
    asked = membership_of(summary)
    digests = {variant.get("name"): variant.get("sha256") for variant in summary["variants"]}
    canaries = [test for test in tests if test.get("name") == "canaries"]
    return {
        "verdict": audit.get("verdict"),
        "statement": audit.get("statement"),
        "created": audit.get("created"),
        # One line for all models; the table below has one for each.
        "tests": [*(test for test in tests if test not in asked), *asked[:1]],
        "models": asked,
        "outdated": [
            t.get("artifact") for t in asked if digests.get(t.get("artifact"), t.get("sha256")) != t.get("sha256")
        ],
        "reasons": [f"{plain(t.get('name'))}: {plain(t.get('reason'))}" for t in tests if t.get("verdict") == "fail"],
        "bound": canaries[0] if canaries and finite(canaries[0].get("statistic")) is not None else None,
        "skipped": [test for test in audit.get("skipped") or [] if isinstance(test, Mapping)],
    }
