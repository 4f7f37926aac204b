"""The format by its literal bytes, and what tampering, crashes and full disks do to it."""

import json
import os
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated import chain as module
from tacit.federated.chain import GENESIS, Chain, ChainDamaged, ChainHeld, parse_chain

GOLDEN = (
    b'{"seq": 0, "at": "2026-01-02T03+00:00", "kind": "reserve", "owner": "J\xc3\xb6rg", "z": 1.1, '
    b'"prev": "0000000000000000000000000000000000000000000000000000000000000000", '
    b'"hash": "029d6fc8a189618a6c92c7f629237d817bf40948097a3dbcfbd966934a5235bd"}\n'
    b'{"seq": 1, "at": "2026-01-02T03+00:00", "kind": "fail", '
    b'"prev": "029d6fc8a189618a6c92c7f629237d817bf40948097a3dbcfbd966934a5235bd", '
    b'"hash": "925844cd57166fbe1c0526e792057d238a325986005726c437357537413f16b6"}\n'
)


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def write(path, *drafts):
    chain = Chain(path)
    for draft in drafts:
        chain.append([draft])
    chain.close()
    return path.read_bytes()


def test_the_format_is_these_bytes(path, monkeypatch):
    monkeypatch.setattr(module, "datetime", Clock)
    assert write(path, {"kind": "reserve", "owner": "Jörg", "z": 1.1}, {"kind": "fail"}) == GOLDEN


def test_a_hash_is_sha256_of_the_sorted_entry_without_it():
    """Recomputed with nothing of ours, as the module's first lines describe it."""
    import hashlib

    head = GENESIS
    for line in GOLDEN.splitlines():
        entry = json.loads(line)
        stated = entry.pop("hash")
        assert entry["prev"] == head
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        head = hashlib.sha256(text.encode()).hexdigest()
        assert head == stated


@settings(max_examples=300)
@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_changing_any_byte_of_any_line_is_damage(place, byte):
    changed = GOLDEN[:place] + bytes([byte]) + GOLDEN[place + 1 :]
    if changed == GOLDEN:
        assert parse_chain(changed, "x")[1] == len(GOLDEN)
        return
    with pytest.raises(ChainDamaged, match=r"x:[123]"):
        parse_chain(changed, "x")


def test_every_single_bit_flip_is_damage():
    for place in range(len(GOLDEN)):
        for bit in range(8):
            changed = bytearray(GOLDEN)
            changed[place] ^= 1 << bit
            with pytest.raises(ChainDamaged):
                parse_chain(bytes(changed), "x")


FIRST, SECOND = GOLDEN.splitlines(keepends=True)


@pytest.mark.parametrize(
    "data",
    [
        SECOND,
        FIRST + FIRST,
        SECOND + FIRST,
        FIRST + b"\n" + SECOND,
        FIRST + b"{}\n",
        FIRST + b"[1]\n",
        FIRST + b"[" * 100_000 + b"\n",
        FIRST + b'{"a": "\\ud800"}\n',
        FIRST + b"\xff\xfe\n",
        FIRST.replace(b": ", b":"),
        FIRST[:-1].decode().encode("utf-16") + b"\n",
    ],
)
def test_lines_that_are_missing_repeated_swapped_or_foreign_are_damage(data):
    with pytest.raises(ChainDamaged, match="restore the file"):
        parse_chain(data, "x")


@pytest.mark.parametrize("cut", range(1, len(SECOND) + 1, 7))
def test_a_last_line_cut_short_is_dropped_and_named(path, cut):
    path.write_bytes(GOLDEN[:-cut])
    chain = Chain(path)
    assert len(chain.entries) == 1
    assert (chain.repaired is None) == (cut == len(SECOND))
    if chain.repaired:
        assert re.search(r"ledger\.jsonl: dropped a last line cut short", chain.repaired)
    chain.append([{"kind": "more"}])
    chain.close()
    assert path.read_bytes().startswith(FIRST)
    again = Chain(path)
    assert ([entry.get("kind") for entry in again.entries], again.repaired) == (["reserve", "more"], None)
    again.close()


def test_several_entries_are_one_write_and_one_fsync_and_are_on_disk_on_return(path, monkeypatch):
    calls = []
    real_write, real_fsync = os.write, os.fsync
    chain = Chain(path)
    monkeypatch.setattr(os, "write", lambda d, data: (calls.append("write"), real_write(d, data))[1])
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), real_fsync(d))[1])
    added = chain.append([{"n": n} for n in range(5)])
    assert calls == ["write", "fsync"]
    assert [entry["n"] for entry in added] == list(range(5))
    assert chain.head == added[-1]["hash"] == json.loads(path.read_bytes().splitlines()[-1])["hash"]
    assert chain.append([]) == []
    assert calls == ["write", "fsync"]
    chain.close()


def test_the_file_belongs_to_its_owner_alone(path):
    write(path, {"kind": "x"})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_opening_is_told_to_wait_and_closing_gives_the_lock_back(path):
    chain = Chain(path)
    with pytest.raises(ChainHeld, match="in use"):
        Chain(path)
    chain.close()
    other = Chain(path)
    chain.close()  # a second time: the number of its file may be another's by now
    with pytest.raises(ChainHeld, match="in use"):
        Chain(path)
    other.close()


def test_damage_found_on_opening_gives_the_lock_back(path):
    path.write_bytes(GOLDEN.replace(b"fail", b"nail"))
    for _ in range(2):
        with pytest.raises(ChainDamaged, match=r"ledger\.jsonl:2"):
            Chain(path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tacit.federated.chain import Chain
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
chain = Chain(path)
chain.append([{"n": 1}])
before = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    chain.append([{"n": 2}, {"n": 3}])
except OSError as error:
    print(type(error).__name__, path.read_bytes() == before, len(chain.entries))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
chain.append([{"n": 4}])
chain.close()
"""


@pytest.mark.parametrize("room_bytes", [0, 1, 200])
def test_a_full_disk_leaves_the_file_as_it_was(path, room_bytes):
    """A limit on the file's size, in a process of its own: nothing, one byte, or most of a line would fit."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", FULL_DISK, str(path), str(room_bytes)]
    assert subprocess.check_output(command, text=True).split() == ["OSError", "True", "1"]
    chain = Chain(path)
    assert ([entry["n"] for entry in chain.entries], chain.repaired) == ([1, 4], None)
    chain.close()
