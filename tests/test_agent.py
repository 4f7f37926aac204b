"""The agent and the runtimes in the sandbox, on real model files."""

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tacit.devices import agent
from tacit.devices.local import LocalDevice
from tacit.devices.runtime import Runtime, identify, open_artifact
from tacit.devices.sandbox import ArtifactRefused, ArtifactTimeout, Limits

# Linear(12, 3) over a channel-last (1, 2, 2, 3) input, converted by litert-torch 0.10 and kept as bytes, so that these
# tests need neither torch nor a converter. Its weights are those of WEIGHTS and BIAS.
TFLITE = zlib.decompress(
    base64.b64decode(
        "eNrFVL9v01AQPrumcdIoRCIKCEUiQweGYgJkQALRSCAEUkAIMSCWp9C8NhaJXTl2hRBDxcjExMzAwMD/AAMDQ/8MZsTEQon57r1z64ouTET6/M"
        "7v7r776XSI6NHt4ZUWdckjn+rUpBbuzlDHnEvAHeA68Ngh6Im+AAOgCvRPEPWAjx7RBxj3gS7eO0Ad9nuwcdgeDxfnSzy+OfauSfyr4awjsgfJ"
        "8neALnASmOtkJ4y21FhvjrJpavxawnke8MXXh4yQkMjIcZZuZ6nqcYSfv/Kc75eBUbI151tX6uL7r3me++J3Gnim9baap6OnUz2ZxmojjvASpX"
        "Rj3/Iw0iTTHJsjF74V4BQwCyOVZFEazrTa0ck8jCN6Ib5c8+WgF5jE5Md13hvefdi9GUewT/U4wE0DMzicSENmwH6r0oMil9kojJiHa/ohs3Gk"
        "H47E4NqvYjbvYPTesbNk5cRoG3RWIlUkFpdU9LhTmpVvzoqZFTMUcZYkF1diPkdPq9amyvonv/OcVX3JhXlYPvf3jFUxOxEOODnGnuGpmT3h7t"
        "QkN09sihxI7LmmFXN6xqdtVW22/S45rUoNvvSW7ZTirioV3L92iUp1se7Bgv3amI+PWoovxvbF8rtOt7SL3L+Vo5yGizmb4Hq7sLvhl2K8Xtjc"
        "bkkdrGP5whGei2mcbEyCKApm8Tib6nkwDSM9SoKhOdSmSd496AXRLniXcxvvjcl18BkPYPeTrWF33a7QYPA/dK/yw7rdUt1r/1g3lXbGw5Q8+Q"
        "p882ZnU7cJrEsug2KmdOxMyVkTzmJ328fsbvH/UuyjW+r/vum7Z3R/AAU3zXs="
    )
)
WEIGHTS = (np.arange(36).reshape(3, 12) % 7 - 3).astype(np.float32)  # (classes, features)
BIAS = np.array([0.5, -1.0, 2.0], dtype=np.float32)


def onnx_bytes(shape: tuple[int, ...], *, batch: int | str = "n", source_type: int = TensorProto.FLOAT) -> bytes:
    """Flatten, MatMul, Add: the same linear model on 12 features of any shape."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["features"]),
        helper.make_node("Cast", ["features"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["floats", "w"], ["products"]),
        helper.make_node("Add", ["products", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", source_type, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(WEIGHTS.T.copy(), "w"), numpy_helper.from_array(BIAS, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def linear(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), 12) @ WEIGHTS.T + BIAS


@pytest.fixture
def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 3, 2, 2)).astype(np.float32)


def test_onnx_predictions_are_those_of_the_formula(tmp_path, inputs):
    runtime = open_artifact(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2))))
    np.testing.assert_allclose(runtime.predict(inputs), linear(inputs), rtol=1e-5, atol=1e-5)
    assert runtime.name == "onnxruntime"
    assert re.match(r"1\.\d+", runtime.version)


def test_litert_predictions_are_those_of_the_formula_on_channel_last_data(tmp_path, inputs):
    runtime: Runtime = open_artifact(write(tmp_path / "m.tflite", TFLITE), input_layout="channel_last")
    expected = linear(inputs.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(runtime.predict(inputs), expected, rtol=1e-5, atol=1e-5)
    # Negative control: the layout matters, for these weights and inputs.
    assert abs(expected - linear(inputs)).max() > 1
    assert runtime.name == "litert"


def test_channel_last_onnx_is_fed_channel_last_data(tmp_path, inputs):
    runtime = open_artifact(write(tmp_path / "m.onnx", onnx_bytes((2, 2, 3))), input_layout="channel_last")
    np.testing.assert_allclose(runtime.predict(inputs), linear(inputs.transpose(0, 2, 3, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", ["n", 1])
def test_fixed_and_free_batches_predict_alike(tmp_path, inputs, batch):
    runtime = open_artifact(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2), batch=batch)))
    np.testing.assert_allclose(runtime.predict(inputs), linear(inputs), rtol=1e-5, atol=1e-5)


def test_a_suffix_in_capitals_is_recognised(tmp_path, inputs):
    assert open_artifact(write(tmp_path / "M.ONNX", onnx_bytes((3, 2, 2)))).predict(inputs).shape == (7, 3)


def test_nan_in_the_inputs_reaches_the_outputs_unhidden(tmp_path, inputs):
    inputs[2] = np.nan
    outputs = open_artifact(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2)))).predict(inputs)
    assert np.isnan(outputs).all(axis=1).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.onnx", b"", "empty"),
        ("m.tflite", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        ("m.onnx", b"\n<!DOCTYPE html><html>404</html>", "web page"),
        ("m.onnx", TFLITE, "content of a .onnx file"),
        ("m.tflite", b"\x08\x0a" * 40, "content of a .tflite file"),
        ("m.pkl", b"\x80\x04", "a pickle"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_what_it_is(tmp_path, name, content, reason):
    with pytest.raises(ArtifactRefused, match=re.escape(reason)):
        open_artifact(write(tmp_path / name, content))


def test_a_file_that_does_not_exist_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a model file"):
        identify(tmp_path / "m.onnx")


@pytest.mark.parametrize(("name", "model"), [("m.onnx", onnx_bytes((3, 2, 2))), ("m.tflite", TFLITE)])
def test_a_truncated_model_is_refused_and_harms_nobody(tmp_path, inputs, name, model):
    path = write(tmp_path / name, model[: len(model) // 2])
    with pytest.raises(ArtifactRefused):
        open_artifact(path, input_layout="channel_last").predict(inputs)


def test_a_model_that_takes_integers_is_refused(tmp_path, inputs):
    runtime = open_artifact(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2), source_type=TensorProto.INT64)))
    with pytest.raises(ArtifactRefused, match="expected int64 inputs, got float32"):
        runtime.predict(inputs)


@pytest.mark.parametrize("inputs", [np.zeros((1, 12)), np.zeros((0, 12), np.float32), np.zeros(12, np.float32)])
def test_inputs_that_were_not_preprocessed_are_refused(tmp_path, inputs):
    with pytest.raises(ValueError, match="expected float32 inputs"):
        open_artifact(write(tmp_path / "m.onnx", onnx_bytes((12,)))).predict(inputs)


def test_wrong_arguments_are_refused_at_the_door(tmp_path):
    path = write(tmp_path / "m.onnx", onnx_bytes((12,)))
    with pytest.raises(ValueError, match="threads=0"):
        open_artifact(path, threads=0)
    with pytest.raises(ValueError, match="channel_middle"):
        open_artifact(path, input_layout="channel_middle")


# The agent alone, as it runs on a device: copied out of the project, with nothing of it on the path.


def ask(folder: Path, request: Any, **environment: str) -> tuple[int, dict[str, Any]]:
    shutil.copy(agent.__file__, folder / "agent.py")
    text = request if isinstance(request, str) else json.dumps(request)
    done = subprocess.run(
        [sys.executable, "agent.py"], cwd=folder, input=text.encode(), capture_output=True, check=False, env=environment
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path, inputs) -> Path:
    np.save(tmp_path / "inputs.npy", inputs)
    write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2)))
    write(tmp_path / "m.tflite", TFLITE)
    return tmp_path


ONNX = {"name": "onnx", "path": "m.onnx", "runtime": "onnxruntime", "layouts": ["channel_first"]}
LITERT = {"name": "litert", "path": "m.tflite", "runtime": "litert", "layouts": ["channel_last"]}


def timing(*models: dict[str, Any], **changes: Any) -> dict[str, Any]:
    brief = {"min_runs": 70, "min_s": 0.05, "max_s": 5, "warmup_s": 0.02, "max_warmup_s": 1, "min_warmup_runs": 10}
    return {"op": "time", "models": list(models), "inputs": ["inputs.npy"], **brief, **changes}


def test_the_agent_imports_nothing_of_the_project_and_stays_short():
    source = Path(agent.__file__).read_text()
    assert not re.search(r"^\s*(from|import) tacit", source, re.MULTILINE)
    assert len(source.splitlines()) < 400


def test_the_agent_predicts_alone(folder, inputs):
    request = {"op": "predict", "model": ONNX, "inputs": ["inputs.npy"], "outputs": ["outputs.npy"]}
    assert ask(folder, request) == (0, {"n": 7})
    np.testing.assert_allclose(np.load(folder / "outputs.npy"), linear(inputs), rtol=1e-5, atol=1e-5)


def test_timing_two_runtimes_side_by_side_returns_enough_samples_of_each(folder):
    status, answer = ask(folder, timing(ONNX, LITERT))
    assert status == 0
    assert set(answer["models"]) == {"onnx", "litert"}
    for lane in answer["models"].values():
        spent_s = sum(lane["samples_ns"]) * lane["runs_per_sample"] / 1e9
        assert len(lane["samples_ns"]) >= 70
        assert 0.045 <= spent_s < 1  # rounded down to whole nanoseconds; one block past the minimum
        assert len(lane["samples_ns"]) % lane["block_samples"] == 0
        assert lane["warmup"]["runs"] >= 10


def test_timing_ends_at_its_cap_though_the_runs_are_too_few(folder):
    status, answer = ask(folder, timing(ONNX, min_runs=10**9, max_s=0.1))
    assert status == 0
    assert 0 < len(answer["models"]["onnx"]["samples_ns"]) < 10**6


def test_timing_stops_a_model_at_its_cap_and_lets_the_others_go_on(folder):
    """The first takes 200 ms a run by an adapter, so it is at its cap after few blocks."""
    write(folder / "slow.py", SLOW_ADAPTER)
    slow = {**ONNX, "name": "slow", "adapter": "slow.py"}
    status, answer = ask(folder, timing(slow, ONNX, min_runs=40, max_s=0.5, max_warmup_s=0.3))
    assert status == 0
    lengths = {name: len(lane["samples_ns"]) for name, lane in answer["models"].items()}
    assert lengths["slow"] <= 4
    assert lengths["onnx"] >= 40


SLOW_ADAPTER = b"""
import time
import numpy as np

def open_model(path, threads):
    def infer(feeds):
        time.sleep(0.2)
        return feeds
    return infer, [(np.dtype("float32"), 0.0, 0)], [(np.dtype("float32"), 0.0, 0)]
"""


def test_a_run_that_gives_the_processor_away_is_marked(folder):
    write(folder / "slow.py", SLOW_ADAPTER.replace(b"0.2", b"0.002"))
    _, answer = ask(folder, timing({**ONNX, "adapter": "slow.py"}, min_s=0.05, min_runs=10))
    lane = answer["models"]["onnx"]
    assert lane["disturbed"] == list(range(len(lane["samples_ns"])))


def test_a_warm_up_ends_when_the_median_has_settled_or_at_its_cap(folder):
    drifting = b"""
import time
import numpy as np
took = [0.001]

def open_model(path, threads):
    def infer(feeds):
        took[0] *= 1.02
        time.sleep(took[0])
        return feeds
    return infer, [(np.dtype("float32"), 0.0, 0)], [(np.dtype("float32"), 0.0, 0)]
"""
    write(folder / "drifting.py", drifting)
    request = timing({**ONNX, "adapter": "drifting.py"}, min_runs=1, min_s=0.01, max_s=0.1, max_warmup_s=0.4)
    warmup = ask(folder, request)[1]["models"]["onnx"]["warmup"]
    assert warmup["spent_ns"] >= 0.4e9
    assert warmup["slope"] > 0.02
    steady = ask(folder, {**request, "models": [{**ONNX, "adapter": "slow.py"}]})
    assert steady[0] == 3  # no such adapter here
    write(folder / "slow.py", SLOW_ADAPTER.replace(b"0.2", b"0.002"))
    warmup = ask(folder, {**request, "models": [{**ONNX, "adapter": "slow.py"}], "max_warmup_s": 20})[1]["models"]
    assert warmup["onnx"]["warmup"]["spent_ns"] < 20e9
    assert abs(warmup["onnx"]["warmup"]["slope"]) < 0.02


def test_watched_files_are_read_before_and_after(folder):
    write(folder / "temp", b"48250\n" + b"x" * 1000)
    _, answer = ask(folder, timing(ONNX, watch=[f"{folder}/t*p", f"{folder}/none*"]))
    assert answer["readings"] == [{str(folder / "temp"): "48250\n" + "x" * 194}] * 2


def test_a_sustained_run_tells_its_seconds_in_order_the_rest_first(folder):
    request = {**timing(), "op": "sustain", "model": LITERT, "seconds": 2, "idle_s": 1, "watch": ["/proc/loadavg"]}
    status, answer = ask(folder, request)
    assert status == 0
    rows = answer["buckets"]
    assert len(answer["readings"]) == len(rows) + 1
    assert [bool(runs) for _, _, runs, _ in rows] == [False] + [True] * (len(rows) - 1)
    assert all(early[0] + early[1] <= late[0] for early, late in itertools.pairwise(rows))
    assert all(spent_ns >= 0.99e9 for _, spent_ns, _, _ in rows)
    for _, spent_ns, runs, median_ns in rows[1:]:
        assert 0 < median_ns * (runs // 2) <= spent_ns


def test_a_cold_start_is_taken_apart(folder):
    status, answer = ask(folder, {"op": "cold", "model": ONNX, "inputs": ["inputs.npy"], "runs": 1})
    assert status == 0
    assert answer["import_ns"] > answer["load_ns"] > answer["first_ns"] > 0  # 40 ms, 4 ms, 0.3 ms
    assert {"peak_memory_bytes", "baseline_bytes"} < set(answer)


def test_an_adapters_import_is_not_taken_for_loading(folder):
    write(folder / "late.py", SLOW_ADAPTER + b"def import_runtime():\n    time.sleep(0.5)\n")
    request = {"op": "cold", "model": {**ONNX, "adapter": "late.py"}, "inputs": ["inputs.npy"], "runs": 1}
    _, answer = ask(folder, request)
    assert answer["import_ns"] >= 0.5e9


def test_one_interruption_does_not_decide_where_the_time_goes(folder):
    """An operator that runs once for each inference is told by its median; of others all that they took is added."""
    lines = ["import numpy", "def open_profiled(path, threads):"]
    lines += ["    def operators():"]
    lines += ["        once = [('conv', 'Conv', 9000)] + [('conv', 'Conv', 100)] * 9 + [('conv', 'Conv', 50000)]"]
    lines += ["        return once + [('add', 'Add', 7)] * 22 + [('add', 'Add', 1000)]"]
    lines += ["    port = [(numpy.dtype('float32'),)]", "    return lambda feeds: feeds, port, port, operators"]
    (folder / "profiled.py").write_text("\n".join(lines) + "\n")
    request = {"op": "profile", "model": {**ONNX, "adapter": "profiled.py"}, "inputs": ["inputs.npy"], "runs": 10}
    status, answer = ask(folder, request)
    assert status == 0, answer
    assert answer["operators"] == [["add", "Add", 22, 21 * 7 + 1000], ["conv", "Conv", 10, 1000]]


def test_a_profile_names_the_operators_and_leaves_out_the_first_run(folder):
    request = {"op": "profile", "model": ONNX, "inputs": ["inputs.npy"], "runs": 20}
    status, answer = ask(folder, request)
    assert status == 0
    assert {kind for _, kind, _, _ in answer["operators"]} >= {"Gemm"}
    assert {count for _, _, count, _ in answer["operators"]} == {20}
    totals = [total_ns for *_, total_ns in answer["operators"]]
    assert totals == sorted(totals, reverse=True)
    assert ask(folder, {**request, "model": LITERT}) == (0, {"operators": None})  # LiteRT's Python has no profiler


def test_memory_of_a_model_grows_with_its_weights(folder):
    big = onnx.load_from_string(onnx_bytes((3, 2, 2)))
    weights = np.zeros((12, 2_000_000), dtype=np.float32)  # 96 MB
    big.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    big.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(2_000_000, np.float32), "b"))
    big.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2_000_000
    write(folder / "big.onnx", big.SerializeToString())
    request = {"op": "memory", "model": ONNX, "inputs": ["inputs.npy"], "runs": 2}
    _, small = ask(folder, request)
    _, large = ask(folder, {**request, "model": {**ONNX, "path": "big.onnx"}})
    assert 0 < small["peak_memory_bytes"] < 64 << 20
    assert large["peak_memory_bytes"] - small["peak_memory_bytes"] > 90_000_000
    assert small["baseline_bytes"] > 10 << 20
    assert small["load_ns"] > 0


def test_onnx_runtime_leaves_no_telemetry_identifier_behind(folder):
    """Imported as it comes, ONNX Runtime 1.32 writes ~/.cache/Microsoft/DeveloperTools/.onnxruntime/deviceid."""
    request = {"op": "memory", "model": ONNX, "inputs": ["inputs.npy"], "runs": 1}
    home = folder / "home"
    home.mkdir()
    assert ask(folder, request, HOME=str(home))[0] == 0
    assert list(home.rglob("*")) == []


def test_facts_are_flat_and_name_the_versions(folder):
    status, facts = ask(folder, {"op": "facts"})
    assert status == 0
    assert facts["numpy"] == np.__version__
    assert facts["cores"] == os.cpu_count()
    assert all(value is None or isinstance(value, str | int | float) for value in facts.values())


def test_a_model_with_another_digest_is_not_run(folder):
    digest = hashlib.sha256((folder / "m.onnx").read_bytes()).hexdigest()
    request = {"op": "memory", "model": {**ONNX, "sha256": digest}, "inputs": ["inputs.npy"], "runs": 1}
    assert ask(folder, request)[0] == 0
    request["model"]["sha256"] = digest[::-1]
    status, answer = ask(folder, request)
    assert status == 3
    assert "expected sha256" in answer["error"]


@pytest.mark.parametrize("request_", ["", "not json", "[]", {"op": "reboot"}, {"op": "predict"}, {}])
def test_a_request_that_makes_no_sense_gets_an_error_as_json(folder, request_):
    status, answer = ask(folder, request_)
    assert status == 3
    assert set(answer) == {"error", "kind"}


def test_a_runtime_that_prints_does_not_spoil_the_answer(folder):
    noisy = folder / "ai_edge_litert"
    noisy.mkdir()
    write(noisy / "__init__.py", b"")
    write(noisy / "interpreter.py", b"import os; os.write(1, b'noise' * 1000)\nraise ImportError('told you')")
    status, answer = ask(folder, {"op": "memory", "model": LITERT, "inputs": ["inputs.npy"], "runs": 1})
    assert (status, answer["error"]) == (3, "told you")


# The device that is this computer.


def test_a_device_gives_back_what_was_put(tmp_path):
    with LocalDevice() as device:
        remote = device.put(write(tmp_path / "..weird; name.BIN", b"content"))
        assert device.get(remote) == b"content"
        assert re.fullmatch(r"[0-9a-f]{32}\.bin", remote)


@pytest.mark.parametrize("remote", ["../secret", "/etc/passwd", "", ".", "..", "a/b", "A", "x" * 99])
def test_a_name_that_is_a_path_is_refused(remote):
    with LocalDevice() as device, pytest.raises(ValueError, match="expected a name"):
        device.get(remote)


def test_a_link_made_by_the_agent_is_not_followed(tmp_path):
    with LocalDevice() as device:
        folder = device._folder
        (folder / "outputs.npy").symlink_to(write(tmp_path / "secret", b"secret"))
        with pytest.raises(ArtifactRefused, match="plain file"):
            device.get("outputs.npy")


def test_closing_a_device_removes_its_files(tmp_path):
    device = LocalDevice()
    device.put(write(tmp_path / "m.bin", b"content"))
    folder = device._folder
    assert any(folder.iterdir())
    device.close()
    assert not folder.exists()


def test_nothing_in_the_working_folder_is_imported(tmp_path, inputs):
    with LocalDevice() as device:
        np.save(tmp_path / "inputs.npy", inputs)
        remote = device.put(write(tmp_path / "m.tflite", TFLITE))
        # The agent's working folder is not on its path, so that a file put there is never imported.
        write(device._folder / "onnxruntime.py", b"raise SystemExit('imported')")
        model = {"name": "m", "path": remote, "runtime": "onnxruntime", "layouts": ["channel_first"]}
        with pytest.raises(ArtifactRefused, match="ONNXRuntimeError"):
            device.run({"op": "memory", "model": model, "inputs": [device.put(tmp_path / "inputs.npy")], "runs": 1})


def test_a_request_beyond_its_time_is_ended(tmp_path, inputs):
    with LocalDevice(limits=Limits(wall_s=30)) as device:
        np.save(tmp_path / "inputs.npy", inputs)
        remote = device.put(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2))))
        request = timing({**ONNX, "path": remote}, min_s=600, max_s=600, limit_s=1.5)
        with pytest.raises(ArtifactTimeout):
            device.run({**request, "inputs": [device.put(tmp_path / "inputs.npy")]})
