"""A round's replies as they come: judged one by one, counted, and at their end perhaps too few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from tacit.devices.failpoint import reach
from tacit.federated.admission import Admitted, FrontDoor, Sent, admit, admitted, refusal_reason
from tacit.federated.replies import Cohort, array_bytes
from tacit.federated.roster import Roster

__all__ = ["Doors", "Incoming", "TooFew", "count_reasons"]


class TooFew(Exception):
    """A round's replies are over, and fewer of them can be used than must be."""


@dataclass(frozen=True, kw_only=True)
class Doors:
    """What replies must look like, and who may send them.

    Attributes:
        training: for updates.
        evaluation: for counts.
        roster: which node speaks for which owner; None where a reply's owner means nothing (unit client).
    """

    training: FrontDoor
    evaluation: FrontDoor
    roster: Roster | None

    def admit_counts(self, messages: Iterable[Message], replies: Iterable[Message], server_round: int) -> Admitted:
        """Judges the replies to an evaluation."""
        return admit(replies, Sent.of(messages, server_round), self.roster, self.evaluation)


@dataclass(kw_only=True)
class Incoming:
    """Replies to a training round; whoever reads them to the end learns whether there were enough.

    No reply is kept: what a strategy lets go of is gone.

    Attributes:
        messages: the questions.
        replies: as the grid gives them, which has sent the questions.
        server_round: from 1.
        quorum: how many must be usable.
        doors: what is admitted; everything when None.
        clients: usable so far.
        refusals: reasons of the others so far, by constant.
        aside: node id → why its reply was set aside.
        bytes_up: of arrays that came, used or not.
    """

    messages: Sequence[Message]
    replies: Iterable[Message]
    server_round: int
    quorum: int
    doors: Doors | None
    clients: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    aside: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0

    def __iter__(self) -> Iterator[Message]:
        """The usable ones, once.

        Raises:
            TooFew: at the end, in place of an end.
        """
        for reply in self._judged():
            if reply.has_error():
                _count(self.refusals, reply)
            if reply.has_content():
                self.clients += 1
                yield reply
            del reply  # before the next one is made
        self._end()

    def cohort(self) -> Cohort | None:
        """All usable ones as one matrix, where they came as one; it can be wrong in its values alone.

        Raises:
            TooFew: there are fewer than the quorum.
        """
        if not isinstance(self.replies, Cohort):
            return None
        cohort, self.bytes_up = self.replies, self.replies.array_bytes
        finite = cohort.finite()
        if self.doors is not None and not finite.all():
            nodes = zip(cohort.nodes, finite, strict=True)
            self.aside |= {node: "arrays hold NaN or infinity" for node, good in nodes if not good}
            cohort = cohort.take(finite)
        self.clients = len(cohort)
        self._end()
        return cohort

    def reasons(self) -> str:
        """Why there are no more, in words."""
        counts = {**self.refusals, **({"set aside": len(self.aside)} if self.aside else {})}
        return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no reply"

    def _judged(self) -> Iterator[Message]:
        if self.doors is None:
            return self._weighed()
        sent = Sent.of(self.messages, self.server_round)
        return admitted(self._weighed(), sent, self.doors.roster, self.doors.training, self.aside)

    def _weighed(self) -> Iterator[Message]:
        for reply in self.replies:
            self.bytes_up += array_bytes(reply)
            yield reply
            del reply

    def _end(self) -> None:
        reach("round.after_replies")
        if self.clients < self.quorum:
            raise TooFew


def count_reasons(replies: Iterable[Message]) -> dict[str, int]:
    """How many errors there are of each reason."""
    counts: dict[str, int] = {}
    for reply in replies:
        if reply.has_error():
            _count(counts, reply)
    return counts


def _count(counts: dict[str, int], reply: Message) -> None:
    reason = refusal_reason(reply)
    counts[reason] = counts.get(reason, 0) + 1
