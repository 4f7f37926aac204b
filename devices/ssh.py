"""A device over SSH: a Raspberry Pi, a Jetson, any machine with an SSH server and Python.

One connection is kept, by an event loop in a thread of its own, so that the device may be used from any thread. On the
device, ``leash.py`` runs ``agent.py`` in a private folder and removes it when the connection ends, however it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tacit.devices.answers import DeviceUnreachable
from tacit.devices.leashed import with_adapters
from tacit.devices.remote_files import checked_name, packed
from tacit.devices.sandbox import Limits
from tacit.devices.ssh_connection import connect, parse_target
from tacit.devices.ssh_session import Session, open_session

__all__ = ["SshDevice"]

_T = TypeVar("_T")
_SETTLE_S = 30.0


class SshDevice:
    """Runs ``agent.py`` on another machine, each request in a fresh process there.

    *Guarantees.* The host's key is a known one, or nothing is sent. All that the device says is bounded in size and
    time, and nothing that it names becomes a path here. No process and no file of ours stays there: not after
    ``close``, nor when the connection has been lost for five minutes, nor, where the device itself went down, once the
    next session has started.

    Requests are obeyed one after the other, from whatever threads they come; ``close`` ends one that is under way.

    >>> with SshDevice("ssh:nobody@localhost:1") as device:  # doctest: +ELLIPSIS
    ...     device.facts()
    Traceback (most recent call last):
        ...
    tacit.devices.answers.DeviceUnreachable: expected a connection to ssh:nobody@localhost:1, got: ...
    """

    def __init__(
        self,
        target: str,
        *,
        name: str | None = None,
        python: str = "python3",
        folder: str = "/tmp",  # noqa: S108 - on the device, and what is made in it is private
        known_hosts: Path | None = None,
        key: Path | None = None,
        limits: Limits | None = None,
        timeout_s: float = 20.0,
    ) -> None:
        """Connect, and make a private folder on the device.

        Args:
            target: ``ssh:user@host[:port]``.
            name: What reports call it; by default the target.
            python: The Python there that has numpy and a runtime: a command, or a path; ``~/`` is the home there.
            folder: Where on the device the private folder is made.
            known_hosts: The file of known hosts; by default ``~/.ssh/known_hosts`` and the system's.
            key: A private key without a passphrase; by default those of the SSH agent and of ``~/.ssh``.
            limits: Wall-clock time, output and file size of a request are bounded by these.
            timeout_s: Seconds for the connection.

        Raises:
            HostKeyRefused: The host's key is unknown, changed or revoked.
            DeviceUnreachable: It cannot be reached, lets nobody in, or has no such Python or folder.
            ModuleNotFoundError: asyncssh is not installed.
            ValueError: The target is none.
        """
        parsed = parse_target(target)
        self.name = name or parsed.name
        self._limits = limits or Limits()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"tacit {self.name}", daemon=True)
        self._thread.start()
        self._session: Session | None = None
        try:
            connecting = connect(parsed, known_hosts=known_hosts, key=key, timeout_s=timeout_s)
            self._session = self._wait(open_session(self.name, connecting, python=python, folder=folder))
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs on the device, remove everything that was put there, and disconnect."""
        session, self._session = self._session, None
        if session is not None:
            try:
                self._wait(session.close())
            finally:
                self._stop_loop()

    def put(self, path: Path) -> str:
        """Copy a file onto the device and return the name by which requests refer to it.

        Raises:
            ArtifactRefused: The file is larger than 2 GiB.
            DeviceUnreachable: The connection was lost.
            DeviceFull: There is no room for it on the device.
        """
        remote, content = packed(path)
        self._wait(self._open_session().put(remote, content))
        return remote

    def get(self, remote: str) -> bytes:
        """Return a file that the agent wrote.

        Raises:
            ArtifactRefused: There is no such file, it is not a plain file, or it is too large.
            DeviceUnreachable: The connection was lost.
        """
        return self._wait(self._open_session().get(checked_name(remote), self._limits.file_size_bytes))

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the agent.

        Args:
            request: As described in ``agent.py``. ``limit_s``, if given, bounds the wall-clock seconds; the default is
                that of the device's limits. The file of an ``adapter`` is put on the device.

        Returns:
            The agent's answer, a JSON object of unchecked content.

        Raises:
            ArtifactRefused: The model file could not be run, crashed its runtime or took too long.
            ModuleNotFoundError: The runtime, or numpy, is not installed there.
            DeviceUnreachable: The connection was lost, or what came over it was no answer.
        """
        prepared = with_adapters(request, self.put)
        limit_s = float(request.get("limit_s", self._limits.wall_s))
        return self._wait(self._open_session().run(prepared, limit_s=limit_s, limits=self._limits))

    def facts(self) -> dict[str, Any]:
        """Describe the device, the server's version and key, and how many folders of earlier sessions were removed."""
        return {**self.run({"op": "facts"}), **self._open_session().facts()}

    def _open_session(self) -> Session:
        if self._session is None:
            raise DeviceUnreachable(f"expected an open device, got {self.name}, which was closed; make another")
        return self._session

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted; else it is over already
            raise

    def _stop_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _settle() -> None:
    """Let what was cancelled tidy up."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_SETTLE_S)
