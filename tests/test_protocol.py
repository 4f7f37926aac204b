"""Planning, asking and judging a device: on this computer for real, and against devices that lie."""

import base64
import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tacit.devices.local import LocalDevice
from tacit.devices.protocol import Artifact, judge, measure, plan
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from hostile_files import CRASHING_TFLITE

# Linear(12, 3) over a channel-last (1, 2, 2, 3) input, converted by litert-torch 0.10.
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
INPUTS = np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)


def onnx_bytes(width: int) -> bytes:
    """Flatten, MatMul (12 to width), MatMul (width to 3)."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    weights = {"w": rng.normal(size=(12, width)), "v": rng.normal(size=(width, 3))}
    graph = helper.make_graph(
        nodes,
        "two_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Judging.


def test_plans_support_the_percentiles_they_promise():
    assert judge(np.arange(1, 1 + plan("quick").min_runs)).p90_us is not None
    assert judge(np.arange(1, 1 + plan("full").min_runs)).p99_us is not None
    assert plan("quick").min_s >= 1
    assert plan("full").min_s >= 10
    with pytest.raises(ValueError, match="quick or full"):
        plan("slow")


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=800))
def test_a_judgement_orders_its_numbers_and_drops_what_is_unsupported(samples):
    latency = judge(np.array(samples))
    found = [value for value in (latency.min_us, latency.p50_us, latency.p90_us, latency.p99_us) if value is not None]
    assert found == sorted(found)
    assert latency.min_us == min(samples) / 1000
    supported = [latency.p50_us is not None, latency.p90_us is not None, latency.p99_us is not None]
    assert supported == [len(samples) >= least for least in (11, 64, 662)]
    assert ("few-samples" in latency.flags) == (len(samples) < 64)


def test_flags_say_what_is_wrong_and_nothing_else():
    rng = np.random.default_rng(0)
    steady = rng.normal(100_000, 1000, 1000).astype(np.int64)
    assert judge(steady).flags == ()
    assert judge(np.sort(steady + np.linspace(0, 9000, 1000).astype(np.int64))).flags == ("drift",)
    assert judge(rng.permutation(np.repeat([100, 130], 500)) * 1000).flags[0] == "noisy"
    assert judge(steady[:20]).flags == ("few-samples",)
    assert judge(steady, runs_per_sample=4).flags == ("averaged",)
    assert judge(steady, steal_share=0.1).flags == ("steal",)


@pytest.mark.parametrize("samples", [[], [0], [5, -1], [[1]]])
def test_samples_that_cannot_be_latencies_are_refused(samples):
    with pytest.raises(ValueError, match="expected positive samples_ns"):
        judge(np.array(samples))


# This computer.


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, Any], list[str]]:
    """Good and bad artifacts of both runtimes in one quick measurement."""
    folder = tmp_path_factory.mktemp("artifacts")
    artifacts = [
        Artifact(name="wide", path=write(folder / "wide.onnx", onnx_bytes(20_000))),
        Artifact(name="crashing", path=write(folder / "crash.tflite", CRASHING_TFLITE), input_layout="channel_last"),
        Artifact(name="narrow", path=write(folder / "narrow.onnx", onnx_bytes(4))),
        Artifact(name="lite", path=write(folder / "lite.tflite", TFLITE), input_layout="channel_last"),
        Artifact(name="pointer", path=write(folder / "p.onnx", b"version https://git-lfs.github.com/spec/v1")),
        Artifact(name="missing", path=folder / "missing.onnx"),
        Artifact(name="wrong layout", path=write(folder / "again.tflite", TFLITE)),
    ]
    said: list[str] = []
    with LocalDevice("desk") as device:
        return measure(device, artifacts, INPUTS, progress=said.append), said


def test_one_failing_artifact_loses_nobody_elses_numbers(measured):
    result, _ = measured
    assert list(result["artifacts"]) == ["wide", "narrow", "lite"]
    assert list(result["failed"]) == ["crashing", "pointer", "missing", "wrong layout"]
    assert "SIGSEGV" in result["failed"]["crashing"]
    assert "Git LFS" in result["failed"]["pointer"]


def test_a_quick_measurement_supports_its_percentiles(measured):
    for entry in measured[0]["artifacts"].values():
        assert entry["n"] >= 64
        assert 0 < entry["min_us"] <= entry["p50_us"] <= entry["p90_us"]
        assert entry["ci"]["p50_us"][0] <= entry["p50_us"] <= entry["ci"]["p50_us"][1]
        assert entry["load_us"] > 0
        assert entry["peak_memory_bytes"] > 0
        assert len(entry["samples_us"]) <= 256
        assert entry["samples_us"] == sorted(entry["samples_us"])
        assert entry["samples_us"][0] == entry["min_us"]


def test_a_model_with_5000_times_the_work_is_found_slower(measured):
    relative = measured[0]["artifacts"]["narrow"]["relative"]
    assert relative["to"] == "wide"
    assert 0 < relative["low"] <= relative["estimate"] <= relative["high"] < 1


def test_a_result_is_json_with_the_promised_keys(measured):
    result, said = measured
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["schema_version"], result["device"], result["mode"]) == (1, "desk", "quick")
    assert {"sha256", "runtime", "p99_us", "cv", "drift", "flags", "runs_per_sample"} <= set(
        result["artifacts"]["lite"]
    )
    assert result["facts"]["sandbox_network"] in {"none", "host"}
    assert set(result["conditions"]) == {"onnxruntime", "litert"}
    assert any("interleaved" in line for line in said)


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    twice = [Artifact(name="a", path=tmp_path / "a.onnx")] * 2
    with LocalDevice() as device:
        with pytest.raises(ValueError, match="different names"):
            measure(device, twice, INPUTS)
        with pytest.raises(ValueError, match="float32 inputs"):
            measure(device, twice[:1], INPUTS.astype(np.float64))
        assert measure(device, [], INPUTS)["artifacts"] == {}


# Devices that lie. Answers are what the seam takes: plain values.


class ScriptedDevice:
    """A device whose answers to ``time`` are given; it is honest about memory."""

    name = "scripted"

    def __init__(self, answer: Callable[[list[str]], Any], *, facts: dict[str, Any] | None = None) -> None:
        self._answer, self._facts = answer, facts or {}
        self.asked: list[dict[str, Any]] = []

    def put(self, path: Path) -> str:
        return path.name

    def get(self, remote: str) -> bytes:
        raise FileNotFoundError(remote)

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        if request["op"] == "memory":
            return {"peak_memory_bytes": 4096, "baseline_bytes": 8192, "load_ns": 1}
        answer = self._answer([model["name"] for model in request["models"]])
        if isinstance(answer, Exception):
            raise answer
        return answer


def lanes(names: list[str], **changes: Any) -> dict[str, Any]:
    lane = {"samples_ns": [1] * 100, "runs_per_sample": 1, **changes}
    return {"models": dict.fromkeys(names, lane), "steal_share": None, "before": {}, "after": {}}


def failures(tmp_path: Path, answer: Callable[[list[str]], Any]) -> dict[str, str]:
    artifact = Artifact(name="m", path=write(tmp_path / "m.onnx", onnx_bytes(2)))
    return measure(ScriptedDevice(answer), [artifact], INPUTS)["failed"]


def test_a_scripted_device_that_is_honest_is_believed(tmp_path):
    assert failures(tmp_path, lanes) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_ns": []},
        {"samples_ns": "100"},
        {"samples_ns": [0] * 100},
        {"samples_ns": [-5] * 100},
        {"samples_ns": [1.5] * 100},
        {"samples_ns": [math.nan] * 100},
        {"samples_ns": [True] * 100},
        {"samples_ns": ["<script>"] * 100},
        {"samples_ns": [10**30] * 100},
        {"samples_ns": [10**15] * 100},
        {"samples_ns": [1] * 100, "runs_per_sample": 0},
        {"runs_per_sample": 2.0},
        {"runs_per_sample": None},
    ],
)
def test_samples_that_cannot_be_true_are_refused(tmp_path, changes):
    assert set(failures(tmp_path, lambda names: lanes(names, **changes))) == {"m"}


def test_more_work_than_the_wall_clock_allows_is_refused(tmp_path):
    reason = failures(tmp_path, lambda names: lanes(names, runs_per_sample=10**6, samples_ns=[1] * 10**5))["m"]
    assert "timed work" in reason


@pytest.mark.parametrize("answer", [{}, {"models": []}, {"models": {"other": {}}}, {"models": {"m": None}}])
def test_an_answer_of_another_shape_is_refused(tmp_path, answer):
    assert set(failures(tmp_path, lambda names: answer)) == {"m"}


@pytest.mark.parametrize("share", [-0.1, 1.5, "0", math.nan, [0]])
def test_a_steal_share_that_is_no_share_is_refused(tmp_path, share):
    assert set(failures(tmp_path, lambda names: lanes(names) | {"steal_share": share})) == {"m"}


def test_an_artifact_that_breaks_the_common_process_is_found_by_timing_each_alone(tmp_path):
    def answer(names: list[str]) -> Any:
        return ArtifactCrashed("the model file crashed the runtime (SIGSEGV)") if "b" in names else lanes(names)

    artifacts = [Artifact(name=name, path=write(tmp_path / f"{name}.onnx", onnx_bytes(2))) for name in "abc"]
    device = ScriptedDevice(answer)
    result = measure(device, artifacts, INPUTS)
    assert list(result["artifacts"]) == ["a", "c"]
    assert result["failed"] == {"b": "the model file crashed the runtime (SIGSEGV)"}
    assert [len(request["models"]) for request in device.asked if request["op"] == "time"] == [3, 1, 1, 1]


def test_what_a_device_says_about_itself_is_cleaned(tmp_path):
    facts = {
        "cpu": "ARM\x1b[2J\r\nv8 " + "x" * 1000,
        "cores": 4,
        "temperature_c": math.inf,
        "../../key": "dropped",
        "nested": {"a": 1},
        **{f"extra_{number}": number for number in range(1000)},
    }
    result = measure(ScriptedDevice(lanes, facts=facts), [], INPUTS)
    assert result["facts"]["cores"] == 4
    assert result["facts"]["cpu"].isprintable()
    assert len(result["facts"]["cpu"]) <= 200
    assert not {"temperature_c", "../../key", "nested"} & set(result["facts"])
    assert len(result["facts"]) <= 64


def test_a_device_that_does_not_answer_at_all_is_an_error_of_the_measurement(tmp_path):
    class Silent(ScriptedDevice):
        def facts(self) -> dict[str, Any]:
            raise ArtifactRefused("no answer")

    with pytest.raises(ArtifactRefused, match="no answer"):
        measure(Silent(lanes), [], INPUTS)
