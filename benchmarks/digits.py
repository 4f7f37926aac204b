"""The main job, several times: accuracy, the gap to the twin, bytes, agreement and wall time.

Usage: python benchmarks/digits.py [--runs 5] [--quick] [--json FILE]. There is no peer: nobody else does the whole job.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Runs `tacit run` in fresh processes and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [_run_once() for _ in range(1 if options.quick else options.runs)]
    cases = {name: _spread([r[name] for r in results]) for name in results[0]}
    print(f"| figure, {len(results)} runs | mean | lowest | highest |\n|---|---|---|---|")  # noqa: T201  # its purpose
    for name, case in cases.items():
        print(f"| {name} | {case['tacit']:.4g} | {case['lowest']:.4g} | {case['highest']:.4g} |")  # noqa: T201  # as above
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
        content = {"benchmark": "digits", "machine": machine, "versions": {"python": sys.version}, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _run_once() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).with_name("tacit")), "run", "--out", f"{scratch}/run", "--format", "json"]
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        wall_s = time.monotonic() - started
    summary = json.loads(done.stdout)["data"]
    variants, accuracy = summary["variants"], summary["accuracy"]
    baseline = {v["format"]: v["bytes"] for v in variants if v["label"] == "float32"}
    return {
        "accuracy (%)": 100 * accuracy,
        "gap to the twin (points)": 100 * (summary["accuracy_without_privacy"] - accuracy),
        "ε": summary["privacy"]["epsilon"],
        "smallest variant, of its float32 baseline (%)": min(
            100 * v["bytes"] / baseline[v["format"]] for v in variants
        ),
        "largest loss of a variant (points)": max(100 * (accuracy - v["accuracy"]) for v in variants),
        "lowest agreement with its PyTorch model (%)": min(100 * v["parity"]["top1_agreement"] for v in variants),
        "wall (s)": wall_s,
    }


def _spread(values: list[float]) -> dict[str, object]:
    return {"tacit": statistics.fmean(values), "lowest": min(values), "highest": max(values), "peers": {}, "unit": ""}


if __name__ == "__main__":
    main()
