"""What the report says of devices that were timed: what each gave, what it did not, and why."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tacit.edge.device_charts import PARTS, Entries, cold_limit, curve_of, ratios_of
from tacit.edge.wording import date_of, day, duration, finite, percent, plain

__all__ = [
    "INPUT_SOURCES",
    "Row",
    "accuracy_there",
    "asked_devices",
    "badge_of",
    "describe_devices",
    "energy",
    "entries_on",
    "group_failures",
    "mapping_of",
    "texts_of",
    "timed_cells",
]

_BADGES: Final = {
    "qemu": "emulated: parity only",
    "micro": "kernels on this computer: parity only",
    "browser": "in-browser",
}
INPUT_SOURCES: Final = {
    "synthetic": "on synthetic inputs: no public ones were declared",
    "random": "on random inputs, which benchmark_model makes itself",
}
_MOST_OPERATORS, _MOST_PROFILES, _MOST_NAMES = 10, 24, 6
Row = dict[str, Any]


def mapping_of(value: object) -> Mapping[str, Any]:
    """Return an object of a summary, or an empty one: what has another shape was not measured."""
    return value if isinstance(value, Mapping) else {}


def texts_of(value: object) -> list[str]:
    """Return a list of a summary as texts, or an empty one."""
    return [plain(item) for item in value] if isinstance(value, list) else []


def badge_of(device: object) -> str | None:
    """Return what must stand beside a device's name: that its figures are not those of the bare machine.

    Example:
        >>> badge_of("qemu:aarch64"), badge_of("browser"), badge_of("local")
        ('emulated: parity only', 'in-browser', None)
    """
    return _BADGES.get(str(device).partition(":")[0])


def asked_devices(summary: Mapping[str, Any]) -> list[str]:
    """Return the devices that were asked for a latency, whether or not they gave one.

    Example:
        >>> lost = {"mode": "quick", "failed": {"a": "unplugged"}}
        >>> asked_devices({"variants": [{"latency": {"local": {}}}], "measured": {"adb": lost}})
        ['local', 'adb']
    """
    timed = [str(device) for variant in summary["variants"] for device in mapping_of(variant.get("latency"))]
    about = mapping_of(summary.get("measured"))
    lost = [str(name) for name, told in about.items() if mapping_of(told).get("mode") != "parity"]
    told = [name for name in lost if mapping_of(about[name]).get("failed") or mapping_of(about[name]).get("lost")]
    return list(dict.fromkeys([*timed, *told]))


def entries_on(summary: Mapping[str, Any], device: str) -> Entries:
    """Return what was measured of each variant on a device."""
    found = ((plain(v.get("name")), mapping_of(v.get("latency")).get(device)) for v in summary["variants"])
    return {name: entry for name, entry in found if isinstance(entry, Mapping)}


def timed_cells(summary: Mapping[str, Any]) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Return, for each variant, every device that was asked for it, with what it gave: nothing where it failed.

    Example:
        >>> measured = {"ssh:pi": {"mode": "quick", "failed": {"a": "nobody listens"}}}
        >>> variants = [{"name": "a", "latency": {"local": {"p50_us": 1.0}}}, {"name": "b"}]
        >>> timed_cells({"variants": variants, "measured": measured})
        [[('local', {'p50_us': 1.0}), ('ssh:pi', {})], []]
    """
    devices, about = asked_devices(summary), mapping_of(summary.get("measured"))
    cells = []
    for variant in summary["variants"]:
        found, name = mapping_of(variant.get("latency")), variant.get("name")
        failed = [device for device in devices if name in mapping_of(mapping_of(about.get(device)).get("failed"))]
        asked = [device for device in devices if device in found or device in failed]
        cells.append([(device, _cell(found.get(device))) for device in asked])
    return cells


def _cell(entry: object) -> Mapping[str, Any]:
    found = mapping_of(entry)
    return {**found, "flags": texts_of(found.get("flags"))} if "flags" in found else found


def accuracy_there(entry: Mapping[str, Any]) -> str | None:
    """Return the accuracy that an artifact reached on a device itself, where that was tried.

    Example:
        >>> top1 = {"estimate": 0.94, "low": 0.915, "high": 0.958}
        >>> accuracy_there({"accuracy": {"n": 500, "top1": top1}}).replace("\u00a0", " ")
        '94 % (91.5 % to 95.8 %, 500 inputs)'
    """
    found = mapping_of(entry.get("accuracy"))
    if not found:
        return plain(None) if "accuracy" in mapping_of(entry.get("not_measured")) else None
    shares = [mapping_of(found.get("top1")).get(key) for key in ("estimate", "low", "high")]
    if finite(shares[0]) is None:
        return plain(None)
    return f"{percent(shares[0])} ({percent(shares[1])} to {percent(shares[2])}, {plain(found.get('n'))} inputs)"


def describe_devices(summary: Mapping[str, Any]) -> list[Row]:
    """Return, for each device that was asked for a latency, what the page shows of it beside the table of variants."""
    return [_describe(summary, device, number) for number, device in enumerate(asked_devices(summary))]


def _describe(summary: Mapping[str, Any], device: str, number: int) -> Row:
    about, entries = mapping_of(mapping_of(summary.get("measured")).get(device)), entries_on(summary, device)
    sources = [entry.get("input_source") for entry in entries.values()]
    view = {
        "name": device,
        "number": number,
        "badge": badge_of(device),
        "phones": _phones(entries),
        "days": _days(entries),
        "inputs": INPUT_SOURCES["random"] if "random" in sources else None,
        "lost": about.get("lost"),
        "kept": len(entries),
        "changes": texts_of(about.get("changes")),
        "ratios": [(runtime, rows[0].variant) for runtime, rows in ratios_of(entries).items()],
        "loads": [_load(name, entry) for name, entry in entries.items() if curve_of(entry)],
        "cold": _cold_words(entries, cut=cold_limit(entries) is not None),
        "colds": [_cold_row(name, entry) for name, entry in entries.items() if mapping_of(entry.get("cold"))],
        "profiles": [row for name, entry in entries.items() if (row := _profile(name, entry))][:_MOST_PROFILES],
        "unmeasured": _unmeasured(entries),
    }
    parts = ("phones", "days", "lost", "changes", "ratios", "loads", "colds", "profiles", "unmeasured")
    return {**view, "worth": any(view[part] for part in parts)}


def _phones(entries: Entries) -> str | None:
    """Return on which phone a device's figures were taken; "adb" may mean one today and another one tomorrow.

    Example:
        >>> _phones({"a": {"phone": "Pixel 9"}, "b": {"phone": "Pixel 6"}, "c": {"phone": "Pixel 9"}})
        'Pixel 9 (a, c); Pixel 6 (b)'
        >>> _phones({"a": {"phone": "Pixel 9"}, "b": {"phone": "Pixel 9"}}), _phones({"a": {}})
        ('Pixel 9', None)
    """
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if isinstance(phone := entry.get("phone"), str) and phone:
            found.setdefault(plain(phone), []).append(name)
    if len(found) < 2:
        return next(iter(found), None)
    return "; ".join(f"{phone} ({_names(names, len(entries))})" for phone, names in found.items())


def _days(entries: Entries) -> tuple[str, str] | None:
    """Return the first and the last day on which a device's figures were taken, where these are not one day.

    Example:
        >>> times = ("2026-11-23T07:13:00+00:00", "2026-11-21T22:00:00+00:00", "2026-11-22T01:00:00+00:00")
        >>> _days({str(number): {"taken": time} for number, time in enumerate(times)})
        ('21 November 2026', '23 November 2026')
        >>> _days({"a": {"taken": times[0]}, "b": {"taken": "today"}}) is None
        True
    """
    days = sorted(found for entry in entries.values() if (found := date_of(entry.get("taken"))) is not None)
    return (day(days[0]), day(days[-1])) if days and days[0] != days[-1] else None


def _load(name: str, entry: Mapping[str, Any]) -> Row:
    """A line of the table of sustained runs."""
    run, curve, heat = entry["sustained"], curve_of(entry), curve_of(entry, "temperature_c")
    asked_s = finite(run.get("asked_s"))
    change, interval = _change(run)
    return {
        "name": name,
        "seconds": curve[-1][0],
        "asked_s": asked_s if asked_s is not None and curve[-1][0] < 0.9 * asked_s - 2 else None,
        "first_us": curve[0][1],
        "last_us": curve[-1][1],
        "change": change,
        "change_interval": interval,
        "heat": f"{heat[0][1]:.3g} to {heat[-1][1]:.3g}\u00a0°C" if heat else "not known",
        "throttled": run.get("throttled") is True,
        "energy": energy(entry),
    }


def _change(run: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the change of pace under load, and its interval where there is one; in words where that holds 0.

    Example:
        >>> found = [_change({"change": 0.251, "change_ci": ci}) for ci in (None, [0.2, 0.3], [0.0, 0.51])]
        >>> [tuple(str(text).replace("\u00a0", " ") for text in pair) for pair in found]
        [('+25.1 %', 'None'), ('+25.1 %', '+20.0 % to +30.0 %'), ('no clear change', '+25.1 %; ±0.0 % to +51.0 %')]
    """
    change, ends = _signed(run.get("change")), run.get("change_ci")
    low, high = (finite(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    if finite(run.get("change")) is None or low is None or high is None:
        return change, None
    interval = f"{_signed(low)} to {_signed(high)}"
    return ("no clear change", f"{change}; {interval}") if low <= 0 <= high else (change, interval)


def _signed(share: object) -> str:
    number = finite(share)
    if number is None:
        return plain(None)
    shown = f"{100 * number:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{'±0.0' if shown[1:] == '0.0' else shown}\u00a0%"


def energy(entry: Mapping[str, Any]) -> str | None:
    """Return the energy of one inference with its interval, or that it was asked for and is not measured.

    Example:
        >>> energy({"energy": {"j_per_inference": 1.2e-5, "low": 1.1e-5, "high": 1.3e-5}}).replace("\u00a0", " ")
        '12 µJ (11 to 13)'
        >>> energy({"energy": None}) is None
        True
    """
    found = mapping_of(entry.get("energy"))
    middle, low, high = (finite(found.get(key)) for key in ("j_per_inference", "low", "high"))
    if middle is None:
        return plain(None) if "energy" in mapping_of(entry.get("not_measured")) else None
    scale, unit = next(pair for pair in ((1.0, "J"), (1e3, "mJ"), (1e6, "µJ"), (1e9, "nJ")) if _reads(middle, *pair))
    if low is None or high is None:
        return f"{scale * middle:.3g}\u00a0{unit}"
    if low <= 0:  # not told apart from rest
        return f"at most {scale * high:.3g}\u00a0{unit}"
    return f"{scale * middle:.3g}\u00a0{unit} ({scale * low:.3g} to {scale * high:.3g})"


def _reads(value: float, scale: float, unit: str) -> bool:
    return abs(value) * scale >= 1 or unit == "nJ"


def _cold_words(entries: Entries, *, cut: bool) -> str | None:
    """Return how cold starts were taken."""
    found = {name: cold for name, entry in entries.items() if (cold := mapping_of(entry.get("cold")))}
    if not found:
        return None
    counts = [n for cold in found.values() if (n := finite(cold.get("n"))) is not None]
    caches = {plain(cold.get("page_cache")) for cold in found.values()}
    runtimes = [plain(entries[name].get("runtime")) for name in found]
    cache = "The file was in the page cache (warm): a first start after switching on reads it from storage besides."
    said = [
        f"Medians of {min(counts):.0f} fresh processes." if counts else "",
        cache if caches == {"warm"} else f"Page cache: {', '.join(sorted(caches))}.",
        "The import knows nothing of the file, so all files of a runtime are drawn with the median of theirs: where "
        "they differ, that is what else the machine did just then."
        if len(set(runtimes)) < len(runtimes)
        else "",
        "Bars that reach the right edge go on: their figure stands beside them." if cut else "",
    ]
    return " ".join(line for line in said if line)


def _cold_row(name: str, entry: Mapping[str, Any]) -> Row:
    cold = mapping_of(entry.get("cold"))
    parts = [(part, mapping_of(cold.get(f"{part}_us"))) for part in (*(key for key, _ in PARTS), "total")]
    return {"name": name, **{part: _with_interval(found) for part, found in parts}}


def _with_interval(found: Mapping[str, Any]) -> tuple[str, str | None]:
    low, high = finite(found.get("low")), finite(found.get("high"))
    known = low is not None and high is not None
    return duration(found.get("estimate")), f"{duration(low)} to {duration(high)}" if known else None


def _profile(name: str, entry: Mapping[str, Any]) -> Row | None:
    """The ten kinds of operator that take longest, with their share of all of them."""
    profile = mapping_of(entry.get("profile"))
    found = [(plain(kind), finite(us)) for kind, us in mapping_of(profile.get("by_type_us")).items()]
    kinds = sorted(((kind, us) for kind, us in found if us is not None and us > 0), key=lambda pair: -pair[1])
    total = math.fsum(us for _, us in kinds)
    if not kinds:
        return None
    rows = [(kind, us, us / total) for kind, us in kinds[:_MOST_OPERATORS]]
    rest = math.fsum(us for _, us in kinds[_MOST_OPERATORS:])
    times = finite(profile.get("share_of_p50"))
    return {
        "name": name,
        "runs": plain(profile.get("runs")),
        "rows": rows,
        "rest": (len(kinds) - len(rows), rest / total) if rest else None,
        "slowed": f"{times:.3g}" if times is not None and times > 1.2 else None,
        "longest": f"{rows[0][0]} {percent(rows[0][2])}",
    }


def _unmeasured(entries: Entries) -> list[tuple[str, str, str]]:
    """What was asked for and is not there: (what, of which variants, why), the same reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        for part, reason in mapping_of(entry.get("not_measured")).items():
            found.setdefault((plain(part), plain(reason)), []).append(name)
    return [(part, _names(names, len(entries)), reason) for (part, reason), names in found.items()]


def _names(names: Sequence[str], everybody: int) -> str:
    if len(names) == everybody > 1:
        return f"all {everybody}"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def group_failures(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what failed as (names, stage, reason), the same reason once.

    What was measured and computes something else there is called wrong, everything else of a device not measured.

    Example:
        >>> lost = [{"stage": "measure adb", "name": name, "reason": "unplugged"} for name in "ab"]
        >>> wrong = {"name": "a", "latency": {"local": {"flags": ["departs"]}}}
        >>> row = {"stage": "measure local", "name": "a", "reason": "9 % right"}
        >>> group_failures({"failed": [*lost, row], "variants": [wrong]})
        [('a, b', 'measure adb', 'not measured: unplugged'), ('a', 'measure local', 'wrong: 9 % right')]
    """
    held = {plain(variant.get("name")): mapping_of(variant.get("latency")) for variant in summary["variants"]}
    found: dict[tuple[str, str], list[str]] = {}
    for row in summary["failed"]:
        name, stage, reason = (plain(row.get(key)) for key in ("name", "stage", "reason"))
        kind, _, device = stage.partition(" ")
        if kind == "measure":
            flags = texts_of(mapping_of(held.get(name, {}).get(device)).get("flags"))
            verdict = "wrong" if "departs" in flags else "not measured"
            reason = reason if reason.startswith(f"{verdict}: ") else f"{verdict}: {reason}"
        found.setdefault((stage, reason), []).append(name)
    return [(_names(names, -1), stage, reason) for (stage, reason), names in found.items()]
