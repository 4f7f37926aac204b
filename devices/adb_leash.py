"""A leash that a phone runs: orders to ``leash.py`` and the agent's answers, over a shell that stays open."""

import contextlib
import time
from collections.abc import Sequence

from tacit.devices.adb_link import AdbLink
from tacit.devices.adb_shell import EXIT, STDERR, STDOUT, Shell
from tacit.devices.answers import DeviceUnreachable, printable
from tacit.devices.leashed import Ended, believe_ended, believe_greeting

__all__ = ["AdbLeash"]

_MAX_LINE_BYTES = 1 << 16
_KEPT_COMPLAINT = 1000
_GRACE_S, _FAREWELL_S, _PULSE_S = 30.0, 5.0, 30.0
_LEAST_RATE = 200_000  # bytes a second; a slower transfer is given up


class AdbLeash:
    """One use at a time; after one that broke off half-way there is no other."""

    def __init__(self, link: AdbLink, command: Sequence[str]) -> None:
        """Start the leash by this command and wait for its first line.

        Raises:
            DeviceUnreachable: It does not say it; what the phone said instead is in the message.
        """
        self._link = link
        self._held, self._complaint = b"", b""
        self._lost: str | None = None
        self._shell: Shell = link.open_shell(command)
        try:
            self.removed = self._greeting()
        except BaseException:
            self._shell.close()
            raise

    def obey(self, order: bytes, *, limit_s: float, most_bytes: int) -> tuple[Ended, bytes]:
        """Have the agent obey an order; the leash's line about that, and the agent's output.

        Raises:
            DeviceUnreachable: The connection was lost, or what came over it was no answer.
        """
        if self._lost is not None:
            raise DeviceUnreachable(self._lost)
        self._link.go_on()
        self._lost = self._link.lost("an interrupted request")
        try:
            with self._link.guarded():
                self._shell.write(order, time.monotonic() + _GRACE_S + len(order) / _LEAST_RATE)
                line = self._line(time.monotonic() + limit_s + _GRACE_S)
                ended = self._believed(line, most_bytes)
                stdout = self._exactly(ended.stdout_bytes)
        except DeviceUnreachable as error:
            self._lost = str(error)
            raise
        self._lost = None
        return ended, stdout

    def close(self) -> None:
        """Let the leash kill what runs and remove its folder; hang up."""
        self._lost = self._lost or self._link.lost("a device that was closed")
        with contextlib.suppress(OSError, EOFError):
            self._shell.write_end(time.monotonic() + _FAREWELL_S)
            self._shell.listen({}, time.monotonic() + _FAREWELL_S, _MAX_LINE_BYTES)
        self._shell.close()

    def _greeting(self) -> int:
        """How many folders of earlier sessions were removed; a program's start may have said something before."""
        deadline_s, heard = time.monotonic() + _GRACE_S, 0
        with self._link.guarded():
            while heard <= _MAX_LINE_BYTES:
                line = self._line(deadline_s)
                heard += len(line) + 1
                removed = believe_greeting(line)
                if removed is not None:
                    return removed
        raise DeviceUnreachable(self._link.lost("far too much said, and nothing that is an answer"))

    def _believed(self, line: bytes, most_bytes: int) -> Ended:
        try:
            return believe_ended(line, most_bytes=most_bytes)
        except DeviceUnreachable as error:
            raise DeviceUnreachable(self._link.lost(str(error))) from None

    def _line(self, deadline_s: float) -> bytes:
        while b"\n" not in self._held:
            if len(self._held) > _MAX_LINE_BYTES:
                raise DeviceUnreachable(self._link.lost("far too much said, and nothing that is an answer"))
            self._hear(deadline_s)
        line, _, self._held = self._held.partition(b"\n")
        return line

    def _exactly(self, count: int) -> bytes:
        deadline_s, pieces, missing = time.monotonic() + _GRACE_S + count / _LEAST_RATE, [], count
        while True:
            pieces.append(self._held[:missing])
            self._held = self._held[missing:]
            missing -= len(pieces[-1])
            if not missing:
                return b"".join(pieces)
            self._hear(deadline_s)

    def _hear(self, deadline_s: float) -> None:
        """Wait for more of what the leash says; an empty line now and then tells it that we are there."""
        while True:
            try:
                pieces = self._shell.receive(min(deadline_s, time.monotonic() + _PULSE_S))
                break
            except TimeoutError:
                if time.monotonic() >= deadline_s:
                    raise
                self._shell.write(b"\n", time.monotonic() + _GRACE_S)
        for kind, piece in pieces:
            if kind == STDOUT:
                self._held += piece
            elif kind == STDERR:
                self._complaint = (self._complaint + piece)[-_KEPT_COMPLAINT:]
            elif kind == EXIT:
                said = printable(self._complaint.decode("utf-8", errors="replace").strip().rpartition("\n")[2])
                raise DeviceUnreachable(self._link.lost(said or "its end"))
