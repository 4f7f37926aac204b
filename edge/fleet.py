"""Artifacts on devices: which device a name means, several at once, and what is kept when one is lost.

Devices that compute elsewhere (`ssh:`, `adb`) are measured at the same time, each in a thread that mostly waits. Those
that compute here take turns, since each would disturb the other's clock.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tacit.devices.answers import DeviceUnreachable
from tacit.devices.sandbox import ArtifactRefused
from tacit.edge.recipe import RecipeInvalid

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tacit.devices.protocol import Artifact, Device, Evaluation, Mode

__all__ = ["KINDS", "Access", "Fleet", "Work", "check_device", "check_devices", "file_of"]

Result = dict[str, Any]
KINDS = ("local", "local:tflite-runtime", "ssh:user@host[:port]", "adb[:serial]", "browser", "micro", "qemu:aarch64")
_HERE = ("local", "local:tflite-runtime", "micro", "qemu:aarch64")
_NAME = re.compile(r"local(:tflite-runtime)?|micro|browser|qemu:aarch64|adb(:.+)?|ssh:.+")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach devices and what to ask of them beyond the usual.

    Attributes:
        python: The Python on devices over SSH.
        key: A private key for SSH.
        known_hosts: Whose host keys are known; the user's own file when None.
        sustained_s: Seconds of sustained load per artifact; None for none.
        profile: Whether operators are timed too.
        benchmark_model: The binary that times models on a phone over adb.
        regardless: Measure a phone though it is hot or its battery low.
        host: The address that the page for browsers is served on; this computer's on the network when None.
        port: Its port; any that is free when 0.
    """

    python: str = "python3"
    key: Path | None = None
    known_hosts: Path | None = None
    sustained_s: float | None = None
    profile: bool = False
    benchmark_model: Path | None = None
    regardless: bool = False
    host: str | None = None
    port: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured.

    Attributes:
        artifacts: Each device's.
        inputs: (n, *shape), float32, channel first, preprocessed.
        input_source: Of which split they are, as `sample_inputs` says.
        evaluation: What accuracy is measured on, on other machines than this one; None where nothing is public.
        outputs: Of the model.
        mode: How long.
        known: Entries of each device, by artifact, that need not be measured again.
        hosted: What computers and phones run: whether it fits boards and phones is told beside `micro`'s artifacts.
        peaks: Asked for the bytes that artifacts added to a process on this computer, by name, once these are needed.
    """

    artifacts: Mapping[str, Sequence[Artifact]]
    inputs: Any
    evaluation: Evaluation | None
    outputs: int
    mode: Mode
    known: Mapping[str, Result]
    hosted: Sequence[Artifact] = ()
    peaks: Callable[[], Mapping[str, int]] = dict
    input_source: str | None = None


class _Stopped(KeyboardInterrupt):
    """Nobody waits for this device any more."""


def check_device(name: str) -> str:
    """A device's name, if it is one.

    Raises:
        ValueError: It is none.

    Example:
        >>> check_device("ssh:pi@raspberrypi.local")
        'ssh:pi@raspberrypi.local'
    """
    if not _NAME.fullmatch(name) or not name.isprintable():
        raise ValueError(f"expected a device ({', '.join(KINDS)}), got {name!r}; name one of these")
    if name.startswith("ssh:"):
        from tacit.devices.ssh_connection import parse_target as parse_host

        parse_host(name)
    if name.startswith("adb:"):
        from tacit.devices.adb_phones import parse_target as parse_serial

        parse_serial(name)
    return name


def check_devices(names: Sequence[str]) -> list[str]:
    """Devices' names, each once.

    Raises:
        RecipeInvalid: One is none.
    """
    try:
        return list(dict.fromkeys(check_device(name) for name in names))
    except ValueError as error:
        raise RecipeInvalid(str(error), "--device") from None


def file_of(device: str) -> str:
    """The name of a device's file below measure/: its own where that is a plain one.

    Example:
        >>> file_of("local"), file_of("ssh:pi@host")
        ('local.json', 'ssh_pi_host-f4c1ab.json')
    """
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", device).strip("._")[:60]
    return f"{plain}.json" if plain == device else f"{plain}-{hashlib.sha256(device.encode()).hexdigest()[:6]}.json"


@dataclass
class Fleet:
    """Measures work on devices.

    Attributes:
        work: What.
        access: How.
        keep: Told of a device's result, also of an incomplete one (`complete` is false) while it grows.
        say: Told a line for people, from any thread.
        tell: Told what must be seen, such as the link for a phone.
    """

    work: Work
    access: Access
    keep: Callable[[str, Result], None]
    say: Callable[[str], None]
    tell: Callable[[str], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _under_way: dict[str, Callable[[], None]] = field(default_factory=dict)  # what breaks off a device's work

    def measure(self, names: Sequence[str]) -> dict[str, Result | Exception]:
        """Each device's result, or why there is none; one that was lost midway has told `keep` what it had."""
        # What this computer's measurement shows of memory decides what fits a phone, which `micro` tells.
        here = sorted((name for name in names if name in _HERE), key=lambda name: name != "local")
        away = [name for name in names if name not in _HERE]
        if len(names) == 1:  # no thread to wait for when a person interrupts
            return {names[0]: self._outcome(names[0])}
        with ThreadPoolExecutor(max_workers=max(1, len(away))) as threads:
            begun = {name: threads.submit(self._outcome, name) for name in away}
            try:
                found = {name: self._outcome(name) for name in here}
                found |= {name: future.result() for name, future in begun.items()}
            except BaseException:  # also Ctrl-C: threads end soon, and leave their devices clean
                self._stopped.set()
                for interrupt in list(self._under_way.values()):
                    with suppress(Exception):  # a device that has gone must not keep the others under way
                        interrupt()
                raise
        return {name: found[name] for name in names}

    def _outcome(self, name: str) -> Result | Exception:
        try:
            result = {**self._measured(name), "complete": True}
        except (OSError, ValueError, ModuleNotFoundError, ArtifactRefused) as error:  # one's trouble is not the others'
            return error
        self._kept(name, result)
        return result

    def _kept(self, name: str, result: Result) -> None:
        self._go_on()
        with self._lock:
            self.keep(name, result)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _said(self, text: str) -> None:
        self._go_on()
        with self._lock:
            self.say(text)

    def _measured(self, name: str) -> Result:
        if name == "micro":
            from tacit.devices.micro import measure_micro

            self._said(f"{name}: answers, operators and arena")
            found = measure_micro(self.work.artifacts[name], [self.work.inputs], outputs=self.work.outputs)
            return {**found, "fit": self._fits(found)}
        if name == "qemu:aarch64":
            from tacit.devices.parity_only import measure_parity
            from tacit.devices.qemu import qemu_device

            with qemu_device() as emulated:
                self._said(f"{name}: answers under emulation")
                return measure_parity(
                    emulated, self.work.artifacts[name], [self.work.inputs], outputs=self.work.outputs
                )
        return self._timed(name)

    def _fits(self, found: Result) -> list[dict[str, Any]]:
        """Whether artifacts fit the boards and phones that there are profiles of; each kind is asked for its own."""
        from tacit.devices.fit import facts_of, fit_table
        from tacit.devices.profile import profiles

        small = [artifact for artifact in self.work.artifacts["micro"] if artifact.name in found["artifacts"]]
        known, peaks = profiles(), self.work.peaks()
        rows: list[dict[str, Any]] = []
        for held, boards in ((small, True), (self.work.hosted or small, False)):
            self._said(f"micro: what fits {'boards' if boards else 'computers and phones'}")
            facts = [facts_of(a.path, name=a.name, peak_memory_bytes=peaks.get(a.name)) for a in held]
            rows += fit_table(facts, [profile for profile in known if (profile.kind == "mcu") is boards])
        return rows

    def _timed(self, name: str) -> Result:
        from tacit.devices.protocol import Extras, measure

        if name.partition(":")[0] == "adb":
            return self._on_phone(name)
        if name == "browser":
            return self._in_browser()
        extras = Extras(
            sustained_s=self.access.sustained_s,
            profile=self.access.profile,
            evaluation=None if name == "local" else self.work.evaluation,  # here each was judged when it was made
        )
        known = self.work.known.get(name, {})
        with self._opened(name) as device:
            if known:
                self._said(f"{name}: {len(known)} known already")
            return measure(
                device,
                self.work.artifacts[name],
                self.work.inputs,
                mode=self.work.mode,
                extras=extras,
                known={entry["key"]: entry for entry in known.values()},
                keep=self._growing(name),
                progress=lambda text: self._said(text if name == "local" else f"{name}: {text}"),
            )

    def _growing(self, name: str, phone: str | None = None) -> Callable[[str, Result], None]:
        """Keeps a device's result with each entry that comes, beside what is known of the same phone, if it is one."""
        partial: Result = {"device": name, "mode": self.work.mode, "failed": {}, "complete": False}
        known = self.work.known.get(name, {}) if name != "browser" else {}  # of which nobody knows who will open it
        partial["artifacts"] = {key: entry for key, entry in known.items() if entry.get("phone") == phone}

        def grown(artifact: str, entry: Result) -> None:
            partial["artifacts"][artifact] = entry
            self._kept(name, partial)

        return grown

    def _on_phone(self, name: str) -> Result:
        from tacit.devices.adb import AdbDevice
        from tacit.devices.phone_measurement import measure_phone
        from tacit.devices.protocol import Extras
        from tacit.devices.termux import measure_termux

        access, work = self.access, self.work
        with AdbDevice(name, benchmark_model=access.benchmark_model, regardless=access.regardless) as phone:
            self._under_way[name] = phone.link.interrupt
            self._go_on()
            named: dict[str, Any] = {
                "mode": work.mode,
                "known": {entry["key"]: entry for entry in work.known.get(name, {}).values()},
                "keep": self._growing(name, phone.identity()),
                "progress": lambda text: self._said(f"{name}: {text}"),
            }
            if access.benchmark_model is not None:
                return measure_phone(phone, work.artifacts[name], profile=access.profile, **named)
            extras = Extras(sustained_s=access.sustained_s, profile=access.profile, evaluation=work.evaluation)
            return measure_termux(phone, work.artifacts[name], work.inputs, extras=extras, **named)

    def _in_browser(self) -> Result:
        from tacit.devices.browser import measure_in_browser

        return measure_in_browser(
            self.work.artifacts["browser"],
            self.work.inputs,
            invite=lambda invitation: self.tell("\n".join(["for the phone, within ten minutes:", *invitation.lines()])),
            host=self.access.host,
            port=self.access.port,
            mode=self.work.mode,
            sustained_s=self.access.sustained_s,
            evaluation=self.work.evaluation,
            check=self._go_on,
            keep=self._growing("browser"),
            progress=lambda text: self._said(f"browser: {text}"),
        )

    def _opened(self, name: str) -> AbstractContextManager[Device]:
        if name in ("local", "local:tflite-runtime"):
            from tacit.devices.local import LocalDevice
            from tacit.devices.tflite_runtime import environment_python

            return LocalDevice(name, python=None if name == "local" else environment_python())
        if name.startswith("ssh:"):
            from tacit.devices.ssh import SshDevice

            access = self.access
            device = SshDevice(name, python=access.python, key=access.key, known_hosts=access.known_hosts)
            self._under_way[name] = device.close
            return device
        raise DeviceUnreachable(f"expected a device that can be reached, got {name!r}; known are {', '.join(KINDS)}")
