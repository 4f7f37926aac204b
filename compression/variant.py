"""Builds one variant: the reshaped model as data, its artifact, and what is known of both."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tacit.compression import plan as plans
from tacit.compression import quantize_onnx, quantize_tflite
from tacit.compression.export_onnx import export_onnx, stamp_onnx
from tacit.compression.export_tflite import export_tflite, stamp_tflite
from tacit.compression.material import Material
from tacit.compression.passes import Pass, Shaped, check_material, label_of, require_public, strongest_data_use

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Format = Literal["onnx", "tflite"]


@dataclass(frozen=True)
class VariantSpec:
    """An entry of the recipe: what to build.

    Attributes:
        name: Letters, digits, `_`, `-` and `.`; it becomes a folder's name.
        format: "onnx" or "tflite".
        passes: From `passes.parse_passes`.

    Example:
        >>> VariantSpec("../elsewhere", "onnx")
        Traceback (most recent call last):
            ...
        ValueError: expected a name of up to 64 letters, digits, '_', '-' and '.', got name='../elsewhere'; rename it
    """

    name: str
    format: Format
    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Check the name and the format.

        Raises:
            ValueError: If the name is no safe folder name, or the format is unknown.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"expected a name of up to 64 letters, digits, '_', '-' and '.', got name={self.name!r}; rename it"
            )
        if self.format not in _FORMATS:
            raise ValueError(f"expected format 'onnx' or 'tflite', got format={self.format!r}; choose one of these")


@dataclass(frozen=True)
class _Toolchain:
    """What a format needs: how to export, quantise and stamp it, and where its channels are."""

    export: Callable[[nn.Module, torch.Tensor, Path], None]
    dynamic_int8: Callable[[Path, Path], None]
    static_int8: Callable[[Path, Path, npt.NDArray[np.float32]], None]
    stamp: Callable[[Path, Mapping[str, str]], None]
    input_layout: Literal["channel_first", "channel_last"]


_FORMATS: Mapping[str, _Toolchain] = {
    "onnx": _Toolchain(export_onnx, quantize_onnx.dynamic_int8, quantize_onnx.static_int8, stamp_onnx, "channel_first"),
    "tflite": _Toolchain(
        export_tflite, quantize_tflite.dynamic_int8, quantize_tflite.static_int8, stamp_tflite, "channel_last"
    ),
}


def export_float(artifact_format: Format, shaped: Shaped, material: Material, path: Path) -> None:
    """Export a shaped model as float32; every quantised variant of it in this format begins here.

    Args:
        artifact_format: "onnx" or "tflite".
        shaped: From `passes.apply_passes`.
        material: The example input.
        path: The file to write.
    """
    _FORMATS[artifact_format].export(shaped.model, material.example_inputs, path)


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

    The folder then holds `plan.json`, `weights.safetensors`, `model.onnx` or `model.tflite`, and `variant.json`. Parity
    and accuracy are measured later, in the runtime that will run the artifact.

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
        artifact = built / f"{stem}.{spec.format}"
        _write_artifact(spec, material, artifact, exported or _exported(spec, shaped, material, scratch))
        _FORMATS[spec.format].stamp(artifact, stamp)
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
    path = scratch / f"float.{spec.format}"
    export_float(spec.format, shaped, material, path)
    return path


def _write_artifact(spec: VariantSpec, material: Material, artifact: Path, exported: Path) -> None:
    tools, label = _FORMATS[spec.format], label_of(spec.passes)
    if label == "float32":
        shutil.copyfile(exported, artifact)
    elif label == "dynamic-range int8":
        tools.dynamic_int8(exported, artifact)
    else:
        tools.static_int8(exported, artifact, require_public(spec.passes[-1], material).numpy())


def _describe(spec: VariantSpec, shaped: Shaped, artifact: Path, stamp: Mapping[str, str]) -> dict[str, object]:
    content = artifact.read_bytes()
    return {
        "schema_version": SCHEMA_VERSION,
        "name": spec.name,
        "format": spec.format,
        "label": label_of(spec.passes),
        "input_layout": _FORMATS[spec.format].input_layout,
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
