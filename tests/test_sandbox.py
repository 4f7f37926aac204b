"""The sandbox against children that misbehave, each for real."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, ArtifactTimeout, Completed, Limits, run_limited


def run_python(code: str, *, stdin: bytes = b"", limits: Limits | None = None) -> Completed:
    return run_limited([sys.executable, "-c", code], stdin=stdin, limits=limits or Limits(wall_s=20))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan that was killed stays visible as a zombie until init reaps it.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until_dead(pid: int) -> bool:
    deadline_s = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_good_child_returns_its_status_and_both_outputs():
    code = "import sys; sys.stdout.write(sys.stdin.read()[::-1]); sys.stderr.write('noted'); sys.exit(4)"
    done = run_python(code, stdin=b"abc")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"cba", b"noted")


def test_a_large_input_and_a_large_output_pass_through_whole():
    payload = bytes(range(256)) * 8192  # 2 MiB: more than any pipe holds
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert run_python(code, stdin=payload).stdout == payload


def test_a_child_that_never_reads_its_input_is_no_error():
    assert run_python("print('done')", stdin=b"x" * 1_000_000).stdout == b"done\n"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGFPE", "SIGBUS", "SIGILL"])
def test_death_by_a_signal_is_a_crash_that_names_the_signal(name):
    with pytest.raises(ArtifactCrashed, match=rf"the model file crashed the runtime \({name}\)"):
        run_python(f"import os, signal; os.kill(os.getpid(), signal.{name})")


def test_a_real_segmentation_fault_is_a_crash():
    with pytest.raises(ArtifactCrashed, match="SIGSEGV"):
        run_python("import ctypes; ctypes.string_at(0)")


def test_a_child_that_sleeps_past_the_wall_clock_limit_times_out():
    with pytest.raises(ArtifactTimeout, match=r"0\.3 s"):
        run_python("import time; time.sleep(60)", limits=Limits(wall_s=0.3))


def test_a_child_that_closes_its_outputs_and_lingers_times_out():
    code = "import os, time; os.close(1); os.close(2); time.sleep(60)"
    with pytest.raises(ArtifactTimeout):
        run_python(code, limits=Limits(wall_s=0.5))


def test_a_child_that_spins_past_the_cpu_limit_times_out():
    with pytest.raises(ArtifactTimeout, match="1 s of CPU time"):
        run_python("while True: pass", limits=Limits(wall_s=30, cpu_s=1))


def test_a_child_that_floods_its_output_is_refused():
    with pytest.raises(ArtifactRefused, match="more than 100000 bytes"):
        run_python("import os\nwhile True: os.write(2, b'x' * 4096)", limits=Limits(wall_s=20, output_bytes=100_000))


def test_memory_beyond_the_address_space_is_not_to_be_had():
    done = run_python("b'x' * (1 << 30)", limits=Limits(wall_s=20, address_space_bytes=512 << 20))
    assert b"MemoryError" in done.stderr


def test_limits_on_files_and_core_dumps_hold_in_the_child():
    code = """
import resource
print(*[resource.getrlimit(kind) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)])
"""
    done = run_python(code, limits=Limits(wall_s=20, file_size_bytes=4096, open_files=70))
    assert done.stdout == b"(4096, 4096) (70, 70) (0, 0)\n"


def test_the_environment_does_not_carry_secrets_and_asks_for_one_thread(monkeypatch):
    monkeypatch.setenv("TACIT_TEST_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = run_python("import os; print(dict(os.environ))").stdout
    assert b"hunter2" not in environment
    assert b"PYTHONPATH" not in environment
    assert b"'OMP_NUM_THREADS': '1'" in environment


def test_the_child_reaches_no_listener_of_ours_when_the_sandbox_says_there_is_no_network():
    code = """
import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
    print("connected")
except OSError:
    print("refused")
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        # Negative control: the same code does connect outside the sandbox.
        plain = subprocess.run([sys.executable, "-c", code, port], capture_output=True, check=True)
        done = run_limited([sys.executable, "-c", code, port], stdin=b"", limits=Limits(wall_s=20))
    assert plain.stdout == b"connected\n"
    assert done.stdout == {"none": b"refused\n", "host": b"connected\n"}[done.network]


def test_no_descriptor_of_ours_leaks_into_the_child():
    with Path(__file__).open() as held:
        os.set_inheritable(held.fileno(), True)
        done = run_python("import os; print(len([fd for fd in range(64) if os.path.exists(f'/proc/self/fd/{fd}')]))")
    assert done.stdout == b"3\n"


def test_a_grandchild_left_in_the_background_dies_with_the_child(tmp_path):
    noted = tmp_path / "pid"
    code = f"""
import os, time
pid = os.fork()
if pid == 0:
    time.sleep(600)
open({str(noted)!r}, "w").write(str(pid))
"""
    assert run_python(code).returncode == 0
    assert wait_until_dead(int(noted.read_text()))


def test_a_killed_parent_leaves_no_child_behind(tmp_path):
    noted = tmp_path / "pid"
    child = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
import sys
from tacit.devices.sandbox import Limits, run_limited
run_limited([sys.executable, "-c", {child!r}], stdin=b"", limits=Limits(wall_s=600))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": ".src"})
    deadline_s = time.monotonic() + 20
    while not (noted.exists() and noted.read_text()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    pid = int(noted.read_text())
    assert is_alive(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_until_dead(pid)


def test_every_child_is_reaped_whatever_happens():
    for code in ("pass", "import os; os.abort()", "while True: pass"):
        try:
            run_python(code, limits=Limits(wall_s=0.4))
        except ArtifactRefused:
            continue
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    stats = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
    assert not [command for command in stats if b"sandbox.py" in command or command == b""]


def test_parallel_children_do_not_mix_their_outputs():
    def echo(number: int) -> bytes:
        return run_python("import sys; sys.stdout.write(sys.stdin.read())", stdin=str(number).encode()).stdout

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(echo, range(12))) == [str(number).encode() for number in range(12)]


def test_a_program_without_an_absolute_path_is_refused():
    with pytest.raises(ValueError, match="absolute path"):
        run_limited(["python"], stdin=b"", limits=Limits())


def test_a_program_that_does_not_exist_fails_without_hanging():
    done = run_limited(["/nonexistent/program"], stdin=b"", limits=Limits(wall_s=20))
    assert done.returncode != 0
    assert b"No such file" in done.stderr
