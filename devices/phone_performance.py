"""Fixed performance mode of a phone: begun around a measurement, and ended whatever becomes of that."""

import contextlib
import time
from collections.abc import Callable, Iterator

from tacit.devices.adb_link import AdbLink
from tacit.devices.answers import DeviceUnreachable

__all__ = ["fixed_performance"]

_MODE = ("cmd", "power", "set-fixed-performance-mode-enabled")
_SINCE_SDK = 30
_ENDING_S = 5.0  # a phone in a wireless network may come back
_AGAIN_S = 0.5


@contextlib.contextmanager
def fixed_performance(link: AdbLink, sdk: object, *, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a phone's clocks where it can do so for long (Android 11 and newer), and let them go again.

    Yields whether the phone does so. The mode is off before: no app may set it, and it ends with a restart.

    Args:
        link: The phone.
        sdk: Its API level, if that is known.
        say: Called with a line where the mode could not be ended and another error than of the phone goes its way.

    Raises:
        DeviceUnreachable: The connection was lost, or the mode could not be ended: how to do so is in the message.
    """
    if not isinstance(sdk, int) or sdk < _SINCE_SDK:
        yield False
        return
    is_on: bool | None = None
    failure: BaseException | None = None
    try:
        said = link.ask([*_MODE, "true"])
        is_on = said.ended == "exit" and said.returncode == 0
        yield is_on
    except BaseException as error:
        failure = error
        raise
    finally:
        if not _end(link, was_refused=is_on is False):
            _complain(link, failure, say)


def _end(link: AdbLink, *, was_refused: bool) -> bool:
    """Whether the mode is off; a phone that has none refuses to end it, too."""
    deadline_s = time.monotonic() + _ENDING_S
    while True:
        with contextlib.suppress(DeviceUnreachable):
            said = link.ask([*_MODE, "false"], limit_s=_ENDING_S)
            if said.ended == "exit" and (said.returncode == 0 or was_refused):
                return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_AGAIN_S)


def _complain(link: AdbLink, failure: BaseException | None, say: Callable[[str], None]) -> None:
    command = " ".join(("adb", "-s", link.serial, "shell", *_MODE, "false"))
    expected = f"expected {link.name} to end fixed performance mode, got no answer"
    left_on = f"{expected}; end it by `{command}`, or restart the phone"
    if failure is not None and not isinstance(failure, DeviceUnreachable):
        failure.add_note(left_on)
        say(left_on)
        return
    raise DeviceUnreachable(f"{failure}; {left_on}" if failure else left_on) from failure
