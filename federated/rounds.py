"""The round loop: Flower's `Strategy.start`, but one that can begin at any round and says how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from tacit.devices.failpoint import reach
from tacit.federated.doors import Doors, Incoming, TooFew, count_reasons
from tacit.federated.replies import array_bytes

__all__ = ["FederationFailed", "RoundReport", "Trains", "run_rounds", "wait_for"]


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
        came = grid.send_and_receive(messages, timeout=timeout_s)
        incoming = Incoming(messages=messages, replies=came, server_round=server_round, quorum=quorum, doors=doors)
        del came
        aggregated = _aggregated(strategy, incoming, lossy=skip_lost and server_round == first_round)
        arrays = arrays if aggregated is None else aggregated
        reach("round.after_aggregate")
        evaluation, evaluation_refusals, misjudged = _evaluate(
            strategy, grid, arrays, server_round=server_round, config=config, doors=doors, timeout_s=timeout_s
        )
        report = RoundReport(
            round=server_round,
            clients=0 if aggregated is None and incoming.clients < quorum else incoming.clients,
            refusals=incoming.refusals,
            wall_s=time.monotonic() - started,
            left_out=aggregated is None,
            evaluation=evaluation,
            evaluation_refusals=evaluation_refusals,
            aside={**misjudged, **incoming.aside},
            bytes_down=_bytes_of_questions(messages),
            bytes_up=incoming.bytes_up,
        )
        on_round(report, arrays)
    return arrays


def _aggregated(strategy: Trains, incoming: Incoming, *, lossy: bool) -> ArrayRecord | None:
    """The new model; None where the old one stays.

    Args:
        strategy: aggregates.
        incoming: the round's replies.
        lossy: a round that was interrupted so often that its reservations cannot be used again stays charged, and the
            model stays.

    Raises:
        FederationFailed: fewer usable replies than the quorum.
    """
    try:
        good: Iterable[Message] | None = incoming.cohort()
        if good is None:
            stream = iter(incoming)
            # A strategy that reads its replies twice, or counts them first, gets a list.
            good = stream if getattr(strategy, "folds", False) else list(stream)
            aggregated = strategy.aggregate_train(incoming.server_round, good)[0]
            for _ in stream:  # a strategy that did not look at all of them
                pass
            return aggregated
        return strategy.aggregate_train(incoming.server_round, good)[0]
    except TooFew:
        if lossy and _is_lost(incoming.refusals):
            return None
        raise FederationFailed(
            f"expected at least {incoming.quorum} owners in round {incoming.server_round}, got {incoming.clients} "
            f"({incoming.reasons()}); bring owners back, then resume"
        ) from None


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
    return strategy.aggregate_evaluate(server_round, replies), count_reasons(replies), aside


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


def _bytes_of_questions(messages: Sequence[Message]) -> int:
    """Of all arrays that were asked with; most of a round's messages share theirs."""
    known: dict[int, int] = {}
    for message in messages:
        content = id(message.content)
        if content not in known:
            known[content] = array_bytes(message)
    return sum(known[id(message.content)] for message in messages)
