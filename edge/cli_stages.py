"""`tacit run` and the stages alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

if TYPE_CHECKING:
    from tacit.edge.progress import Console

__all__ = ["register"]


def register(app: App) -> None:
    """Adds the commands."""
    for command in (run, train, compress, measure, report):
        app.command(command)


def run(
    recipe: str = "digits",
    /,
    *,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
) -> Outcome:
    """Train, compress, measure and report: the whole pipeline.

    Args:
        recipe: A TOML file, a folder with a recipe.toml, or a built-in recipe: digits.
        out: The run directory; runs/NAME when left out.
        resume: Continue a run that was interrupted.
        overrides: table.key=value on top of the recipe; may be repeated.
    """
    from tacit.edge.pipeline import run as run_pipeline
    from tacit.edge.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    console = _console()
    try:
        folder = out or Path("runs") / resolved.task.name
        summary = run_pipeline(resolved, folder, resume=resume, progress=console)
    finally:
        console.stop()
    return _summary_outcome(summary, folder)


def train(folder: Path, /) -> Outcome:
    """Train the model of a run directory; goes on where it stopped.

    Args:
        folder: The run directory; `tacit init` makes one.
    """
    from tacit.edge import pipeline

    console = _console()
    try:
        card = pipeline.train(folder, progress=console)
    finally:
        console.stop()
    return Outcome(text=pipeline.privacy_line(card), data={"privacy": dict(card), "folder": str(folder)})


def compress(folder: Path, /) -> Outcome:
    """Prune, distil, export and quantise the trained model into the recipe's variants.

    Args:
        folder: The run directory, trained.
    """
    from tacit.edge import pipeline

    console = _console()
    try:
        failed = pipeline.compress(folder, progress=console)
    finally:
        console.stop()
    lines = [f"{name}: {reason}" for name, reason in failed.items()]
    return Outcome(text="\n".join(lines), data={"failed": failed, "folder": str(folder)}, code=8 if failed else 0)


def measure(folder: Path, /, *, device: str = "local") -> Outcome:
    """Measure latency and memory of every artifact.

    Args:
        folder: The run directory, compressed.
        device: Where: local is this machine.
    """
    from tacit.edge import pipeline

    console = _console()
    try:
        result = pipeline.measure(folder, device=device, progress=console)
    finally:
        console.stop()
    artifacts, failed = result["artifacts"], result["failed"]
    lines = [f"{'artifact':<20} {'p50':>9} {'p90':>9} {'memory':>9}"]
    if isinstance(artifacts, dict):
        lines += [_latency_line(name, entry) for name, entry in artifacts.items()]
    if isinstance(failed, dict):
        lines += [f"{name}: not measured: {reason}" for name, reason in failed.items()]
    return Outcome(text="\n".join(lines), data=result, code=8 if failed else 0)


def report(folder: Path, /) -> Outcome:
    """Write summary.json and report.html from what a run directory holds.

    Args:
        folder: The run directory, trained.
    """
    from tacit.edge import pipeline

    return _summary_outcome(pipeline.report(folder), folder)


def _summary_outcome(summary: Mapping[str, object], folder: Path) -> Outcome:
    from tacit.edge.pipeline import privacy_line

    privacy, variants, failed = summary["privacy"], summary["variants"], summary["failed"]
    lines = [f"accuracy  {_percent(summary['accuracy'])}"]
    if summary["accuracy_without_privacy"] is not None:
        lines[0] += f" ({_percent(summary['accuracy_without_privacy'])} without privacy)"
    if isinstance(privacy, dict):
        lines.append(f"privacy   {privacy_line(privacy)}")
    if isinstance(variants, list):
        lines += ["", *_variant_lines(variants)]
    if isinstance(failed, list):
        lines += [f"failed    {entry['stage']} {entry['name']}: {entry['reason']}" for entry in failed]
    lines += ["", f"report    {folder / 'report.html'}"]
    return Outcome(text="\n".join(lines), data=summary, code=8 if failed else 0)


def _variant_lines(variants: list[dict[str, object]]) -> list[str]:
    """One line a variant; a narrow terminal gets fewer columns."""
    wide = shutil.get_terminal_size((100, 24)).columns >= 80
    lines = [f"{'variant':<16} {'size':>9} {'accuracy':>9} {'p90':>9}" + ("  label" if wide else "")]
    for variant in variants:
        latency = variant.get("latency")
        local = latency.get("local", {}) if isinstance(latency, dict) else {}
        line = f"{variant['name']!s:<16} {_size(variant['bytes'])} {_percent(variant['accuracy']):>9}"
        line += f" {_microseconds(local.get('p90_us'))}"
        lines.append(line + (f"  {variant['label']}" if wide else ""))
    return lines


def _latency_line(name: str, entry: Mapping[str, object]) -> str:
    memory = entry.get("peak_memory_bytes")
    shown = f"{memory / 1e6:>6.1f} MB" if isinstance(memory, int) else "        -"
    return f"{name:<20} {_microseconds(entry.get('p50_us'))} {_microseconds(entry.get('p90_us'))} {shown}"


def _size(size_bytes: object) -> str:
    return f"{size_bytes / 1000:>6.1f} kB" if isinstance(size_bytes, int) else "        -"


def _microseconds(value_us: object) -> str:
    return f"{value_us:>6.1f} µs" if isinstance(value_us, float) else "        -"


def _percent(share: object) -> str:
    return f"{share:.1%}" if isinstance(share, float) else "not measured"


def _console() -> Console:
    from tacit.edge.progress import Console

    return Console()
