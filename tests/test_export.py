"""Artifacts answer as their models, keep quiet, carry a stamp, and appear whole or not at all.

`pytest -s -k table` prints the table of compression/README.md.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tacit.compression import quantize_onnx, quantize_tflite
from tacit.compression.export_onnx import export_onnx, read_stamp_onnx, stamp_onnx
from tacit.compression.export_tflite import export_tflite, read_stamp_tflite, stamp_tflite
from tacit.compression.forms import Source
from tacit.compression.material import Material
from tacit.compression.parity import compare
from tacit.compression.passes import Shaped, apply_passes, parse_passes
from tacit.compression.plan import Plan, load
from tacit.compression.silence import silenced
from tacit.compression.variant import VariantSpec, build_variant

EXAMPLE = torch.zeros(1, 1, 8, 8)
SMALL = [{"name": "prune", "ratio": 0.5}, {"name": "distill"}, {"name": "static_int8"}]
VARIANTS = {
    "float32": [],
    "dynamic": [{"name": "dynamic_int8"}],
    "small": SMALL,
}
STAMP = {"privacy_sha256": "ab" * 32, "note": "é"}


def digit_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.from_numpy((data.images / 16).astype(np.float32)[:, None])
    labels = torch.from_numpy(data.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, labels_train = images[order[450:]], labels[order[450:]]
    return {
        "test": images[order[:360]].numpy(),
        "answers": labels[order[:360]].numpy(),
        "public": images[order[360:450]],
        "train": train,
        "labels": labels_train,
    }


@pytest.fixture(scope="module")
def model(digits):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained = digit_model()
        optimizer = torch.optim.Adam(trained.parameters(), 3e-3)
        for _ in range(12):
            for batch in torch.randperm(len(digits["train"])).split(64):
                optimizer.zero_grad()
                F.cross_entropy(trained(digits["train"][batch]), digits["labels"][batch]).backward()
                optimizer.step()
    return trained.eval()


@pytest.fixture(scope="module")
def built(digits, model, tmp_path_factory):
    """Name -> (description, shaped, folder) of six variants, and the shaped model of the small ones made once."""
    material = Material(example_inputs=EXAMPLE, public=digits["public"])
    folder = tmp_path_factory.mktemp("variants")
    variants = {}
    shaped = {name: apply_passes(model, parse_passes(passes), material, seed=0) for name, passes in VARIANTS.items()}
    for form in ("onnx", "tflite"):
        for name, passes in VARIANTS.items():
            spec = VariantSpec(f"{form}-{name}", form, parse_passes(passes))
            description = build_variant(spec, shaped[name], material, folder / spec.name, stamp=STAMP)
            variants[spec.name] = (description, shaped[name], folder / spec.name)
    return variants


def predict(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits of an artifact for channel-first images, straight from its own runtime."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"input": images})[0]
    with silenced():  # LiteRT announces its delegate
        runner = Interpreter(str(path), num_threads=1).get_signature_runner("serving_default")
        return np.concatenate([runner(input=np.moveaxis(image[None], 1, -1))["logits"] for image in images])


def torch_logits(shaped: Shaped, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return shaped.model(torch.from_numpy(images)).numpy()


def test_every_variant_agrees_with_its_own_model_and_the_table_meets_its_targets(digits, built, model):
    rows = []
    reference = torch_logits(built["onnx-float32"][1], digits["test"])
    floor = (reference.argmax(1) == digits["answers"]).mean() - 0.03
    for name, (description, shaped, folder) in built.items():
        logits = predict(folder / f"model.{description['format']}", digits["test"])
        parity = compare(torch_logits(shaped, digits["test"]), logits)
        accuracy = (logits.argmax(1) == digits["answers"]).mean()
        share = description["bytes"] / built[f"{description['format']}-float32"][0]["bytes"]
        rows.append(
            f"| {name} | {description['label']} | {description['bytes']:,} | {share:.0%} "
            f"| {parity.top1_agreement:.1%} | {parity.max_abs:.2g} | {accuracy:.1%} |"
        )
        assert parity.passes(description["label"]), (name, parity)
        assert parity.max_abs < 5.0, (name, parity)  # ends are floats, whoever reads them
        assert accuracy >= floor, name
        if name.endswith("small"):
            assert share <= 0.40, name
    sys.stdout.write("\n" + "\n".join(rows) + "\n")


def test_a_variant_says_what_it_is(built):
    description, shaped, folder = built["tflite-small"]
    artifact = (folder / "model.tflite").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.tflite", "plan.json", "variant.json", "weights.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "variant.json").read_text()) == description
    assert description == {
        "schema_version": 1,
        "name": "tflite-small",
        "format": "tflite",
        "label": "static int8 (float I/O)",
        "whole": False,
        "input_layout": "channel_last",
        "bytes": len(artifact),
        "sha256": hashlib.sha256(artifact).hexdigest(),
        "parameters": 3866,
        "pruned": 1 - 3866 / 10026,
        "passes": [
            {"name": "prune", "parameters": {"ratio": 0.5, "round_to": 1}, "data_use": "none"},
            {
                "name": "distill",
                "parameters": {"epochs": 400, "learning_rate": 0.02, "temperature": 2.0},
                "data_use": "public",
            },
            {"name": "static_int8", "parameters": {"calibration": "public"}, "data_use": "public"},
        ],
        "data_use": "public",
        "stamp": STAMP,
    }
    assert built["onnx-dynamic"][0]["pruned"] == 0.0
    assert built["onnx-dynamic"][0]["input_layout"] == "channel_first"
    loaded, _ = load(folder, digit_model())
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), shaped.model(images))


def test_the_stamp_is_in_the_artifact_and_can_be_replaced(built, tmp_path, digits):
    for name, read, write in (
        ("onnx-small", read_stamp_onnx, stamp_onnx),
        ("tflite-small", read_stamp_tflite, stamp_tflite),
    ):
        source = next(built[name][2].glob("model.*"))
        assert read(source) == STAMP
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes())
        write(copy, {"other": "x" * 300})
        assert read(copy) == {"other": "x" * 300}
        assert np.array_equal(predict(copy, digits["test"][:20]), predict(source, digits["test"][:20]))
        write(copy, STAMP)
        assert copy.read_bytes() == source.read_bytes()


def test_building_again_gives_the_same_bytes_in_any_order_of_calibration(built, digits, tmp_path):
    for form in ("onnx", "tflite"):
        description, shaped, folder = built[f"{form}-small"]
        spec = VariantSpec(f"{form}-small", form, parse_passes(SMALL))
        material = Material(example_inputs=EXAMPLE, public=digits["public"].flip(0))
        again = build_variant(spec, shaped, material, tmp_path / form, stamp=STAMP)
        assert again["sha256"] == description["sha256"]
        for name in ("plan.json", "weights.safetensors"):
            assert (tmp_path / form / name).read_bytes() == (folder / name).read_bytes()


def test_export_and_quantisation_print_nothing(model, digits, tmp_path, capfd):
    calibration = (digits["public"][:4].numpy(),)
    for suffix, export, quantize in (
        ("onnx", export_onnx, quantize_onnx),
        ("tflite", export_tflite, quantize_tflite),
    ):
        source, target = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
        export(model, (EXAMPLE,), source)
        made_of = Source(model=model, examples=(EXAMPLE,), exported=source, calibration=calibration)
        assert {"onnx": read_stamp_onnx, "tflite": read_stamp_tflite}[suffix](source) == {}
        quantize.dynamic_int8(made_of, target)
        quantize.static_int8(made_of, target)
        for path in (source, target):
            content = path.read_bytes()
            assert b"/home" not in content
            assert b".py" not in content  # no stack traces of the machine that exported
    assert capfd.readouterr() == ("", "")


def test_onnx_takes_any_batch_and_tflite_is_channel_last(built):
    images = np.random.default_rng(0).random((7, 1, 8, 8), dtype=np.float32)
    _, shaped, folder = built["onnx-float32"]
    assert np.allclose(predict(folder / "model.onnx", images), torch_logits(shaped, images), atol=1e-4)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    details = Interpreter(str(built["tflite-small"][2] / "model.tflite")).get_input_details()
    assert details[0]["shape"].tolist() == [1, 8, 8, 1]
    assert details[0]["dtype"] is np.float32


def test_three_channels_are_not_mistaken_for_rows(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 2, 5)
    ).eval()
    export_tflite(network, (torch.zeros(1, 3, 10, 6),), tmp_path / "m.tflite")
    images = np.random.default_rng(0).random((4, 3, 10, 6), dtype=np.float32)
    expected = network(torch.from_numpy(images)).detach().numpy()
    assert np.allclose(predict(tmp_path / "m.tflite", images), expected, atol=1e-5)


class _Unexportable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.sum() > 0:  # a branch on values, which no exporter can write down
            return images.flatten(1)
        return -images.flatten(1)


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_a_failed_build_leaves_the_old_folder_and_nothing_else(form, tmp_path, capfd):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "old").write_text("old")
    shaped = Shaped(_Unexportable(), Plan(), 1)
    with pytest.raises(Exception) as caught:  # noqa: PT011 # whatever the exporter raises
        build_variant(VariantSpec("v", form), shaped, Material(example_inputs=EXAMPLE), tmp_path / "v", stamp={})
    assert hasattr(caught.value, "__notes__")  # what the exporter printed
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
    assert (tmp_path / "v" / "old").read_text() == "old"
    assert capfd.readouterr() == ("", "")


def test_a_rebuilt_variant_replaces_the_old_folder(model, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "old").write_text("old")
    shaped = apply_passes(model, (), Material(example_inputs=EXAMPLE), seed=0)
    build_variant(VariantSpec("v", "onnx"), shaped, Material(example_inputs=EXAMPLE), tmp_path / "v", stamp={})
    assert not (tmp_path / "v" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_a_variant_that_cannot_be_honest_is_refused(model, tmp_path):
    material = Material(example_inputs=EXAMPLE)
    shaped = apply_passes(model, (), material, seed=0)
    static = VariantSpec("v", "onnx", parse_passes([{"name": "static_int8"}]))
    with pytest.raises(ValueError, match="public inputs for the pass 'static_int8'"):
        build_variant(static, shaped, material, tmp_path / "v", stamp={})
    pruned = VariantSpec("v", "onnx", parse_passes([{"name": "prune", "ratio": 0.5}]))
    with pytest.raises(ValueError, match="expected a model shaped by the passes"):
        build_variant(pruned, shaped, material, tmp_path / "v", stamp={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValueError, match="expected a name"):
        VariantSpec(name, "onnx")


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="expected format to be one of onnx, tflite"):
        VariantSpec("v", "mlmodel")


@pytest.mark.parametrize(
    "calibration",
    [
        None,
        (),
        (np.zeros((0, 1, 8, 8), np.float32),),
        (np.ones((2, 1, 4, 8), np.float32),),
        (np.zeros((2, 1, 8, 8), np.float32),),
        (np.full((2, 1, 8, 8), np.nan, np.float32),),
    ],
)
def test_a_calibration_set_that_would_give_wrong_ranges_is_refused(calibration, tmp_path):
    for quantize in (quantize_onnx, quantize_tflite):
        made_of = Source(
            model=nn.Identity(), examples=(EXAMPLE,), exported=tmp_path / "absent", calibration=calibration
        )
        with pytest.raises(ValueError, match="calibration"):
            quantize.static_int8(made_of, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_silence_shows_what_was_printed_only_on_failure(capfd):
    with silenced():
        sys.stdout.write("quiet\n")
    with pytest.raises(ValueError, match="broken") as caught, silenced():  # noqa: PT012 # the printing is the point
        sys.stdout.write("the reason\n")
        raise ValueError("broken")
    assert caught.value.__notes__ == ["the reason\n"]
    assert capfd.readouterr() == ("", "")
    sys.stdout.write("heard\n")
    assert capfd.readouterr().out == "heard\n"
