"""Devices that answer and are never timed: TensorFlow Lite Micro's kernels here, and an emulated 64-bit Arm."""

import io
import json
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tacit.compression.export import export
from tacit.devices import qemu
from tacit.devices.device import Artifact
from tacit.devices.environments import Environment, run_installer
from tacit.devices.local import LocalDevice
from tacit.devices.micro import NOT_TIMED, measure_micro, micro_device, micro_needs
from tacit.devices.parity_only import LatencyRefused, ParityOnly, measure_parity
from tacit.devices.protocol import measure
from tacit.devices.sandbox import ArtifactRefused

EXAMPLE = torch.zeros(1, 1, 8, 8)
INPUTS = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
LAYOUTS = {"tflite": "channel_last", "onnx": "channel_first"}


def digits():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        ).eval()  # fmt: skip


def make(folder, form, target):
    path = folder / f"{form}.{target}"
    export(digits(), (EXAMPLE,), path, form=form, target=target, calibration=(INPUTS,))
    return Artifact(name=path.name, path=path, input_layout=LAYOUTS[target])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    return {form: make(folder, form, "tflite") for form in ("float32", "dynamic_int8", "full_int8")}


def test_microcontroller_kernels_answer_as_litert_and_say_what_they_need(small):
    result = measure_micro([*small.values()], [INPUTS])
    assert json.loads(json.dumps(result)) == result
    assert (result["device"], result["mode"], result["latency"]) == ("micro", "parity", NOT_TIMED)
    assert set(result["artifacts"]) == {"float32.tflite", "full_int8.tflite"}
    assert "Hybrid" in result["failed"]["dynamic_int8.tflite"]
    found = result["artifacts"]["float32.tflite"]
    assert found["max_abs"] < 1e-5 < 1e-2 < found["scale"]
    whole = result["artifacts"]["full_int8.tflite"]
    assert whole["max_abs"] <= 0.02 * whole["scale"]
    assert whole["top1_agreement"] >= 0.9
    assert whole["arena_bytes"] < found["arena_bytes"]
    assert "CONV_2D" in whole["operators"]


def test_nothing_that_is_said_of_a_microcontroller_is_a_time(small):
    result = measure_micro([small["full_int8"]], [INPUTS])
    text = json.dumps({**result, "latency": None})
    assert not [word for word in ("_us", "_ns", "_ms", "freq", "temperature", "load_1m") if word in text]


class Otherwise(LocalDevice):
    """Its kernels answer a little otherwise."""

    def get(self, remote):
        values = np.load(io.BytesIO(super().get(remote)))
        values[0, np.argmin(values[0])] = values.max() + 0.25
        changed = io.BytesIO()
        np.save(changed, values)
        return changed.getvalue()


def test_other_answers_show_in_the_distance_and_the_agreement(small):
    """A control: what is reported as the same is not always so."""
    with ParityOnly(Otherwise("micro"), why=NOT_TIMED, runtimes=("micro",)) as device:
        found = measure_parity(device, [small["float32"]], [INPUTS])["artifacts"]["float32.tflite"]
    assert found["max_abs"] > 0.25
    assert found["top1_agreement"] == 31 / 32


def test_a_file_that_was_swapped_on_the_way_is_noticed(small):
    class Swapping(LocalDevice):
        def put(self, path):
            return super().put(small["dynamic_int8"].path if path.suffix == ".tflite" else path)

    with ParityOnly(Swapping("micro"), why=NOT_TIMED, runtimes=("micro",)) as device:
        result = measure_parity(device, [small["float32"]], [INPUTS])
    assert result["artifacts"] == {}
    assert "expected sha256" in result["failed"]["float32.tflite"]


@pytest.mark.parametrize("op", ["time", "memory", "cold", "profile", "sustained", None])
def test_a_device_without_a_clock_refuses_to_measure(op):
    with micro_device() as device, pytest.raises(LatencyRefused, match="a host's time says nothing"):
        device.run({"op": op, "model": {"runtime": "micro"}})


def test_the_timing_protocol_gets_a_reason_and_no_number(small):
    with micro_device() as device:
        result = measure(device, [Artifact(**{**vars(small["full_int8"]), "runtime": "micro"})], INPUTS)
    assert result["artifacts"] == {}
    assert result["failed"] == {"full_int8.tflite": NOT_TIMED}


def test_a_file_of_another_runtime_is_refused_by_name(tmp_path):
    artifact = make(tmp_path, "float32", "onnx")
    with micro_device() as device:
        with pytest.raises(ArtifactRefused, match=r"expected a file for micro on micro, got path='float32\.onnx'"):
            device.runtime_for(artifact.path)
        with pytest.raises(ArtifactRefused, match="got one for onnxruntime"):
            device.run({"op": "predict", "model": {"runtime": "onnxruntime"}})
    with pytest.raises(ArtifactRefused, match=r"expected a \.tflite file, got path='float32\.onnx'"):
        micro_needs(artifact.path)


def test_what_a_file_states_is_examined_before_the_kernels_see_it(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"....TFL3" + b"\xff" * 64)
    with pytest.raises(ArtifactRefused, match="expected offsets inside the file"):
        micro_needs(path)
    (tmp_path / "fifo.tflite").mkdir()
    with pytest.raises(ArtifactRefused, match="a folder"):
        micro_needs(tmp_path / "fifo.tflite")
    with pytest.raises(FileNotFoundError):
        micro_needs(tmp_path / "none.tflite")


def test_head_and_tail_are_the_arena_but_for_what_planning_takes(small):
    found = micro_needs(small["full_int8"].path)
    assert found["head_bytes"] > 0 < found["persistent_bytes"]
    assert found["head_bytes"] + found["persistent_bytes"] <= found["arena_bytes"]


def test_what_is_compared_must_be_there_once(small):
    with micro_device() as device:
        with pytest.raises(ValueError, match="different names"):
            measure_parity(device, [small["float32"], small["float32"]], [INPUTS])
        for inputs in ([], [INPUTS[:0]], [INPUTS, INPUTS[:3]]):
            with pytest.raises(ValueError, match="expected inputs"):
                measure_parity(device, [small["float32"]], inputs)


def test_a_lost_file_costs_nobody_else_a_number(small, tmp_path):
    gone = Artifact(name="gone", path=tmp_path / "gone.tflite", input_layout="channel_last")
    with micro_device() as device:
        result = measure_parity(device, [gone, small["float32"]], [INPUTS])
    assert set(result["failed"]) == {"gone"}
    assert set(result["artifacts"]) == {"float32.tflite"}


# qemu:aarch64


def on_path(monkeypatch, folder, programs):
    folder.mkdir(exist_ok=True)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("missing", ["qemu-aarch64-static", "apt-get", "dpkg-deb"])
def test_without_its_programs_the_emulator_says_what_to_install(missing, tmp_path, monkeypatch):
    programs = {name: "exit 0" for name in ("qemu-aarch64-static", "apt-get", "dpkg-deb") if name != missing}
    on_path(monkeypatch, tmp_path / "bin", programs)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ModuleNotFoundError, match=rf"expected {missing} for qemu:aarch64, got none; apt-get install"):
        qemu.qemu_device()


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"apt-get": "echo 'E: Temporary failure resolving deb.debian.org' >&2; exit 100"}, "Temporary failure"),
        ({"apt-get": "echo 'E: \x1b[2J broken' >&2; exit 1"}, r"E: \[2J broken"),
        ({"apt-get": "exit 0"}, "pip|wheels|connect"),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line_and_no_folder(programs, said, tmp_path, monkeypatch, capsys):
    on_path(monkeypatch, tmp_path / "bin", {"qemu-aarch64-static": "exit 0", "dpkg-deb": "exit 0", **programs})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_RETRIES", "0"), ("PIP_TIMEOUT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(ModuleNotFoundError, match=f"expected an environment with an emulated.*({said})") as seen:
        qemu.environment_python()
    assert "\n" not in str(seen.value)
    assert "\x1b" not in str(seen.value)
    assert "Installing an emulated Python" in capsys.readouterr().err
    assert list((tmp_path / "cache/tacit").iterdir()) == []


def test_an_environment_is_made_once_and_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def fill(folder):
        made.append(folder)
        (folder / "half").write_text("")
        run_installer(["/bin/false"] if len(made) == 1 else ["/bin/true"])

    environment = Environment(name="thing-1.0", title="a thing", remedy="connect", fill=fill)
    with pytest.raises(ModuleNotFoundError, match="an environment with a thing, got: no reason given; connect"):
        environment.folder()
    assert list((tmp_path / "tacit").iterdir()) == []
    assert environment.folder() == environment.folder() == tmp_path / "tacit/thing-1.0"
    assert len(made) == 2
    assert "Installing a thing" in capsys.readouterr().err


def test_the_script_finds_its_root_wherever_the_folder_was_moved(tmp_path, monkeypatch):
    on_path(monkeypatch, tmp_path / "bin", {"qemu-aarch64-static": 'printf "%s\\n" "$@"'})
    folder = tmp_path / "with space; and 'quotes"
    folder.mkdir()
    script = folder / "python"
    script.write_text(qemu._SCRIPT)
    script.chmod(stat.S_IRWXU)
    said = subprocess.run([script, "-P", "a b"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["-L", f"{folder}/root", f"{folder}/root/usr/bin/python3.11", "-P", "a b"]


@pytest.mark.soak
def test_an_emulated_arm_answers_as_this_computer(small, tmp_path):
    try:
        device = qemu.qemu_device()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    forms = ("float32", "dynamic_int8", "static_int8")
    artifacts = [*small.values(), *(make(tmp_path, form, "onnx") for form in forms)]
    with device:
        facts = device.facts()
        assert (facts["machine"], facts["litert"], facts["onnxruntime"]) == ("aarch64", "2.0.3", "1.20.1")
        assert facts["latency"] == "emulated: parity only"
        assert "qemu" in facts["cpu"]
        assert not {"governor", "cur_freq_khz", "temperature_c", "load_1m"} & set(facts)
        with pytest.raises(LatencyRefused, match="emulated: parity only"):
            device.run({"op": "time"})
        result = measure_parity(device, artifacts, [INPUTS])
        with pytest.raises(ArtifactRefused, match="expected a file for litert, onnxruntime"):
            device.run({"op": "predict", "model": {"runtime": "micro"}})
    assert result["failed"] == {}
    for name, found in result["artifacts"].items():
        assert found["max_abs"] <= 1e-5 * max(1.0, found["scale"]) or "int8" in name
        assert found["max_abs"] <= 0.02 * found["scale"]
        assert found["top1_agreement"] == 1.0
    assert Path(qemu.environment_python()).parent.name.startswith("qemu-aarch64-litert-2.0.3")
