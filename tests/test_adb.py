"""Phones over adb: the real adb client and server, and a device daemon that behaves as a phone, also as a bad one."""

import hashlib
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.devices.adb import AdbDevice, DeviceUnfit
from tacit.devices.adb_link import AdbLink
from tacit.devices.adb_phones import choose, open_link
from tacit.devices.answers import DeviceFull, DeviceUnreachable
from tacit.devices.benchmark_tool import Round, Turn, believe_operators_csv, believe_round
from tacit.devices.phone_measurement import measure_phone
from tacit.devices.protocol import Artifact
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, ArtifactTimeout

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from adb_daemon import BATTERY, COOL, COUNTS, TOOL, AdbServer, Phone
from test_agent import TFLITE, onnx_bytes

ELF = b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\x00"
BRIEF = Turn(min_runs=2, warmup_s=0.0, min_s=0.0, max_s=0.1)
ENDLESS = "exec sleep 600"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[AdbServer]:
    started = AdbServer(tmp_path_factory.mktemp("home"))
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def environment(server, monkeypatch) -> None:
    """Nothing of the user is touched: another port, another home."""
    for name in ("ANDROID_ADB_SERVER_PORT", "HOME"):
        monkeypatch.setenv(name, server.environment[name])
    for name in ("ANDROID_SERIAL", "ANDROID_ADB_SERVER_HOST", "ADBUTILS_ADB_PATH"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def plugged(server: AdbServer, root: Path) -> Iterator[Phone]:
    made = Phone(root)
    try:
        server.connect(made)
        yield made
    finally:
        made.stop()
        server.adb("disconnect", made.serial)


@pytest.fixture
def phone(server, tmp_path) -> Iterator[Phone]:
    with plugged(server, tmp_path / "phone") as made:
        yield made


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.tflite").write_bytes(TFLITE)
    (tmp_path / "files" / "model.onnx").write_bytes(onnx_bytes((3, 2, 2)))
    (tmp_path / "files" / "benchmark_model").write_bytes(ELF)
    return tmp_path / "files"


@pytest.fixture
def short(monkeypatch) -> None:
    """Measurements of four rounds, where what they show does not matter."""
    monkeypatch.setattr("tacit.devices.phone_measurement._ROUNDS", {"quick": 4})


def open_phone(phone: Phone, files: Path, **named: Any) -> AdbDevice:
    given = {"benchmark_model": files / "benchmark_model", "folder": str(phone.data), "patience_s": 0.0}
    return AdbDevice(f"adb:{phone.serial}", **(given | named))


def two(files: Path) -> list[Artifact]:
    return [Artifact(name=name, path=files / "model.tflite") for name in ("a", "b")]


def is_still(phone: Phone) -> bool:
    """Whether nothing runs on the phone any more, if it gets the time to end."""
    limit_s = time.monotonic() + 10
    while (busy := any(process.poll() is None for process in phone.processes)) and time.monotonic() < limit_s:
        time.sleep(0.02)
    return not busy


def mode_is_off(phone: Phone) -> bool:
    return phone.modes() == [] or phone.modes()[-1] == "false"


# A whole measurement.


def test_a_measurement_says_what_the_tool_says_and_no_more(phone, files):
    phone.write("tool", 'case "$*" in *num_threads=1*) ' + TOOL.format(counts=COUNTS) + ";; esac")
    said, kept = [], []
    with open_phone(phone, files) as device:
        result = measure_phone(
            device, two(files), keep=lambda name, entry: kept.append((name, entry["n"])), progress=said.append
        )
    assert result["failed"] == {}
    entry = result["artifacts"]["a"]
    assert entry["input_source"] == "random"
    assert (entry["n"], entry["mean_us"], entry["min_us"], entry["runtime"]) == (400, 40.5, 30, "benchmark_model")
    assert entry["cv"] == pytest.approx(5 / 40.5, abs=1e-4)
    assert entry["flags"] == ["noisy"]
    assert entry["p50_us"] is entry["p90_us"] is entry["p99_us"] is entry["samples_us"] is None
    assert "no samples" in entry["not_measured"]["p90_us"]
    assert entry["cold"]["n"] == 20
    assert entry["cold"]["load_us"]["estimate"] == entry["load_us"] == 630
    assert entry["cold"]["first_us"]["estimate"] == 678
    assert entry["peak_memory_bytes"] == int(2.25 * 2**20)
    assert result["artifacts"]["b"]["relative"] == {"to": "a", "estimate": 1.0, "low": 1.0, "high": 1.0}
    assert kept == [("a", 400), ("b", 400)]
    assert said == ["a, b: latency by benchmark_model, interleaved"]


def test_a_measurement_holds_the_clocks_and_lets_them_go(phone, files, short):
    with open_phone(phone, files) as device:
        result = measure_phone(device, two(files))
    assert phone.modes() == ["true", "false"]
    conditions = result["conditions"]["benchmark_model"]
    assert conditions["before"] == conditions["after"] | {"load_1m": conditions["before"]["load_1m"]}
    assert conditions["after"]["fixed_performance"] is True
    assert conditions["after"]["cores"] == "7"
    assert (conditions["after"]["thermal_status"], conditions["after"]["temperature_c"]) == (0, 31.25)
    assert (conditions["after"]["battery_percent"], conditions["after"]["power"]) == (84, "mains")
    assert conditions["after"]["battery_temperature_c"] == 28.5
    assert (conditions["after"]["governor"], conditions["after"]["cur_freq_khz"]) == ("schedutil", 2800000)


def test_the_tool_is_called_as_it_wants_and_on_the_fastest_cores(phone, files):
    with open_phone(phone, files) as device:
        measure_phone(device, [Artifact(name="a", path=files / "model.tflite", threads=2)])
    runs = [line.split(" ") for line in phone.read("runs.log").splitlines()]
    assert len(runs) == 20
    mask, tool, graph, *flags = runs[0]
    assert mask == "f0"
    assert tool.endswith("/benchmark_model")
    assert graph.startswith(f"--graph={phone.data}/tacit-")
    assert flags == [
        "--num_threads=2", "--warmup_runs=1", "--warmup_min_secs=0.2", "--num_runs=11", "--min_secs=0.1",
        "--max_secs=1", "--enable_op_profiling=false",
    ]  # fmt: skip


def test_rounds_of_two_artifacts_are_interleaved_back_and_forth(phone, files):
    other = files / "other.tflite"
    other.write_bytes(TFLITE + b"\0")
    with open_phone(phone, files) as device:
        measure_phone(device, [two(files)[0], Artifact(name="other", path=other)])
    graphs = [line.split(" ")[2] for line in phone.read("runs.log").splitlines()]
    first, second = graphs[:2]
    assert first != second
    assert graphs == [first, second, second, first] * 10


def test_medians_and_their_interval_are_given_where_the_version_prints_them(phone, files):
    phone.write("tool", TOOL.format(counts=f"{COUNTS} p5=31 median=39 p95=55"))
    with open_phone(phone, files) as device:
        entry = measure_phone(device, two(files)[:1])["artifacts"]["a"]
    assert (entry["p50_us"], entry["ci"]["p50_us"], entry["p90_us"]) == (39, [39, 39], None)
    assert entry["rounds"][0]["p95_us"] == 55


def test_the_profile_is_a_run_of_its_own(phone, files, short):
    header = "node type, start, first, avg_ms, %, cdf%, mem KB, times called, name"
    rows = [
        "CONV_2D, 0, 0.02, 0.03, 75%, 75%, 0, 1, [conv]:0",
        "SOFTMAX, 0.03, 0.01, 0.01, 25%, 100%, 0, 1, [soft\x1b[2J]:1",
    ]
    table = "\n".join(["Operator-wise Profiling Info for Regular Benchmark Runs:", header, *rows, "", ""])
    write = f"""case "$*" in *output_csv_file=*) printf %s {shlex.quote(table)} > "${{10#*=}}";; esac"""
    phone.write("tool", TOOL.format(counts=COUNTS) + write)
    with open_phone(phone, files) as device:
        entry = measure_phone(device, two(files)[:1], profile=True)["artifacts"]["a"]
    assert [(row["name"], row["type"], row["us"]) for row in entry["profile"]["operators"]] == [
        ("[conv]:0", "CONV_2D", 30.0),
        ("[soft [2J]:1", "SOFTMAX", 10.0),
    ]
    assert "--enable_op_profiling=true" in phone.read("runs.log").splitlines()[-1]


def test_a_tool_without_a_profiler_loses_the_profile_only(phone, files, short):
    with open_phone(phone, files) as device:
        entry = measure_phone(device, two(files)[:1], profile=True)["artifacts"]["a"]
    assert entry["profile"] is None
    assert "plain file" in entry["not_measured"]["profile"]
    assert entry["n"] == 80


def test_what_was_complete_is_kept_when_the_phone_goes(phone, files, short):
    phone.write("tool", TOOL.format(counts=COUNTS) + '[ "$(wc -l < "$PHONE/runs.log")" -lt 7 ] || rm "$PHONE/sys/last"')
    phone.write("sys/last", "")
    kept = {}

    def keep(name: str, entry: Any) -> None:
        kept[name] = entry

    with open_phone(phone, files) as device:
        ask = device.benchmark

        def benchmark(*arguments: Any, **named: Any) -> Any:
            if not (phone.root / "sys/last").exists():
                phone.unplug()
            return ask(*arguments, **named)

        device.benchmark = benchmark
        with pytest.raises(DeviceUnreachable, match="set-fixed-performance-mode-enabled false"):
            measure_phone(device, two(files), keep=keep)
    assert {name: entry["n"] for name, entry in kept.items()} == {"b": 80}  # the last round is b's, then a's


def test_what_is_known_is_not_measured_again(phone, files, short):
    with open_phone(phone, files) as device:
        first = measure_phone(device, two(files)[:1])["artifacts"]["a"]
        again = measure_phone(device, two(files)[:1], known={first["key"]: first})
    assert again["artifacts"]["a"] == first
    assert len(phone.read("runs.log").splitlines()) == 4
    assert phone.modes() == ["true", "false"]


def test_nothing_stays_on_the_phone(phone, files):
    with open_phone(phone, files) as device:
        device.put(files / "model.tflite")
        [folder] = phone.data.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(phone.data.iterdir()) == []


def test_what_a_lost_session_left_is_removed_a_day_later(phone, files):
    for name, hours in (("tacit-old", 25), ("tacit-new", 1), ("other", 99)):
        (phone.data / name).mkdir()
        os.utime(phone.data / name, (time.time() - 3600 * hours,) * 2)
    open_phone(phone, files).close()
    assert sorted(path.name for path in phone.data.iterdir()) == ["other", "tacit-new"]


def test_facts_name_the_phone_and_its_cores(phone, files):
    with open_phone(phone, files) as device:
        facts = device.facts()
        assert device.run({"op": "facts"}) == facts
    assert (facts["cpu"], facts["android"], facts["sdk"]) == ("Tested Phone 7, Maker T1000", "14", 34)
    assert (facts["cores"], facts["cpu_parts"]) == (8, "0xd05 x4, 0xd0b x4")
    assert facts["max_freq_khz"] == "1800000 x4, 2400000 x3, 2800000 x1"


def test_a_file_comes_back_as_it_went(phone, files):
    content = bytes(range(256)) * 1000
    (files / "every.bin").write_bytes(content)
    with open_phone(phone, files) as device:
        assert device.get(device.put(files / "every.bin")) == content
        with pytest.raises(ArtifactRefused, match="expected a plain file"):
            device.get("0" * 32)
        with pytest.raises(ValueError, match="name that put"):
            device.get("../../x")


# Which phone.


def test_no_phone_is_said(server):
    with pytest.raises(DeviceUnreachable, match="expected a phone at adb, got none; plug it in"):
        open_link("adb")


def test_two_phones_need_a_serial(server, phone, files, tmp_path):
    with plugged(server, tmp_path / "second") as second:
        with pytest.raises(DeviceUnreachable, match=r"expected one phone at adb, got 2: .*; name one as adb:SERIAL"):
            open_link("adb")
        assert open_link(f"adb:{second.serial}").serial == second.serial


def test_one_phone_needs_none(phone):
    assert open_link("adb").serial == phone.serial


def test_another_serial_than_those_that_are_there_is_said(phone):
    with pytest.raises(DeviceUnreachable, match=f"expected the phone R5CT1 at adb, got {phone.serial}"):
        open_link("adb:R5CT1")


@pytest.mark.parametrize("target", ["adb:x; rm -rf /", "adb:", "adb:-s", "adb:a b", "adb:$(id)", "adb:x\n", "ssh:x"])
def test_a_serial_that_is_none_is_refused_before_anything_is_asked(target):
    with pytest.raises(ValueError, match="expected adb or adb:SERIAL"):
        open_link(target)


def test_an_unauthorized_phone_is_said(server, tmp_path):
    made = Phone(tmp_path / "phone")
    made.authorizes = False
    try:
        assert "failed to authenticate" in server.connect(made)
        with pytest.raises(DeviceUnreachable, match="got: unauthorized; unlock the phone and accept"):
            open_link(f"adb:{made.serial}")
    finally:
        made.stop()
        server.adb("disconnect", made.serial)


def test_a_phone_that_went_is_offline(server, phone):
    phone.unplug()
    limit_s = time.monotonic() + 10
    while "offline" not in server.adb("devices") and time.monotonic() < limit_s:
        time.sleep(0.05)
    with pytest.raises(DeviceUnreachable, match="got: offline; plug it in again"):
        open_link("adb")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("authorizing", "got: authorizing; unlock the phone"),
        ("no", r"got: no permissions; give this user the right .*udev"),
        ("recovery", "got: recovery; start Android on it"),
        ("\x1b[2J", r"got: \[2J; "),
    ],
)
def test_every_other_state_has_its_own_line(state, words):
    with pytest.raises(DeviceUnreachable, match=words):
        choose(None, [("R5CT1", state)])


def test_a_phone_without_the_second_shell_protocol_is_too_old(server, tmp_path):
    made = Phone(tmp_path / "phone")
    made.features = "cmd"
    try:
        server.connect(made)
        with pytest.raises(DeviceUnreachable, match="expected Android 7 or newer"):
            open_link("adb")
    finally:
        made.stop()
        server.adb("disconnect", made.serial)


def test_a_server_is_started_where_none_runs(monkeypatch, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port)
    monkeypatch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "1")
    try:
        with pytest.raises(DeviceUnreachable, match="got none; plug it in"):
            open_link("adb")
    finally:
        server.adb("-P", port, "kill-server")


@pytest.mark.parametrize(
    ("name", "value"), [("ANDROID_ADB_SERVER_HOST", "127.0.0.2"), ("ADBUTILS_ADB_PATH", "/bin/false")]
)
def test_no_adb_server_is_said(monkeypatch, name, value):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv(name, value)
    with pytest.raises(DeviceUnreachable, match=r"expected an adb server at 127.0.0..:.*, got none; "):
        open_link("adb")


# The tool.


def test_without_the_tool_a_line_says_what_to_install(phone, files):
    with open_phone(phone, files, benchmark_model=None) as device:
        with pytest.raises(ModuleNotFoundError, match=r"Android NDK .* measure_termux\(\) run"):
            measure_phone(device, two(files))
        with pytest.raises(ArtifactRefused, match=r"measure_phone\(\) runs benchmark_model"):
            device.run({"op": "time"})
    assert phone.modes() == []


def test_a_tool_for_another_processor_is_refused(phone, files):
    (files / "benchmark_model").write_bytes(ELF[:18] + b"\x3e\x00")
    with (
        open_phone(phone, files) as device,
        pytest.raises(ArtifactRefused, match="arm64-v8a,armeabi-v7a, got one for x86_64"),
    ):
        measure_phone(device, two(files))


def test_a_tool_that_is_no_program_is_refused_before_the_phone_is_asked(files):
    with pytest.raises(ArtifactRefused, match="expected a program for Android"):
        AdbDevice("adb", benchmark_model=files / "model.onnx")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        AdbDevice("adb", benchmark_model=files / "absent")


def test_a_file_of_another_format_is_refused_and_the_others_measured(phone, files, short):
    broken = files / "broken.tflite"
    broken.write_bytes(b"nothing of the kind" * 10)
    artifacts = [
        Artifact(name="onnx", path=files / "model.onnx"),
        Artifact(name="broken", path=broken),
        *two(files)[:1],
    ]
    with open_phone(phone, files) as device:
        result = measure_phone(device, artifacts)
    assert list(result["artifacts"]) == ["a"]
    assert "expected a .tflite file for benchmark_model" in result["failed"]["onnx"]
    assert set(result["failed"]) == {"onnx", "broken"}


def run_once(device: AdbDevice, files: Path) -> Round:
    run = device.benchmark(device.put(files / "model.tflite"), BRIEF, threads=1)
    return believe_round(run.said, run.wall_s)


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("kill -SEGV $$", ArtifactCrashed, r"crashed benchmark_model \(SIGSEGV\)"),
        ("echo 'ERROR: no\x1b[2J op' >&2; exit 1", ArtifactRefused, r"exit status 1\): ERROR: no \[2J op"),
        ("exit 0", ArtifactRefused, "expected a line of counts from benchmark_model, got: tacit-pid"),
        ("yes 'count=1'", ArtifactRefused, "wrote more than 1048576 bytes"),
        ("head -c 100000000 /dev/zero >&2", ArtifactRefused, "wrote more than 1048576 bytes"),
    ],
)
def test_a_failing_tool_is_one_artifacts_failure_and_the_clocks_are_let_go(phone, files, short, script, kind, words):
    phone.write("tool", script)
    with open_phone(phone, files) as device:
        result = measure_phone(device, two(files)[:1])
        assert result["artifacts"] == {}
        with pytest.raises(kind, match=words):
            run_once(device, files)
    assert phone.modes() == ["true", "false"]


def test_a_tool_that_never_ends_is_killed(phone, files, monkeypatch):
    monkeypatch.setattr("tacit.devices.adb._MARGIN_S", 1.8)
    phone.write("tool", ENDLESS)
    with open_phone(phone, files) as device:
        with pytest.raises(ArtifactTimeout, match=r"busy for more than 2 s"):
            device.benchmark(device.put(files / "model.tflite"), BRIEF, threads=1)
        assert is_still(phone)


def test_an_interrupted_measurement_kills_the_tool_and_lets_the_clocks_go(phone, files, monkeypatch):
    phone.write("tool", ENDLESS)
    asked = AdbLink.ask

    def interrupted(link: AdbLink, arguments: Any, **named: Any) -> Any:
        if "heard" in named:
            named["limit_s"] = 2.0
            asked(link, arguments, **named)
            raise KeyboardInterrupt
        return asked(link, arguments, **named)

    monkeypatch.setattr(AdbLink, "ask", interrupted)
    with open_phone(phone, files) as device, pytest.raises(KeyboardInterrupt):
        measure_phone(device, two(files))
    assert phone.modes() == ["true", "false"]
    assert is_still(phone)
    assert list(phone.data.iterdir()) == []


def test_an_interruption_from_another_thread_kills_the_tool_and_lets_the_clocks_go(phone, files):
    phone.write("tool", ENDLESS)
    with open_phone(phone, files) as device:
        threading.Timer(1.0, device.link.interrupt).start()
        with pytest.raises(DeviceUnreachable, match="plug it in again and go on"):
            measure_phone(device, two(files))
    assert phone.modes() == ["true", "false"]
    assert is_still(phone)
    assert list(phone.data.iterdir()) == []


def test_an_interruption_ends_the_wait_for_a_hot_phone(phone, files):
    phone.write("dumpsys/thermalservice", COOL.replace("Thermal Status: 0", "Thermal Status: 2"))
    with open_phone(phone, files, patience_s=600.0) as device:
        threading.Timer(0.5, device.link.interrupt).start()
        with pytest.raises(DeviceUnreachable, match="plug it in again and go on"):
            measure_phone(device, two(files))
    assert phone.modes() == []


# Phones in a bad state.


def test_a_hot_phone_is_not_measured(phone, files):
    phone.write("dumpsys/thermalservice", COOL.replace("Status: 0", "Status: 2"))
    with (
        open_phone(phone, files) as device,
        pytest.raises(DeviceUnfit, match=r"it is hot \(thermal status 2\); let it rest"),
    ):
        measure_phone(device, two(files))
    assert mode_is_off(phone)
    assert phone.read("runs.log") == ""


def test_a_hot_phone_is_waited_for(phone, files, monkeypatch):
    monkeypatch.setattr("tacit.devices.adb._POLL_S", 0.05)
    phone.write("dumpsys/thermalservice", COOL.replace("Status: 0", "Status: 1"))
    said = []

    def cool_down(line: str) -> None:
        said.append(line)
        phone.write("dumpsys/thermalservice", COOL)

    with open_phone(phone, files, patience_s=60.0) as device:
        assert device.wait_until_fit(cool_down).thermal_status == 0
    assert said == ["waiting for it to cool down, thermal status 1, at most 60 s; or measure it regardless"]


def test_a_hot_and_low_phone_is_measured_regardless_and_the_result_says_so(phone, files, short):
    phone.write("dumpsys/thermalservice", COOL.replace("Status: 0", "Status: 3"))
    phone.write("dumpsys/battery", BATTERY.format(plugged="false", level=7))
    with open_phone(phone, files, regardless=True) as device:
        result = measure_phone(device, two(files)[:1])
    after = result["conditions"]["benchmark_model"]["after"]
    assert (after["thermal_status"], after["battery_percent"], after["power"]) == (3, 7, "battery")
    assert "throttled" in result["artifacts"]["a"]["flags"]


def test_a_low_battery_is_not_measured_unless_it_charges(phone, files):
    phone.write("dumpsys/battery", BATTERY.format(plugged="false", level=19))
    with open_phone(phone, files) as device:
        with pytest.raises(DeviceUnfit, match=r"its battery is low \(19 %\) and not charging"):
            device.wait_until_fit(print)
        phone.write("dumpsys/battery", BATTERY.format(plugged="true", level=19))
        assert device.wait_until_fit(print).is_plugged


def test_a_full_phone_says_so_and_loses_one_artifact(phone, files):
    with open_phone(phone, files) as device:
        device.require_tool()
        phone.is_full = True
        (files / "large.tflite").write_bytes(bytes(5_000_000))
        with pytest.raises(
            DeviceFull, match=r"a file of 5000000 bytes, got: .*No space \[2J left on device; make room"
        ):
            device.put(files / "large.tflite")
        result = measure_phone(device, two(files)[:1])
    assert "No space" in result["failed"]["a"]
    assert phone.modes() == ["true", "false"]


def test_a_folder_that_cannot_be_made_is_said(phone, files):
    with pytest.raises(
        DeviceUnreachable, match=r"expected a folder to work in on .*, got: .*; make room, or name another"
    ):
        open_phone(phone, files, folder=f"{phone.data}/absent")


@pytest.mark.parametrize("moment", ["dumpsys", "tacit-pid"])
def test_an_unplugged_phone_is_said_and_how_to_let_its_clocks_go(phone, files, monkeypatch, moment):
    monkeypatch.setattr("tacit.devices.phone_performance._ENDING_S", 0.2)
    with open_phone(phone, files) as device:
        phone.unplugged_by = moment
        with pytest.raises(DeviceUnreachable) as refusal:
            measure_phone(device, two(files))
    line = str(refusal.value)
    assert "over adb, got: " in line
    assert "\n" not in line
    # Before the mode was begun there is nothing to end.
    assert (f"adb -s {phone.serial} shell cmd power set-fixed-performance-mode-enabled false" in line) == bool(
        phone.modes()
    )
    assert phone.modes() == (["true"] if moment == "tacit-pid" else [])


def test_a_phone_that_comes_back_has_its_clocks_let_go(server, phone, files):
    with open_phone(phone, files) as device:
        asked = device._link.ask
        lost = iter([True, True])

        def flaky(arguments: Any, **named: Any) -> Any:
            if arguments[-1] == "false" and next(lost, False):
                raise DeviceUnreachable("away")
            return asked(arguments, **named)

        device._link.ask = flaky
        with device.fixed_performance(print) as is_fixed:
            assert is_fixed
    assert phone.modes() == ["true", "false"]


def hold_and_lose(device: AdbDevice, phone: Phone, say: Any) -> None:
    with device.fixed_performance(say):
        phone.unplug()
        raise KeyboardInterrupt


def test_another_error_goes_on_its_way_when_the_clocks_cannot_be_let_go(phone, files, monkeypatch):
    monkeypatch.setattr("tacit.devices.phone_performance._ENDING_S", 0.1)
    said = []
    with open_phone(phone, files) as device, pytest.raises(KeyboardInterrupt) as interrupt:
        hold_and_lose(device, phone, said.append)
    assert "set-fixed-performance-mode-enabled false`" in said[0]
    assert interrupt.value.__notes__ == said


@pytest.mark.parametrize(("sdk", "status", "modes"), [("29", "0", []), ("", "0", []), ("34", "255", ["true", "false"])])
def test_a_phone_without_the_mode_is_measured_and_the_result_says_so(phone, files, short, sdk, status, modes):
    phone.write("props/ro.build.version.sdk", sdk)
    phone.write("power.exit", status)
    with open_phone(phone, files) as device:
        result = measure_phone(device, two(files)[:1])
    assert result["conditions"]["benchmark_model"]["after"]["fixed_performance"] is False
    assert phone.modes() == modes


# Hostile phones.


def test_what_a_phone_says_of_itself_is_bounded_and_printable(phone, files):
    phone.write("props/ro.product.model", "\x1b[2J\x07" + "x" * 5000)
    phone.write("props/ro.build.version.sdk", "99999999999999999999")
    phone.write("proc/cpuinfo", "CPU part : 0xd05\x1b[2J\nCPU part : 0x" + "f" * 1000)
    phone.write("dumpsys/thermalservice", "Thermal Status: 9\nTemperature{mValue=NaN, mType=0, }\nThermal Status: -1")
    phone.write("dumpsys/battery", "level: -5\nscale: 0\ntemperature: 99999999\nUSB powered: maybe")
    phone.write("sys/devices/system/cpu/cpu9/cpufreq/cpuinfo_max_freq", "-1\nNaN")
    with open_phone(phone, files) as device:
        facts, conditions = device.facts(), device.conditions()
        assert all(value is None or len(str(value)) <= 200 for value in facts.values())
        assert "".join(map(str, facts.values())).isprintable()
        assert facts["sdk"] is facts["cpu_parts"] is None
        assert device.cores(1) == [7]
        assert device.wait_until_fit(print).conditions() == dict.fromkeys(
            ("thermal_status", "temperature_c", "battery_percent", "battery_temperature_c", "power")
        )
        assert conditions["battery_percent"] is None


@pytest.mark.parametrize("program", ["getprop", "dumpsys"])
def test_a_phone_that_talks_without_end_is_not_heard_out(phone, files, program):
    script = phone.root / "bin" / program
    script.write_text("#!/bin/sh\nexec yes 'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'\n")
    if program == "getprop":
        script.write_text("#!/bin/sh\nhead -c 100000000 /dev/zero | tr '\\0' A\n")
    with open_phone(phone, files) as device:
        ask = {"getprop": device.facts, "dumpsys": device.health}[program]
        with pytest.raises(DeviceUnreachable, match=r"far too much said by (sh|dumpsys)"):
            ask()


@pytest.mark.parametrize(
    "counts",
    [
        "count=20 first=39 curr=38 min=-30 max=60 avg=40.5 std=5",
        "count=20 first=39 curr=38 min=30 max=60 avg=nan std=5",
        "count=20 first=39 curr=38 min=30 max=60 avg=inf std=5",
        "count=0",
        "count=20 curr=38 min=30 max=60 avg=40.5 std=-1",
        "count=20 curr=38 min=30 max=60 avg=90 std=5",
        "count=20 curr=38 min=60 max=30 avg=40 std=5",
        "count=20 curr=38 min=30 max=60 avg=40 std=5 p5=50 median=40 p95=55",
        "count=20 curr=38 min=30 max=60 avg=40 std=5 p5=nan median=nan p95=nan",
        "count=999999999 curr=38 min=30 max=60 avg=40 std=5",
        "count=20 curr=38 min=30 max=1e300 avg=40 std=5",
        "count=99999999999999999999999 curr=38 min=30 max=60 avg=40 std=5",
        "count=20",
    ],
)
def test_times_that_cannot_be_true_are_refused(counts):
    with pytest.raises(ArtifactRefused, match=r"from? ?benchmark_model|of benchmark_model"):
        believe_round(counts, wall_s=1.0)


@pytest.mark.parametrize("more", ["", " p5=402 median=402 p95=402"])
def test_runs_that_all_took_equally_long_are_a_summary(more):
    found = believe_round(f"count=4 curr=402(all same){more}", wall_s=1.0)
    assert found.median_us == (402 if more else None)
    assert (found.count, found.min_us, found.max_us, found.mean_us, found.std_us) == (4, 402, 402, 402, 0)
    with pytest.raises(ArtifactRefused):
        believe_round("count=4 curr=402(all same)", wall_s=0.001)


def test_starts_and_memory_that_cannot_be_true_are_left_out():
    times = "Inference timings in us: Init: 9e9, First inference: -1, Warmup"
    lines = f"{COUNTS}\n{times}\nPeak memory footprint (MB): init=0 overall=1e9"
    found = believe_round(lines, wall_s=1.0)
    assert (found.init_us, found.first_us, found.peak_bytes) == (None, None, None)


def test_operators_that_took_longer_than_the_wall_clock_are_refused():
    header = "node type, start, first, avg_ms, %, cdf%, mem KB, times called, name"
    table = f"Regular Benchmark Runs:\n{header}\nCONV, 0, 0, {{}}, 0, 0, 0, 1, x\n"
    assert believe_operators_csv(table.format("2"), runs=50, wall_s=0.2)[0].total_ns == 2_000_000
    for hostile in ("5", "nan", "-1", "1e99"):
        with pytest.raises(ArtifactRefused, match="none that can be true"):
            believe_operators_csv(table.format(hostile), runs=50, wall_s=0.2)


def test_a_ratio_is_right_when_the_phone_slows_down(phone, files):
    """Both artifacts meet the same drift; b takes 1.5 times as long."""
    slow = files / "slow.tflite"
    slow.write_bytes(TFLITE + b"\0")
    script = """
count=$(wc -l < "$PHONE/runs.log"); base=$((200 + 10 * (count / 2)))
case "$2" in *{slow}*) base=$((base * 3 / 2));; esac
echo "count=20 first=$base curr=$base min=$base max=$((base + 2)) avg=$((base + 1)) std=1"
"""
    phone.write("tool", script.replace("{slow}", hashlib.sha256(slow.read_bytes()).hexdigest()[:32]))
    with open_phone(phone, files) as device:
        result = measure_phone(device, [two(files)[0], Artifact(name="slow", path=slow)])
    ratio = result["artifacts"]["slow"]["relative"]
    assert ratio["low"] <= 1.5 <= ratio["high"]
    assert ratio["high"] - ratio["low"] < 0.1
    assert "drift" in result["artifacts"]["a"]["flags"]
    means = [one["mean_us"] for one in result["artifacts"]["a"]["rounds"]]
    assert result["artifacts"]["a"]["mean_us"] == pytest.approx(np.mean(means))
