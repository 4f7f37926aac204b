"""Payloads that are ready to leave, kept until nobody can ask for them again.

An owner that is asked twice for the same thing answers with the same bytes, which costs nothing; computing it again
would be a second release. A file holds the payloads of one commit: a line of JSON (`{"round",
"payloads": {key: length}}`), then the payloads one after another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tacit.devices.durable import write_durably

__all__ = ["Outbox"]


@dataclass(frozen=True)
class _Header:
    round: int
    lengths: Mapping[str, int]


class Outbox:
    """Payloads by reservation key, durable before they are sent.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     outbox = Outbox(Path(folder))
    ...     outbox.put(1, {"key": b"update"})
    ...     outbox.get("key", hashlib.sha256(b"update").hexdigest())
    b'update'
    """

    def __init__(self, folder: Path) -> None:
        """Opens the outbox, making its folder; what a crash left behind is found again."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        self._rounds: dict[str, int] = {}
        self._places: dict[str, list[tuple[str, int, int]]] = {}
        for path in sorted(folder.glob("*.out")):
            with path.open("rb") as file:
                line = file.readline()
            header = _parse_header(line)
            if header is not None:  # what a damaged file held is lost: its keys are answered with "unavailable"
                self._index(path.name, header, len(line))

    def put(self, round_number: int, payloads: Mapping[str, bytes]) -> None:
        """Stores payloads durably, with one fsync for all of them."""
        if not payloads:
            return
        header = _Header(round_number, {key: len(data) for key, data in payloads.items()})
        line = json.dumps({"round": header.round, "payloads": header.lengths}).encode() + b"\n"
        name = f"{round_number:06d}-{next(iter(payloads))[:16]}.out"
        write_durably(self._folder / name, line + b"".join(payloads.values()), mode=0o600)
        self._index(name, header, len(line))

    def get(self, key: str, digest: str) -> bytes | None:
        """The payload of a key that has this SHA-256, or None when it was never stored or has been discarded."""
        for name, offset, length in self._places.get(key, []):
            try:
                with (self._folder / name).open("rb") as file:
                    file.seek(offset)
                    payload = file.read(length)
            except FileNotFoundError:
                continue
            if hashlib.sha256(payload).hexdigest() == digest:
                return payload
        return None

    def discard_before(self, round_number: int) -> None:
        """Forgets rounds that a durable checkpoint has made unaskable."""
        for name in [name for name, stored in self._rounds.items() if stored < round_number]:
            (self._folder / name).unlink(missing_ok=True)
            self._forget(name)

    def _index(self, name: str, header: _Header, offset: int) -> None:
        self._forget(name)
        self._rounds[name] = header.round
        for key, length in header.lengths.items():
            self._places.setdefault(key, []).append((name, offset, length))
            offset += length

    def _forget(self, name: str) -> None:
        if self._rounds.pop(name, None) is None:
            return
        kept = {key: [place for place in places if place[0] != name] for key, places in self._places.items()}
        self._places = {key: places for key, places in kept.items() if places}


def _parse_header(line: bytes) -> _Header | None:
    try:
        header = json.loads(line)
        lengths = {str(key): int(length) for key, length in header["payloads"].items()}
        return _Header(int(header["round"]), lengths) if min(lengths.values()) >= 0 else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
