"""An environment of its own for tflite-runtime 2.14, which cannot run beside numpy 2.

The package asks for no numpy below 2, installs beside it and then fails as soon as it opens a file. So it lives in a
virtual environment under the user's cache folder, made once, with the one numpy that it works with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

__all__ = ["VERSION", "environment_python"]

VERSION = "2.14.0"
_REQUIREMENTS = (f"tflite-runtime=={VERSION}", "numpy==1.26.4")
_NEWEST_PYTHON = (3, 11)  # for which there are wheels
_INSTALL_S = 600
_SAID = 200


def environment_python() -> Path:
    """The Python of the environment, which is made first where it is not there yet; needs the package index then.

    Returns:
        The path of an executable.

    Raises:
        ModuleNotFoundError: It cannot be made; why, in a line.
    """
    folder = _cache() / f"tflite-runtime-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not python.exists():
        _make(folder)
    return python


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tacit")


def _make(folder: Path) -> None:
    if sys.version_info[:2] > _NEWEST_PYTHON:
        raise ModuleNotFoundError(
            f"expected Python 3.11 or older for tflite-runtime {VERSION}, got {sys.version.split()[0]}; use "
            "ai-edge-litert"
        )
    print(f"Installing tflite-runtime {VERSION} into {folder}", file=sys.stderr)  # noqa: T201  # takes a while, once
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch, folder.name)
            venv.create(made, symlinks=True)
            _install(made)
            # Whoever is first wins; the Python of a virtual environment may be moved, its scripts may not.
            if not folder.exists():
                made.rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise _failed(str(error)) from error


def _install(folder: Path) -> None:
    """With the pip of the Python that runs this: the environment itself needs none."""
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [*pip, "--only-binary", ":all:", *_REQUIREMENTS],
        [python, "-c", "import tflite_runtime.interpreter"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if done.returncode != 0:
            raise _failed(done.stderr)


def _failed(said: str) -> ModuleNotFoundError:
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("WARNING")]
    why = "".join(letter for letter in (lines[-1] if lines else "no reason given") if letter.isprintable())[:_SAID]
    return ModuleNotFoundError(
        f"expected an environment with tflite-runtime {VERSION}, got: {why}; connect to a package index, or use "
        "ai-edge-litert"
    )
