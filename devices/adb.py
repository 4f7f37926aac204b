"""A phone over adb, on which the user's own ``benchmark_model`` runs TFLite files.

Android has no Python to run ``agent.py``. Where Termux is there, and lets adb in, ``termux.py`` runs its Python.
"""

import contextlib
import hashlib
import re
import secrets
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tacit.devices.adb_link import AdbLink
from tacit.devices.adb_phones import open_link
from tacit.devices.answers import DeviceUnreachable, printable
from tacit.devices.benchmark_tool import MAX_OUTPUT_BYTES, Turn, elf_abi, refuse_failed, tool_arguments
from tacit.devices.conditions import Conditions, believe_readings, interpret, watch
from tacit.devices.phone import PROPERTIES, Health, core_clocks, core_mask, fast_cores, phone_facts, read_health
from tacit.devices.phone_battery import battery_readings
from tacit.devices.phone_performance import fixed_performance
from tacit.devices.remote_files import checked_name, packed
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["AdbDevice", "DeviceUnfit", "ToolRun"]

_FOLDER_PREFIX = "tacit-"
_LETTERS = string.ascii_lowercase + string.digits
_MAX_GOT_BYTES = 64 << 20
_FAREWELL_S = 5.0
_MARGIN_S = 30.0  # to start the tool and to load a model on a slow phone
_POLL_S = 10.0
# Our own words only: each runs in the phone's shell as it stands.
_READ_PROPERTIES = 'for name in "$@"; do getprop "$name" | head -n 1; done'
_READ_FILES = 'for file in {patterns}; do [ -r "$file" ] && echo "$file $(head -n 1 "$file" 2>/dev/null)"; done'
_RUN = 'echo "tacit-pid $$"; exec "$@"'  # the number stays that of the tool
_CLOCKS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq"
_NO_TOOL = (
    "expected benchmark_model for a phone over adb, got none; build LiteRT's with the Android NDK and name it, or let "
    "measure_termux() run .onnx files"
)


class DeviceUnfit(DeviceUnreachable):
    """A device answers, and is too hot or too low to be measured."""


@dataclass(frozen=True, kw_only=True)
class ToolRun:
    """What one process of the tool said, and the seconds that it took by this computer's clock."""

    said: str
    wall_s: float


class AdbDevice:
    """A phone with a private folder on it: files in and out, facts, heat and battery, and runs of ``benchmark_model``.

    *Guarantees.* Commands are lists of arguments, each quoted for the phone's shell. All that the phone says is bounded
    in size and time, and nothing that it names becomes a path here. ``close`` removes the folder; one that a lost
    phone kept is removed by a session a day later. Fixed performance mode ends where it was begun, or an error says
    that it did not, and how to end it.

    >>> AdbDevice("adb:x; rm -rf /")
    Traceback (most recent call last):
        ...
    ValueError: expected adb or adb:SERIAL, got device='adb:x; rm -rf /'; take a serial that `adb devices` shows
    """

    def __init__(
        self,
        target: str = "adb",
        *,
        name: str | None = None,
        benchmark_model: Path | None = None,
        folder: str = "/data/local/tmp",
        regardless: bool = False,
        patience_s: float = 300.0,
    ) -> None:
        """Find the phone and make a private folder on it.

        Args:
            target: ``adb[:serial]``.
            name: What reports call it; by default the target.
            benchmark_model: LiteRT's tool, built for the phone's processor.
            folder: Where on the phone the private folder is made.
            regardless: Measure also when it is hot or low; the conditions say so.
            patience_s: How long to wait for a hot phone.

        Raises:
            DeviceUnreachable: There is no phone, or none that answers, or the folder cannot be made.
            FileNotFoundError: The tool is not there.
            ArtifactRefused: The tool is no program for Android.
            ModuleNotFoundError: adbutils is not installed.
            ValueError: The target is none.
        """
        self._tool = None if benchmark_model is None else _read_tool(benchmark_model)
        self.name = name or target
        self._link: AdbLink = open_link(target)
        self._regardless, self._patience_s = regardless, patience_s
        self._facts: dict[str, Any] | None = None
        self._clocks: dict[int, int] = {}
        self._tool_path: str | None = None
        self._folder = self._make_folder(folder.rstrip("/"))

    def __enter__(self) -> Self:
        return self

    @property
    def link(self) -> AdbLink:
        """The way to the phone, for what runs elsewhere on it."""
        return self._link

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything that was put on the phone, unless it has gone."""
        with contextlib.suppress(DeviceUnreachable):
            self._link.ask(["rm", "-rf", self._folder], limit_s=_FAREWELL_S)

    def put(self, path: Path) -> str:
        """Copy a file onto the phone and return the name by which requests refer to it.

        Raises:
            ArtifactRefused: The file is larger than 2 GiB.
            DeviceFull: The phone did not keep it.
            DeviceUnreachable: The connection was lost.
        """
        remote, content = packed(path)
        self._link.push(content, self._path(remote))
        return remote

    def get(self, remote: str) -> bytes:
        """Return a file of the private folder.

        Raises:
            ArtifactRefused: There is no such file, or it is larger than 64 MiB.
            DeviceUnreachable: The connection was lost.
        """
        return read_file(self._link, ["cat", self._path(remote)], remote)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer ``{"op": "facts"}``; the other requests of ``agent.py`` need Python on the device.

        Raises:
            ArtifactRefused: The request is another one.
            DeviceUnreachable: The connection was lost.
        """
        if request.get("op") == "facts":
            return self.facts()
        raise ArtifactRefused(
            "expected a phone with Python, got adb, which has none; measure_phone() runs benchmark_model on it, "
            "measure_termux() the Python of Termux"
        )

    def facts(self) -> dict[str, Any]:
        """Describe the phone: model, processor, Android, cores and their clocks."""
        if self._facts is None:
            told = self._link.hear(["sh", "-c", _READ_PROPERTIES, "sh", *PROPERTIES.values()])
            cpuinfo = self._link.hear(["cat", "/proc/cpuinfo"])
            self._clocks = core_clocks(self._link.hear(["sh", "-c", _READ_FILES.format(patterns=_CLOCKS)]))
            self._facts = phone_facts(told.split("\n"), cpuinfo, self._clocks)
        tool = hashlib.sha256(self._tool).hexdigest() if self._tool else None
        return {**self._facts, "benchmark_model_sha256": tool}

    def identity(self) -> str:
        """Tell this phone from another one: maker, model, processor, and a digest of its serial number."""
        facts = self.facts()
        what, unit = str(facts.get("cpu") or self.name), facts.get("unit")
        return f"{what} (unit {unit})" if unit else what

    def health(self) -> Health:
        """What the phone says of its heat and its battery."""
        return read_health(self._link.hear(["dumpsys", "thermalservice"]), self._link.hear(["dumpsys", "battery"]))

    def battery(self) -> dict[str, str]:
        """What the phone says of its battery's charge, as Linux has it in files."""
        return battery_readings(self._link.hear(["dumpsys", "battery"]))

    def conditions(self) -> Conditions:
        """What the phone is like now: heat, battery, clocks, load."""
        patterns = " ".join(watch(None))
        lines = self._link.hear(["sh", "-c", _READ_FILES.format(patterns=patterns)]).splitlines()
        readings = believe_readings(dict(line.partition(" ")[::2] for line in lines))
        health = {name: value for name, value in self.health().conditions().items() if value is not None}
        return {**dict.fromkeys(("thermal_status", "battery_temperature_c")), **interpret(readings), **health}

    def wait_until_fit(self, say: Callable[[str], None]) -> Health:
        """Wait for a hot phone to cool down.

        Raises:
            DeviceUnfit: It does not, or its battery is low; unless that is to be disregarded.
            DeviceUnreachable: The connection was lost.
        """
        deadline_s = time.monotonic() + self._patience_s
        is_told = False
        while (reasons := (health := self.health()).reasons()) and not self._regardless:
            left_s = deadline_s - time.monotonic()
            if health.thermal_status and len(reasons) == 1 and left_s > 0:
                if not is_told:
                    most = f"at most {self._patience_s:.0f} s; or measure it regardless"
                    say(f"waiting for it to cool down, thermal status {health.thermal_status}, {most}")
                is_told = True
                self._link.interrupted.wait(min(_POLL_S, left_s))
                self._link.go_on()
                continue
            what = " and ".join(reasons)
            raise DeviceUnfit(
                f"expected {self.name} cool and charged, got: {what}; let it rest and charge, or measure regardless"
            )
        return health

    def fixed_performance(self, say: Callable[[str], None]) -> contextlib.AbstractContextManager[bool]:
        """Hold the phone's clocks: ``phone_performance.fixed_performance``."""
        return fixed_performance(self._link, self.facts().get("sdk"), say=say)

    def require_tool(self) -> None:
        """Copy the tool onto the phone.

        Raises:
            ModuleNotFoundError: The device was made without one.
            ArtifactRefused: It is for another processor.
            DeviceFull: The phone did not keep it.
            DeviceUnreachable: The connection was lost.
        """
        if self._tool is None:
            raise ModuleNotFoundError(_NO_TOOL)
        abis, abi = str(self.facts().get("abis") or ""), elf_abi(self._tool[:20])
        if abis and abi not in abis.split(","):
            raise ArtifactRefused(f"expected benchmark_model for {abis}, got one for {abi}; build it for this phone")
        if self._tool_path is None:
            path = f"{self._folder}/benchmark_model"
            self._link.push(self._tool, path, executable=True)
            self._tool_path = path

    def cores(self, threads: int) -> list[int]:
        """The cores that so many threads are given: those of the fastest clusters; none where nothing is known."""
        self.facts()
        return fast_cores(self._clocks, threads)

    def benchmark(self, remote: str, turn: Turn, *, threads: int, profile: str | None = None) -> ToolRun:
        """Run the tool once, on the fastest cores.

        Args:
            remote: The model file, as ``put`` named it.
            turn: How long.
            threads: That work on one inference.
            profile: The name of the file for the times of the operators.

        Raises:
            ArtifactCrashed: A signal ended the tool.
            ArtifactTimeout: It did not end by itself.
            ArtifactRefused: It failed, or wrote too much.
            DeviceUnreachable: The connection was lost.
        """
        self._link.go_on()
        self.require_tool()
        to = self._path(profile) if profile else None
        command = tool_arguments(str(self._tool_path), self._path(remote), turn, threads=threads, profile=to)
        cores = self.cores(threads)
        pinned = ["taskset", core_mask(cores)] if cores else []
        limit_s, heard = _MARGIN_S + turn.warmup_s + 2 * turn.max_s, bytearray()
        started_s, said = time.monotonic(), None
        try:
            said = self._link.ask(
                ["sh", "-c", _RUN, "sh", *pinned, *command],
                limit_s=limit_s,
                most_bytes=MAX_OUTPUT_BYTES,
                heard=heard,
            )
        finally:
            if said is None or said.ended != "exit":
                self._kill(bytes(heard[:64]))
        refuse_failed(said, limit_s)
        text = (said.stdout + b"\n" + said.stderr).decode("utf-8", errors="replace").replace("\r", "")
        return ToolRun(said=text, wall_s=time.monotonic() - started_s)

    def _kill(self, heard: bytes) -> None:
        """End the tool, if the phone is still there; where it is not, ``max_secs`` does."""
        found = re.match(rb"tacit-pid ([0-9]{1,7})\r?\n", heard)
        if found and int(found[1]) > 1:
            with contextlib.suppress(DeviceUnreachable):
                self._link.ask(["kill", "-9", found[1].decode()], limit_s=_FAREWELL_S)

    def _make_folder(self, above: str) -> str:
        made = f"{above}/{_FOLDER_PREFIX}{''.join(secrets.choice(_LETTERS) for _ in range(16))}"
        said = self._link.ask(["mkdir", "-m", "700", made])
        if said.ended != "exit" or said.returncode != 0:
            why = printable(said.stderr.decode("utf-8", errors="replace")) or "no answer"
            raise DeviceUnreachable(
                f"expected a folder to work in on {self.name}, got: {why}; make room, or name another"
            )
        old = ["-maxdepth", "1", "-type", "d", "-name", f"{_FOLDER_PREFIX}*", "-mtime", "+0"]  # a day and more
        self._link.ask(["find", above, *old, "-exec", "rm", "-rf", "{}", ";"])
        return made

    def _path(self, remote: str) -> str:
        return f"{self._folder}/{checked_name(remote)}"


def read_file(link: AdbLink, command: Sequence[str], remote: str) -> bytes:
    """Return a file of a phone, of at most 64 MiB, that a command there prints; its name is for the message.

    Raises:
        ArtifactRefused: There is no such file, or it is larger.
        DeviceUnreachable: The connection was lost.
    """
    said = link.ask(command, limit_s=5 * _MARGIN_S, most_bytes=2 * _MAX_GOT_BYTES)
    if said.ended != "exit" or said.returncode != 0 or len(said.stdout) > _MAX_GOT_BYTES:
        expected = f"expected a plain file of at most {_MAX_GOT_BYTES} bytes on {link.name}"
        raise ArtifactRefused(f"{expected}, got remote={remote!r}; run it again")
    return said.stdout


def _read_tool(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"expected LiteRT's benchmark_model, got {str(path)!r}, which is no file; name another")
    content = path.read_bytes()
    if elf_abi(content[:20]) is None:
        raise ArtifactRefused(f"expected a program for Android, got {path.name!r}; build benchmark_model with the NDK")
    return content
