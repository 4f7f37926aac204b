"""Seconds per round of a simulation: Tacit's engines, a plain loop, Opacus for each client, Flower on Ray, and pfl.

Usage: python benchmarks/simulation.py [--cases mlp cnn mlp-dp small-cnn-dp first-round clients-100k clients-1m]
[--peers plain opacus flower pfl] [--engines ...] [--rounds 30] [--repeats 3] [--quick] [--json FILE]. pfl needs
`make peers`.

50 clients a round of 50 records each; an epoch of local SGD in 5 steps whose batches hold 10 records on average (each
record joins with probability 1/5: Poisson batches, but in pfl, which has no others than of 10). `mlp` is 64-64-10 with
1,000 clients, `cnn` has 362 k parameters on 32x32x3, `small-cnn` is 16 and 32 channels on 8x8. The private cases clip
each record to C = 1 and add noise of z = 1 to every step.

A round of Tacit is a round of `tacit run`: Flower messages in, front door, averaging, checkpoints a second apart,
ledgers on disk before records are read. `flwr-fedavg` is the vectorised engine with Flower's own FedAvg object as the
strategy. `plain` and `opacus` are bare loops over clients in one process and on one thread, without any of that.
`flower` runs the same client under `flwr.simulation` (Ray, a worker a core), with Flower's FedAvg; `pfl` its
FederatedAveraging in one process, with torch on all cores for `cnn`. All take turns, `--repeats` times.

`first-round` is the time from torch being imported to the report of the first round of `mlp`, in a fresh process.
`clients-100k` and `clients-1m` have so many clients registered and ask 100 of them: a round without the steps
themselves, and the memory that the process ever held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import simulation_peers as peers
import torch
from simulation_peers import COHORT, LEARNING_RATE, PEERS, RATE, SHAPES, STEPS, arrays_of, clients_of, missing

_FOLDER = str(Path(__file__).resolve().parent)
_SETS_OF_RECORDS = 1000  # what more clients than these hold, they hold together


def _task(kind: str, clients: int) -> object:
    from tacit.devices.interface import Interface
    from tacit.federated.task import Data, Records, Task

    held = [Records(*arrays_of(kind, client)) for client in range(min(clients, _SETS_OF_RECORDS))]
    return Task(
        name=kind,
        title=kind,
        interface=Interface(shape=SHAPES[kind], labels=tuple("0123456789")),
        load=lambda: Data(
            private=None,
            public=None,
            test=None,
            status="public-benchmark",
            of_owner=lambda client: held[client % len(held)],
        ),
        build=lambda parameters: peers.MODELS[kind](),
    )


POPULATIONS = {"clients-100k": 100_000, "clients-1m": 1_000_000}
# A recipe names them: "simulation:mlp_task".
TASKS = {f"{kind.replace('-', '_')}_task": partial(_task, kind, clients_of(kind)) for kind in SHAPES}
TASKS["many_task"] = partial(_task, "mlp", _SETS_OF_RECORDS)
globals().update(TASKS)


def flower_fedavg() -> object:
    """Flower's own FedAvg, which asks as many clients as the others."""
    from flwr.serverapp.strategy import FedAvg

    return FedAvg(
        fraction_train=COHORT / clients_of("mlp"), fraction_evaluate=0.0, min_train_nodes=COHORT, min_available_nodes=1
    )


def tacit(
    kind: str,
    rounds: int,
    *,
    engine: str,
    private: bool = False,
    task: str | None = None,
    clients: int | None = None,
    cohort: int = COHORT,
) -> list[float]:
    """When each round of a run was reported, in seconds of `time.perf_counter`."""
    from tacit.edge.flower_app import train_in_process
    from tacit.edge.recipe import load_recipe

    clients, own = clients or clients_of(kind), engine == "flwr-fedavg"
    settings = [
        f"task.name=simulation:{task or kind.replace('-', '_') + '_task'}",
        "federated.partition=natural",
        f"federated.owners={clients}",
        f"federated.rounds={rounds}",
        f"federated.local_steps={STEPS}",
        f"federated.batch_rate={RATE}",
        f"federated.learning_rate={LEARNING_RATE}",
        f"federated.strategy={'simulation:flower_fedavg' if own else 'fedavg'}",
        "federated.schedule=constant",
        f"federated.engine={'vectorised' if own else engine}",
        "federated.checkpoint_s=1.0",
        "compression.variants=[]",
        f"privacy.sample_rate={RATE}",
        *([f"federated.cohort={cohort}"] if clients > cohort and not own else []),
        *(["federated.quorum=1"] if own else []),
        *(["privacy.noise_multiplier=1.0", "privacy.reference_size=50"] if private else ["privacy.unit=none"]),
    ]
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("digits", settings)
        train_in_process(
            recipe,
            Path(folder),
            run="r",
            report=lambda row: ends.append(time.perf_counter()) if "round" in row else None,
        )
    return ends


def _note(row: Mapping[str, object], ends: list[float]) -> None:
    if "round" in row:
        ends.append(time.perf_counter())


# Case: model, private, engines, peers that do the same work.
CASES = {
    "mlp": ("mlp", False, ("vectorised", "flwr-fedavg"), ("plain", "flower", "pfl")),
    "cnn": ("cnn", False, ("workers", "sequential"), ("plain", "flower", "pfl")),
    "mlp-dp": ("mlp", True, ("vectorised", "sequential"), ("opacus",)),
    "small-cnn-dp": ("small-cnn", True, ("vectorised", "workers", "sequential"), ("opacus",)),
}
OTHERS = ("first-round", *POPULATIONS)


def main() -> None:
    """Times every case, prints a table."""
    options = _options()
    if options.inside:
        print("FOUND", json.dumps(_inside(options.inside)))  # noqa: T201  # to the process that asked
        return
    rounds, repeats = (6, 1) if options.quick else (options.rounds, options.repeats)
    wanted = [peer for peer in options.peers if not (options.quick and peer == "flower")]
    for line in filter(None, map(missing, wanted)):
        print(line, file=sys.stderr)  # noqa: T201  # says what is left out
    present = [peer for peer in wanted if missing(peer) is None]
    cases: dict[str, dict[str, object]] = {}
    for name in options.cases:
        if name in OTHERS:
            cases[name] = _alone(name, 1 if options.quick else repeats)
        else:
            cases[name] = _measure(name, rounds, repeats, present, options.engines or CASES[name][2])
    _print(cases)
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "cores": os.cpu_count()}
        versions = {"python": sys.version, **{name: version(name) for name in ("torch", "flwr", "opacus", "numpy")}}
        content = {"benchmark": "simulation", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[*CASES, *OTHERS], choices=[*CASES, *OTHERS])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--engines", nargs="+", help="instead of those of each case")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="six rounds, without Flower and a million clients")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", choices=OTHERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, _FOLDER)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.quick:
        options.cases = [name for name in options.cases if name != "clients-1m"]
    return options


def _measure(
    name: str, rounds: int, repeats: int, present: list[str], engines: tuple[str, ...] | list[str]
) -> dict[str, object]:
    """The peers and Tacit's engines on the same work, in turns."""
    kind, private, _, fitting = CASES[name]
    long = rounds if kind != "cnn" else max(4, rounds // 3)
    spent: dict[str, list[float]] = {}
    for _ in range(repeats):
        for engine in engines:
            ends = tacit(kind, long, private=private, engine=engine)
            spent.setdefault(engine, []).extend(later - earlier for earlier, later in pairwise(ends))
        for peer in fitting:
            if peer in present:
                spent.setdefault(peer, []).extend(PEERS[peer](kind, max(4, rounds // 3))[1:])
    medians = {which: 1e3 * statistics.median(seconds) for which, seconds in spent.items()}
    ours = min(medians[engine] for engine in engines)
    return {
        "tacit": ours,
        "engines": {engine: medians[engine] for engine in engines},
        "peers": {peer: medians[peer] for peer in spent if peer in PEERS},
        "unit": "ms a round",
        "ratio": {peer: medians[peer] / ours for peer in spent if peer in PEERS},
        "fastest": {which: 1e3 * min(seconds) for which, seconds in spent.items()},
    }


def _alone(name: str, repeats: int) -> dict[str, object]:
    """A case without peers, each time in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--inside", name]
    found: list[dict[str, float]] = []
    for _ in range(repeats if name == "first-round" else 1):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        if not lines:
            raise RuntimeError(f"expected {name} to end with figures, got: {done.stderr[-500:]}")
        found.append(json.loads(lines[-1].removeprefix("FOUND ")))
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    unit = "ms" if name == "first-round" else "ms a round beyond the steps"
    least = {"tacit": min(one["ms"] for one in found)}
    return {"tacit": middle.pop("ms"), "peers": {}, "unit": unit, "ratio": {}, "fastest": least, **middle}


def _inside(name: str) -> dict[str, float]:
    began = time.perf_counter()  # torch is imported by now, Tacit is not
    if name == "first-round":
        return {"ms": 1e3 * (tacit("mlp", 1, engine="vectorised")[0] - began)}
    from tacit.federated.cohort import CohortSteps

    steps_s, take = [], CohortSteps.__call__

    def timed(self: CohortSteps, walks: object) -> torch.Tensor:
        started = time.perf_counter()
        try:
            return take(self, walks)
        finally:
            steps_s.append(time.perf_counter() - started)

    CohortSteps.__call__ = timed
    began = time.perf_counter()
    ends = tacit("mlp", 30, engine="vectorised", task="many_task", clients=POPULATIONS[name], cohort=100)
    rounds = [later - earlier for earlier, later in pairwise(ends)]
    beyond = [whole - steps for whole, steps in zip(rounds, steps_s[1:], strict=True)]
    return {
        "ms": 1e3 * statistics.median(beyond),
        "round_ms": 1e3 * statistics.median(rounds),
        "first_round_s": ends[0] - began,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _print(cases: dict[str, dict[str, object]]) -> None:
    measured = {name: case for name, case in cases.items() if "engines" in case}
    lines = ["| case | who | median ms a round | fastest | times Tacit's |", "|---|---|---|---|---|"]
    for name, case in measured.items():
        for which, fastest in case["fastest"].items():
            median = case["engines"].get(which) or case["peers"][which]
            lines.append(f"| {name} | {which} | {median:.4g} | {fastest:.4g} | {median / case['tacit']:.2f} |")
    for name, case in cases.items():
        if name not in measured:
            rest = {key: value for key, value in case.items() if isinstance(value, float) and key != "tacit"}
            more = "".join(f", {key} {value:.4g}" for key, value in rest.items())
            lines.append(f"{name}: {case['tacit']:.4g} {case['unit']}{more}")
    print("\n".join(lines if measured else lines[2:]))  # noqa: T201  # its purpose


if __name__ == "__main__":
    main()
