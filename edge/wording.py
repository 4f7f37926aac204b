"""Numbers as text: how the report writes shares, sizes, durations and ε."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime

__all__ = [
    "UNMEASURED",
    "audit_claim",
    "audit_finding",
    "audit_question",
    "audit_verdict",
    "date_of",
    "day",
    "duration",
    "epsilon",
    "finite",
    "moment",
    "percent",
    "plain",
    "size",
]

UNMEASURED = "not measured"
_SPACE = "\u00a0"  # between a number and its unit: never breaks the line


def finite(value: object) -> float | None:
    """Return a finite number, or None: what is no number was not measured.

    Example:
        >>> finite(3), finite(float("nan")), finite("3")
        (3.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: object) -> str:
    """Return a share as a percentage with one decimal; only 1.0 itself reads "100 %".

    Example:
        >>> percent(0.9996).replace("\u00a0", " "), percent(None)
        ('99.9 %', 'not measured')
    """
    share = finite(value)
    if share is None:
        return UNMEASURED
    hundredths = round(100 * share, 1)
    return f"{99.9 if hundredths == 100 and share < 1 else hundredths:g}{_SPACE}%"


def _scaled(value: object, units: Sequence[str]) -> str:
    number = finite(value)
    if number is None:
        return UNMEASURED
    step = 0
    while abs(number) >= 999.5 and step < len(units) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.0f}{_SPACE}{units[step]}" if abs(number) >= 100 else f"{number:.3g}{_SPACE}{units[step]}"


def size(size_bytes: object) -> str:
    """Return a size in decimal units with three digits (42440 bytes: 42.4 kB).

    Example:
        >>> size(42440).replace("\u00a0", " ")
        '42.4 kB'
    """
    return _scaled(size_bytes, ("B", "kB", "MB", "GB"))


def duration(value: object, unit_us: float = 1.0) -> str:
    """Return a duration in units of `unit_us` microseconds with three digits and its unit.

    Example:
        >>> duration(1250).replace("\u00a0", " "), duration(1.5, unit_us=1e6).replace("\u00a0", " ")
        ('1.25 ms', '1.5 s')
    """
    number = finite(value)
    return UNMEASURED if number is None else _scaled(number * unit_us, ("µs", "ms", "s"))


def epsilon(value: object) -> str:
    """Return ε rounded up to two decimals: a guarantee is never made to look stronger.

    Example:
        >>> epsilon(1.231), epsilon(float("inf")), epsilon(None)
        ('1.24', '∞', 'not measured')
    """
    if value == math.inf:
        return "∞"
    bound = finite(value)
    return UNMEASURED if bound is None else f"{math.ceil(bound * 100 - 1e-7) / 100:.2f}"


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
    return UNMEASURED if value is None else str(value) or UNMEASURED


def moment(value: object) -> str:
    """Return an ISO 8601 time in words, or what there is of it.

    Example:
        >>> moment("2026-03-01T09:05:00+00:00")
        '1 March 2026, 09:05 UTC'
    """
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return plain(value)
    return f"{day(when)}, {when:%H:%M %Z}".strip()


def date_of(value: object) -> date | None:
    """Return the day of an ISO 8601 time, or None where that is none.

    Example:
        >>> date_of("2026-03-01T09:05:00+00:00"), date_of(None)
        (datetime.date(2026, 3, 1), None)
    """
    try:
        return datetime.fromisoformat(value).date() if isinstance(value, str) else None
    except ValueError:
        return None


def day(when: date) -> str:
    """Return a day in words.

    Example:
        >>> day(date(2026, 3, 1))
        '1 March 2026'
    """
    return f"{when.day} {when:%B %Y}"


# What an audit asked and found. An ε that was found is a lower bound, so it is rounded down; a claim is rounded up.

_QUESTIONS = {
    "mechanism": "Does one step reveal more than its formula allows, on the worst inputs that anybody could choose?",
    "noise": "Is the noise as large as the ledger says, and never the same twice?",
    "canaries": "Can anybody tell which planted canaries went through the rounds?",
    "membership": "Can anybody who asks the model tell whose records it has seen?",
}
_VERDICTS = {
    "pass": "no violation",
    "warn": "suspicious",
    "fail": "violation",
    "informs": "informs",
}


def audit_question(test: Mapping[str, object]) -> str:
    """Return what a test of an audit asks.

    Example:
        >>> audit_question({"name": "noise"})
        'Is the noise as large as the ledger says, and never the same twice?'
    """
    return _QUESTIONS.get(str(test.get("name")), plain(test.get("method")))


def audit_verdict(value: object) -> str:
    """Return a verdict in words.

    Example:
        >>> audit_verdict("pass"), audit_verdict("other")
        ('no violation', 'other')
    """
    return _VERDICTS.get(str(value), plain(value))


def audit_finding(test: Mapping[str, object]) -> str:
    """Return what a test of an audit found, with the number of trials and the confidence.

    Example:
        >>> details = {"rounds": 20}
        >>> audit_finding({"name": "canaries", "statistic": 1.749, "n": 1000, "confidence": 0.95, "details": details})
        'ε ≥ 1.74 in 20 rounds (95\u00a0% confidence, 1,000 canaries)'
    """
    found, count, sure = finite(test.get("statistic")), plain(test.get("n")), percent(test.get("confidence"))
    about = test.get("details")
    details: Mapping[str, object] = about if isinstance(about, Mapping) else {}
    if found is None:
        return UNMEASURED
    at_least = f"ε ≥ {math.floor(found * 100) / 100:.2f}"
    if test.get("name") == "mechanism":
        return f"{at_least} in one step ({sure} confidence, {count} releases on each of two inputs)"
    if test.get("name") == "canaries":
        return f"{at_least} in {plain(details.get('rounds'))} rounds ({sure} confidence, {count} canaries)"
    if test.get("name") == "noise":
        ratio = finite(details.get("standard_deviation_over_claimed"))
        size_of = UNMEASURED if ratio is None else f"{ratio:.3f}"
        return f"{size_of} of the claimed size, smallest p-value {plain(found, 2)} ({count} draws)"
    return f"AUC {found:.3f} ({_interval(test.get('interval'))})"


def audit_claim(test: Mapping[str, object]) -> str:
    """Return what the finding is held against.

    Example:
        >>> audit_claim({"name": "mechanism", "claim": 3.144, "delta": 1e-5}), audit_claim({"name": "membership"})
        ('ε = 3.15 at δ = 1e-5', '0.5 by chance')
    """
    if test.get("name") == "membership":
        return "0.5 by chance"
    if test.get("name") == "noise":
        return f"1; alarm below p = {plain(test.get('claim'), 2)}"
    return f"ε = {epsilon(test.get('claim'))} at δ = {plain(test.get('delta'))}"


def _interval(value: object) -> str:
    ends = [finite(end) for end in value] if isinstance(value, list) else []
    shown = [f"{end:.3f}" for end in ends if end is not None]
    return f"95{_SPACE}% interval {shown[0]} to {shown[1]}" if len(shown) == 2 else f"interval {UNMEASURED}"
