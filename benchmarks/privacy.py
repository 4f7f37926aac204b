"""What a private step costs: one DP-SGD step of Tacit, of Opacus in two ways, and one plain SGD step without privacy.

Usage: python benchmarks/privacy.py [--cases mlp small-cnn transformer] [--records 256] [--rounds 30] [--quick]
[--json FILE].

Every step takes the same records through the same model: forward, backward, clip to C = 1, Gaussian noise of z = 1 on
every parameter, update. `plain` leaves out clip and noise. `opacus-hooks` makes every record's gradient
(GradSampleModule, DPOptimizer); `opacus-ghost` goes backward twice instead (the fast gradient clipping pair). Tacit's
noise is NumPy's, from a 256-bit key, in float64; Opacus' is torch's, from its global generator, in float32.

torch has one thread. Tacit draws the noise of a step in a second thread while the gradient is computed, so a machine of
one core would show the processor time that is printed besides. A figure is the wall time of a step in a row of five of
its kind; the four kinds take turns in one process; a ratio is the median over rounds of peer / Tacit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.nn import functional as F

from tacit.devices.interface import Interface
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import SecretGenerator
from tacit.federated.task import Data, Records, Task
from tacit.federated.train import LocalTrainer

_ROW = 5
CLASSES, CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 10, 1.0, 1.0, 0.01
Step = Callable[[], None]


def main() -> None:
    """Times every case, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus hooks layers fed by data
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    cases = {name: _measure(name, options.records, 5 if options.quick else options.rounds) for name in options.cases}
    _print(cases)
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "threads": torch.get_num_threads()}
        versions = {"python": sys.version, **{name: version(name) for name in ("torch", "opacus", "numpy")}}
        content = {"benchmark": "privacy", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


class Block(nn.Module):
    """A transformer's layer of plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and feed-forward layer, (records, positions, width)."""
        normed = self.before_attention(x)
        heads = (p(normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_feedforward(x))))


class Transformer(nn.Module):
    """An encoder of two layers over 64 tokens of 1,000, of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(1000, 128), nn.Embedding(64, 128)
        self.blocks = nn.Sequential(Block(128, 4), Block(128, 4))
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of tokens, (records, positions)."""
        positions = torch.arange(x.shape[1]).repeat(len(x), 1)
        return self.out(self.norm(self.blocks(self.token(x.long()) + self.position(positions))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def _small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, CLASSES)),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (784,)),
    "small-cnn": (_small_cnn, (1, 28, 28)),
    "transformer": (Transformer, (64,)),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]()


def _batch(name: str, records: int) -> Records:
    generator, shape = np.random.default_rng(2), (records, *MODELS[name][1])
    inputs = generator.integers(1000, size=shape) if name == "transformer" else generator.random(shape)
    return Records(inputs.astype(np.float32), generator.integers(CLASSES, size=records))


def _tacit(name: str, batch: Records) -> Step:
    def load() -> Data:
        return Data(private=batch, public=None, test=None, status="public-benchmark")

    model, labels = _model(name), tuple(map(str, range(CLASSES)))
    interface = Interface(shape=MODELS[name][1], labels=labels)
    task = Task(name=name, title=name, interface=interface, load=load, build=lambda _: model)
    mechanism = Mechanism(
        unit="record",
        sample_rate=0.5,
        max_grad_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        steps_per_round=1,
        rounds=1,
        reference_size=2 * len(batch),
        delta=1e-5,
    )
    trainer, secret = LocalTrainer(task, model, mechanism, learning_rate=LEARNING_RATE), SecretGenerator()
    return lambda: trainer.step(batch, secret)


def _plain(name: str, batch: Records) -> Step:
    model, criterion = _model(name), nn.CrossEntropyLoss()
    return _loop(model, criterion, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), batch)


def _opacus_hooks(name: str, batch: Records) -> Step:
    model = GradSampleModule(_model(name), loss_reduction="mean")
    return _loop(model, nn.CrossEntropyLoss(), _private(DPOptimizer, model, len(batch)), batch)


def _opacus_ghost(name: str, batch: Records) -> Step:
    model = GradSampleModuleFastGradientClipping(
        _model(name), max_grad_norm=CLIP_NORM, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = _private(DPOptimizerFastGradientClipping, model, len(batch))
    return _loop(model, DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss()), optimizer, batch)


def _private(kind: type[DPOptimizer], model: nn.Module, records: int) -> DPOptimizer:
    return kind(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=records,
        loss_reduction="mean",
    )


def _loop(model: nn.Module, criterion: Callable[..., torch.Tensor], optimizer: DPOptimizer, batch: Records) -> Step:
    inputs, labels = torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()

    return step


PEERS = {"plain": _plain, "opacus-hooks": _opacus_hooks, "opacus-ghost": _opacus_ghost}


def _measure(name: str, records: int, rounds: int) -> dict[str, object]:
    batch = _batch(name, records)
    steps = {"tacit": _tacit(name, batch), **{peer: build(name, batch) for peer, build in PEERS.items()}}
    times: dict[str, list[float]] = {which: [] for which in steps}
    busy: dict[str, list[float]] = {which: [] for which in steps}
    for turn in range(rounds + 2):  # the first two warm caches up
        for which, step in steps.items():
            step()  # fills the row: what a step draws ahead for the next one
            started, processor = time.perf_counter(), time.process_time()
            for _ in range(_ROW):
                step()
            if turn >= 2:
                times[which].append(1e3 * (time.perf_counter() - started) / _ROW)
                busy[which].append(1e3 * (time.process_time() - processor) / _ROW)
            time.sleep(0.02)  # what was drawn ahead must not be drawn on the next kind's time
    ratios = {peer: [p / t for p, t in zip(times[peer], times["tacit"], strict=True)] for peer in PEERS}
    return {
        "tacit": statistics.median(times["tacit"]),
        "peers": {peer: statistics.median(times[peer]) for peer in PEERS},
        "unit": "ms",
        "processor_ms": {which: statistics.median(values) for which, values in busy.items()},
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "ratio_quartiles": {peer: statistics.quantiles(values, n=4)[::2] for peer, values in ratios.items()},
        "fastest": {which: min(values) for which, values in times.items()},
        "records": records,
    }


def _print(cases: dict[str, dict[str, object]]) -> None:
    lines = ["| case | step | median ms | fastest ms | processor ms | over Tacit's | half of the rounds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, case in cases.items():
        for which, fastest in case["fastest"].items():
            ours = which == "tacit"
            median = case["tacit"] if ours else case["peers"][which]
            low, high = (1.0, 1.0) if ours else case["ratio_quartiles"][which]
            ratio, busy = 1.0 if ours else case["ratio"][which], case["processor_ms"][which]
            figures = f"{median:.3g} | {fastest:.3g} | {busy:.3g} | {ratio:.2f} | {low:.2f} to {high:.2f}"
            lines.append(f"| {name} | {which} | {figures} |")
    print("\n".join(lines))  # noqa: T201  # its purpose


if __name__ == "__main__":
    main()
