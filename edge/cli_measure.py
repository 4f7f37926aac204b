"""`tacit measure`: how fast artifacts are where they will live, whether they fit, and what has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome
from tacit.edge.measure_lines import comparison_doubts, comparison_lines, result_lines, wrapped
from tacit.edge.recipe import RecipeInvalid

if TYPE_CHECKING:
    from tacit.edge.fleet import Access

__all__ = ["measure", "register"]

_MOST_SUSTAINED_S = 3600


def register(app: App) -> None:
    """Adds the command."""
    app.command(measure)


def measure(
    target: Path | None = None,
    /,
    *,
    device: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    mode: Literal["quick", "full"] | None = None,
    again: Annotated[bool, Parameter(negative="")] = False,
    forget: Annotated[bool, Parameter(negative="")] = False,
    inputs: Path | None = None,
    sustained: float | None = None,
    profile: Annotated[bool, Parameter(negative="")] = False,
    python: str = "python3",
    key: Path | None = None,
    known_hosts: Path | None = None,
    benchmark_model: Path | None = None,
    regardless: Annotated[bool, Parameter(negative="")] = False,
    host: str | None = None,
    port: int = 0,
    compare: Annotated[tuple[Path, Path] | None, Parameter(negative="")] = None,
) -> Outcome:
    """Measure latency and memory of artifacts on devices; or see what fits, or compare two results.

    Args:
        target: A run directory, compressed; or a model file, with --inputs.
        device: local (this machine), local:tflite-runtime (the same, with version 2.14 of that), micro
            (microcontrollers: answers, memory, fit), qemu:aarch64 (answers alone), ssh:user@host[:port],
            adb[:serial], browser; may be repeated. By default the recipe's.
        mode: quick (about 10 s for two artifacts) or full (a minute).
        again: Measure anew what was measured already.
        forget: Remove what is known of these devices instead of measuring.
        inputs: A .npy file (n, *shape) of real inputs as the model file takes them.
        sustained: Seconds of sustained load per artifact, for heat and energy; on a battery after as long a rest.
        profile: Time operators too, where the runtime can.
        python: The Python on devices over SSH; it needs numpy and a runtime.
        key: A private key for SSH.
        known_hosts: Host keys that are known; your own file by default.
        benchmark_model: For adb: TensorFlow Lite's benchmark_model, built for the phone, for .tflite files.
            Without it Termux's Python runs .onnx files, where adb may enter it.
        regardless: For adb: though the phone is hot or its battery low.
        host: For browser: the address to serve on; by default this computer's on the network.
        port: For browser: the port; any that is free by default.
        compare: Two results (measure/DEVICE.json, or run directories) instead of measuring.
    """
    if compare is not None:
        if target is not None or device or inputs is not None:
            raise RecipeInvalid("expected two results alone, got a target, a device or inputs, too", "--compare")
        return _compared(*compare)
    if target is None:
        raise RecipeInvalid("expected a run directory or a model file, got none; name one", "tacit measure")
    files = {"--key": key, "--known-hosts": known_hosts, "--benchmark-model": benchmark_model, "--inputs": inputs}
    _check_options(target, port, files)
    if sustained is not None and not 1 <= sustained <= _MOST_SUSTAINED_S:
        raise RecipeInvalid(f"expected 1 to {_MOST_SUSTAINED_S} seconds, got {sustained}; name as many", "--sustained")
    from tacit.edge.fleet import Access, check_devices
    from tacit.edge.progress import Console

    check_devices(device)
    if forget:
        return _forgotten(target, device)
    access = Access(
        python=python,
        key=key,
        known_hosts=known_hosts,
        sustained_s=sustained,
        profile=profile,
        benchmark_model=benchmark_model,
        regardless=regardless,
        host=host,
        port=port,
    )
    console = Console()
    try:
        if target.is_file():
            results = _of_file(target, inputs, device or ("local",), mode, access, console)
        else:
            from tacit.edge import pipeline

            results = pipeline.measure(target, devices=device, again=again, mode=mode, access=access, progress=console)
    finally:
        console.stop()
    failed = {name: result["failed"] for name, result in results.items() if result["failed"]}
    lost = [name for name, result in results.items() if result.get("lost")]
    lines = [line for name, result in results.items() for line in result_lines(name, result, alone=len(results) == 1)]
    data = {"devices": results, "failed": failed, "lost": lost}
    return Outcome(text="\n".join(lines).rstrip(), data=data, code=8 if failed or lost else 0)


def _check_options(target: Path, port: int, files: Mapping[str, Path | None]) -> None:
    """Raises RecipeInvalid for what is wrong with the command itself, before anything is asked of a device."""
    if not target.exists():
        what = f"expected a run directory or a model file, got {target}, which is not there"
        raise RecipeInvalid(f"{what}; name another, or `tacit init {target}` makes a run", "tacit measure")
    if files["--inputs"] is not None and target.is_dir():
        raise RecipeInvalid("expected no inputs for a run, which has its own, got some; name a model file", "--inputs")
    if not 0 <= port <= 65535:
        raise RecipeInvalid(f"expected a port from 0 to 65535, got {port}; 0 takes any that is free", "--port")
    for option, path in files.items():
        if path is not None and not path.is_file():
            raise RecipeInvalid(f"expected a file, got {path}, which is none; name another", option)


def _forgotten(target: Path, devices: Sequence[str]) -> Outcome:
    from tacit.edge import pipeline

    if not devices or target.is_file():
        raise RecipeInvalid("expected a run directory and devices to forget, got none; name them", "--forget")
    gone = pipeline.forget(target, devices)
    return Outcome(text=f"forgotten: {', '.join(gone) or 'nothing was known'}", data={"forgotten": gone})


def _of_file(
    path: Path, inputs: Path | None, devices: Sequence[str], mode: str | None, access: Access, console: Any
) -> dict[str, dict[str, Any]]:
    from tacit.edge.measuring import measure_file

    if inputs is None:
        raise RecipeInvalid(
            "expected inputs to measure a model file with, got none; give real ones, as it takes them, in a .npy file",
            "--inputs",
        )
    return measure_file(path, inputs, devices, console, mode="full" if mode == "full" else "quick", access=access)


def _compared(earlier: Path, later: Path) -> Outcome:
    from tacit.devices.comparison import compare

    results = [_result(path) for path in (earlier, later)]
    try:
        found = compare(*results)
    except ValueError as error:
        raise RecipeInvalid(str(error), "--compare") from None
    if not found:
        raise RecipeInvalid("expected results with an artifact in common, got none; name two of one run", "--compare")
    doubts = comparison_doubts(*results)
    data = {"compared": [one.as_json() for one in found], "doubts": doubts}
    return Outcome(text="\n".join([*comparison_lines(found), *map(wrapped, doubts)]), data=data)


def _result(path: Path) -> dict[str, Any]:
    """A result with latencies, or the only one of a run directory."""
    if not path.is_dir():
        return _content(path)
    held = {one: _content(one) for one in sorted((path / "measure").glob("*.json"))}
    timed = [one for one, told in held.items() if any("p50_us" in entry for entry in told["artifacts"].values())]
    if len(timed) != 1:
        names = ", ".join(one.name for one in timed) or "none"
        raise RecipeInvalid(
            f"expected one result with latencies in {path / 'measure'}, got {names}; name the file", "--compare"
        )
    return held[timed[0]]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeInvalid(
            f"expected a result or a run directory, got {path}, which is not there", "--compare"
        ) from None
    except ValueError:
        content = None
    entries = content.get("artifacts") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise RecipeInvalid(f"expected what tacit measure wrote, got {path}; name measure/DEVICE.json", "--compare")
    return {**content, "artifacts": entries}
