"""From one trained model to every variant of the recipe, each compared with the model it came from."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tacit.compression.material import Material
from tacit.compression.parity import compare
from tacit.compression.passes import Shaped, apply_passes
from tacit.compression.variant import VariantSpec, build_variant, export_float
from tacit.devices.durable import FileDamaged
from tacit.devices.failpoint import reach
from tacit.devices.protocol import Artifact
from tacit.devices.runtime import open_artifact
from tacit.edge.composition import build_model
from tacit.edge.planning import task_of
from tacit.edge.progress import Progress
from tacit.edge.run_folder import RunFolder
from tacit.edge.sample_inputs import sample_inputs
from tacit.edge.wording import finite
from tacit.federated.checkpoint import load_checkpoint, read_weights
from tacit.federated.train import Arrays, read_arrays

__all__ = ["built_artifacts", "make_variants"]


def make_variants(
    folder: RunFolder, specs: Sequence[VariantSpec], progress: Progress, *, again: bool
) -> dict[str, str]:
    """Builds variants into DIR/variants and measures parity and the task's metric in each artifact's own runtime.

    Args:
        folder: a trained run.
        specs: what to build.
        progress: told of each.
        again: also build what is already there.

    Returns:
        Reasons of those that could not be built or judged, by name; nothing is left of these, and the others are
        complete.
    """
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
        workshop = _Workshop(folder, Path(scratch))
        for done, spec in enumerate(specs, 1):
            if again or not workshop.has(spec):
                try:
                    workshop.make(spec)
                except (ValueError, RuntimeError) as error:  # one variant's failure is not the others'
                    shutil.rmtree(folder.path / "variants" / spec.name, ignore_errors=True)
                    failed[spec.name] = (str(error).splitlines() or [type(error).__name__])[0]
                    folder.log("variant failed", name=spec.name, reason=str(error))
                    progress.note(f"variant {spec.name} failed: {failed[spec.name]}")
            progress.step(done, spec.name)
    return failed


class _Workshop:
    """The trained model, what passes may look at, and the models that passes have made of it so far."""

    def __init__(self, folder: RunFolder, scratch: Path) -> None:
        recipe = folder.recipe
        self._scratch = scratch
        self._task = task = task_of(recipe)
        self._folder, self._seed = folder, recipe.federated.seed
        self._data = task.load()
        self._model = build_model(recipe)
        read_arrays(self._model, _trained_weights(folder))
        self._model.eval()
        public = None if self._data.public is None else torch.from_numpy(self._data.public)
        self._material = Material(
            example_inputs=torch.zeros(1, *task.interface.shape),
            public=public,
            loss=task.loss,
            answers="classes" if task.kind == "classification" else "values",
        )
        self._inputs = sample_inputs(task, self._data)
        self._shaped: dict[str, Shaped] = {}
        privacy = (folder.path / folder.named("privacy.json")).read_bytes()
        self.stamp = {"tacit.privacy_sha256": hashlib.sha256(privacy).hexdigest(), "tacit.task": task.name}

    def has(self, spec: VariantSpec) -> bool:
        """Whether the variant is there, judged, and stamped with this run's privacy."""
        about = self._folder.read_json("variants", spec.name, "variant.json")
        if about is None or "parity" not in about or about.get("stamp") != self.stamp:
            return False
        path = _artifact(self._folder, about).path
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == about.get("sha256")

    def make(self, spec: VariantSpec) -> None:
        """Builds a variant and says how well it does."""
        target = self._folder.path / "variants" / spec.name
        shaped = self._shape(spec)
        reach("compress.before_variant")
        about = build_variant(
            spec,
            shaped,
            self._material,
            target,
            stamp=self.stamp,
            exported=self._export(spec, shaped),
            stem=Path(self._folder.named("model.x")).stem,
        )
        reach("compress.after_artifact")
        judged = {**about, **self._judge(about, shaped)}
        self._folder.write_json(judged, "variants", spec.name, "variant.json")

    def _shape(self, spec: VariantSpec) -> Shaped:
        key = repr([(p.name, dict(p.parameters)) for p in spec.passes if not p.name.endswith("_int8")])
        if key not in self._shaped:
            self._shaped[key] = apply_passes(self._model, spec.passes, self._material, seed=self._seed)
        return self._shaped[key]

    def _export(self, spec: VariantSpec, shaped: Shaped) -> Path:
        """The float export that variants of one shape and format share: exporting takes longer than quantising."""
        path = self._scratch / f"{id(shaped)}.{spec.format}"
        if not path.exists():
            export_float(spec.format, shaped, self._material, path)
        return path

    def _judge(self, about: Mapping[str, object], shaped: Shaped) -> dict[str, object]:
        """Parity with the PyTorch model that it came from, and the metric, both on what the artifact's runtime says."""
        inputs, artifact = self._inputs, _artifact(self._folder, about)
        outputs = open_artifact(artifact.path, input_layout=artifact.input_layout).predict(inputs.values)
        with torch.inference_mode():
            reference = shaped.model(torch.from_numpy(inputs.values)).numpy()
        parity = compare(reference, outputs, answers=self._material.answers)
        if not math.isfinite(parity.max_abs):
            raise ValueError(f"expected finite outputs of {artifact.path.name}, got NaN or infinity; leave a pass out")
        test = self._data.test
        return {
            "parity": {
                "top1_agreement": parity.top1_agreement,
                "max_abs": parity.max_abs,
                "cosine": parity.cosine,
                **({} if parity.spread is None else {"spread": parity.spread}),
                "input_source": inputs.source,
            },
            "accuracy": None if test is None else finite(self._task.score_outputs(test, outputs)),
        }


def built_artifacts(folder: RunFolder) -> list[Artifact]:
    """The artifacts that a run has, in the order of its recipe.

    Raises:
        FileDamaged: one is not the file that was judged.
    """
    found = (folder.read_json("variants", e.name, "variant.json") for e in folder.recipe.compression.variants)
    artifacts = []
    for about in found:
        if about is None:
            continue
        artifact = _artifact(folder, about)
        if not artifact.path.is_file() or hashlib.sha256(artifact.path.read_bytes()).hexdigest() != about["sha256"]:
            raise FileDamaged(
                f"expected the file that was judged, got another or none at {artifact.path}; "
                f"`tacit compress {folder.path}` makes it anew"
            )
        artifacts.append(artifact)
    return artifacts


def _trained_weights(folder: RunFolder) -> Arrays:
    """The trained model, compared with the last checkpoint, whose name holds its digest."""
    path = folder.train / "weights.safetensors"
    arrays = read_weights(path)
    newest, _ = load_checkpoint(folder.train / "checkpoint")
    if newest and newest.round == folder.recipe.federated.rounds:
        changed = [name for name in newest.arrays if not np.array_equal(newest.arrays[name], arrays.get(name, 0))]
        if changed:
            raise FileDamaged(f"expected the weights of the last round, got another {changed[0]} in {path}; restore it")
    return arrays


def _artifact(folder: RunFolder, about: Mapping[str, object]) -> Artifact:
    name = str(about["name"])
    return Artifact(
        name=name,
        path=folder.path / "variants" / name / folder.named(f"model.{about['format']}"),
        input_layout="channel_last" if about["input_layout"] == "channel_last" else "channel_first",
    )
