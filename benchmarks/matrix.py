"""Which model family goes to which target in which form: exported, run in the target's runtime, compared with PyTorch.

Usage: python benchmarks/matrix.py [--quick] [--family NAME ...] [--target NAME ...] [--json FILE].

Each family is small and its weights are shaken, so that no normalisation hides a mistake. "yes" means that it passed
the threshold of its label on 24 inputs. What does not is refused by name when it is made ("no"), or when it has been
compared ("departs"; a run keeps no such file). "WRONG" is what ends without a reason, which must not be. --quick tries
float32 and static int8 only. Each family and target runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tacit.compression.departure import Departure
from tacit.compression.export import export
from tacit.compression.forms import FORMS, FormRefused
from tacit.compression.parity import Parity
from tacit.compression.targets import TARGETS
from tacit.devices.sandbox import ArtifactRefused
from tacit.federated.models import FAMILIES, build_family

IMAGE, SEQUENCE = (2, 12, 11), (3, 9)
SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp": ((7,), {"hidden": [9, 5]}),
    "autoencoder": ((7,), {"hidden": [9, 3]}),
    "cnn": (IMAGE, {"channels": [4, 8]}),
    "ds-cnn": (IMAGE, {"channels": [8, 8, 12]}),
    "resnet-8": (IMAGE, {"channels": [4, 8, 8], "groups": 2}),
    "mobilenet": (IMAGE, {"channels": [4, 8, 8], "depth": 2, "groups": 2}),
    "vit-tiny": (IMAGE, {"width": 8, "depth": 2, "heads": 2, "patch": 5}),
    "conv1d": (SEQUENCE, {"channels": [4, 8], "groups": 2}),
    "gru": (SEQUENCE, {"width": 6, "depth": 2}),
    "lstm": (SEQUENCE, {"width": 6, "depth": 2, "patch": 2}),
    "transformer": (SEQUENCE, {"width": 8, "heads": 2, "patch": 2}),
}
QUICK = ("float32", "static_int8", "full_int8")
OUTPUTS, INPUTS, SECONDS = 4, 24, 900
REASON = 160


def main() -> None:
    """Tries all of it, prints a table, and the reasons below it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(_try_forms(*options.one, quick=options.quick)) + "\n")
        return
    cases = {}
    for family in options.family:
        for target in options.target:
            cases[f"{family}-{target}"] = found = _in_a_process(family, target, quick=options.quick)
            told = ", ".join(f"{form} {cell['answer']}" for form, cell in found.items())
            sys.stderr.write(f"{family}-{target}: {told}\n")
    sys.stdout.write(_table(cases, options.family, options.target) + "\n")
    if options.json:
        packages = ("torch", "onnxruntime", "ai-edge-litert", "executorch")
        content = {
            "benchmark": "matrix",
            "machine": {"system": platform.platform()},
            "versions": {name: version(name) for name in packages},
            "cases": cases,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _in_a_process(family: str, target: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    command = [sys.executable, __file__, "--one", family, target, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"float32": {"answer": "WRONG", "why": said[-1][:REASON]}}
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _try_forms(family: str, target: str, *, quick: bool) -> dict[str, dict[str, Any]]:
    forms = dict.fromkeys(["float32", *TARGETS[target].forms])
    return {form: _try(family, target, form) for form in forms if not quick or form in QUICK}


def _try(family: str, target: str, form: str) -> dict[str, Any]:
    shape, settings = SMALL[family]
    model = _shaken(family, shape, settings)
    inputs = np.random.default_rng(0).standard_normal((INPUTS, *shape)).astype(np.float32)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model.{TARGETS[target].suffix}")
        calibration = (inputs,) if FORMS[form].calibrated else None
        try:
            artifact = export(model, (torch.zeros(1, *shape),), path, form=form, target=target, calibration=calibration)
            (parity,) = artifact.compare(model, [inputs], answers="values" if family == "autoencoder" else "classes")
        except (FormRefused, ArtifactRefused, Departure) as error:
            return {"answer": "no", "why": str(error)[:REASON]}
        passed = parity.passes(artifact.label)
        return {
            "answer": "yes" if passed else "departs",
            "why": "" if passed else _how_far(parity),
            "bytes": path.stat().st_size,
            "max_abs": parity.max_abs,
            "top1_agreement": parity.top1_agreement,
            "seconds": round(time.perf_counter() - started_s, 1),
        }


def _how_far(parity: Parity) -> str:
    if parity.spread is None:
        return f"the same class in {parity.top1_agreement:.1%} of {parity.n}"
    return f"off by {parity.max_abs / parity.spread:.2f} of the spread of its answers"


def _shaken(family: str, shape: tuple[int, ...], settings: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build_family({"family": family, **settings}, shape=shape, outputs=OUTPUTS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def _table(cases: dict[str, dict[str, dict[str, Any]]], families: list[str], targets: list[str]) -> str:
    """Rows are families, columns targets; a cell says which forms there are, and which are refused, by footnote."""
    notes: dict[str, int] = {}
    rows = [f"| family | {' | '.join(targets)} |", "|---" * (len(targets) + 1) + "|"]
    for family in families:
        cells = []
        for target in targets:
            parts = []
            for form, cell in cases[f"{family}-{target}"].items():
                note = f"[{notes.setdefault(cell['why'], len(notes) + 1)}]" if cell["why"] else ""
                parts.append(form if cell["answer"] == "yes" else f"{cell['answer']} {form}{note}")
            cells.append(", ".join(parts))
        rows.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *(f"{number}. {why}" for why, number in notes.items())])


if __name__ == "__main__":
    main()
