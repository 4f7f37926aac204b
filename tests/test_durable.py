"""A file is its old content or all of the new, whatever happens in between."""

import os
import shutil
import subprocess
import sys

import pytest

from tacit.devices.durable import sync_folder, write_durably


def test_the_content_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_durably(path, b"old")
    write_durably(path, b"\x00new" * 1000)
    assert path.read_bytes() == b"\x00new" * 1000
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_the_one_asked_for(tmp_path, mode):
    path = tmp_path / "a"
    write_durably(path, b"x", mode=mode)
    assert path.stat().st_mode & 0o777 & ~0o022 == mode & ~0o022


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_when_a_step_fails_the_old_content_stays_and_no_file_is_left(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    write_durably(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "gone" / "a", b"x")
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "gone")


WRITE = "import sys, pathlib; from tacit.devices.durable import write_durably; "
CALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows the order of system calls")
def test_the_kernel_sees_write_fsync_rename_and_fsync_of_the_folder_in_this_order(tmp_path):
    trace, target = tmp_path / "trace", tmp_path / "target"
    code = WRITE + "write_durably(pathlib.Path(sys.argv[1]), b'payload')"
    command = ["strace", "-y", "-o", str(trace), "-e", f"trace={CALLS}", sys.executable, "-c", code, str(target)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("expected a kernel that allows tracing")
    ours = [line for line in trace.read_text().splitlines() if str(tmp_path) in line]
    steps = [(line.partition("(")[0], ".tmp" in line) for line in ours]
    assert [(name, temporary) for name, temporary in steps if name != "openat"] == [
        ("write", True),
        ("fsync", True),
        ("rename", True),
        ("fsync", False),
    ]
    assert ours[-1].startswith("fsync(")
    assert f"<{tmp_path}>" in ours[-1]
