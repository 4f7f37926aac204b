"""Payloads that are ready to leave, kept until nobody can ask for them again.

An owner that is asked twice for the same thing answers with the same bytes, which costs nothing; computing it again
would be a second release. A file holds the payloads of one commit: a line of JSON (`{"round",
"payloads": {key: length}}`), then the payloads one after another.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Mapping
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
        self._rewriting = threading.Lock()  # the ledgers of many owners share one outbox
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
        line = _header_line(round_number, payloads)
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

    def forget(self, keys: Collection[str]) -> None:
        """Removes what was stored for keys of which nothing was released: a reopened one is about to be drawn anew."""
        with self._rewriting:
            for name in {place[0] for key in keys for place in self._places.get(key, [])}:
                self._rewrite(name, frozenset(keys))

    def _rewrite(self, name: str, without: frozenset[str]) -> None:
        path, server_round = self._folder / name, self._rounds[name]
        with path.open("rb") as file:
            header = _parse_header(file.readline())
            stored = {key: file.read(length) for key, length in (header.lengths if header else {}).items()}
        kept = {key: payload for key, payload in stored.items() if key not in without}
        self._forget(name)
        if not kept:
            path.unlink()
            return
        line = _header_line(server_round, kept)
        write_durably(path, line + b"".join(kept.values()), mode=0o600)
        self._index(name, _Header(server_round, {key: len(data) for key, data in kept.items()}), len(line))

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


def _header_line(round_number: int, payloads: Mapping[str, bytes]) -> bytes:
    lengths = {key: len(data) for key, data in payloads.items()}
    return json.dumps({"round": round_number, "payloads": lengths}).encode() + b"\n"


def _parse_header(line: bytes) -> _Header | None:
    try:
        header = json.loads(line)
        lengths = {str(key): int(length) for key, length in header["payloads"].items()}
        return _Header(int(header["round"]), lengths) if min(lengths.values()) >= 0 else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
