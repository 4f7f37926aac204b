"""The round loop: Flower's `Strategy.start`, but one that can begin at any round and says how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from tacit.devices.failpoint import reach
from tacit.federated.admission import Admitted, FrontDoor, Sent, admit, refusal_reason
from tacit.federated.replies import Cohort, array_bytes
from tacit.federated.roster import Roster

__all__ = ["Doors", "FederationFailed", "RoundReport", "Trains", "run_rounds", "wait_for"]


class Trains(Protocol):
    """The part of a Flower `Strategy` that a round needs; any of Flower's fits.

    `aggregate_evaluate` is asked after every round, also when nobody was: a cohort may be empty, and its noise is due.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's."""
        ...

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As Flower's."""
        ...

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's."""
        ...

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As Flower's."""
        ...


class FederationFailed(RuntimeError):
    """A round that too few owners finished."""


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

    def admit(self, messages: Iterable[Message], replies: Sequence[Message], server_round: int) -> Admitted:
        """Judges the replies to a training round; a cohort made in this process can be wrong in its values alone."""
        if isinstance(replies, Cohort):
            finite = replies.finite()
            if finite.all():
                return Admitted(replies=replies, aside={})
            wrong = {
                node: "arrays hold NaN or infinity"
                for node, good in zip(replies.nodes, finite, strict=True)
                if not good
            }
            return Admitted(replies=replies.take(finite), aside=wrong)
        return admit(replies, Sent.of(messages, server_round), self.roster, self.training)

    def admit_counts(self, messages: Iterable[Message], replies: Iterable[Message], server_round: int) -> Admitted:
        """Judges the replies to an evaluation."""
        return admit(replies, Sent.of(messages, server_round), self.roster, self.evaluation)


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: from 1.
        clients: owners whose update was used.
        refusals: reasons of the others, by constant.
        wall_s: seconds it took.
        left_out: interrupted so often that its charge could not be used again; the model is the one before.
        evaluation: what the owners' records say of the new model; None where they were not asked or nobody answered.
        evaluation_refusals: reasons of those who were asked and did not answer.
        aside: node id → why its reply was set aside at the front door.
        bytes_down: of arrays that the server sent.
        bytes_up: of arrays that came back, used or not.
    """

    round: int
    clients: int
    refusals: dict[str, int]
    wall_s: float
    left_out: bool = False
    evaluation: MetricRecord | None = None
    evaluation_refusals: dict[str, int] = field(default_factory=dict)
    aside: dict[int, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


def run_rounds(
    strategy: Trains,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    rounds: int,
    first_round: int,
    quorum: int,
    config: Mapping[str, str],
    on_round: Callable[[RoundReport, ArrayRecord], None],
    doors: Doors | None = None,
    ready: Callable[[], object] = lambda: None,
    skip_lost: bool = False,
    timeout_s: float = 3600.0,
) -> ArrayRecord:
    """Runs rounds `first_round` to `rounds` of any Flower strategy.

    Args:
        strategy: configures and aggregates.
        grid: reaches the owners.
        arrays: the model to begin with.
        rounds: the last round.
        first_round: from 1; later when resuming.
        quorum: how many owners must answer for a round to count.
        config: sent with each message.
        on_round: called after each round with the new model, before the next begins.
        doors: what is admitted; everything when None.
        ready: called before each round; it may wait, or raise.
        skip_lost: when resuming, go on without the first round if its owners can no longer answer it.
        timeout_s: how long to wait for a round's replies.

    Returns:
        The model after the last round.

    Raises:
        FederationFailed: fewer replies than the quorum.
    """
    for server_round in range(first_round, rounds + 1):
        ready()
        started = time.monotonic()
        reach("round.before_configure")
        messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(dict(config)), grid))
        reach("round.after_configure")
        replies = _as_sequence(grid.send_and_receive(messages, timeout=timeout_s))
        reach("round.after_replies")
        admitted = doors.admit(messages, replies, server_round) if doors else Admitted(replies=replies, aside={})
        good = _with_content(admitted.replies)
        refusals = _count_reasons(admitted.replies)
        few = len(good) < quorum
        # Interrupted so often that its reservations cannot be used again, it stays charged and the model stays.
        lost = few and skip_lost and server_round == first_round and _is_lost(refusals)
        if few and not lost:
            counts = {**refusals, **({"set aside": len(admitted.aside)} if admitted.aside else {})}
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "no reply"
            raise FederationFailed(
                f"expected at least {quorum} owners in round {server_round}, got {len(good)} ({reasons}); "
                "bring owners back, then resume"
            )
        aggregated = None if lost else strategy.aggregate_train(server_round, good)[0]
        arrays = arrays if aggregated is None else aggregated
        reach("round.after_aggregate")
        evaluation, evaluation_refusals, misjudged = _evaluate(
            strategy, grid, arrays, server_round=server_round, config=config, doors=doors, timeout_s=timeout_s
        )
        report = RoundReport(
            round=server_round,
            clients=0 if lost else len(good),
            refusals=refusals,
            wall_s=time.monotonic() - started,
            left_out=aggregated is None,
            evaluation=evaluation,
            evaluation_refusals=evaluation_refusals,
            aside={**misjudged, **admitted.aside},
            bytes_down=_bytes_of_questions(messages),
            bytes_up=replies.array_bytes if isinstance(replies, Cohort) else sum(map(array_bytes, replies)),
        )
        on_round(report, arrays)
    return arrays


def _evaluate(
    strategy: Trains,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    server_round: int,
    config: Mapping[str, str],
    doors: Doors | None,
    timeout_s: float,
) -> tuple[MetricRecord | None, dict[str, int], dict[int, str]]:
    """Asks the owners where the strategy does; one that refuses is counted, and the run goes on."""
    messages = list(strategy.configure_evaluate(server_round, arrays, ConfigRecord(dict(config)), grid))
    replies: Sequence[Message] = list(grid.send_and_receive(messages, timeout=timeout_s)) if messages else []
    aside: dict[int, str] = {}
    if doors is not None:
        admitted = doors.admit_counts(messages, replies, server_round)
        replies, aside = admitted.replies, admitted.aside
    return strategy.aggregate_evaluate(server_round, replies), _count_reasons(replies), aside


def wait_for(grid: Grid, owners: int, wait_s: float, tell: Callable[[str], None], *, poll_s: float = 1.0) -> None:
    """Waits until so many owners can be reached, and counts down.

    Args:
        grid: reaches them.
        owners: how many are needed.
        wait_s: at most; 0 does not wait.
        tell: told how many are there, each second.
        poll_s: between two looks.

    Raises:
        FederationFailed: too few in the end.
    """
    end = time.monotonic() + wait_s
    while (there := len(list(grid.get_node_ids()))) < owners:
        left = end - time.monotonic()
        if left <= 0.0:
            raise FederationFailed(
                f"expected at least {owners} owners to be reachable, got {there} after {wait_s:g} s; bring owners back "
                "or lower federated.quorum, then resume"
            )
        tell(f"waiting for owners: {there} of {owners}, {left:.0f} s left")
        time.sleep(min(poll_s, left))


def _is_lost(refusals: Mapping[str, int]) -> bool:
    """Whether owners can no longer answer a round, for whatever others did not."""
    return "unavailable" in refusals and set(refusals) <= {"unavailable", "dropped", "late"}


def _as_sequence(replies: Iterable[Message]) -> Sequence[Message]:
    return replies if isinstance(replies, Cohort) else list(replies)


def _with_content(replies: Sequence[Message]) -> Sequence[Message]:
    return replies if isinstance(replies, Cohort) else [reply for reply in replies if reply.has_content()]


def _bytes_of_questions(messages: Sequence[Message]) -> int:
    """Of all arrays that were asked with; most of a round's messages share theirs."""
    known: dict[int, int] = {}
    for message in messages:
        content = id(message.content)
        if content not in known:
            known[content] = array_bytes(message)
    return sum(known[id(message.content)] for message in messages)


def _count_reasons(replies: Sequence[Message]) -> dict[str, int]:
    counts: dict[str, int] = {}
    if isinstance(replies, Cohort):  # none of them is an error
        return counts
    for reply in replies:
        if reply.has_error():
            reason = refusal_reason(reply)
            counts[reason] = counts.get(reason, 0) + 1
    return counts
