"""What a ledger says: who has been charged what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tacit.federated.accounting import Event, Spend, merge, spend
from tacit.federated.chain import GENESIS, ChainDamaged, Entry, parse_chain

__all__ = ["ADVERSARY", "Account", "cost", "find_ledgers", "read_ledger", "spend_of", "tally"]

# Of the units record and none; who is not in this sentence is not promised anything.
ADVERSARY = "honest-but-curious server and everyone who receives models; app code trusted"


@dataclass
class Account:
    """What one owner's source has been charged."""

    owner: str
    source: str
    history: dict[Event, int] = field(default_factory=dict)
    reserved: int = 0
    released: int = 0
    failed: int = 0
    reopened: int = 0


def find_ledgers(path: Path) -> list[Path]:
    """The ledgers of a run directory, or the one that `path` is.

    A run in one process has one for all owners; under Flower each owner has its own.
    """
    if path.is_file():
        return [path]
    return [p for p in (path / "ledger.jsonl", *sorted(path.glob("owners/*/ledger.jsonl"))) if p.is_file()]


def spend_of(accounts: Sequence[Account], delta: float, *, with_prv: bool = True) -> list[Spend]:
    """What each account comes to, as `accounting.spend` has it; equal histories share one evaluation."""
    known: dict[frozenset[tuple[Event, int]], Spend] = {}
    for account in accounts:
        history = frozenset(account.history.items())
        if history not in known:
            known[history] = spend(account.history, delta, with_prv=with_prv)
    return [known[frozenset(account.history.items())] for account in accounts]


def read_ledger(path: Path) -> tuple[list[Account], str, str | None]:
    """Reads and verifies a ledger without taking its lock.

    Returns:
        The accounts by owner, the head's hash, and a note when the last line was cut short.

    Raises:
        ChainDamaged: the chain does not hold.
        FileNotFoundError: there is no such file.
    """
    data = path.read_bytes()
    entries, good_bytes = parse_chain(data, path)
    accounts: dict[tuple[str, str], Account] = {}
    for entry in entries:
        owner, source = str(entry.get("owner")), str(entry.get("source"))
        tally(accounts.setdefault((owner, source), Account(owner, source)), entry)
    note = None if good_bytes == len(data) else f"{path}: the last line was cut short by a crash"
    return [accounts[name] for name in sorted(accounts)], str(entries[-1]["hash"]) if entries else GENESIS, note


def tally(account: Account, entry: Entry) -> None:
    """Adds an entry to its account.

    Raises:
        ChainDamaged: a kind of entry that there is not.
    """
    kind = entry.get("kind")
    if kind == "reserve":
        account.reserved += 1
        account.history = merge([*account.history.items(), cost(entry)])
    elif kind == "release":
        account.released += 1
    elif kind == "fail":
        account.failed += 1
    elif kind == "reopen":
        account.reopened += 1
    else:
        raise ChainDamaged(f"expected reserve, release, fail or reopen, got kind={kind!r} in entry {entry['seq']}")


def cost(entry: Entry) -> tuple[Event, int]:
    """What a reserve charges: a kind of event, and how many of it.

    Raises:
        ChainDamaged: an entry without a mechanism.
    """
    mechanism = entry.get("mechanism")
    if not isinstance(mechanism, Mapping):
        raise ChainDamaged(f"expected a mechanism in a reserve, got {mechanism!r}")
    event = Event(sample_rate=float(mechanism["sample_rate"]), noise_multiplier=float(mechanism["noise_multiplier"]))
    steps = int(mechanism["steps"])
    if steps < 1:
        raise ChainDamaged(f"expected steps of at least 1 in a reserve, got steps={steps}")
    return event, steps
