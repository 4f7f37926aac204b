"""Latencies beside those of the runtimes' own loops, what the loop itself costs, and whether a ratio comes out again.

Usage: python benchmarks/measurement.py [--quick] [--cases litert ...] [--json FILE].

The artifacts are those of a CNN whose inference takes more than two milliseconds. Peers: LiteRT's `litert-benchmark`
(from its wheel; it rounds to 10 us, and copies neither inputs nor outputs) and a plain loop of ONNX Runtime's `run`.
Five repetitions, ours and the peer's in turn, each in a fresh process. `repeatability` measures the int8 and the
float32 artifact five times in a row in quick mode: each time the interval of their ratio should hold what the other
four say together, each by its own precision; `pairs` is the share of all pairs in which one's interval holds the
other's estimate, which is 83 % for perfect intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (3, 96, 96)
PLAIN_LOOP = """
import os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: np.load(sys.argv[2])[:1]}
took = []
for run in range(int(sys.argv[3])):
    start = time.perf_counter()
    session.run(None, feed)
    took.append(time.perf_counter() - start)
print(1000 * float(np.median(took[len(took) // 10 :])))
"""
CASES = ("overhead", "litert", "onnxruntime", "repeatability-tflite", "repeatability-onnx")


def make_artifacts(folder: Path) -> dict[str, Path]:
    """A CNN in both formats, as float32 and static int8."""
    import torch

    from tacit.compression.export import export

    def block(inputs: int, outputs: int, stride: int) -> list[torch.nn.Module]:
        layer = torch.nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        return [layer, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]

    torch.manual_seed(0)
    torch.set_num_threads(1)
    body = [*block(3, 32, 2), *block(32, 64, 1), *block(64, 64, 2), *block(64, 128, 1)]
    pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10)]
    model = torch.nn.Sequential(*body, *pool).eval()
    found = {}
    public = np.random.default_rng(1).normal(size=(16, *SHAPE)).astype(np.float32)
    for target in ("tflite", "onnx"):
        for form in ("float32", "static_int8"):
            path = folder / f"{form}.{target}"
            export(model, (torch.zeros(1, *SHAPE),), path, form=form, target=target, calibration=(public,))
            found[f"{form}.{target}"] = path
    return found


def ours_ms(path: Path, inputs: np.ndarray) -> float:
    """The p50 of a quick measurement."""
    from tacit.devices.local import LocalDevice
    from tacit.devices.protocol import measure

    with LocalDevice() as device:
        result = measure(device, [artifact(path)], inputs)
    return float(result["artifacts"][path.name]["p50_us"]) / 1000


def artifact(path: Path) -> Any:
    """A file as the protocol takes it."""
    from tacit.devices.protocol import Artifact

    layout = "channel_last" if path.suffix == ".tflite" else "channel_first"
    return Artifact(name=path.name, path=path, input_layout=layout)


def litert_benchmark_ms(path: Path, _inputs: Path, runs: int) -> float:
    """What LiteRT's own tool says."""
    tool = Path(sys.executable).with_name("litert-benchmark")
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "result.json")
        command = [str(tool), f"--model={path}", f"--num_runs={runs}", f"--warmup_runs={runs // 10}"]
        subprocess.run([*command, f"--result_json={said}"], check=True, capture_output=True, timeout=120)
        return float(json.loads(said.read_text())["latency"]["median_ms"])


def plain_loop_ms(path: Path, inputs: Path, runs: int) -> float:
    """What a loop around `run` says."""
    command = [sys.executable, "-c", PLAIN_LOOP, str(path), str(inputs), str(runs)]
    return float(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)


def beside(
    peer: Callable[[Path, Path, int], float], path: Path, inputs: np.ndarray, repetitions: int
) -> dict[str, Any]:
    """Ours and the peer's p50 in turn."""
    staged = path.with_name("inputs.npy")
    np.save(staged, inputs)
    ours, theirs = [], []
    for repetition in range(repetitions):
        for is_ours in (True, False) if repetition % 2 == 0 else (False, True):
            if is_ours:
                ours.append(ours_ms(path, inputs))
            else:
                theirs.append(peer(path, staged, 600))
    ratios = np.array(theirs) / np.array(ours)
    name = {"litert_benchmark_ms": "litert-benchmark", "plain_loop_ms": "plain run loop"}[peer.__name__]
    found = {"tacit": float(np.median(ours)), "peers": {name: float(np.median(theirs))}, "unit": "ms, p50"}
    return {**found, "ratio": {name: float(np.median(ratios))}, "ratios": ratios.tolist(), "all": [ours, theirs]}


def overhead_us(samples: int = 200_000) -> float:
    """What the timing loop adds to a call of `infer`, the readings of the clock included."""
    from tacit.devices.agent import Model, Port, _Lane

    def infer(feeds: list[np.ndarray]) -> list[np.ndarray]:
        return feeds

    feed = [np.zeros((1, 4), dtype=np.float32)]
    lane = _Lane(Model(["channel_first"], infer, [Port("float32")], [Port("float32")]), [feed] * 7)
    lane.block_samples = samples
    lane.sample()
    started_ns = time.perf_counter_ns()
    for _ in range(samples):
        infer(feed)
    empty_ns = (time.perf_counter_ns() - started_ns) / samples
    return (float(np.median(lane.samples_ns)) - empty_ns) / 1000


def repeatability(paths: list[Path], inputs: np.ndarray, times: int) -> dict[str, Any]:
    """Measure the same two artifacts again and again."""
    from tacit.devices.local import LocalDevice
    from tacit.devices.protocol import measure

    found = []
    for _ in range(times):
        with LocalDevice() as device:
            result = measure(device, [artifact(path) for path in paths], inputs)
        found.append(result["artifacts"][paths[1].name]["relative"])
    logs = np.log([one["estimate"] for one in found])
    weights = np.log([one["high"] / one["low"] for one in found]) ** -2.0
    agree, pairs = 0, []
    for place, one in enumerate(found):
        others = np.delete(logs, place)
        together = np.exp(np.average(others, weights=np.delete(weights, place)))
        agree += bool(one["low"] <= together <= one["high"])
        pairs += [one["low"] <= other <= one["high"] for other in np.exp(others)]
    about = {"pairs": float(np.mean(pairs)), "measurements": found}
    return {"tacit": agree, "peers": {}, "unit": f"of {times} agree", "ratio": {}, **about}


def _case(name: str, paths: dict[str, Path], inputs: np.ndarray, repetitions: int) -> dict[str, Any]:
    if name == "overhead":
        return {"tacit": overhead_us(), "peers": {}, "unit": "us per inference", "ratio": {}}
    if name == "litert":
        return beside(litert_benchmark_ms, paths["float32.tflite"], inputs, repetitions)
    if name == "onnxruntime":
        return beside(plain_loop_ms, paths["float32.onnx"], inputs, repetitions)
    target = name.rpartition("-")[2]
    return repeatability([paths[f"{form}.{target}"] for form in ("float32", "static_int8")], inputs, repetitions)


def main() -> None:
    """Measures, prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    repetitions = 2 if options.quick else 5
    inputs = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype(np.float32)
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_artifacts(Path(folder))
        for name in options.cases:
            cases[name] = _case(name, paths, inputs, repetitions)
    for name, case in cases.items():
        about = [f"{100 * (ratio - 1):+.1f} %" for ratio in case.get("ratios", [])]
        about += [f"{m['estimate']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in case.get("measurements", [])]
        print(f"{name:22} {case['tacit']:8.3f} {case['unit']}", *case["peers"].items(), *about)  # noqa: T201  # its purpose
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "cores": os.cpu_count()}
        packages = ("onnxruntime", "ai-edge-litert", "numpy")
        versions = {"python": sys.version, **{name: version(name) for name in packages}}
        content = {"benchmark": "measurement", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
