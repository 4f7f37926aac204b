"""What is made for microcontrollers runs in their own kernels, exactly, and says what it needs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import nn

from tacit.compression.export import export
from tacit.compression.export_micro import micro_files
from tacit.compression.forms import FormRefused
from tacit.compression.material import Material
from tacit.compression.passes import apply_passes, parse_passes
from tacit.compression.silence import silenced
from tacit.compression.tflite_graph import read_model, write_model
from tacit.compression.variant import VariantSpec, build_variant
from tacit.devices.micro import micro_needs
from tacit.devices.runtime import open_artifact
from tacit.devices.sandbox import ArtifactRefused

EXAMPLE = torch.zeros(1, 1, 8, 8)
FEW = 16


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 6, 1),
    )  # fmt: skip


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.apart = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.leave = nn.MaxPool2d(2), nn.Conv2d(8, 6, 1)

    def forward(self, image):
        entered = torch.relu(self.enter(image))
        return self.leave(self.pool(entered + torch.relu(self.apart(entered))))


class Large(nn.Module):
    """More than 256 KiB in eight bits, and two inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.look, self.wide = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 1024)
        self.first, self.second = nn.Linear(1024 + 3, 5), nn.Linear(1024 + 3, 4)

    def forward(self, image, row):
        seen = torch.relu(self.wide(torch.relu(self.look(image)).flatten(1)))
        both = torch.cat((seen, row), 1)
        return self.first(both), self.second(both)


def inputs_of(examples, count, seed):
    generator = np.random.default_rng(seed)
    return tuple(generator.standard_normal((count, *example.shape[1:])).astype(np.float32) for example in examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("micro")


@pytest.fixture(scope="module")
def small(folder):
    model = seeded(convolutions)
    calibration = inputs_of((EXAMPLE,), 64, 0)
    made = {
        form: export(model, (EXAMPLE,), folder / f"{form}.tflite", form=form, target="micro", calibration=calibration)
        for form in ("float32", "static_int8", "full_int8", "static_int16")
    }
    return model, made


@pytest.fixture(scope="module")
def large(folder):
    model, examples = seeded(Large), (EXAMPLE, torch.zeros(1, 3))
    calibration = inputs_of(examples, 64, 0)
    return model, export(
        model, examples, folder / "large.tflite", form="full_int8", target="micro", calibration=calibration
    )


def reference(path, inputs):
    """What LiteRT's reference kernels answer, and the scales of the outputs."""
    with silenced():
        interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
        interpreter.allocate_tensors()
    answers = []
    for example in zip(*inputs, strict=True):
        for node, values in zip(interpreter.get_input_details(), example, strict=True):
            laid = np.moveaxis(values, 0, -1) if values.ndim > 1 else values
            scale, zero = node["quantization"]
            if scale:
                limits = np.iinfo(node["dtype"])
                laid = np.clip(np.rint(laid / np.float32(scale)) + zero, limits.min, limits.max)
            interpreter.set_tensor(node["index"], np.ascontiguousarray(laid[None], dtype=node["dtype"]))
        interpreter.invoke()
        answers.append([interpreter.get_tensor(node["index"]) for node in interpreter.get_output_details()])
    details = interpreter.get_output_details()
    columns = [np.concatenate(column) for column in zip(*answers, strict=True)]
    scales = [node["quantization"][0] for node in details]
    return [
        (column.astype(np.float32) - node["quantization"][1]) * np.float32(scale) if scale else column
        for column, node, scale in zip(columns, details, scales, strict=True)
    ], scales


def on_micro(path, inputs, outputs=1):
    return open_artifact(path, input_layout="channel_last", runtime="micro").run(inputs, outputs=outputs)


def test_every_form_agrees_with_its_model_in_the_kernels_of_microcontrollers(small):
    model, made = small
    for artifact in made.values():
        artifact.check(model, inputs_of((EXAMPLE,), FEW, 1))


def test_convolutions_are_bit_for_bit_those_of_the_reference_kernels(folder):
    """Also behind a pool and an addition; a changed weight is noticed."""
    model = seeded(Branching)
    calibration, inputs = inputs_of((EXAMPLE,), 64, 0), inputs_of((EXAMPLE,), 64, 2)
    artifact = export(
        model, (EXAMPLE,), folder / "branching.tflite", form="full_int8", target="micro", calibration=calibration
    )
    wanted, _ = reference(artifact.path, inputs)
    (found,) = on_micro(artifact.path, inputs)
    assert np.array_equal(found, wanted[0])
    assert len(np.unique(found)) > 20
    changed = read_model(artifact.path)
    (weights, *_) = [t for t in changed.subgraphs[0].tensors if list(t.shape) == [6, 1, 1, 8]]
    changed.buffers[weights.buffer].data[0] ^= 3
    write_model(changed, folder / "changed.tflite")
    assert not np.array_equal(on_micro(folder / "changed.tflite", inputs)[0], wanted[0])


def test_the_root_of_a_norm_is_off_by_little_from_the_reference_kernels(small):
    """Of 16 bits the two runtimes look it up in tables that differ; seen through 8 bits that is a step, and seldom."""
    inputs, path = inputs_of((EXAMPLE,), 64, 2), small[1]["full_int8"].path
    wanted, scales = reference(path, inputs)
    steps = np.abs(on_micro(path, inputs)[0] - wanted[0]) / scales[0]
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.01


def test_a_file_past_256_kib_computes_right_and_the_quantisers_own_does_not(large, folder):
    """ai-edge-quantizer writes large buffers outside the flatbuffer, where TFLite Micro reads something else."""
    from ai_edge_quantizer import quantizer, recipe

    from tacit.compression.export_tflite import export_tflite

    model, artifact = large
    assert artifact.path.stat().st_size > 256 * 1024
    inputs = inputs_of((EXAMPLE, torch.zeros(1, 3)), FEW, 1)
    wanted, scales = reference(artifact.path, inputs)
    for found, right, scale in zip(on_micro(artifact.path, inputs, outputs=2), wanted, scales, strict=True):
        # Fully connected layers round once in LiteRT and twice in TFLite Micro: one step, and seldom.
        assert np.abs(found - right).max() <= 1.01 * scale
        assert (np.abs(found - right) > 0.5 * scale).mean() < 0.1
    artifact.check(model, inputs)

    plain, raw = folder / "plain.tflite", folder / "raw.tflite"
    export_tflite(model, (EXAMPLE, torch.zeros(1, 3)), plain)
    with silenced():
        quantise = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
        feeds = [
            {"input_0": np.moveaxis(image, 0, -1)[None], "input_1": row[None]}
            for image, row in zip(*inputs, strict=True)
        ]
        raw.write_bytes(quantise.quantize(quantise.calibrate({"serving_default": feeds})).quantized_model)
    wanted, scales = reference(raw, inputs)
    found = on_micro(raw, inputs, outputs=2)
    assert max(np.abs(f - w).max() / s for f, w, s in zip(found, wanted, scales, strict=True)) > 10


def test_the_arena_is_exact(small):
    from tflite_micro import runtime

    for artifact in small[1].values():
        content, needed = artifact.path.read_bytes(), micro_needs(artifact.path)
        assert 0 < needed["persistent_bytes"] < needed["arena_bytes"]
        assert needed["bytes"] == len(content)
        with silenced():
            runtime.Interpreter.from_bytes(content, arena_size=needed["arena_bytes"])
            with pytest.raises(RuntimeError):
                runtime.Interpreter.from_bytes(content, arena_size=needed["arena_bytes"] - 16)


def test_what_a_firmware_needs_is_written_beside(small, tmp_path):
    path = small[1]["full_int8"].path
    files = micro_files(path)
    assert sorted(files) == ["micro.json", "model.cc", "model.h"]
    facts = json.loads(files["micro.json"])
    assert facts["bytes"] == path.stat().st_size
    assert {"AddConv2D", "AddDepthwiseConv2D", "AddMean", "AddRsqrt", "AddMaxPool2D"} <= set(facts["ops"])
    array, header = files["model.cc"].decode(), files["model.h"].decode()
    assert bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2}),", array)) == path.read_bytes()
    assert f"MicroMutableOpResolver<{len(facts['ops'])}>" in header
    assert all(f"resolver.{method}()" in header for method in facts["ops"])
    assert f"kArenaBytes = {facts['arena_bytes']};" in header
    if shutil.which("g++"):
        _compile(files, facts["ops"], tmp_path)


def _compile(files, methods, folder):
    """With a stand-in for the one class of TFLite Micro that the header names."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    stand_in = folder / "tensorflow/lite/micro/micro_mutable_op_resolver.h"
    stand_in.parent.mkdir(parents=True)
    declared = " ".join(f"TfLiteStatus {method}() {{ return kTfLiteOk; }}" for method in methods)
    stand_in.write_text(
        "enum TfLiteStatus { kTfLiteOk };\n"
        "#define TF_LITE_ENSURE_STATUS(a) do { if ((a) != kTfLiteOk) return (a); } while (0)\n"
        f"namespace tflite {{ template <unsigned int n> class MicroMutableOpResolver {{ public: {declared} }}; }}\n"
    )
    (folder / "main.cc").write_text(
        '#include "model.h"\n#include <cstdint>\nint main() {\n'
        f"  tflite::MicroMutableOpResolver<{len(methods)}> resolver;\n"
        "  bool aligned = reinterpret_cast<std::uintptr_t>(g_model) % 16 == 0;\n"
        f"  bool whole = g_model_len == {json.loads(files['micro.json'])['bytes']} && g_model[5] == 'F';\n"
        "  return RegisterOps(resolver) == kTfLiteOk && aligned && whole ? 0 : 1;\n}\n"
    )
    build = ["g++", "-std=c++17", "-Wall", "-Werror", "-I.", "main.cc", "model.cc", "-o", "firmware"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True, timeout=60)
    subprocess.run([folder / "firmware"], check=True, timeout=10)


def test_a_variant_for_microcontrollers_comes_with_its_files(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    material = Material(example_inputs=EXAMPLE, public=torch.from_numpy(inputs_of((EXAMPLE,), 32, 0)[0]))
    passes = parse_passes([{"name": "full_int8"}])
    shaped = apply_passes(model, passes, material, seed=0)
    description = build_variant(VariantSpec("v", "micro", passes), shaped, material, tmp_path / "v", stamp={"a": "b"})
    assert description["label"] == "full-integer int8"
    names = sorted(path.name for path in (tmp_path / "v").iterdir())
    assert names == [
        "micro.json", "model.cc", "model.h", "model.tflite", "plan.json", "variant.json", "weights.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "v/micro.json").read_text())["bytes"] == description["bytes"]


@pytest.mark.parametrize("approximate", ["none", pytest.param("tanh", marks=pytest.mark.soak)])
def test_gelu_which_microcontrollers_lack_is_spelled_out(approximate, tmp_path):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.GELU(approximate=approximate), nn.Linear(16, 3)))
    artifact = export(model, (torch.zeros(1, 4),), tmp_path / "m.tflite", target="micro")
    rows = 4 * inputs_of((torch.zeros(1, 4),), FEW, 1)[0]
    rows[0] = 1e4
    assert artifact.compare(model, [rows[1:]])[0].max_abs < 1e-4
    assert np.isfinite(artifact.run([rows])[0]).all()
    whole = export(
        model, (torch.zeros(1, 4),), tmp_path / "q.tflite", target="micro", form="full_int8", calibration=(rows[1:],)
    )
    whole.check(model, [rows[1:]])


def test_what_the_kernels_lack_is_refused_by_name_and_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 8, 2))
    with pytest.raises(FormRefused, match=r"does not run it: .*CONV_3D.*choose the target tflite"):
        export(model, (torch.zeros(1, 1, 4, 4, 4),), tmp_path / "m.tflite", target="micro")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["dynamic_int8", "weight_int8", "weight_int4", "float16"])
def test_forms_that_the_kernels_do_not_know_are_refused_before_any_work(form, tmp_path):
    with pytest.raises(FormRefused, match="expected a form that micro holds"):
        export(nn.Linear(4, 2), (torch.zeros(1, 4),), tmp_path / "m.tflite", target="micro", form=form)


def test_a_hybrid_file_is_what_the_kernels_refuse(tmp_path):
    """Why the forms above are not offered."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    export(model, (EXAMPLE,), tmp_path / "m.tflite", form="dynamic_int8", target="tflite")
    with pytest.raises(ArtifactRefused, match="FLOAT32 with filter type: INT8 not supported"):
        micro_needs(tmp_path / "m.tflite")


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_damaged_file_harms_only_the_sandbox(damage, small, tmp_path):
    content = bytearray(small[1]["full_int8"].path.read_bytes())
    if damage == "zeros":
        content[16 : len(content) // 2] = bytes(len(content) // 2 - 16)
    kept = {"cut": len(content) // 3, "zeros": len(content), "empty": 0}[damage]
    Path(tmp_path / "m.tflite").write_bytes(content[:kept])
    with pytest.raises(ArtifactRefused):
        micro_needs(tmp_path / "m.tflite")
