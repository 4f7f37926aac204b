"""Checkpoints of a run: one file each, whole or absent, named by its content.

A file is safetensors: the model's arrays under `model.`, the strategy's under `strategy.`, the rest as JSON in the
metadata. Its name is `<round>-<first 32 hex digits of its SHA-256>.safetensors`, so damage shows before it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from tacit.devices.durable import FileDamaged, write_durably
from tacit.federated.train import Arrays

__all__ = ["Checkpoint", "load_checkpoint", "read_weights", "save_checkpoint", "write_weights"]

_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that is public and released after a round.

    Attributes:
        round: rounds finished.
        arrays: the global model.
        strategy: the server optimizer's state; empty when it has none.
        recipe: SHA-256 of the resolved recipe.
        ledger_head: the ledger's newest hash when this was written; empty without a guarantee.
        history: one row a round, as in rounds.jsonl.
    """

    round: int
    arrays: Arrays
    strategy: Arrays
    recipe: str
    ledger_head: str
    history: Sequence[Mapping[str, object]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint durably and removes all but the newest two.

    >>> import tempfile
    >>> third = Checkpoint(round=3, arrays={"w": np.float32([1.0])}, strategy={}, recipe="", ledger_head="", history=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(Path(folder), third).name[:7]
    '000003-'
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": _contiguous(a) for n, a in checkpoint.arrays.items()}
    tensors |= {f"strategy.{n}": _contiguous(a) for n, a in checkpoint.strategy.items()}
    about = {
        "round": checkpoint.round,
        "order": list(checkpoint.arrays),
        "recipe": checkpoint.recipe,
        "ledger_head": checkpoint.ledger_head,
        "history": list(checkpoint.history),
    }
    data = save(tensors, metadata={"tacit": json.dumps(about)})
    path = folder / f"{checkpoint.round:06d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    write_durably(path, data)
    for other in _superseded(folder, path):
        other.unlink()
    return path


def _contiguous(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    # safetensors writes the memory as it lies: a transposed array would come back scrambled, without an error.
    return np.asarray(array, order="C")


def _superseded(folder: Path, newest: Path) -> list[Path]:
    # A name that sorts after the newest is a damaged one that was passed over: it must not push out a whole one.
    others = [p for p in sorted(folder.glob("*.safetensors")) if p != newest]
    older = [p for p in others if p.name[:6] < newest.name[:6]]
    return [p for p in others if p not in older[1 - _KEPT :]]


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a note for each damaged one that was passed over.

    >>> import tempfile
    >>> third = Checkpoint(round=3, arrays={"w": np.float32([1.0])}, strategy={}, recipe="", ledger_head="", history=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_checkpoint(Path(folder), third)
    ...     load_checkpoint(Path(folder)) == (third, [])
    True
    """
    notes = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] != path.stem.partition("-")[2]:
            notes.append(f"{path}: damaged checkpoint passed over")
            continue
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["tacit"])
        tensors = load(data)
        return Checkpoint(
            round=about["round"],
            arrays={name: tensors[f"model.{name}"] for name in about["order"]},
            strategy={n.removeprefix("strategy."): t for n, t in tensors.items() if n.startswith("strategy.")},
            recipe=about["recipe"],
            ledger_head=about["ledger_head"],
            history=about["history"],
        ), notes
    return None, notes


def write_weights(path: Path, arrays: Arrays) -> None:
    """Writes a model's arrays as safetensors, durably.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_weights(Path(folder, "weights.safetensors"), {"w": np.float32([1.0])})
    ...     [path.name for path in Path(folder).iterdir()]
    ['weights.safetensors']
    """
    write_durably(
        path, save({n: _contiguous(a) for n, a in arrays.items()}, metadata={"order": json.dumps(list(arrays))})
    )


def read_weights(path: Path) -> Arrays:
    """Reads what `write_weights` wrote.

    Raises:
        FileDamaged: not such a file, or weights that are not finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_weights(Path(folder, "weights.safetensors"), {"w": np.float32([1.0])})
    ...     read_weights(Path(folder, "weights.safetensors"))
    {'w': array([1.], dtype=float32)}
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FileDamaged(f"expected weights written by tacit, got {path}: {error}; restore the file") from None
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise FileDamaged(f"expected finite weights, got {path} with NaN or infinity in {broken[0]}; restore it")
    return arrays
