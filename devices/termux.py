"""Python on a phone over adb: that of Termux, which runs ``agent.py`` as any other device does.

adb may enter an app's own folder, by Android's ``run-as``, where the app is debuggable. Termux's builds on GitHub are;
those of F-Droid and Google Play are not.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tacit.devices import agent, leash
from tacit.devices.adb import AdbDevice, read_file
from tacit.devices.adb_leash import AdbLeash
from tacit.devices.adb_shell import Said
from tacit.devices.answers import DeviceFull, DeviceUnreachable, printable
from tacit.devices.conditions import Conditions, Readings
from tacit.devices.entries import Entry
from tacit.devices.leashed import answer_of, folder_name, order_of, with_adapters
from tacit.devices.phone import core_mask
from tacit.devices.phone_battery import BatteryLog
from tacit.devices.protocol import Artifact, Extras, Mode, Values, measure
from tacit.devices.remote_files import checked_name, packed
from tacit.devices.sandbox import Limits
from tacit.devices.side_answers import believe_buckets

__all__ = ["TermuxDevice", "measure_termux"]

_APP = "com.termux"
_FILES = f"/data/data/{_APP}/files"
_ENVIRONMENT = (f"PATH={_FILES}/usr/bin:/system/bin", f"HOME={_FILES}/home", f"TMPDIR={_FILES}/usr/tmp", "LANG=C.UTF-8")
# Our own words only: each runs in the phone's shell as it stands.
_MAKE = 'mkdir -m 700 "$1" && mkdir "$1/files"'
_WRITE = 'cat > "$1" || { rm -f "$1"; exit 1; }'
_PIN = 'test -z "$0" || taskset -p "$0" $$ > /dev/null 2>&1; exec "$@"'  # without, where the phone forbids it
_INSTALL = "in Termux, pkg install python python-numpy python-onnxruntime; it packages no LiteRT"
_WHAT_TO_DO = (
    "build LiteRT's benchmark_model with the Android NDK and name it; or install a Termux that adb may enter, from "
    f"its page on GitHub: {_INSTALL}"
)
_FAREWELL_S = 5.0


class TermuxDevice:
    """Runs ``agent.py`` in Termux, each request in a fresh process, on the phone's fastest cores where it lets us.

    *Guarantees.* As over SSH: all that the phone says is bounded in size and time, nothing that it names becomes a path
    here, and no process and no file of ours stays there. ``leash.py`` sees to that when the connection ends, however it
    ends; the next session removes what a phone kept that went down.
    """

    def __init__(
        self, phone: AdbDevice, *, threads: int = 1, is_fixed: bool | None = None, limits: Limits | None = None
    ) -> None:
        """Make a private folder in Termux's home and start the leash in it.

        Args:
            phone: Open; it stays so.
            threads: The most that work on one inference: the cores are those of the clusters that hold as many.
            is_fixed: Whether the phone holds its clocks, for the conditions.
            limits: Wall-clock time, output and file size of a request are bounded by these.

        Raises:
            ModuleNotFoundError: Termux is not there, or adb may not enter it, or it has no Python of 3.9 or newer.
            DeviceFull: There is no room for the agent.
            DeviceUnreachable: The connection was lost.
        """
        self.name = phone.name
        self._phone, self._is_fixed, self._limits = phone, is_fixed, limits or Limits()
        cores = phone.cores(threads)
        self._cores = ",".join(map(str, cores)) or None
        self._folder = f"{_FILES}/home/{folder_name()}"
        made = phone.link.ask(_inside("sh", "-c", _MAKE, "sh", self._folder))
        if made.ended != "exit" or made.returncode != 0:
            raise ModuleNotFoundError(
                f"expected benchmark_model or Termux for {self.name}, got: {_words(made)}; {_WHAT_TO_DO}"
            )
        try:
            for source in (agent.__file__, leash.__file__):
                self._write(f"{self._folder}/{Path(source).name}", Path(source).read_bytes())
            self._leash = self._started(cores)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in Termux and remove everything that was put there, unless the phone has gone."""
        self._leash.close()
        self._remove()

    def put(self, path: Path) -> str:
        """Copy a file into Termux and return the name by which requests refer to it.

        Raises:
            ArtifactRefused: The file is larger than 2 GiB.
            DeviceFull: The phone did not keep it.
            DeviceUnreachable: The connection was lost.
        """
        remote, content = packed(path)
        self._write(self._path(remote), content)
        return remote

    def get(self, remote: str) -> bytes:
        """Return a file that the agent wrote.

        Raises:
            ArtifactRefused: There is no such file, or it is larger than 64 MiB.
            DeviceUnreachable: The connection was lost.
        """
        return read_file(self._phone.link, _inside("cat", self._path(remote)), remote)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the agent.

        Args:
            request: As described in ``agent.py``. ``limit_s``, if given, bounds the wall-clock seconds; the default is
                that of the device's limits. The file of an ``adapter`` is put on the device.

        Returns:
            The agent's answer, a JSON object of unchecked content; with what the phone's shell says of its heat and
            its battery where it timed, and of its charge where it ran for minutes.

        Raises:
            ArtifactRefused: The model file could not be run, crashed its runtime or took too long.
            ModuleNotFoundError: The runtime, or numpy, is not installed there.
            DeviceUnreachable: The connection was lost, or what came over it was no answer.
        """
        prepared = with_adapters(request, self.put)
        op = request.get("op")
        if op == "time":
            before = self._state()
            return {**self._obeyed(prepared), "before": before, "after": self._state()}
        if op == "facts" and request.get("watch"):
            return _with_battery(self._obeyed(prepared), [self._phone.battery()])
        if op == "sustain" and request.get("idle_s"):
            with BatteryLog(self._phone.battery) as log:
                answer, ended_s = self._obeyed(prepared), time.monotonic()
            ends_s = [0.0, *(one.start_s + one.spent_s for one in believe_buckets(answer, wall_s=math.inf))]
            return _with_battery(answer, [log.at(ended_s - ends_s[-1] + end_s) for end_s in ends_s])
        return self._obeyed(prepared)

    def facts(self) -> dict[str, Any]:
        """Describe the phone and Termux's Python, and how many folders of earlier sessions were removed."""
        known = {name: value for name, value in self._phone.facts().items() if value is not None}
        return {**self.run({"op": "facts"}), **known, "leftovers_removed": self._leash.removed}

    def _state(self) -> Conditions:
        return {**self._phone.health().conditions(), "cores": self._cores, "fixed_performance": self._is_fixed}

    def _obeyed(self, request: dict[str, Any]) -> dict[str, Any]:
        limit_s, limits = float(request.get("limit_s", self._limits.wall_s)), self._limits
        order = order_of(request, limit_s=limit_s, limits=limits)
        ended, stdout = self._leash.obey(order, limit_s=limit_s, most_bytes=limits.output_bytes)
        return answer_of(ended, stdout, limit_s=limit_s, limits=limits, advice=_INSTALL)

    def _path(self, remote: str) -> str:
        return f"{self._folder}/files/{checked_name(remote)}"

    def _write(self, path: str, content: bytes) -> None:
        said = self._phone.link.feed(_inside("sh", "-c", _WRITE, "sh", path), content)
        if said.ended != "exit" or said.returncode != 0:
            expected = f"expected Termux on {self.name} to keep a file of {len(content)} bytes"
            raise DeviceFull(f"{expected}, got: {_words(said)}; make room on it")

    def _remove(self) -> None:
        with contextlib.suppress(DeviceUnreachable):
            self._phone.link.ask(_inside("rm", "-rf", self._folder), limit_s=_FAREWELL_S)

    def _started(self, cores: Sequence[int]) -> AdbLeash:
        python = ("env", "-i", *_ENVIRONMENT, "python3")
        pinned = ("sh", "-c", _PIN, core_mask(cores) if cores else "")
        try:
            return AdbLeash(self._phone.link, _inside(*pinned, *python, f"{self._folder}/leash.py"))
        except DeviceUnreachable as error:
            said = self._phone.link.ask(_inside(*python, "--version"))  # where the phone has gone, it says so again
            found = re.match(rb"Python [0-9][0-9A-Za-z.+]{0,20}", said.stdout)
            what = f"{found[0].decode()}, which said: {error}" if found else _words(said)
            raise ModuleNotFoundError(
                f"expected Python 3.9 or newer in Termux on {self.name}, got: {what}; {_INSTALL}"
            ) from error


def measure_termux(
    phone: AdbDevice,
    artifacts: Sequence[Artifact],
    inputs: Values | Sequence[Values],
    *,
    mode: Mode = "quick",
    extras: Extras | None = None,
    known: Mapping[str, Entry] | None = None,
    keep: Callable[[str, Entry], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure model files on a phone by Termux's Python: ``protocol.measure``, cool, charged and with clocks held.

    Entries say on which ``phone``; ``known`` ones of another are measured again.

    Raises:
        ModuleNotFoundError: Termux is not there, or adb may not enter it, or it has no Python.
        DeviceUnfit: The phone is too hot or too low.
        DeviceUnreachable: It is lost, or fixed performance mode could not be ended.
        ValueError: As ``protocol.measure`` raises it.
    """
    say = progress or (lambda message: None)
    threads = max([artifact.threads for artifact in artifacts], default=1)
    phone.wait_until_fit(say)
    identity, tell = {"phone": phone.identity()}, keep or (lambda name, entry: None)
    earlier = {key: entry for key, entry in (known or {}).items() if entry.get("phone") == identity["phone"]}
    with (
        phone.fixed_performance(say) as is_fixed,
        TermuxDevice(phone, threads=threads, is_fixed=is_fixed) as device,
    ):
        result = measure(
            device,
            artifacts,
            inputs,
            mode=mode,
            extras=extras,
            known=earlier,
            keep=lambda name, entry: tell(name, {**entry, **identity}),
            progress=progress,
        )
    return {**result, "artifacts": {name: {**entry, **identity} for name, entry in result["artifacts"].items()}}


def _with_battery(answer: dict[str, Any], battery: Sequence[Readings]) -> dict[str, Any]:
    """An answer whose readings hold what the phone's shell says of its battery: an app may not read those files."""
    rows = answer.get("readings")
    if not isinstance(rows, list) or len(rows) != len(battery):
        return answer
    both = [{**row, **told} if isinstance(row, dict) else row for row, told in zip(rows, battery, strict=True)]
    return {**answer, "readings": both}


def _inside(*command: str) -> list[str]:
    """A command that runs as Termux does."""
    return ["run-as", _APP, *command]


def _words(said: Said) -> str:
    told = (said.stderr or said.stdout).decode("utf-8", errors="replace").strip()
    return printable(told.rpartition("\n")[2]) or "no answer"
