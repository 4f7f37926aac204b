"""Devices being measured: what each has so far is on disk at any time, judged beside what is known of it."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tacit.devices.failpoint import reach
from tacit.edge.fleet import Access, Fleet, Work, file_of
from tacit.edge.history import History
from tacit.edge.measured import Result, beside, incomplete, joined
from tacit.edge.progress import Progress
from tacit.edge.run_folder import RunFolder
from tacit.federated.home import home_folder

__all__ = ["Measurement"]

_SLACK = 0.02  # of accuracy, beyond the interval: a device sees a part of the test split


class Measurement:
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
        # What another phone showed was known, too, and is measured again.
        missing = sum(max(len(self._new[n]), len(artifacts[n]) - len(self._work.known.get(n, {}))) for n in names)
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
