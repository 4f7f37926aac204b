"""A module of one's own, exported, quantised and compared without a federation; and whom to blame when it departs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from tacit.compression import export as exporting
from tacit.compression.departure import Departure, first_departure
from tacit.compression.export import export
from tacit.compression.forms import FormRefused
from tacit.compression.targets import TARGETS

README = Path(__file__).parents[1] / "README.md"


class TwoAndTwo(nn.Module):
    """Two inputs of different shapes, two outputs, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.table = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image, table):
        features = torch.relu(self.norm(self.conv(image)))
        features = features + self.mix(features)
        pooled = features.mean((2, 3)) + self.table(table)
        return self.head(pooled), pooled


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return TwoAndTwo().eval()


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape).astype(np.float32) for shape in ((40, 3, 7, 5), (40, 5))]


def examples(inputs):
    return tuple(torch.from_numpy(values[:1]) for values in inputs)


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize("form", ["float32", "dynamic_int8", "static_int8"])
def test_two_inputs_and_two_outputs_answer_as_their_model(model, inputs, tmp_path, suffix, form):
    artifact = export(model, examples(inputs), tmp_path / f"m.{suffix}", form=form, calibration=tuple(inputs))
    first, second = artifact.check(model, inputs)
    assert (first.max_abs, second.max_abs) < (0.5, 0.5)
    if suffix == "tflite":
        interpreter = Interpreter(str(artifact.path))
        ends = (*interpreter.get_input_details(), *interpreter.get_output_details())
        assert {end["dtype"] for end in ends} == {np.float32}  # also where an output goes into a quantised layer
    swapped = artifact.run(inputs)[::-1]  # a control: outputs in the other order are other outputs
    assert [values.shape for values in swapped] == [(40, 8), (40, 4)]
    assert list(tmp_path.iterdir()) == [artifact.path]


def test_synthetic_inputs_calibrate_about_as_well_as_real_ones(model, inputs, tmp_path):
    errors = []
    for number, calibration in enumerate((tuple(inputs), "synthetic")):
        path = tmp_path / f"{number}.onnx"
        artifact = export(model, examples(inputs), path, form="static_int8", calibration=calibration)
        errors.append(artifact.compare(model, inputs)[0].cosine)
    assert errors[1] > 0.99
    again = export(model, examples(inputs), tmp_path / "again.onnx", form="static_int8", calibration="synthetic")
    assert again.path.read_bytes() == (tmp_path / "1.onnx").read_bytes()  # a function of the model


def test_an_artifact_of_another_model_is_refused_and_the_layer_that_departs_is_named(
    model, inputs, tmp_path, monkeypatch
):
    artifact = export(model, examples(inputs), tmp_path / "m.onnx")
    true = exporting.write_form

    def with_a_wrong_table(part, *args, **named):
        with torch.no_grad():
            wrong = type(part)(part.model, part._name) if hasattr(part, "_name") else part
            wrong.model.table.weight.mul_(1.5)
        true(wrong, *args, **named)

    with torch.no_grad():
        wrong = TwoAndTwo().eval()
        wrong.load_state_dict(model.state_dict())
        wrong.table.weight.mul_(1.5)
    export(wrong, examples(inputs), artifact.path)
    monkeypatch.setattr(exporting, "write_form", with_a_wrong_table)
    with pytest.raises(Departure, match=r"layer 'table' \(Linear\) departs first, by 0\.\d+ of its norm"):
        artifact.check(model, inputs)


def test_nothing_is_blamed_where_every_layer_agrees(model, inputs):
    def faithful(part, path):
        with torch.no_grad():
            return part(*(torch.from_numpy(values) for values in inputs)).numpy()

    assert first_departure(model, inputs, faithful, tolerance=1e-6) is None


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path):
    class Chatty(nn.Module):
        def forward(self, values):
            return {"answer": values}

    with pytest.raises(ValueError, match="expected Chatty to return a tensor"):
        export(Chatty(), (torch.zeros(1, 2),), tmp_path / "m.onnx")
    with pytest.raises(FormRefused, match="expected a form that onnx holds"):
        export(nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "m.onnx", form="int3")
    with pytest.raises(ValueError, match=r"expected a path ending in .*\.onnx"):
        export(nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "m.bin")
    with pytest.raises(ValueError, match="expected an example"):
        export(nn.Linear(2, 2), (torch.zeros(3, 2),), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="expected calibration inputs, got none"):
        export(nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "m.onnx", form="static_int8")
    assert list(tmp_path.iterdir()) == []


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    text = README.read_text(encoding="utf-8").split("## Compression alone")[1].split("\n## ")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    code = "\n".join(lines)
    assert 5 <= len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # what a reader would paste
    assert "top1_agreement=" in capsys.readouterr().out
    assert (tmp_path / "model.tflite").is_file()


def test_every_target_says_which_forms_it_holds():
    assert {"onnx", "tflite"} <= set(TARGETS)
    for target in TARGETS.values():
        assert {"dynamic_int8", "static_int8"} & set(target.forms) or target.runtime == "micro"
