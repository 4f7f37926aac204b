"""Ledgers that outlive a run: whose data, where, under which key; a run's extract; and what an owner declares."""

import hashlib
import hmac
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.devices.durable import FileDamaged
from tacit.federated import chain as chain_module
from tacit.federated import home as home_module
from tacit.federated.accounting import Event, epsilon_pld
from tacit.federated.accounts import find_ledgers, read_ledger
from tacit.federated.chain import GENESIS, Chain, ChainDamaged, ChainHeld
from tacit.federated.extract import check_extract
from tacit.federated.fingerprint import DataChanged, fingerprint, fingerprint_of_all, unchanged
from tacit.federated.home import (
    declare_new_cohort,
    fingerprint_key,
    home_folder,
    home_ledger,
    open_home_ledger,
)
from tacit.federated.ledger import Granted, Refused, Replay, Reservation
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.outbox import Outbox
from tacit.federated.owner_ledgers import OwnerLedgers
from tacit.federated.task import DataProblem, Records

STEPS = 4
EVENT = Event(sample_rate=1.0, noise_multiplier=4.0)
MECHANISM = {
    "unit": "record",
    "relation": "add/remove",
    "sampler": "poisson",
    "noise": "gaussian",
    "sample_rate": 1.0,
    "noise_multiplier": 4.0,
    "max_grad_norm": 1.0,
    "steps": STEPS,
}
DELTA = 1e-5
PLAN = {EVENT: 3 * STEPS}
THREE_ROUNDS = epsilon_pld(PLAN, DELTA) + 1e-9
DATA = {"ann": "a" * 64, "bob": "b" * 64}


def request(number, owner="ann", *, run="run"):
    return Reservation(owner=owner, source="scans", run=run, round=number, body="b", mechanism=MECHANISM)


class Runs:
    """Runs over one home, each in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.opened: list[OwnerLedgers] = []

    def open(self, run="run", *, data=None, epsilon=THREE_ROUNDS, plan=PLAN):
        book = OwnerLedgers(
            self.home,
            "scans",
            DATA if data is None else data,
            run=run,
            extract=self.extract(run),
            outbox=Outbox(self.folder / run / "outbox"),
            epsilon=epsilon,
            delta=DELTA,
        )
        self.opened.append(book)
        assert book.plan(plan)
        return book

    def extract(self, run="run"):
        (self.folder / run).mkdir(exist_ok=True)
        return self.folder / run / "ledger.jsonl"

    def ledger(self, owner="ann"):
        return home_ledger(self.home, owner, "scans")


@pytest.fixture
def runs(tmp_path):
    made = Runs(tmp_path)
    yield made
    for book in made.opened:
        book.close()


# The key and the fingerprint.


def records(count=3, offset=0.0):
    inputs = np.arange(count * 2, dtype=np.float32).reshape(count, 2) + np.float32(offset)
    return Records(inputs, np.arange(count, dtype=np.int64))


def test_a_fingerprint_is_this_hmac_of_dtype_shape_and_bytes():
    """Recomputed from the words of the module's first lines."""
    found = records()
    message = b"tacit records 1\n"
    message += b"inputs <f4 (3, 2)\n" + found.inputs.tobytes() + b"labels <i8 (3,)\n" + found.labels.tobytes()
    key = bytes(range(32))
    assert fingerprint(found, key) == hmac.new(key, message, hashlib.sha256).hexdigest()


@settings(max_examples=50)
@given(st.integers(0, 5), st.integers(0, 1), st.integers(0, 31), st.floats(-1e6, 1e6, width=32))
def test_any_changed_value_is_another_fingerprint_and_none_is_the_same(row, column, bit, value):
    first = records(6)
    inputs = first.inputs.copy()
    inputs[row, column] = value
    changed = Records(inputs, first.labels)
    same = np.array_equal(inputs.view(np.uint32), first.inputs.view(np.uint32))
    assert (fingerprint(changed, bytes(32)) == fingerprint(first, bytes(32))) == same
    flipped = bytearray(32)
    flipped[bit] = 1
    assert fingerprint(first, bytes(flipped)) != fingerprint(first, bytes(32))


def test_order_shape_type_labels_and_records_that_go_or_come_change_it():
    first = records(4)
    others = [
        first.take(np.int64([1, 0, 2, 3])),
        first.take(np.int64([0, 1, 2])),
        first.take(np.int64([])),
        Records(first.inputs.reshape(4, 2, 1), first.labels),
        Records(first.inputs.astype(np.float64), first.labels),
        Records(first.inputs, first.labels[::-1]),
    ]
    found = {fingerprint(one, bytes(32)) for one in (first, *others)}
    assert len(found) == 7
    strided = Records(np.asfortranarray(first.inputs), np.repeat(first.labels, 2)[::2])
    assert fingerprint(strided, bytes(32)) == fingerprint(first, bytes(32)), "the layout in memory is nobody's data"


def test_one_owners_change_changes_the_fingerprint_of_all_and_their_order_does_not():
    found = {"ann": "a" * 64, "bob": "b" * 64}
    first = fingerprint_of_all(found, bytes(32))
    assert fingerprint_of_all(dict(reversed(found.items())), bytes(32)) == first
    others = [{**found, "bob": "c" * 64}, {"ann": "a" * 64}, {"ann": "b" * 64, "bob": "a" * 64}]
    assert len({first, *(fingerprint_of_all(other, bytes(32)) for other in others)}) == 4


def test_python_objects_have_no_bytes_to_fingerprint():
    with pytest.raises(DataProblem, match="dtype=object"):
        fingerprint(Records(np.array([["a"]], dtype=object), np.int64([0])), bytes(32))


def test_records_that_are_read_anew_must_be_the_ones_that_were_charged():
    found = [records(3)]
    read = unchanged(lambda: found[0], bytes(32), fingerprint(records(3), bytes(32)))
    assert len(read()) == 3
    found[0] = records(3, offset=1.0)
    with pytest.raises(DataChanged, match="begin a new run"):
        read()
    assert issubclass(DataChanged, DataProblem), "which is exit code 3"


def test_home_is_where_the_environment_says_or_below_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "here"))
    assert home_folder() == tmp_path / "here"
    monkeypatch.delenv("TACIT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_folder() == tmp_path / ".tacit"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "a\0b", "a b", "x" * 65, "é", ".hidden", "a\n"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="owner="):
        home_ledger(tmp_path, name, "scans")
    with pytest.raises(ValueError, match="source="):
        home_ledger(tmp_path, "ann", name)


def test_folders_files_and_key_are_for_their_user_alone(runs):
    umask = os.umask(0o022)
    try:
        fingerprint_key(runs.home, "ann")
        runs.open().reserve([request(1)])
    finally:
        os.umask(umask)
    modes = {path.relative_to(runs.home).as_posix(): path.stat().st_mode & 0o777 for path in runs.home.rglob("*")}
    assert modes == {
        "ledgers": 0o700,
        "ledgers/ann": 0o700,
        "ledgers/ann/key": 0o600,
        "ledgers/ann/scans.jsonl": 0o600,
        "ledgers/bob": 0o700,
        "ledgers/bob/scans.jsonl": 0o600,
    }


def test_a_folder_or_key_that_others_may_read_is_refused(tmp_path):
    fingerprint_key(tmp_path, "ann")
    (tmp_path / "ledgers" / "ann" / "key").chmod(0o640)
    with pytest.raises(PermissionError, match="chmod 600"):
        fingerprint_key(tmp_path, "ann")
    (tmp_path / "ledgers" / "ann").chmod(0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        fingerprint_key(tmp_path, "ann")


def test_a_key_that_another_process_made_meanwhile_is_kept(tmp_path):
    """The second half of making one, when the first half found none: as two processes that begin together do."""
    key = fingerprint_key(tmp_path, "ann")
    path = tmp_path / "ledgers" / "ann" / "key"
    home_module._make_key(path)
    assert fingerprint_key(tmp_path, "ann") == key
    assert [found.name for found in path.parent.iterdir()] == ["key"]


def test_a_lost_key_is_not_replaced_while_there_are_ledgers_and_a_short_one_is_damage(runs):
    key = runs.home / "ledgers" / "ann" / "key"
    fingerprint_key(runs.home, "ann")
    runs.open().reserve([request(1)])
    key.write_bytes(b"short")
    with pytest.raises(FileDamaged, match="32 bytes"):
        fingerprint_key(runs.home, "ann")
    key.unlink()
    with pytest.raises(PrivacyRefused, match="restore it"):
        fingerprint_key(runs.home, "ann")


# Many runs, one budget.


def test_charges_of_all_runs_over_an_owners_source_add_up(runs):
    book = runs.open("first")
    assert all(isinstance(turn, Granted) for turn in book.reserve([request(n, run="first") for n in (1, 2)]))
    book.close()
    book = runs.open("second")
    assert book.short_of(PLAN, "second") == ["ann"]
    asked = [request(n, owner, run="second") for owner in ("ann", "bob") for n in (1, 2, 3, 4)]
    turns = book.reserve(asked)
    assert [isinstance(turn, Granted) for turn in turns] == [True, False, False, False, True, True, True, False]
    account = book.accounts["ann", "scans"]
    assert account.runs == {"first": {EVENT: 2 * STEPS}, "second": {EVENT: STEPS}}


def test_everything_that_a_gate_needs_goes_to_the_right_owners_ledger(runs):
    book = runs.open()
    ann, bob, stranger = book.reserve([request(1), request(1, "bob"), request(1, "eve")])
    assert stranger == Refused("refused")
    book.release(1, {ann.key: b"noised"})
    book.fail([bob.key, "0" * 64])
    assert book.reserve([request(1), request(1, "bob")]) == [Replay(ann.key, b"noised"), Refused("unavailable")]
    with pytest.raises(ValueError, match="reserve first"):
        book.release(1, {bob.key: b"x"})
    with pytest.raises(ValueError, match="reserve first"):
        book.release(1, {"0" * 64: b"x"})
    kinds = {
        owner: [json.loads(line)["kind"] for line in runs.ledger(owner).read_text().splitlines()] for owner in DATA
    }
    assert kinds == {"ann": ["reserve", "release"], "bob": ["reserve", "fail"]}
    book.discard_before(2)
    assert book.reserve([request(1)]) == [Refused("unavailable")]
    assert book.repaired is None


def test_the_payloads_of_a_cohort_are_one_file(runs):
    book = runs.open()
    turns = book.reserve([request(1), request(1, "bob")])
    book.release(1, {turn.key: b"noised" for turn in turns})
    assert len(list((runs.folder / "run" / "outbox").glob("*.out"))) == 1


def test_a_run_that_is_taken_up_again_goes_on_where_it_was(runs):
    book = runs.open()
    book.release(1, {book.reserve([request(1)])[0].key: b"noised"})
    open_key = book.reserve([request(2)])[0].key
    head = book.head
    book.close()
    book = runs.open()
    assert book.seen(head)
    assert book.seen(GENESIS)
    assert not book.seen("f" * 64)
    assert book.reserve([request(2)]) == [Granted(open_key)]
    assert book.accounts["ann", "scans"].reopened == 1
    assert book.short_of(PLAN, "run") == []


@pytest.mark.parametrize("lost", [1, 2])
def test_an_extract_that_a_crash_left_behind_catches_up(runs, lost):
    """The process died after the home ledger's fsync and before the copy."""
    book = runs.open()
    book.release(1, {book.reserve([request(1)])[0].key: b"noised"})
    book.close()
    lines = runs.extract().read_bytes().splitlines(keepends=True)
    runs.extract().write_bytes(b"".join(lines[:-lost]))
    book = runs.open()
    assert [entry["kind"] for entry in book._extract.entries] == ["extract", "extract", "reserve", "release"]
    assert check_extract(runs.extract(), runs.home) == []


def test_data_that_changed_within_a_run_stop_it_and_between_runs_do_not(runs):
    runs.open().reserve([request(1)])
    runs.opened.pop().close()
    with pytest.raises(DataChanged, match="'ann'"):
        runs.open(data={**DATA, "ann": "c" * 64})
    book = runs.open("later", data={**DATA, "ann": "c" * 64})
    assert isinstance(book.reserve([request(1, run="later")])[0], Granted)
    assert book.accounts["ann", "scans"].history == {EVENT: 2 * STEPS}, "the spend is inherited"


def test_the_servers_ledger_at_client_level_outlives_a_run_as_well(runs):
    asked = replace(request(1, "server"), mechanism={**MECHANISM, "unit": "client"})
    book = runs.open(data={"server": None})
    assert isinstance(book.reserve([asked])[0], Granted)
    assert "data" not in json.loads(runs.ledger("server").read_text().splitlines()[0])


def test_one_owner_in_a_process_of_its_own_has_a_plain_ledger(runs):
    def opened(data):
        return open_home_ledger(
            runs.home,
            "ann",
            "scans",
            data=data,
            outbox=Outbox(runs.folder / "outbox"),
            epsilon=THREE_ROUNDS,
            delta=DELTA,
        )

    ledger = opened("a" * 64)
    assert isinstance(ledger.reserve([request(1)])[0], Granted)
    ledger.close()
    ledger = opened("c" * 64)
    assert ledger.reserve([request(2)]) == [Refused("refused")], "one of three constants, nothing about the data"
    ledger.close()


def test_a_second_process_is_told_that_an_owners_ledger_is_in_use_and_no_lock_stays(runs):
    book = runs.open()
    with pytest.raises(ChainHeld, match="in use"):
        runs.open("other")
    book.close()
    runs.open("other")


WORKER = """
import json, sys, time
from pathlib import Path
from tacit.federated.accounting import Event
from tacit.federated.chain import ChainHeld
from tacit.federated.home import open_home_ledger
from tacit.federated.ledger import Granted, Refused, Reservation
from tacit.federated.outbox import Outbox
folder, run, epsilon, mechanism, number = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), json.loads(sys.argv[4]), 0
while True:
    try:
        ledger = open_home_ledger(
            folder / "home", "ann", "scans", data="a" * 64, outbox=Outbox(folder / run), epsilon=epsilon, delta=1e-5
        )
    except ChainHeld:
        time.sleep(0.001)
        continue
    ledger.plan({Event(sample_rate=1.0, noise_multiplier=4.0): 12})
    number += 1
    request = Reservation(owner="ann", source="scans", run=run, round=number, body="b", mechanism=mechanism)
    turn = ledger.reserve([request])[0]
    if isinstance(turn, Granted):
        ledger.release(number, {turn.key: b"noised"})
    ledger.close()
    if turn == Refused("exhausted"):
        break
    time.sleep(0.005)
print(number - 1)
"""


def test_two_processes_on_one_owner_stay_within_its_budget_together(runs):
    arguments = [str(THREE_ROUNDS), json.dumps(MECHANISM)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, runs.folder, name, *arguments], stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    granted = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sum(granted) == 3
    (account,), _, _ = read_ledger(runs.ledger())
    assert (account.reserved, account.released, account.history) == (3, 3, PLAN)


MANY = """
import resource, sys
from pathlib import Path
from tacit.federated.outbox import Outbox
from tacit.federated.owner_ledgers import OwnerLedgers
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
home, names = Path(sys.argv[1]) / "home", {f"owner-{n}": "a" * 64 for n in range(150)}
book = OwnerLedgers(
    home, "scans", names, run="run", extract=home / "ledger.jsonl", outbox=Outbox(home), epsilon=8.0, delta=1e-5
)
print(len(book._ledgers), len(book._extract.entries))
"""


def test_more_owners_than_a_shell_lets_open_files_are_no_obstacle(tmp_path):
    script = tmp_path / "many.py"
    script.write_text(MANY)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["150", "150"], done.stderr


# A ledger that was put back.


def test_a_home_ledger_that_is_older_than_the_runs_extract_is_refused(runs):
    book = runs.open()
    book.reserve([request(1)])
    older = runs.ledger().read_bytes()
    book.reserve([request(2)])
    book.close()
    runs.ledger().write_bytes(older)
    with pytest.raises(PrivacyRefused, match="cannot be taken back"):
        runs.open()
    with pytest.raises(PrivacyRefused, match="older or another"):
        check_extract(runs.extract(), runs.home)
    runs.ledger().unlink()
    with pytest.raises(PrivacyRefused, match="cannot be taken back"):
        runs.open()


def test_an_extract_that_is_older_than_a_checkpoint_remembers_is_noticed(runs):
    book = runs.open()
    older = runs.extract().read_bytes()
    book.reserve([request(1)])
    remembered = book.head
    book.close()
    runs.extract().write_bytes(older)
    runs.ledger().unlink()
    book = runs.open()
    assert not book.seen(remembered)


def test_a_ledger_is_not_taken_for_an_extract(runs):
    chain = Chain(runs.extract())
    chain.append([{"kind": "fail", "owner": "ann", "source": "scans", "key": "k"}])
    chain.close()
    with pytest.raises(ChainDamaged, match="expected an extract"):
        runs.open()


# The extract.

EXTRACT = (
    b'{"seq": 0, "at": "2026-01-02T03+00:00", "kind": "extract", "owner": "ann", "source": "scans", '
    b'"history": [], "reserved": 0, "released": 0, "failed": 0, "reopened": 0, "unit": "record", '
    b'"relation": "add/remove", "status": "not stated", "opening": null, "cohorts": [], '
    b'"home": "0000000000000000000000000000000000000000000000000000000000000000", '
    b'"prev": "0000000000000000000000000000000000000000000000000000000000000000", '
    b'"hash": "HASH0"}\n'
    b'{"seq": 1, "at": "2026-01-02T03+00:00", "kind": "reserve", "owner": "ann", "source": "scans", '
    b'"key": "KEY", "run": "run", "round": 1, '
    b'"mechanism": {"unit": "record", "relation": "add/remove", "sampler": "poisson", "noise": "gaussian", '
    b'"sample_rate": 1.0, "noise_multiplier": 4.0, "max_grad_norm": 1.0, "steps": 4}, "status": "private", '
    b'"opening": {"plan": [[1.0, 4.0, 4]], "order": 6.0, "share": 1.0, "epsilon": 4.0, "delta": 1e-05}, '
    b'"home": "HOME", "prev": "HASH0", "hash": "HASH1"}\n'
)


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)


def test_an_extract_is_these_bytes(runs, monkeypatch):
    """Only hashes are filled in, recomputed here as the README says."""
    monkeypatch.setattr(chain_module, "datetime", Clock)
    book = runs.open(data={"ann": DATA["ann"]}, epsilon=4.0, plan={EVENT: STEPS})
    (turn,) = book.reserve([request(1)])
    at_home = json.loads(runs.ledger().read_bytes())
    expected = EXTRACT.replace(b"KEY", turn.key.encode()).replace(b"HOME", at_home["hash"].encode())
    for number in (0, 1):
        entry = json.loads(expected.splitlines()[number])
        entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        expected = expected.replace(f"HASH{number}".encode(), hashlib.sha256(text.encode()).hexdigest().encode())
    assert runs.extract().read_bytes() == expected
    assert at_home["data"] == DATA["ann"]
    assert DATA["ann"].encode() not in expected, "fingerprints stay at home"


def test_an_extract_reads_like_a_ledger_and_adds_to_what_was_spent_before(runs):
    book = runs.open("first")
    book.release(1, {book.reserve([request(1, run="first")])[0].key: b"x"})
    book.close()
    book = runs.open("second")
    book.reserve([request(1, run="second")])
    heads = {"ann": json.loads(runs.ledger().read_bytes().splitlines()[-1])["hash"], "bob": GENESIS}
    book.close()
    accounts, head, note = read_ledger(runs.extract("second"))
    assert [(a.owner, a.history, a.reserved, a.released) for a in accounts] == [
        ("ann", {EVENT: 2 * STEPS}, 2, 1),
        ("bob", {}, 0, 0),
    ]
    assert {a.owner: a.extract_of for a in accounts} == heads
    assert accounts[0].status == "private"
    assert accounts[0].opening == read_ledger(runs.ledger())[0][0].opening
    assert (head, note) == (book._extract.entries[-1]["hash"], None)


def test_an_extract_is_held_against_the_home_ledgers_that_are_here(runs):
    book = runs.open()
    book.reserve([request(1)])
    book.close()
    assert check_extract(runs.extract(), runs.home) == []
    later = runs.open("later")
    later.reserve([request(1, run="later")])
    later.close()
    newer = f"entries that are newer than the extract: 1 in {runs.ledger()}"
    assert check_extract(runs.extract(), runs.home) == [newer]
    assert len(check_extract(runs.extract(), runs.folder / "elsewhere")) == 2


def rechained(path: Path, change) -> None:
    """Writes a chain that holds, with other content: what somebody does who knows the format."""
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    path.unlink()
    chain = Chain(path)
    chain.append([{n: v for n, v in e.items() if n not in ("seq", "at", "prev", "hash")} for e in change(entries)])
    chain.close()


def cheaper(entries):
    for entry in entries:
        if entry["kind"] == "reserve":
            entry["mechanism"]["noise_multiplier"] = 40.0
    return entries


def poorer(entries):
    entries[0]["history"] = []
    return entries


@pytest.mark.parametrize(
    "change",
    [cheaper, poorer, lambda entries: [*entries[:2], *entries[3:]], lambda entries: [*entries, entries[-1]]],
    ids=["a cheaper mechanism", "nothing spent before", "an entry left out", "an entry twice"],
)
def test_an_extract_that_was_written_anew_with_other_content_does_not_pass(runs, change):
    book = runs.open("before")
    book.reserve([request(1, run="before")])
    book.close()
    book = runs.open(epsilon=2 * THREE_ROUNDS)
    for number in (1, 2):
        book.release(number, {book.reserve([request(number)])[0].key: b"x"})
    book.close()
    assert check_extract(runs.extract(), runs.home) == []
    rechained(runs.extract(), change)
    read_ledger(runs.extract())
    with pytest.raises(ChainDamaged, match="extract"):
        check_extract(runs.extract(), runs.home)


# Declared by the owner.


def charged(runs, run="run", data=DATA["ann"]):
    book = runs.open(run, data={"ann": data})
    turns = book.reserve([request(n, run=run) for n in (1, 2, 3, 4)])
    book.close()
    return sum(isinstance(turn, Granted) for turn in turns)


def test_a_new_cohort_begins_from_nothing_and_says_so_ever_after(runs):
    assert charged(runs) == 3
    before = declare_new_cohort(runs.home, "ann", "scans", " other patients since May ")
    assert before.history == PLAN
    assert charged(runs, "second", "c" * 64) == 3
    (account,), _, _ = read_ledger(runs.ledger())
    assert account.history == PLAN
    (cohort,) = account.cohorts
    assert (cohort.reason, cohort.history) == ("other patients since May", PLAN)
    assert datetime.fromisoformat(cohort.until).tzinfo is not None
    (shown,), _, _ = read_ledger(runs.extract("second"))
    assert shown.cohorts == account.cohorts


@pytest.mark.parametrize("data", ["a" * 64, "b" * 64])
def test_data_that_were_charged_before_are_no_new_cohort(runs, data):
    """Neither the last ones nor any before them."""
    charged(runs, "first", "a" * 64)
    declare_new_cohort(runs.home, "ann", "scans", "first others")
    charged(runs, "second", "b" * 64)
    declare_new_cohort(runs.home, "ann", "scans", "second others")
    with pytest.raises(PrivacyRefused, match="cannot be taken back"):
        runs.open("third", data={"ann": data})
    assert charged(runs, "fourth", "c" * 64) == 3


def test_there_must_be_something_to_leave_behind(runs):
    with pytest.raises(FileNotFoundError, match="scans"):
        declare_new_cohort(runs.home, "ann", "scans", "why")
    runs.open(data={"ann": DATA["ann"]}).close()
    with pytest.raises(PrivacyRefused, match="got none since the last"):
        declare_new_cohort(runs.home, "ann", "scans", "why")
    charged(runs)
    declare_new_cohort(runs.home, "ann", "scans", "why")
    with pytest.raises(PrivacyRefused, match="got none since the last"):
        declare_new_cohort(runs.home, "ann", "scans", "why again")


def test_charges_that_do_not_say_of_which_data_cannot_be_left_behind(runs):
    book = runs.open(data={"server": None})
    book.reserve([replace(request(1, "server"), mechanism={**MECHANISM, "unit": "client"})])
    book.close()
    with pytest.raises(PrivacyRefused, match="state their data"):
        declare_new_cohort(runs.home, "server", "scans", "why")


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 501, "bell\a"])
def test_a_reason_is_one_line(runs, reason):
    charged(runs)
    with pytest.raises(ValueError, match="reason="):
        declare_new_cohort(runs.home, "ann", "scans", reason)


def test_nothing_is_declared_while_a_run_uses_the_ledger(runs):
    book = runs.open()
    book.reserve([request(1)])
    with pytest.raises(ChainHeld):
        declare_new_cohort(runs.home, "ann", "scans", "why")


def test_ledgers_are_found_from_home_from_an_owner_and_from_a_run(runs):
    charged(runs)
    runs.open("other").close()
    both = [runs.ledger("ann"), runs.ledger("bob")]
    assert find_ledgers(runs.home) == both
    assert find_ledgers(runs.home / "ledgers") == both
    assert find_ledgers(runs.home / "ledgers" / "ann") == both[:1]
    assert find_ledgers(runs.folder / "run") == [runs.extract()]
    (runs.folder / "run" / "log.jsonl").touch()
    assert find_ledgers(runs.folder / "run") == [runs.extract()], "a log is no ledger"
