"""Runs ``agent.py`` on a device for a host at the other end of a pipe, and leaves nothing behind. Python 3.9, no numpy.

``python leash.py`` is started in a private folder of its own, in which lie ``agent.py`` and a folder ``files``. It says
one line, ``{"leash": 1, "removed": 0}``; then each line on stdin is an order, obeyed by the agent in a fresh process:

    -> {"request": {...}, "limit_s": 60.0, "output_bytes": 67108864, "file_size_bytes": 268435456}
    <- {"ended": "exit", "returncode": 0, "stderr": "...", "stdout_bytes": 17}     followed by as many bytes

``ended`` is "exit", "time" or "output": what exceeds a limit is killed with all that it started. An empty line says
that the host is still there. When stdin ends, or nothing has come for five minutes, because a cable was pulled, then
the agent is killed and the folder removed. What a session left that had no time for this, because the device lost its
power, is removed by the next one: folders of this name and owner beside our own, whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

LEASH_VERSION = 1
FOLDER_PREFIX = "tacit-agent-"
_FOLDER = re.compile(re.escape(FOLDER_PREFIX) + "[A-Za-z0-9]{10}")
_SILENCE_S = 300
_UNLOCKED_S = 3600  # a folder this old without a lock is nobody's who is just about to make one
_STDERR_BYTES = 2000
_CHUNK_BYTES = 1 << 16
_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Inbox:
    """The host's lines; leaves the process when the host has gone."""

    def __init__(self) -> None:
        self._held = b""

    def receive(self) -> None:
        """Take in what has come; waits if nothing has."""
        chunk = os.read(0, _CHUNK_BYTES)
        if not chunk:
            raise SystemExit(0)
        signal.alarm(_SILENCE_S)
        self._held += chunk

    def next_order(self) -> Dict[str, Any]:
        """Wait for the next line that says something."""
        while True:
            line, newline, rest = self._held.partition(b"\n")
            if not newline:
                self.receive()
                continue
            self._held = rest
            if line.strip():
                order = json.loads(line)
                if isinstance(order, dict):
                    return order


def obey(order: Dict[str, Any], inbox: Inbox, folder: Path, woken: int) -> Tuple[Dict[str, Any], bytes]:
    """Run the agent once; returns the line about it and its output."""
    request = folder / "request.json"
    request.write_bytes(json.dumps(order["request"]).encode())

    def limit() -> None:
        for kind, most in ((resource.RLIMIT_FSIZE, order["file_size_bytes"]), (resource.RLIMIT_CORE, 0)):
            hard = resource.getrlimit(kind)[1]
            lowest = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (lowest, lowest))

    with request.open("rb") as source:
        child = subprocess.Popen(
            [sys.executable, str(folder / "agent.py")],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=str(folder / "files"),
            env=_environment(),
            start_new_session=True,
            preexec_fn=limit,
        )
    with child:
        try:
            ended, stdout, stderr = _watch(child, order, inbox, woken)
        finally:
            _kill(child)
    said = {"ended": ended, "returncode": child.returncode, "stderr": stderr.decode("utf-8", errors="replace")}
    kept = stdout if ended == "exit" else b""
    return {**said, "stdout_bytes": len(kept)}, kept


def _environment() -> Dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", "ORT_DISABLE_TELEMETRY": "1", **dict.fromkeys(_SETTINGS, "1")}


def _watch(child: subprocess.Popen[bytes], order: Dict[str, Any], inbox: Inbox, woken: int) -> Tuple[str, bytes, bytes]:
    """Collect both outputs until the child has exited or exceeds a limit. Nothing wakes while it is timed."""
    stdout, stderr, written = bytearray(), bytearray(), 0
    deadline_s = time.monotonic() + order["limit_s"]
    with selectors.DefaultSelector() as selector:
        for source, output in ((0, None), (woken, None), (child.stdout, stdout), (child.stderr, stderr)):
            selector.register(source, selectors.EVENT_READ, data=output)  # type: ignore[arg-type]  # pipes are open
        while True:
            exited, left_s = _has_exited(child), deadline_s - time.monotonic()
            ready = [key for key, _ in selector.select(0 if exited else max(0, left_s))]
            for key in ready:
                if key.fd == 0:
                    inbox.receive()
                elif key.fd == woken:
                    os.read(woken, _CHUNK_BYTES)
                else:
                    chunk = os.read(key.fd, _CHUNK_BYTES)
                    key.data.extend(chunk)
                    written += len(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
            del stderr[:-_STDERR_BYTES]
            if written > order["output_bytes"]:
                return "output", b"", bytes(stderr)
            if exited and not any(key.data is not None for key in ready):
                return "exit", bytes(stdout), bytes(stderr)
            if left_s <= 0:
                return "time", b"", bytes(stderr)


def _has_exited(child: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return child.poll() is not None
    # Not reaping keeps the process id, and so the group's, from being given to somebody else before the kill.
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def hold(folder: Path) -> int:
    """Take the lock that says that a session lives here; nobody ever sees it free."""
    fresh = folder / "lock.new"
    lock = os.open(str(fresh), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fresh.rename(folder / "lock")
    return lock


def sweep(folder: Path) -> int:
    """Remove what sessions without an end left beside this one; how many."""
    removed = 0
    for other in _neighbours(folder):
        try:
            if _is_abandoned(other):
                shutil.rmtree(str(other))
                removed += 1
        except OSError:  # somebody else was faster
            continue
    return removed


def _neighbours(folder: Path) -> List[Path]:
    try:
        return [path for path in folder.parent.iterdir() if _FOLDER.fullmatch(path.name) and path != folder]
    except OSError:  # a folder that may be entered but not listed
        return []


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    try:
        lock = os.open(str(folder / "lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - found.st_mtime > _UNLOCKED_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _leave(number: int, frame: object) -> None:
    del number, frame
    raise SystemExit(1)


def _say(line: Dict[str, Any], content: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve one host, then remove the folder that this file lies in."""
    folder = Path(__file__).resolve().parent
    ends = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    for number in ends:
        signal.signal(number, _leave)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that an exit wakes the watch
    try:
        hold(folder)
        signal.alarm(_SILENCE_S)
        _say({"leash": LEASH_VERSION, "removed": sweep(folder)})
        inbox = Inbox()
        while True:
            _say(*obey(inbox.next_order(), inbox, folder, woken))
    except BrokenPipeError:  # the host has gone
        pass
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_IGN)
        shutil.rmtree(str(folder), ignore_errors=True)


if __name__ == "__main__":
    main()
