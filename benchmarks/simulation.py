"""Seconds per round of a simulation: Tacit's engines, a plain loop, Opacus for each client, and Flower on Ray.

Usage: python benchmarks/simulation.py [--cases mlp cnn mlp-dp small-cnn-dp] [--peers plain opacus flower]
[--rounds 30] [--quick] [--json FILE].

50 clients a round of 50 records each; an epoch of local SGD in 5 steps whose batches hold 10 records on average (each
record joins with probability 1/5: Poisson batches, on all sides). `mlp` is 64-64-10 with 1,000 clients, `cnn` has 362 k
parameters on 32x32x3, `small-cnn` is 16 and 32 channels on 8x8. The private cases clip each record to C = 1 and add
noise of z = 1 to every step.

A round of Tacit is a round of `tacit run`: Flower messages in, front door, averaging, checkpoints a second apart,
ledgers on disk before records are read. `plain` and `opacus` are bare loops over clients in one process, without any
of that.
`flower` runs the same client under `flwr.simulation` (Ray), with Flower's FedAvg. torch has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tacit.devices.interface import Interface
from tacit.federated.models import build_family
from tacit.federated.task import Data, Records, Task

CLIENTS, COHORT, RECORDS, STEPS, RATE, LEARNING_RATE = 1000, 50, 50, 5, 0.2, 0.1
SHAPES = {"mlp": (64,), "cnn": (3, 32, 32), "small-cnn": (1, 8, 8)}


class LargeCnn(nn.Sequential):
    """Two convolutions and two linear layers, 362 k parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, 330),
            nn.ReLU(),
            nn.Linear(330, 10),
        )


def model_of(kind: str) -> nn.Module:
    """The model of a case."""
    if kind == "mlp":
        return build_family({"family": "mlp", "hidden": [64]}, shape=(64,), outputs=10)
    return LargeCnn() if kind == "cnn" else build_family({"family": "cnn"}, shape=(1, 8, 8), outputs=10)


def records_of(kind: str, client: int) -> Records:
    """Made-up records of a client."""
    generator = np.random.default_rng(client)
    inputs = generator.standard_normal((RECORDS, *SHAPES[kind])).astype(np.float32)
    return Records(inputs, generator.integers(0, 10, RECORDS))


def _task(kind: str) -> Task:
    held = {client: records_of(kind, client) for client in range(CLIENTS if kind == "mlp" else COHORT)}
    return Task(
        name=kind,
        title=kind,
        interface=Interface(shape=SHAPES[kind], labels=tuple("0123456789")),
        load=lambda: Data(private=None, public=None, test=None, status="public-benchmark", of_owner=held.__getitem__),
        build=lambda parameters: model_of(kind),
    )


TASKS = {f"{kind.replace('-', '_')}_task": partial(_task, kind) for kind in SHAPES}
globals().update(TASKS)  # a recipe names them: "simulation:mlp_task"


def tacit(kind: str, rounds: int, *, private: bool, engine: str) -> list[float]:
    """Seconds of each round of a run."""
    from tacit.edge.flower_app import train_in_process
    from tacit.edge.recipe import load_recipe

    clients = CLIENTS if kind == "mlp" else COHORT
    settings = [
        f"task.name=simulation:{kind.replace('-', '_')}_task",
        "federated.partition=natural",
        f"federated.owners={clients}",
        f"federated.rounds={rounds}",
        f"federated.local_steps={STEPS}",
        f"federated.batch_rate={RATE}",
        f"federated.learning_rate={LEARNING_RATE}",
        "federated.strategy=fedavg",
        "federated.schedule=constant",
        f"federated.engine={engine}",
        "federated.checkpoint_s=1.0",
        "compression.variants=[]",
        f"privacy.sample_rate={RATE}",
        *([f"federated.cohort={COHORT}"] if clients > COHORT else []),
        *(["privacy.noise_multiplier=1.0", "privacy.reference_size=50"] if private else ["privacy.unit=none"]),
    ]
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("digits", settings)
        train_in_process(recipe, Path(folder), run="r", report=lambda row: ends.append(time.perf_counter()))
    return [later - earlier for earlier, later in pairwise(ends)]


def _loop(
    kind: str, rounds: int, step: Callable[[nn.Module], Callable[[torch.Tensor, torch.Tensor], None]]
) -> list[float]:
    """A plain loop over clients: load, walk, add up."""
    held = [records_of(kind, client) for client in range(COHORT)]
    model, generator, spent = model_of(kind).train(), np.random.default_rng(0), []
    take = step(model)
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    for _ in range(rounds):
        began = time.perf_counter()
        total = [torch.zeros_like(p) for p in parameters]
        for records in held:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            for _ in range(STEPS):
                chosen = np.flatnonzero(generator.random(RECORDS) < RATE)
                take(torch.from_numpy(records.inputs[chosen]), torch.from_numpy(records.labels[chosen]))
            for sums, parameter in zip(total, parameters, strict=True):
                sums += parameter.detach()
        start = [sums / COHORT for sums in total]
        spent.append(time.perf_counter() - began)
    return spent


def plain(kind: str, rounds: int) -> list[float]:
    """SGD without privacy."""

    def step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

        def take(inputs: torch.Tensor, labels: torch.Tensor) -> None:
            if len(inputs):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

        return take

    return _loop(kind, rounds, step)


def opacus(kind: str, rounds: int) -> list[float]:
    """Opacus' hooks and optimizer, made once and used for every client."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    def step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], None]:
        hooked = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=int(RATE * RECORDS),
        )

        def take(inputs: torch.Tensor, labels: torch.Tensor) -> None:
            if len(inputs):
                optimizer.zero_grad()
                F.cross_entropy(hooked(inputs), labels).backward()
                optimizer.step()

        return take

    return _loop(kind, rounds, step)


FLOWER = """
import sys, time, json, numpy as np, torch
sys.path.insert(0, {folder!r})
import simulation
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
kind, rounds, clients = {kind!r}, {rounds}, {clients}
client, server, ends = ClientApp(), ServerApp(), []
@client.train()
def train(message, context):
    torch.set_num_threads(1)
    model = simulation.model_of(kind)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    records = simulation.records_of(kind, int(context.node_config["partition-id"]))
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), np.random.default_rng()
    for _ in range(simulation.STEPS):
        chosen = np.flatnonzero(generator.random(simulation.RECORDS) < simulation.RATE)
        if len(chosen):
            optimizer.zero_grad()
            inputs, labels = torch.from_numpy(records.inputs[chosen]), torch.from_numpy(records.labels[chosen])
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({{"num-examples": 50}})
    return Message(RecordDict({{"arrays": arrays, "metrics": metrics}}), reply_to=message)
@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_train=simulation.COHORT / clients, fraction_evaluate=0.0,
                      min_train_nodes=simulation.COHORT, min_available_nodes=clients)
    def seen(server_round, arrays):
        ends.append(time.perf_counter())
        return MetricRecord({{"round": server_round}})
    strategy.start(grid, ArrayRecord(simulation.model_of(kind).state_dict()), num_rounds=rounds, evaluate_fn=seen)
run_simulation(server, client, num_supernodes=clients, backend_config={{"client_resources": {{"num_cpus": 1}}}})
print("ROUNDS", json.dumps([b - a for a, b in zip(ends, ends[1:])]))
"""


def flower(kind: str, rounds: int) -> list[float]:
    """Flower's simulation, in a process of its own."""
    code = FLOWER.format(
        folder=str(Path(__file__).parent), kind=kind, rounds=rounds, clients=CLIENTS if kind == "mlp" else COHORT
    )
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROUNDS ")]
    if not lines:
        raise RuntimeError(f"expected Flower to end with its rounds, got: {done.stderr[-500:]}")
    return [float(seconds) for seconds in json.loads(lines[-1].removeprefix("ROUNDS "))]


PEERS: dict[str, Callable[[str, int], list[float]]] = {"plain": plain, "opacus": opacus, "flower": flower}
# Case: model, private, peers that do the same work.
CASES = {
    "mlp": ("mlp", False, ("plain", "flower")),
    "cnn": ("cnn", False, ("plain", "flower")),
    "mlp-dp": ("mlp", True, ("opacus",)),
    "small-cnn-dp": ("small-cnn", True, ("opacus",)),
}


def main() -> None:
    """Times every case, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--engines", nargs="+", default=["sequential", "vectorised"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="six rounds, without Flower")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rounds = 6 if options.quick else options.rounds
    peers = [peer for peer in options.peers if not (options.quick and peer == "flower")]
    cases = {name: _measure(name, rounds, peers, options.engines) for name in options.cases}
    _print(cases)
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "cores": os.cpu_count()}
        versions = {"python": sys.version, **{name: version(name) for name in ("torch", "flwr", "opacus", "numpy")}}
        content = {"benchmark": "simulation", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _measure(name: str, rounds: int, peers: list[str], engines: list[str]) -> dict[str, object]:
    """The peers and Tacit's engines on the same work, one after another, twice."""
    kind, private, fitting = CASES[name]
    spent: dict[str, list[float]] = {}
    for _ in range(2):
        for engine in engines:
            spent.setdefault(engine, []).extend(tacit(kind, rounds, private=private, engine=engine)[1:])
        for peer in fitting:
            if peer in peers:
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


def _print(cases: dict[str, dict[str, object]]) -> None:
    lines = ["| case | who | median ms a round | fastest | times Tacit's |", "|---|---|---|---|---|"]
    for name, case in cases.items():
        for which, fastest in case["fastest"].items():
            median = case["engines"].get(which) or case["peers"][which]
            lines.append(f"| {name} | {which} | {median:.4g} | {fastest:.4g} | {median / case['tacit']:.2f} |")
    print("\n".join(lines))  # noqa: T201  # its purpose


if __name__ == "__main__":
    main()
