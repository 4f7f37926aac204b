"""The Flower ServerApp: begin where the last checkpoint ended, run the rounds, keep what they gave."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from tacit.devices.durable import write_durably
from tacit.devices.failpoint import reach
from tacit.federated.averaging import from_record, to_record
from tacit.federated.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_weights
from tacit.federated.evaluation import owners_accuracy
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.rounds import RoundReport, Trains, run_rounds
from tacit.federated.train import Arrays

__all__ = ["LedgerView", "ServerPlan", "make_server_app"]


@dataclass(frozen=True)
class LedgerView:
    """What the server may know of the ledger.

    Attributes:
        head: the newest hash.
        seen: whether a hash was ever the newest.
        settled: called with a round whose model is durable: earlier payloads need not be kept.
    """

    head: Callable[[], str]
    seen: Callable[[str], bool]
    settled: Callable[[int], None]


class Resumable(Trains, Protocol):
    """A Flower strategy whose state a checkpoint can keep."""

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        ...

    def restore(self, state: Arrays) -> None:
        """Takes up what `state` kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What a server does.

    Attributes:
        folder: DIR/train.
        recipe: SHA-256 of the resolved recipe.
        initial: the untrained model.
        run: the run's identity, sent to owners.
        rounds: planned.
        quorum: owners that a round needs.
        secret_cohorts: whether nobody may learn who took part.
        resumed: whether this run has begun before.
        strategy: a fresh one.
        ledger: None without a guarantee, or when owners keep their own.
        evaluate: accuracy of arrays on a public test split after a round, or None.
        progress: told of each round and of notes.
        owner_names: by index, for what the owners' own records say.
        purpose: of these rounds, where a run has others besides; it tells their charges apart.
    """

    folder: Path
    recipe: str
    initial: Arrays
    run: str
    rounds: int
    quorum: int
    secret_cohorts: bool
    resumed: bool
    strategy: Resumable
    ledger: LedgerView | None
    evaluate: Callable[[int, Arrays], float | None]
    progress: Callable[[Mapping[str, object]], None]
    owner_names: Sequence[str] = ()
    purpose: str = ""


def make_server_app(find_plan: Callable[[Context], ServerPlan]) -> ServerApp:
    """A ServerApp that carries out the plan that a context names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _serve(grid, find_plan(context))

    return app


def _serve(grid: Grid, plan: ServerPlan) -> None:
    start = _begin(plan)
    plan.strategy.restore(start.strategy)
    history = [dict(row) for row in start.history]

    def on_round(report: RoundReport, record: ArrayRecord) -> None:
        arrays = from_record(record)
        row: dict[str, object] = {
            "round": report.round,
            "accuracy": plan.evaluate(report.round, arrays),
            # Who took part at client level, and how many, is what its guarantee hides.
            "clients": None if plan.secret_cohorts else report.clients,
            "refusals": {} if plan.secret_cohorts else report.refusals,
            "owners_accuracy": _owners_accuracy(plan, report),
        }
        history.append(row)
        reach("server.before_checkpoint")
        save_checkpoint(
            plan.folder / "checkpoint",
            Checkpoint(
                round=report.round,
                arrays=arrays,
                strategy=plan.strategy.state(),
                recipe=plan.recipe,
                ledger_head=plan.ledger.head() if plan.ledger else "",
                history=history,
            ),
        )
        reach("server.after_checkpoint")
        if plan.ledger:
            plan.ledger.settled(report.round)
        if report.left_out:
            plan.progress({"note": f"round {report.round} was interrupted too often: charged, and left out"})
        plan.progress(row)

    final = run_rounds(
        plan.strategy,
        grid,
        to_record(start.arrays),
        rounds=plan.rounds,
        first_round=start.round + 1,
        quorum=plan.quorum,
        config={"run": plan.run, **({"purpose": plan.purpose} if plan.purpose else {})},
        skip_lost=plan.resumed,
        on_round=on_round,
    )
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_durably(plan.folder / "rounds.jsonl", lines.encode())
    reach("server.before_weights")
    write_weights(plan.folder / "weights.safetensors", from_record(final))


def _owners_accuracy(plan: ServerPlan, report: RoundReport) -> dict[str, object] | None:
    """What the owners' own records say of the model; None where they were not asked."""
    refusals: Mapping[str, int] = {} if plan.secret_cohorts else report.evaluation_refusals
    if report.evaluation is None:
        return {"mean": None, "refusals": dict(refusals)} if refusals else None
    return {**owners_accuracy(report.evaluation, plan.owner_names), "refusals": dict(refusals)}


def _begin(plan: ServerPlan) -> Checkpoint:
    """The newest checkpoint, or round 0.

    Raises:
        ValueError: the checkpoint is another recipe's.
        PrivacyRefused: the ledger is older than the checkpoint.
    """
    for folder in (plan.folder, plan.folder / "checkpoint"):
        for leftover in folder.glob(".*.tmp"):  # of a process that died
            leftover.unlink()
    found, notes = load_checkpoint(plan.folder / "checkpoint")
    for note in notes:
        plan.progress({"note": note})
    if found is None:
        return Checkpoint(round=0, arrays=plan.initial, strategy={}, recipe=plan.recipe, ledger_head="", history=[])
    if found.recipe != plan.recipe:
        raise ValueError(f"expected a checkpoint of this recipe in {plan.folder}, got another's; use another folder")
    if plan.ledger and found.ledger_head and not plan.ledger.seen(found.ledger_head):
        raise PrivacyRefused(
            f"expected a ledger that goes at least as far as round {found.round}, got an older one; "
            "restore the newest ledger.jsonl: spent budget cannot be taken back"
        )
    plan.progress({"note": f"resumed after round {found.round}"})
    return found
