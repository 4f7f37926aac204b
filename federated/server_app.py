"""The Flower ServerApp: begin where the last checkpoint ended, run the rounds, keep what they gave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from tacit.devices.durable import FileDamaged, write_durably
from tacit.devices.failpoint import reach
from tacit.federated.averaging import from_record, part, to_record
from tacit.federated.checkpoint import Checkpoint, State, load_checkpoint, save_checkpoint, write_weights
from tacit.federated.doors import Doors
from tacit.federated.evaluation import owners_accuracy
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.rounds import RoundReport, Trains, run_rounds, wait_for
from tacit.federated.train import Arrays

__all__ = ["LedgerView", "ServerPlan", "make_server_app"]

_BESIDE = "beside the strategy."


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


class Remembers(Protocol):
    """Whatever has a state that a checkpoint can keep."""

    def state(self) -> State:
        """What a checkpoint keeps."""
        ...

    def restore(self, state: State) -> None:
        """Takes up what `state` kept."""
        ...


class Resumable(Trains, Remembers, Protocol):
    """A Flower strategy whose state a checkpoint can keep."""


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
        doors: what replies must look like; everything is admitted when None.
        checkpoint_s: least seconds between two checkpoints; 0 for one after every round.
        wait_s: how long to wait for owners before a round; 0 in one process, where nobody can come later.
        reachable: owners that must be there before a round.
        beside: what else a checkpoint keeps the state of (the failures of a simulation), or None.
        clock_s: simulated seconds that the last round took, or None.
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
    doors: Doors | None = None
    wait_s: float = 0.0
    checkpoint_s: float = 0.0
    reachable: int = 0
    beside: Remembers | None = None
    clock_s: Callable[[], float | None] = lambda: None


def make_server_app(find_plan: Callable[[Context], ServerPlan]) -> ServerApp:
    """A ServerApp that carries out the plan that a context names."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _serve(grid, find_plan(context))

    return app


def _serve(grid: Grid, plan: ServerPlan) -> None:
    start = _begin(plan)
    reach("server.before_restore")
    _restore(plan, dict(start.strategy))
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
            **_traffic(plan, report),
        }
        history.append(row)
        _note_aside(plan, report)
        if due(report.round):
            keep(report, arrays)
        if report.left_out:
            plan.progress({"note": f"round {report.round} was interrupted too often: charged, and left out"})
        plan.progress(row)

    kept_at = time.monotonic()

    def due(server_round: int) -> bool:
        """A round that is not kept is done again after a death: none, or a second's work where that is allowed."""
        return server_round == plan.rounds or time.monotonic() - kept_at >= plan.checkpoint_s

    def keep(report: RoundReport, arrays: Arrays) -> None:
        nonlocal kept_at
        reach("server.before_checkpoint")
        save_checkpoint(
            plan.folder / "checkpoint",
            Checkpoint(
                round=report.round,
                arrays=arrays,
                strategy=_state(plan),
                run=plan.run,
                recipe=plan.recipe,
                ledger_head=plan.ledger.head() if plan.ledger else "",
                history=history,
            ),
        )
        reach("server.after_checkpoint")
        if plan.ledger:
            plan.ledger.settled(report.round)
        kept_at = time.monotonic()

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
        doors=plan.doors,
        ready=lambda: wait_for(grid, plan.reachable, plan.wait_s, lambda text: plan.progress({"note": text})),
    )
    reach("server.before_history")
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_durably(plan.folder / "rounds.jsonl", lines.encode())
    reach("server.before_weights")
    write_weights(plan.folder / "weights.safetensors", from_record(final))
    reach("server.after_weights")


def _state(plan: ServerPlan) -> State:
    beside = {} if plan.beside is None else plan.beside.state()
    return {**plan.strategy.state(), **{_BESIDE + name: array for name, array in beside.items()}}


def _restore(plan: ServerPlan, state: State) -> None:
    plan.strategy.restore({name: array for name, array in state.items() if not name.startswith(_BESIDE)})
    if plan.beside is not None:
        plan.beside.restore(part(state, _BESIDE))


def _traffic(plan: ServerPlan, report: RoundReport) -> dict[str, object]:
    """Bytes, simulated time, and who was set aside; at client level all of them would tell who took part."""
    if plan.secret_cohorts:
        return {"bytes_down": None, "bytes_up": None, "simulated_s": None, "set_aside": {}}
    return {
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "simulated_s": plan.clock_s(),
        "set_aside": _named_aside(plan, report),
    }


def _named_aside(plan: ServerPlan, report: RoundReport) -> dict[str, str]:
    roster, names = plan.doors.roster if plan.doors else None, plan.owner_names

    def name_of(node: int) -> str:
        index = None if roster is None else roster.indices.get(node)
        return f"node {node}" if index is None or index >= len(names) else names[index]

    return {name_of(node): reason for node, reason in report.aside.items()}


def _note_aside(plan: ServerPlan, report: RoundReport) -> None:
    """At client level a file of the server's own keeps the reasons; no report, bundle or JSON reads it."""
    if not plan.secret_cohorts or not report.aside:
        return
    private = plan.folder / "private"
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = json.dumps({"round": report.round, "set_aside": _named_aside(plan, report)})
    with (private / "admission.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _owners_accuracy(plan: ServerPlan, report: RoundReport) -> dict[str, object] | None:
    """What the owners' own records say of the model; None where they were not asked."""
    refusals: Mapping[str, int] = {} if plan.secret_cohorts else report.evaluation_refusals
    if report.evaluation is None:
        return {"mean": None, "refusals": dict(refusals)} if refusals else None
    return {**owners_accuracy(report.evaluation, plan.owner_names), "refusals": dict(refusals)}


def _begin(plan: ServerPlan) -> Checkpoint:
    """The newest checkpoint, or round 0.

    Raises:
        FileDamaged: no checkpoint is whole, or it is another recipe's or run's.
        PrivacyRefused: the ledger is older than the checkpoint.
    """
    for folder in (plan.folder, plan.folder / "checkpoint"):
        for leftover in folder.glob(".*.tmp"):  # of a process that died
            leftover.unlink()
    found, notes = load_checkpoint(plan.folder / "checkpoint")
    for note in notes:
        plan.progress({"note": note})
    if found is None:
        none: dict[str, str] = {"run": plan.run, "recipe": plan.recipe, "ledger_head": ""}
        return Checkpoint(round=0, arrays=plan.initial, strategy={}, history=[], **none)
    if (found.recipe, found.run) != (plan.recipe, plan.run):
        raise FileDamaged(
            f"expected a checkpoint of this recipe and run in {plan.folder}, got another's; restore this run's, or use "
            "another folder"
        )
    if plan.ledger and not plan.ledger.seen(found.ledger_head):
        raise PrivacyRefused(
            f"expected a ledger that goes at least as far as round {found.round}, got an older one; "
            "restore the newest ledger.jsonl: spent budget cannot be taken back"
        )
    plan.progress({"note": f"resumed after round {found.round}"})
    if getattr(plan.strategy, "forgets", False):
        plan.progress({"note": "the strategy has no state() and restore(): what it kept between rounds begins anew"})
    return found
