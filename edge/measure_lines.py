"""What `tacit measure` prints of a device's result, in as many columns as the terminal has."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tacit.edge.cli_output import microseconds, size, table
from tacit.edge.flag_words import explained
from tacit.edge.report_devices import INPUT_SOURCES, accuracy_there, badge_of, energy

if TYPE_CHECKING:
    from tacit.devices.comparison import Comparison

__all__ = ["comparison_lines", "result_lines", "wrapped"]

_OF_SESSIONS = {"noisy", "drift", "steal", "contended", "throttled", "governor"}
_OTHERS = 0.02
_ROUGH = 1.5  # where operators together take so many times the median, the profiler times itself
_MOST_FITS, _MOST_NAMES, _MOST_OPERATORS = 12, 4, 3  # the report and `--format json` have all
Entries = Mapping[str, Mapping[str, Any]]


def result_lines(name: str, result: Mapping[str, Any], *, alone: bool) -> list[str]:
    """Returns the lines of one device, under its name where it is not alone.

    Example:
        >>> result_lines("adb", {"artifacts": {}, "failed": {"a": "unplugged"}, "lost": "unplugged"}, alone=True)
        ['a: not measured: unplugged']
    """
    artifacts, badge = result["artifacts"], badge_of(name)
    lines = [] if alone else [wrapped(f"{name}{f' ({badge})' if badge else ''}:")]
    if result.get("mode") == "parity":
        lines += _parity_lines(artifacts, str(result.get("latency", "")))
    elif artifacts:
        lines += _latency_table(artifacts)
    lines += [
        wrapped(f"on {phone}") for phone in sorted({str(e["phone"]) for e in artifacts.values() if e.get("phone")})
    ]
    sources = {entry.get("input_source") for entry in artifacts.values()}
    lines += [wrapped(words) for source, words in INPUT_SOURCES.items() if source in sources]
    lines += _extra_lines(artifacts)
    if result.get("lost") and artifacts:
        what = "was lost" if result.get("was_reached", True) else "was not measured now"
        lines.append(wrapped(f"{name} {what}, what is above is from before: {result['lost']}"))
    wrong = {variant: reason for variant, reason in result["failed"].items() if variant in artifacts}
    lines += [wrapped(f"{names}: wrong on {name}: {reason}") for names, reason in _grouped(wrong)]
    absent = {variant: reason for variant, reason in result["failed"].items() if variant not in wrong}
    lines += [wrapped(f"{names}: not measured: {reason}") for names, reason in _grouped(absent)]
    lines += [wrapped(f"changed: {words}") for words in result.get("changes") or []]
    lines += _fit_lines(result.get("fit") or [])
    if not artifacts and not result["failed"]:
        lines.append("no artifact that it can hold")
    return lines if alone else [*lines, ""]


def comparison_lines(found: Sequence[Comparison]) -> list[str]:
    """Returns a row for each artifact of two results; sentences where the terminal has no room for a row."""
    rows = [["artifact", "times as long", "verdict", "file"]]
    for one in found:
        ratio = one.ratio
        told = "-" if ratio is None else f"{ratio.estimate:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        rows.append([one.name, told, str(one.verdict), "same" if one.same_file else "other"])
    lines = table(rows, words_from=2)
    if lines[0].endswith("file"):
        return lines
    return [wrapped(f"{name}: {told} times as long, {file} file: {verdict}") for name, told, verdict, file in rows[1:]]


def comparison_doubts(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Returns what else than the files may have made two results differ.

    Example:
        >>> noisy = {"device": "local", "artifacts": {"a": {"flags": ["noisy", "averaged"]}}}
        >>> comparison_doubts(noisy, {"device": "ssh:pi", "artifacts": {}})[0]
        'two devices: local and ssh:pi'
    """
    names = [str(result.get("device")) for result in (earlier, later)]
    entries = [entry for result in (earlier, later) for entry in result["artifacts"].values()]
    raised = {flag for entry in entries for flag in entry.get("flags") or ()} & _OF_SESSIONS
    doubts = [f"two devices: {names[0]} and {names[1]}"] if names[0] != names[1] else []
    if raised:
        doubts.append(
            f"flagged {', '.join(sorted(raised))}: sessions may differ by themselves, which these intervals do not hold"
        )
    return doubts


def wrapped(line: str) -> str:
    """Returns a line in the width of the terminal; what follows the first is indented."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return "\n".join(textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False))


def _grouped(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """The names of each reason, so that a device that is lost is told once."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(str(reason), []).append(name)
    return [(_names(names), reason) for reason, names in found.items()]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _latency_table(artifacts: Entries) -> list[str]:
    """One row an artifact; what it reached on the device itself has a column where that was tried."""
    there = {name: shown.partition(" ")[0] for name, entry in artifacts.items() if (shown := accuracy_there(entry))}
    rows = [["artifact", "p50", "p90", "ratio", "memory", *(["accuracy"] if there else []), "notes"]]
    for name, entry in artifacts.items():
        relative, memory = entry.get("relative"), entry.get("peak_memory_bytes")
        ratio = f"{relative['estimate']:.2f} ({relative['low']:.2f}-{relative['high']:.2f})" if relative else "-"
        shown = f"{memory / 1e6:.1f} MB" if isinstance(memory, int) else "-"
        figures = [microseconds(entry.get("p50_us")), microseconds(entry.get("p90_us")), ratio, shown]
        reached = [there.get(name, "-").replace("\u00a0", "")] if there else []
        rows.append([name, *figures, *reached, ", ".join(entry.get("flags") or ())])
    lines = table(rows, words_from=len(rows[0]) - 1)
    if rows[0][-2] not in lines[0]:  # a terminal too narrow for the figures has them in sentences
        lines = [_sentence(rows[0], row) for row in rows[1:]]
    elif not lines[0].endswith("notes"):  # no figure stands without its doubts
        flags = {row[0]: row[-1] for row in rows[1:] if row[-1]}
        lines += [wrapped(f"{names}: {told}") for names, told in _grouped(flags)]
    words = explained(flag for entry in artifacts.values() for flag in entry.get("flags") or ())
    return [*lines, wrapped(f"({words})")] if words else lines


def _sentence(header: Sequence[str], row: Sequence[str]) -> str:
    figures = [f"{what} {shown}" for what, shown in zip(header[1:-1], row[1:-1], strict=True) if shown != "-"]
    return wrapped(f"{row[0]}: {', '.join(figures) or 'no figures'}{f'; {row[-1]}' if row[-1] else ''}")


def _parity_lines(artifacts: Entries, why: str) -> list[str]:
    rows = [["artifact", "agrees", "off by", "arena", "latency"]]
    for name, entry in artifacts.items():
        agrees = entry.get("top1_agreement")
        shown = "-" if agrees is None else f"{100 * agrees:.1f}%"
        rows.append([name, shown, f"{entry.get('max_abs', 0.0):.2g}", size(entry.get("arena_bytes")), "not measured"])
    return [*(table(rows, words_from=4) if artifacts else []), *([wrapped(f"latency: {why}")] if why else [])]


def _extra_lines(artifacts: Entries) -> list[str]:
    """What was asked for beyond the usual: load, energy, operators; or why it is not there."""
    lines: list[str] = []
    missing: dict[tuple[str, str], str] = {}
    for name, entry in artifacts.items():
        if entry.get("sustained"):
            lines.append(wrapped(f"{name}: {_load(entry['sustained'])}"))
        if entry.get("energy"):
            words = str(energy(entry)).replace("\u00a0", " ")
            lines.append(wrapped(f"{name}: energy of one inference {words}, {entry['energy']['source']}"))
        if entry.get("profile"):
            lines.append(wrapped(f"{name}: operators: {_operators(entry['profile'])}"))
        missing |= {(part, name): reason for part, reason in (entry.get("not_measured") or {}).items()}
    for part in dict.fromkeys(part for part, _ in missing):
        reasons = {name: reason for (of, name), reason in missing.items() if of == part}
        lines += [wrapped(f"{names}: {part}: not measured: {reason}") for names, reason in _grouped(reasons)]
    return lines


def _load(run: Mapping[str, Any]) -> str:
    heat = [value for value in run["temperature_c"] if value is not None]
    warm = f", {heat[0]:.0f} to {heat[-1]:.0f} °C" if heat else ""
    slowed = ", throttled" if run["throttled"] else ""
    change, bounds = _signed(run["change"]), run.get("change_ci")
    told = f"{change} ({_signed(bounds[0])} to {_signed(bounds[1])})" if bounds else change
    doubt = ", no clear change" if bounds and bounds[0] <= 0 <= bounds[1] else ""
    seconds = run.get("asked_s", run["start_s"][-1])
    taken = max(run.get("steal_share") or 0.0, run.get("waiting_share") or 0.0)
    others = f", while others had the processor for {100 * taken:.0f}% of the time" if taken > _OTHERS else ""
    return f"median at the end of {seconds:.0f} s under load: {told}{doubt}{warm}{slowed}{others}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-0.0%", "+0.0%")


def _operators(profile: Mapping[str, Any]) -> str:
    kinds, share = list(profile["by_type_us"].items()), profile.get("share_of_p50")
    total = sum(us for _, us in kinds) or 1.0
    told = ", ".join(f"{kind} {100 * us / total:.0f}%" for kind, us in kinds[:_MOST_OPERATORS])
    rough = isinstance(share, float | int) and share > _ROUGH
    return f"{told}; rough: with its profiler the model took {share:.1f} times its median" if rough else told


def _fit_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the smallest artifact: one line for each board."""
    boards = [row for row in rows if row["kind"] == "mcu"]
    if not boards:
        return []
    sized = {row["artifact"]: row["flash_bytes"][1] for row in boards if row["flash_bytes"]}
    least = min(sized, key=lambda name: sized[name], default=boards[0]["artifact"])
    lines = ["", wrapped(f"{least} on boards, from memory and flash alone; nothing was run there:")]
    own = [row for row in boards if row["artifact"] == least]
    lines += [wrapped(f"{row['title']}: {row['verdict']}; {row['why']}; {row['latency']}") for row in own[:_MOST_FITS]]
    if len(rows) > len(own):
        lines.append(wrapped("computers, phones and other artifacts: `tacit report`"))
    return lines
