"""The device "qemu:aarch64": a 64-bit Arm emulated on this computer, for parity and never for a latency.

Debian's qemu 7.2 runs Debian's Python for arm64, with wheels for aarch64 that it can bear: LiteRT 2.0.3 and ONNX
Runtime 1.20.1; 2.3.0 and 1.32.0 end with a segmentation fault there. Packages are verified by apt against Debian's key,
wheels by their SHA-256. No root is needed, and the system's own list of packages stays as it is.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tacit.devices.environments import Environment, run_installer
from tacit.devices.local import LocalDevice
from tacit.devices.parity_only import ParityOnly
from tacit.devices.sandbox import Limits

__all__ = ["NOT_TIMED", "environment_python", "qemu_device"]

NOT_TIMED = "emulated: parity only"
_EMULATOR = "qemu-aarch64-static"
_KEY = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCE = f"deb [arch=arm64 signed-by={_KEY}] http://deb.debian.org/debian bookworm main\n"
_PACKAGES = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6",
    "libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libssl3", "libuuid1", "zlib1g",
)  # fmt: skip
_WHEELS: Mapping[str, str] = MappingProxyType(
    {
        "ai-edge-litert==2.0.3": "2d3c0867af845230d060bd555b0942b960caabe9d1cce98bcb3536b380ded372",
        "numpy==2.2.6": "b64d8d4d17135e00c8e346e0a738deb17e754230d7e0810ac5012750bbd85a5a",
        "onnxruntime==1.20.1": "f6243e34d74423bdd1edf0ae9596dd61023b260f546ee17d701723915f06a9f7",
    }
)
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_PYTHON = "usr/bin/python3.11"
_SITE = "usr/lib/python3/dist-packages"
# Paths are found from where the script lies: its folder is made under another name and then moved.
_SCRIPT = f"""#!/bin/sh
root=$(dirname "$0")/root
exec {_EMULATOR} -L "$root" "$root/{_PYTHON}" "$@"
"""
# A process under qemu runs 10 to 50 times slower, and takes some address space for the translated code.
_LIMITS = Limits(wall_s=300, cpu_s=300, address_space_bytes=8 << 30)


def qemu_device() -> ParityOnly:
    """The emulated device, whose environment is made first where it is not there yet.

    Its answers hold for the same runtimes on real 64-bit Arm as far as instructions go that qemu emulates; how long
    they take says nothing, so that requests to measure time or memory are refused.

    Raises:
        ModuleNotFoundError: qemu is not installed, or the environment cannot be made; why, in a line.
    """
    device = LocalDevice("qemu:aarch64", python=environment_python(), limits=_LIMITS)
    facts = {"cpu": f"64-bit Arm, emulated by {_emulator_version()}"}
    return ParityOnly(device, why=NOT_TIMED, runtimes=("litert", "onnxruntime"), facts=facts)


def environment_python() -> Path:
    """The emulated Python, as a script of this computer.

    Raises:
        ModuleNotFoundError: qemu is not installed, or the environment cannot be made; why, in a line.
    """
    for program, package in ((_EMULATOR, "qemu-user-static"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(program) is None:
            raise ModuleNotFoundError(f"expected {program} for qemu:aarch64, got none; apt-get install {package}")
    return _ENVIRONMENT.folder() / "python"


def _fill(folder: Path) -> None:
    root = folder / "root"
    root.mkdir()
    with tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
        for package in _fetch_packages(Path(scratch)):
            run_installer(["dpkg-deb", "-x", package, root])
        for wheel in _fetch_wheels(Path(scratch, "wheels")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / _SITE)
    script = folder / "python"
    script.write_text(_SCRIPT, encoding="utf-8")
    script.chmod(0o755)
    run_installer([script, "-c", "import numpy, onnxruntime, ai_edge_litert.interpreter"])


def _fetch_packages(scratch: Path) -> list[Path]:
    """With lists and caches of their own: what this computer's apt knows is neither read nor changed."""
    if not _KEY.exists():
        raise OSError(f"expected Debian's key {_KEY}, got none; apt-get install debian-archive-keyring")
    for name in ("lists/partial", "cache/archives/partial", "packages"):
        (scratch / name).mkdir(parents=True)
    (scratch / "sources.list").write_text(_SOURCE, encoding="utf-8")
    settings = {
        "Dir::Etc::SourceList": scratch / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": scratch / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", *(f"-o{key}={value}" for key, value in settings.items())]
    # Without it, apt takes lists that it could not fetch for a warning only.
    run_installer([*apt, "--error-on=any", "update"])
    run_installer([*apt, "download", *_PACKAGES], cwd=scratch / "packages")
    return sorted((scratch / "packages").glob("*.deb"))


def _fetch_wheels(folder: Path) -> list[Path]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wanted = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    run_installer([*pip, "--only-binary=:all:", *wanted, *platforms, "--dest", folder, *_WHEELS])
    wheels = sorted(folder.glob("*.whl"))
    found = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    if found != set(_WHEELS.values()):
        raise OSError("expected the wheels that were tried, got others by their SHA-256; check the package index")
    return wheels


def _emulator_version() -> str:
    done = subprocess.run([_EMULATOR, "--version"], capture_output=True, text=True, timeout=10, check=False)
    words = done.stdout.split("\n", 1)[0].split()
    return f"qemu {words[2]}" if len(words) > 2 else "qemu"


_ENVIRONMENT = Environment(
    name="qemu-aarch64-litert-2.0.3-onnxruntime-1.20.1",
    title="an emulated Python for aarch64 with LiteRT 2.0.3 and ONNX Runtime 1.20.1",
    remedy="connect to Debian's archive and a package index",
    fill=_fill,
)
