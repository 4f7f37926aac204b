"""What the report says of devices where nothing was timed: whether answers agree, and what would fit where."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tacit.edge.report_devices import Row, badge_of, mapping_of, texts_of
from tacit.edge.wording import finite, percent, plain, size

__all__ = ["list_elsewhere", "list_fits"]

_KINDS: Final = {"mcu": "Microcontrollers", "sbc": "Single-board computers", "phone": "Phones"}
_MOST_ARTIFACTS = 24


def _rows(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def list_elsewhere(summary: Mapping[str, Any]) -> list[Row]:
    """Return each device that tells answers alone: why it has no latency, and a line for each artifact."""
    devices = [str(device) for v in summary["variants"] for device in mapping_of(v.get("answers_on"))]
    about, listed = mapping_of(summary.get("measured")), []
    for device in dict.fromkeys(devices):
        reason = mapping_of(about.get(device)).get("latency")
        rows = [
            _answer(plain(variant.get("name")), mapping_of(answers[device]))
            for variant in summary["variants"]
            if device in (answers := mapping_of(variant.get("answers_on")))
        ]
        listed.append({"name": device, "badge": badge_of(device), "why": reason, "rows": rows})
    return listed


def _answer(name: str, entry: Mapping[str, Any]) -> Row:
    off, scale = finite(entry.get("max_abs")), finite(entry.get("scale"))
    ratio = off / scale if off is not None and scale else None
    share = None if ratio is None else "less than 0.1\u00a0%" if 0 < ratio < 1e-3 else percent(ratio)
    arena = finite(entry.get("arena_bytes"))
    return {
        "name": name,
        "inputs": entry.get("n"),
        "agreement": entry.get("top1_agreement"),
        "off": plain(off, 2) if off is not None else plain(None),
        "share": f"{share} of the largest output" if share else None,
        "arena": size(arena) if arena is not None else None,
        "operators": len(texts_of(entry.get("operators"))) or None,
    }


def list_fits(summary: Mapping[str, Any]) -> list[Row]:
    """Return, for each kind of board or phone, its artifacts, the smallest first, each with a row a profile.

    Example:
        >>> row = {"kind": "mcu", "title": "Board", "artifact": "a", "verdict": "fits", "why": "4 KiB to spare"}
        >>> [group] = list_fits({"variants": [], "measured": {"micro": {"fit": [row]}}})
        >>> group["title"], group["artifacts"][0]["verdicts"]
        ('Microcontrollers', 'fits 1 of 1')
    """
    rows = [row for told in mapping_of(summary.get("measured")).values() for row in _rows(mapping_of(told).get("fit"))]
    sizes = {plain(variant.get("name")): finite(variant.get("bytes")) for variant in summary["variants"]}
    kinds = [(kind, title, [row for row in rows if row.get("kind") == kind]) for kind, title in _KINDS.items()]
    return [{"title": title, **_fit_group(found, sizes), "notes": _notes(found)} for _, title, found in kinds if found]


def _fit_group(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, float | None]) -> Row:
    names = list(dict.fromkeys(plain(row.get("artifact")) for row in rows))
    ordered = sorted(names, key=lambda name: sizes.get(name) or math.inf)
    listed = []
    for name in ordered[:_MOST_ARTIFACTS]:
        own = [row for row in rows if plain(row.get("artifact")) == name]
        fits = sum(row.get("verdict") == "fits" for row in own)
        verdicts = f"fits {fits} of {len(own)}"
        listed.append({"name": name, "bytes": sizes.get(name), "rows": own, "verdicts": verdicts})
    return {"artifacts": listed, "more": len(ordered) - len(listed)}


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the profiles take for granted, once for each."""
    return list(dict(_noted(rows)).items())


def _noted(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for row in rows:
        if row.get("note"):
            yield plain(row.get("title")), plain(row.get("note"))
