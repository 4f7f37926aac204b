"""Data sets of the Hugging Face hub, or of a folder laid out like one, by `flwr_datasets` in a process of its own.

The process can be ended when the hub does not answer. It gets caches of its own wherever records are private or already
on this disk, in a folder that is gone when they are read: `datasets` would keep a copy of them under ~/.cache. What is
public and comes from the hub stays in the usual cache, and is found there again with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from tacit.federated.readers import extra_of_data
from tacit.federated.task import DataProblem

__all__ = ["fetch_splits"]

_LIMIT_S = 900  # of a download; what it got of public data is kept and need not be fetched again
_ANSWER_S = "10"  # of one request


def fetch_splits(
    dataset: str, splits: Sequence[str], folder: Path, *, private: bool, limit_s: float = _LIMIT_S
) -> None:
    """Writes splits as `<split>.parquet`, in the order that they have.

    Args:
        dataset: its name on the hub, or a local folder.
        splits: like "train".
        folder: for these files and all that is temporary; the caller removes it.
        private: whether nothing of it may stay elsewhere on the disk.
        limit_s: when to give up, in seconds.

    Raises:
        DataProblem: no such data set or split, the hub cannot be reached, or it took too long.
        ModuleNotFoundError: the extra is not installed.
    """
    with extra_of_data():
        if find_spec("flwr_datasets") is None:  # importing it takes seconds, and is the process' own affair
            raise ModuleNotFoundError(name="flwr_datasets")
    local = Path(dataset).expanduser()
    name = str(local.resolve()) if local.is_dir() else dataset
    code = "import sys; from tacit.federated.hub import _write; _write(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, str(folder), *splits]
    environment = _environment(folder, own_caches=private or local.is_dir(), offline=local.is_dir())
    try:
        done = subprocess.run(  # our own interpreter
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataProblem(
            f"expected data set {dataset!r} within {limit_s:g} s, got no end of it; check the connection and try again"
        ) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1].partition(": ")
        raise DataProblem(
            f"expected to read data set {dataset!r}, got {(said[2] or said[0])[:200]}; check task.path, splits and the "
            "connection"
        )


def _environment(folder: Path, *, own_caches: bool, offline: bool) -> Mapping[str, str]:
    """Variables of the process: bounded waits, no telemetry, which would send the data set's name, and caches."""
    chosen = {
        "HF_HUB_DOWNLOAD_TIMEOUT": _ANSWER_S,
        "HF_HUB_ETAG_TIMEOUT": _ANSWER_S,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    if own_caches:
        token = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "token"
        chosen = {key: value for key, value in chosen.items() if not key.startswith(("HF_DATASETS_", "HF_HUB_CACHE"))}
        chosen |= {"HF_TOKEN_PATH": os.environ.get("HF_TOKEN_PATH") or str(token), "HF_HOME": str(folder / "caches")}
    return chosen | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def _write(dataset: str, folder: str, *splits: str) -> None:
    """What the process does."""
    from flwr_datasets import FederatedDataset

    if not Path(dataset).is_dir():
        _expect_answer(dataset)
    # Shuffled records would be others for a fingerprint, and each owner's are drawn at random anyway.
    whole = FederatedDataset(dataset=dataset, partitioners={}, shuffle=False)
    for split in splits:
        whole.load_split(split).to_parquet(Path(folder) / f"{split}.parquet")


def _expect_answer(dataset: str) -> None:
    """Asks the hub once: `datasets` would ask many times, for half a minute, before it says that there is no answer."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(dataset, timeout=float(_ANSWER_S))
