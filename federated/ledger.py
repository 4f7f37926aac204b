"""The privacy ledger: what an owner's data has been charged, on disk before a record is read.

Entries of a `Chain`, each with `kind`, `owner`, `source` and `key`. A `reserve` charges (`run`, `round`, `mechanism`).
A `release` says what left (`payload`, a SHA-256), a `fail` that nothing will, a `reopen` that the process died in
between, so that the same charge may be used again. Every reserve counts, released or not.

The first reserve of an account says its `status` and fixes its `opening`, by which `stop_rule.py` decides what it may
be charged. With private data each reserve carries their fingerprint, `data` (`fingerprint.py`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tacit.devices.failpoint import reach
from tacit.federated.accounting import Event, merge
from tacit.federated.chain import GENESIS, Chain, Entry
from tacit.federated.outbox import Outbox
from tacit.federated.stop_rule import Opening, fits, open_account, plan_fits
from tacit.federated.tally import Account, cost, opening_as_entry, tally
from tacit.federated.turns import Granted, Refused, Replay, Reservation, Turn

__all__ = ["Granted", "Ledger", "Objection", "Refused", "Replay", "Reservation", "Status", "Turn"]

Status = Literal["private", "public-benchmark"]
Objection = Callable[[Reservation, Account], str | None]
_Histories = dict[tuple[str, str], dict[Event, int]]
_MOST_REOPENS = 2
_NO_DATA: Mapping[str, str] = {}
_LOG = logging.getLogger("tacit")


def _no_objection(request: Reservation, account: Account) -> None:
    return None


class Ledger:
    """An open ledger, held by one process until `close`.

    *Guarantees*: a turn is granted only after its charge is on disk; an account is charged only what `stop_rule.fits`
    accepts; for one key at most one payload leaves. Within a run, and after a `new-cohort`, an account of private data
    takes no charge for other data than it says.

    Attributes:
        accounts: by owner and source.
    """

    def __init__(
        self,
        path: Path,
        outbox: Outbox,
        *,
        epsilon: float,
        delta: float,
        status: Status = "public-benchmark",
        data: Mapping[str, str] = _NO_DATA,
        objection: Objection = _no_objection,
    ) -> None:
        """Opens or makes the ledger at `path` and takes its lock.

        Args:
            path: the JSON Lines file.
            outbox: where payloads wait.
            epsilon: the budget of each owner's source.
            delta: the δ of the budget.
            status: of the sources. Private ones are refused without a fingerprint, except at client level, where the
                server that keeps the ledger holds no records.
            data: fingerprints of the private data that owners hold now, by owner.
            objection: why an owner's own policy refuses a new charge, or None; its words stay on this machine.

        Raises:
            ChainHeld: another process has it open.
            ChainDamaged: the chain does not hold.
        """
        self.epsilon, self.delta, self.status = epsilon, delta, status
        self.accounts: dict[tuple[str, str], Account] = {}
        self._data, self._objection = data, objection
        self._outbox = outbox
        self._chain = Chain(path)
        self._plans: dict[str | None, Mapping[Event, int]] = {}  # by owner; None for everybody else
        self._open: dict[str, int] = {}  # key → how often reopened
        self._closed: dict[str, str | None] = {}  # key → the payload's SHA-256, or None after a fail
        self._owners: dict[str, Account] = {}
        self._granted: set[str] = set()
        self._mechanisms: dict[str, object] = {}
        try:
            for entry in self._chain.entries:
                self._apply(entry)
        except BaseException:
            self._chain.close()
            raise

    @property
    def head(self) -> str:
        """Hash of the newest entry."""
        return self._chain.head

    @property
    def entries(self) -> Sequence[Entry]:
        """All entries, oldest first."""
        return self._chain.entries

    @property
    def repaired(self) -> str | None:
        """What was dropped on opening, or None."""
        return self._chain.repaired

    def plan(self, history: Mapping[Event, int], owner: str | None = None) -> bool:
        """Fixes what accounts that are opened from now on are planned to be charged in all.

        To be called before the first reserve, with every kind of event of the run. It decides for accounts without
        charges; one that has some keeps the plan it was opened with, and is held to the filter for everything else.

        Args:
            history: how often each kind of event is planned for one account.
            owner: whose; None for all that have no plan of their own.

        Returns:
            Whether an account without charges can afford all of it. If not, there is no plan, and who asked refuses.
        """
        self._plans.pop(owner, None)
        if not plan_fits(history, self.epsilon, self.delta):
            return False
        self._plans[owner] = dict(history)
        return True

    def short_of(self, history: Mapping[Event, int], run: str, owner: str | None = None) -> list[str]:
        """Owners that will be exhausted before a run is over, or already are.

        Args:
            history: the run's whole plan.
            run: its identity; what it was charged already is part of the plan.
            owner: whose plan it is; None for all. An account without charges is short of nothing that `plan` accepted.
        """
        asked = [a for a in self.accounts.values() if a.reserved and owner in (None, a.owner)]
        return [account.owner for account in asked if not self._affords(account, history, run)]

    def reserve(self, requests: Sequence[Reservation]) -> list[Turn]:
        """Charges a cohort with one write and one fsync; only then may records be read."""
        drafts: dict[str, Entry] = {}
        charged: _Histories = {}
        turns = [self._turn(request, drafts, charged) for request in requests]
        self._outbox.forget([key for key, draft in drafts.items() if draft["kind"] == "reopen"])
        self._record(list(drafts.values()))
        self._granted.update(turn.key for turn in turns if isinstance(turn, Granted))
        return turns

    def release(self, round_number: int, payloads: Mapping[str, bytes]) -> None:
        """Makes payloads durable, then records their hashes; only then may they leave.

        Raises:
            ValueError: a key that this process was not granted, or that is already closed.
        """
        self.expect_open(payloads)
        self._outbox.put(round_number, payloads)
        reach("ledger.after_outbox")
        self.record_release({key: hashlib.sha256(payload).hexdigest() for key, payload in payloads.items()})

    def expect_open(self, keys: Iterable[str]) -> None:
        """Checks that something may leave for these keys.

        Raises:
            ValueError: a key that this process was not granted, or that is already closed.
        """
        for key in keys:
            if key not in self._granted or key not in self._open:
                raise ValueError(f"expected a key granted in this process and still open, got {key}; reserve first")

    def record_release(self, digests: Mapping[str, str]) -> None:
        """The second half of `release`, for whoever has put the payloads of many ledgers into one outbox."""
        self._record([{**self._entry("release", key), "payload": digest} for key, digest in digests.items()])

    def fail(self, keys: Iterable[str]) -> None:
        """Records that nothing will leave for these keys of ours: they stay charged and are not tried again."""
        self._record([self._entry("fail", key) for key in keys if key in self._granted and key in self._open])

    def discard_before(self, round_number: int) -> None:
        """Drops payloads of rounds that a durable checkpoint has made unaskable."""
        self._outbox.discard_before(round_number)

    def seen(self, head: str) -> bool:
        """Whether the chain has ever had this head; false when the file is older than whoever remembers the head."""
        return head == GENESIS or any(entry["hash"] == head for entry in self._chain.entries)

    def close(self) -> None:
        """Gives the lock back."""
        self._chain.close()

    def _turn(self, request: Reservation, drafts: dict[str, Entry], charged: _Histories) -> Turn:
        """Decides on one request; what it adds goes to `drafts` by key, and to `charged` by account."""
        key = request.key
        if key in self._closed:
            digest = self._closed[key]
            payload = None if digest is None else self._outbox.get(key, digest)
            return Refused("unavailable") if payload is None else Replay(key, payload)
        if key in drafts:
            return Refused("unavailable")
        account = self._account(request.owner, request.source)
        if not self._acceptable(request, account):
            return Refused("refused")
        if key in self._open:
            return self._reopened(request, drafts)
        objection = self._objection(request, account)
        if objection is not None:
            _LOG.warning("refused: %s", objection)
            return Refused("refused")
        name = (request.owner, request.source)
        draft = self._draft(request, first=not account.reserved and name not in charged)
        history = merge([*charged.get(name, account.history).items(), cost(draft)])
        if not self._fits(account, history):
            return Refused("exhausted")
        drafts[key], charged[name] = draft, history
        return Granted(key)

    def _reopened(self, request: Reservation, drafts: dict[str, Entry]) -> Turn:
        key = request.key
        if dict(request.mechanism) != self._mechanisms[key]:
            return Refused("refused")  # the charge was for something else
        # Only a process that died leaves a reservation open, and nothing of it left: fresh noise, same charge.
        if key in self._granted or self._open[key] >= _MOST_REOPENS:
            return Refused("unavailable")
        drafts[key] = self._entry("reopen", key)
        return Granted(key)

    def _draft(self, request: Reservation, *, first: bool) -> Entry:
        draft: dict[str, object] = {
            "kind": "reserve",
            "owner": request.owner,
            "source": request.source,
            "key": request.key,
            "run": request.run,
            "round": request.round,
            "mechanism": dict(request.mechanism),
        }
        if request.owner in self._data:
            draft["data"] = self._data[request.owner]
        if first:
            draft["status"] = self.status
            opening = self._opening_of(request.owner)
            if opening is not None:
                draft["opening"] = opening_as_entry(opening)
        return draft

    def _acceptable(self, request: Reservation, account: Account) -> bool:
        """Whether the data are those that the account is about, and the unit one that adds up with its others."""
        unit, data = request.mechanism["unit"], self._data.get(request.owner)
        if data is None and unit != "client" and (self.status == "private" or account.retired):
            return False
        if data is not None and (data in account.retired or account.data.get(request.run, data) != data):
            return False
        return not account.reserved or (unit == "client") == (account.unit == "client")

    def _fits(self, account: Account, history: Mapping[Event, int]) -> bool:
        """Whether the owner can afford all its entries, open ones and this cohort's included."""
        opening = account.opening if account.reserved else self._opening_of(account.owner)
        return fits(history, opening, self.epsilon, self.delta)

    def _opening_of(self, owner: str) -> Opening | None:
        """How an account without charges is opened."""
        plan = self._plans.get(owner, self._plans.get(None))
        return None if plan is None else open_account(plan, self.epsilon, self.delta)

    def _affords(self, account: Account, history: Mapping[Event, int], run: str) -> bool:
        own = account.runs.get(run, {})
        others = [(event, count - own.get(event, 0)) for event, count in account.history.items()]
        return self._fits(account, merge([*others, *history.items()]))

    def _record(self, drafts: Sequence[Entry]) -> None:
        for entry in self._chain.append(drafts):
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        account = self._account(str(entry["owner"]), str(entry["source"]))
        tally(account, entry)
        kind, key = entry["kind"], str(entry.get("key"))
        if kind == "reserve":
            self._open[key] = 0
            self._owners[key] = account
            self._mechanisms[key] = entry["mechanism"]
        elif kind == "reopen":
            self._open[key] += 1
        elif kind in ("release", "fail"):
            self._open.pop(key, None)
            self._closed[key] = str(entry["payload"]) if kind == "release" else None

    def _account(self, owner: str, source: str) -> Account:
        return self.accounts.setdefault((owner, source), Account(owner, source))

    def _entry(self, kind: str, key: str) -> Entry:
        account = self._owners[key]
        return {"kind": kind, "owner": account.owner, "source": account.source, "key": key}
