"""What `simulation.py` compares with: a plain loop, Opacus for each client, Flower on Ray, and pfl; nothing of Tacit.

The processes of Flower and pfl import this file, so that all of them have the same models and records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

CLIENTS, COHORT, RECORDS, STEPS, RATE, LEARNING_RATE = 1000, 50, 50, 5, 0.2, 0.1
SHAPES = {"mlp": (64,), "cnn": (3, 32, 32), "small-cnn": (1, 8, 8)}
PFL_PYTHON = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"


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


class Mlp(nn.Sequential):
    """64-64-10."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class SmallCnn(nn.Sequential):
    """16 and 32 channels on 8x8, 10 k parameters: Tacit's family of this name."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": Mlp, "cnn": LargeCnn, "small-cnn": SmallCnn}


def clients_of(kind: str) -> int:
    """How many clients are registered."""
    return CLIENTS if kind == "mlp" else COHORT


def arrays_of(kind: str, client: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Made-up records of a client: inputs and labels."""
    generator = np.random.default_rng(client)
    inputs = generator.standard_normal((RECORDS, *SHAPES[kind])).astype(np.float32)
    return inputs, generator.integers(0, 10, RECORDS)


def _loop(
    kind: str, rounds: int, step: Callable[[nn.Module], Callable[[torch.Tensor, torch.Tensor], None]]
) -> list[float]:
    """A plain loop over clients: load, walk, add up."""
    held = [arrays_of(kind, client) for client in range(COHORT)]
    model, generator, spent = MODELS[kind]().train(), np.random.default_rng(0), []
    take = step(model)
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    for _ in range(rounds):
        began = time.perf_counter()
        total = [torch.zeros_like(p) for p in parameters]
        for inputs, labels in held:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            for _ in range(STEPS):
                chosen = np.flatnonzero(generator.random(RECORDS) < RATE)
                take(torch.from_numpy(inputs[chosen]), torch.from_numpy(labels[chosen]))
            for sums, parameter in zip(total, parameters, strict=True):
                sums += parameter.detach()
        start = [sums / COHORT for sums in total]
        spent.append(time.perf_counter() - began)
    return spent


def plain(kind: str, rounds: int) -> list[float]:
    """Torch alone, on one thread."""

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
import simulation_peers as peers
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
    model = peers.MODELS[kind]()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, labels = peers.arrays_of(kind, int(context.node_config["partition-id"]))
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=peers.LEARNING_RATE), np.random.default_rng()
    for _ in range(peers.STEPS):
        chosen = np.flatnonzero(generator.random(peers.RECORDS) < peers.RATE)
        if len(chosen):
            optimizer.zero_grad()
            batch = torch.from_numpy(inputs[chosen]), torch.from_numpy(labels[chosen])
            torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({{"num-examples": 50}})
    return Message(RecordDict({{"arrays": arrays, "metrics": metrics}}), reply_to=message)
@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_train=peers.COHORT / clients, fraction_evaluate=0.0,
                      min_train_nodes=peers.COHORT, min_available_nodes=clients)
    def seen(server_round, arrays):
        ends.append(time.perf_counter())
        return MetricRecord({{"round": server_round}})
    strategy.start(grid, ArrayRecord(peers.MODELS[kind]().state_dict()), num_rounds=rounds, evaluate_fn=seen)
run_simulation(server, client, num_supernodes=clients, backend_config={{"client_resources": {{"num_cpus": 1}}}})
print("ROUNDS", json.dumps([b - a for a, b in zip(ends, ends[1:])]))
"""


def flower(kind: str, rounds: int) -> list[float]:
    """Flower's simulation on Ray, a worker a core."""
    return _rounds_of(sys.executable, FLOWER.format(folder=_HERE, kind=kind, rounds=rounds, clients=clients_of(kind)))


# As pfl's guide has it: a PyTorchModel of a module with `loss` and `metrics`, a FederatedDataset of tensors by user, a
# SimulatedBackend in this process, no evaluation. Its threads are torch's own: more than one help large convolutions.
PFL = """
import sys, time, json, numpy as np, torch
sys.path.insert(0, {folder!r})
import simulation_peers as peers
torch.set_num_threads({threads})
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
kind, rounds, clients = {kind!r}, {rounds}, {clients}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = peers.MODELS[kind]()
    def forward(self, inputs):
        return self.inner(inputs)
    def loss(self, inputs, labels, eval=False):
        self.train(not eval)
        return torch.nn.functional.cross_entropy(self(inputs), labels)
    def metrics(self, inputs, labels, eval=False):
        return {{"loss": Weighted(self.loss(inputs, labels, eval).item(), len(inputs))}}
class Clock(TrainingProcessCallback):
    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        ends.append(time.perf_counter())
        return False, Metrics()
held, ends, module = {{}}, [], Model()
for client in range(clients):
    held[client] = [torch.from_numpy(array) for array in peers.arrays_of(kind, client)]
users = FederatedDataset.from_slices(held, get_user_sampler("random", list(held)))
model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(central_num_iterations=rounds + 1, evaluation_frequency=rounds + 2,
                                       train_cohort_size=peers.COHORT, val_cohort_size=None),
    backend=SimulatedBackend(training_data=users, val_data=users),
    model=model,
    model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=peers.LEARNING_RATE,
                                          local_batch_size=peers.RECORDS // peers.STEPS),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Clock()],
)
print("ROUNDS", json.dumps([b - a for a, b in zip(ends, ends[1:])]))
"""


def pfl(kind: str, rounds: int) -> list[float]:
    """Pfl's simulation in one process; its batches are of 10 records exactly."""
    threads = len(os.sched_getaffinity(0)) if kind == "cnn" else 1
    code = PFL.format(folder=_HERE, kind=kind, rounds=rounds, clients=clients_of(kind), threads=threads)
    return _rounds_of(str(PFL_PYTHON), code, OMP_NUM_THREADS=str(threads))


_HERE = str(Path(__file__).resolve().parent)
PEERS: dict[str, Callable[[str, int], list[float]]] = {"plain": plain, "opacus": opacus, "flower": flower, "pfl": pfl}


def missing(peer: str) -> str | None:
    """What to do about a peer that is not installed."""
    return f"pfl: not measured, no {PFL_PYTHON}; `make peers`" if peer == "pfl" and not PFL_PYTHON.exists() else None


def _rounds_of(python: str, code: str, **environment: str) -> list[float]:
    """Seconds of each round of a peer in a process of its own."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **quiet, **environment},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROUNDS ")]
    if not lines:
        raise RuntimeError(f"expected a peer to end with its rounds, got: {done.stderr[-500:]}")
    return [float(seconds) for seconds in json.loads(lines[-1].removeprefix("ROUNDS "))]
