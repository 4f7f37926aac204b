"""Named places where a test may make a process die, fail or sleep; nothing in a real run.

A test starts its child with `arm()`, which reads `TACIT_FAILPOINT=name[:nth]=action` once. Without `arm()` the
variable is never looked at.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable

__all__ = ["arm", "reach"]

_armed: dict[str, tuple[int, str]] = {}
_counts: dict[str, int] = {}


def arm() -> None:
    """Reads TACIT_FAILPOINT; called by tests only.

    Raises:
        ValueError: not `name[:nth]=action`, or an unknown action.
    """
    text = os.environ.get("TACIT_FAILPOINT", "")
    if not text:
        return
    place, _, action = text.partition("=")
    name, _, nth = place.partition(":")
    if action not in _ACTIONS or not name or not (nth or "1").isdigit():
        raise ValueError(f"expected name[:nth]=action with action in {', '.join(_ACTIONS)}, got {text!r}")
    _armed[name] = (int(nth or "1"), action)


def reach(name: str) -> None:
    """Marks a place; acts when a test armed it and this is the nth time.

    >>> reach("nowhere")
    """
    if name not in _armed:
        return
    nth, action = _armed[name]
    _counts[name] = _counts.get(name, 0) + 1
    if _counts[name] == nth:
        _ACTIONS[action]()


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


_ACTIONS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(1),
    "eio": lambda: _fail(errno.EIO),
    "enospc": lambda: _fail(errno.ENOSPC),
    "sleep": lambda: time.sleep(5),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
}
