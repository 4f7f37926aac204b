"""The pipeline: one function a stage, and `run` for all of them.

from tacit.edge.pipeline import run
summary = run("digits", "runs/digits")
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tacit.devices.answers import DeviceFull, DeviceUnreachable
from tacit.devices.durable import FileDamaged
from tacit.devices.failpoint import reach
from tacit.edge.progress import Progress, Silent
from tacit.edge.recipe import Recipe, RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderMismatch, RunFolder
from tacit.edge.twin import Twin

if TYPE_CHECKING:
    from tacit.compression.variant import VariantSpec
    from tacit.devices.protocol import Mode
    from tacit.edge.fleet import Access

__all__ = ["compress", "measure", "report", "run", "train"]


_USED = {"none": "weights only", "public": "public data", "private": "private data"}


def run(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    unsafe_seed: int | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Trains, compresses, measures and reports.

    Args:
        recipe: a TOML file, the name of a built-in recipe, or a loaded one.
        out: the run directory.
        resume: continue a run that was interrupted; what is done is not done again.
        overrides: `table.key=value` on top of the recipe.
        unsafe_seed: makes batches and noise reproducible for tests, which voids the guarantee; all that is written says
            so, and `out` must have "guarantee-void" in its name.
        progress: where to report to; nobody when None.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RecipeInvalid, RecipeRefused: the recipe.
        FolderMismatch, FolderHeld: the directory.
        DataProblem, PrivacyRefused, FederationFailed: training.
        OSError: disk or permission.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    shown = progress or Silent()
    with _opened(Path(out), resolved, unsafe_seed) as folder:
        if folder.begun and not resume:
            raise FolderMismatch(f"expected a fresh folder, got {folder.path} with a run; add --resume or name another")
        _check(resolved, "the recipe" if isinstance(recipe, Recipe) else str(recipe), shown)
        twin = _train(folder, shown)
        try:
            _state_privacy(folder)
            failed = _compress(folder, shown, again=False)
            twin.wait(shown)
        finally:
            twin.stop()
        if len(failed) < len(folder.recipe.compression.variants):
            _measure(folder, folder.recipe.devices.names, shown)
        return _report(folder, shown)


def train(out: str | Path, *, progress: Progress | None = None) -> dict[str, object]:
    """The training stage of a run directory; goes on from its last checkpoint. Returns the privacy card."""
    with _opened(Path(out)) as folder:
        shown = progress or Silent()
        _check(folder.recipe, str(folder.path / "recipe.toml"), shown)
        twin = _train(folder, shown)
        try:
            twin.wait(shown)
        finally:
            twin.stop()
        return _state_privacy(folder)


def compress(out: str | Path, *, progress: Progress | None = None) -> dict[str, str]:
    """The compression stage of a run directory that has been trained. Returns reasons of what failed, by name."""
    with _opened(Path(out)) as folder:
        _need_training(folder)
        return _compress(folder, progress or Silent(), again=True)


def measure(
    out: str | Path,
    *,
    devices: Sequence[str] = (),
    again: bool = False,
    mode: Mode | None = None,
    access: Access | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures the artifacts of a run directory on devices, by default the recipe's; as `measuring.measure_run`."""
    from tacit.edge.measuring import measure_run

    with _opened(Path(out)) as folder:
        _need_training(folder)
        names = devices or folder.recipe.devices.names
        return measure_run(folder, names, progress or Silent(), again=again, mode=mode, access=access)


def forget(out: str | Path, devices: Sequence[str]) -> list[str]:
    """Removes what a run directory knows of devices; returns those of which it knew something."""
    from tacit.edge.measuring import forget_devices

    with _opened(Path(out)) as folder:
        return forget_devices(folder, devices)


def report(out: str | Path, *, progress: Progress | None = None) -> dict[str, object]:
    """Writes summary.json and report.html of a run directory from what it holds."""
    with _opened(Path(out)) as folder:
        _need_training(folder)
        return _report(folder, progress or Silent())


@contextmanager
def _opened(path: Path, recipe: Recipe | None = None, unsafe_seed: int | None = None) -> Iterator[RunFolder]:
    folder = RunFolder(path, recipe, unsafe_seed=unsafe_seed)
    try:
        yield folder
    finally:
        folder.close()


@contextmanager
def _timed(folder: RunFolder, stage: str) -> Iterator[None]:
    started = time.monotonic()
    folder.log("begin", stage=stage)
    try:
        yield
    finally:  # interrupted sessions count too
        folder.add_wall_time(stage, started)
        folder.log("end", stage=stage)


def _need_training(folder: RunFolder) -> None:
    if not folder.trained:
        raise FolderMismatch(f"expected a trained run in {folder.path}, got none; `tacit train {folder.path}` first")
    _state_privacy(folder)


def _check(recipe: Recipe, where: str, progress: Progress) -> None:
    """What can be known to be wrong before a folder is touched and a record is charged."""
    progress.begin("prepare", 1)
    from tacit.edge.composition import build_model
    from tacit.edge.planning import check_plan, delta_note
    from tacit.federated.plugged import find_strategy

    try:
        _specs(recipe)
        build_model(recipe)
        if ":" in recipe.federated.strategy:
            find_strategy(recipe.federated.strategy)
    except ValueError as error:
        raise RecipeInvalid(str(error), where) from None
    loose = delta_note(check_plan(recipe))
    if loose:
        progress.note(loose)
    progress.end("recipe, model and data fit")


def _specs(recipe: Recipe) -> list[VariantSpec]:
    from tacit.compression.passes import form_of, parse_passes
    from tacit.compression.targets import label_of
    from tacit.compression.variant import VariantSpec

    specs = []
    for variant in recipe.compression.variants:
        try:
            passes = parse_passes(variant.passes)
        except ValueError as error:
            raise ValueError(f"variant {variant.name!r}: {error}") from None
        spec = VariantSpec(variant.name, variant.format, passes, variant.whole)
        label = label_of(spec.format, form_of(passes))
        if variant.label not in (None, label):
            raise ValueError(
                f"variant {variant.name!r}: expected label={label!r} for its passes, got {variant.label!r}; "
                "leave label out"
            )
        specs.append(spec)
    return specs


def _train(folder: RunFolder, progress: Progress) -> Twin:
    from tacit.edge.flower_app import train_in_process
    from tacit.edge.metric_words import metric_name, metric_text
    from tacit.edge.planning import task_of

    twin = Twin(folder)
    if folder.trained:
        return twin
    folder.bind()
    metric = task_of(folder.recipe).metric

    def on_row(row: Mapping[str, object]) -> None:
        folder.log("round", **row)
        if "note" in row:
            progress.note(str(row["note"]))
        else:
            reached = metric_text(row["accuracy"], metric)
            progress.step(int(str(row["round"])), f"{metric_name(metric)} {reached}")

    try:
        with _timed(folder, "train"):
            progress.begin("train", folder.recipe.federated.rounds)
            train_in_process(folder.recipe, folder.path, run=folder.run, report=on_row, unsafe_seed=folder.unsafe_seed)
            _state_privacy(folder)
            progress.end(f"{folder.recipe.federated.rounds} rounds")
    except BaseException:
        twin.stop()
        raise
    return twin


def _state_privacy(folder: RunFolder) -> dict[str, object]:
    """The privacy card, fixed once the last private access is over; artifacts are stamped with its digest."""
    from tacit.edge.card import no_privacy_card, privacy_card
    from tacit.edge.deployed_card import DEPLOYED, deployed_card
    from tacit.edge.planning import planned, task_of

    recipe = folder.recipe
    data = task_of(recipe).load()
    deployed = (folder.path / DEPLOYED).is_file()
    plan = planned(recipe, data, void=folder.unsafe_seed is not None, deployed=deployed)
    written = folder.read_json(folder.named("privacy.json"))
    if not plan.mechanism.private:
        card = no_privacy_card(folder)
    else:
        passes = [f"{s.name}: {p.name} ({_USED[p.data_use]})" for s in _specs(recipe) for p in s.passes]
        if deployed:
            card = deployed_card(folder, plan, data_status=data.status, passes=passes)
        else:
            card = privacy_card(folder, plan, data_status=data.status, passes=passes, with_prv=written is None)
    if written is not None:
        _compare_cards(folder, written, card)
        return written
    reach("train.before_card")
    folder.write_json(card, folder.named("privacy.json"))
    return card


def _compare_cards(folder: RunFolder, written: Mapping[str, object], found: Mapping[str, object]) -> None:
    """The card must be what the ledger gives; a Python float survives JSON unchanged."""
    other = [key for key in found if key != "epsilon_prv" and written.get(key) != found[key]]
    if other or set(written) != set(found):
        raise FileDamaged(
            f"expected the card that the ledger gives, got {folder.path / folder.named('privacy.json')} with another "
            f"{', '.join(other[:3]) or 'set of fields'}; delete it and it is written anew"
        )


def _compress(folder: RunFolder, progress: Progress, *, again: bool) -> dict[str, str]:
    from tacit.edge.variants import make_variants

    with _timed(folder, "compress"):
        specs = _specs(folder.recipe)
        progress.begin("compress", len(specs))
        failed = make_variants(folder, specs, progress, again=again)
        if failed:
            folder.write_json(failed, "variants", ".failed.json")
        else:
            (folder.path / "variants" / ".failed.json").unlink(missing_ok=True)
        progress.end(f"{len(specs) - len(failed)} of {len(specs)} variants")
        return failed


def _measure(folder: RunFolder, devices: Sequence[str], progress: Progress) -> None:
    """A device that cannot be reached costs its own figures alone: the report says that they were not measured."""
    from tacit.edge.measuring import measure_run

    try:
        measure_run(folder, devices, progress)
    except (DeviceUnreachable, DeviceFull, ModuleNotFoundError) as error:
        progress.note(f"not measured: {error}")


def _report(folder: RunFolder, progress: Progress) -> dict[str, object]:
    from tacit.edge.report import write_report
    from tacit.edge.summary import summarise

    with _timed(folder, "report"):
        progress.begin("report", 1)
        try:
            summary = summarise(folder)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FileDamaged(
                f"expected files written by tacit in {folder.path}, got {type(error).__name__} {error}; "
                "run the stages again"
            ) from error
        reach("report.before_write")
        page = folder.path / folder.named("report.html")
        write_report(summary, page)
    summary = {**summary, "wall_s": folder.wall_s()}
    folder.write_json(summary, folder.named("summary.json"))
    progress.end(str(page))
    return summary


def privacy_line(card: Mapping[str, object]) -> str:
    """ε, rounded up, with everything without which it means nothing.

    Example:
        >>> card = {"unit": "record", "epsilon": 1.231, "delta": 1e-5, "relation": "add/remove"}
        >>> privacy_line({**card, "accountant": "PLD", "adversary": "everyone"})
        'ε = 1.24 at δ = 1e-05, record level, add/remove, PLD; against everyone'
    """
    if card.get("unit") == "none":
        return "no privacy guarantee"
    if card.get("guarantee") == "VOID":
        return "GUARANTEE VOID: batches and noise came from --unsafe-seed"
    epsilon = math.ceil(float(str(card["epsilon"])) * 100 - 1e-7) / 100
    return (
        f"ε = {epsilon:.2f} at δ = {card['delta']:g}, {card['unit']} level, {card['relation']}, {card['accountant']}; "
        f"against {card['adversary']}"
    )
