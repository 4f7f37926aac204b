"""A hash-chained JSON Lines file: entries can be added, never changed, and each is on disk before anybody relies on it.

Each line is one JSON object. The chain adds `seq` (0, 1, ...), `at` (UTC), `prev` (the hash of the line before, 64
zeros at first) and `hash` (SHA-256 of the entry without `hash`, as JSON with sorted keys and no spaces). A last line
cut short by a crash is dropped and named; anything else that does not chain is damage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tacit.devices.durable import sync_folder
from tacit.devices.failpoint import reach

__all__ = ["GENESIS", "Chain", "ChainDamaged", "ChainHeld", "Entry", "parse_chain"]

GENESIS = "0" * 64
Entry = Mapping[str, object]


class ChainDamaged(ValueError):
    """A file whose chain does not hold."""


class ChainHeld(RuntimeError):
    """Another process has the file open."""


class Chain:
    """A chain held by one process from opening to `close`.

    Attributes:
        entries: all entries, oldest first.
        repaired: what was dropped on opening, or None.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chain = Chain(Path(folder, "chain.jsonl"))
    ...     [entry["seq"] for entry in chain.append([{"kind": "first"}, {"kind": "second"}])]
    ...     chain.close()
    [0, 1]
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file and takes its lock.

        Raises:
            ChainHeld: another process has it open.
            ChainDamaged: the chain does not hold.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._broken = False
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync_folder(path.parent)
            data = path.read_bytes()
            self.entries, self._bytes = parse_chain(data, path)
            self.repaired: str | None = None
            if self._bytes < len(data):
                self.repaired = f"{path}: dropped a last line cut short by a crash"
                self._truncate()
        except BlockingIOError:
            os.close(self._descriptor)
            raise ChainHeld(f"expected a free ledger, got {path} in use by another process; wait for it") from None
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def head(self) -> str:
        """Hash of the newest entry."""
        return str(self.entries[-1]["hash"]) if self.entries else GENESIS

    def append(self, drafts: Sequence[Mapping[str, object]]) -> list[Entry]:
        """Adds entries with one write and one fsync; returns them once they are on disk.

        Raises:
            OSError: no space; the file is as it was.
        """
        if not drafts:
            return []
        # To the hour: finer times would tell how long a round took, and with it how much data or how many took part.
        at, head = datetime.now(UTC).isoformat(timespec="hours"), self.head
        added: list[Entry] = []
        for sequence, draft in enumerate(drafts, len(self.entries)):
            body = {"seq": sequence, "at": at, **draft, "prev": head}
            head = _digest(body)
            added.append({**body, "hash": head})
        data = b"".join(_line(entry) + b"\n" for entry in added)
        if self._broken:
            raise OSError(
                5, "expected a ledger that can be written, got one that could not be put right; open it again"
            )
        reach("chain.before_write")
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(28, f"expected room for {len(data)} bytes, wrote {written}; free some disk space")
            reach("chain.before_fsync")
            os.fsync(self._descriptor)
        except BaseException:
            self._broken = True  # until the half-written entry is gone
            self._truncate()
            self._broken = False
            raise
        reach("chain.after_fsync")
        self._bytes += len(data)
        self.entries.extend(added)
        return added

    def close(self) -> None:
        """Gives the lock back; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _truncate(self) -> None:
        os.ftruncate(self._descriptor, self._bytes)
        os.fsync(self._descriptor)


def parse_chain(data: bytes, path: Path) -> tuple[list[Entry], int]:
    """The entries that chain, and how many bytes they take; only a last line without its newline may be missing.

    Raises:
        ChainDamaged: names the line.

    >>> parse_chain(b'{"seq": 0, "at": "2026-', Path("ledger.jsonl"))  # a crash cut the only line short
    ([], 0)
    """
    entries: list[Entry] = []
    head, good_bytes = GENESIS, 0
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        entry = _parse_line(line, head, len(entries))
        if entry is None:
            raise ChainDamaged(f"expected a chained entry, got damage at {path}:{number}; restore the file")
        entries.append(entry)
        head, good_bytes = str(entry["hash"]), good_bytes + len(line) + 1
    # A crash cuts a line short; it does not put another byte in the place of the newline.
    if _parse_line(data[good_bytes:-1], head, len(entries)) is not None:
        raise ChainDamaged(f"expected a newline at the end, got damage at {path}:{len(entries) + 1}; restore the file")
    return entries, good_bytes


def _parse_line(line: bytes, head: str, sequence: int) -> Entry | None:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.get("prev") != head or entry.get("seq") != sequence:
            return None
        return entry if entry.get("hash") == _digest(entry) and line == _line(entry) else None
    except (ValueError, RecursionError):
        return None


def _line(entry: Entry) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode()


def _digest(entry: Entry) -> str:
    body = {name: value for name, value in entry.items() if name != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
