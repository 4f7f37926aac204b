"""ExecuTorch programs for XNNPACK: they answer as their model, in one piece, or are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tacit.compression import lower_executorch as lowering
from tacit.compression.export import export
from tacit.compression.export_executorch import read_stamp_executorch, stamp_executorch
from tacit.compression.forms import FormRefused
from tacit.compression.spell_executorch import SpelledGroupNorm, SpelledLayerNorm, spelled
from tacit.compression.targets import TARGETS
from tacit.devices.runtime import open_artifact

pytest.importorskip("executorch", reason="needs tacit[executorch]")


class Residual(nn.Module):
    """Two inputs, two outputs, norms of images and of sequences, a padding that is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.table, self.steady, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, image, table):
        features = torch.relu(self.norm(self.conv(F.pad(image, (0, 2, 1, 1)))))
        features = features + self.mix(features)
        pooled = self.steady(features.mean((2, 3)) + self.table(table))
        return self.head(pooled), pooled


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = build().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def model():
    return seeded(Residual)


@pytest.fixture(scope="module")
def inputs():
    drawn = np.random.default_rng(1)
    return [drawn.standard_normal((24, *shape)).astype(np.float32) for shape in ((3, 9, 7), (5,))]


@pytest.fixture(scope="module")
def examples(inputs):
    return tuple(torch.zeros(1, *values.shape[1:]) for values in inputs)


@pytest.fixture(scope="module")
def written(model, inputs, examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pte")
    return {
        form: export(
            model, examples, folder / f"{form}.pte", form=form, calibration=tuple(values[:8] for values in inputs)
        )
        for form in ("float32", "dynamic_int8", "static_int8")
    }


@pytest.mark.parametrize(("form", "most"), [("float32", 1e-5), ("dynamic_int8", 0.1), ("static_int8", 0.6)])
def test_every_form_answers_as_its_model_in_the_runtime(written, model, inputs, form, most):
    found = written[form].check(model, inputs)
    assert len(found) == 2
    assert max(parity.max_abs for parity in found) < most
    assert form == "float32" or found[0].max_abs > 1e-5  # a control: it is another file


def test_nothing_of_the_model_is_left_outside_of_xnnpack(written):
    content = written["float32"].path.read_bytes()
    assert b"XnnpackBackend" in content
    assert content.count(b"native_group_norm") == content.count(b"native_layer_norm") == 0


def test_a_file_names_nothing_of_this_machine_and_is_the_same_twice(written, model, examples, tmp_path):
    again = export(model, examples, tmp_path / "again.pte").path.read_bytes()
    assert again == written["float32"].path.read_bytes()
    assert all(word not in again for word in (b"/work", b"/home", b".py", str(Path.home()).encode()))


def test_a_stamp_travels_behind_the_program_and_the_runtime_does_not_mind(written, model, inputs, tmp_path):
    path = tmp_path / "m.pte"
    program = written["float32"].path.read_bytes()
    path.write_bytes(program)
    assert read_stamp_executorch(path) == {}
    stamp_executorch(path, {"privacy_sha256": "0" * 64})
    stamp_executorch(path, {"privacy_sha256": "ab" * 32, "é": "ü"})
    assert read_stamp_executorch(path) == TARGETS["pte"].read_stamp(path) == {"privacy_sha256": "ab" * 32, "é": "ü"}
    stamped = path.read_bytes()
    text = json.dumps({"privacy_sha256": "ab" * 32, "é": "ü"}).encode()
    assert stamped == program + text + len(text).to_bytes(4, "little") + b"tacit.stamp"
    found = open_artifact(path).run(inputs, outputs=2)
    np.testing.assert_array_equal(found[0], written["float32"].run(inputs)[0])


def test_a_stamp_behind_a_program_without_weights_does_not_harm_it_either(tmp_path):
    artifact = export(nn.ReLU(), (torch.zeros(1, 3),), tmp_path / "m.pte")
    stamp_executorch(artifact.path, {"a": "b"})
    assert artifact.run([np.float32([[-1, 0, 2]])])[0].tolist() == [[0, 0, 2]]


def test_a_damaged_stamp_is_refused(tmp_path):
    path = tmp_path / "m.pte"
    path.write_bytes(b"x" + (99).to_bytes(4, "little") + b"tacit.stamp")
    with pytest.raises(ValueError, match="expected a stamp of the length"):
        read_stamp_executorch(path)
    path.write_bytes(b"[1]" + (3).to_bytes(4, "little") + b"tacit.stamp")
    with pytest.raises(ValueError, match="expected a JSON object of strings"):
        read_stamp_executorch(path)


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (6, 6), (2, 6), (3, 48), (1, 5)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_spelled_group_norm_is_one(groups, channels, offset):
    values = offset + torch.randn(1, channels, 5, 3, generator=torch.Generator().manual_seed(0))
    norm = seeded(lambda: nn.GroupNorm(groups, channels))
    right = norm.double()(values.double()).detach()
    for shape in (values.shape, (1, channels, 15)):
        found = SpelledGroupNorm(groups, norm.weight.float(), norm.bias.float(), norm.eps)(values.view(shape))
        assert float((found.view(values.shape) - right).abs().max()) < (1e-5 if offset == 0 else 2e-3)


def test_a_spelled_layer_norm_is_one():
    values = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    norm = seeded(lambda: nn.LayerNorm(6))
    assert torch.allclose(SpelledLayerNorm(norm.weight, norm.bias, norm.eps)(values), norm(values), atol=1e-6)


def test_a_spelled_model_computes_the_same(model, inputs, examples):
    for first, second in zip(*inputs, strict=True):
        given = torch.from_numpy(first[None]), torch.from_numpy(second[None])
        with torch.no_grad():
            for right, found in zip(model(*given), spelled(model, examples)(*given), strict=True):
                assert torch.allclose(found, right, atol=1e-5)
        break


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, values):
        return torch.linalg.eigvals(self.inner(values)[:, :, None] * values[:, None]).real


class Branching(nn.Module):
    def forward(self, values):
        return values if bool(values.sum() > 0) else -values


@pytest.mark.parametrize(
    ("build", "form", "message"),
    [
        (Sorted, "float32", "expected operators that ExecuTorch has, got aten.linalg_eig.default"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Branching()), "float32", "expected a model that torch.export takes"),
        (nn.ReLU, "static_int8", "expected most weights in convolutions and linear layers, .* got 0 of 0"),
        (nn.ReLU, "weight_int4", "expected a form that pte holds"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(tmp_path, build, form, message):
    calibration = (np.eye(4, dtype=np.float32),)
    with pytest.raises(FormRefused, match=message):
        export(build(), (torch.zeros(1, 4),), tmp_path / "m.pte", form=form, calibration=calibration)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_sequences_with_strides_dilations_groups_and_words_for_padding_agree_in_int8(tmp_path):
    """Their convolutions become those of images, and are quantised as such."""
    layers = [
        nn.Conv1d(3, 8, 5, padding="same"),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, padding="same", groups=2, dilation=2),
        nn.Tanh(),
        nn.Conv1d(8, 12, 3, stride=2, padding=2, dilation=2),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ]
    model = seeded(lambda: nn.Sequential(*layers))
    inputs = np.random.default_rng(3).standard_normal((12, 3, 17)).astype(np.float32)
    for form, most in (("float32", 1e-5), ("static_int8", 0.1)):
        path = tmp_path / f"{form}.pte"
        artifact = export(model, (torch.zeros(1, 3, 17),), path, form=form, calibration=(inputs,))
        assert artifact.check(model, [inputs])[0].max_abs < most


def test_convolutions_of_sequences_have_no_dynamic_form(tmp_path):
    with pytest.raises(FormRefused, match=r"got layer '0' after 3 axes"):
        export(nn.Sequential(nn.Conv1d(3, 4, 3)), (torch.zeros(1, 3, 9),), tmp_path / "m.pte", form="dynamic_int8")


def test_a_program_that_computes_something_else_is_refused(written, model, inputs, examples):
    content = written["float32"].path.read_bytes()
    probes = lowering.probes(examples, None)
    lowering.check_program(content, model, probes)
    other = seeded(Residual)
    other.head.bias.data.add_(0.1)
    with pytest.raises(FormRefused, match="expected XNNPACK to compute what the model does, got outputs off by"):
        lowering.check_program(content, other, probes)
    with pytest.raises(FormRefused, match="expected a program that runs"):
        lowering.check_program(content[:200], model, probes)


def test_whole_numbers_and_embeddings(tmp_path):
    words = seeded(lambda: nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 3)))
    tokens = np.random.default_rng(0).integers(0, 11, (9, 5))
    artifact = export(words, (torch.zeros(1, 5, dtype=torch.int64),), tmp_path / "m.pte")
    assert artifact.check(words, [tokens])[0].max_abs < 1e-5
