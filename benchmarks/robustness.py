"""What hostile owners do to each rule, behind the front door, and to Flower's FedAvg without it.

Usage: python benchmarks/robustness.py [--rows none nan ...] [--seeds 3] [--processes 1] [--quick] [--json FILE].

Twenty owners share `digits` (Dirichlet 1.0; an MLP of 64), without privacy, and in every round four of them send what
the row says. A figure is the accuracy on the test split after 20 rounds, mean and lowest over the seeds. Tacit's
columns are recipes as `tacit run` takes them; the peer is Flower's own FedAvg object in the same rounds with every
reply admitted. "NaN" are weights that are not finite, and "run ended" is one that raised. Required of Tacit, or the
exit code is 1: every run ends with a finite model, exactly the malformed replies are set aside, and with the norm bound
every run reaches 90 %. --quick: four rows, three columns, one seed, 10 rounds, and no figure required.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, RecordDict

from tacit.edge.composition import compose
from tacit.edge.flower_app import server_plan, train_in_process
from tacit.edge.recipe import Recipe, load_recipe
from tacit.edge.strategies import failing
from tacit.federated.averaging import from_record, to_record
from tacit.federated.client_app import Owner, make_client_app
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.rounds import RoundReport, run_rounds

OWNERS, HOSTILE, ROUNDS, QUICK_ROUNDS = 20, 4, 20, 10
LEAST = 90.0  # %, with the norm bound, in every row
RECIPE = {
    "privacy.unit": "none",
    "privacy.sample_rate": 0.4,
    "compression.variants": "[]",
    "model.family": "mlp",
    "model.hidden": "[64]",
    "federated.owners": OWNERS,
    "federated.partition": "dirichlet",
    "federated.alpha": 1.0,
    "federated.local_steps": 5,
    "federated.learning_rate": 0.5,
    "federated.strategy": "fedavg",
    "federated.schedule": "constant",
}
_FAILURES = "federated.failures."
# What the hostile owners send.
ROWS: dict[str, dict[str, object]] = {
    "none": {},
    "nan": {"corruption": '"nan"'},  # bare, it would be TOML's number
    "sign-flip": {"corruption": "sign-flip"},
    "sign-flip x10": {"corruption": "scale", "corruption_scale": -10.0},
    "random x20": {"corruption": "random", "corruption_scale": 20.0},
    "count 1e12": {"corruption": "count"},
    "shape (1,)": {"corruption": "shape"},
    "keys": {"corruption": "keys"},
    "zero update": {"corruption": "zero"},
    "replay": {"corruption": "replay"},
}
MALFORMED = ("nan", "count 1e12", "shape (1,)", "keys")  # rows that nothing of the hostile ones may be admitted in
COLUMNS: dict[str, dict[str, object]] = {
    "mean": {},
    "norm-bounded": {"aggregation": "norm-bounded"},
    "median": {"aggregation": "median"},
    "trimmed-mean": {"aggregation": "trimmed-mean", "trim": 0.25},
    "krum": {"aggregation": "krum", "hostile": HOSTILE},
    "multi-krum": {"aggregation": "multi-krum", "hostile": HOSTILE},
    "bulyan": {"aggregation": "bulyan", "hostile": HOSTILE},
    "geometric-median": {"aggregation": "geometric-median"},
}
PEER, PEER_STRATEGY = "flwr FedAvg, no door", "flwr.serverapp.strategy:FedAvg"
QUICK = {"rows": ("none", "nan", "sign-flip x10", "shape (1,)"), "columns": ("mean", "norm-bounded", PEER)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one training.

    Attributes:
        accuracy: in %, after the last round that there was.
        ended: why it ended early, or None.
        finite: whether the last model is.
        admitted: replies used in a round, each round's.
    """

    accuracy: float
    ended: str | None
    finite: bool
    admitted: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: a cell with one seed."""

    row: str
    column: str
    seed: int
    rounds: int

    def recipe(self) -> Recipe:
        """As `tacit run` would take it."""
        keys = {**RECIPE, "federated.seed": self.seed, "federated.rounds": self.rounds}
        keys |= {f"federated.{key}": value for key, value in COLUMNS.get(self.column, {}).items()}
        if self.column == PEER:
            keys["federated.strategy"] = PEER_STRATEGY
        if ROWS[self.row]:
            hostile = {"corrupt_share": HOSTILE / OWNERS, **ROWS[self.row]}
            keys |= {f"{_FAILURES}{key}": value for key, value in hostile.items()}
        return load_recipe("digits", [f"{key}={value}" for key, value in keys.items()])

    def outcome(self) -> Outcome:
        """Trains."""
        with tempfile.TemporaryDirectory() as scratch:
            train = _without_door if self.column == PEER else _behind_the_door
            result = train(self.recipe(), Path(scratch))
        sys.stderr.write(f"{self.row} | {self.column} | {self.seed}: {result}\n")
        return result


def _behind_the_door(recipe: Recipe, folder: Path) -> Outcome:
    rows: list[Mapping[str, object]] = []
    ended = None
    try:
        train_in_process(recipe, folder, run="benchmark", report=rows.append)
    except Exception as error:  # noqa: BLE001  # whatever ends a run is what is measured here
        ended = f"{type(error).__name__}: {error}"
    rounds = [row for row in rows if isinstance(row.get("accuracy"), float)]
    accuracy = 100 * float(str(rounds[-1]["accuracy"])) if rounds else 0.0
    # A checkpoint refuses what is not finite, so that a run that reached its end has a finite model.
    return Outcome(
        accuracy=accuracy,
        ended=ended,
        finite=ended is None,
        admitted=tuple(int(str(row["clients"])) for row in rounds),
    )


def _without_door(recipe: Recipe, folder: Path) -> Outcome:
    """Flower's strategy in the same rounds, with all replies and no checkpoint."""
    quiet_flower()
    composition = compose(recipe, folder)
    owners = {owner.index + 2: owner for owner in composition.owners}
    contexts = {node: Context(1, node, {"partition-id": o.index}, RecordDict(), {}) for node, o in owners.items()}

    def find(context: Context) -> Owner:
        return owners[context.node_id]

    indices = {node: owner.index for node, owner in owners.items()}
    grid = InProcessGrid(make_client_app(find), contexts)
    plan = server_plan(composition, folder, run="benchmark", report=print, ledger=None, indices=indices)
    plan = replace(plan, doors=None)
    seen: list[tuple[float, bool, int]] = []

    def on_round(report: RoundReport, record: ArrayRecord) -> None:
        arrays = from_record(record)
        finite = all(bool(np.isfinite(array).all()) for array in arrays.values())
        seen.append((100 * float(plan.evaluate(report.round, arrays) or 0.0), finite, report.clients))

    ended = None
    try:
        run_rounds(
            plan.strategy,
            failing(composition, grid, indices) or grid,
            to_record(plan.initial),
            rounds=plan.rounds,
            first_round=1,
            quorum=plan.quorum,
            config={"run": plan.run},
            on_round=on_round,
            doors=plan.doors,
        )
    except Exception as error:  # noqa: BLE001  # whatever ends a run is what is measured here
        ended = f"{type(error).__name__}: {error}"
    accuracy, finite, _ = seen[-1] if seen else (0.0, True, 0)
    return Outcome(accuracy=accuracy, ended=ended, finite=finite, admitted=tuple(count for *_, count in seen))


def main() -> None:
    """Trains every cell, prints a table, fails where the requirement does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = QUICK["rows"] if options.quick else options.rows
    columns = QUICK["columns"] if options.quick else (*COLUMNS, PEER)
    seeds, rounds = (1, QUICK_ROUNDS) if options.quick else (options.seeds, ROUNDS)
    trainings = [
        Training(row=row, column=column, seed=seed, rounds=rounds)
        for row in rows
        for column in columns
        for seed in range(1, seeds + 1)
    ]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = list(pool.map(Training.outcome, trainings))
    found: dict[str, dict[str, list[Outcome]]] = {row: {column: [] for column in columns} for row in rows}
    for training, outcome in zip(trainings, outcomes, strict=True):
        found[training.row][training.column].append(outcome)
    _print(found)
    if options.json:
        packages = {name: version(name) for name in ("torch", "flwr", "numpy")}
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
        cases = {f"digits-{row}": _case(cells) for row, cells in found.items()}
        versions = {"python": sys.version, **packages}
        content = {"benchmark": "robustness", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    faults = _faults(found, least=0.0 if options.quick else LEAST)
    if faults:
        sys.exit("\n".join(faults))


def _mean(cell: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.accuracy for outcome in cell)


def _case(cells: Mapping[str, Sequence[Outcome]]) -> dict[str, object]:
    """A row as every benchmark writes a case: the norm bound against the peer, and all rules beside."""
    ours, peer = _mean(cells["norm-bounded"]), _mean(cells[PEER])
    return {
        "tacit": ours,
        "peers": {PEER: peer},
        "unit": "% of test records",
        "ratio": {PEER: ours / peer if peer else None},
        "rules": {
            column: {
                "mean": _mean(cell),
                "lowest": min(outcome.accuracy for outcome in cell),
                "ended": [outcome.ended for outcome in cell if outcome.ended],
                "finite": all(outcome.finite for outcome in cell),
                "admitted": sorted({count for outcome in cell for count in outcome.admitted}),
            }
            for column, cell in cells.items()
        },
    }


def _faults(found: Mapping[str, Mapping[str, Sequence[Outcome]]], *, least: float) -> list[str]:
    """What this benchmark requires of Tacit and did not see."""
    faults = []
    for row, cells in found.items():
        for column, cell in cells.items():
            if column == PEER:
                continue
            wanted = OWNERS - HOSTILE if row in MALFORMED else OWNERS
            for outcome in cell:
                if outcome.ended or not outcome.finite:
                    faults.append(f"{row}, {column}: expected a run to its end, got {outcome.ended}")
                if set(outcome.admitted) != {wanted}:
                    faults.append(f"{row}, {column}: expected {wanted} replies a round, got {set(outcome.admitted)}")
        lowest = min(outcome.accuracy for outcome in cells["norm-bounded"])
        if lowest < least:
            faults.append(f"{row}: expected at least {least:g} % with the norm bound, got {lowest:.1f} %")
    return faults


def _print(found: Mapping[str, Mapping[str, Sequence[Outcome]]]) -> None:
    columns = list(next(iter(found.values())))
    print(f"| hostile owners send | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")  # noqa: T201  # its purpose
    for row, cells in found.items():
        print(f"| {row} | {' | '.join(_words(cells[column]) for column in columns)} |")  # noqa: T201  # as above


def _words(cell: Sequence[Outcome]) -> str:
    if any(outcome.ended for outcome in cell):
        return "run ended"
    if not all(outcome.finite for outcome in cell):
        return "NaN"
    low, mean = min(outcome.accuracy for outcome in cell), _mean(cell)
    return f"{mean:.1f}" if len(cell) == 1 else f"{mean:.1f} ({low:.1f})"


if __name__ == "__main__":
    main()
