"""What a host says to ``leash.py`` and what it believes of the answers, over whatever pipe they came."""

import json
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tacit.devices import leash
from tacit.devices.answers import DeviceUnreachable, printable, read_answer
from tacit.devices.sandbox import ArtifactRefused, ArtifactTimeout, Limits

__all__ = ["Ended", "answer_of", "believe_ended", "believe_greeting", "folder_name", "order_of", "with_adapters"]

_LETTERS = string.ascii_letters + string.digits
_MAX_LEFTOVERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The leash's line about one run of the agent."""

    how: str
    returncode: int
    stderr: str
    stdout_bytes: int


def folder_name() -> str:
    """A new name for a session's folder, of the kind that the leash knows again."""
    return leash.FOLDER_PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(10))


def with_adapters(request: dict[str, Any], put: Callable[[Path], str]) -> dict[str, Any]:
    """A request whose adapters are on the device, where ``put`` copies them."""

    def on_device(model: dict[str, Any]) -> dict[str, Any]:
        return {**model, "adapter": put(Path(model["adapter"]))} if model.get("adapter") else model

    prepared = dict(request)
    if "model" in prepared:
        prepared["model"] = on_device(prepared["model"])
    if "models" in prepared:
        prepared["models"] = [on_device(model) for model in prepared["models"]]
    return prepared


def order_of(request: dict[str, Any], *, limit_s: float, limits: Limits) -> bytes:
    r"""The line that has the agent obey a request.

    >>> order_of({"op": "facts"}, limit_s=9.0, limits=Limits(output_bytes=10, file_size_bytes=20))
    b'{"request": {"op": "facts"}, "limit_s": 9.0, "output_bytes": 10, "file_size_bytes": 20}\n'
    """
    bounds = {"output_bytes": limits.output_bytes, "file_size_bytes": limits.file_size_bytes}
    return json.dumps({"request": request, "limit_s": limit_s, **bounds}).encode() + b"\n"


def believe_greeting(line: bytes) -> int | None:
    """How many folders of earlier sessions were removed; None where this is not the leash's first line.

    >>> believe_greeting(b'{"leash": 1, "removed": 2}'), believe_greeting(b"Welcome to board!")
    (2, None)
    """
    said = _json(line)
    if said.get("leash") != leash.LEASH_VERSION:
        return None
    removed = said.get("removed")
    return removed if type(removed) is int and 0 <= removed < _MAX_LEFTOVERS else 0


def believe_ended(line: bytes, *, most_bytes: int) -> Ended:
    """Read the line about a run of the agent, whose output is at most so many bytes.

    Raises:
        DeviceUnreachable: It is none.

    >>> believe_ended(b'{"ended": "exit", "returncode": 0, "stderr": "", "stdout_bytes": 17}', most_bytes=100).how
    'exit'
    """
    said = _json(line)
    how, returncode, stderr, count = (said.get(key) for key in ("ended", "returncode", "stderr", "stdout_bytes"))
    if (
        how not in {"exit", "time", "output"}
        or type(returncode) is not int
        or not isinstance(stderr, str)
        or type(count) is not int
        or not 0 <= count <= most_bytes
    ):
        raise DeviceUnreachable(f"a line that is no answer: {printable(line[:80].decode(errors='replace'))}")
    return Ended(how=how, returncode=returncode, stderr=stderr, stdout_bytes=count)


def answer_of(ended: Ended, stdout: bytes, *, limit_s: float, limits: Limits, advice: str) -> dict[str, Any]:
    """The agent's answer; raises what ``read_answer`` does, and ``ArtifactTimeout`` after a time limit.

    >>> ended = Ended(how="time", returncode=-9, stderr="", stdout_bytes=0)
    >>> answer_of(ended, b"", limit_s=5.0, limits=Limits(), advice="")
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactTimeout: the model file kept its runtime busy for more than 5 s
    """
    if ended.how == "time":
        raise ArtifactTimeout(f"the model file kept its runtime busy for more than {limit_s:g} s")
    if ended.how == "output":
        raise ArtifactRefused(f"the model file's runtime wrote more than {limits.output_bytes} bytes of output")
    stderr = ended.stderr.encode("utf-8", errors="replace")
    return read_answer(stdout, stderr, returncode=ended.returncode, advice=advice)


def _json(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
