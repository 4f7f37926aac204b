"""Which combinations keep the guarantee, as data. What is not in the table, or lacks a condition, is refused.

A feature is something that shapes what leaves: a strategy, a robust rule, a codec, a way to lose clients. Code that
offers one says which conditions it meets (`SCAFFOLD` computed from noised iterates, a quorum counted before the draw);
`refusal` holds that against what the unit of privacy needs. No import beyond the standard library: recipes ask too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["FEATURES", "Need", "needs", "refusal"]


@dataclass(frozen=True)
class Need:
    """What a feature needs under a unit.

    Attributes:
        conditions: each must be met; none for a feature that is safe as it is.
        why: what would go wrong.
        never: no condition helps.
    """

    conditions: tuple[str, ...] = ()
    why: str = ""
    never: bool = False


_FREE = Need()
_PUBLIC_WEIGHTS = Need(("public weights",), "a weight that depends on records tells of them past the noise")
_BOUNDED_WEIGHTS = Need(
    ("uniform or bounded weights",), "a weight by count lets one client move the sum by more than C"
)
_AFTER_NOISE = Need(("after the noise",), "before the noise it changes what one client can do to the sum")
_SET_RULE = Need(never=True, why="it looks at the set of replies, so one client can change what others contribute")
_NEVER_SHIPS = Need(("the personal model stays with its owner",), "the personal model has no noise")

# Rows as in the specification: record and local first, then client.
_TABLE: dict[str, tuple[Need, Need]] = {
    **dict.fromkeys(("fedavg", "fedprox"), (_PUBLIC_WEIGHTS, _BOUNDED_WEIGHTS)),
    **dict.fromkeys(("fedavgm", "fedadam", "fedyogi", "fedadagrad"), (_FREE, _AFTER_NOISE)),
    "scaffold": (
        Need(("option II from noised iterates",), "option I evaluates a gradient on records without noise"),
        Need(
            ("one joint clip and noise over update and control variate",), "two releases of one client are two charges"
        ),
    ),
    "local parameters": (
        Need(
            ("in the same DP-SGD step, or frozen",),
            "what an un-noised head learned reaches the shared body through its gradients",
        ),
        Need(("they never travel",), "what travels must be clipped and noised"),
    ),
    "ditto": (_NEVER_SHIPS, _NEVER_SHIPS),
    **dict.fromkeys(("median", "trimmed mean", "krum", "multi-krum", "bulyan", "geometric median"), (_FREE, _SET_RULE)),
    "norm-bounded mean": (_FREE, Need(("the bound is C",), "a bound of its own is a second, uncharged clip")),
    "q-ffl": (
        Need(("a noised, charged loss",), "its weights come from losses on records"),
        Need(never=True, why="its weights come from each client's loss"),
    ),
    "fedbuff": (
        Need(("every upload charged",), "an upload that is not used has left all the same"),
        Need(never=True, why="who is in the buffer depends on the clients, so no sampling rate can be claimed"),
    ),
    **dict.fromkeys(
        ("top-k", "8-bit", "error feedback"),
        (
            Need(("after the noise",), "which entries are kept, and their scale, tell of records"),
            Need(("before the clip", "the server decodes, then clips"), "decoding may lift the norm above C"),
        ),
    ),
    **dict.fromkeys(
        ("dropout", "deadline"),
        (
            Need(("an upload made is charged even if unused",), "what was sent has left"),
            Need(("a missing client contributes 0",), "another denominator would tell how many answered"),
        ),
    ),
    "over-selection": (
        _FREE,
        Need(
            ("accept all, accounted at the over-selected rate",),
            "taking the first who answer lets one client push another out",
        ),
    ),
    "quorum": (_FREE, Need(("before the draw",), "after the draw it tells how large the secret cohort was")),
    "admission": (_FREE, Need(("per reply only",), "a rule over the set lets one client decide about another")),
    "adaptive clip": (
        Need(never=True, why="its bits are computed for whole updates; records' gradients have no such release"),
        Need(("z < 2 sigma_b",), "the bits would take all of the noise"),
    ),
    "own strategy": (
        Need(("it sees noised replies only",), "what it makes of anything else has no noise"),
        Need(never=True, why="cohorts, clip and noise are the server's own, and it would replace them"),
    ),
    "owners of a round": (
        Need(("chosen by public randomness",), "a choice that depends on records tells of them"),
        Need(never=True, why="its cohorts are drawn in secret, at privacy.sample_rate"),
    ),
    "client metrics": (
        Need(("noised and charged",), "counts, losses and accuracies of records tell of them"),
        Need(("inside the clipped vector",), "beside the clipped vector nothing is noised"),
    ),
}

FEATURES = tuple(_TABLE)


def needs(feature: str, unit: str) -> Need:
    """What a feature needs under a unit; nothing without a guarantee.

    Raises:
        KeyError: a feature that nobody has thought about.

    >>> needs("krum", "client").never, needs("krum", "record").never
    (True, False)
    """
    record, client = _TABLE[feature]
    return {"none": _FREE, "client": client}.get(unit, record)


def refusal(unit: str, used: Mapping[str, Collection[str]]) -> str | None:
    """Why a combination does not keep the guarantee, or None when it does.

    Args:
        unit: record, client, local or none.
        used: for each feature in use, the conditions that its code meets.

    >>> refusal("record", {"median": ()}) is None
    True
    >>> refusal("client", {"quorum": ()})[:83]
    "expected 'quorum' with: before the draw, under privacy.unit='client'; after the dra"
    """
    for feature, met in used.items():
        if unit != "none" and feature not in _TABLE:
            return f"expected a feature whose effect on the guarantee is known, got {feature!r} with unit {unit!r}"
        need = _FREE if unit == "none" else needs(feature, unit)
        if need.never:
            return f"expected no {feature!r} with privacy.unit={unit!r}: {need.why}; choose another, or another unit"
        lacking = [condition for condition in need.conditions if condition not in met]
        if lacking:
            return f"expected {feature!r} with: {', '.join(lacking)}, under privacy.unit={unit!r}; {need.why}"
    return None
