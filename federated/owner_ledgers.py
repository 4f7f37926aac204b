"""The home ledgers of a run over private data, in one process, and the run's extract of them."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tacit.devices.failpoint import reach
from tacit.federated.accounting import Event
from tacit.federated.chain import GENESIS, Chain, Entry
from tacit.federated.extract import copied, newest_copied, opening_line
from tacit.federated.fingerprint import DataChanged
from tacit.federated.home import open_home_ledger
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.outbox import Outbox
from tacit.federated.tally import Account
from tacit.federated.turns import Refused, Reservation, Turn

__all__ = ["OwnerLedgers"]

_THREADS = 16  # that wait for the disk: it commits what comes together at once
_OTHER_FILES = 256


class OwnerLedgers:
    """A `Book` over the home ledgers of many owners, held by one process until `close`.

    *Guarantees*: those of `Ledger`, for each owner over all runs. Payloads of a cohort are stored with one write. The
    extract has an entry no earlier than its home ledger has.
    """

    def __init__(
        self,
        home: Path,
        source: str,
        owners: Mapping[str, str | None],
        *,
        run: str,
        extract: Path,
        outbox: Outbox,
        epsilon: float,
        delta: float,
    ) -> None:
        """Opens all ledgers and brings the extract up to date.

        Args:
            home: of `home.home_folder`.
            source: which data set of each owner.
            owners: fingerprint of the data that each holds now, by name; None for the server's ledger at client level.
            run: its identity.
            extract: DIR/ledger.jsonl.
            outbox: of the run.
            epsilon: the budget of each owner's source, over all runs.
            delta: its δ.

        Raises:
            DataChanged: data that are not those this run has been charged for.
            PrivacyRefused: data that were charged before a `new-cohort`, or a home ledger that is older than the
                extract remembers.
            ChainHeld: another process has one open.
            ChainDamaged: a chain that does not hold.
        """
        self._outbox, self._holders = outbox, dict[str, str]()  # key → owner
        self._ledgers: dict[str, Ledger] = {}
        _allow_open_files(len(owners))

        def hold(owner: str) -> None:
            self._ledgers[owner] = open_home_ledger(
                home, owner, source, data=owners[owner], outbox=outbox, epsilon=epsilon, delta=delta
            )

        try:
            _at_once(hold, list(owners))
            self._ledgers = {owner: self._ledgers[owner] for owner in owners}
            for owner, data in owners.items():
                _check_data(self._ledgers[owner].accounts.get((owner, source)), data, run)
            self._extract = Chain(extract)
        except BaseException:
            self._close_ledgers()
            raise
        try:
            self._copied = self._find_copied(source)
            self._copy(self._ledgers)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> str:
        """Hash of the extract's newest entry, which stands for the heads of all owners."""
        return self._extract.head

    @property
    def accounts(self) -> Mapping[tuple[str, str], Account]:
        """By owner and source, with what other runs were charged."""
        return {name: account for ledger in self._ledgers.values() for name, account in ledger.accounts.items()}

    @property
    def repaired(self) -> str | None:
        """What was dropped on opening, or None."""
        found = [*(ledger.repaired for ledger in self._ledgers.values()), self._extract.repaired]
        return "; ".join(note for note in found if note) or None

    def plan(self, history: Mapping[Event, int], owner: str | None = None) -> bool:
        """As `Ledger.plan`."""
        fits = [ledger.plan(history, owner) for ledger in self._ledgers.values()]  # each is to know the plan
        return all(fits)

    def short_of(self, history: Mapping[Event, int], run: str, owner: str | None = None) -> list[str]:
        """As `Ledger.short_of`."""
        return [name for ledger in self._ledgers.values() for name in ledger.short_of(history, run, owner)]

    def reserve(self, requests: Sequence[Reservation]) -> list[Turn]:
        """Charges a cohort, each owner in its own ledger; only then may records be read."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            if request.owner in self._ledgers:
                places.setdefault(request.owner, []).append(place)
                self._holders[request.key] = request.owner
        turns: list[Turn] = [Refused("refused")] * len(requests)

        def charge(owner: str) -> None:
            found = self._ledgers[owner].reserve([requests[place] for place in places[owner]])
            for place, turn in zip(places[owner], found, strict=True):
                turns[place] = turn

        _at_once(charge, list(places))
        self._copy(places)
        return turns

    def release(self, round_number: int, payloads: Mapping[str, bytes]) -> None:
        """Makes payloads durable, then records their hashes; only then may they leave.

        Raises:
            ValueError: a key that this process was not granted, or that is already closed.
        """
        by_owner = self._by_owner(payloads)
        for owner, keys in by_owner.items():
            self._ledgers[owner].expect_open(keys)
        self._outbox.put(round_number, payloads)
        reach("ledger.after_outbox")
        digests = {key: hashlib.sha256(payload).hexdigest() for key, payload in payloads.items()}
        _at_once(lambda o: self._ledgers[o].record_release({key: digests[key] for key in by_owner[o]}), list(by_owner))
        self._copy(by_owner)

    def fail(self, keys: Iterable[str]) -> None:
        """Records that nothing will leave for these keys of ours."""
        by_owner = self._by_owner(key for key in keys if key in self._holders)
        _at_once(lambda owner: self._ledgers[owner].fail(by_owner[owner]), list(by_owner))
        self._copy(by_owner)

    def discard_before(self, round_number: int) -> None:
        """Drops payloads of rounds that a durable checkpoint has made unaskable."""
        self._outbox.discard_before(round_number)

    def seen(self, head: str) -> bool:
        """Whether the extract has ever had this head, and the home ledgers all that it was copied from."""
        return head == GENESIS or any(entry["hash"] == head for entry in self._extract.entries)

    def close(self) -> None:
        """Gives all locks back."""
        self._extract.close()
        self._close_ledgers()

    def _by_owner(self, keys: Iterable[str]) -> dict[str, list[str]]:
        by_owner: dict[str, list[str]] = {}
        for key in keys:
            if key not in self._holders:
                raise ValueError(f"expected a key granted in this process, got {key}; reserve first")
            by_owner.setdefault(self._holders[key], []).append(key)
        return by_owner

    def _find_copied(self, source: str) -> dict[str, int]:
        """How many entries of each home ledger the extract has; an extract that is new begins with every account."""
        newest = newest_copied(self._extract.entries)
        copied_entries, openings = {}, []
        for owner, ledger in self._ledgers.items():
            if (owner, source) in newest:
                copied_entries[owner] = _place(ledger, newest[owner, source], owner) + 1
            else:
                account = ledger.accounts.get((owner, source), Account(owner, source))
                openings.append(opening_line(account, ledger.head))
                copied_entries[owner] = len(ledger.entries)
        self._extract.append(openings)
        return copied_entries

    def _copy(self, owners: Iterable[str]) -> None:
        new: list[Entry] = []
        for owner in owners:
            entries = self._ledgers[owner].entries
            new += [copied(entry) for entry in entries[self._copied[owner] :]]
            self._copied[owner] = len(entries)
        self._extract.append(new)

    def _close_ledgers(self) -> None:
        for ledger in self._ledgers.values():
            ledger.close()


def _check_data(account: Account | None, data: str | None, run: str) -> None:
    if account is None or data is None:
        return
    if data in account.retired:
        raise PrivacyRefused(
            f"expected other data of {account.owner!r} after its new cohort, got some that were charged before it; "
            "what was spent on them cannot be taken back"
        )
    if account.data.get(run, data) != data:
        raise DataChanged(
            f"expected the data of {account.owner!r} that this run was charged for, got others; restore them, or begin "
            "a new run, which inherits what was spent"
        )


def _place(ledger: Ledger, head: str, owner: str) -> int:
    if head == GENESIS:
        return -1
    for place, entry in enumerate(ledger.entries):
        if entry["hash"] == head:
            return place
    raise PrivacyRefused(
        f"expected the ledger of {owner!r} to go as far as this run's extract, got an older one; restore the newest: "
        "spent budget cannot be taken back"
    )


def _at_once(work: Callable[[str], None], owners: Sequence[str]) -> None:
    """Does the same for many owners, whose files then wait for the disk together; the first error is raised."""
    if len(owners) < 2:
        for owner in owners:
            work(owner)
        return
    with ThreadPoolExecutor(min(_THREADS, len(owners))) as threads:
        for done in [threads.submit(work, owner) for owner in owners]:
            done.result()


def _allow_open_files(ledgers: int) -> None:
    """Each ledger is an open, locked file; a login shell often allows 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ledgers + _OTHER_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
