"""Runs a command in a child process that a hostile model file cannot use against its parent.

A model file is code: runtimes answer a mutated one with a segmentation fault now and then, and their own policies
ask for a sandbox. The child has limits on memory, CPU time, file size and open files, no core dump, a session of
its own, an almost empty environment, and no network where Linux lets an ordinary user take it away. It can still
read what the user can read.

This file is also the launcher: run as a script it confines itself and then becomes the command, so that no Python
code runs between fork and exec (which is unsafe in a process with threads).
"""

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_POLL_S = 0.02


class ArtifactRefused(RuntimeError):
    """A model file, or what its runtime made of it, was not acceptable."""


class ArtifactCrashed(ArtifactRefused):
    """A signal ended the process that ran the model file."""


class ArtifactTimeout(ArtifactRefused):
    """The process that ran the model file took longer than its limit."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child process may use. The defaults let ONNX Runtime and LiteRT run models of up to about 1 GB."""

    wall_s: float = 60.0
    cpu_s: int = 60
    address_space_bytes: int = 4 << 30
    file_size_bytes: int = 256 << 20
    output_bytes: int = 64 << 20
    open_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A child process that came to its own end; ``network`` is "none" or, where it could not be cut off, "host"."""

    returncode: int
    stdout: bytes
    stderr: bytes
    network: str
    wall_s: float


def run_limited(command: list[str], *, stdin: bytes, limits: Limits, cwd: Path | None = None) -> Completed:
    """Run a command under limits and wait for its end.

    *Guarantees.* When this returns or raises, the child and its process group are dead and reaped. When this process
    is killed, the kernel kills the child. (A descendant that leaves the group by ``setsid`` is out of reach.)

    Args:
        command: The absolute path of the program and its arguments.
        stdin: Bytes for the child's standard input.
        limits: What the child may use.
        cwd: Folder in which the child runs; by default the caller's.

    Returns:
        Exit status, output, whether the network was cut off, and the wall-clock time.

    Raises:
        ArtifactTimeout: The child exceeded its wall-clock or CPU time.
        ArtifactCrashed: A signal ended the child.
        ArtifactRefused: The child wrote more than ``limits.output_bytes``.
        ValueError: The command is not an absolute path.

    >>> run_limited(["/bin/cat"], stdin=b"seen", limits=Limits(wall_s=10)).stdout
    b'seen'
    """
    if not command or not Path(command[0]).is_absolute():
        raise ValueError(f"expected a command that starts with an absolute path, got command={command!r}; resolve it")
    started_s = time.monotonic()
    status_read, status_write = os.pipe()
    try:
        process = _launch(command, limits, status_write, cwd)
    except BaseException:
        os.close(status_read)
        raise
    finally:
        os.close(status_write)
    with os.fdopen(status_read, "rb") as status, process:
        try:
            stdout, stderr = _exchange(process, stdin, limits, started_s + limits.wall_s)
        finally:
            _end(process)
        network = "none" if status.read(4) == b"none" else "host"
    _refuse_signals(process.returncode, limits)
    return Completed(
        returncode=process.returncode,
        stdout=stdout,
        stderr=stderr,
        network=network,
        wall_s=time.monotonic() - started_s,
    )


def _launch(command: list[str], limits: Limits, status_write: int, cwd: Path | None) -> subprocess.Popen[bytes]:
    orders = json.dumps({"limits": asdict(limits), "parent": os.getpid(), "status": status_write})
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    environment |= {name: os.environ.get(name, "1") for name in _THREAD_SETTINGS}
    # -I keeps this folder off the child's sys.path, where statistics.py would shadow the standard library's.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, orders, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(status_write,),
        start_new_session=True,
        env=environment,
        cwd=cwd,
    )


def _exchange(process: subprocess.Popen[bytes], stdin: bytes, limits: Limits, deadline_s: float) -> tuple[bytes, bytes]:
    """Feed stdin and collect both outputs until the child has exited; leaves the child unreaped."""
    outputs = (bytearray(), bytearray())
    unsent = memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        for pipe, output in zip((process.stdout, process.stderr), outputs, strict=True):
            selector.register(_open(pipe), selectors.EVENT_READ, data=output)
        os.set_blocking(_open(process.stdin).fileno(), False)
        selector.register(_open(process.stdin), selectors.EVENT_WRITE)
        exited = False
        while not (exited and not _readable(selector)):
            exited = exited or _has_exited(process)
            if time.monotonic() > deadline_s and not exited:
                raise ArtifactTimeout(f"the model file kept its runtime busy for more than {limits.wall_s:g} s")
            for key, _ in selector.select(0 if exited else _POLL_S):
                if key.data is None:
                    unsent = _send(selector, process, unsent)
                elif chunk := os.read(key.fd, 1 << 16):
                    key.data.extend(chunk)
                else:
                    selector.unregister(key.fileobj)
            if sum(map(len, outputs)) > limits.output_bytes:
                raise ArtifactRefused(f"the model file's runtime wrote more than {limits.output_bytes} bytes of output")
    return bytes(outputs[0]), bytes(outputs[1])


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("expected a process with pipes, got pipe=None; start it with PIPE for all three")
    return pipe


def _readable(selector: selectors.BaseSelector) -> bool:
    """Whether anything is left to read now: after the exit of the child, a grandchild must not keep us waiting."""
    return any(events & selectors.EVENT_READ for _, events in selector.select(0))


def _send(selector: selectors.BaseSelector, process: subprocess.Popen[bytes], unsent: memoryview) -> memoryview:
    pipe = _open(process.stdin)
    with contextlib.suppress(BrokenPipeError):  # a child need not read its input
        unsent = unsent[os.write(pipe.fileno(), unsent[: 1 << 16]) :] if unsent else unsent
        if unsent:
            return unsent
    selector.unregister(pipe)
    pipe.close()
    return unsent


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    # Not reaping keeps the process id, and so the group's id, from being given to somebody else before the kill.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _refuse_signals(returncode: int, limits: Limits) -> None:
    if returncode >= 0:
        return
    if -returncode == signal.SIGXCPU:
        raise ArtifactTimeout(f"the model file kept its runtime busy for more than {limits.cpu_s} s of CPU time")
    raise ArtifactCrashed(f"the model file crashed the runtime ({signal.Signals(-returncode).name})")


def _confine_and_become(orders: str, command: list[str]) -> None:
    """Confine this very process, then replace it by the command."""
    told = json.loads(orders)
    libc = ctypes.CDLL(None, use_errno=True)
    os.write(told["status"], b"none" if _leave_network(libc) else b"host")
    os.set_inheritable(told["status"], False)
    # After the name spaces: the kernel forgets the death signal when credentials change.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != told["parent"]:
        os._exit(1)  # the parent died before the death signal was armed
    _lower_limits(told["limits"])
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


def _leave_network(libc: ctypes.CDLL) -> bool:
    """Enter a user and a network name space of our own, in which there is not even a loopback; best effort."""
    uid, gid = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with contextlib.suppress(OSError):  # only the displayed owner depends on it
            Path("/proc/self", name).write_text(text, encoding="ascii")
    return True


def _lower_limits(limits: dict[str, int]) -> None:
    wanted = {
        resource.RLIMIT_AS: limits["address_space_bytes"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["file_size_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # One second between soft and hard: at the hard CPU limit comes SIGKILL, which does not tell its reason.
        slack = 1 if kind == resource.RLIMIT_CPU and hard in {resource.RLIM_INFINITY, ceiling + 1} else 0
        resource.setrlimit(kind, (ceiling, ceiling + slack))


if __name__ == "__main__":
    _confine_and_become(sys.argv[1], sys.argv[2:])
