"""What the report says about the rounds of a training: what travelled, who did not answer, who was set aside."""

import math
from collections.abc import Mapping
from typing import Any

from tacit.edge.wording import duration, finite, plain, size

__all__ = ["describe_traffic", "is_at_most", "list_aside", "list_refusals"]


def describe_traffic(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what travelled, and how long it would have taken; empty where it was not counted, or is secret.

    Example:
        >>> [told] = describe_traffic({"rounds": [{"bytes_up": 900}, {"bytes_up": 900}, {"bytes_up": None}]})
        >>> told[0], told[1].replace("\u00a0", " ")
        ('Sent back by them', '900 B a round, 1.8 kB in all')
    """
    kept = training.get("rounds")
    rounds = [r for r in kept if isinstance(r, Mapping)] if isinstance(kept, list) else []
    facts = []
    for key, label in (("bytes_down", "Sent to the owners"), ("bytes_up", "Sent back by them")):
        counts = [count for r in rounds if (count := finite(r.get(key))) is not None]
        if counts:
            low, high = size(min(counts)), size(max(counts))
            span = low if low == high else f"{low} to {high}"
            facts.append((label, f"{span} a round, {size(math.fsum(counts))} in all"))
    seconds = [took for r in rounds if (took := finite(r.get("simulated_s"))) is not None]
    if seconds:
        longest, overall = duration(max(seconds), 1e6), duration(math.fsum(seconds), 1e6)
        facts.append(("Simulated time", f"{overall} in all, {longest} the longest round"))
    return facts


def is_at_most(summary: Mapping[str, Any]) -> bool:
    """Tell whether a round's ε is an upper bound, because nobody was charged for every round.

    Example:
        >>> is_at_most({"privacy": {"participations_charged": 1}, "training": {"rounds": [{}, {}]}})
        True
    """
    charged, rounds = finite(summary["privacy"].get("participations_charged")), summary["training"].get("rounds")
    return charged is not None and isinstance(rounds, list) and charged < len(rounds)


def list_refusals(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return why owners that were asked gave no update, and how often, the most frequent first.

    Example:
        >>> list_refusals({"refusals": {"unavailable": 1, "exhausted": 3}})
        [('exhausted', '3'), ('unavailable', '1')]
    """
    found = training.get("refusals")
    counts = [(plain(r), n) for r, c in found.items() if (n := finite(c))] if isinstance(found, Mapping) else []
    return [(reason, plain(int(n))) for reason, n in sorted(counts, key=lambda pair: (-pair[1], pair[0]))]


def list_aside(training: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (owner, rounds, last reason) of those that the front door set aside, the most frequent first.

    Example:
        >>> list_aside({"set_aside": {"anna": {"rounds": 2, "reason": "a value that is not finite"}}})
        [('anna', '2', 'a value that is not finite')]
    """
    found = training.get("set_aside")
    kept = [(plain(o), about) for o, about in found.items()] if isinstance(found, Mapping) else []
    rows = [(o, finite(about.get("rounds")) or 0.0, about) for o, about in kept if isinstance(about, Mapping)]
    rows.sort(key=lambda row: (-row[1], row[0]))
    return [(owner, plain(int(rounds)), plain(about.get("reason"))) for owner, rounds, about in rows]
