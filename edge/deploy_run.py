"""`tacit deploy run`: starts the deployed run, shows its rounds as any run's, and ends with its code and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from tacit.edge import pipeline
from tacit.edge.deploy import Deployment, read_deployment
from tacit.edge.metric_words import metric_name, metric_text
from tacit.edge.planning import task_of
from tacit.edge.progress import Progress, Silent
from tacit.edge.recipe import load_recipe
from tacit.edge.run_folder import FolderMismatch
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.rounds import FederationFailed
from tacit.federated.task import DataProblem

__all__ = ["find_server", "run_deployed"]

_POLL_S = 0.5
_ASK_S = 5.0  # between two questions to the server: each is a process
_ENDS = {kind.__name__: kind for kind in (PrivacyRefused, DataProblem, FolderMismatch)}  # all others: the federation


def find_server(folder: Path) -> Path:
    """The server's part of a deployment.

    Raises:
        FolderMismatch: there is none.
    """
    for server in (folder / "server", folder):
        if (server / "superlink.sh").is_file():
            return server.resolve()
    raise FolderMismatch(f"expected the server's part of a deployment in {folder}, got none; run this on the server")


def run_deployed(folder: Path, *, out: Path | None = None, progress: Progress | None = None) -> dict[str, object]:
    """Trains with the deployed owners and writes the report; goes on where an earlier run stopped.

    Args:
        folder: DIR or DIR/server.
        out: the run directory; `run` in the server's part when None.
        progress: told of rounds and notes.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        FolderMismatch: not the server's part of a deployment.
        FederationFailed: the server does not answer, or the run failed; says why.
    """
    server, shown = find_server(folder), progress or Silent()
    made, recipe = read_deployment(server), load_recipe(server / "recipe.toml")
    target = (out or server / "run").expanduser().resolve()
    if not (target / "train" / "weights.safetensors").is_file():
        shown.begin("train", recipe.federated.rounds)
        log = _Log(target / "log.jsonl")
        run = _start(server, made, target)
        try:
            _follow(server, run, log, task_of(recipe).metric, shown)
        except BaseException:
            _flwr(server, "stop", run, "tacit")
            raise
        shown.end(f"{recipe.federated.rounds} rounds")
    return pipeline.report(target, progress=shown)


def _start(server: Path, made: Deployment, target: Path) -> str:
    config = {"recipe": str(server / "recipe.toml"), "out": str(target), "owners": ",".join(made.owners)}
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    answer = _flwr(server, "run", str(server / "app"), "tacit", "--format", "json", "--run-config", settings)
    run = answer.get("run-id")
    if not run:
        raise FederationFailed(
            f"expected the server to start a run, got: {_reason(answer)}; start it with server/superlink.sh, or see "
            f"tacit deploy check {server}"
        )
    return str(run)


class _Log:
    """The rows that a run adds to its log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = path.stat().st_size if path.is_file() else 0

    def rows(self) -> Iterator[Mapping[str, object]]:
        """Whole lines that were added since the last look."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield json.loads(line)


def _follow(server: Path, run: str, log: _Log, metric: str, progress: Progress) -> None:
    """Shows the rows of the run's log until Flower says that it is over.

    Raises:
        FederationFailed, PrivacyRefused, DataProblem, FolderMismatch: what the run ended of.
    """
    asked, over, failure = time.monotonic(), "", None
    while not over:
        time.sleep(_POLL_S)
        if time.monotonic() - asked >= _ASK_S:
            asked = time.monotonic()
            state = _state(server, run)
            over = state if state.startswith("finished") else ""
        for row in log.rows():  # once more after the end
            failure = row if row.get("event") == "failed" else failure
            _show(row, metric, progress)
    if failure is not None:
        raise _ENDS.get(str(failure["kind"]), FederationFailed)(str(failure["failure"]))
    if not (log.path.parent / "train" / "weights.safetensors").is_file():
        raise FederationFailed(
            f"expected a model, got a run that ended as {over}; see {server / 'flwr.sh'} log {run} tacit"
        )


def _show(row: Mapping[str, object], metric: str, progress: Progress) -> None:
    if "note" in row:
        progress.note(str(row["note"]))
    elif row.get("event") == "round":
        progress.step(int(str(row["round"])), f"{metric_name(metric)} {metric_text(row['accuracy'], metric)}")


def _state(server: Path, run: str) -> str:
    answer = _flwr(server, "list", "tacit", "--run-id", run, "--format", "json")
    runs = answer.get("runs")
    return str(runs[0].get("status", "unknown")) if isinstance(runs, list) and runs else "unknown"


def _flwr(server: Path, *arguments: str) -> dict[str, object]:
    """What `flwr` answers, told where this deployment's server is."""
    venv = str(Path(sys.executable).parent.parent)
    environment = {"VENV": venv, **os.environ, "NO_COLOR": "1"}
    done = subprocess.run(  # the script is this deployment's own
        [str(server / "flwr.sh"), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    try:
        return cast(dict[str, object], json.loads(done.stdout[start:])) if start >= 0 else {"error": done.stderr}
    except ValueError:
        return {"error": done.stdout + done.stderr}


def _reason(answer: Mapping[str, object]) -> str:
    text = str(answer.get("error-message") or answer.get("error") or answer)
    lines = [line.strip(" │╭╰─╮╯") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "no answer")[:200]
