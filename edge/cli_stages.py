"""`tacit run` and the stages alone."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome, microseconds, size, table
from tacit.edge.metric_words import metric_name, metric_text

if TYPE_CHECKING:
    from tacit.edge.progress import Console

__all__ = ["register", "summary_outcome"]


def register(app: App) -> None:
    """Adds the commands."""
    for command in (run, train, compress, report):
        app.command(command)


def run(
    recipe: str = "digits",
    /,
    *,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    unsafe_seed: int | None = None,
) -> Outcome:
    """Train, compress, measure and report: the whole pipeline.

    Args:
        recipe: A TOML file, a folder with a recipe.toml, or a built-in recipe: digits, writers.
        out: The run directory; runs/NAME when left out.
        resume: Continue a run that was interrupted.
        overrides: table.key=value on top of the recipe; may be repeated.
        unsafe_seed: For tests: reproducible batches and noise, which VOIDS THE GUARANTEE; all output says so.
    """
    from tacit.edge.pipeline import run as run_pipeline
    from tacit.edge.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    console = _console()
    try:
        name = resolved.task.name + ("" if unsafe_seed is None else ".guarantee-void")
        folder = (out or Path("runs") / name).expanduser()
        summary = run_pipeline(resolved, folder, resume=resume, unsafe_seed=unsafe_seed, progress=console)
    finally:
        console.stop()
    return summary_outcome(summary, folder)


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
    return Outcome(
        text=_wrapped(f"privacy   {pipeline.privacy_line(card)}"), data={"privacy": dict(card), "folder": str(folder)}
    )


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


def report(folder: Path, /) -> Outcome:
    """Write summary.json and report.html from what a run directory holds.

    Args:
        folder: The run directory, trained.
    """
    from tacit.edge import pipeline

    return summary_outcome(pipeline.report(folder), folder)


def summary_outcome(summary: Mapping[str, object], folder: Path) -> Outcome:
    """What a finished run prints."""
    from tacit.edge.pipeline import privacy_line

    privacy, variants, failed = summary["privacy"], summary["variants"], summary["failed"]
    metric = summary["metric"]
    lines = [f"{metric_name(metric):<9} {metric_text(summary['accuracy'], metric)}{_gap(summary)}"]
    if isinstance(privacy, dict):
        lines.append(_wrapped(f"privacy   {privacy_line(privacy)}"))
    lines += _owners_line(summary)
    if isinstance(variants, list) and variants:
        lines += ["", *_variant_lines(variants, metric)]
        if any((variant["parity"] or {}).get("input_source") == "synthetic" for variant in variants):
            lines += ["", "inputs    synthetic, for latency and agreement: no public ones were declared"]
    if isinstance(failed, list):
        lines += [f"failed    {entry['stage']} {entry['name']}: {entry['reason']}" for entry in failed]
    page = next(folder.glob("report*.html"), folder)
    lines += ["", f"report    {page}"]
    return Outcome(text="\n".join(lines), data=summary, code=8 if failed else 0)


def _owners_line(summary: Mapping[str, object]) -> list[str]:
    training = summary.get("training")
    found = training.get("owners_accuracy") if isinstance(training, dict) else None
    if not isinstance(found, dict) or found.get("mean") is None:
        return []
    by_owner = [entry["accuracy"] for entry in (found.get("by_owner") or {}).values()]
    spread = f"; from {metric_text(min(by_owner))} to {metric_text(max(by_owner))} by owner" if by_owner else ""
    interval = f" ({100 * found['low']:.1f} to {100 * found['high']:.1f})" if found["noise_sd"] else ""
    return [_wrapped(f"owners    {metric_text(found['mean'])}{interval} on their own records{spread}")]


def _gap(summary: Mapping[str, object]) -> str:
    private, twin, metric = summary["accuracy"], summary["accuracy_without_privacy"], summary["metric"]
    if not isinstance(private, float) or not isinstance(twin, float):
        return ""
    apart = f"{100 * (twin - private):.1f} points" if metric == "accuracy" else f"{twin - private:.3f}"
    return f"; {metric_text(twin, metric)} without noise, a gap of {apart}"


def _wrapped(line: str) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * 10, break_long_words=False))


def _variant_lines(variants: list[dict[str, object]], metric: object) -> list[str]:
    rows = [["variant", "size", metric_name(metric), "p90", "label"]]
    for variant in variants:
        latency = variant.get("latency")
        local = latency.get("local", {}) if isinstance(latency, dict) else {}
        reached = metric_text(variant["accuracy"], metric)
        numbers = [size(variant["bytes"]), reached, microseconds(local.get("p90_us"))]
        rows.append([str(variant["name"]), *numbers, str(variant["label"])])
    return table(rows, words_from=4)


def _console() -> Console:
    from tacit.edge.progress import Console

    return Console()
