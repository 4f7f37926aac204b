"""Environments of other runtimes, each made once under the user's cache folder, whole or not at all."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tacit.devices.answers import printable

__all__ = ["Environment", "run_installer"]

_INSTALL_S = 600


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What is made once.

    Attributes:
        name: Of its folder, with all versions in it, so that another version is another folder.
        title: What it is for, in a line of ours.
        remedy: What to do where it cannot be made.
        fill: Puts everything into a new folder, which is moved afterwards: nothing in it may hold its own path.
    """

    name: str
    title: str
    remedy: str
    fill: Callable[[Path], None]

    def folder(self) -> Path:
        """The folder, which is made first where it is not there yet.

        Raises:
            ModuleNotFoundError: It cannot be made; why, in a line.
        """
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tacit", self.name)
        if not folder.exists():
            print(f"Installing {self.title} into {folder}", file=sys.stderr)  # noqa: T201  # takes a while, once
            try:
                self._make(folder)
            except (OSError, subprocess.SubprocessError) as error:
                raise self.failed(str(error)) from error
        return folder

    def failed(self, said: str) -> ModuleNotFoundError:
        """The last thing that an installer said, as the error that callers expect."""
        lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("WARNING", "W:"))]
        why = printable(lines[-1] if lines else "no reason given")
        return ModuleNotFoundError(f"expected an environment with {self.title}, got: {why}; {self.remedy}")

    def _make(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch, folder.name)
            made.mkdir()
            self.fill(made)
            # Whoever is first wins.
            if not folder.exists():
                made.rename(folder)


def run_installer(command: Sequence[str | Path], *, cwd: Path | None = None) -> None:
    """Run a step of an installation.

    Raises:
        OSError: It failed; the message is what it said last, over several lines.
        subprocess.TimeoutExpired: It took longer than ten minutes.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr)
