"""Payloads wait durably, come back bit for bit or not at all."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated.outbox import Outbox


def sha(data):
    return hashlib.sha256(data).hexdigest()


@settings(max_examples=30)
@given(st.dictionaries(st.text("abcdef0123", min_size=1, max_size=20), st.binary(max_size=40), max_size=6))
def test_payloads_come_back_bit_for_bit_also_after_a_restart(tmp_path_factory, payloads):
    folder = tmp_path_factory.mktemp("outbox")
    outbox = Outbox(folder)
    outbox.put(3, payloads)
    for opened in (outbox, Outbox(folder)):
        assert {key: opened.get(key, sha(data)) for key, data in payloads.items()} == payloads
        assert opened.get("unknown", sha(b"")) is None


def test_the_file_is_a_line_of_json_and_the_payloads(tmp_path):
    Outbox(tmp_path / "outbox").put(3, {"k1": b"one", "k2": b"\n\x00two"})
    (path,) = (tmp_path / "outbox").iterdir()
    assert path.name == "000003-k1.out"
    assert path.read_bytes() == b'{"round": 3, "payloads": {"k1": 3, "k2": 5}}\none\n\x00two'
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_payload_with_another_hash_is_not_given(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(1, {"k": b"one"})
    assert outbox.get("k", sha(b"two")) is None


def test_of_two_payloads_for_a_key_the_one_with_the_hash_is_given(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(1, {"a": b"", "k": b"first"})
    outbox.put(1, {"k": b"second"})
    assert (outbox.get("k", sha(b"first")), outbox.get("k", sha(b"second"))) == (b"first", b"second")


def test_earlier_rounds_are_discarded_and_later_ones_stay(tmp_path):
    outbox = Outbox(tmp_path)
    for number in (1, 2, 3):
        outbox.put(number, {f"k{number}": bytes([number])})
    outbox.discard_before(3)
    for opened in (outbox, Outbox(tmp_path)):
        assert [opened.get(f"k{n}", sha(bytes([n]))) for n in (1, 2, 3)] == [None, None, b"\x03"]
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_put_makes_no_file(tmp_path):
    Outbox(tmp_path).put(1, {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_half_written_is_removed(tmp_path):
    (tmp_path / ".000001-k.out.99.tmp").write_bytes(b'{"round": 1')
    Outbox(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"[]\n",
        b"3\n",
        b'{"round": 1}\n',
        b'{"round": "x", "payloads": {"k": 1}}\n1',
        b'{"round": 1, "payloads": {"k": -1}}\n1',
        b'{"round": 1, "payloads": [1]}\n',
        b'{"round": 1, "payloads": {}}\n',
        b"\xff\xfe\n",
    ],
)
def test_a_damaged_file_is_a_payload_lost_and_does_not_close_the_outbox(tmp_path, data):
    Outbox(tmp_path).put(2, {"good": b"kept"})
    (tmp_path / "000001-k.out").write_bytes(data)
    outbox = Outbox(tmp_path)
    assert outbox.get("k", sha(b"1")) is None
    assert outbox.get("good", sha(b"kept")) == b"kept"


def test_a_file_that_went_while_open_is_a_payload_lost(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.put(1, {"k": b"one"})
    next(tmp_path.iterdir()).unlink()
    assert outbox.get("k", sha(b"one")) is None
    outbox.discard_before(2)
