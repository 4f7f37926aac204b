"""Builds one variant: the reshaped model as data, its artifact, and what is known of both."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from tacit.compression import plan as plans
from tacit.compression.calibrate import synthetic_inputs
from tacit.compression.export import write_form
from tacit.compression.forms import FORMS, Calibration
from tacit.compression.material import Material
from tacit.compression.passes import (
    Pass,
    Shaped,
    check_material,
    form_of,
    require_public,
    strongest_data_use,
)
from tacit.compression.targets import TARGETS, Format, check_form, label_of, target_of
from tacit.compression.whole import Whole, raw_values

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class VariantSpec:
    """An entry of the recipe: what to build.

    Attributes:
        name: Letters, digits, `_`, `-` and `.`; it becomes a folder's name.
        format: A target of `targets.TARGETS`.
        passes: From `passes.parse_passes`.
        whole: Whether preprocessing and softmax are inside the graph.

    Example:
        >>> VariantSpec("../elsewhere", "onnx")
        Traceback (most recent call last):
            ...
        ValueError: expected a name of up to 64 letters, digits, '_', '-' and '.', got name='../elsewhere'; rename it
    """

    name: str
    format: Format
    passes: tuple[Pass, ...] = ()
    whole: bool = False

    def __post_init__(self) -> None:
        """Check the name and the format.

        Raises:
            ValueError: If the name is no safe folder name, the format is unknown, or does not hold the passes' form.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"expected a name of up to 64 letters, digits, '_', '-' and '.', got name={self.name!r}; rename it"
            )
        check_form(self.format, form_of(self.passes))


def shipped_model(spec: VariantSpec, shaped: Shaped, material: Material) -> nn.Module:
    """The model that a variant holds: as it was shaped, or with its interface inside.

    Raises:
        ValueError: If an interface is to be inside and there is none.
    """
    if not spec.whole:
        return shaped.model
    if material.interface is None:
        raise ValueError(f"expected an interface for whole=True of {spec.name!r}, got none; give one with the material")
    return Whole(shaped.model, material.interface).eval()


def export_float(spec: VariantSpec, shaped: Shaped, material: Material, path: Path) -> None:
    """Export what a variant holds as float32; every quantised one of the same model and format begins here.

    Args:
        spec: Its format, and whether its interface is inside.
        shaped: From `passes.apply_passes`.
        material: The example input.
        path: The file to write.
    """
    target_of(spec.format).export(shipped_model(spec, shaped, material), (material.example_inputs,), path)


def build_variant(
    spec: VariantSpec,
    shaped: Shaped,
    material: Material,
    folder: Path,
    *,
    stamp: Mapping[str, str],
    exported: Path | None = None,
    stem: str = "model",
) -> dict[str, object]:
    """Export, quantise and stamp a variant into `folder`, which appears whole or not at all.

    The folder then holds `plan.json`, `weights.safetensors`, the artifact, what its target has beside it, and
    `variant.json`. Parity and accuracy are measured later, in the runtime that will run the artifact.

    Args:
        spec: What to build; its model-level passes are those that made `shaped`.
        shaped: From `passes.apply_passes`.
        material: The example input, and public inputs to calibrate static int8 with.
        folder: Replaced if it exists; its parent is made if need be.
        stamp: Written into the artifact, for example the digest of `privacy.json`.
        exported: What `export_float` wrote for `shaped` in this format; exported here when None.
        stem: Of the artifact's file name.

    Returns:
        The content of `variant.json`.

    Raises:
        ValueError: If a pass needs public inputs and there are none, or `shaped` was made by other passes.
        OSError: If the folder cannot be written.
    """
    check_material(spec.passes, material)
    if any(step.name == "prune" for step in spec.passes) != bool(shaped.plan.layers):
        raise ValueError(
            f"expected a model shaped by the passes of {spec.name!r}, got plan={sorted(shaped.plan.layers)}; "
            "give what apply_passes returned for these passes"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        built = scratch / "built"
        built.mkdir()
        plans.save(built, shaped.model, shaped.plan)
        artifact = built / f"{stem}.{TARGETS[spec.format].suffix}"
        _write_artifact(spec, shaped, material, artifact, exported or _exported(spec, shaped, material, scratch))
        TARGETS[spec.format].stamp(artifact, stamp)
        beside = TARGETS[spec.format].beside
        for name, content in (beside(artifact) if beside else {}).items():
            (built / name).write_bytes(content)
        description = _describe(spec, shaped, artifact, stamp)
        text = json.dumps(description, indent=1) + "\n"
        (built / "variant.json").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(scratch / "replaced")  # a folder cannot be renamed onto a full one
        built.rename(folder)
    finally:
        shutil.rmtree(scratch)
    return description


def _exported(spec: VariantSpec, shaped: Shaped, material: Material, scratch: Path) -> Path:
    path = scratch / f"float.{TARGETS[spec.format].suffix}"
    export_float(spec, shaped, material, path)
    return path


def _write_artifact(spec: VariantSpec, shaped: Shaped, material: Material, artifact: Path, exported: Path) -> None:
    write_form(
        shipped_model(spec, shaped, material),
        (material.example_inputs,),
        artifact,
        target=spec.format,
        form=form_of(spec.passes),
        calibration=calibration_of(spec, shaped, material),
        exported=exported,
    )


def calibration_of(spec: VariantSpec, shaped: Shaped, material: Material) -> Calibration | None:
    """The inputs that a variant's ranges are taken from; None where it has none.

    Raises:
        ValueError: If it needs public inputs and there are none.
    """
    if not FORMS[form_of(spec.passes)].calibrated:
        return None
    last = spec.passes[-1]
    if last.parameters["calibration"] == "synthetic":
        (inputs,) = synthetic_inputs(shaped.model, (material.example_inputs,))
    else:
        inputs = require_public(last, material).numpy()
    if spec.whole and material.interface is not None:
        return (raw_values(inputs.astype(np.float32), material.interface),)
    return (inputs,)


def _describe(spec: VariantSpec, shaped: Shaped, artifact: Path, stamp: Mapping[str, str]) -> dict[str, object]:
    content = artifact.read_bytes()
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "format": spec.format,
        "label": label_of(spec.format, form_of(spec.passes)),
        "whole": spec.whole,
        "input_layout": TARGETS[spec.format].layout,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "parameters": shaped.parameters,
        "pruned": shaped.pruned,
        "passes": [
            {"name": step.name, "parameters": dict(step.parameters), "data_use": step.data_use} for step in spec.passes
        ],
        "data_use": strongest_data_use(spec.passes),
        "stamp": dict(stamp),
    }
