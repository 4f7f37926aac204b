"""What a device's own files say of the state that it was measured in: clocks, temperatures, throttling, power.

The agent reads the files of ``watch`` and sends what they hold; everything is understood here, and nothing is believed
beyond its range. What a platform does not say is None, which a report calls "not measured".
"""

import re
from collections.abc import Mapping

from tacit.devices.answers import believe_facts
from tacit.devices.energy import PACKAGES

Readings = Mapping[str, str]
Conditions = dict[str, str | int | float | None]

_THERMAL = "/sys/class/thermal/thermal_zone*/temp"
_PI_FLAGS = "/sys/devices/platform/soc/soc:firmware/get_throttled"
_THROTTLE_COUNT = "/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count"
_POWER = tuple(f"/sys/class/power_supply/*/{name}" for name in ("scope", "status", "capacity"))
_SCHEDULED = "/proc/self/schedstat"  # of the agent's main thread: nanoseconds at work, nanoseconds ready and waiting
_MAX_CORES = 32
_MAX_READINGS = 256
_HAPPENING = 0b1111  # of a Raspberry Pi's flags: under-voltage, clock capped, throttled, soft limit of temperature; now
_FREQUENCY_FELL = 0.9
_ROSE_C = 2.0


def watch(affinity: object, *, everything: bool = True) -> list[str]:
    """Return the patterns of the files to read around a run.

    Args:
        affinity: The cores that the agent may use, as ``facts`` tells them ("0,1"); all of them if it does not.
        everything: Also what is of no interest every second.

    >>> watch("2", everything=False)[-1]
    '/sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq'
    """
    told = isinstance(affinity, str) and re.fullmatch(r"\d{1,4}(,\d{1,4})*", affinity)
    cores = str(affinity).split(",")[:_MAX_CORES] if told else ["*"]
    once = ["/proc/loadavg", *_POWER, _THROTTLE_COUNT] if everything else []
    each = ("scaling_governor", "scaling_cur_freq") if everything else ("scaling_cur_freq",)
    clocks = [f"/sys/devices/system/cpu/cpu{core}/cpufreq/{name}" for name in each for core in cores]
    return ["/proc/stat", _SCHEDULED, _PI_FLAGS, *PACKAGES, *once, _THERMAL, *clocks]


def believe_readings(answer: object) -> dict[str, str]:
    r"""Keep of what a device says its files hold what is text, short and of a path.

    >>> believe_readings({"/proc/loadavg": "0.50 1\n", "load": "1", "/x": 5})
    {'/proc/loadavg': '0.50 1'}
    """
    pairs = list(answer.items())[:_MAX_READINGS] if isinstance(answer, dict) else []
    return {
        path: text[:200].strip("\0\n ")
        for path, text in pairs
        if isinstance(path, str) and path.startswith("/") and isinstance(text, str)
    }


def interpret(readings: Readings) -> Conditions:
    """Say what readings mean.

    Returns:
        ``governor`` (the kinds in use, joined by "+"), ``cur_freq_khz`` (the fastest core that we may use: the one that
        works), ``temperature_c`` (the hottest zone), ``throttle_count`` (since the start of the computer),
        ``throttle_flags`` (of a Raspberry Pi), ``power`` ("battery" or "mains"), ``battery_percent``, ``load_1m``.

    >>> interpret({"/sys/class/thermal/thermal_zone0/temp": "48250", "/proc/loadavg": "0.21 0.3"})["temperature_c"]
    48.25
    """
    # A mouse has a battery, too, which is none of this device's.
    scopes = {path.removesuffix("scope"): text for path, text in readings.items() if path.endswith("/scope")}
    others = tuple(supply for supply, scope in scopes.items() if scope == "Device")
    readings = {path: text for path, text in readings.items() if not others or not path.startswith(others)}
    clocks_khz = [khz for khz in _numbers(readings, "/scaling_cur_freq") if 0 < khz < 10**8]
    # Zones without a sensor say -273 or thousands of degrees.
    temperatures = [milli / 1000 for milli in _numbers(readings, "/temp") if -40_000 < milli < 150_000]
    counts = _numbers(readings, "/core_throttle_count")
    states = {text for path, text in readings.items() if path.endswith("/status") and "/power_supply/" in path}
    governors = {text for path, text in readings.items() if path.endswith("/scaling_governor") and text}
    load = readings.get("/proc/loadavg", "").split(" ")[0]
    flags = readings.get(_PI_FLAGS, "")
    percents = [percent for percent in _numbers(readings, "/capacity") if 0 <= percent <= 100]
    return believe_facts(
        {
            "governor": "+".join(sorted(governors)) or None,
            "cur_freq_khz": max(clocks_khz, default=None),
            "temperature_c": max(temperatures, default=None),
            "throttle_count": sum(counts) if counts else None,
            "throttle_flags": int(flags, 16) if re.fullmatch(r"(0x)?[0-9a-f]{1,8}", flags) else None,
            "power": ("battery" if "Discharging" in states else "mains") if states else None,
            "battery_percent": min(percents, default=None),
            "load_1m": float(load) if re.fullmatch(r"\d{1,5}(\.\d{1,4})?", load) else None,
        }
    )


def is_throttled(before: Conditions, after: Conditions) -> bool:
    """Tell whether a device slowed itself down: it says so, or its clock fell by more than a tenth under load.

    >>> is_throttled({"cur_freq_khz": 2_400_000}, {"cur_freq_khz": 1_500_000})
    True
    """
    count, clock = _pair(before, after, "throttle_count"), _pair(before, after, "cur_freq_khz")
    flags = [conditions.get("throttle_flags") for conditions in (before, after)]
    return (
        (count is not None and count[1] > count[0])
        or (clock is not None and clock[1] < _FREQUENCY_FELL * clock[0])
        or any(isinstance(flag, int) and flag & _HAPPENING for flag in flags)
    )


def is_hotter(before: Conditions, after: Conditions) -> bool:
    """Tell whether the temperature is known to have risen by two degrees or more."""
    heat = _pair(before, after, "temperature_c")
    return heat is not None and heat[1] - heat[0] >= _ROSE_C


def steal_share(before: Readings, after: Readings) -> float | None:
    """Return the share of time that a hypervisor gave to other machines.

    >>> steal_share({"/proc/stat": "cpu 0 0 0 0 0 0 0 0"}, {"/proc/stat": "cpu 60 0 0 20 0 0 0 20 9 9"})
    0.2
    """
    ticks = [_ticks(readings.get("/proc/stat", "")) for readings in (before, after)]
    if len(ticks[0]) != 8 or len(ticks[1]) != 8:
        return None
    passed = [late - early for early, late in zip(*ticks, strict=True)]
    return round(passed[7] / sum(passed), 4) if min(passed) >= 0 and sum(passed) > 0 else None


def waiting_share(before: Readings, after: Readings) -> float | None:
    """Return the share of time in which the agent was ready to run, and other programs had the processor.

    >>> waiting_share({"/proc/self/schedstat": "100 50 1"}, {"/proc/self/schedstat": "400 150 9"})
    0.25
    """
    marks = [readings.get(_SCHEDULED, "").split()[:2] for readings in (before, after)]
    numbers = [[number for text in mark if (number := _number(text)) is not None] for mark in marks]
    if len(numbers[0]) != 2 or len(numbers[1]) != 2:
        return None
    worked, waited = (late - early for early, late in zip(*numbers, strict=True))
    return round(waited / (worked + waited), 4) if min(worked, waited) >= 0 and worked + waited > 0 else None


def _pair(before: Conditions, after: Conditions, key: str) -> tuple[float, float] | None:
    early, late = before.get(key), after.get(key)
    return (early, late) if isinstance(early, int | float) and isinstance(late, int | float) else None


def _numbers(readings: Readings, ending: str) -> list[int]:
    found = [_number(text) for path, text in readings.items() if path.endswith(ending)]
    return [number for number in found if number is not None]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _ticks(text: str) -> list[int]:
    first = text.split("\n", 1)[0].split()
    ticks = [_number(value) for value in first[1:9]]  # user nice system idle iowait irq softirq steal
    return [tick for tick in ticks if tick is not None] if first[:1] == ["cpu"] else []
