"""The same training without noise, beside the private one, to show what privacy costs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tacit.edge.progress import Progress
from tacit.edge.recipe import load_recipe
from tacit.edge.run_folder import RunFolder

__all__ = ["Twin", "train_twin"]


class Twin:
    """The twin's process, on the other core."""

    def __init__(self, folder: RunFolder) -> None:
        """Starts it, where the recipe asks for one, every split is a public benchmark, and it is not there yet."""
        from tacit.edge.planning import task_of

        recipe = folder.recipe
        self._log = folder.path / "twin.log"
        self._process: subprocess.Popen[bytes] | None = None
        wanted = recipe.report.twin and recipe.privacy.unit != "none"
        if (folder.train / "twin" / "rounds.jsonl").is_file():
            _forget_model(folder.train / "twin")
            self._log.unlink(missing_ok=True)
            return
        if not wanted:
            return
        if task_of(recipe).load().status != "public-benchmark":
            return
        code = "import sys; from tacit.edge.twin import train_twin; train_twin(sys.argv[1], int(sys.argv[2]))"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    code,  # -P: nothing is imported from the current folder
                    str(folder.path),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait(self, progress: Progress) -> None:
        """Waits for it: a measurement beside it would measure both."""
        if self._process is None:
            return
        if self._process.wait() != 0:
            progress.note(f"the twin without noise failed, the report goes without it; see {self._log}")
        else:
            self._log.unlink(missing_ok=True)
        self._process = None

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def train_twin(path: str, parent: int) -> None:
    """Entry point of the twin's process; it ends with its parent."""
    from tacit.edge.flower_app import train_in_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides

    def on_row(_: Mapping[str, object]) -> None:
        if os.getppid() != parent:
            sys.exit(1)

    folder = Path(path)
    train_in_process(load_recipe(folder / "recipe.toml"), folder, run="twin", report=on_row, role="twin")
    _forget_model(folder / "train" / "twin")


def _forget_model(folder: Path) -> None:
    """Keeps the twin's curve and nothing else: its model carries no guarantee and must not be shipped by mistake."""
    (folder / "weights.safetensors").unlink(missing_ok=True)
    for kept in ("checkpoint", "kept"):
        shutil.rmtree(folder / kept, ignore_errors=True)
