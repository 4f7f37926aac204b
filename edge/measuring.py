"""The stage that measures: the artifacts of a run on its devices, only what is missing, and what has changed since."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tacit.devices.failpoint import reach
from tacit.devices.sandbox import ArtifactRefused
from tacit.edge.fleet import Access, Fleet, Work, check_device, file_of
from tacit.edge.history import History
from tacit.edge.measured import Result, beside, fit_is_old, held_result, incomplete, joined, nothing, peaks_of, standing
from tacit.edge.progress import Progress
from tacit.edge.recipe import RecipeInvalid
from tacit.edge.run_folder import FolderMismatch, RunFolder
from tacit.federated.home import home_folder

if TYPE_CHECKING:
    from tacit.devices.protocol import Artifact, Evaluation, Mode
    from tacit.federated.task import Task

__all__ = ["forget_devices", "measure_file", "measure_run"]

_INPUTS, _EVALUATED = 64, 500
_SLACK = 0.02  # of accuracy, beyond the interval: a device sees a part of the test split
_NOTHING = "no artifact that it can hold"


def measure_run(
    folder: RunFolder,
    devices: Sequence[str],
    progress: Progress,
    *,
    again: bool = False,
    mode: Mode | None = None,
    access: Access | None = None,
) -> dict[str, Result]:
    """Measures the artifacts of a run on devices, several at once.

    Args:
        folder: With artifacts.
        devices: Names, as `fleet.check_device` knows them.
        progress: Told of each step.
        again: Whether what was measured is measured anew; otherwise only what is missing is.
        mode: "quick" or "full"; when None that of earlier figures, else the recipe's.
        access: How to reach devices, and what else to measure.

    Returns:
        Each device's result, as in `measure/DEVICE.json`. Of one that could not be reached, or was lost, it holds what
        there is; the rest stands in `failed`, with the reason.

    Raises:
        RecipeInvalid: A name is none of a device.
        FolderMismatch: There are no artifacts.
        OSError: The only device, or all of them, could not be reached; `DeviceUnreachable` is one.
    """
    from tacit.edge.variants import built_artifacts

    names, access = _checked(devices), access or Access()
    artifacts = built_artifacts(folder)
    if not artifacts:
        raise FolderMismatch(f"expected artifacts in {folder.path}, got none; `tacit compress {folder.path}` first")
    taken = {name: _taken(name, artifacts, access) for name in names}
    held = {name: held_result(folder, name, artifacts) for name in names}
    known = {name: {} if again else standing(held[name], mode, access, taken[name]) for name in names}
    missing = [name for name in names if set(known[name]) != {artifact.name for artifact in taken[name]}]
    if "micro" in names and taken["micro"] and "micro" not in missing:
        soon = [artifact.name for artifact in taken["local"]] if "local" in missing else []
        missing += ["micro"] if fit_is_old(held["micro"], {*peaks_of(folder), *soon}) else []
    for name in [name for name in names if name not in missing]:
        progress.note(f"{name}: {_already(known[name]) if taken[name] else _NOTHING}")
    found = {name: _as_it_stands(name, held[name]) for name in names if name not in missing}
    if missing:
        started = time.monotonic()
        folder.log("begin", stage="measure")
        earlier: list[Mode] = [held[name]["mode"] for name in missing if held[name].get("mode") in ("quick", "full")]
        chosen = mode if mode is not None else [*earlier, folder.recipe.devices.mode][0]
        work = _work(folder, {name: taken[name] for name in missing}, artifacts, mode=chosen, known=known)
        try:
            measurement = _Measurement(folder, work, held, progress)
            found |= measurement.of(missing, access, alone=not any(one["artifacts"] for one in found.values()))
        finally:
            folder.add_wall_time("measure", started)
            folder.log("end", stage="measure")
    return {name: found[name] for name in names}


def forget_devices(folder: RunFolder, devices: Sequence[str]) -> list[str]:
    """Removes the results of devices; returns those that had one.

    Raises:
        RecipeInvalid: A name is none of a device.
    """
    known = [name for name in _checked(devices) if (folder.path / "measure" / file_of(name)).exists()]
    for name in known:
        (folder.path / "measure" / file_of(name)).unlink()
    return known


def measure_file(
    path: Path, inputs: Path, devices: Sequence[str], progress: Progress, *, mode: Mode, access: Access
) -> dict[str, Result]:
    """Measures one model file, on inputs as it takes them; nothing is written.

    Raises:
        RecipeInvalid: A name is none of a device, or the inputs are none.
        ArtifactRefused: The file is no model.
        OSError: The only device, or all of them, could not be reached.
    """
    from tacit.devices.formats import examine
    from tacit.devices.protocol import Artifact

    names = _checked(devices)
    values = _read_inputs(inputs)
    examine(path)
    artifacts = {name: [Artifact(name=path.name, path=path)] for name in names}
    work = Work(artifacts=artifacts, inputs=values, evaluation=None, outputs=1, mode=mode, known={})
    said = itertools.count(1)
    progress.begin("measure", 2 * len(names))
    fleet = Fleet(
        work=work,
        access=access,
        keep=lambda name, result: None,
        say=lambda text: progress.step(min(next(said), 2 * len(names)), text),
        tell=progress.note,
    )
    found = fleet.measure(names)
    lost = [outcome for outcome in found.values() if isinstance(outcome, Exception)]
    if len(lost) == len(names):
        raise lost[0]
    reasons = [result["failed"] for result in found.values() if not isinstance(result, Exception)]
    if all(path.name in failed for failed in reasons):
        what = f"{reasons[0][path.name]}; the inputs are {values.dtype} {values.shape}, and are given to it as they are"
        raise ArtifactRefused(what)
    progress.end(", ".join(names))
    return {
        name: incomplete(name, work, None, outcome) if isinstance(outcome, Exception) else outcome
        for name, outcome in found.items()
    }


def _checked(devices: Sequence[str]) -> list[str]:
    try:
        return list(dict.fromkeys(check_device(name) for name in devices))
    except ValueError as error:
        raise RecipeInvalid(str(error), "--device") from None


def _already(known: Mapping[str, Any]) -> str:
    phones = sorted({str(entry["phone"]) for entry in known.values() if entry.get("phone")})
    return f"measured already{f' on {phones[0]}' if phones else ''}; --again measures anew"


def _taken(device: str, artifacts: Sequence[Artifact], access: Access) -> list[Artifact]:
    """Those that a device can hold: a phone over adb by the tool that there is, or by Termux, which has no LiteRT."""
    if device == "micro":
        meant = [artifact for artifact in artifacts if artifact.runtime == "micro"]
        return meant or [artifact for artifact in artifacts if artifact.path.suffix == ".tflite"]
    if device == "qemu:aarch64":
        return [a for a in artifacts if a.path.suffix in (".onnx", ".tflite") and a.runtime != "micro"]
    # What TFLite Micro takes on a computer says nothing of a microcontroller.
    timed = [artifact for artifact in artifacts if artifact.runtime != "micro"]
    if device == "local:tflite-runtime":
        return [replace(artifact, runtime="tflite-runtime") for artifact in timed if artifact.path.suffix == ".tflite"]
    on_phone = (".onnx",) if access.benchmark_model is None else (".tflite",)
    suffixes = {"adb": on_phone, "browser": (".onnx", ".tflite")}.get(device.partition(":")[0])
    return timed if suffixes is None else [artifact for artifact in timed if artifact.path.suffix in suffixes]


def _as_it_stands(name: str, held: Result) -> Result:
    """A result that nothing was asked of now: that its device was lost some other time is no news."""
    return {key: value for key, value in held.items() if key != "lost"} or nothing(name)


def _work(
    folder: RunFolder,
    taken: Mapping[str, Sequence[Artifact]],
    artifacts: Sequence[Artifact],
    *,
    mode: Mode,
    known: Mapping[str, Result],
) -> Work:
    from tacit.edge.planning import task_of
    from tacit.edge.sample_inputs import sample_inputs

    task = task_of(folder.recipe)
    data = task.load()
    inputs = sample_inputs(task, data)
    return Work(
        artifacts=taken,
        inputs=inputs.values[:_INPUTS],
        input_source=inputs.source,
        evaluation=_evaluation(task, data),
        outputs=1,
        mode=mode,
        known=known,
        hosted=[artifact for artifact in artifacts if artifact.runtime != "micro"],
        peaks=partial(peaks_of, folder),
    )


class _Measurement:
    """Devices being measured: what each has so far is on disk at any time, and nothing that is known gets lost."""

    def __init__(self, folder: RunFolder, work: Work, held: Mapping[str, Result], progress: Progress) -> None:
        self._folder, self._work, self._held, self._progress = folder, work, held, progress
        self._latest: dict[str, Result] = {}
        self._new: dict[str, set[str]] = {name: set() for name in work.artifacts}
        self._began = datetime.now(UTC).isoformat(timespec="seconds")

    def of(self, names: Sequence[str], access: Access, *, alone: bool) -> dict[str, Result]:
        """Measures; each device's result, complete or not. With nothing at all to show it raises, if it is alone."""
        said, artifacts = itertools.count(1), self._work.artifacts
        # One for each artifact alone, one for each runtime that times its artifacts together, and what else is asked.
        extras = (access.sustained_s is not None) + access.profile
        steps = sum(
            len(taken) * (1 + extras + (self._work.evaluation is not None and name != "local"))
            + len({artifact.path.suffix for artifact in taken})
            for name, taken in artifacts.items()
        )
        self._progress.begin("measure", steps)
        fleet = Fleet(
            work=self._work,
            access=access,
            keep=self._keep,
            say=lambda text: self._progress.step(min(next(said), steps), text),
            tell=self._progress.note,
        )
        found = fleet.measure(names)
        lost = {name: outcome for name, outcome in found.items() if isinstance(outcome, Exception)}
        for name, why in lost.items():
            self._keep(name, incomplete(name, self._work, self._latest.get(name), why))
        if alone and len(lost) == len(names) and not any(self._latest[name]["artifacts"] for name in names):
            raise lost[names[0]]
        done = sum(len(self._new[name]) for name in names)
        missing = sum(len(artifacts[name]) - len(self._work.known.get(name, {})) for name in names)
        self._progress.end(f"{done} of {missing} artifacts on {', '.join(names)}")
        return self._latest

    def _keep(self, name: str, result: Result) -> None:
        """An incomplete result stands beside what was known, a complete one in its place."""
        held, asked = self._held[name], {artifact.name for artifact in self._work.artifacts[name]}
        about = {"input_source": self._work.input_source, "taken": self._began}
        older = held.get("artifacts", {})
        new = {
            variant: {**about, **entry} for variant, entry in result["artifacts"].items() if entry != older.get(variant)
        }
        changes = self._changes(name, {**result, "artifacts": new})
        result = {**result, "artifacts": {**result["artifacts"], **new}}
        result = beside(held, result, asked) if result["complete"] else joined(held, result)
        kept = [line for line in changes if line.partition(": ")[0] in result["artifacts"]]
        self._latest[name] = {**result, **_judged(self._folder, result), "changes": kept}
        reach("measure.before_write")
        self._folder.write_json(self._latest[name], "measure", file_of(name))

    def _changes(self, name: str, result: Result) -> list[str]:
        """What has become slower or faster; figures of an earlier session keep what was said of them then."""
        fresh = {variant: entry for variant, entry in result["artifacts"].items() if variant not in self._new[name]}
        earlier = self._latest.get(name, self._held[name]).get("changes") or []
        self._new[name] |= set(fresh)
        return [
            *(line for line in earlier if line.partition(": ")[0] not in fresh),
            *_noted({**result, "artifacts": fresh}, self._folder.recipe.task.name, self._progress),
        ]


def _judged(folder: RunFolder, result: Result) -> Result:
    """Artifacts that are right much less often on a device than where they were judged, flagged and failed.

    A runtime may run a file and compute something else: tflite-runtime 2.14 so runs some dynamic-range int8.
    """
    entries, failed = dict(result["artifacts"]), dict(result["failed"])
    for name, entry in entries.items():
        found = (entry.get("accuracy") or {}).get("top1")
        variant = folder.read_json("variants", name, "variant.json") or {}
        here = variant.get("accuracy")
        if found and isinstance(here, float) and found["high"] + _SLACK < here:
            entries[name] = {**entry, "flags": list(dict.fromkeys([*(entry.get("flags") or []), "departs"]))}
            failed[name] = (
                f"expected about {100 * here:.1f} % right, as where it was judged, got {100 * found['estimate']:.1f} % "
                "there; do not ship it to this device"
            )
    return {"artifacts": entries, "failed": failed}


def _read_inputs(path: Path) -> npt.NDArray[Any]:
    """Inputs of a file as a model takes them."""
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        values = None
    if not isinstance(values, np.ndarray):
        raise RecipeInvalid(f"expected a .npy file of numbers (n, *shape), got {path}; np.save it", "--inputs")
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise RecipeInvalid(
            f"expected finite numbers, got NaN or infinity in {path}; real inputs have none", "--inputs"
        )
    if values.ndim < 2 or not len(values) or (values.dtype != np.float32 and values.dtype.kind not in "iub"):
        shown = f"{values.dtype} {values.shape}"
        raise RecipeInvalid(
            f"expected float32 or whole numbers (n, *shape), n >= 1, got {shown} in {path}; np.save them so", "--inputs"
        )
    return values


def _evaluation(task: Task, data: Any) -> Evaluation | None:
    """What accuracy is measured on elsewhere: public records alone."""
    from tacit.devices.protocol import Evaluation

    if data.test is None or task.kind != "classification":
        return None
    return Evaluation(inputs=data.test.inputs[:_EVALUATED], labels=data.test.labels[:_EVALUATED])


def _noted(result: Mapping[str, Any], task: str, progress: Progress) -> list[str]:
    """Puts a result into the local history; returns what has become slower or faster, in words."""
    if result["mode"] == "parity" or not result["artifacts"]:
        return []
    try:
        history = History(home_folder())
        changes = [change for change in history.changes(result, task=task) if change.verdict != "no difference"]
        history.add(result, task=task)
    except (sqlite3.Error, OSError) as error:  # the figures are there all the same
        progress.note(f"the history of measurements could not be written: {error}")
        return []
    return [change.words() for change in changes]
