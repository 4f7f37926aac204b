"""The privacy ledger: what an owner's data has been charged, on disk before a record is read.

Entries of a `Chain`, each with `kind`, `owner`, `source` and `key`. A `reserve` charges (`run`, `round`, `mechanism`).
A `release` says what left (`payload`, a SHA-256), a `fail` that nothing will, a `reopen` that the process died in
between, so that the same charge may be used again. Every reserve counts, released or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tacit.devices.failpoint import reach
from tacit.federated.accounting import Event, epsilon_pld, epsilon_rdp, merge
from tacit.federated.accounts import Account, cost, tally
from tacit.federated.chain import GENESIS, Chain, Entry
from tacit.federated.outbox import Outbox

__all__ = ["Granted", "Ledger", "Refused", "Replay", "Reservation", "Turn"]

_MOST_REOPENS = 2


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A request to read an owner's records once.

    Attributes:
        owner: whose records.
        source: which of the owner's data sets.
        run: the run that asks.
        round: its round, from 1.
        body: SHA-256 of the arrays and the configuration that were received.
        mechanism: what will be done, as `Mechanism.describe` states it.
    """

    owner: str
    source: str
    run: str
    round: int
    body: str
    mechanism: Mapping[str, str | float | int]

    @property
    def key(self) -> str:
        """The identity of the release: asking twice for the same thing is asking once."""
        text = json.dumps([self.owner, self.source, self.mechanism["unit"], self.run, self.round, self.body])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Granted:
    """Go ahead: the charge is on disk."""

    key: str


@dataclass(frozen=True)
class Replay:
    """The same was asked before: answer with the same bytes."""

    key: str
    payload: bytes


@dataclass(frozen=True)
class Refused:
    """No, in one of three words that say nothing about the data."""

    reason: Literal["unavailable", "exhausted", "refused"]


Turn = Granted | Replay | Refused


class Ledger:
    """An open ledger, held by one process until `close`.

    *Guarantees*: a turn is granted only after its charge is on disk; the charges of an owner never exceed the budget;
    for one key at most one payload leaves.
    """

    def __init__(self, path: Path, outbox: Outbox, *, epsilon: float, delta: float) -> None:
        """Opens or makes the ledger at `path` and takes its lock.

        Args:
            path: the JSON Lines file.
            outbox: where payloads wait.
            epsilon: the budget of each owner's source.
            delta: the δ of the budget.

        Raises:
            ChainHeld: another process has it open.
            ChainDamaged: the chain does not hold.
        """
        self.epsilon, self.delta = epsilon, delta
        self.accounts: dict[tuple[str, str], Account] = {}
        self._outbox = outbox
        self._chain = Chain(path)
        self._affordable: dict[Event, int] = {}
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
    def repaired(self) -> str | None:
        """What was dropped on opening, or None."""
        return self._chain.repaired

    def plan(self, event: Event, steps: int) -> None:
        """Evaluates a planned total once, so that each round's check compares step counts only."""
        if self._within({event: steps}):
            self._affordable[event] = max(steps, self._affordable.get(event, 0))

    def reserve(self, requests: Sequence[Reservation]) -> list[Turn]:
        """Charges a cohort with one write and one fsync; only then may records be read."""
        drafts: list[Entry] = []
        turns = [self._turn(request, drafts) for request in requests]
        self._record(drafts)
        self._granted.update(turn.key for turn in turns if isinstance(turn, Granted))
        return turns

    def release(self, round_number: int, payloads: Mapping[str, bytes]) -> None:
        """Makes payloads durable, then records their hashes; only then may they leave.

        Raises:
            ValueError: a key that this process was not granted, or that is already closed.
        """
        for key in payloads:
            if key not in self._granted or key not in self._open:
                raise ValueError(f"expected a key granted in this process and still open, got {key}; reserve first")
        self._outbox.put(round_number, payloads)
        reach("ledger.after_outbox")
        self._record(
            [
                {**self._entry("release", key), "payload": hashlib.sha256(payload).hexdigest()}
                for key, payload in payloads.items()
            ]
        )

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

    def _turn(self, request: Reservation, drafts: list[Entry]) -> Turn:
        key = request.key
        if key in self._closed:
            digest = self._closed[key]
            payload = None if digest is None else self._outbox.get(key, digest)
            return Refused("unavailable") if payload is None else Replay(key, payload)
        if any(other["key"] == key for other in drafts):
            return Refused("unavailable")
        if key in self._open:
            if dict(request.mechanism) != self._mechanisms[key]:
                return Refused("refused")  # the charge was for something else
            # Only a process that died leaves a reservation open, and nothing of it left: fresh noise, same charge.
            if key in self._granted or self._open[key] >= _MOST_REOPENS:
                return Refused("unavailable")
            drafts.append(self._entry("reopen", key))
            return Granted(key)
        draft: Entry = {
            "kind": "reserve",
            "owner": request.owner,
            "source": request.source,
            "key": key,
            "run": request.run,
            "round": request.round,
            "mechanism": dict(request.mechanism),
        }
        if not self._fits(draft, drafts):
            return Refused("exhausted")
        drafts.append(draft)
        return Granted(key)

    def _fits(self, draft: Entry, earlier: Sequence[Entry]) -> bool:
        """Whether the owner can afford `draft` on top of all its entries, open ones and this cohort's included."""
        account = self._account(draft)
        same_owner = [d for d in earlier if d["kind"] == "reserve" and self._account(d) is account]
        costs = [cost(d) for d in (*same_owner, draft)]
        history = merge([*account.history.items(), *costs])
        event = costs[-1][0]
        if len(history) == 1 and history[event] <= self._affordable.get(event, 0):
            return True
        fits = self._within(history)
        if fits and len(history) == 1:
            self._affordable[event] = history[event]
        return fits

    def _within(self, history: Mapping[Event, int]) -> bool:
        return _fits_budget(frozenset(history.items()), self.epsilon, self.delta)

    def _record(self, drafts: Sequence[Entry]) -> None:
        for entry in self._chain.append(drafts):
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        kind, key, account = entry["kind"], str(entry["key"]), self._account(entry)
        tally(account, entry)
        if kind == "reserve":
            self._open[key] = 0
            self._owners[key] = account
            self._mechanisms[key] = entry["mechanism"]
        elif kind == "reopen":
            self._open[key] += 1
        else:
            self._open.pop(key, None)
            self._closed[key] = str(entry["payload"]) if kind == "release" else None

    def _account(self, entry: Entry) -> Account:
        owner, source = str(entry["owner"]), str(entry["source"])
        return self.accounts.setdefault((owner, source), Account(owner, source))

    def _entry(self, kind: str, key: str) -> Entry:
        account = self._owners[key]
        return {"kind": kind, "owner": account.owner, "source": account.source, "key": key}


@lru_cache(maxsize=256)
def _fits_budget(history: frozenset[tuple[Event, int]], epsilon: float, delta: float) -> bool:
    # Cached, because an owner in a process of its own opens its ledger for each message.
    rdp = epsilon_rdp(dict(history), delta)
    if rdp <= epsilon:
        return True
    # PLD holds for a plan fixed in advance; mechanisms chosen one after another are held to the RDP filter.
    return len(history) == 1 and rdp <= 50.0 and epsilon_pld(dict(history), delta) <= epsilon
