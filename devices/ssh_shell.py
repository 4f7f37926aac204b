"""Short commands and whole files over an SSH connection, each bounded in size and time."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from typing import TYPE_CHECKING, Any, cast

from tacit.devices.answers import printable

if TYPE_CHECKING:
    import asyncssh

GRACE_S = 30.0  # to start Python on a slow board, and for the way there and back
FAREWELL_S = 10.0
MAX_LINE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 18


async def say_farewell(connection: asyncssh.SSHClientConnection, folder: str | None) -> None:
    """Remove a folder on the device, if there is one, and disconnect; what goes wrong now is nobody's concern."""
    with contextlib.suppress(*breaks()):
        if folder is not None:
            await hear_command(connection, f"rm -rf -- {shlex.quote(folder)}", limit_s=FAREWELL_S)
    connection.close()
    with contextlib.suppress(*breaks()):
        async with asyncio.timeout(FAREWELL_S):
            await connection.wait_closed()
    connection.abort()


async def hear_command(
    connection: asyncssh.SSHClientConnection, command: str, limit_s: float = GRACE_S
) -> tuple[str, str]:
    """Run a command that has little to say, and hear no more than that: its output and its complaints."""
    async with asyncio.timeout(limit_s):
        process = await connection.create_process(command, encoding=None)
        try:
            process.stdin.write_eof()
            said = await hear(process.stdout)
            complaint = await hear(process.stderr) if len(said) < MAX_LINE_BYTES else b""
            return said.decode("utf-8", errors="replace"), complaint.decode("utf-8", errors="replace")
        finally:
            process.channel.abort()


async def hear(stream: asyncssh.SSHReader[bytes]) -> bytes:
    """Read a stream to its end, or as much of it as a line may be long."""
    heard = b""
    while len(heard) < MAX_LINE_BYTES and (chunk := await stream.read(MAX_LINE_BYTES - len(heard))):
        heard += chunk
    return heard


async def write_file(sftp: asyncssh.SFTPClient, path: str, content: bytes) -> None:
    """Write a file, of whatever size."""
    async with sftp.open(path, "wb") as file:
        for start in range(0, len(content), 16 * CHUNK_BYTES):
            await file.write(content[start : start + 16 * CHUNK_BYTES])


async def read_file(sftp: asyncssh.SFTPClient, path: str, most_bytes: int) -> bytes:
    """Read a file in pieces: a server may give more than it said, or than it was asked for."""
    pieces: list[bytes] = []
    total = 0
    async with sftp.open(path, "rb", encoding=None) as file:
        while total <= most_bytes and (piece := await file.read(CHUNK_BYTES)):
            pieces.append(cast("bytes", piece))  # as opened
            total += len(piece)
    return b"".join(pieces)


def shell_word(path: str) -> str:
    """A path as a word for a shell; the home folder is the one there."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def lost_line(name: str, got: str) -> str:
    """The line for a connection that is of no more use."""
    return f"expected an answer of {name} over the connection, got: {got}; look after it, connect again and go on"


def reason_of(error: BaseException) -> str:
    """What an error says, in printable words."""
    if isinstance(error, TimeoutError):
        return "nothing in time"
    return printable(str(getattr(error, "reason", "") or error)) or type(error).__name__


def breaks() -> tuple[type[Exception], ...]:
    """The errors that a connection ends in."""
    return (OSError, asyncssh_module().Error)


def asyncssh_module() -> Any:
    """The library, which is not there on every computer."""
    import asyncssh  # its absence was told when the connection was opened

    return asyncssh
