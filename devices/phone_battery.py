"""A phone's battery counter, as its shell tells it: once, or again and again while something else runs there."""

import contextlib
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tacit.devices.answers import DeviceUnreachable

__all__ = ["BatteryLog", "battery_readings"]

_EVERY_S = 10.0
_DISCHARGING = "3"  # android.os.BatteryManager.BATTERY_STATUS_DISCHARGING
_BATTERY = "/sys/class/power_supply/battery"


def battery_readings(said: str) -> dict[str, str]:
    r"""Return what ``dumpsys battery`` says of the charge as Linux has it in files; nothing where that stands still.

    >>> battery_readings("  Charge counter: 3210000\n  status: 3\n  voltage: 3912\n")[f"{_BATTERY}/voltage_now"]
    '3912000'
    """
    told = dict(re.findall(r"^ *(Charge counter|status|voltage): (\d{1,9})\r?$", said, re.MULTILINE))
    if len(told) != 3 or "UPDATES STOPPED" in said:
        return {}
    return {
        f"{_BATTERY}/type": "Battery",
        f"{_BATTERY}/status": "Discharging" if told["status"] == _DISCHARGING else "other",
        f"{_BATTERY}/charge_now": told["Charge counter"],  # in µAh, as there
        f"{_BATTERY}/voltage_now": f"{told['voltage']}000",
    }


class BatteryLog:
    """Asks every ten seconds, in a thread of its own, from ``with`` to its end; a phone that is lost says no more."""

    def __init__(self, ask: Callable[[], dict[str, str]]) -> None:
        """Take what asks once."""
        self._ask = ask
        self._told: list[tuple[float, dict[str, str]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True)

    def __enter__(self) -> Self:
        self._told.append((time.monotonic(), self._ask()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, moment_s: float) -> dict[str, str]:
        """What was known then, on the monotonic clock; before anything was told, the first of it."""
        return next((told for when_s, told in reversed(self._told) if when_s <= moment_s), self._told[0][1])

    def _go(self) -> None:
        with contextlib.suppress(DeviceUnreachable):
            while not self._ended.wait(_EVERY_S):
                told = self._ask()
                self._told.append((time.monotonic(), told))
