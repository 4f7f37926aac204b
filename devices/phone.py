"""What a phone says of itself, understood: processor, Android, heat, battery. Nothing is believed beyond its range."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tacit.devices.answers import believe_facts
from tacit.devices.conditions import Conditions

__all__ = ["Health", "core_clocks", "core_mask", "fast_cores", "phone_facts", "read_health"]

PROPERTIES = {
    "maker": "ro.product.manufacturer",
    "model": "ro.product.model",
    "soc_maker": "ro.soc.manufacturer",
    "soc": "ro.soc.model",
    "android": "ro.build.version.release",
    "sdk": "ro.build.version.sdk",
    "abis": "ro.product.cpu.abilist",
    "serial": "ro.serialno",
}
_CPU_NAMES = (("maker", "model"), ("soc_maker", "soc"))
_MAX_CORES = 64
_SENSOR = re.compile(r"Temperature\{mValue=(-?\d{1,3}(?:\.\d{1,9})?), mType=(-?\d{1,2}), ")
_CPU, _SKIN = 0, 3  # types of sensors of Android's thermal service
_MAX_SDK = 1000
_LOW_PERCENT = 20


@dataclass(frozen=True, kw_only=True)
class Health:
    """Heat and power; None where the phone does not say. ``thermal_status`` is 0 for none to 6 for shutdown."""

    thermal_status: int | None
    temperature_c: float | None
    battery_percent: int | None
    battery_temperature_c: float | None
    is_plugged: bool | None

    def reasons(self) -> list[str]:
        """Why this is no time to measure; empty where it is one.

        >>> read_health("Thermal Status: 2", "level: 12").reasons()
        ['it is hot (thermal status 2)', 'its battery is low (12 %) and not charging']
        """
        hot = f"it is hot (thermal status {self.thermal_status})" if self.thermal_status else None
        is_low = self.battery_percent is not None and self.battery_percent < _LOW_PERCENT and not self.is_plugged
        low = f"its battery is low ({self.battery_percent} %) and not charging" if is_low else None
        return [reason for reason in (hot, low) if reason]

    def conditions(self) -> Conditions:
        """As a result has it."""
        return {
            "thermal_status": self.thermal_status,
            "temperature_c": self.temperature_c,
            "battery_percent": self.battery_percent,
            "battery_temperature_c": self.battery_temperature_c,
            "power": None if self.is_plugged is None else "mains" if self.is_plugged else "battery",
        }


def read_health(thermal: str, battery: str) -> Health:
    r"""Read ``dumpsys thermalservice`` (Android 10 and newer) and ``dumpsys battery``.

    The temperature is that of the hottest processor sensor, or of the skin where there is none.

    >>> sensors = "Thermal Status: 0\nTemperature{mValue=41.5, mType=0, mName=CPU, mStatus=0}"
    >>> read_health(sensors, " USB powered: true\n  level: 84\n  scale: 100\n  temperature: 285").conditions()
    {'thermal_status': 0, 'temperature_c': 41.5, 'battery_percent': 84, 'battery_temperature_c': 28.5, 'power': 'mains'}
    """
    sensors = [
        (int(kind), float(value)) for value, kind in _SENSOR.findall(_current(thermal)) if 0 < float(value) < 150
    ]
    heat = [value for kind, value in sensors if kind == _CPU] or [value for kind, value in sensors if kind == _SKIN]
    level, scale = _setting(battery, "level", 10_000), _setting(battery, "scale", 10_000)
    # A television has no battery, and says so.
    is_there = re.search(r"^\s*present: false\s*$", battery, re.MULTILINE) is None
    percent = None if level is None or not is_there else round(100 * level / (scale or 100))
    tenths = _setting(battery, "temperature", 1500)
    told = re.findall(r"^\s*(?:AC|USB|Wireless|Dock) powered: (true|false)\s*$", battery, re.MULTILINE)
    status = re.search(r"^\s*Thermal Status: ([0-6])\s*$", thermal, re.MULTILINE)
    return Health(
        thermal_status=int(status[1]) if status else None,
        temperature_c=max(heat, default=None),
        battery_percent=percent if percent is not None and percent <= 100 else None,
        battery_temperature_c=None if tenths is None else tenths / 10,
        is_plugged="true" in told if told else None,
    )


def phone_facts(
    properties: Sequence[str], cpuinfo: str, clocks: Mapping[int, int]
) -> dict[str, str | int | float | None]:
    r"""Describe a phone, flat.

    Args:
        properties: The values of ``PROPERTIES``, in that order; "" where there is none.
        cpuinfo: ``/proc/cpuinfo``.
        clocks: The highest frequency of each core in kHz.

    >>> found = phone_facts(["G", "P7", "", "T1", "14", "34", "arm64-v8a"], "CPU part\t: 0xd05\n" * 2, {0: 10, 1: 20})
    >>> found["cpu"], found["cpu_parts"], found["max_freq_khz"], found["sdk"]
    ('G P7, T1', '0xd05 x2', '10 x1, 20 x1', 34)
    """
    told = {name: value or None for name, value in zip(PROPERTIES, properties, strict=False)}
    serial = told.pop("serial", None)
    sdk = told.get("sdk") or ""
    parts = Counter(re.findall(r"^CPU part\s*: (0x[0-9a-f]{1,4})\s*$", cpuinfo, re.MULTILINE)[:_MAX_CORES])
    named = [" ".join(filter(None, (told.get(maker), told.get(what)))) for maker, what in _CPU_NAMES]
    return believe_facts(
        {
            **told,
            "sdk": int(sdk) if re.fullmatch(r"\d{1,4}", sdk) and 0 < int(sdk) < _MAX_SDK else None,
            # Its serial number is nobody's business; that it is the same phone as the last time is ours.
            "unit": hashlib.sha256(serial.encode()).hexdigest()[:6] if serial else None,
            "cpu": ", ".join(filter(None, named)) or None,
            "cpu_parts": _counted(parts) or None,
            "cores": len(clocks) or None,
            "max_freq_khz": _counted(Counter(sorted(clocks.values()))) or None,
            "os": f"Android {told['android']}" if told.get("android") else None,
        }
    )


def core_clocks(lines: str) -> dict[int, int]:
    r"""Read lines of a core's file and the highest frequency in it, in kHz.

    >>> core_clocks("/sys/devices/system/cpu/cpu4/cpufreq/cpuinfo_max_freq 2400000\nfoo")
    {4: 2400000}
    """
    found = re.findall(r"^\S*/cpu(\d{1,2})/cpufreq/cpuinfo_max_freq (\d{1,9})\s*$", lines, re.MULTILINE)
    return {int(core): int(khz) for core, khz in found if int(core) < _MAX_CORES and int(khz) > 0}


def fast_cores(clocks: Mapping[int, int], threads: int) -> list[int]:
    """Return the cores of the fastest clusters, as many clusters as hold so many threads; none where nothing is known.

    >>> clocks = {0: 1800, 1: 1800, 2: 1800, 3: 1800, 4: 2400, 5: 2400, 6: 2400, 7: 2800}
    >>> fast_cores(clocks, 1), fast_cores(clocks, 2)
    ([7], [4, 5, 6, 7])
    """
    for slowest in sorted(set(clocks.values()), reverse=True):
        cores = [core for core, khz in sorted(clocks.items()) if khz >= slowest]
        if len(cores) >= threads:
            return cores
    return sorted(clocks)


def core_mask(cores: Sequence[int]) -> str:
    """Return what ``taskset`` calls these cores.

    >>> core_mask([4, 5, 6, 7])
    'f0'
    """
    return f"{sum(1 << core for core in set(cores)):x}"


def _current(thermal: str) -> str:
    """The present temperatures where they are told beside older ones."""
    _, found, after = thermal.partition("Current temperatures from HAL:")
    return after.partition("Current cooling")[0] if found else thermal


def _setting(text: str, name: str, most: int) -> int | None:
    found = re.search(rf"^\s*{name}: (\d{{1,6}})\s*$", text, re.MULTILINE)
    return int(found[1]) if found and int(found[1]) <= most else None


def _counted(kinds: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{kind} x{count}" for kind, count in kinds.items())
