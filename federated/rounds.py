"""The round loop: Flower's `Strategy.start`, but one that can begin at any round and says how it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

__all__ = ["FederationFailed", "RoundReport", "run_rounds"]


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
    """

    round: int
    clients: int
    refusals: dict[str, int]
    wall_s: float


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    arrays: ArrayRecord,
    *,
    rounds: int,
    first_round: int,
    quorum: int,
    config: Mapping[str, str],
    on_round: Callable[[RoundReport, ArrayRecord], None],
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
        if len(good) < quorum:
            reasons = ", ".join(f"{count} {reason}" for reason, count in refusals.items()) or "no reply"
            raise FederationFailed(
                f"expected at least {quorum} owners in round {server_round}, got {len(good)} ({reasons}); "
                "lower federated.quorum or bring owners back, then resume"
            )
        aggregated, _ = strategy.aggregate_train(server_round, good)
        arrays = arrays if aggregated is None else aggregated
        wall_s = time.monotonic() - started
        on_round(RoundReport(round=server_round, clients=len(good), refusals=refusals, wall_s=wall_s), arrays)
    return arrays


def _count_reasons(replies: list[Message]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reply in replies:
        if reply.has_error():
            reason = reply.error.reason or "no reason given"
            counts[reason] = counts.get(reason, 0) + 1
    return counts
