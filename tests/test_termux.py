"""Termux's Python on a phone over adb: the real adb, a device daemon, and the real leash and agent."""

import os
import re
import signal
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.devices import leash, termux
from tacit.devices.adb import AdbDevice, DeviceUnfit
from tacit.devices.answers import DeviceFull, DeviceUnreachable
from tacit.devices.protocol import Artifact, Evaluation, Extras, plan
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, ArtifactTimeout, Limits
from tacit.devices.termux import TermuxDevice, measure_termux
from tacit.edge.fleet import Access
from tacit.edge.measuring import measure_file
from tacit.edge.progress import Silent

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from adb_daemon import Phone
from ssh_server import processes_naming
from test_adb import BATTERY, COOL, environment, is_still, phone, server
from test_agent import linear, onnx_bytes

__all__ = ["environment", "phone", "server"]  # fixtures
INPUTS = np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)


@pytest.fixture
def home(phone) -> Path:
    return phone.install_termux()


@pytest.fixture
def opened(phone, home) -> Iterator[AdbDevice]:
    with open_phone(phone) as device:
        yield device


@pytest.fixture
def device(opened) -> Iterator[TermuxDevice]:
    with TermuxDevice(opened) as made:
        yield made


def open_phone(phone: Phone, **named: Any) -> AdbDevice:
    return AdbDevice(f"adb:{phone.serial}", folder=str(phone.data), patience_s=0.0, **named)


def onnx(tmp_path: Path, name: str = "model") -> Artifact:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(onnx_bytes((3, 2, 2)))
    return Artifact(name=name, path=path)


def asked(device: TermuxDevice, tmp_path: Path, code: str, **named: Any) -> dict[str, Any]:
    """Have the agent open a model by code of ours."""
    lines = ["import os, sys, time", "def open_model(path, threads):", *(f"    {line}" for line in code.splitlines())]
    (tmp_path / "adapter.py").write_text("\n".join(lines) + "\n")
    np.save(tmp_path / "inputs.npy", INPUTS)
    model = {"name": "m", "path": "none", "runtime": "own", "layouts": ["channel_first"]}
    model["adapter"] = str(tmp_path / "adapter.py")
    names = [device.put(tmp_path / "inputs.npy")]
    return device.run({"op": "predict", "model": model, "inputs": names, "outputs": ["y.npy"], **named})


def within(limit_s: float, holds: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + limit_s
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.05)
    return holds()


# A phone that is as it should be.


def test_a_model_is_measured_with_samples_accuracy_and_what_the_phone_says_of_itself(phone, home, tmp_path):
    expected = linear(INPUTS)
    evaluation = Evaluation(inputs=INPUTS, labels=expected.argmax(axis=1), expected=expected)
    kept = []
    with open_phone(phone) as device:
        result = measure_termux(
            device,
            [onnx(tmp_path, "a"), onnx(tmp_path, "b")],
            INPUTS,
            extras=Extras(evaluation=evaluation),
            keep=lambda name, entry: kept.append(name),
        )
    assert result["failed"] == {}
    assert kept == ["a", "b"]
    entry = result["artifacts"]["a"]
    assert entry["n"] >= 64
    assert 0 < entry["p50_us"] <= entry["p90_us"]
    assert entry["accuracy"]["top1"]["estimate"] == 1.0
    assert entry["delegate"] == "CPUExecutionProvider"
    assert result["artifacts"]["b"]["relative"]["to"] == "a"
    assert "governor" not in entry["flags"], "the clocks are held"
    before = result["conditions"]["onnxruntime"]["before"]
    assert (before["thermal_status"], before["temperature_c"], before["battery_percent"]) == (0, 31.25, 84)
    assert (before["fixed_performance"], before["cores"]) == (True, "7")
    assert result["facts"]["model"] == "Phone 7"
    assert result["facts"]["python"] == sys.version.split()[0]
    assert phone.modes() == ["true", "false"]
    assert "-p 80 " in phone.read("runs.log"), "pinned to the fastest core"
    assert is_still(phone)
    assert list(home.iterdir()) == []
    assert list(phone.data.iterdir()) == []


def test_clocks_are_the_agents_and_heat_is_the_phones(phone, opened, tmp_path):
    """Read by the shell after the run, a clock has fallen already."""
    phone.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "300000\n")
    with TermuxDevice(opened) as device:
        model = {"name": "m", "path": device.put(onnx(tmp_path).path), "runtime": "onnxruntime"}
        np.save(tmp_path / "x.npy", INPUTS)
        answer = device.run(
            {
                "op": "time",
                "models": [{**model, "layouts": ["channel_first"]}],
                "inputs": [device.put(tmp_path / "x.npy")],
                **plan("quick").timed(1),
            }
        )
    assert answer["before"]["battery_percent"] == answer["after"]["battery_percent"] == 84
    assert "cur_freq_khz" not in answer["before"]


def test_energy_is_told_by_the_phones_battery(phone, home, tmp_path, monkeypatch):
    monkeypatch.setattr("tacit.devices.phone_battery._EVERY_S", 0.1)
    begun_s, ended = time.monotonic(), threading.Event()

    def drain() -> None:
        """28 W, in steps of 10 µAh."""
        while not ended.wait(0.01):
            charge = 3_000_000 - round(200 * (time.monotonic() - begun_s)) * 10
            words = BATTERY.format(plugged="false", level=84).replace(": 2\n", ": 3\n")
            (phone.root / "battery").write_text(f"{words}  Charge counter: {charge}\n  voltage: 3900\n")
            (phone.root / "battery").replace(phone.root / "dumpsys" / "battery")

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        with open_phone(phone) as device:
            result = measure_termux(device, [onnx(tmp_path)], INPUTS, extras=Extras(sustained_s=4.0))
    finally:
        ended.set()
        thread.join()
    entry = result["artifacts"]["model"]
    assert entry["not_measured"] == {}
    assert entry["energy"]["source"] == "battery counter, whole device"
    assert entry["energy"]["idle_w"] == pytest.approx(28, rel=0.2)
    assert entry["energy"]["busy_w"] == pytest.approx(28, rel=0.2)
    assert entry["energy"]["low"] < 0 < entry["energy"]["high"], "it drains alike at rest and under load"


def test_a_phone_that_charges_tells_no_energy_and_does_not_rest_for_it(phone, home, tmp_path):
    phone.write("dumpsys/battery", phone.read("dumpsys/battery") + "  Charge counter: 3000000\n  voltage: 3900\n")
    with open_phone(phone) as device:
        result = measure_termux(device, [onnx(tmp_path)], INPUTS, extras=Extras(sustained_s=2.0))
    entry = result["artifacts"]["model"]
    assert entry["energy"] is None
    assert len(entry["sustained"]["median_us"]) == 2


def test_nothing_of_the_shells_environment_reaches_python(phone, home):
    program = phone.termux / "usr" / "bin" / "python3"
    program.write_text(program.read_text().replace("exec", f"/usr/bin/env > {phone.root}/environment; exec", 1))
    with open_phone(phone) as device, TermuxDevice(device):
        names = {line.partition("=")[0] for line in phone.read("environment").splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "HOME", "TMPDIR", "LANG"}


def test_predictions_come_back_whole(device, tmp_path):
    np.save(tmp_path / "x.npy", INPUTS)
    model = {"name": "m", "path": device.put(onnx(tmp_path).path), "runtime": "onnxruntime"}
    request = {"op": "predict", "model": {**model, "layouts": ["channel_first"]}, "outputs": ["y.npy"]}
    assert device.run({**request, "inputs": [device.put(tmp_path / "x.npy")]}) == {"n": 5}
    (tmp_path / "y.npy").write_bytes(device.get("y.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), linear(INPUTS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, (1 << 16) - 1, 1 << 16, 5_000_001])
def test_a_file_arrives_as_it_went(device, tmp_path, size):
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file.BIN").write_bytes(content)
    assert device.get(device.put(tmp_path / "file.BIN")) == content


def test_only_its_owner_may_enter_the_folder(device, home):
    (folder,) = home.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch(leash.FOLDER_PREFIX + "[A-Za-z0-9]{10}", folder.name)


def test_a_phone_that_forbids_pinning_is_measured_all_the_same(phone, opened):
    phone.write("pin.exit", "1")
    with TermuxDevice(opened) as device:
        assert device.facts()["python"] == sys.version.split()[0]


def test_what_a_session_left_that_could_not_end_is_removed_by_the_next(phone, opened, home):
    left = home / f"{leash.FOLDER_PREFIX}0123456789"
    left.mkdir()
    (left / "lock").touch()
    with TermuxDevice(opened) as device:
        assert device.facts()["leftovers_removed"] == 1
    assert list(home.iterdir()) == []


def test_a_phone_without_the_tool_is_measured_by_termux(phone, home, tmp_path):
    """As `tacit measure MODEL --inputs INPUTS --device adb:SERIAL` does."""
    np.save(tmp_path / "x.npy", INPUTS)
    name = f"adb:{phone.serial}"
    found = measure_file(onnx(tmp_path).path, tmp_path / "x.npy", [name], Silent(), mode="quick", access=Access())
    assert found[name]["failed"] == {}
    assert found[name]["artifacts"]["model.onnx"]["p50_us"] > 0
    assert list(home.iterdir()) == []


# A phone that is not.


def test_no_termux_is_said_with_what_to_do(phone):
    words = r"unknown package: com.termux; build LiteRT's .* pkg install"
    with open_phone(phone) as device, pytest.raises(ModuleNotFoundError, match=words):
        TermuxDevice(device)
    assert list(phone.data.iterdir()) == []


def test_a_termux_that_adb_may_not_enter_is_said(phone, opened):
    (phone.root / "debuggable").unlink()
    with pytest.raises(ModuleNotFoundError, match=r"package not debuggable: com.termux; .* GitHub"):
        TermuxDevice(opened)


OLD = 'case "$*" in *--version) echo Python 3.8.1;; *) echo "SyntaxError: no" >&2; exit 1;; esac'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, r"expected Python 3.9 or newer in Termux on adb:\S+, got: .*python3.*; in Termux, pkg install python "),
        (OLD, r"got: Python 3.8.1, which said: .* SyntaxError: no; "),
    ],
)
def test_no_python_is_said(phone, opened, home, script, words):
    program = phone.termux / "usr" / "bin" / "python3"
    program.unlink() if script is None else program.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ModuleNotFoundError, match=words):
        TermuxDevice(opened)
    assert list(home.iterdir()) == []


def test_a_python_without_numpy_says_what_to_install(phone, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    phone.install_termux(str(tmp_path / "bare" / "bin" / "python3"))
    with (
        open_phone(phone) as device,
        pytest.raises(ModuleNotFoundError, match="in Termux, pkg install python python-numpy python-onnxruntime"),
    ):
        measure_termux(device, [onnx(tmp_path)], INPUTS)
    assert phone.modes() == ["true", "false"]


def test_a_full_phone_is_said_and_the_file_removed(phone, device, home, tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(termux, "_WRITE", f'ulimit -f 8; trap "" XFSZ; {termux._WRITE}')
    with pytest.raises(DeviceFull, match=r"keep a file of 1048576 bytes, got: .*cat.*; make room on it"):
        device.put(tmp_path / "big")
    assert list(home.glob("*/files/*")) == []
    assert device.run({"op": "facts"})["python"] == sys.version.split()[0]


def test_a_model_that_crashes_hangs_or_talks_is_one_requests_failure(device, tmp_path):
    with pytest.raises(ArtifactCrashed, match="SIGSEGV"):
        asked(device, tmp_path, "os.kill(os.getpid(), 11)")
    with pytest.raises(ArtifactTimeout, match="busy for more than 1 s"):
        asked(device, tmp_path, "time.sleep(600)", limit_s=1.0)
    with pytest.raises(ArtifactRefused, match=r"could not be run: .*never"):
        asked(device, tmp_path, "raise RuntimeError('never')")
    assert device.run({"op": "facts"})["python"] == sys.version.split()[0]


def test_more_output_than_a_limit_is_not_heard(opened, tmp_path):
    with TermuxDevice(opened, limits=Limits(output_bytes=1 << 16)) as device:
        code = "for fd in (1, *range(3, 10)):\n    try:\n        while True: os.write(fd, b'x' * 65536)\n"
        code += "    except OSError: pass"
        with pytest.raises(ArtifactRefused, match="more than 65536 bytes"):
            asked(device, tmp_path, code)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("no answer", "a line that is no answer: no answer"),
        ('{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 1e99}', "a line that is no answer"),
        ('{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 99999999}', "a line that is no answer"),
        ("x" * 200_000, "far too much said"),
    ],
)
def test_a_leash_that_is_none_is_not_believed(phone, opened, home, said, words):
    greeting = '{"leash": 1, "removed": 0}'
    program = phone.termux / "usr" / "bin" / "python3"
    program.write_text(f"#!/bin/sh\necho '{greeting}'; read -r order; echo '{said}'; exec /bin/sleep 60\n")
    with TermuxDevice(opened) as device:
        with pytest.raises(DeviceUnreachable, match=f"expected an answer of adb:.*, got: {words}") as caught:
            device.run({"op": "facts"})
        assert str(caught.value).count("expected an answer") == 1
        with pytest.raises(DeviceUnreachable, match=words):
            device.run({"op": "facts"})


def test_a_leash_that_never_greets_is_given_up(phone, opened, home, monkeypatch):
    monkeypatch.setattr("tacit.devices.adb_leash._GRACE_S", 1.0)
    (phone.termux / "usr" / "bin" / "python3").write_text('#!/bin/sh\ntest "$1" = --version || exec /bin/sleep 60\n')
    with pytest.raises(ModuleNotFoundError, match=r"expected Python 3.9 or newer"):
        TermuxDevice(opened)


def test_names_that_put_did_not_give_are_no_paths(device):
    for name in ("../agent.py", "/etc/passwd", "a b", ""):
        with pytest.raises(ValueError, match="expected a name that put"):
            device.get(name)
    with pytest.raises(ArtifactRefused, match="expected a plain file"):
        device.get("absent.npy")


def test_an_unplugged_phone_is_said_and_cleans_up_itself(phone, home, tmp_path):
    with open_phone(phone) as opened:
        device = TermuxDevice(opened)
        threading.Timer(1.0, phone.unplug).start()
        with pytest.raises(DeviceUnreachable, match="plug it in again and go on"):
            asked(device, tmp_path, "time.sleep(600)")
        with pytest.raises(DeviceUnreachable):
            device.run({"op": "facts"})
        device.close()
    assert within(20, lambda: list(home.iterdir()) == [])
    assert is_still(phone)


def test_an_interruption_from_another_thread_ends_it_soon_and_cleanly(phone, home, tmp_path):
    with open_phone(phone) as opened, TermuxDevice(opened) as device:
        threading.Timer(1.0, opened.link.interrupt).start()
        with pytest.raises(DeviceUnreachable, match="plug it in again and go on"):
            asked(device, tmp_path, "time.sleep(600)")
        with pytest.raises(DeviceUnreachable):
            device.run({"op": "facts"})
    assert within(20, lambda: list(home.iterdir()) == [])
    assert is_still(phone)
    assert list(phone.data.iterdir()) == []


def test_a_leash_that_was_killed_leaves_its_folder_to_us(phone, opened, home):
    device = TermuxDevice(opened)
    (folder,) = home.iterdir()
    for number in processes_naming(str(folder)):
        os.kill(number, signal.SIGKILL)
    with pytest.raises(DeviceUnreachable):
        device.run({"op": "facts"})
    device.close()
    assert list(home.iterdir()) == []


def test_a_closed_device_is_closed(opened, home):
    device = TermuxDevice(opened)
    device.close()
    with pytest.raises(DeviceUnreachable, match="a device that was closed"):
        device.run({"op": "facts"})
    assert list(home.iterdir()) == []


def test_a_hot_or_low_phone_is_not_measured(phone, home, tmp_path):
    phone.write("dumpsys/thermalservice", COOL.replace("Thermal Status: 0", "Thermal Status: 2"))
    phone.write("dumpsys/battery", BATTERY.format(plugged="false", level=7))
    with open_phone(phone) as device, pytest.raises(DeviceUnfit, match=r"hot .* and its battery is low \(7 %\)"):
        measure_termux(device, [onnx(tmp_path)], INPUTS)
    assert phone.modes() == []


def test_a_long_request_is_pulsed(phone, opened, tmp_path, monkeypatch):
    """The leash lets go of a host that is silent for long."""
    monkeypatch.setattr("tacit.devices.adb_leash._PULSE_S", 0.2)
    sent = []
    with TermuxDevice(opened) as device:
        shell = device._leash._shell
        write = shell.write

        def watched(content: bytes, deadline_s: float) -> None:
            sent.append(content)
            write(content, deadline_s)

        monkeypatch.setattr(shell, "write", watched)
        with pytest.raises(ArtifactTimeout):
            asked(device, tmp_path, "time.sleep(600)", limit_s=2.0)
    assert sent.count(b"\n") >= 5
