"""One command on a phone while it runs: adb's second shell protocol, read in bounded pieces."""

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["EXIT", "STDERR", "STDOUT", "Said", "Shell"]

STDOUT, STDERR, EXIT = 1, 2, 3  # kinds of packets
_STDIN, _CLOSE_STDIN = 0, 4
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command said, and how that ended: it exited, or had used up its time or its amount of output."""

    ended: Literal["exit", "time", "output"]
    returncode: int
    stdout: bytes
    stderr: bytes


class Shell:
    """A command's input and outputs. Sockets' own errors come out of it, and EOFError where the stream ends."""

    def __init__(self, connection: Any) -> None:
        """Take a connection of adbutils on which the service has begun."""
        self._connection = connection
        self._conn: socket.socket = connection.conn
        self._held, self._kind, self._missing = b"", 0, 0

    def receive(self, deadline_s: float) -> list[tuple[int, bytes]]:
        """Wait for what comes next: kinds of packets and pieces of their content, of at most 64 KiB together.

        Raises:
            TimeoutError: Nothing has come by then, on the monotonic clock.
            EOFError: Nothing will.
        """
        self._conn.settimeout(max(0.001, deadline_s - time.monotonic()))
        chunk = self._conn.recv(_CHUNK_BYTES)
        if not chunk:
            raise EOFError("its end")
        self._held += chunk
        pieces: list[tuple[int, bytes]] = []
        while self._held:
            if not self._missing:
                if len(self._held) < 5:
                    break
                self._kind, self._missing = struct.unpack("<BI", self._held[:5])
                self._held = self._held[5:]
            taken, self._held = self._held[: self._missing], self._held[self._missing :]
            self._missing -= len(taken)
            pieces.append((self._kind, taken))
        return pieces

    def listen(
        self, streams: Mapping[int, bytearray], deadline_s: float, most_bytes: int
    ) -> tuple[Literal["exit", "time", "output"], int]:
        """Sort what comes into its streams, until the exit status, the time limit or too much of it."""
        total = 0
        while time.monotonic() < deadline_s:
            try:
                pieces = self.receive(deadline_s)
            except TimeoutError:
                break
            for kind, piece in pieces:
                total += 5 + len(piece)
                if kind == EXIT and piece:
                    return "exit", piece[0]
                if kind in streams:
                    streams[kind].extend(piece)
            if total > most_bytes:
                return "output", -1
        return "time", -1

    def write(self, content: bytes, deadline_s: float) -> None:
        """Send to the command's input; raises TimeoutError where it is not taken by then."""
        for start in range(0, len(content), _CHUNK_BYTES):
            piece = content[start : start + _CHUNK_BYTES]
            self._send(struct.pack("<BI", _STDIN, len(piece)) + piece, deadline_s)

    def write_end(self, deadline_s: float) -> None:
        """End the command's input."""
        self._send(struct.pack("<BI", _CLOSE_STDIN, 0), deadline_s)

    def close(self) -> None:
        """Hang up: the command's input ends, and what it says is lost."""
        self._connection.close()

    def _send(self, content: bytes, deadline_s: float) -> None:
        self._conn.settimeout(max(0.001, deadline_s - time.monotonic()))
        self._conn.sendall(content)
