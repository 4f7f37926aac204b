"""One session on a device over SSH: a private folder, the leash that runs the agent in it, files in and out.

All that comes from the device is read in bounded pieces, and no longer than a slow board needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tacit.devices import agent, leash
from tacit.devices.answers import DeviceFull, DeviceUnreachable, printable
from tacit.devices.leashed import Ended, answer_of, believe_ended, believe_greeting, folder_name, order_of
from tacit.devices.sandbox import ArtifactRefused, Limits
from tacit.devices.ssh_shell import (
    CHUNK_BYTES,
    FAREWELL_S,
    GRACE_S,
    MAX_LINE_BYTES,
    asyncssh_module,
    breaks,
    hear,
    hear_command,
    lost_line,
    read_file,
    reason_of,
    say_farewell,
    shell_word,
    write_file,
)

if TYPE_CHECKING:
    import asyncssh

__all__ = ["Session", "open_session"]

_ADVICE = "pip install numpy onnxruntime ai-edge-litert for that Python on the device"
_PULSE_S = 30.0
_LEAST_RATE = 50_000  # bytes a second; a slower transfer is given up


class Session:
    """A leash that has answered; its methods run in the event loop of the connection, one after the other."""

    def __init__(
        self,
        *,
        name: str,
        folder: str,
        connection: asyncssh.SSHClientConnection,
        sftp: asyncssh.SFTPClient,
        process: asyncssh.SSHClientProcess[bytes],
    ) -> None:
        """Take over what ``open_session`` has made."""
        self._name, self._folder = name, folder
        self._connection, self._sftp, self._process = connection, sftp, process
        self._turns = asyncio.Lock()
        self._lost: str | None = None
        self._held = b""
        self._removed = 0
        self._pulse = asyncio.create_task(self._beat())

    async def greet(self) -> None:
        """Read the leash's first line; a shell's own start may have said something before."""
        heard, removed = 0, None
        async with asyncio.timeout(GRACE_S):
            while removed is None:
                line = await self._line()
                heard += len(line)
                if heard > MAX_LINE_BYTES:
                    raise DeviceUnreachable(lost_line(self._name, "far too much said, and nothing that is an answer"))
                removed = believe_greeting(line)
        self._removed = removed

    async def run(self, request: dict[str, Any], *, limit_s: float, limits: Limits) -> dict[str, Any]:
        """Have the agent obey a request."""
        order = order_of(request, limit_s=limit_s, limits=limits)
        async with self._turn():
            async with asyncio.timeout(limit_s + GRACE_S + len(order) / _LEAST_RATE):
                self._process.stdin.write(order)
                await self._process.stdin.drain()
                ended = self._believed(await self._line(), limits)
            async with asyncio.timeout(GRACE_S + ended.stdout_bytes / _LEAST_RATE):
                stdout = await self._exactly(ended.stdout_bytes)
        return answer_of(ended, stdout, limit_s=limit_s, limits=limits, advice=_ADVICE)

    async def put(self, remote: str, content: bytes) -> None:
        """Write a file; what could not be written whole is removed again."""
        asyncssh, path = asyncssh_module(), self._path(remote)
        async with self._turn():
            try:
                async with asyncio.timeout(GRACE_S + len(content) / _LEAST_RATE):
                    await write_file(self._sftp, path, content)
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
                raise
            except asyncssh.SFTPError as error:
                await self._explain(error, path, len(content))

    async def get(self, remote: str, most_bytes: int) -> bytes:
        """Read a plain file of at most so many bytes."""
        asyncssh, path = asyncssh_module(), self._path(remote)
        refusal = f"expected a plain file of at most {most_bytes} bytes on {self._name}, got remote={remote!r}"
        async with self._turn():
            try:
                async with asyncio.timeout(GRACE_S):
                    found = await self._sftp.lstat(path)
                if found.type != asyncssh.FILEXFER_TYPE_REGULAR or not 0 <= (found.size or 0) <= most_bytes:
                    raise ArtifactRefused(f"{refusal}; run it again")
                async with asyncio.timeout(GRACE_S + (found.size or 0) / _LEAST_RATE):
                    content = await read_file(self._sftp, path, most_bytes)
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
                raise
            except asyncssh.SFTPError as error:
                raise ArtifactRefused(f"{refusal}: {printable(error.reason)}; run it again") from error
        if len(content) > most_bytes:
            raise ArtifactRefused(f"{refusal}; run it again")
        return content

    def facts(self) -> dict[str, Any]:
        """What the connection knows of the device."""
        key = self._connection.get_server_host_key()
        return {
            "ssh_server": str(self._connection.get_extra_info("server_version", "")),
            "ssh_host_key": key.get_fingerprint() if key else None,
            "leftovers_removed": self._removed,
        }

    def forget(self) -> None:
        """Send nothing more."""
        self._pulse.cancel()

    async def close(self) -> None:
        """Let the leash kill what runs and remove the folder; see to it where it does not; disconnect."""
        self.forget()
        self._lost = self._lost or f"expected an open device, got {self._name}, which was closed; make another"
        with contextlib.suppress(*breaks()):
            async with asyncio.timeout(FAREWELL_S):
                self._process.stdin.write_eof()
                await self._process.channel.wait_closed()
        left: str | None = self._folder
        asyncssh = asyncssh_module()
        with contextlib.suppress(*breaks()):
            async with asyncio.timeout(FAREWELL_S):
                try:
                    await self._sftp.lstat(self._folder)
                except asyncssh.SFTPNoSuchFile:
                    left = None
        await say_farewell(self._connection, left)

    def _path(self, remote: str) -> str:
        return f"{self._folder}/files/{remote}"

    def _believed(self, line: bytes, limits: Limits) -> Ended:
        try:
            return believe_ended(line, most_bytes=limits.output_bytes)
        except DeviceUnreachable as error:
            raise DeviceUnreachable(lost_line(self._name, str(error))) from None

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One use of the connection at a time; after one that broke off half-way there is no other."""
        async with self._turns:
            if self._lost is not None:
                raise DeviceUnreachable(self._lost)
            try:
                yield
            except asyncio.CancelledError:
                self._lost = lost_line(self._name, "an interrupted request")
                raise
            except DeviceFull:
                raise
            except DeviceUnreachable as error:
                self._lost = self._lost or str(error)
                self._process.channel.abort()
                raise
            except breaks() as error:
                self._lost = self._lost or lost_line(self._name, reason_of(error))
                self._process.channel.abort()
                raise DeviceUnreachable(self._lost) from error

    async def _line(self) -> bytes:
        while b"\n" not in self._held:
            if len(self._held) > MAX_LINE_BYTES:
                raise DeviceUnreachable(lost_line(self._name, "far too much said, and nothing that is an answer"))
            await self._hear(CHUNK_BYTES)
        line, _, self._held = self._held.partition(b"\n")
        return line

    async def _exactly(self, count: int) -> bytes:
        pieces, missing = [self._held[:count]], count - len(self._held)
        self._held = self._held[count:]
        while missing > 0:
            await self._hear(min(missing, CHUNK_BYTES))
            pieces.append(self._held)
            missing -= len(self._held)
            self._held = b""
        return b"".join(pieces)

    async def _hear(self, most_bytes: int) -> None:
        chunk = await self._process.stdout.read(most_bytes)
        if not chunk:
            raise DeviceUnreachable(self._lost or lost_line(self._name, "its end"))
        self._held += chunk

    async def _beat(self) -> None:
        """Tell the leash now and then that we are there; without that it lets go."""
        with contextlib.suppress(*breaks()):
            while True:
                await asyncio.sleep(_PULSE_S)
                self._process.stdin.write(b"\n")

    async def _explain(self, error: asyncssh.SFTPError, path: str, size_bytes: int) -> None:
        """Raise why a file could not be written; SFTP has one word, "Failure", for a full disk and for much else."""
        asyncssh, free_bytes = asyncssh_module(), None
        async with asyncio.timeout(GRACE_S):
            with contextlib.suppress(asyncssh.SFTPError):
                await self._sftp.remove(path)
            with contextlib.suppress(asyncssh.SFTPError):
                found = await self._sftp.statvfs(self._folder)
                free_bytes = int(found.bavail) * int(found.frsize)
        if free_bytes is not None and free_bytes < size_bytes:
            raise DeviceFull(
                f"expected {size_bytes} free bytes on {self._name}, got {free_bytes} in {self._folder}; make room, or "
                "give another folder"
            ) from error
        reason = printable(error.reason)
        raise DeviceFull(
            f"expected {self._name} to keep a file of {size_bytes} bytes, got: {reason}; is there a limit on its disk?"
        ) from error


async def open_session(
    name: str, connecting: Coroutine[Any, Any, asyncssh.SSHClientConnection], *, python: str, folder: str
) -> Session:
    """Connect, make the private folder, fill it and start the leash in it; undo all of it if one of these fails.

    Args:
        name: What messages call the device.
        connecting: Opens the connection.
        python: The Python there: a command or a path; ``~/`` is the home there.
        folder: Where on the device the private folder is made.

    Raises:
        DeviceUnreachable: It went wrong; why, in a line.
    """
    connection = await connecting
    made, session = None, None
    try:
        sftp = await _start_sftp(connection, name)
        made = await _make_folder(sftp, name, folder)
        async with asyncio.timeout(2 * GRACE_S):
            await _fill(sftp, name, made)
            command = f"cd {shlex.quote(made)} && exec {shell_word(python)} leash.py"
            process = await connection.create_process(command, encoding=None)
        session = Session(name=name, folder=made, connection=connection, sftp=sftp, process=process)
        try:
            await session.greet()
        except (TimeoutError, DeviceUnreachable) as error:
            raise DeviceUnreachable(await _no_python(connection, name, python, process)) from error
    except BaseException as error:
        if session is not None:
            session.forget()
        await say_farewell(connection, made)
        if isinstance(error, breaks()) and not isinstance(error, DeviceUnreachable):
            raise DeviceUnreachable(lost_line(name, reason_of(error))) from error
        raise
    return session


async def _make_folder(sftp: asyncssh.SFTPClient, name: str, folder: str) -> str:
    """Make a folder of a name of our own, which must be new, that only its owner may enter."""
    above = "." if folder in {"", "~"} else folder.rstrip("/")
    above = f"./{above.removeprefix('~/')}" if above and not above.startswith("/") else above
    made = f"{above}/{folder_name()}"
    asyncssh = asyncssh_module()
    try:
        async with asyncio.timeout(GRACE_S):
            await sftp.mkdir(made, asyncssh.SFTPAttrs(permissions=0o700))
    except asyncssh.SFTPError as error:
        reason = reason_of(error)
        raise DeviceUnreachable(
            f"expected a folder to work in on {name}, got folder={folder!r}: {reason}; give another"
        ) from error
    return made


async def _start_sftp(connection: asyncssh.SSHClientConnection, name: str) -> asyncssh.SFTPClient:
    try:
        async with asyncio.timeout(GRACE_S):
            return await connection.start_sftp_client()
    except breaks() as error:
        raise DeviceUnreachable(
            f"expected SFTP on {name}, got: {reason_of(error)}; install openssh-sftp-server there, or switch it on"
        ) from error


async def _fill(sftp: asyncssh.SFTPClient, name: str, folder: str) -> None:
    try:
        await sftp.mkdir(f"{folder}/files")
        for source in (agent.__file__, leash.__file__):
            await write_file(sftp, f"{folder}/{Path(source).name}", Path(source).read_bytes())
    except asyncssh_module().SFTPError as error:
        raise DeviceUnreachable(
            f"expected room for the agent on {name}, got: {reason_of(error)}; make room, or give another folder"
        ) from error


async def _no_python(
    connection: asyncssh.SSHClientConnection, name: str, python: str, process: asyncssh.SSHClientProcess[bytes]
) -> str:
    """Say what was found in the place of a Python."""
    complaint, version = "", ""
    with contextlib.suppress(*breaks()):
        if process.stdout.at_eof():  # or else it talks on and on
            async with asyncio.timeout(FAREWELL_S):
                complaint = (await hear(process.stderr)).decode("utf-8", errors="replace").strip()
    process.channel.abort()
    with contextlib.suppress(*breaks()):
        version = " ".join(await hear_command(connection, f"{shell_word(python)} --version", limit_s=FAREWELL_S))
    known = re.search(r"Python [0-9][0-9A-Za-z.+]{0,20}", version)
    said = ": ".join(filter(None, (known and known[0], printable(complaint.rpartition("\n")[2])))) or "no answer"
    return f"expected Python 3.9 or newer as {python!r} on {name}, got: {said}; name another"
