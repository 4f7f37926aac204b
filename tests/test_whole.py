"""Preprocessing and softmax inside the graph answer as they do outside it, and metadata say which of the two it is."""

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch import nn

from tacit.compression.export import export
from tacit.compression.material import Material
from tacit.compression.passes import apply_passes, parse_passes
from tacit.compression.targets import TARGETS
from tacit.compression.variant import VariantSpec, build_variant
from tacit.compression.whole import Whole, raw_values, whole_interface
from tacit.devices.interface import Interface
from tacit.devices.runtime import open_artifact
from tacit.edge.pipeline import run
from tacit.edge.recipe import load_recipe
from tacit.edge.run_folder import RunFolder
from tacit.edge.variants import built_artifacts, predictor_of

IMAGES = Interface(
    shape=(3, 4, 5), scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), labels=("cat", "dog", "eel")
)
RENT = Interface(
    shape=(4,), mean=(1.0,), std=(2.0,), labels=("euros",), output="values", target_mean=(500.0,), target_std=(90.0,)
)
PUMP = Interface(shape=(6,), mean=(1.0,), labels=("normal", "odd"), output="reconstruction", threshold=1.0)


def network(interface, outputs):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(interface.shape)), outputs)).eval()


def raw_of(interface):
    return np.random.default_rng(0).uniform(0, 255, (9, *interface.shape)).astype(np.float32)


def outside(model, interface, raw):
    with torch.no_grad():
        return model(torch.from_numpy(interface.preprocess(raw))).numpy()


@pytest.mark.parametrize(("interface", "outputs"), [(IMAGES, 3), (RENT, 1), (PUMP, 6)])
def test_a_whole_graph_says_what_model_and_interface_say_together(interface, outputs):
    model, raw = network(interface, outputs), raw_of(interface)
    with torch.no_grad():
        found = Whole(model, interface)(torch.from_numpy(raw)).numpy()
    separate = outside(model, interface, raw)
    if interface.output == "logits":
        wanted = np.array([p.probabilities for p in interface.postprocess(separate)])
        again = [p.probabilities for p in whole_interface(interface).postprocess(found)]
        np.testing.assert_allclose(again, wanted, atol=1e-5)
    else:
        wanted = interface.values(separate) if interface.output == "values" else separate
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(raw_values(interface.preprocess(raw), interface), raw, rtol=1e-4, atol=1e-3)
    left = whole_interface(interface)
    np.testing.assert_array_equal(left.preprocess(raw), raw)
    assert (left.labels, left.threshold) == (interface.labels, interface.threshold)


@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_a_whole_artifact_takes_raw_values_also_where_it_is_quantised(tmp_path, target):
    model, raw = network(IMAGES, 3), raw_of(IMAGES)
    whole = Whole(model, IMAGES).eval()
    path = tmp_path / f"m.{TARGETS[target].suffix}"
    artifact = export(whole, (torch.from_numpy(raw[:1]),), path, form="static_int8", calibration=(raw,))
    wanted = np.array([p.probabilities for p in IMAGES.postprocess(outside(model, IMAGES, raw))])
    np.testing.assert_allclose(artifact.run([raw])[0], wanted, atol=0.05)


def test_a_variant_with_its_interface_inside_keeps_weights_and_plan_of_the_model_alone(tmp_path):
    model = network(IMAGES, 3)
    public = torch.from_numpy(IMAGES.preprocess(raw_of(IMAGES)))
    material = Material(example_inputs=torch.zeros(1, 3, 4, 5), public=public, interface=IMAGES)
    passes = parse_passes([{"name": "static_int8"}])
    shaped = apply_passes(model, passes, material, seed=0)
    spec = VariantSpec("w", "onnx", passes, whole=True)
    about = build_variant(spec, shaped, material, tmp_path / "w", stamp={})
    assert about["whole"]
    raw = raw_of(IMAGES)
    found = open_artifact(tmp_path / "w" / "model.onnx").predict(raw)
    wanted = np.array([p.probabilities for p in IMAGES.postprocess(outside(model, IMAGES, raw))])
    np.testing.assert_allclose(found, wanted, atol=0.05)
    bare = Material(example_inputs=torch.zeros(1, 3, 4, 5), public=public)
    with pytest.raises(ValueError, match="expected an interface for whole=True"):
        build_variant(spec, shaped, bare, tmp_path / "x", stamp={})
    assert not (tmp_path / "x").exists()


def test_a_run_ships_its_interface_with_each_artifact_inside_or_beside(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[privacy]\nunit = "none"\n[federated]\nrounds = 2\nowners = 2\n[report]\ntwin = false\n'
        + "".join(
            f'[[compression.variants]]\nname = "{name}"\nformat = "{form}"\nwhole = {whole}\n'
            for name, form, whole in (("a", "onnx", "true"), ("b", "tflite", "true"), ("c", "onnx", "false"))
        )
    )
    run(recipe, tmp_path / "out")
    folder = RunFolder(tmp_path / "out", load_recipe(recipe))
    try:
        from tacit.edge.planning import task_of

        task = task_of(folder.recipe)
        test = task.load().test.inputs[:50]
        answers = [predictor_of(folder, artifact)(test) for artifact in built_artifacts(folder)]
        for artifact, form in zip(built_artifacts(folder), ("onnx", "tflite", "onnx"), strict=True):
            stamp = TARGETS[form].read_stamp(artifact.path)
            inside = artifact.name != "c"
            carried = Interface.from_json(json.loads(stamp["tacit.interface"]))
            assert carried == (whole_interface(task.interface) if inside else task.interface)
            assert stamp["tacit.version"] == version("tacit")
            about = folder.read_json("variants", artifact.name, "variant.json")
            assert about["whole"] == inside
            assert about["accuracy"] == pytest.approx(folder.read_rounds()[-1]["accuracy"], abs=0.003)
            assert about["parity"]["edge_max_abs"] < 1e-2
    finally:
        folder.close()
    for found in answers[:2]:  # log-probabilities: logits up to a constant of each row
        difference = found - answers[2]
        np.testing.assert_allclose(difference - difference.mean(1, keepdims=True), 0.0, atol=1e-2)
