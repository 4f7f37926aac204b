"""What is asked of a ledger, and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tacit.federated.accounting import Event
from tacit.federated.tally import Account

__all__ = ["Book", "Granted", "Refused", "Replay", "Reservation", "Turn"]


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


class Book(Protocol):
    """What a run needs of a `Ledger`, or of the `OwnerLedgers` of many owners."""

    @property
    def head(self) -> str:
        """Hash of the newest entry."""
        ...

    @property
    def repaired(self) -> str | None:
        """What was dropped on opening, or None."""
        ...

    @property
    def accounts(self) -> Mapping[tuple[str, str], Account]:
        """By owner and source."""
        ...

    def plan(self, history: Mapping[Event, int], owner: str | None = None) -> bool:
        """Fixes what is planned, for one owner or all others; whether an account without charges can afford it."""
        ...

    def short_of(self, history: Mapping[Event, int], run: str, owner: str | None = None) -> list[str]:
        """Owners, or one of them, that cannot afford a run's plan besides what other runs were charged."""
        ...

    def reserve(self, requests: Sequence[Reservation]) -> list[Turn]:
        """Charges a cohort; only then may records be read."""
        ...

    def release(self, round_number: int, payloads: Mapping[str, bytes]) -> None:
        """Makes payloads and their hashes durable; only then may they leave."""
        ...

    def fail(self, keys: Iterable[str]) -> None:
        """Records that nothing will leave for these keys."""
        ...

    def discard_before(self, round_number: int) -> None:
        """Drops payloads that nobody can ask for any more."""
        ...

    def seen(self, head: str) -> bool:
        """Whether this head was ever the newest."""
        ...

    def close(self) -> None:
        """Gives locks back."""
        ...
