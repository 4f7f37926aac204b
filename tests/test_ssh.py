"""A device over SSH, against a real OpenSSH server: whole measurements, strangers, cables pulled, full disks."""

import ast
import json
import math
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.devices import agent, leash
from tacit.devices.answers import DeviceFull, DeviceUnreachable, believe_facts, believe_timings
from tacit.devices.protocol import Artifact, measure
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, ArtifactTimeout, Limits
from tacit.devices.ssh import SshDevice
from tacit.devices.ssh_connection import HostKeyRefused, Target, parse_target

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from ssh_server import SshServer, fingerprint, make_key, processes_naming, running, small_disk
from test_agent import TFLITE, linear, onnx_bytes

INPUTS = np.random.default_rng(0).normal(size=(5, 3, 2, 2)).astype(np.float32)
PATIENCE_S = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[SshServer]:
    with running(tmp_path_factory.mktemp("ssh") / "server") as started:
        yield started


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty home, so that nobody's own keys and configuration take part."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path) -> Path:
    """Where on the device sessions make their folders."""
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


def open_device(server: SshServer, base: Path, **named: Any) -> SshDevice:
    given = {"known_hosts": server.known_hosts, "key": server.key, "python": sys.executable, "folder": str(base)}
    return SshDevice(server.target, **(given | named))


@pytest.fixture(scope="module")
def shared_base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def device(server, shared_base) -> Iterator[SshDevice]:
    with open_device(server, shared_base, name="board") as opened:
        yield opened
    assert list(shared_base.iterdir()) == []


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def script(path: Path, text: str) -> str:
    """Something that a device has in the place of a Python."""
    write(path, "#!/bin/sh\n" + text).chmod(0o755)
    return str(path)


def adapted(device: SshDevice, tmp_path: Path, code: str, **named: Any) -> dict[str, Any]:
    """Have the agent on the device open a model by code of ours; ``say`` writes in the place of the agent's answer."""
    lines = ["import os, sys, time", "from pathlib import Path"]
    lines += [
        "def say(text):",
        "    for fd in range(3, 10):",
        "        try: os.write(fd, text)",
        "        except OSError: pass",
    ]
    lines += ["def open_model(path, threads):", *(f"    {line}" for line in code.splitlines())]
    inputs = write(tmp_path / "inputs.npy", b"")
    np.save(inputs, INPUTS)
    model = {"name": "m", "path": "none", "runtime": "own", "layouts": ["channel_first"]}
    model["adapter"] = str(write(tmp_path / "adapter.py", "\n".join(lines) + "\n"))
    return device.run({"op": "predict", "model": model, "inputs": [device.put(inputs)], "outputs": ["y.npy"], **named})


def within_patience(holds: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.05)
    return holds()


# A device that is as it should be.


def test_onnx_and_tflite_artifacts_are_measured_over_ssh(device, tmp_path):
    artifacts = [
        Artifact(name="onnx", path=write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2)))),
        Artifact(name="lite", path=write(tmp_path / "m.tflite", TFLITE), input_layout="channel_last"),
    ]
    result = measure(device, artifacts, INPUTS)
    assert result["failed"] == {}
    assert list(result["artifacts"]) == ["onnx", "lite"]
    assert all(entry["n"] >= 64 and 0 < entry["p50_us"] <= entry["p90_us"] for entry in result["artifacts"].values())
    assert result["device"] == "board"
    assert result["facts"]["ssh_server"].startswith("SSH-2.0-OpenSSH")
    assert result["facts"]["python"] == sys.version.split()[0]


def test_predictions_come_back_whole(device, tmp_path):
    np.save(tmp_path / "x.npy", INPUTS)
    model = {"name": "m", "runtime": "onnxruntime", "layouts": ["channel_first"]}
    model["path"] = device.put(write(tmp_path / "m.onnx", onnx_bytes((3, 2, 2))))
    asked = {"op": "predict", "model": model, "inputs": [device.put(tmp_path / "x.npy")], "outputs": ["y0.npy"]}
    assert device.run(asked) == {"n": 5}
    fetched = write(tmp_path / "fetched.npy", device.get("y0.npy"))
    np.testing.assert_allclose(np.load(fetched), linear(INPUTS), rtol=1e-5, atol=1e-5)


def test_a_file_of_megabytes_goes_there_and_back(device, tmp_path):
    content = np.random.default_rng(1).bytes(9_000_001)
    remote = device.put(write(tmp_path / "Big.BIN", content))
    assert re.fullmatch(r"[0-9a-f]{32}\.bin", remote)
    assert device.get(remote) == content


def test_facts_hold_what_the_agent_and_the_connection_know(device, server):
    facts = device.facts()
    assert facts["agent_version"] == agent.AGENT_VERSION
    assert facts["ssh_host_key"] == fingerprint(server.host_key)
    assert facts["leftovers_removed"] == 0


def test_the_agents_environment_holds_nothing_but_what_it_needs(device, tmp_path):
    with pytest.raises(ArtifactRefused) as seen:
        adapted(device, tmp_path, "raise ValueError(' '.join(sorted(os.environ)))")
    allowed = {"PATH", "HOME", "LANG", "LC_CTYPE", "ORT_DISABLE_TELEMETRY"}
    allowed |= {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert set(str(seen.value).removeprefix("the model file could not be run: ").split()) <= allowed


def test_files_lie_where_only_their_owner_sees_them(device, shared_base):
    (folder,) = shared_base.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_many_threads_share_a_device_and_get_their_own_answers(device, tmp_path):
    contents = [bytes([number]) * 1000 for number in range(12)]
    paths = [write(tmp_path / f"{number}.bin", content) for number, content in enumerate(contents)]

    def one(path: Path) -> bytes:
        return device.get(device.put(path)) if path.stem != "5" else path.read_bytes() * bool(device.facts()["cores"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, paths)) == contents


def test_several_devices_work_at_once(server, base):
    with open_device(server, base) as first, open_device(server, base) as second, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda device: device.facts()["leftovers_removed"], [first, second]))
        assert len(list(base.iterdir())) == 2
    assert found == [0, 0]
    assert list(base.iterdir()) == []


def test_folders_and_pythons_with_awkward_names_are_words_and_not_commands(server, tmp_path):
    folder = tmp_path / 'it\'s $(touch gone); `touch gone` & "more" ü'
    folder.mkdir()
    python = script(folder / "my python", f'exec {shlex.quote(sys.executable)} "$@"\n')
    with open_device(server, folder, python=python) as device:
        assert device.facts()["cores"] >= 1
    assert [path.name for path in folder.iterdir()] == ["my python"]


def test_a_tilde_is_the_home_on_the_device(server, base):
    there = pwd.getpwuid(os.getuid()).pw_dir
    with pytest.raises(DeviceUnreachable, match=r"expected a folder to work in.*~/no-such-folder"):
        open_device(server, base, folder="~/no-such-folder")
    up = "../" * len(Path(there).parts)
    with open_device(server, base, folder=f"~/{up}{str(base)[1:]}", python=f"~/{up}{sys.executable[1:]}") as device:
        assert device.facts()["cores"] >= 1
        assert len(list(base.iterdir())) == 1
    assert list(base.iterdir()) == []


def test_keys_are_those_of_the_usual_files_or_of_the_agent(server, base, home, monkeypatch):
    with pytest.raises(DeviceUnreachable, match="ssh-add"):
        open_device(server, base, key=None)
    copied = Path(shutil.copy(server.key, home / ".ssh" / "id_ed25519"))
    with open_device(server, base, key=None) as device:
        assert device.facts()["cores"] >= 1
    address = str(home / "agent")  # a socket's path must be short
    with subprocess.Popen(["ssh-agent", "-D", "-a", address], stdout=subprocess.DEVNULL) as keeper:
        assert within_patience(lambda: Path(address).exists())
        monkeypatch.setenv("SSH_AUTH_SOCK", address)
        subprocess.run(["ssh-add", "-q", str(copied)], check=True, capture_output=True)
        copied.unlink()
        with open_device(server, base, key=None) as device:
            assert device.facts()["cores"] >= 1
        keeper.terminate()


# Whose key it is.


def refusal(server: SshServer, base: Path, **named: Any) -> str:
    already = (server.folder / "log").read_text()
    with pytest.raises(HostKeyRefused) as seen:
        open_device(server, base, **named)
    assert "\n" not in str(seen.value)
    since = (server.folder / "log").read_text()[len(already) :]
    assert "Accepted" not in since
    assert "Failed" not in since  # nobody even tried to log in
    return str(seen.value)


def test_an_unknown_host_key_is_refused_with_its_fingerprint(server, base, tmp_path):
    said = refusal(server, base, known_hosts=write(tmp_path / "known", ""))
    assert fingerprint(server.host_key) in said
    assert f": ssh-keyscan -p {server.port} 127.0.0.1 >> {tmp_path / 'known'}" in said


def test_the_advice_for_an_unknown_host_key_works_as_it_stands(server, base, tmp_path, home):
    """On a device of several keys, and here without a folder for SSH."""
    (home / ".ssh").rmdir()
    said = refusal(server, base, known_hosts=None)
    for kind in ("ed25519", "ecdsa", "rsa"):
        make_key(tmp_path / f"ssh_host_{kind}_key", kind)
    check = re.search("`(cat .*)`", said)[1].replace("/etc/ssh", str(tmp_path))
    shown = subprocess.run(["sh", "-c", check], capture_output=True, text=True, check=True).stdout
    assert len(shown.splitlines()) == 3
    subprocess.run(["sh", "-c", said.partition("itself: ")[2]], check=True, capture_output=True)
    with open_device(server, base, known_hosts=None) as device:
        assert device.facts()["python"] == sys.version.split()[0]


def test_a_given_file_that_is_empty_does_not_mean_the_users_own(server, base, tmp_path, home):
    write(home / ".ssh" / "known_hosts", server.known_line())
    with open_device(server, base, known_hosts=None):
        pass  # here the user's own is meant
    assert "not there" in refusal(server, base, known_hosts=write(tmp_path / "known", "# none\n"))


def test_a_changed_host_key_is_refused_with_both_fingerprints(server, base, tmp_path):
    other = make_key(tmp_path / "other")
    said = refusal(server, base, known_hosts=write(tmp_path / "known", server.known_line(other)))
    assert fingerprint(server.host_key) in said
    assert fingerprint(other) in said
    assert f"-R '[127.0.0.1]:{server.port}'" in said


def test_a_host_key_of_another_kind_is_a_changed_one(server, base, tmp_path):
    other = make_key(tmp_path / "other", "ecdsa")
    said = refusal(server, base, known_hosts=write(tmp_path / "known", server.known_line(other)))
    assert "got another" in said
    assert fingerprint(server.host_key) in said
    assert fingerprint(other) in said


def test_a_revoked_host_key_is_refused_though_it_is_known(server, base, tmp_path):
    lines = server.known_line() + "@revoked * " + server.known_line().split(" ", 1)[1]
    assert "revoked" in refusal(server, base, known_hosts=write(tmp_path / "known", lines))


def test_a_hashed_line_is_known_too(server, base, tmp_path):
    known = write(tmp_path / "known", server.known_line())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    with open_device(server, base, known_hosts=known) as device:
        assert device.facts()["cores"] >= 1


def test_the_users_configuration_names_hosts_but_cannot_switch_the_check_off(server, base, home):
    lines = ["Host board", "  HostName 127.0.0.1", f"  Port {server.port}", f"  IdentityFile {server.key}"]
    lines += ["  StrictHostKeyChecking no", "  UserKnownHostsFile none"]
    write(home / ".ssh" / "config", "\n".join(lines) + "\n")
    user = parse_target(server.target).user
    named = {"python": sys.executable, "folder": str(base)}
    with pytest.raises(HostKeyRefused, match=re.escape(fingerprint(server.host_key))):
        SshDevice(f"{user}@board", **named)
    write(home / ".ssh" / "known_hosts", server.known_line())
    with SshDevice(f"{user}@board", **named) as device:
        assert device.name == f"ssh:{user}@board"
        assert device.facts()["cores"] >= 1


@pytest.mark.parametrize("content", ["nonsense\n", "|1|bad|hash ssh-ed25519 AAAA\n", "@odd * ssh-ed25519 AAAA\n"])
def test_a_damaged_known_hosts_file_is_no_permission(server, base, tmp_path, content):
    with pytest.raises(HostKeyRefused, match="expected"):
        open_device(server, base, known_hosts=write(tmp_path / "known", content))


def test_files_that_are_not_there_are_named(server, base, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a known_hosts file"):
        open_device(server, base, known_hosts=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="private key"):
        open_device(server, base, key=tmp_path / "none")


# No connection.


def unreachable(*args: Any, **named: Any) -> str:
    with pytest.raises(DeviceUnreachable) as seen:
        SshDevice(*args, **named)
    assert "\n" not in str(seen.value)
    return str(seen.value)


def test_a_user_whom_the_device_does_not_know_is_refused_and_no_password_is_tried(server, base):
    said = unreachable(
        f"ssh:nobody-of-that-name@127.0.0.1:{server.port}", known_hosts=server.known_hosts, key=server.key
    )
    assert "nobody-of-that-name" in said
    assert "ssh-copy-id" in said
    assert "password" not in (server.folder / "log").read_text()


def test_a_key_that_the_device_does_not_know_is_refused(server, base, tmp_path):
    with pytest.raises(DeviceUnreachable, match="key refused"):
        open_device(server, base, key=make_key(tmp_path / "stranger"))


def test_a_key_with_a_passphrase_belongs_into_the_agent(server, base, tmp_path):
    with pytest.raises(DeviceUnreachable, match="ssh-add"):
        open_device(server, base, key=make_key(tmp_path / "locked", passphrase="secret"))  # noqa: S106 - of this test


def test_a_closed_port_says_that_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "nobody listens" in unreachable(f"ssh:pi@127.0.0.1:{free.getsockname()[1]}")
        assert "nobody listens" in unreachable(f"ssh:pi@localhost:{free.getsockname()[1]}")


def test_a_host_that_has_no_address_says_so():
    assert "no address" in unreachable("ssh:pi@no-such-host.invalid") or "no answer within" in unreachable(
        "ssh:pi@no-such-host.invalid", timeout_s=1
    )


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n" * 40, b"\x00" * 100_000, b"SSH-2.0-x\r\n\xff" * 9]
)
def test_a_port_where_something_else_listens_does_not_keep_us(greeting):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def serve() -> None:
            accepted.append(listener.accept()[0])
            accepted[0].sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        said = unreachable(f"ssh:pi@127.0.0.1:{listener.getsockname()[1]}", timeout_s=1)
        thread.join()
        accepted[0].close()
    assert said.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "ssh:",
            "pi@",
            "x; rm -rf /",
            "pi@host:0",
            "pi@host:65536",
            "pi@host:22x",
            "-oProxyCommand=id",
            "pi@-host",
        ),
        *("a b@c", "pi@host\n", "ssh:pi@[::1", "pi@ho st", "pi@$(id)", "pi@host/../x", "-x@host", "pi@\x1b[2J"),
    ],
)
def test_what_is_no_target_is_refused_without_a_connection(text):
    with pytest.raises(ValueError, match=r"expected ssh:user@host\[:port\]") as seen:
        SshDevice(text)
    assert str(seen.value).isprintable()


def test_targets_are_read_as_people_write_them():
    assert parse_target("pi@raspberrypi") == Target(host="raspberrypi", user="pi")
    assert parse_target("ssh:board.local:2222") == Target(host="board.local", port=2222)
    assert parse_target("ssh:pi@[fe80::1%eth0]:22") == Target(host="fe80::1%eth0", user="pi", port=22)
    for text in ("ssh:pi@raspberrypi", "ssh:board.local:2222", "ssh:pi@[::1]:22"):
        assert parse_target(text).name == text


# A device without what it should have.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "(?i)no such file|not found"),
        ("echo Python 2.7.18\nexit 1\n", "2.7.18"),
        ("exit 0\n", "no answer"),
        ('echo \'{"leash": 99}\'; echo "old \033[2J\007one" >&2\n', "old"),
        ("cat /dev/zero | head -c 1000000000\n", "Python 3.9 or newer"),
        ("yes\n", "Python 3.9 or newer"),
    ],
)
def test_without_a_python_there_is_one_line_and_no_folder(server, base, tmp_path, text, said):
    python = str(tmp_path / "no-python") if text is None else script(tmp_path / "fake-python", text)
    with pytest.raises(DeviceUnreachable, match=said) as seen:
        open_device(server, base, python=python)
    assert str(seen.value).isprintable()
    assert list(base.iterdir()) == []
    assert within_patience(lambda: not processes_naming(str(base)))


def test_a_python_without_numpy_says_what_is_missing(server, base, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    missing = pytest.raises(ModuleNotFoundError, match=r"numpy.*; pip install .* on the device")
    with open_device(server, base, python=str(tmp_path / "bare" / "bin" / "python")) as device, missing:
        device.facts()
    assert list(base.iterdir()) == []


def test_a_folder_where_nothing_may_be_executed_is_good_enough(server, base, tmp_path):
    program = write(base / "program", "#!/bin/sh\n")
    program.chmod(0o755)
    with small_disk(base, 8 << 20, "noexec") as mounted:
        if mounted:
            write(base / "program", "#!/bin/sh\n").chmod(0o755)
        else:  # this user may mount nothing: then none of the files on the device has the right to be executed
            program.chmod(0o644)
        with pytest.raises(PermissionError):
            subprocess.run([str(base / "program")], check=True)
        with open_device(server, base) as device:
            assert device.facts()["cores"] >= 1
            assert device.get(device.put(write(tmp_path / "x.bin", b"seen"))) == b"seen"


def test_a_folder_that_is_not_there_or_not_ours_is_named(server, base):
    with pytest.raises(DeviceUnreachable, match=r"expected a folder to work in.*no-such"):
        open_device(server, base, folder=str(base / "no-such"))
    with pytest.raises(DeviceUnreachable, match="expected a folder to work in"):
        open_device(server, base, folder="/proc")


def test_a_full_disk_refuses_one_file_and_leaves_room_for_others(tmp_path, base):
    small, large = write(tmp_path / "small.bin", b"x" * 1000), write(tmp_path / "large.bin", os.urandom(3 << 20))
    with small_disk(base, 1 << 20) as mounted:
        wrapper = () if mounted else ("bash", "-c", 'ulimit -f 1024; exec "$@"', "bash")
        with running(tmp_path / "server", wrapper=wrapper) as server, open_device(server, base) as device:
            with pytest.raises(DeviceFull if mounted else OSError, match=r"expected .* bytes|connection") as seen:
                device.put(large)
            assert "\n" not in str(seen.value)
            if mounted:
                assert device.get(device.put(small)) == b"x" * 1000
                assert device.facts()["cores"] >= 1
        assert within_patience(lambda: not list(base.iterdir()))


def test_a_disk_without_room_for_the_agent_is_said_at_once(server, base):
    with small_disk(base, 8192) as mounted:
        if mounted:
            with pytest.raises(DeviceUnreachable, match="room for the agent"):
                open_device(server, base)
        assert list(base.iterdir()) == []


def test_a_server_without_sftp_says_what_to_install(tmp_path, base):
    refused = pytest.raises(DeviceUnreachable, match="openssh-sftp-server")
    with running(tmp_path / "server", sftp=False) as server, refused:
        open_device(server, base)
    assert list(base.iterdir()) == []


# An agent that misbehaves.


def test_a_hung_agent_is_killed_on_the_device_with_its_children(device, tmp_path, shared_base):
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(600)', {str(tmp_path)!r}]"
    code = f"import subprocess\nsubprocess.Popen({sleeper})\ntime.sleep(600)"
    with pytest.raises(ArtifactTimeout, match="more than 2 s"):
        adapted(
            device,
            tmp_path,
            code.replace("'sleep', '600'", "sys.executable, '-c', 'import time; time.sleep(600)'"),
            limit_s=2,
        )
    assert within_patience(lambda: not processes_naming(str(tmp_path)))
    assert device.facts()["cores"] >= 1  # the session goes on


def test_a_gigabyte_of_output_ends_the_agent_and_nothing_else(device, tmp_path):
    for stream in ("say(block)", "os.write(2, block)"):
        with pytest.raises(ArtifactRefused, match="wrote more than 67108864 bytes"):
            adapted(device, tmp_path, f"block = b'x' * (1 << 20)\nfor _ in range(1024): {stream}")
    assert device.facts()["cores"] >= 1


def test_output_up_to_the_limit_arrives(device, tmp_path):
    answer = "'{\"n\": \"' + 'x' * 5_000_000 + '\"}'"
    assert len(adapted(device, tmp_path, f"say(({answer}).encode())\nos._exit(0)")["n"]) == 5_000_000


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("say(b'rubbish \\xff\\xfe\\x00\\n'); os._exit(0)", "without an answer"),
        ("os._exit(0)", "without an answer"),
        ("say(b'[1, 2]\\n'); os._exit(0)", "without an answer"),
        ("say(b'[' * 100000); os._exit(0)", "without an answer"),
        ("os.write(2, b'\\x1b[2J\\x07bad\\r\\nnews'); os._exit(7)", r"\(exit status 7\): \[2J bad news"),
        ("raise ValueError('\\x1b[31m\\n\\u202e' + 'x' * 10000)", r"could not be run: \[31m x{200}"),
    ],
)
def test_an_agent_that_answers_rubbish_is_refused_in_printable_words(device, tmp_path, code, reason):
    with pytest.raises(ArtifactRefused, match=reason) as seen:
        adapted(device, tmp_path, code)
    assert str(seen.value).isprintable()
    assert len(str(seen.value)) < 500


def test_negative_samples_arrive_and_are_not_believed(device, tmp_path):
    lie = json.dumps({"models": {"m": {"samples_ns": [-5] * 100, "runs_per_sample": 1}}})
    answer = adapted(device, tmp_path, f"say({lie.encode()!r})\nos._exit(0)")
    with pytest.raises(ArtifactRefused, match="positive integer samples_ns"):
        believe_timings(answer, ["m"], wall_s=60)


def test_a_model_that_crashes_its_runtime_is_named_so(device, tmp_path):
    with pytest.raises(ArtifactCrashed, match="SIGSEGV"):
        adapted(device, tmp_path, "import ctypes\nctypes.string_at(0)")


def test_what_the_agent_may_write_is_bounded(server, base, tmp_path):
    with open_device(server, base, limits=Limits(file_size_bytes=100_000)) as device:
        with pytest.raises(ArtifactRefused):
            adapted(device, tmp_path, "Path('y.npy').write_bytes(b'x' * 200_000)")
        assert len(device.get("y.npy")) == 100_000
        remote = device.put(write(tmp_path / "large.bin", b"x" * 100_001))
        with pytest.raises(ArtifactRefused, match="at most 100000 bytes"):
            device.get(remote)


@pytest.mark.parametrize(
    ("remote", "make"),
    [
        ("link", "os.symlink('/etc/passwd', {!r})"),
        ("folder", "os.mkdir({!r})"),
        ("pipe", "os.mkfifo({!r})"),
        ("no", "{!r}"),
    ],
)
def test_only_plain_files_are_fetched(device, tmp_path, remote, make):
    with pytest.raises(ArtifactRefused):
        adapted(device, tmp_path, f"{make.format(remote)}\nos._exit(1)")
    with pytest.raises(ArtifactRefused, match=f"plain file.*{remote}"):
        device.get(remote)


@pytest.mark.parametrize("remote", ["../agent.py", "/etc/passwd", "", ".", "a/b", "a\n", "A"])
def test_a_name_that_put_did_not_return_is_refused_here(device, remote):
    with pytest.raises(ValueError, match="that put"):
        device.get(remote)


# A device that is hostile beyond its agent.


@pytest.mark.parametrize(
    "answer",
    [
        "printf 'rubbish \\033[2J\\n'",
        "head -c 1000000000 /dev/zero",
        """echo '{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": -1}'""",
        """echo '{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 1e99}'""",
        """echo '{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 999999999999}'""",
        """echo '{"ended": "never", "returncode": "0"}'""",
        """echo '{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 10}'; printf short""",
        "exit 0",
    ],
)
def test_a_device_that_says_something_else_is_left_and_takes_little_memory(server, base, tmp_path, answer):
    python = script(tmp_path / "python", f'echo \'{{"leash": 1, "removed": 0}}\'; read order; {answer}\n')
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_device(server, base, python=python) as device:
        for _ in range(2):
            with pytest.raises(DeviceUnreachable) as seen:
                device.run({"op": "facts"})
            assert str(seen.value).isprintable()
        with pytest.raises(DeviceUnreachable):
            device.put(write(tmp_path / "x.bin", b""))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10
    assert list(base.iterdir()) == []


def test_what_no_text_and_no_number_can_hold_is_refused_or_left_out(server, base, tmp_path):
    said = json.dumps({"ended": "exit", "returncode": 1, "stderr": "\ud800\u202ebad", "stdout_bytes": 0})
    greeting = json.dumps({"leash": leash.LEASH_VERSION, "removed": 10**400})
    python = script(tmp_path / "python", f"echo '{greeting}'; read order; echo '{said}'; cat\n")
    with open_device(server, base, python=python) as device, pytest.raises(ArtifactRefused, match="bad") as seen:
        device.facts()
    assert str(seen.value).isprintable()
    facts = {"cores": 10**400, "load_1m": math.nan, "temperature_c": -math.inf, "cpu": "A\ud800\u202eB", "python": "3"}
    assert believe_facts(facts) == {"cpu": "A  B", "python": "3"}


def test_a_device_that_never_answers_is_left_after_the_limit(server, base, tmp_path, monkeypatch):
    monkeypatch.setattr("tacit.devices.ssh_session.GRACE_S", 1.0)
    monkeypatch.setattr("tacit.devices.ssh_session.FAREWELL_S", 1.0)
    python = script(tmp_path / "python", "echo '{\"leash\": 1, \"removed\": 0}'; trap '' HUP TERM; exec sleep 30\n")
    with open_device(server, base, python=python) as device, pytest.raises(DeviceUnreachable, match="nothing in time"):
        device.run({"op": "facts", "limit_s": 0.5})
    assert list(base.iterdir()) == []


# The end.


def start_long_run(device: SshDevice, tmp_path: Path, failures: list[BaseException]) -> threading.Thread:
    def work() -> None:
        try:
            adapted(device, tmp_path, f"Path({str(tmp_path / 'started')!r}).write_text('')\ntime.sleep(600)")
        except (ArtifactRefused, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert within_patience((tmp_path / "started").exists)
    return thread


def test_a_connection_lost_midway_is_one_error_and_the_device_cleans_up_by_itself(tmp_path, base):
    failures: list[BaseException] = []
    with running(tmp_path / "server") as server, open_device(server, base) as device:
        thread = start_long_run(device, tmp_path, failures)
        assert processes_naming(str(base))
        server.stop()
        thread.join(PATIENCE_S)
        assert [type(error) for error in failures] == [DeviceUnreachable]
        assert "connect again" in str(failures[0])
        assert within_patience(lambda: not processes_naming(str(base)))
        assert within_patience(lambda: not list(base.iterdir()))
        with pytest.raises(DeviceUnreachable):
            device.put(tmp_path / "inputs.npy")
        server.start()
        with open_device(server, base) as again:
            assert again.facts()["leftovers_removed"] == 0
    assert list(base.iterdir()) == []


def test_a_device_that_lost_its_power_is_tidied_by_the_next_session(tmp_path, base):
    failures: list[BaseException] = []
    with running(tmp_path / "server") as server:
        with open_device(server, base) as device:
            thread = start_long_run(device, tmp_path, failures)
            server.stop(power=True)
            thread.join(PATIENCE_S)
        assert [type(error) for error in failures] == [DeviceUnreachable]
        assert len(list(base.iterdir())) == 1
        assert within_patience(lambda: not processes_naming(str(base)))
        server.start()
        with open_device(server, base) as again:
            assert again.facts()["leftovers_removed"] == 1
    assert list(base.iterdir()) == []


def test_closing_a_device_ends_what_another_thread_has_under_way(server, base, tmp_path):
    failures: list[BaseException] = []
    device = open_device(server, base)
    thread = start_long_run(device, tmp_path, failures)
    device.close()
    thread.join(PATIENCE_S)
    assert [type(error) for error in failures] == [DeviceUnreachable]
    assert "closed" in str(failures[0])
    assert list(base.iterdir()) == []
    assert within_patience(lambda: not processes_naming(str(base)))
    with pytest.raises(DeviceUnreachable, match="closed"):
        device.facts()
    device.close()  # again does nothing


def test_an_interrupt_ends_the_run_on_the_device(server, base, tmp_path):
    marker = tmp_path / "started"

    def interrupt() -> None:
        if within_patience(marker.exists):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), open_device(server, base) as device:
        adapted(device, tmp_path, f"Path({str(marker)!r}).write_text('')\ntime.sleep(600)")
    thread.join()
    assert list(base.iterdir()) == []
    assert within_patience(lambda: not processes_naming(str(base)))


def test_after_an_error_of_the_caller_nothing_is_left(server, base, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError), open_device(server, base) as device:
        device.put(tmp_path / "x")
    assert list(base.iterdir()) == []


def test_what_a_dead_session_left_is_removed_and_told_and_nothing_else(server, base):
    abandoned = base / f"{leash.FOLDER_PREFIX}0123456789"
    fresh, old = base / f"{leash.FOLDER_PREFIX}freshfresh", base / f"{leash.FOLDER_PREFIX}oldoldold0"
    for folder in (abandoned, fresh, old, base / "tacit-agent-other", base / "tacit-agent-0123456789x", base / "mine"):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"x")
    (abandoned / "lock").touch()
    os.utime(old, (1, 1))
    (base / f"{leash.FOLDER_PREFIX}linklinkli").symlink_to(base / "mine")
    kept = {fresh.name, "tacit-agent-other", "tacit-agent-0123456789x", "mine", f"{leash.FOLDER_PREFIX}linklinkli"}
    if os.getuid() == 0:
        foreign = base / f"{leash.FOLDER_PREFIX}foreignfor"
        foreign.mkdir()
        (foreign / "lock").touch()
        os.chown(foreign, 12345, 12345)
        kept.add(foreign.name)
    with open_device(server, base) as living:
        assert living.facts()["leftovers_removed"] == 2
        (folder,) = {path for path in base.iterdir() if (path / "lock").exists()} - {base / name for name in kept}
        os.utime(folder, (1, 1))
        with open_device(server, base) as second:
            assert second.facts()["leftovers_removed"] == 0
        assert living.facts()["cores"] >= 1  # a session that lives is nobody's leftover
    assert {path.name for path in base.iterdir()} == kept
    assert (base / "mine" / "model.onnx").exists()


def test_a_leash_that_hears_nothing_lets_go_and_one_that_hears_something_stays(tmp_path):
    folder = tmp_path / f"{leash.FOLDER_PREFIX}0123456789"
    (folder / "files").mkdir(parents=True)
    source = Path(leash.__file__).read_text(encoding="utf-8").replace("_SILENCE_S = 300", "_SILENCE_S = 1")
    write(folder / "leash.py", source)
    shutil.copy(agent.__file__, folder / "agent.py")
    command = [sys.executable, "leash.py"]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"leash": 1, "removed": 0}
        for _ in range(6):
            process.stdin.write(b"\n")
            time.sleep(0.4)
            assert process.poll() is None
        assert process.wait(PATIENCE_S) == 1
    assert not folder.exists()


def test_the_leash_is_python_3_9_and_stands_alone():
    source = Path(leash.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names)


def test_without_asyncssh_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tacit\[devices\]'"):
        SshDevice("ssh:pi@127.0.0.1:1")
