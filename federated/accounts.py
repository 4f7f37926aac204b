"""What a ledger says: who has been charged what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tacit.federated.accounting import Event, Spend, spend
from tacit.federated.chain import GENESIS, parse_chain
from tacit.federated.tally import Account, tally

__all__ = ["ADVERSARY", "Account", "find_ledgers", "has_head", "read_ledger", "spend_of"]

_SERVER_TOO = "honest-but-curious server and everyone who receives models; app code trusted"
# By unit; who is not in the sentence is not promised anything.
ADVERSARY = {
    "record": _SERVER_TOO,
    "local": _SERVER_TOO,
    "client": "everyone who receives models and reports, not the server or the network",
}


def find_ledgers(path: Path) -> list[Path]:
    """The ledgers of a run directory or of a home, or the one that `path` is.

    A run in one process has one for all owners; under Flower each owner has its own. A home has one for each owner's
    source, in `ledgers/OWNER/SOURCE.jsonl`; the folder of one owner will do too.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     Path(run, "ledger.jsonl").touch()
    ...     [path.name for path in find_ledgers(Path(run))]
    ['ledger.jsonl']
    """
    if path.is_file():
        return [path]
    places = ["owners/*/ledger.jsonl", "ledgers/*/*.jsonl"]
    if "ledgers" in (path.name, path.parent.name):
        places += ["*/*.jsonl", "*.jsonl"]
    found = [path / "ledger.jsonl", *sorted({ledger for place in places for ledger in path.glob(place)})]
    return [ledger for ledger in found if ledger.is_file()]


def spend_of(accounts: Sequence[Account], delta: float, *, with_prv: bool = True) -> list[Spend]:
    """What each account comes to, as `accounting.spend` has it; equal histories share one evaluation.

    >>> account = Account("anna", "digits", {Event(sample_rate=1.0, noise_multiplier=2.0): 1})
    >>> [round(cost.epsilon, 2) for cost in spend_of([account], 1e-5, with_prv=False)]
    [1.99]
    """
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

    >>> import tempfile
    >>> from tacit.federated.chain import Chain
    >>> with tempfile.TemporaryDirectory() as run:
    ...     chain = Chain(Path(run, "ledger.jsonl"))
    ...     _ = chain.append([{"kind": "fail", "owner": "anna", "source": "digits"}])
    ...     chain.close()
    ...     accounts, head, note = read_ledger(Path(run, "ledger.jsonl"))
    >>> [(account.owner, account.failed) for account in accounts], head == chain.head, note
    ([('anna', 1)], True, None)
    """
    data = path.read_bytes()
    entries, good_bytes = parse_chain(data, path)
    accounts: dict[tuple[str, str], Account] = {}
    for entry in entries:
        owner, source = str(entry.get("owner")), str(entry.get("source"))
        tally(accounts.setdefault((owner, source), Account(owner, source)), entry)
    note = None if good_bytes == len(data) else f"{path}: the last line was cut short by a crash"
    return [accounts[name] for name in sorted(accounts)], str(entries[-1]["hash"]) if entries else GENESIS, note


def has_head(path: Path, head: str) -> bool:
    """Whether a ledger's chain ever had this head; false for a file older than whoever remembers the head."""
    entries, _ = parse_chain(path.read_bytes(), path)
    return head == GENESIS or any(entry["hash"] == head for entry in entries)
