"""Planning, asking and judging a device: on this computer for real, and against devices that lie."""

import base64
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tacit.devices.answers import DeviceUnreachable
from tacit.devices.asking import Sustained
from tacit.devices.entries import sustained_entry
from tacit.devices.judgement import has_slowed
from tacit.devices.local import LocalDevice
from tacit.devices.protocol import Artifact, Evaluation, Extras, judge, measure, plan
from tacit.devices.runtime import open_artifact
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused
from tacit.devices.side_answers import Bucket, believe_buckets, believe_cold, believe_operators

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
    assert judge(steady, waiting_share=0.1).flags == ("contended",)
    fast, slow = {"cur_freq_khz": 1_800_000}, {"cur_freq_khz": 1_000_000}
    assert judge(steady, before=fast, after=slow).flags == ("throttled",)
    assert judge(steady, after={"governor": "powersave"}).flags == ("governor",)
    assert judge(steady, after={"governor": "performance"}).flags == ()


def test_p999_is_given_from_6636_samples_on():
    assert judge(np.arange(1, 6636)).p999_us is None
    latency = judge(np.random.default_rng(0).permutation(np.arange(1, 6637)))
    assert latency.p999_us == 6.63
    assert latency.ci["p999_us"] is None or latency.ci["p999_us"][0] <= 6.63 <= latency.ci["p999_us"][1]
    assert latency.ci["p99_us"][0] <= latency.p99_us <= latency.ci["p99_us"][1]


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
        interval = entry["ci"]["p50_us"]
        assert interval is None or interval[0] <= entry["p50_us"] <= interval[1]  # None on a machine that is too busy
        assert entry["load_us"] > 0
        assert entry["peak_memory_bytes"] > 0
        assert len(entry["samples_us"]) <= 256
        assert entry["samples_us"] == sorted(entry["samples_us"])
        assert entry["samples_us"][0] == entry["min_us"]


def test_a_quick_measurement_tells_of_cold_starts_warm_up_and_processes(measured):
    for entry in measured[0]["artifacts"].values():
        cold = entry["cold"]
        assert (cold["n"], cold["page_cache"], cold["confidence"]) == (5, "warm", 0.9375)
        for part in ("import_us", "load_us", "first_us", "total_us"):
            assert 0 < cold[part]["low"] <= cold[part]["estimate"] <= cold[part]["high"]
        assert entry["load_us"] == cold["load_us"]["estimate"]
        assert entry["processes"] == len(entry["warmup"]) == 3
        assert all(warmup["runs"] >= 10 and 0.2 <= warmup["s"] < 5 for warmup in entry["warmup"])
        assert 20 <= len(entry["block_medians_us"]) <= 512
        assert 0 <= entry["undisturbed"]["n"] <= entry["n"]
        assert entry["key"] == f"{entry['sha256']}-{entry['runtime']}-quick-1"
        asked_for = ("sustained", "energy", "profile", "accuracy")
        assert [entry[part] for part in asked_for] == [None] * 4
        assert entry["not_measured"] == {}


def test_what_is_known_is_not_measured_again_and_the_rest_is_compared_with_it(measured, tmp_path):
    entries = measured[0]["artifacts"]
    known = {entries[name]["key"]: entries[name] for name in ("wide", "lite")}
    artifacts = [
        Artifact(name="wide", path=write(tmp_path / "wide.onnx", onnx_bytes(20_000))),
        Artifact(name="narrow", path=write(tmp_path / "narrow.onnx", onnx_bytes(4))),
        Artifact(name="lite", path=write(tmp_path / "lite.tflite", TFLITE), input_layout="channel_last"),
    ]
    kept: dict[str, Any] = {}
    device = ScriptedDevice(lanes)
    result = measure(device, artifacts, INPUTS, known=known, keep=kept.__setitem__)
    assert {name: entry is entries.get(name) for name, entry in result["artifacts"].items()} == {
        "wide": True, "narrow": False, "lite": True,
    }  # fmt: skip
    assert list(kept) == ["narrow"]
    assert kept["narrow"]["relative"]["to"] == "wide"
    assert [request["op"] for request in device.asked] == ["memory", "cold", "time", "time", "time"]
    assert measure(device, artifacts, INPUTS, known={**known, kept["narrow"]["key"]: kept["narrow"]})["failed"] == {}
    assert len(device.asked) == 5  # nothing more was asked


def test_another_mode_or_number_of_threads_is_another_result(measured, tmp_path):
    entry = measured[0]["artifacts"]["wide"]
    artifact = Artifact(name="wide", path=write(tmp_path / "wide.onnx", onnx_bytes(20_000)), threads=2)
    device = ScriptedDevice(lanes)
    result = measure(device, [artifact], INPUTS, known={entry["key"]: entry})
    assert result["artifacts"]["wide"]["threads"] == 2
    assert {request["models"][0]["threads"] for request in device.asked if request["op"] == "time"} == {2}
    assert list(result["conditions"]) == ["onnxruntime, 2 threads"]


def test_a_device_that_is_lost_midway_loses_nothing_that_was_complete(tmp_path):
    def answer(names: list[str]) -> Any:
        return DeviceUnreachable("unplugged") if "lite" in names else lanes(names)

    artifacts = [
        Artifact(name="a", path=write(tmp_path / "a.onnx", onnx_bytes(2))),
        Artifact(name="lite", path=write(tmp_path / "lite.tflite", TFLITE), input_layout="channel_last"),
    ]
    kept: dict[str, Any] = {}
    with pytest.raises(DeviceUnreachable):
        measure(ScriptedDevice(answer), artifacts, INPUTS, keep=kept.__setitem__)
    assert list(kept) == ["a"]


def test_what_is_asked_for_beside_the_latency_is_measured_or_said_not_to_be(tmp_path):
    inputs = np.random.default_rng(1).normal(size=(40, 3, 2, 2)).astype(np.float32)
    onnx_file = write(tmp_path / "m.onnx", onnx_bytes(64))
    with LocalDevice() as device:
        predicted = open_artifact(onnx_file).predict(inputs)
        labels = predicted.argmax(axis=1)
        labels[:10] = (labels[:10] + 1) % 3
        artifacts = [
            Artifact(name="m", path=onnx_file),
            Artifact(name="lite", path=write(tmp_path / "l.tflite", TFLITE), input_layout="channel_last"),
        ]
        evaluation = Evaluation(inputs=inputs, labels=labels, expected=predicted)
        extras = Extras(sustained_s=2, profile=True, evaluation=evaluation)
        result = measure(device, artifacts, INPUTS, extras=extras)
    entry, lite = result["artifacts"]["m"], result["artifacts"]["lite"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert entry["accuracy"]["top1"]["estimate"] == 0.75
    assert entry["accuracy"]["top1"]["low"] < 0.75 < entry["accuracy"]["top1"]["high"]
    assert (entry["accuracy"]["agreement"]["estimate"], entry["accuracy"]["max_abs"]) == (1.0, 0.0)
    assert lite["accuracy"]["agreement"]["estimate"] < 1  # another model
    assert {row["type"] for row in entry["profile"]["operators"]} & {"MatMul", "Gemm", "FusedMatMul"}
    assert entry["profile"]["us"] == pytest.approx(sum(entry["profile"]["by_type_us"].values()))
    assert len(entry["sustained"]["median_us"]) >= 2
    assert entry["sustained"]["waiting_share"] is None or 0 <= entry["sustained"]["waiting_share"] < 1
    assert lite["profile"] is None
    assert "litert has no profiler" in lite["not_measured"]["profile"]
    # Whether this computer tells its energy or not, it is never a zero.
    assert entry["energy"] is None or entry["energy"]["idle_w"] > 0
    assert ("energy" in entry["not_measured"]) == (entry["energy"] is None)


# Conditions, as values.


@pytest.mark.parametrize(("is_fixed", "flags"), [(None, ("governor",)), (False, ("governor",)), (True, ())])
def test_a_clock_that_may_change_is_flagged_unless_a_phone_holds_it(is_fixed, flags):
    after = {"governor": "schedutil", "fixed_performance": is_fixed}
    assert judge(np.full(64, 5000), before=after, after=after).flags == flags


def test_a_devices_own_words_go_before_its_files_where_it_has_some(tmp_path):
    class Told(LocalDevice):
        """Whose own words know better than its files, where they know anything."""

        def run(self, request):
            answer = super().run(request)
            if request["op"] != "time":
                return answer
            read = {
                "/sys/class/thermal/thermal_zone0/temp": "48250",
                "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000",
            }
            words = {"temperature_c": 31.0, "cur_freq_khz": None, "battery_percent": 84}
            return {**answer, "readings": [read, read], "before": words, "after": words}

    artifact = Artifact(name="m", path=write(tmp_path / "m.onnx", onnx_bytes(8)))
    with Told() as device:
        result = measure(device, [artifact], INPUTS)
    before = result["conditions"]["onnxruntime"]["before"]
    assert (before["temperature_c"], before["cur_freq_khz"], before["battery_percent"]) == (31.0, 1_800_000, 84)


# Sustained runs, as values.


def _run(*, idle: int, busy: int, slower: float = 1.0, hotter: float = 0.0) -> Sustained:
    """Seconds of rest, and of 100 runs a second."""
    buckets = [Bucket(start_s=s, spent_s=1.0, runs=0, median_us=None) for s in range(idle)]
    pace = np.linspace(1, slower, busy)
    buckets += [
        Bucket(start_s=idle + s, spent_s=1.0, runs=round(100 / pace[s]), median_us=1e4 * pace[s]) for s in range(busy)
    ]
    heat = np.concatenate([np.full(idle, 40.0), 40 + np.linspace(0, hotter, busy)])
    return Sustained(
        buckets=buckets,
        start={"temperature_c": 40.0},
        conditions=[{"temperature_c": float(one)} for one in heat],
        asked_s=float(busy),
    )


@pytest.mark.parametrize(("slower", "hotter", "throttled"), [(1.5, 30.0, True), (1.5, 0.0, False), (1.0, 30.0, False)])
def test_a_sustained_run_throttles_if_it_is_slower_and_hotter(slower, hotter, throttled):
    entry = sustained_entry(_run(idle=5, busy=60, slower=slower, hotter=hotter))
    assert entry["throttled"] is throttled
    assert entry["start_s"][0] == 0
    assert len(entry["median_us"]) == 60
    assert entry["change"] == pytest.approx(slower - 1, abs=0.06)


def test_a_change_under_load_has_an_interval_that_knows_of_neighbours():
    """The seconds of somebody else's load, as they were seen, and a device that does slow down."""
    run = _run(idle=0, busy=10)
    others = [19.4, 19.5, 19.4, 30.7, 31.2, 28.8, 20.6, 31.4, 31.9, 30.7]
    seen = replace(run, buckets=[replace(one, median_us=us) for one, us in zip(run.buckets, others, strict=True)])
    low, high = sustained_entry(_run(idle=0, busy=60, slower=1.5))["change_ci"]
    assert 0.3 < low < 0.5 < high < 0.7
    low, high = sustained_entry(_run(idle=0, busy=10))["change_ci"]
    assert low <= 0 <= high
    assert (
        sustained_entry(seen)["change_ci"][0] < sustained_entry(seen)["change"] < sustained_entry(seen)["change_ci"][1]
    )
    assert sustained_entry(_run(idle=0, busy=8))["change_ci"] is None


def test_a_device_that_says_that_it_throttles_is_believed():
    assert has_slowed(np.full(60, 100.0), {"throttle_flags": 0}, {"throttle_flags": 4})
    assert sustained_entry(_run(idle=5, busy=0)) is None


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
        if request["op"] != "time":
            raise ArtifactRefused(f"expected a request that this device knows, got op={request['op']}")
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
        {"block_samples": 0},
        {"block_samples": "7"},
        {"warmup": []},
        {"warmup": {"runs": -1, "spent_ns": 5, "slope": None}},
        {"warmup": {"runs": 1, "spent_ns": 10**18, "slope": None}},
        {"warmup": {"runs": 1, "spent_ns": 5, "slope": math.nan}},
        {"disturbed": [100]},
        {"disturbed": [-1]},
        {"disturbed": ["0"]},
        {"disturbed": {}},
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
    assert [len(request["models"]) for request in device.asked if request["op"] == "time"] == [3, 1, 1, 1, 1, 1, 1, 1]


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


# Answers to what is asked beside the timed run.


@pytest.mark.parametrize(
    "buckets",
    [
        None,
        [],
        [[0, 1, 0]],
        [[0, 10**9, 5, None]],
        [[0, 10**9, 5, 0]],
        [[0, 10**9, 5, -7]],
        [[0, 10**9, 5, 10**9]],
        [[0, 10**9, 5.0, 10]],
        [[-1, 10**9, 5, 10]],
        [[0, 0, 0, None]],
        [[0, 10**9, 5, 10], [10, 10**9, 5, 10]],
        [[0, 10**12, 5, 10]],
        [[0, 10**9, True, 10]],
        [[2 * n, 1, 0, None] for n in range(5000)],
    ],
)
def test_buckets_that_cannot_be_true_are_refused(buckets):
    with pytest.raises(ArtifactRefused, match="expected"):
        believe_buckets({"buckets": buckets}, wall_s=10)


@pytest.mark.parametrize(
    "operators",
    [5, [5], [["a", "b", 1]], [[1, "b", 1, 1]], [["a", "b", 1, -1]], [["a", "b", 1, 10**10]], [["a", "b", 1.5, 1]],
     [["a", "b", 1, 1]] * 300],
)  # fmt: skip
def test_operators_that_cannot_be_true_are_refused(operators):
    with pytest.raises(ArtifactRefused, match="expected operators"):
        believe_operators({"operators": operators}, wall_ns=10**9)


def test_names_of_operators_are_cleaned():
    [operator] = believe_operators({"operators": [["a\x1b[2J" + "x" * 1000, "Conv\r\n", 1, 5]]}, wall_ns=10)
    assert operator.name.isprintable()
    assert len(operator.name) <= 300
    assert operator.kind == "Conv"


@pytest.mark.parametrize(
    "changes", [{"load_ns": 0}, {"first_ns": -1}, {"import_ns": 10**10}, {"load_ns": 1.5}, {"first_ns": 900}]
)
def test_cold_starts_that_cannot_be_true_are_refused(changes):
    answer = {"import_ns": 100, "load_ns": 500, "first_ns": 100}
    assert believe_cold(answer, wall_ns=1000).load_ns == 500
    with pytest.raises(ArtifactRefused):
        believe_cold({**answer, **changes}, wall_ns=1000)
