"""Energy of an inference, where a device counts it: processor packages (RAPL), or its battery over minutes.

Either counter is of more than the model: what the device takes at rest is measured first, and taken off.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tacit.devices.ratios import student_t
from tacit.devices.side_answers import Bucket
from tacit.devices.statistics import BLOCK_COUNTS, standard_error

__all__ = ["PACKAGES", "battery_files", "energy_of", "lost_j", "package_uj", "rest_s", "state_of"]

Readings = Mapping[str, str]
PACKAGES = tuple(f"/sys/class/powercap/intel-rapl:*/{name}" for name in ("name", "energy_uj", "max_energy_range_uj"))
_SUPPLY = re.compile(r"(/sys/class/power_supply/[^/]+)/([a-z_]+)")
_OF_SUPPLY = ("type", "scope", "status", "energy_now", "charge_now", "charge_counter", "voltage_now")
_PACKAGES_REST_S = 20.0
_LEAST_STEPS = 3  # of a battery's counter under load
_VOLTS = (2.0, 60.0)
_ABSENT = "the device does not say what energy it takes"
_WENT_UP = "its battery's counter went up while it discharged: measure again"
_SHORT = "rest or load were too short for an interval: measure for longer"
_CHARGING = "its battery is not discharging: unplug it (a phone is reached without a cable by adb over Wi-Fi, or ssh)"


@dataclass(frozen=True, kw_only=True)
class State:
    """What batteries say together; ``held`` has of each its counter, in joules or coulombs, and a factor to joules."""

    is_discharging: bool
    held: Mapping[str, tuple[float, float]]


def battery_files() -> list[str]:
    """The patterns of the files that tell of batteries."""
    return [f"/sys/class/power_supply/*/{name}" for name in _OF_SUPPLY]


def package_uj(before: Readings, after: Readings) -> float | None:
    """Return the microjoules that all processor packages took between two readings (RAPL).

    A counter that has passed its end has begun again at zero; that is taken into account for once, so readings must
    not be further apart than that takes: a minute at 1 kW.

    >>> zone = "/sys/class/powercap/intel-rapl:0/"
    >>> about = {zone + "name": "package-0", zone + "max_energy_range_uj": "1000"}
    >>> package_uj({**about, zone + "energy_uj": "900"}, {**about, zone + "energy_uj": "50"})
    150.0
    """
    zones = [path.removesuffix("name") for path, text in before.items() if _is_package(path, text)]
    if not zones:
        return None
    total = 0
    for zone in zones:
        marks = [_number(readings.get(f"{zone}energy_uj", "")) for readings in (before, after)]
        end = _number(before.get(f"{zone}max_energy_range_uj", ""))
        if marks[0] is None or marks[1] is None or min(marks[0], marks[1]) < 0 or not end:
            return None
        total += (marks[1] - marks[0]) % end
    return float(total)


def state_of(readings: Readings) -> State | None:
    """Return what the batteries that feed the device say; None where there is none with a counter.

    Batteries of a mouse or a keyboard (scope "Device") feed something else.

    >>> battery = {"type": "Battery", "status": "Discharging", "charge_now": "1000000", "voltage_now": "3900000"}
    >>> state_of({f"/sys/class/power_supply/BAT0/{name}": text for name, text in battery.items()})
    State(is_discharging=True, held={'/sys/class/power_supply/BAT0': (3600.0, 3.9)})
    """
    supplies: dict[str, dict[str, str]] = {}
    for path, text in readings.items():
        if found := _SUPPLY.fullmatch(path):
            supplies.setdefault(found[1], {})[found[2]] = text
    batteries = {
        name: told for name, told in supplies.items() if told.get("type") == "Battery" and told.get("scope") != "Device"
    }
    held = {name: counted for name, told in batteries.items() if (counted := _counted(told)) is not None}
    if not held:
        return None
    return State(is_discharging=all(told.get("status") == "Discharging" for told in batteries.values()), held=held)


def lost_j(before: State | None, after: State | None) -> float | None:
    """Return the joules that batteries lost between two readings; None where they charged, or did not count.

    >>> full, less = ({"b": (100.0, 3.8)}, {"b": (90.0, 3.6)})
    >>> lost_j(State(is_discharging=True, held=full), State(is_discharging=True, held=less))
    37.0
    """
    if before is None or after is None or not (before.is_discharging and after.is_discharging):
        return None
    if set(before.held) != set(after.held):
        return None
    parts = [
        (early[0] - late[0]) * (early[1] + late[1]) / 2
        for early, late in ((before.held[name], after.held[name]) for name in before.held)
    ]
    return sum(parts) if min(parts) >= 0 else None


def rest_s(readings: Readings, seconds: float) -> float:
    """How long to rest before so many seconds of load: a battery counts in coarse steps, and takes as long at rest."""
    if package_uj(readings, readings) is not None:
        return _PACKAGES_REST_S
    state = state_of(readings)
    return seconds if state is not None and state.is_discharging else 0.0


def energy_of(buckets: Sequence[Bucket], readings: Sequence[Readings]) -> tuple[dict[str, Any] | None, str]:
    """Return the energy of one inference above that of rest, with its interval; or None, and why.

    Args:
        buckets: ``(n,)`` of a sustained run, those of rest first.
        readings: ``(n + 1,)`` of counters, before the first and after each.
    """
    pairs = list(itertools.pairwise(readings))
    packages = [package_uj(early, late) for early, late in pairs]
    if any(uj is not None for uj in packages):
        return _of_packages(buckets, packages)
    states = [state_of(row) for row in readings]
    if any(state is None for state in states):
        return None, _ABSENT
    if not all(state is not None and state.is_discharging for state in states):
        return None, _CHARGING
    lost = [joules for early, late in itertools.pairwise(states) if (joules := lost_j(early, late)) is not None]
    return _of_batteries(buckets, lost) if len(lost) == len(buckets) else (None, _WENT_UP)


def _of_packages(buckets: Sequence[Bucket], packages: Sequence[float | None]) -> tuple[dict[str, Any] | None, str]:
    """A 95 % interval of what the power varies by, at rest and at work; RAPL is of the package, not of the plug."""
    rows = [(bucket, uj) for bucket, uj in zip(buckets, packages, strict=True) if uj is not None]
    idle_w = np.array([uj / 1e6 / bucket.spent_s for bucket, uj in rows if not bucket.runs])
    work = np.array([(uj / 1e6, bucket.spent_s, bucket.runs) for bucket, uj in rows if bucket.runs])  # (buckets, 3)
    if min(len(idle_w), len(work)) < BLOCK_COUNTS[0] // 2:
        return None, _SHORT
    joules, seconds, runs = work.sum(axis=0)
    each_j = (joules - idle_w.mean() * seconds) / runs
    spread_j = standard_error((work[:, 0] - idle_w.mean() * work[:, 1]) / work[:, 2])
    error_j = float(np.hypot(spread_j, standard_error(idle_w) * seconds / runs))
    reach_j = student_t(min(len(idle_w), len(work)) - 1, 0.95) * error_j
    return {
        "source": "RAPL, processor package",
        "idle_w": float(idle_w.mean()),
        "busy_w": float(joules / seconds),
        "j_per_inference": float(each_j),
        "low": float(each_j - reach_j),
        "high": float(each_j + reach_j),
    }, ""


def _of_batteries(buckets: Sequence[Bucket], lost: Sequence[float]) -> tuple[dict[str, Any] | None, str]:
    """Bounds from the counter's steps, which show a staircase above the true charge.

    At each end of a phase it is behind by nothing to the whole of its next step, so that what a phase lost is off by
    less than one, either way. The next step after the last reading is taken to be no larger than those that were seen.
    How true the counter itself is, nobody tells.
    """
    phases = {}
    for name, is_busy in (("rest", False), ("load", True)):
        rows = [(bucket, joules) for bucket, joules in zip(buckets, lost, strict=True) if bool(bucket.runs) is is_busy]
        seconds, steps = sum(bucket.spent_s for bucket, _ in rows), [joules for _, joules in rows if joules > 0]
        phases[name] = (seconds, sum(steps), len(steps), max(steps, default=0.0))
    (rest, rest_j, _, rest_step), (busy, busy_j, count, step) = phases["rest"], phases["load"]
    if count < _LEAST_STEPS or rest <= 0:
        moved = f"its battery's counter moved {count} times in {busy:.0f} s of load"
        return None, f"{moved}, and bounds take {_LEAST_STEPS}: measure for longer"
    runs, scale = sum(bucket.runs for bucket in buckets), busy / rest
    low = busy_j - step - scale * (rest_j + max(step, rest_step))
    high = busy_j + step - scale * max(0.0, rest_j - rest_step)
    return {
        "source": "battery counter, whole device",
        "idle_w": rest_j / rest,
        "busy_w": busy_j / busy,
        "j_per_inference": (busy_j - scale * rest_j) / runs,
        "low": low / runs,
        "high": high / runs,
    }, ""


def _counted(told: Mapping[str, str]) -> tuple[float, float] | None:
    """A counter in joules or coulombs, and the factor to joules: µWh, or µAh at so many µV."""
    energy = _number(told.get("energy_now", ""))
    if energy is not None and energy > 0:
        return energy * 3.6e-3, 1.0
    charge = _number(told.get("charge_now", "")) or _number(told.get("charge_counter", ""))
    volts = (_number(told.get("voltage_now", "")) or 0) / 1e6
    if charge is None or charge <= 0 or not _VOLTS[0] <= volts <= _VOLTS[1]:
        return None
    return charge * 3.6e-3, volts


def _is_package(path: str, text: str) -> bool:
    """Zones within packages, and the one of the whole platform, hold the same energy again."""
    return bool(re.fullmatch(r"/sys/class/powercap/intel-rapl:\d+/name", path)) and text.startswith("package")


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None
