"""An environment of its own for tflite-runtime 2.14, which cannot run beside numpy 2.

The package asks for no numpy below 2, installs beside it and then fails as soon as it opens a file. So it lives in a
virtual environment under the user's cache folder, made once, with the one numpy that it works with.
"""

from __future__ import annotations

import sys
import venv
from pathlib import Path

from tacit.devices.environments import Environment, run_installer

__all__ = ["VERSION", "environment_python"]

VERSION = "2.14.0"
_REQUIREMENTS = (f"tflite-runtime=={VERSION}", "numpy==1.26.4")
_NEWEST_PYTHON = (3, 11)  # for which there are wheels


def environment_python() -> Path:
    """The Python of the environment, which is made first where it is not there yet; needs the package index then.

    Returns:
        The path of an executable.

    Raises:
        ModuleNotFoundError: It cannot be made; why, in a line.
    """
    return _ENVIRONMENT.folder() / "bin" / "python"


def _fill(folder: Path) -> None:
    """With the pip of the Python that runs this: the environment itself needs none."""
    if sys.version_info[:2] > _NEWEST_PYTHON:
        raise OSError(f"there are wheels for Python 3.11 and older, not for {sys.version.split()[0]}")
    venv.create(folder, symlinks=True)  # its Python may be moved, its scripts may not
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run_installer([*pip, "--only-binary", ":all:", *_REQUIREMENTS])
    run_installer([python, "-c", "import tflite_runtime.interpreter"])


_ENVIRONMENT = Environment(
    name=f"tflite-runtime-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}",
    title=f"tflite-runtime {VERSION}",
    remedy="connect to a package index, or use ai-edge-litert",
    fill=_fill,
)
