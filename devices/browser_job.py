"""What a page is given to do: the models that a browser runs, their inputs, and the files that it needs for that."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.asking import REFUSALS, identify
from tacit.devices.browser_parity import TYPES
from tacit.devices.browser_server import KINDS
from tacit.devices.browser_session import File, ModelState
from tacit.devices.device import Artifact, Placed
from tacit.devices.protocol import Evaluation
from tacit.devices.runtime import InputLayout
from tacit.devices.schedule import Mode, Plan, plan

RUNTIMES = {"onnxruntime": "onnxruntime-web", "litert": "LiteRT.js"}
Values = npt.NDArray[Any]
_WEB = Path(__file__).with_name("web")
_PAGES = ("measure.html", "measure.css", "measure.js", "measure-worker.js", "charts.js", "runtimes.js")
_ENTRANCES = {"onnxruntime-web": "onnxruntime-web/ort.wasm.min.mjs", "LiteRT.js": "litert/index.js"}
_BYTES = "application/octet-stream"
_MOST_INPUTS, _CHECK_S = 256, {"quick": 5.0, "full": 20.0}
_MOST_SUSTAINED_S = 3600.0
_LOADING_S = 120.0  # to fetch 25 MB of runtimes over a slow network


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement, prepared; models go by names of ours ("m0") on their way to the page and back.

    ``pages`` is served to whoever knows the link, ``held`` to the page that took the job; ``told`` describes it there.
    ``refused`` says why some artifacts are not given to any browser.
    """

    names: list[str]
    placed: dict[str, Placed]
    refused: dict[str, str]
    versions: Mapping[str, str]
    pages: dict[str, File]
    held: dict[str, File]
    told: dict[str, Any]
    limit_s: float

    def models(self) -> dict[str, ModelState]:
        """Nothing is known of any yet."""
        return {
            name: ModelState(name=one.artifact.name, runtime=RUNTIMES[one.runtime]) for name, one in self.placed.items()
        }


def prepare(
    artifacts: Sequence[Artifact],
    inputs: Values | Sequence[Values],
    *,
    mode: Mode,
    sustained_s: float | None,
    evaluation: Evaluation | None,
) -> Job:
    """Make a job of what ``measure_in_browser`` was asked for; raises what that does."""
    schedule, names = plan(mode), [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"expected artifacts of different names, got names={names}; rename one")
    if sustained_s is not None and not 0 < sustained_s <= _MOST_SUSTAINED_S:
        raise ValueError(f"expected 0 < sustained_s <= {_MOST_SUSTAINED_S:g}, got sustained_s={sustained_s}")
    arrays = checked(inputs)
    checks = None if evaluation is None else checked(evaluation.inputs)
    versions, vendor = _vendored()
    placed, refused = _placed(artifacts, len(arrays), versions)
    layouts = {name: _layouts(one.artifact, len(arrays)) for name, one in placed.items()}
    files, described = _input_files("input", arrays, set(layouts.values()))
    held = files | {f"model/{name}": (_BYTES, one.artifact.path.read_bytes()) for name, one in placed.items()}
    told: dict[str, Any] = {
        "groups": _groups(placed, layouts, held, versions),
        "inputs": described,
        "n": len(arrays[0]),
        "plan": asdict(schedule),
        "sustained_s": sustained_s,
        "check": None,
        "expected_s": _expected_s(schedule, len(placed), sustained_s),
        "notices": [f"{name} will not be measured: {reason}" for name, reason in refused.items()],
    }
    if checks is not None:
        files, described = _input_files("check", checks, set(layouts.values()))
        held |= files
        told["check"] = {"inputs": described, "n": len(checks[0]), "max_s": _CHECK_S[mode]}
    each_s = 60.0 + schedule.max_warmup_s + 2 * schedule.max_s + 1.5 * (sustained_s or 0.0)
    return Job(
        names=names,
        placed=placed,
        refused=refused,
        versions=versions,
        pages={name: (KINDS[Path(name).suffix], _WEB / name) for name in _PAGES} | vendor,
        held=held,
        told=told,
        limit_s=_LOADING_S + len(placed) * each_s,
    )


def _vendored() -> tuple[dict[str, str], dict[str, File]]:
    """The versions of the runtimes that are there, and their files."""
    vendor = _WEB / "vendor"
    listed = vendor / "versions.json"
    told = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    versions = {
        name: str(told[name]) for name, path in _ENTRANCES.items() if name in told and (vendor / path).is_file()
    }
    if not versions:
        raise ModuleNotFoundError(f"expected onnxruntime-web and LiteRT.js in {vendor}, got neither; run make web")
    found = (path for path in sorted(vendor.rglob("*")) if path.suffix in KINDS and path.is_file())
    return versions, {path.relative_to(_WEB).as_posix(): (KINDS[path.suffix], path) for path in found}


def _placed(
    artifacts: Sequence[Artifact], inputs: int, versions: Mapping[str, str]
) -> tuple[dict[str, Placed], dict[str, str]]:
    """Those that a browser may be given, by names of ours, and why it is not given the others."""
    placed: dict[str, Placed] = {}
    refused: dict[str, str] = {}
    for place, artifact in enumerate(artifacts):
        try:
            found = identify(artifact)
        except REFUSALS as error:
            refused[artifact.name] = str(error)
            continue
        runtime = RUNTIMES.get(found.runtime)
        if runtime is None or artifact.path.suffix.lower() == ".ort":
            refused[artifact.name] = "no browser runs this file; export it to .onnx or .tflite"
        elif runtime not in versions:
            refused[artifact.name] = f"{runtime} is not in {_WEB / 'vendor'}; run make web"
        elif artifact.threads != 1:
            refused[artifact.name] = f"expected threads=1 in a browser, got threads={artifact.threads}"
        elif not isinstance(artifact.input_layout, str) and len(artifact.input_layout) != inputs:
            refused[artifact.name] = f"expected a layout of each of {inputs} inputs, got {len(artifact.input_layout)}"
        else:
            placed[f"m{place}"] = replace(found, remote=f"m{place}")
    return placed, refused


def _groups(
    placed: Mapping[str, Placed],
    layouts: Mapping[str, tuple[InputLayout, ...]],
    held: Mapping[str, File],
    versions: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What the job says of the models, by runtime."""
    groups: dict[str, dict[str, Any]] = {}
    for name, one in placed.items():
        runtime, content = RUNTIMES[one.runtime], held[f"model/{name}"][1]
        group = groups.setdefault(runtime, {"runtime": runtime, "version": versions[runtime], "models": []})
        group["models"].append(
            {
                "id": name,
                "name": one.artifact.name,
                "kind": "onnx" if one.runtime == "onnxruntime" else "tflite",
                "layout": "/".join(layouts[name]),
                "bytes": len(content) if isinstance(content, bytes) else 0,
            }
        )
    return list(groups.values())


def _layouts(artifact: Artifact, inputs: int) -> tuple[InputLayout, ...]:
    layout = artifact.input_layout
    return (layout,) * inputs if isinstance(layout, str) else tuple(layout)


def _input_files(
    kind: str, arrays: Sequence[Values], layouts: set[tuple[InputLayout, ...]]
) -> tuple[dict[str, File], dict[str, Any]]:
    """Inputs as bytes in each layout that some model takes, and how the job names them."""
    files: dict[str, File] = {}
    described: dict[str, Any] = {}
    for number, layout in enumerate(sorted(layouts)):
        rows = []
        for place, (values, wanted) in enumerate(zip(arrays, layout, strict=True)):
            laid = np.moveaxis(values, 1, -1) if wanted == "channel_last" and values.ndim > 2 else values
            name = f"{kind}/{number}/{place}"
            files[name] = (_BYTES, np.ascontiguousarray(laid, dtype=TYPES[values.dtype.name]).tobytes())
            rows.append({"file": name, "type": values.dtype.name, "shape": list(laid.shape[1:])})
        described["/".join(layout)] = rows
    return files, described


def checked(inputs: Values | Sequence[Values]) -> list[Values]:
    """The first of all inputs, as many as a page is given; raises ValueError where a browser takes none of them."""
    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    fit = [values.dtype.name in TYPES and values.ndim >= 2 and values.size > 0 for values in arrays]
    if not arrays or not all(fit) or len({len(values) for values in arrays}) != 1:
        found = [f"{values.dtype} {values.shape}" for values in arrays]
        raise ValueError(f"expected inputs (n, *shape) of {', '.join(TYPES)}, n the same for all, got {found}")
    return [values[:_MOST_INPUTS] for values in arrays]


def _expected_s(schedule: Plan, models: int, sustained_s: float | None) -> float:
    return 10.0 + models * (2.0 + schedule.warmup_s + 1.5 * schedule.min_s + (sustained_s or 0.0))
