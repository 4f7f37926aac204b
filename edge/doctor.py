"""Examines the machine: are the libraries, the processor and the system fit for Tacit, and what mends what is not."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]
Release = tuple[int, ...]

_GB = 10**9


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it stands, what was found, and a command that mends it (empty if ok)."""

    name: str
    status: Status
    found: str
    hint: str = ""


@dataclass(frozen=True)
class _Library:
    """A distribution with the range that the tests run with, `least` included and `below` excluded."""

    name: str
    least: Release
    below: Release
    extra: str  # of tacit's; empty for what the core needs
    reason: str = ""  # why nothing older will do


# The ranges of pyproject.toml; a test compares them.
_LIBRARIES = (
    _Library("numpy", (1, 26), (3,), ""),
    _Library("torch", (2, 10), (2, 15), "federated", "CVE-2026-24747"),
    _Library("flwr", (1, 41), (1, 44), "federated"),
    _Library("opacus", (1, 6), (1, 7), "federated"),
    _Library("dp-accounting", (0, 6), (0, 7), "federated"),
    _Library("onnx", (1, 21), (2,), "compression", "CVE-2026-27489, CVE-2026-34446, CVE-2026-28500"),
    _Library("onnxruntime", (1, 23), (2,), "devices"),
    _Library("litert-torch", (0, 10), (0, 11), "tflite"),
    _Library("ai-edge-litert", (2,), (3,), "devices"),
    _Library("ai-edge-quantizer", (0, 10), (0, 11), "tflite"),
    _Library("executorch", (1, 5), (1, 6), "executorch"),
)


def examine() -> list[Check]:
    """Look at what Tacit needs of this machine, in well under a second and without loading any large library.

    Nothing is changed: the files made to see whether a folder can be written vanish at once.

    Returns:
        One check per question, always in the same order. "fail" means that a command of Tacit will not work or not
        be safe, "warn" that something is missing, slower or untested. Each of both carries a command as its hint.

    Example:
        >>> [check.name for check in examine()][:2]
        ['python', 'numpy']
    """
    here, temporary = _working_folder(), _temporary_folder()
    named = shlex.quote(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108  named in a hint, not written to
    return [
        _python(sys.version_info[:3]),
        *(_library(library, _installed(library.name)) for library in _LIBRARIES),
        _micro(_installed("tflite-micro")),
        _processor(_cpu_flags(), platform.machine()),
        _cores(_usable_cores()),
        _memory(_available_memory_bytes()),
        _disk(_free_bytes(here)),
        _writable("working folder", here, hint=f"chmod u+rwx {shlex.quote(str(here))}" if here else "cd"),
        _writable("temporary folder", temporary, hint=f"mkdir -p {named} && chmod u+rwx {named}"),
        _clock(time.time(), time.get_clock_info("perf_counter").resolution),
        _entropy(),
        _limits(),
        _isolation(),
        _telemetry(os.environ.get("FLWR_TELEMETRY_ENABLED"), installed=_installed("flwr") is not None),
    ]


# Each judgement takes plain values, so that a test can ask about any machine.


def _python(version: tuple[int, int, int]) -> Check:
    found = ".".join(map(str, version))
    hint = "uv python install 3.11 && uv venv --python 3.11 .venv"
    if version < (3, 11, 0):
        return Check("python", "fail", f"{found}, expected at least 3.11", hint)
    if version >= (3, 14, 0):
        return Check("python", "warn", f"{found}, tested with 3.11 to 3.13", hint)
    return Check("python", "ok", found)


def _library(library: _Library, version: str | None) -> Check:
    least, below = (".".join(map(str, release)) for release in (library.least, library.below))
    requirement = f"{library.name}>={least},<{below}"
    upgrade = f"pip install '{requirement}'"
    if version is None:
        if not library.extra:
            return Check(library.name, "fail", "not installed", upgrade)
        return Check(library.name, "warn", "not installed", f"pip install 'tacit[{library.extra}]'")
    release = _release(version)
    if release is None:
        return Check(library.name, "warn", f"{version}, which is no version number", upgrade)
    if release < _padded(library.least):
        reason = f" ({library.reason})" if library.reason else ""
        return Check(library.name, "fail", f"{version}, expected {requirement}{reason}", upgrade)
    if release >= _padded(library.below):
        return Check(library.name, "warn", f"{version}, newer than the tested {requirement}", upgrade)
    return Check(library.name, "ok", version)


def _micro(version: str | None) -> Check:
    """Of TensorFlow Lite Micro there are pre-releases alone, and the extra names the one that was tried."""
    if version is None:
        return Check("tflite-micro", "warn", "not installed", "pip install 'tacit[micro]'")
    return Check("tflite-micro", "ok", version)


def _release(version: str) -> Release | None:
    """Return the numbers of a version, padded to compare, and -1 at the end of a pre-release.

    Example:
        >>> _release("2.13.0+cpu"), _release("2.10rc1"), _release("unknown")
        ((2, 13, 0, 0, 0), (2, 10, 0, 0, -1), None)
    """
    parts = re.match(r"v?(\d+(?:\.\d+){0,3})([._-]?(?:a|b|c|rc|alpha|beta|pre|dev)\d)?", version, re.IGNORECASE)
    return None if parts is None else (*_padded(tuple(map(int, parts[1].split("."))))[:4], -1 if parts[2] else 0)


def _padded(release: Release) -> Release:
    return (*release, *(0,) * (5 - len(release)))


def _processor(flags: frozenset[str], machine: str) -> Check:
    names = {"avx2": "avx2", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "neon": "neon", "asimd": "neon"}
    have = sorted({names[flag] for flag in flags & names.keys()} | ({"neon"} if machine == "arm64" else set()))
    found = f"{machine}: {', '.join(have) or 'no vector extension found'}"
    if {"avx2", "neon"} & set(have):
        return Check("processor", "ok", found)
    # Nothing mends a processor, but the figures can be taken on another one.
    return Check("processor", "warn", f"{found}; int8 models will be slow here", "tacit measure DIR --device NAME")


def _cores(cores: int) -> Check:
    if cores < 2:
        return Check("cores", "warn", "1; training and measuring will disturb each other", "docker run --cpus 2 ...")
    return Check("cores", "ok", str(cores))


def _memory(available_bytes: int | None) -> Check:
    swap = (
        "sudo fallocate -l 4G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
    )
    if available_bytes is None:
        return Check("memory", "warn", "not known on this system", "free -h || vm_stat")
    found = f"{available_bytes / _GB:.1f} GB available"
    if available_bytes < 0.5 * _GB:
        return Check("memory", "fail", f"{found}, expected at least 0.5 GB", swap)
    if available_bytes < 2 * _GB:
        return Check("memory", "warn", f"{found}; conversion to TFLite wants 2 GB", swap)
    return Check("memory", "ok", found)


def _disk(free_bytes: int | None) -> Check:
    hint = "du -xh --max-depth=2 . | sort -h | tail"
    if free_bytes is None:
        return Check("disk", "warn", "not known", "df -h")
    found = f"{free_bytes / _GB:.1f} GB free"
    if free_bytes < 0.2 * _GB:
        return Check("disk", "fail", f"{found}, expected at least 0.2 GB", hint)
    if free_bytes < 2 * _GB:
        return Check("disk", "warn", f"{found}; long runs want 2 GB", hint)
    return Check("disk", "ok", found)


def _writable(name: str, folder: Path | None, *, hint: str) -> Check:
    if folder is None:
        return Check(name, "fail", "none that can be written", hint)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"tacit")
            probe.flush()
    except OSError as error:
        return Check(name, "fail", f"{folder}: {error.strerror}", hint)
    return Check(name, "ok", str(folder))


def _clock(now_s: float, resolution_s: float) -> Check:
    year = time.gmtime(now_s).tm_year
    if not 2025 <= year < 2100:
        return Check(
            "clock",
            "fail",
            f"the year is {year}; certificates and ledgers need the date",
            "sudo timedatectl set-ntp true",
        )
    if resolution_s > 1e-6:
        source = "echo tsc | sudo tee /sys/devices/system/clocksource/clocksource0/current_clocksource"
        return Check("clock", "warn", f"a tick of {resolution_s * 1e6:.0f} µs is too coarse for latency", source)
    return Check("clock", "ok", f"{year}, a tick of {resolution_s * 1e9:.0f} ns")


def _telemetry(setting: str | None, *, installed: bool) -> Check:
    if not installed:
        return Check("Flower telemetry", "ok", "flwr is not installed")
    if (setting if setting is not None else "1") == "1":  # what flwr itself asks
        found = "on: flwr reports its use to its makers"
        return Check("Flower telemetry", "warn", found, "export FLWR_TELEMETRY_ENABLED=0")
    return Check("Flower telemetry", "ok", "off")


# What is asked of the system.


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return


def _cpu_flags() -> frozenset[str]:
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory_bytes() -> int | None:
    """Return what is left of the machine's memory or of the container's, whichever is less."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = (next(_lines(f"/sys/fs/cgroup/memory.{name}"), "max") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=None)


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # removed under our feet
        return None


def _free_bytes(folder: Path | None) -> int | None:
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        return None


def _temporary_folder() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _entropy() -> Check:
    """See that the system's secret generator answers at once: all noise is keyed from it."""
    hint = "sudo apt-get install -y rng-tools5"
    try:
        draws = [os.getrandom(32, os.GRND_NONBLOCK) if hasattr(os, "getrandom") else os.urandom(32) for _ in range(2)]
    except (BlockingIOError, NotImplementedError) as error:
        return Check("secret randomness", "fail", f"the system's generator is not ready: {error}", hint)
    if draws[0] == draws[1]:
        return Check("secret randomness", "fail", "the system's generator repeats itself", hint)
    return Check("secret randomness", "ok", "the system's generator answers")


def _limits() -> Check:
    """See that limits can be set, which the sandbox of untrusted models needs."""
    try:
        import resource  # absent outside Unix

        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    except (ImportError, OSError, ValueError) as error:
        return Check("resource limits", "warn", f"cannot be set: {error}", "wsl --install Debian")
    return Check("resource limits", "ok", "can be set")


def _isolation() -> Check:
    """Try to start a process without a network, as the sandbox of untrusted models does where it can."""
    hint = "sudo sysctl -w user.max_user_namespaces=15000"
    if Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        hint = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    elif Path("/proc/sys/kernel/unprivileged_userns_clone").exists():
        hint = "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    unshare = shutil.which("unshare")
    if unshare is None:
        return Check("network isolation", "warn", "not known: unshare is missing", "sudo apt-get install -y util-linux")
    try:
        command = [unshare, "--user", "--map-root-user", "--net", "true"]
        done = subprocess.run(command, capture_output=True, timeout=0.3, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("network isolation", "warn", f"not known: {error}", hint)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        return Check("network isolation", "warn", f"refused: {reason}", hint)
    return Check("network isolation", "ok", "a process without a network can be started")
