"""The round loop: Flower's `Strategy.start`, but one that can begin at any round and says how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

__all__ = ["FederationFailed", "RoundReport", "Trains", "run_rounds"]


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
    """

    round: int
    clients: int
    refusals: dict[str, int]
    wall_s: float
    left_out: bool = False
    evaluation: MetricRecord | None = None
    evaluation_refusals: dict[str, int] = field(default_factory=dict)


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
        skip_lost: when resuming, go on without the first round if its owners can no longer answer it.
        timeout_s: how long to wait for a round's replies.

    Returns:
        The model after the last round.

    Raises:
        FederationFailed: fewer replies than the quorum.
    """
    for server_round in range(first_round, rounds + 1):
        started = time.monotonic()
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(dict(config)), grid)
        replies = list(grid.send_and_receive(messages, timeout=timeout_s))
        good = [reply for reply in replies if reply.has_content()]
        refusals = _count_reasons(replies)
        few = len(good) < quorum
        # Interrupted so often that its reservations cannot be used again, it stays charged and the model stays.
        lost = few and skip_lost and server_round == first_round and set(refusals) == {"unavailable"}
        if few and not lost:
            reasons = ", ".join(f"{count} {reason}" for reason, count in refusals.items()) or "no reply"
            raise FederationFailed(
                f"expected at least {quorum} owners in round {server_round}, got {len(good)} ({reasons}); "
                "bring owners back, then resume"
            )
        aggregated = None if lost else strategy.aggregate_train(server_round, good)[0]
        arrays = arrays if aggregated is None else aggregated
        evaluation, evaluation_refusals = _evaluate(
            strategy, grid, arrays, server_round=server_round, config=config, timeout_s=timeout_s
        )
        report = RoundReport(
            round=server_round,
            clients=0 if lost else len(good),
            refusals=refusals,
            wall_s=time.monotonic() - started,
            left_out=aggregated is None,
            evaluation=evaluation,
            evaluation_refusals=evaluation_refusals,
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
    timeout_s: float,
) -> tuple[MetricRecord | None, dict[str, int]]:
    """Asks the owners where the strategy does; one that refuses is counted, and the run goes on."""
    messages = list(strategy.configure_evaluate(server_round, arrays, ConfigRecord(dict(config)), grid))
    replies = list(grid.send_and_receive(messages, timeout=timeout_s)) if messages else []
    return strategy.aggregate_evaluate(server_round, replies), _count_reasons(replies)


def _count_reasons(replies: list[Message]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reply in replies:
        if reply.has_error():
            reason = reply.error.reason or "no reason given"
            counts[reason] = counts.get(reason, 0) + 1
    return counts
