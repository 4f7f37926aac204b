"""An account, and how each entry of a ledger changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tacit.federated.accounting import Event, merge
from tacit.federated.chain import ChainDamaged, Entry
from tacit.federated.stop_rule import Opening

__all__ = ["Account", "Cohort", "account_as_entry", "cost", "opening_as_entry", "tally"]


@dataclass(frozen=True)
class Cohort:
    """Data that an owner declared to be replaced by others.

    Attributes:
        until: when that was declared, UTC.
        reason: in the owner's words.
        history: what they had been charged.
    """

    until: str
    reason: str
    history: Mapping[Event, int]


@dataclass
class Account:
    """What one owner's source has been charged, since the newest `new-cohort`.

    Attributes:
        owner: whose records.
        source: which data set.
        history: how often each kind of event was charged.
        reserved: participations charged.
        released: of which something left.
        failed: of which nothing will.
        reopened: how often a process died in between.
        unit: the weaker one, where there were two.
        relation: the same.
        status: "private" or "public-benchmark", as the first charge says.
        opening: the plan and the filter that the first charge fixed; None for one kind of event and no plan.
        delta: of the budget that its newest plan fitted.
        runs: the history of each run.
        data: the fingerprint of the data in each run, those before a `new-cohort` included.
        retired: fingerprints of data that were declared to be replaced.
        cohorts: what was declared, oldest first.
        extract_of: in an extract, the hash of the newest entry of the home ledger that it holds.
    """

    owner: str
    source: str
    history: dict[Event, int] = field(default_factory=dict)
    reserved: int = 0
    released: int = 0
    failed: int = 0
    reopened: int = 0
    unit: str = "record"
    relation: str = "add/remove"
    status: str = "not stated"
    opening: Opening | None = None
    delta: float | None = None
    runs: dict[str, dict[Event, int]] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    cohorts: list[Cohort] = field(default_factory=list)
    extract_of: str | None = None


def tally(account: Account, entry: Entry) -> None:
    """Adds an entry to its account.

    Raises:
        ChainDamaged: a kind of entry that there is not, or one without what its kind needs.

    >>> account = Account("anna", "digits")
    >>> tally(account, {"kind": "reserve", "mechanism": {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 2}})
    >>> account.reserved, account.history
    (1, {Event(sample_rate=0.1, noise_multiplier=1.0): 2})
    """
    kind = entry.get("kind")
    add = _KINDS.get(str(kind))
    if add is None:
        raise ChainDamaged(f"expected one of {', '.join(_KINDS)}, got kind={kind!r} in entry {entry['seq']}")
    try:
        add(account, entry)
    except ChainDamaged:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ChainDamaged(f"expected a whole {kind}, got entry {entry.get('seq')} without {error}") from None
    if "home" in entry:
        account.extract_of = str(entry["home"])


def cost(entry: Entry) -> tuple[Event, int]:
    """What a reserve charges: a kind of event, and how many of it.

    Raises:
        ChainDamaged: an entry without a mechanism.

    >>> cost({"mechanism": {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 2}})
    (Event(sample_rate=0.1, noise_multiplier=1.0), 2)
    """
    mechanism = entry.get("mechanism")
    if not isinstance(mechanism, Mapping):
        raise ChainDamaged(f"expected a mechanism in a reserve, got {mechanism!r}")
    event = Event(sample_rate=float(mechanism["sample_rate"]), noise_multiplier=float(mechanism["noise_multiplier"]))
    steps = int(mechanism["steps"])
    if steps < 1:
        raise ChainDamaged(f"expected steps of at least 1 in a reserve, got steps={steps}")
    return event, steps


def opening_as_entry(opening: Opening) -> dict[str, object]:
    """How an account's first reserve states its opening; `tally` reads it back."""
    return {
        "plan": _history_as_entry(opening.plan),
        "order": opening.order,
        "share": opening.share,
        "epsilon": opening.epsilon,
        "delta": opening.delta,
    }


def account_as_entry(account: Account) -> dict[str, object]:
    """How an extract states what an account had been charged before; `tally` reads it back."""
    return {
        "kind": "extract",
        "owner": account.owner,
        "source": account.source,
        "history": _history_as_entry(account.history),
        **{name: getattr(account, name) for name in _STATED},
        "opening": None if account.opening is None else opening_as_entry(account.opening),
        "cohorts": [
            {"until": cohort.until, "reason": cohort.reason, "history": _history_as_entry(cohort.history)}
            for cohort in account.cohorts
        ],
    }


_WEAKEST = ("record", "zero-out")  # with charges under two units or relations, what holds is the weaker one
_STATED = ("reserved", "released", "failed", "reopened", "unit", "relation", "status")


def _history_as_entry(history: Mapping[Event, int]) -> list[list[float | int]]:
    return [[event.sample_rate, event.noise_multiplier, count] for event, count in history.items()]


def _history(stated: Any) -> dict[Event, int]:
    return merge(
        (Event(sample_rate=float(rate), noise_multiplier=float(noise)), int(count)) for rate, noise, count in stated
    )


def _opening(stated: Any) -> Opening:
    numbers = {name: float(stated[name]) for name in ("order", "share", "epsilon", "delta")}
    return Opening(plan=_history(stated["plan"]), **numbers)


def _reserve(account: Account, entry: Entry) -> None:
    charge, run = cost(entry), str(entry.get("run"))
    mechanism: Any = entry["mechanism"]
    unit = str(mechanism.get("unit", account.unit))
    if account.reserved == 0 or (unit == "record" and (account.unit, account.relation) != _WEAKEST):
        account.unit, account.relation = unit, str(mechanism.get("relation", account.relation))
    account.reserved += 1
    account.history = merge([*account.history.items(), charge])
    account.runs[run] = merge([*account.runs.get(run, {}).items(), charge])
    if "data" in entry:
        account.data[run] = str(entry["data"])
    if "status" in entry:
        account.status = str(entry["status"])
    if "opening" in entry:
        account.opening = _opening(entry["opening"])
        account.delta = account.opening.delta


def _new_cohort(account: Account, entry: Entry) -> None:
    account.cohorts.append(Cohort(str(entry.get("until", entry["at"])), str(entry["reason"]), account.history))
    account.retired |= set(account.data.values())
    account.history, account.runs, account.opening = {}, {}, None
    account.reserved = account.released = account.failed = account.reopened = 0


def _extract(account: Account, entry: Entry) -> None:
    for name in _STATED:
        setattr(account, name, type(getattr(account, name))(entry[name]))
    account.history = _history(entry["history"])
    if entry["opening"] is not None:
        account.opening = _opening(entry["opening"])
        account.delta = account.opening.delta
    cohorts: Any = entry["cohorts"]
    account.cohorts = [Cohort(str(c["until"]), str(c["reason"]), _history(c["history"])) for c in cohorts]


def _count(name: str) -> Callable[[Account, Entry], None]:
    return lambda account, _: setattr(account, name, getattr(account, name) + 1)


_KINDS: dict[str, Callable[[Account, Entry], None]] = {
    "reserve": _reserve,
    "release": _count("released"),
    "fail": _count("failed"),
    "reopen": _count("reopened"),
    "new-cohort": _new_cohort,
    "extract": _extract,
}
