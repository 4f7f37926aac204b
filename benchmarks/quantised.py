"""Points of accuracy that a form costs on `writers`, for families of image models, in each target's own runtime.

Usage: python benchmarks/quantised.py [--families cnn ds-cnn resnet-8 vit-tiny] [--targets onnx tflite] [--forms
static_int8] [--quick] [--json FILE].

Each family is trained once, without privacy and on the pooled records of 400 writers; an artifact is made with 128
public inputs ("public") and with inputs made from the model alone ("synthetic"). Peers are the tools' own defaults:
onnxruntime's `quantize_static` with all its operators, ai-edge-quantizer's `static_wi8_ai8`, on the same public inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

FAMILIES = {"cnn": (6, 3e-3), "ds-cnn": (6, 3e-3), "resnet-8": (5, 2e-3), "vit-tiny": (12, 2e-3)}
WRITERS, BATCH, CALIBRATION = 400, 64, 128


def trained(family: str, *, epochs: int, learning_rate: float) -> torch.nn.Module:
    """A model of `writers`."""
    from tacit.federated.datasets import find_task
    from tacit.federated.models import build_family

    task = find_task("writers")
    data = task.load()
    if data.of_owner is None:
        raise RuntimeError("expected writers to have owners")
    held = [data.of_owner(writer) for writer in range(WRITERS)]
    inputs = torch.from_numpy(np.concatenate([records.inputs for records in held]))
    labels = torch.from_numpy(np.concatenate([records.labels for records in held]))
    torch.manual_seed(0)
    model = build_family({"family": family}, shape=task.interface.shape, outputs=len(task.interface.labels))
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    steps = epochs * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)  # a ViT must warm up
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracies(
    model: torch.nn.Module, target: str, forms: list[str], test: tuple[np.ndarray, np.ndarray], public: np.ndarray
) -> dict[str, float]:
    """Share of right answers, by form and calibration."""
    from tacit.compression.export import export
    from tacit.compression.forms import FORMS
    from tacit.compression.targets import TARGETS

    inputs, labels = test
    example = (torch.zeros(1, *inputs.shape[1:]),)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in ["float32", *forms]:
            if form not in {"float32", *TARGETS[target].forms}:
                continue
            for source in ("public", "synthetic") if FORMS[form].calibrated else ("",):
                calibration = "synthetic" if source == "synthetic" else (public[:CALIBRATION],)
                path = Path(folder, f"{form}{source}.{TARGETS[target].suffix}")
                artifact = export(model, example, path, form=form, target=target, calibration=calibration)
                logits = artifact.run([inputs])[0]
                found[f"{form} {source}".strip()] = float((logits.argmax(1) == labels).mean())
    return found


def default_of(
    model: torch.nn.Module, target: str, test: tuple[np.ndarray, np.ndarray], public: np.ndarray
) -> float | None:
    """Accuracy of static int8 as the target's own tool makes it; None where that raises an error, as on some norms."""
    from tacit.compression.silence import silenced
    from tacit.devices.runtime import open_artifact

    inputs, labels = test
    with tempfile.TemporaryDirectory() as folder, silenced():
        plain, made = Path(folder, f"plain.{target}"), Path(folder, f"made.{target}")
        if target == "onnx":
            from onnxruntime.quantization import CalibrationDataReader, quantize_static

            program = torch.onnx.export(model, (torch.zeros(1, *inputs.shape[1:]),), dynamo=True, verbose=False)
            program.save(str(plain))
            name = program.model.graph.inputs[0].name

            class Reader(CalibrationDataReader):
                def __init__(self) -> None:
                    self.left = iter(public[:CALIBRATION])

                def get_next(self) -> dict[str, np.ndarray] | None:
                    image = next(self.left, None)
                    return None if image is None else {name: image[None]}

            try:
                quantize_static(str(plain), str(made), Reader())
            except ValueError as error:
                print(f"onnxruntime's default raised: {error}", flush=True)  # noqa: T201  # a result too
                return None
        else:
            import litert_torch
            from ai_edge_quantizer import quantizer, recipe

            litert_torch.convert(model, (torch.zeros(1, *inputs.shape[1:]),)).export(str(plain))
            quantise = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
            feeds = [{"args_0": image[None]} for image in public[:CALIBRATION]]
            made.write_bytes(quantise.quantize(quantise.calibrate({"serving_default": feeds})).quantized_model)
        logits = open_artifact(made).predict(inputs)
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    """Trains each family, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--targets", nargs="+", default=["onnx", "tflite"])
    parser.add_argument("--forms", nargs="+", default=["static_int8"])
    parser.add_argument("--quick", action="store_true", help="the first family, trained for one epoch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from tacit.federated.datasets import find_task

    torch.set_num_threads(1)
    data = find_task("writers").load()
    if data.test is None or data.public is None:
        raise RuntimeError("expected writers to have public splits")
    test, cases = (data.test.inputs, data.test.labels), {}
    for family in options.families[: 1 if options.quick else None]:
        epochs, learning_rate = FAMILIES[family]
        model = trained(family, epochs=1 if options.quick else epochs, learning_rate=learning_rate)
        for target in options.targets:
            found = accuracies(model, target, options.forms, test, data.public)
            peer = default_of(model, target, test, data.public) if target in ("onnx", "tflite") else None
            _print(family, target, found, peer)
            float32 = found.pop("float32")
            lost = {name: 100 * (float32 - value) for name, value in found.items()}
            peers = {} if peer is None else {"default": 100 * (float32 - peer)}
            worst = max(lost.values())
            cases[f"{family}-{target}"] = {
                "tacit": worst, "peers": peers, "unit": "points lost", "ratio": {}, "float32": float32, "lost": lost
            }  # fmt: skip
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "cores": os.cpu_count()}
        packages = ("torch", "onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "litert-torch")
        versions = {"python": sys.version, **{name: version(name) for name in packages}}
        content = {"benchmark": "quantised", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _print(family: str, target: str, found: dict[str, float], peer: float | None) -> None:
    words = ", ".join(f"{name} {100 * value:.2f}" for name, value in found.items())
    beside = "" if peer is None else f", the tool's default {100 * peer:.2f}"
    print(f"{family} {target}: {words}{beside}", flush=True)  # noqa: T201  # its purpose


if __name__ == "__main__":
    main()
