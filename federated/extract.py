"""A run's copy of what home ledgers say: it travels with the run directory, without the fingerprints.

A `Chain` like any ledger. For each account it begins with an `extract` entry, the account as it was when the run began,
and goes on with a copy of each entry that follows in the home ledger. `home` is the hash of the entry there that a line
was copied from (of the newest one, for an `extract`), so an extract says up to which head it was taken, and remembers
heads for a home ledger that was put back to an older state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tacit.federated.chain import GENESIS, ChainDamaged, Entry, parse_chain
from tacit.federated.home import home_ledger
from tacit.federated.tally import Account, account_as_entry, tally

__all__ = ["check_extract", "copied", "newest_copied", "opening_line"]

_OF_THE_CHAIN = {"seq", "at", "prev", "hash"}
_NEVER_COPIED = {*_OF_THE_CHAIN, "data"}  # a fingerprint stays at home

Name = tuple[str, str]  # owner and source


def opening_line(account: Account, head: str) -> Entry:
    """What an extract begins an account with.

    >>> line = opening_line(Account("anna", "digits", reserved=2), "0" * 64)
    >>> line["kind"], line["reserved"], line["home"] == GENESIS
    ('extract', 2, True)
    """
    return {**account_as_entry(account), "home": head}


def copied(entry: Entry) -> Entry:
    """An entry of a home ledger as an extract has it.

    >>> copied({"seq": 0, "at": "2026", "kind": "fail", "key": "k", "data": "secret", "prev": GENESIS, "hash": "h"})
    {'kind': 'fail', 'key': 'k', 'home': 'h'}
    """
    copy = {name: value for name, value in entry.items() if name not in _NEVER_COPIED}
    when = {"until": entry["at"]} if entry["kind"] == "new-cohort" else {}  # the copy's own `at` is later
    return {**copy, **when, "home": entry["hash"]}


def newest_copied(entries: Sequence[Entry]) -> dict[Name, str]:
    """Up to which head of each home ledger an extract goes.

    Raises:
        ChainDamaged: entries that were not copied from anywhere.

    >>> newest_copied([{"owner": "anna", "source": "digits", "home": "h1"}])
    {('anna', 'digits'): 'h1'}
    """
    newest: dict[Name, str] = {}
    for entry in entries:
        if "home" not in entry:
            raise ChainDamaged(f"expected an extract of home ledgers, got entry {entry['seq']} of a ledger")
        newest[str(entry["owner"]), str(entry["source"])] = str(entry["home"])
    return newest


def check_extract(path: Path, home: Path) -> list[str]:
    """Holds an extract against the home ledgers that are on this machine.

    Args:
        path: the extract.
        home: of `home_folder`.

    Returns:
        Notes: which home ledgers are not here, and which have gone on since.

    Raises:
        ChainDamaged: a chain that does not hold, or an entry that is not what its home ledger says.
        PrivacyRefused: a home ledger that does not go as far as its extract.
    """
    entries, _ = parse_chain(path.read_bytes(), path)
    notes = []
    for name in newest_copied(entries):
        ledger = home_ledger(home, *name)
        if not ledger.is_file():
            notes.append(f"the home ledger {ledger} is not here: only the extract's own chain was checked")
            continue
        of_account = [entry for entry in entries if (entry["owner"], entry["source"]) == name]
        at_home, _ = parse_chain(ledger.read_bytes(), ledger)
        later = _later(of_account, at_home, ledger)
        if later:
            notes.append(f"entries that are newer than the extract: {later} in {ledger}")
    return notes


def _later(extract: Sequence[Entry], at_home: Sequence[Entry], ledger: Path) -> int:
    """How many entries of the home ledger the extract does not have yet."""
    places = {entry["hash"]: place for place, entry in enumerate(at_home)} | {GENESIS: -1}
    for entry in extract:
        if entry["home"] not in places:
            from tacit.federated.mechanism import PrivacyRefused

            raise PrivacyRefused(
                f"expected a ledger that goes as far as its extract, got an older or another {ledger}; restore the "
                "newest: spent budget cannot be taken back"
            )
    expected = range(places[extract[0]["home"]], places[extract[-1]["home"]] + 1)
    if [places[entry["home"]] for entry in extract] != list(expected):
        raise ChainDamaged(f"expected every entry of {ledger} once and in order in its extract, got others")
    for entry in extract[1:]:
        if _content(entry) != copied(at_home[places[entry["home"]]]):
            raise ChainDamaged(f"expected entry {entry['seq']} of the extract as in {ledger}, got another")
    _check_opening(extract[0], at_home[: expected[0] + 1], ledger)
    return len(at_home) - expected[-1] - 1


def _check_opening(entry: Entry, at_home: Sequence[Entry], ledger: Path) -> None:
    account = Account(str(entry["owner"]), str(entry["source"]))
    for before in at_home:
        tally(account, before)
    if _content(entry) != opening_line(account, str(entry["home"])):
        raise ChainDamaged(f"expected the account as {ledger} had it, got another in entry {entry['seq']}")


def _content(entry: Entry) -> Mapping[str, object]:
    return {name: value for name, value in entry.items() if name not in _OF_THE_CHAIN}
