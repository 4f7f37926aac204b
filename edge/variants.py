"""From one trained model to every variant of the recipe, each compared with the model it came from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tacit.compression.export import Exported, outputs_of
from tacit.compression.forms import FORMS
from tacit.compression.material import Material
from tacit.compression.parity import Outputs, compare, edge_inputs
from tacit.compression.passes import Shaped, apply_passes, form_of
from tacit.compression.targets import TARGETS, target_of
from tacit.compression.variant import VariantSpec, build_variant, calibration_of, export_float, shipped_model
from tacit.compression.whole import raw_values, whole_interface
from tacit.devices.durable import FileDamaged
from tacit.devices.failpoint import reach
from tacit.devices.interface import Interface
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

__all__ = ["built_artifacts", "make_variants", "predictor_of"]


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
            interface=task.interface,
        )
        self._inputs = sample_inputs(task, self._data)
        self._shaped: dict[str, Shaped] = {}
        privacy = (folder.path / folder.named("privacy.json")).read_bytes()
        self._privacy_sha256 = hashlib.sha256(privacy).hexdigest()

    def stamp(self, spec: VariantSpec) -> dict[str, str]:
        """What an artifact says of itself: whose privacy it carries, and all that it takes to use it."""
        interface = self._task.interface
        return {
            "tacit.privacy_sha256": self._privacy_sha256,
            "tacit.task": self._task.name,
            "tacit.interface": json.dumps((whole_interface(interface) if spec.whole else interface).to_json()),
            "tacit.version": version("tacit"),
        }

    def has(self, spec: VariantSpec) -> bool:
        """Whether the variant is there, judged, and stamped with this run's privacy."""
        about = self._folder.read_json("variants", spec.name, "variant.json")
        if about is None or "parity" not in about or about.get("stamp") != self.stamp(spec):
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
            stamp=self.stamp(spec),
            exported=self._export(spec, shaped),
            stem=Path(self._folder.named("model.x")).stem,
        )
        reach("compress.after_artifact")
        judged = {**about, **self._judge(spec, about, shaped)}
        self._folder.write_json(judged, "variants", spec.name, "variant.json")

    def _shape(self, spec: VariantSpec) -> Shaped:
        key = repr([(p.name, dict(p.parameters)) for p in spec.passes if p.name not in FORMS])
        if key not in self._shaped:
            self._shaped[key] = apply_passes(self._model, spec.passes, self._material, seed=self._seed)
        return self._shaped[key]

    def _export(self, spec: VariantSpec, shaped: Shaped) -> Path:
        """The float export that variants of one shape and format share: exporting takes longer than quantising."""
        path = self._scratch / f"{id(shaped)}.{spec.format}.{spec.whole}.{TARGETS[spec.format].suffix}"
        if not path.exists():
            export_float(spec, shaped, self._material, path)
        return path

    def _judge(self, spec: VariantSpec, about: Mapping[str, object], shaped: Shaped) -> dict[str, object]:
        """Parity with the PyTorch model that it came from, and the metric, both on what the artifact's runtime says.

        Raises:
            Departure: it answers otherwise than its model, by name of the layer that departs first.
        """
        inputs, model = self._inputs, shipped_model(spec, shaped, self._material)
        written = Exported(
            path=_artifact(self._folder, about).path,
            target=spec.format,
            form=form_of(spec.passes),
            outputs=1,
            calibration=calibration_of(spec, shaped, self._material),
        )
        given = raw_values(inputs.values, self._task.interface) if spec.whole else inputs.values
        edges = edge_inputs(given)
        (found,) = written.run([np.concatenate([given, edges])])
        (wanted,) = outputs_of(model, [np.concatenate([given, edges])])
        outputs, at_edges = np.split(found.astype(np.float32), [len(given)])
        reference, expected = np.split(wanted.astype(np.float32), [len(given)])
        parity = compare(reference, outputs, answers=self._material.answers)
        if not parity.passes(written.label) or not np.isfinite(at_edges).all():
            raise written.departed(model, [given], parity)
        logits = _as_model_outputs(outputs, self._task.interface) if spec.whole else outputs
        test = self._data.test
        return {
            "parity": {
                "top1_agreement": parity.top1_agreement,
                "max_abs": parity.max_abs,
                "cosine": parity.cosine,
                **({} if parity.spread is None else {"spread": parity.spread}),
                "input_source": inputs.source,
                "edge_max_abs": float(np.abs(at_edges - expected).max()),
            },
            "accuracy": None if test is None else finite(self._task.score_outputs(test, logits)),
        }


def predictor_of(folder: RunFolder, artifact: Artifact) -> Callable[[Outputs], Outputs]:
    """From preprocessed inputs to the outputs of the model in an artifact, whatever its graph does besides."""
    about = folder.read_json("variants", artifact.name, "variant.json") or {}
    runtime = open_artifact(artifact.path, input_layout=artifact.input_layout, runtime=artifact.runtime)
    if not about.get("whole"):
        return runtime.predict
    interface = task_of(folder.recipe).interface
    return lambda inputs: _as_model_outputs(runtime.predict(raw_values(inputs, interface)), interface)


def _as_model_outputs(outputs: Outputs, interface: Interface) -> Outputs:
    """What a model gives, from what it gives with its answer inside the graph."""
    if interface.output == "logits":
        return np.log(np.maximum(outputs, 1e-30)).astype(np.float32)
    return interface.targets(outputs) if interface.output == "values" else outputs


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
    name, target = str(about["name"]), target_of(str(about["format"]))
    return Artifact(
        name=name,
        path=folder.path / "variants" / name / folder.named(f"model.{target.suffix}"),
        input_layout=target.layout,
        runtime=target.runtime,
    )
