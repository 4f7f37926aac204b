"""Checkpoints of a run: one file each, whole or absent, named by its content.

A file is safetensors: the model's arrays under `model.`, the strategy's under `strategy.`, and as metadata the format's
version (`tacit.checkpoint`) and the rest as JSON (`about`). Its name is `<round>-<first 32 hex digits of its
SHA-256>.safetensors`, so damage shows before it is read. What is read all the same is held to what is written here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from tacit.devices.durable import FileDamaged, write_durably
from tacit.devices.failpoint import reach
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.weights import read_header
from tacit.federated.clipping import Arrays

__all__ = ["Checkpoint", "State", "load_checkpoint", "read_weights", "save_checkpoint", "write_weights"]

State = dict[str, npt.NDArray[Any]]  # of a strategy: numbers of any kind, by name

_KEPT = 2
_FORMAT = "1"
_NAME = re.compile(r"(\d{6,18})-([0-9a-f]{32})\.safetensors", re.ASCII)
_ABOUT = {"round": int, "run": str, "recipe": str, "ledger_head": str, "order": list, "state": list, "history": list}
_UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that is public and released after a round.

    Attributes:
        round: rounds finished.
        arrays: the global model.
        strategy: the strategy's state, in its order: arrays of numbers of any kind; empty when it has none.
        run: the run's identity.
        recipe: SHA-256 of the resolved recipe.
        ledger_head: the ledger's newest hash when this was written; empty without a guarantee.
        history: one row a round, as in rounds.jsonl.
    """

    round: int
    arrays: Arrays
    strategy: Mapping[str, npt.NDArray[Any]]
    run: str
    recipe: str
    ledger_head: str
    history: Sequence[Mapping[str, object]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint durably and removes all but the newest two.

    Raises:
        ValueError: a model that is not finite, which no run could go on from, or a state that is not numbers.
        OSError: it cannot be written; those before it are still there.

    >>> import tempfile
    >>> third = Checkpoint(
    ...     round=3, arrays={"w": np.float32([1.0])}, strategy={}, run="", recipe="", ledger_head="", history=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(Path(folder), third).name[:7]
    '000003-'
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (broken := _not_finite(checkpoint.arrays)) is not None:
        raise ValueError(
            f"expected a finite model after round {checkpoint.round}, got NaN or infinity in {broken}; lower the "
            "learning rates, or look at what the strategy does"
        )
    tensors = {f"model.{name}": _contiguous(array) for name, array in checkpoint.arrays.items()}
    tensors |= {f"strategy.{name}": _contiguous(_numbers(name, array)) for name, array in checkpoint.strategy.items()}
    about = {
        "round": checkpoint.round,
        "run": checkpoint.run,
        "recipe": checkpoint.recipe,
        "ledger_head": checkpoint.ledger_head,
        "order": list(checkpoint.arrays),
        "state": list(checkpoint.strategy),
        "history": list(checkpoint.history),
    }
    data = save(tensors, metadata={"tacit.checkpoint": _FORMAT, "about": json.dumps(about)})
    path = folder / f"{checkpoint.round:06d}-{_digest(data)}.safetensors"
    write_durably(path, data)
    reach("checkpoint.before_removal")
    for other in _superseded(folder, path):
        other.unlink()
    return path


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a note for each damaged one that was passed over.

    Returns:
        None only where there is no checkpoint at all, whole or damaged.

    Raises:
        FileDamaged: none is whole, or one is of a format that this version does not read: beginning again would throw
            the rounds away, and spend again what they spent.

    >>> import tempfile
    >>> third = Checkpoint(
    ...     round=3, arrays={"w": np.float32([1.0])}, strategy={}, run="", recipe="", ledger_head="", history=[])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_checkpoint(Path(folder), third)
    ...     load_checkpoint(Path(folder)) == (third, [])
    True
    """
    passed: list[tuple[Path, str]] = []
    for path in sorted(folder.glob("*.safetensors"), key=_place, reverse=True):
        found = _read(path)
        if isinstance(found, Checkpoint):
            return found, [f"{path}: damaged checkpoint passed over ({why})" for path, why in passed]
        passed.append((path, found))
    if passed:
        named = ", ".join(f"{path.name} ({why})" for path, why in passed)
        raise FileDamaged(
            f"expected a whole checkpoint in {folder}, got only damaged ones: {named}; restore one from a copy, or "
            "begin in another folder"
        )
    return None, []


def _read(path: Path) -> Checkpoint | str:
    """What a file holds, or why it is passed over.

    Raises:
        FileDamaged: whole, but of another format; an older file is not what its run would go on from.
    """
    named = _NAME.fullmatch(path.name)
    if named is None or not path.is_file():
        return "not named like a checkpoint" if named is None else "not a file"
    data = path.read_bytes()
    if _digest(data) != named[2]:
        return "not the bytes that its name states"
    try:
        tensors, metadata = load(data), _metadata(data)
        version = metadata["tacit.checkpoint"]
        if version == _FORMAT:
            return _checkpoint(json.loads(metadata["about"], object_pairs_hook=_once), tensors, int(named[1]))
    except _UNREADABLE as error:
        return f"not a checkpoint: {str(error)[:160]}"
    raise FileDamaged(
        f"expected checkpoints of format {_FORMAT}, got format {version[:20]!r} in {path}; resume with the version of "
        "tacit that wrote it"
    )


def _metadata(data: bytes) -> dict[str, str]:
    """Of a safetensors file (8 bytes of length, then JSON) in which no name comes twice: readers differ in whose wins.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it has none.
    """
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size], object_pairs_hook=_once)["__metadata__"]
    return {str(key): str(value) for key, value in metadata.items()}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name that comes twice")
    return dict(pairs)


def _checkpoint(about: Any, tensors: State, named_round: int) -> Checkpoint:
    """The parts put together.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: any of them is not as it is written.
    """
    if {key: type(value) for key, value in about.items()} != _ABOUT:
        raise ValueError("other fields than expected")
    if about["round"] != named_round:
        raise ValueError(f"of round {about['round']}, and not of the one in its name")
    if not all(isinstance(name, str) for name in [*about["order"], *about["state"]]):
        raise ValueError("names that are no text")
    arrays = {name: tensors.pop(f"model.{name}") for name in about["order"]}
    strategy = {name: tensors.pop(f"strategy.{name}") for name in about["state"]}
    if tensors or not all(isinstance(row, dict) for row in about["history"]):
        raise ValueError("arrays or rows that are not expected")
    if (broken := _not_finite(arrays)) is not None:
        raise ValueError(f"NaN or infinity in {broken}")
    rest = {key: about[key] for key in ("round", "run", "recipe", "ledger_head", "history")}
    return Checkpoint(arrays=arrays, strategy=strategy, **rest)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _contiguous(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # safetensors writes the memory as it lies: a transposed array would come back scrambled, without an error.
    return np.asarray(array, order="C")


def _numbers(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(
            f"expected a strategy's state as integers or floats of at most 64 bits, got {name}={array.dtype}"
        )
    return array


def _not_finite(arrays: Arrays) -> str | None:
    """The first array with a value that is not finite."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)


def _place(path: Path) -> tuple[int, str]:
    named = _NAME.fullmatch(path.name)
    return (int(named[1]) if named else -1), path.name


def _superseded(folder: Path, newest: Path) -> list[Path]:
    # A name that sorts after the newest is a damaged one that was passed over: it must not push out a whole one.
    files = [path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name) and path != newest]
    others = sorted(files, key=_place)
    older = [path for path in others if _place(path)[0] < _place(newest)[0]]
    return [path for path in others if path not in older[1 - _KEPT :]]


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
        read_header(path)  # in the sandbox: a folder may come from elsewhere
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in json.loads(file.metadata()["order"])}
    except (ArtifactRefused, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FileDamaged(f"expected weights written by tacit, got {path}: {error}; restore the file") from None
    if (broken := _not_finite(arrays)) is not None:
        raise FileDamaged(f"expected finite weights, got {path} with NaN or infinity in {broken}; restore it")
    return arrays
