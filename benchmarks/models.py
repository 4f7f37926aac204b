"""How large the model families are at a usual shape, with their defaults: parameters, work, and how they are trained.

Usage: python benchmarks/models.py [--json FILE].

Multiply-accumulates are half of what torch counts as floating point operations of one example's forward pass: of
convolutions and matrix products, attention's and recurrent layers' too; not of normalisations and activations. The
engine is what makes clipped sums of gradients: `sums` is Tacit's own, of one forward and one backward pass; with
`hooks` Opacus makes every record's gradient. Shapes are those of MLPerf Tiny (keyword spotting, image classification,
visual wake words, anomaly detection), of digits, and of nine channels of a movement sensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tacit.federated.models import FAMILIES, build_family
from tacit.federated.per_record import unsupported_layers

EXAMPLES: dict[str, tuple[tuple[int, ...], int]] = {
    "mlp": ((30,), 2),
    "cnn": ((1, 8, 8), 10),
    "ds-cnn": ((1, 49, 10), 12),
    "resnet-8": ((3, 32, 32), 10),
    "mobilenet": ((3, 96, 96), 2),
    "vit-tiny": ((1, 28, 28), 10),
    "conv1d": ((9, 128), 6),
    "gru": ((9, 128), 6),
    "lstm": ((9, 128), 6),
    "transformer": ((9, 128), 6),
    "autoencoder": ((640,), 1),
}


def main() -> None:
    """Counts every family, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = {family: _count(family, *EXAMPLES[family]) for family in FAMILIES}
    _print(cases)
    if options.json:
        versions = {"python": sys.version, "torch": version("torch")}
        content = {"benchmark": "models", "machine": {"system": platform.platform()}, "versions": versions}
        options.json.write_text(json.dumps({**content, "cases": cases}, indent=1) + "\n")


def _count(family: str, shape: tuple[int, ...], outputs: int) -> dict[str, object]:
    model = build_family({"family": family}, shape=shape, outputs=outputs).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, *shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "tacit": parameters,
        "peers": {},
        "unit": "parameters",
        "ratio": {},
        "title": FAMILIES[family].title,
        "shape": shape,
        "multiply_accumulates": counter.get_total_flops() // 2,
        "engine": "hooks" if unsupported_layers(model) else "sums",
    }


def _print(cases: dict[str, dict[str, object]]) -> None:
    heads = ("family", "what it is", "example", "parameters", "multiply-accumulates", "gradients by")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")  # noqa: T201  # its purpose
    for family, case in cases.items():
        example = "×".join(map(str, case["shape"]))
        counts = f"{case['tacit']:,} | {case['multiply_accumulates']:,}"
        print(f"| {family} | {case['title']} | {example} | {counts} | {case['engine']} |")  # noqa: T201  # as above


if __name__ == "__main__":
    main()
