"""The stage that measures: the artifacts of a run on its devices, only what is missing, and what has changed since."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tacit.devices.sandbox import ArtifactRefused
from tacit.edge.fleet import Access, Fleet, Work, check_devices, file_of
from tacit.edge.measured import Result, fit_is_old, held_result, incomplete, nothing, peaks_of, standing
from tacit.edge.measurement import Measurement
from tacit.edge.progress import Progress
from tacit.edge.recipe import RecipeInvalid
from tacit.edge.run_folder import FolderMismatch, RunFolder

if TYPE_CHECKING:
    from tacit.devices.protocol import Artifact, Evaluation, Mode
    from tacit.federated.task import Task

__all__ = ["forget_devices", "measure_file", "measure_run"]

_INPUTS, _EVALUATED = 64, 500
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

    names, access = check_devices(devices), access or Access()
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
            measurement = Measurement(folder, work, held, progress)
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
    known = [name for name in check_devices(devices) if (folder.path / "measure" / file_of(name)).exists()]
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

    names = check_devices(devices)
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
