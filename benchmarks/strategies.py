"""FedAvg, FedProx, SCAFFOLD and FedAdam on even and skewed shares of the data, without privacy.

Usage: python benchmarks/strategies.py [--tasks digits writers] [--partitions iid ...] [--seeds 5] [--processes 1]
[--search] [--quick] [--json FILE].

Records are dealt out evenly (`iid`) or with Dirichlet label skew (0.5, 0.1); every owner takes part in every round. A
figure is the accuracy on the test split, the mean of the last five rounds, over the seeds 1, 2, ...; a seed decides the
partition, the first weights and the batches. The peer, on digits, is Flower's own FedAvg object in the same rounds: its
models are ours but for rounding. Flower's FedProx leaves the proximal term to the client, it has no SCAFFOLD, and its
FedAdam corrects a bias that ours does not have.

Each strategy has the settings that were best of eight trials at Dirichlet 0.1 on a seed that is none of the five;
--search makes these trials again. --quick: one task, one seed, a third of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import load_recipe

SEARCH_SEED = 100
PARTITIONS = {
    "iid": ["federated.partition=iid"],
    "dirichlet-0.5": ["federated.partition=dirichlet", "federated.alpha=0.5"],
    "dirichlet-0.1": ["federated.partition=dirichlet", "federated.alpha=0.1"],
}
TASKS = {
    "digits": ["federated.owners=10", "federated.local_steps=8", "model.channels=[8, 16]"],
    "writers": ["federated.owners=20", "federated.local_steps=5"],
}
ROUNDS, QUICK_ROUNDS, LAST = 30, 10, 5
COMMON = ["privacy.unit=none", "privacy.sample_rate=0.3", "federated.schedule=constant", "compression.variants=[]"]
PEER = "flwr.serverapp.strategy:FedAvg"
PEER_TASK = "digits"
STRATEGIES = ("fedavg", "fedprox", "scaffold", "fedadam")

# Eight trials for each.
_FINE = {"learning_rate": (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)}
_COARSE = {"learning_rate": (0.025, 0.05, 0.1, 0.2)}
SEARCHED: dict[str, dict[str, Sequence[float]]] = {
    "fedavg": _FINE,
    "fedprox": {**_COARSE, "proximal": (0.01, 0.1)},
    "scaffold": _FINE,
    "fedadam": {**_COARSE, "server_learning_rate": (0.01, 0.03)},
}
# What the trials ended with.
CHOSEN: dict[tuple[str, str], dict[str, float]] = {
    ("digits", "fedavg"): {"learning_rate": 0.12},
    ("digits", "fedprox"): {"learning_rate": 0.2, "proximal": 0.1},
    ("digits", "scaffold"): {"learning_rate": 0.05},
    ("digits", "fedadam"): {"learning_rate": 0.05, "server_learning_rate": 0.03},
    ("writers", "fedavg"): {"learning_rate": 0.05},
    ("writers", "fedprox"): {"learning_rate": 0.05, "proximal": 0.01},
    ("writers", "scaffold"): {"learning_rate": 0.02},
    ("writers", "fedadam"): {"learning_rate": 0.025, "server_learning_rate": 0.03},
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: its accuracy is the mean of the last rounds, in %."""

    task: str
    partition: str
    strategy: str
    seed: int
    rounds: int
    settings: Mapping[str, float]

    def accuracy(self) -> float:
        """Trains."""
        keys = {"strategy": self.strategy, "seed": self.seed, "rounds": self.rounds, **self.settings}
        overrides = [*COMMON, *TASKS[self.task], *PARTITIONS[self.partition]]
        recipe = load_recipe(self.task, [*overrides, *(f"federated.{key}={value}" for key, value in keys.items())])
        reached: list[float] = []

        def report(row: Mapping[str, object]) -> None:
            if isinstance(row.get("accuracy"), float):
                reached.append(100 * float(str(row["accuracy"])))

        with tempfile.TemporaryDirectory() as scratch:
            train_in_process(recipe, Path(scratch), run="benchmark", report=report)
        mean = statistics.fmean(reached[-LAST:])
        about = f"{self.task} {self.partition} {self.strategy} seed {self.seed} {dict(self.settings)}"
        sys.stderr.write(f"{about}: {mean:.1f} %\n")
        return mean


def main() -> None:
    """Trains every case, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--partitions", nargs="+", default=list(PARTITIONS), choices=list(PARTITIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="make the trials that the settings come from")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.search:
        _search(options.tasks, options.processes)
        return
    tasks, seeds = (options.tasks[:1], 1) if options.quick else (options.tasks, options.seeds)
    cases = list(itertools.product(tasks, options.partitions))
    found = _measured(cases, seeds, QUICK_ROUNDS if options.quick else ROUNDS, options.processes)
    _print(found)
    if options.json:
        packages = {name: version(name) for name in ("torch", "flwr", "numpy")}
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
        versions = {"python": sys.version, **packages}
        named = {f"{task}-{partition}": _case(task, cells) for (task, partition), cells in found.items()}
        content = {"benchmark": "strategies", "machine": machine, "versions": versions, "cases": named}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _measured(
    cases: Sequence[tuple[str, str]], seeds: int, rounds: int, processes: int
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Accuracies by task and partition, then by strategy, the peer among them; one for each seed."""
    trainings = [
        Training(
            task=task,
            partition=partition,
            strategy=strategy,
            seed=seed,
            rounds=rounds,
            settings=CHOSEN[task, "fedavg" if strategy == PEER else strategy],
        )
        for task, partition in cases
        for strategy in _columns(task)
        for seed in range(1, seeds + 1)
    ]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for training, reached in zip(trainings, _all(trainings, processes), strict=True):
        cells = found.setdefault((training.task, training.partition), {})
        cells.setdefault(training.strategy, []).append(reached)
    return found


def _columns(task: str) -> tuple[str, ...]:
    return (*STRATEGIES, PEER) if task == PEER_TASK else STRATEGIES


def _case(task: str, cells: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """As every benchmark writes a case: FedAvg against Flower's, and all strategies beside."""
    ours = statistics.fmean(cells["fedavg"])
    peers = {PEER: statistics.fmean(cells[PEER])} if PEER in cells else {}
    every = {
        name: {**_spread(reached), "settings": dict(CHOSEN.get((task, name), {}))} for name, reached in cells.items()
    }
    return {
        "tacit": ours,
        "peers": peers,
        "unit": "% of test records",
        "ratio": {name: ours / peer for name, peer in peers.items()},
        "strategies": every,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "lowest": min(values), "highest": max(values)}


def _print(found: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> None:
    columns = (*STRATEGIES, PEER)
    print(f"| task | owners' shares | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")  # noqa: T201  # its purpose
    for (task, partition), cells in found.items():
        spreads = [_spread(cells[column]) if column in cells else None for column in columns]
        words = [f"{spread['mean']:.1f} ± {spread['deviation']:.1f}" if spread else "" for spread in spreads]
        print(f"| {task} | {partition} | {' | '.join(words)} |")  # noqa: T201  # as above


def _search(tasks: Sequence[str], processes: int) -> None:
    """Prints, of every strategy, the trials from best to worst."""
    trials = [
        Training(task=task, partition="dirichlet-0.1", strategy=s, seed=SEARCH_SEED, rounds=ROUNDS, settings=settings)
        for task in tasks
        for s in STRATEGIES
        for settings in _grid(SEARCHED[s])
    ]
    reached = _all(trials, processes)
    for task, strategy in itertools.product(tasks, STRATEGIES):
        own = [
            pair for pair in zip(reached, trials, strict=True) if (pair[1].task, pair[1].strategy) == (task, strategy)
        ]
        best_first = sorted(own, key=lambda pair: -pair[0])
        print(task, strategy, *(f"\n  {r:.1f} % {dict(t.settings)}" for r, t in best_first))  # noqa: T201  # its purpose


def _grid(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _all(trainings: Iterable[Training], processes: int) -> list[float]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(Training.accuracy, trainings))


if __name__ == "__main__":
    main()
