"""One phone behind this computer's adb server: given files and commands, heard within limits.

Commands are lists of arguments, quoted each, and what comes back is read in bounded pieces here: adbutils itself would
read on as long as a phone sends, and would not say why a phone refuses a file.
"""

from __future__ import annotations

import contextlib
import select
import shlex
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from tacit.devices.adb_shell import STDERR, STDOUT, Said, Shell
from tacit.devices.answers import DeviceFull, DeviceUnreachable, printable

__all__ = ["GRACE_S", "AdbLink", "breaks", "reason_of"]

_CHUNK_BYTES = 1 << 16  # the most that the sync protocol takes at once
_MAX_SAID_BYTES = 1 << 16
GRACE_S = 20.0
_LEAST_RATE = 200_000  # bytes a second; a slower transfer is given up


class AdbLink:
    """Commands and files for one phone, each in a connection of its own."""

    def __init__(self, client: Any, *, name: str, serial: str) -> None:
        """Take a client of adbutils, which connects to the server."""
        self._client = client
        self.name, self.serial = name, serial
        self.interrupted = threading.Event()
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()

    def interrupt(self) -> None:
        """Break off what is under way, from another thread; the phone may then be tidied up."""
        self.interrupted.set()
        for connection in list(self._connections):
            with contextlib.suppress(*breaks()):
                connection.conn.shutdown(socket.SHUT_RDWR)

    def go_on(self) -> None:
        """Raise DeviceUnreachable where this was interrupted: before work, and not before tidying up."""
        if self.interrupted.is_set():
            raise DeviceUnreachable(self.lost("an interruption"))

    def ask(
        self,
        arguments: Sequence[str],
        *,
        limit_s: float = GRACE_S,
        most_bytes: int = _MAX_SAID_BYTES,
        heard: bytearray | None = None,
    ) -> Said:
        """Run a command on the phone; ``heard`` holds its output also where this is interrupted.

        Raises:
            DeviceUnreachable: The connection was lost.
        """
        stdout, stderr, deadline_s = bytearray() if heard is None else heard, bytearray(), time.monotonic() + limit_s
        with self._opened(_shell_service(arguments), min(limit_s, GRACE_S)) as connection:
            ended, returncode = Shell(connection).listen({STDOUT: stdout, STDERR: stderr}, deadline_s, most_bytes)
        return Said(ended=ended, returncode=returncode, stdout=bytes(stdout), stderr=bytes(stderr))

    def feed(self, arguments: Sequence[str], content: bytes) -> Said:
        """Run a command on the phone with this as its input.

        Raises:
            DeviceUnreachable: The connection was lost.
        """
        stdout, stderr = bytearray(), bytearray()
        deadline_s = time.monotonic() + GRACE_S + len(content) / _LEAST_RATE
        with self._opened(_shell_service(arguments), GRACE_S) as connection:
            shell = Shell(connection)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reading finds out why
                shell.write(content, deadline_s)
                shell.write_end(deadline_s)
            ended, returncode = shell.listen({STDOUT: stdout, STDERR: stderr}, deadline_s, _MAX_SAID_BYTES)
        return Said(ended=ended, returncode=returncode, stdout=bytes(stdout), stderr=bytes(stderr))

    def open_shell(self, arguments: Sequence[str]) -> Shell:
        """Begin a command that goes on until its ``Shell`` is closed.

        Raises:
            DeviceUnreachable: The connection was lost.
        """
        with self.guarded():
            return Shell(self._connect(_shell_service(arguments), GRACE_S))

    def hear(self, arguments: Sequence[str], *, limit_s: float = GRACE_S) -> str:
        """What a short command says, as text; its exit status is of no interest.

        Raises:
            DeviceUnreachable: It was lost, does not end or says far too much.
        """
        said = self.ask(arguments, limit_s=limit_s)
        if said.ended != "exit":
            what = "nothing in time" if said.ended == "time" else "far too much said"
            raise DeviceUnreachable(self.lost(f"{what} by {printable(arguments[0])}"))
        return said.stdout.decode("utf-8", errors="replace").replace("\r", "")

    def push(self, content: bytes, path: str, *, executable: bool = False) -> None:
        """Write a file.

        Raises:
            DeviceFull: The phone did not keep it.
            DeviceUnreachable: The connection was lost.
        """
        wanted = f"{path},{0o100700 if executable else 0o100600}".encode()
        pieces = [content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES)]
        messages = [_message(b"SEND", wanted), *(_message(b"DATA", piece) for piece in pieces)]
        deadline_s = time.monotonic() + GRACE_S + len(content) / _LEAST_RATE
        with self._opened("sync:", GRACE_S) as connection:
            _send_all(connection.conn, [*messages, b"DONE" + struct.pack("<I", int(time.time()))], deadline_s)
            connection.conn.settimeout(_left_s(deadline_s))
            kind, length = struct.unpack("<4sI", connection.read_exact(8))
            reason = connection.read_exact(min(length, 1000)) if kind == b"FAIL" else b""
        if kind == b"FAIL":
            why = printable(reason.decode("utf-8", errors="replace"))
            raise DeviceFull(
                f"expected {self.name} to keep a file of {len(content)} bytes, got: {why}; make room on it"
            )
        if kind != b"OKAY":
            raise DeviceUnreachable(self.lost(f"{printable(kind.decode('latin-1'))!r} for a file"))

    def lost(self, got: str) -> str:
        """The line for a phone that is of no more use."""
        return f"expected an answer of {self.name} over adb, got: {got}; plug it in again and go on"

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What breaks a connection here is said as ``DeviceUnreachable``."""
        try:
            yield
        except breaks() as error:
            if isinstance(error, DeviceUnreachable | DeviceFull):
                raise
            raise DeviceUnreachable(self.lost(reason_of(error))) from error

    @contextlib.contextmanager
    def _opened(self, service: str, limit_s: float) -> Iterator[Any]:
        with self.guarded(), self._connect(service, limit_s) as connection:
            yield connection

    def _connect(self, service: str, limit_s: float) -> Any:
        # Not by adbutils' own open_transport, which leaves a socket open for each refusal.
        connection = self._client.make_connection(timeout=limit_s)
        self._connections.add(connection)
        try:
            for request in (f"host:transport:{self.serial}", service):
                connection.send_command(request)
                connection.check_okay()
        except BaseException:
            connection.close()
            raise
        return connection


def _send_all(conn: socket.socket, messages: Sequence[bytes], deadline_s: float) -> None:
    """Send until all is sent, or the phone has something to say, which can only be a refusal."""
    for message in messages:
        if select.select([conn], [], [], 0)[0]:
            return
        conn.settimeout(_left_s(deadline_s))
        try:
            conn.sendall(message)
        except (BrokenPipeError, ConnectionResetError):
            return  # the reading finds out why


def _shell_service(arguments: Sequence[str]) -> str:
    return f"shell,v2,raw:{shlex.join(arguments)}"


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content


def _left_s(deadline_s: float) -> float:
    return max(0.001, deadline_s - time.monotonic())


def reason_of(error: BaseException) -> str:
    """What an error says, in printable words."""
    if isinstance(error, TimeoutError) or type(error).__name__ == "AdbTimeout":
        return "nothing in time"
    return printable(str(error)) or type(error).__name__


def breaks() -> tuple[type[Exception], ...]:
    """The errors that a connection ends in; the adb server's numbers that are none raise ValueError in adbutils."""
    import adbutils

    return (OSError, EOFError, ValueError, struct.error, adbutils.AdbError)
