"""Measures model files on a device: asks for each run that a measurement is made of, and judges what came back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import believe_facts
from tacit.devices.asking import (
    REFUSALS,
    Session,
    TimedGroup,
    identify,
    operators,
    place,
    predict,
    put_inputs,
    sustain,
    time_group,
)
from tacit.devices.device import Artifact as Artifact
from tacit.devices.device import Device as Device
from tacit.devices.device import Placed
from tacit.devices.entries import (
    Entry,
    accuracy_entry,
    entry_of,
    flagged,
    key_of,
    profile_entry,
    sustained_entry,
)
from tacit.devices.judgement import Latency as Latency
from tacit.devices.judgement import judge as judge
from tacit.devices.schedule import Mode as Mode
from tacit.devices.schedule import Plan as Plan
from tacit.devices.schedule import plan as plan

SCHEMA_VERSION = 1
Values = npt.NDArray[Any]
_MAX_INPUTS = 256
_MAX_EVALUATED = 10_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What accuracy is measured on: by ``labels`` ``(n,)``, by ``expected`` outputs ``(n, classes)``, or both."""

    inputs: Values | Sequence[Values]
    labels: Values | None = None
    expected: Values | None = None


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is measured only where it is asked for, each in a run of its own: it takes time, or disturbs the clock."""

    sustained_s: float | None = None
    profile: bool = False
    evaluation: Evaluation | None = None


def measure(
    device: Device,
    artifacts: Sequence[Artifact],
    inputs: Values | Sequence[Values],
    *,
    mode: Mode = "quick",
    extras: Extras | None = None,
    known: Mapping[str, Entry] | None = None,
    keep: Callable[[str, Entry], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure model files on a device: cold start, memory, latency, and what else is asked for.

    Each artifact is first loaded and run in processes of its own (memory, cold starts). Those that survive are timed
    in one process per runtime, interleaved, so that a drift of the device is the same for all of them. An artifact
    that fails is reported and loses nobody else's numbers.

    Args:
        device: Where to measure.
        artifacts: Model files, no two of one name.
        inputs: ``(n, *shape)``, preprocessed, channel first, float32 or whole numbers; of a model that has several, all
            of them. Real ones, since zeros and noise take other paths through a model. The first 256 are used.
        mode: "quick" or "full".
        extras: What else to measure; by default nothing.
        known: Entries of earlier results of this device, by their ``key``. Such an artifact is not measured again; the
            first of a runtime may be timed once more, for others to be compared with.
        keep: Called with the name and the entry of each artifact as soon as it is complete, so that a device that is
            lost later loses nothing.
        progress: Called with a line for people before each step.

    Returns:
        ``{"schema_version", "device", "mode", "facts", "conditions", "artifacts": {name: ...}, "failed": {name:
        reason}}``, ready for ``json.dumps``. ``relative`` of an artifact is the ratio of its latency to that of the
        first one of its runtime and threads, with a 95 % interval. ``samples_us`` are at most 256 evenly spaced order
        statistics, ``block_medians_us`` at most 512 medians in order of time. What was not measured is None; why, if
        it was asked for, stands in ``not_measured``.

    Raises:
        ValueError: Names repeat, the mode is unknown or the inputs are not what a model takes.
        ArtifactRefused: The device does not answer at all.
        DeviceUnreachable: It is lost; what was complete has been given to ``keep``.
    """
    schedule, say, extras = plan(mode), progress or _say_nothing, extras or Extras()
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise ValueError(f"expected artifacts of different names, got names={names}; rename one")
    arrays = _checked(inputs)
    facts = believe_facts(device.facts())
    session = Session(
        device=device,
        inputs=put_inputs(device, [values[:_MAX_INPUTS] for values in arrays]),
        schedule=schedule,
        affinity=facts.get("affinity"),
    )
    about = {"cpu": facts.get("cpu")}
    told = keep or _keep_nothing
    collected = _Collected(session=session, extras=extras, known=known or {}, about=about, keep=told, say=say)
    identified = [found for artifact in artifacts if (found := collected.identified(artifact)) is not None]
    for runtime, threads in dict.fromkeys((item.runtime, item.artifact.threads) for item in identified):
        group = [item for item in identified if (item.runtime, item.artifact.threads) == (runtime, threads)]
        collected.measure_group(runtime if threads == 1 else f"{runtime}, {threads} threads", group)
    before: Mapping[str, object] = next(iter(collected.conditions.values()), {}).get("before", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device.name,
        "mode": mode,
        "facts": {**facts, **before},
        "conditions": collected.conditions,
        "artifacts": {name: collected.entries[name] for name in names if name in collected.entries},
        "failed": {name: collected.failed[name] for name in names if name in collected.failed},
    }


class _Collected:
    """A measurement in progress: what is complete, and what failed."""

    def __init__(
        self,
        *,
        session: Session,
        extras: Extras,
        known: Mapping[str, Entry],
        about: Entry,
        keep: Callable[[str, Entry], None],
        say: Callable[[str], None],
    ) -> None:
        self._session, self._extras, self._known, self._keep, self._say = session, extras, known, keep, say
        self._about = about
        self.entries: dict[str, Entry] = {}
        self.failed: dict[str, str] = {}
        self.conditions: dict[str, dict[str, Any]] = {}

    def identified(self, artifact: Artifact) -> Placed | None:
        """Look at an artifact on this computer; one that is known already is complete."""
        try:
            found = identify(artifact)
        except REFUSALS as error:
            self._say(f"{artifact.name}: load time and memory")
            self.failed[artifact.name] = str(error)
            return None
        key = key_of(found, self._session.schedule.mode)
        if key in self._known:
            self.entries[artifact.name] = self._known[key]
        return found

    def measure_group(self, label: str, group: Sequence[Placed]) -> None:
        """Measure artifacts of one runtime that are not complete yet, next to the first one."""
        missing = [item for item in group if item.artifact.name not in self.entries]
        placed = [one for item in group if item in missing or item is group[0] if (one := self._placed(item))]
        if not missing or not placed:
            return
        self._say(f"{', '.join(item.artifact.name for item in placed)}: latency in {label}, interleaved")
        timed = time_group(self._session, placed)
        self.conditions[label] = {"before": timed.before, "after": timed.after}
        for item in placed:
            name = item.artifact.name
            if name in self.entries:
                continue
            if name in timed.failed:
                self.failed[name] = timed.failed[name]
            else:
                self.entries[name] = self._complete(item, timed, placed[0])
                self._keep(name, self.entries[name])

    def _placed(self, item: Placed) -> Placed | None:
        name, is_known = item.artifact.name, item.artifact.name in self.entries
        if not is_known:
            self._say(f"{name}: load time and memory")
        try:
            return place(self._session, item, starts=not is_known)
        except REFUSALS as error:
            if not is_known:
                self.failed[name] = str(error)
            return None

    def _complete(self, item: Placed, timed: TimedGroup, reference: Placed) -> Entry:
        entry = entry_of(item, timed, reference, self._session.schedule.mode)
        parts: dict[str, Callable[[], Entry]] = {}
        if self._extras.sustained_s is not None:
            parts["sustained"] = lambda: self._sustained(item)
        if self._extras.profile:
            parts["profile"] = lambda: self._profile(item)
        if self._extras.evaluation is not None:
            parts["accuracy"] = lambda: self._accuracy(item)
        reasons: dict[str, str] = {}
        for part, measured in parts.items():
            self._say(f"{item.artifact.name}: {part}")
            try:
                found = measured()
                reasons |= found.pop("not_measured", {})
                entry |= found
            except REFUSALS as error:
                reasons |= dict.fromkeys((part, "energy") if part == "sustained" else (part,), str(error))
        if entry["profile"] and entry["p50_us"]:
            entry["profile"]["share_of_p50"] = round(entry["profile"]["us"] / entry["p50_us"], 3)
        if entry["sustained"] and entry["sustained"]["throttled"]:
            entry = flagged(entry, "throttled")
        if parts and entry["profile"] is None and "profile" in parts:
            reasons.setdefault("profile", f"{item.runtime} has no profiler in Python")
        return {**self._about, **entry, "not_measured": reasons}

    def _sustained(self, item: Placed) -> Entry:
        run = sustain(self._session, item, self._extras.sustained_s or 0.0)
        reasons = {} if run.energy else {"energy": run.why_no_energy}
        return {"sustained": sustained_entry(run), "energy": run.energy, "not_measured": reasons}

    def _profile(self, item: Placed) -> Entry:
        found = operators(self._session, item)
        return {"profile": None if found is None else profile_entry(found, self._session.schedule.profile_runs)}

    def _accuracy(self, item: Placed) -> Entry:
        evaluation = self._extras.evaluation or Evaluation(inputs=())
        arrays = [values[:_MAX_EVALUATED] for values in _checked(evaluation.inputs)]
        session = replace(self._session, inputs=put_inputs(self._session.device, arrays))
        outputs = predict(session, item, len(arrays[0]))
        labels, expected = (
            None if one is None else one[:_MAX_EVALUATED] for one in (evaluation.labels, evaluation.expected)
        )
        return {"accuracy": accuracy_entry(outputs, labels, expected)}


def _checked(inputs: Values | Sequence[Values]) -> list[Values]:
    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    for values in arrays:
        if values.dtype != np.float32 and values.dtype.kind not in "iub":
            raise ValueError(f"expected float32 inputs (n, *shape) or whole numbers, got {values.dtype} {values.shape}")
    if not arrays or any(values.ndim < 2 or len(values) != len(arrays[0]) or not len(values) for values in arrays):
        found = [values.shape for values in arrays]
        raise ValueError(f"expected inputs (n, *shape), n >= 1 and the same for all, got {found}; preprocess them")
    return arrays


def _say_nothing(message: str) -> None:
    del message


def _keep_nothing(name: str, entry: Entry) -> None:
    del name, entry
