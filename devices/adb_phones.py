"""Which phone behind this computer's adb server is meant, and why it is not there."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from tacit.devices.adb_link import GRACE_S, AdbLink, breaks, reason_of
from tacit.devices.answers import DeviceUnreachable, printable

__all__ = ["choose", "open_link", "parse_target"]

_TARGET = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]{0,127}))?")
_LOCAL = ("127.0.0.1", "localhost", "::1")
_WHAT_TO_DO = {
    "unauthorized": "unlock the phone and accept its question about this computer's key",
    "authorizing": "unlock the phone and accept its question about this computer's key",
    "offline": "plug it in again, or `adb reconnect offline`",
    "connecting": "wait for it, or plug it in again",
    "no": "give this user the right to use its USB device (udev rules), then `adb kill-server`",  # "no permissions"
}


def parse_target(text: str) -> str | None:
    """Read ``adb[:serial]``; the serial is None where none is given.

    Raises:
        ValueError: It is no such text.

    >>> parse_target("adb:192.168.1.20:5555"), parse_target("adb")
    ('192.168.1.20:5555', None)
    >>> parse_target("adb:x; rm -rf /")
    Traceback (most recent call last):
        ...
    ValueError: expected adb or adb:SERIAL, got device='adb:x; rm -rf /'; take a serial that `adb devices` shows
    """
    found = _TARGET.fullmatch(text)
    if found is None:
        shown = printable(text)
        raise ValueError(f"expected adb or adb:SERIAL, got device={shown!r}; take a serial that `adb devices` shows")
    return found["serial"]


def choose(serial: str | None, states: Sequence[tuple[str, str]]) -> str:
    """Return the serial of the phone that is meant and that answers.

    Args:
        serial: That is asked for; None where there should be one phone only.
        states: Serial and state of each that the adb server knows.

    Raises:
        DeviceUnreachable: There is none, it does not answer, or there are several and none is named.

    >>> choose(None, [("R5CT1", "device")])
    'R5CT1'
    >>> choose(None, [("R5CT1", "device"), ("R5CT2", "device")])
    Traceback (most recent call last):
        ...
    tacit.devices.answers.DeviceUnreachable: expected one phone at adb, got 2: R5CT1, R5CT2; name one as adb:SERIAL
    """
    shown = ", ".join(printable(found) for found, _ in states[:8])
    if not states:
        raise DeviceUnreachable(
            "expected a phone at adb, got none; plug it in and switch on USB debugging, or `adb connect ADDRESS`"
        )
    if serial is None and len(states) > 1:
        raise DeviceUnreachable(f"expected one phone at adb, got {len(states)}: {shown}; name one as adb:SERIAL")
    chosen, state = next(((one, state) for one, state in states if serial in (None, one)), (None, ""))
    if chosen is None:
        raise DeviceUnreachable(f"expected the phone {serial} at adb, got {shown}; plug it in, or name another")
    if state != "device":
        advice = _WHAT_TO_DO.get(state, "start Android on it")
        what = "no permissions" if state == "no" else printable(state)
        raise DeviceUnreachable(f"expected the phone {printable(chosen)} to be ready, got: {what}; {advice}")
    return chosen


def open_link(target: str) -> AdbLink:
    """Find the phone, starting an adb server where none runs yet.

    The server is that of adb's own ``ANDROID_ADB_SERVER_PORT``.

    Raises:
        DeviceUnreachable: There is no server, or the phone does not answer, or is older than Android 7.
        ModuleNotFoundError: adbutils is not installed.
        ValueError: The target is none.
    """
    serial = parse_target(target)
    try:
        import adbutils
    except ModuleNotFoundError:
        raise ModuleNotFoundError("expected adbutils for a phone; pip install 'tacit[devices]'") from None
    except ValueError:  # it reads this variable as it is imported
        port = printable(os.environ.get("ANDROID_ADB_SERVER_PORT", ""))
        raise DeviceUnreachable(f"expected a port, got ANDROID_ADB_SERVER_PORT={port!r}; unset it") from None
    client = adbutils.AdbClient(socket_timeout=GRACE_S)
    try:
        _start_server(client)
        chosen = choose(serial, [(found.serial, found.state) for found in client.list()])
        with client.make_connection() as connection:
            connection.send_command(f"host-serial:{chosen}:features")
            connection.check_okay()
            features = connection.read_string_block()
    except breaks() as error:
        if isinstance(error, DeviceUnreachable):
            raise
        why = reason_of(error)
        raise DeviceUnreachable(f"expected an answer of the adb server, got: {why}; try `adb devices`") from error
    if "shell_v2" not in features.split(","):
        raise DeviceUnreachable(f"expected Android 7 or newer on {chosen}, got an older adbd; name another phone")
    return AdbLink(client, name=target, serial=chosen)


def _start_server(client: Any) -> None:
    """Start the server here and not in adbutils, which lets it write to our output."""
    import adbutils

    with contextlib.suppress(OSError):
        socket.create_connection((client.host, client.port), timeout=3).close()
        return
    where = f"{printable(client.host)}:{client.port}"
    if client.host not in _LOCAL:
        raise DeviceUnreachable(f"expected an adb server at {where}, got none; start it there")
    command, quiet = [adbutils.adb_path(), "start-server"], subprocess.DEVNULL
    try:
        subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=GRACE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise DeviceUnreachable(f"expected an adb server at {where}, got none; try `adb start-server`") from error
