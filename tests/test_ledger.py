"""The privacy ledger: the charge is on disk first, the budget holds, and for one key at most one payload leaves."""

import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated.accounting import Event, epsilon_pld, epsilon_rdp
from tacit.federated.accounts import read_ledger
from tacit.federated.chain import GENESIS, Chain, ChainDamaged, ChainHeld
from tacit.federated.ledger import Granted, Ledger, Refused, Replay, Reservation
from tacit.federated.outbox import Outbox

STEPS = 4
EVENT = Event(sample_rate=1.0, noise_multiplier=4.0)  # without sampling, accounting takes milliseconds
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
THREE_ROUNDS = epsilon_pld({EVENT: 3 * STEPS}, DELTA) + 1e-9


def request(number=1, *, owner="ann", body="b", source="digits", **changed):
    mechanism = {**MECHANISM, **changed}
    return Reservation(owner=owner, source=source, run="run", round=number, body=body, mechanism=mechanism)


def open_ledger(folder, epsilon=THREE_ROUNDS):
    return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=epsilon, delta=DELTA)


@pytest.fixture
def ledger(tmp_path):
    opened = open_ledger(tmp_path)
    yield opened
    opened.close()


def test_each_reserve_counts_whether_or_not_anything_leaves(tmp_path, ledger):
    keys = [ledger.reserve([request(n)])[0].key for n in (1, 2, 3)]
    ledger.release(1, {keys[0]: b"left"})
    ledger.fail([keys[1]])
    assert ledger.reserve([request(4)]) == [Refused("exhausted")]
    (account,), head, note = read_ledger(tmp_path / "ledger.jsonl")
    assert account.history == {EVENT: 3 * STEPS}
    assert (account.reserved, account.released, account.failed, account.reopened) == (3, 1, 1, 0)
    assert (head, note) == (ledger.head, None)


def test_owners_and_their_sources_have_accounts_of_their_own(ledger):
    requests = [request(n, owner=o, source=s) for o in ("ann", "bob") for s in ("x", "y") for n in (1, 2, 3, 4)]
    turns = ledger.reserve(requests)
    assert [isinstance(turn, Granted) for turn in turns] == [True, True, True, False] * 4


def test_requests_of_one_owner_in_one_cohort_are_all_counted(ledger):
    turns = ledger.reserve([request(n, body=str(n)) for n in (1, 1, 2, 2, 3)])
    assert [isinstance(turn, Granted) for turn in turns[:4]] == [True, False, True, False]
    turns = ledger.reserve([request(5, body=str(n)) for n in range(3)])
    assert sum(isinstance(turn, Granted) for turn in turns) == 0
    assert turns[0] == Refused("exhausted")


def test_the_same_request_twice_in_one_cohort_is_granted_once(ledger):
    first, second = ledger.reserve([request(), request()])
    assert isinstance(first, Granted)
    assert second == Refused("unavailable")


def test_the_same_question_gets_the_same_bytes_for_free_also_after_a_restart(tmp_path):
    ledger = open_ledger(tmp_path)
    key = ledger.reserve([request()])[0].key
    ledger.release(1, {key: b"noised model"})
    assert ledger.reserve([request()]) == [Replay(key, b"noised model")]
    ledger.close()
    ledger = open_ledger(tmp_path)
    assert ledger.reserve([request()]) == [Replay(key, b"noised model")]
    assert ledger.accounts["ann", "digits"].reserved == 1
    ledger.close()


def test_a_failed_key_is_unavailable_for_ever(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.fail([ledger.reserve([request()])[0].key])
    assert ledger.reserve([request()]) == [Refused("unavailable")]
    ledger.close()
    ledger = open_ledger(tmp_path)
    assert ledger.reserve([request()]) == [Refused("unavailable")]
    ledger.close()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("damage", ["gone", "changed", "discarded"])
def test_a_payload_that_is_gone_or_changed_is_never_computed_again(tmp_path, damage, restart):
    ledger = open_ledger(tmp_path)
    ledger.release(1, {ledger.reserve([request()])[0].key: b"noised model"})
    (stored,) = (tmp_path / "outbox").glob("*.out")
    if damage == "gone":
        stored.unlink()
    elif damage == "changed":
        stored.write_bytes(stored.read_bytes().replace(b"noised", b"poised"))
    else:
        ledger.discard_before(2)
    if restart:
        ledger.close()
        ledger = open_ledger(tmp_path)
    assert ledger.reserve([request()]) == [Refused("unavailable")]
    ledger.close()


def test_the_same_round_with_another_body_is_charged_again(ledger):
    ledger.release(1, {ledger.reserve([request(body="a")])[0].key: b"x"})
    assert isinstance(ledger.reserve([request(body="b")])[0], Granted)
    assert ledger.accounts["ann", "digits"].history == {EVENT: 2 * STEPS}


def test_after_a_process_death_a_reservation_reopens_twice_at_the_same_charge_and_no_more(tmp_path):
    granted = []
    for _ in range(5):  # each opening is a new process that dies before it releases
        ledger = open_ledger(tmp_path)
        granted.append(isinstance(ledger.reserve([request()])[0], Granted))
        assert ledger.reserve([request()]) == [Refused("unavailable")]  # not again while this process lives
        ledger.close()
    assert granted == [True, True, True, False, False]
    (account,), _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert (account.reserved, account.reopened, account.history) == (1, 2, {EVENT: STEPS})


@pytest.mark.parametrize("changed", [{"noise_multiplier": 0.5}, {"steps": 40}, {"sample_rate": 0.9}])
def test_a_reservation_does_not_reopen_for_a_mechanism_that_it_did_not_pay_for(tmp_path, changed):
    ledger = open_ledger(tmp_path)
    ledger.reserve([request()])
    ledger.close()
    ledger = open_ledger(tmp_path)
    assert ledger.reserve([request(**changed)]) == [Refused("refused")]
    ledger.close()


@pytest.mark.parametrize("steps", [0, -12])
def test_a_reservation_cannot_give_budget_back(ledger, steps):
    with pytest.raises(ChainDamaged, match=f"steps={steps}"):
        ledger.reserve([request(steps=steps)])


def test_release_of_what_was_not_granted_here_is_refused(tmp_path):
    ledger = open_ledger(tmp_path)
    key = ledger.reserve([request()])[0].key
    with pytest.raises(ValueError, match="reserve first"):
        ledger.release(1, {"0" * 64: b"x"})
    ledger.close()
    ledger = open_ledger(tmp_path)
    with pytest.raises(ValueError, match="reserve first"):
        ledger.release(1, {key: b"x"})
    ledger.reserve([request()])
    ledger.release(1, {key: b"x"})
    with pytest.raises(ValueError, match="reserve first"):
        ledger.release(1, {key: b"another"})
    ledger.close()


def test_the_head_that_a_server_remembers_is_known_and_one_that_was_rolled_back_is_not(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.reserve([request(1)])
    old, copy = ledger.head, (tmp_path / "ledger.jsonl").read_bytes()
    ledger.reserve([request(2)])
    new = ledger.head
    assert ledger.seen(old)
    assert ledger.seen(new)
    assert ledger.seen(GENESIS)
    ledger.close()
    (tmp_path / "ledger.jsonl").write_bytes(copy)
    ledger = open_ledger(tmp_path)
    assert ledger.seen(old)
    assert not ledger.seen(new)
    ledger.close()


def test_two_mechanisms_in_turn_are_held_to_the_rdp_filter(tmp_path):
    """A later mechanism may be chosen by what an earlier one gave; PLD only holds for a plan fixed in advance."""
    history = {EVENT: STEPS, Event(sample_rate=1.0, noise_multiplier=2.0): STEPS}
    pld, rdp = epsilon_pld(history, DELTA), epsilon_rdp(history, DELTA)
    assert pld + 0.01 < rdp
    for number, (budget, fits) in enumerate([(pld + 0.01, False), (rdp + 1e-9, True)]):
        ledger = open_ledger(tmp_path / str(number), budget)
        ledger.reserve([request(1)])
        assert isinstance(ledger.reserve([request(2, noise_multiplier=2.0)])[0], Granted) == fits
        ledger.close()


def test_a_plan_evaluated_once_neither_adds_to_the_budget_nor_takes_from_it(tmp_path):
    for name, planned in [("fits", 3), ("too long", 4)]:
        ledger = open_ledger(tmp_path / name)
        ledger.plan(EVENT, planned * STEPS)
        turns = [ledger.reserve([request(n)])[0] for n in range(1, 6)]
        assert [isinstance(turn, Granted) for turn in turns] == [True] * 3 + [False] * 2
        ledger.close()


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_second_process_is_told_that_the_ledger_is_in_use(tmp_path, ledger):
    with pytest.raises(ChainHeld, match="in use by another process"):
        open_ledger(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            open_ledger(tmp_path)
        except ChainHeld:
            os._exit(77)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def test_an_entry_of_an_unknown_kind_is_damage_and_the_lock_is_given_back(tmp_path):
    chain = Chain(tmp_path / "ledger.jsonl")
    chain.append([{"kind": "refund", "owner": "ann", "source": "digits", "key": "k"}])
    chain.close()
    for _ in range(2):
        with pytest.raises(ChainDamaged, match="refund"):
            open_ledger(tmp_path)
    with pytest.raises(ChainDamaged, match="refund"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_write_then_fsync_before_a_grant_and_outbox_before_ledger_before_a_release(tmp_path, monkeypatch):
    """The order of system calls, seen where Python makes them."""
    calls = []
    real_write, real_fsync = os.write, os.fsync

    def name(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH119, PTH115  # no path object here

    def write(descriptor, data):
        calls.append(("write", name(descriptor), [json.loads(line)["kind"] for line in data.splitlines()]))
        return real_write(descriptor, data)

    def fsync(descriptor):
        calls.append(("fsync", name(descriptor).partition("-")[0], None))
        return real_fsync(descriptor)

    ledger = open_ledger(tmp_path)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    keys = [turn.key for turn in ledger.reserve([request(owner="ann"), request(owner="bob")])]
    assert calls == [("write", "ledger.jsonl", ["reserve", "reserve"]), ("fsync", "ledger.jsonl", None)]
    calls.clear()
    ledger.release(1, dict.fromkeys(keys, b"payload"))
    assert calls == [
        ("fsync", ".000001", None),
        ("fsync", "outbox", None),
        ("write", "ledger.jsonl", ["release", "release"]),
        ("fsync", "ledger.jsonl", None),
    ]
    ledger.close()


def test_when_the_charge_cannot_be_written_nothing_is_granted_and_the_file_is_as_it_was(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    ledger.reserve([request(1)])
    before = (tmp_path / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", _full_once(os.fsync))
    with pytest.raises(OSError, match="No space"):
        ledger.reserve([request(2)])
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    monkeypatch.undo()
    assert isinstance(ledger.reserve([request(2)])[0], Granted)
    ledger.close()


def _full_once(real):
    left = [OSError(28, "No space left on device")]

    def fsync(descriptor):
        if left:
            raise left.pop()
        real(descriptor)

    return fsync


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["reserve", "release", "fail", "die", "again"]), st.integers(0, 1), st.integers(1, 6)),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(ACTIONS)
def test_no_sequence_of_rounds_failures_and_deaths_exceeds_the_budget_or_releases_twice(tmp_path_factory, actions):
    folder = tmp_path_factory.mktemp("ledger")
    ledger = open_ledger(folder)
    computed = {"ann": 0, "bob": 0}  # how often each owner's records were charged for a new key
    payloads, granted, keys = {}, {}, {"ann": set(), "bob": set()}
    for action, who, number in actions:
        owner = ("ann", "bob")[who]
        if action == "die":
            ledger.close()
            ledger, granted = open_ledger(folder), {}
        elif action in ("reserve", "again"):
            turn = ledger.reserve([request(number, owner=owner)])[0]
            if isinstance(turn, Granted):
                assert turn.key not in payloads
                granted[turn.key] = number
                computed[owner] += turn.key not in keys[owner]
                keys[owner].add(turn.key)
            elif isinstance(turn, Replay):
                assert turn.payload == payloads[turn.key]
        elif granted:
            key, round_number = granted.popitem()
            if action == "release":
                payloads[key] = os.urandom(8)
                ledger.release(round_number, {key: payloads[key]})
            else:
                ledger.fail([key])
    ledger.close()
    accounts, _, _ = read_ledger(folder / "ledger.jsonl")
    for account in accounts:
        assert account.reserved == computed[account.owner] <= 3
        assert account.history == ({EVENT: account.reserved * STEPS} if account.reserved else {})
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    released = [e for e in map(json.loads, lines) if e["kind"] == "release"]
    assert {e["key"]: e["payload"] for e in released} == {k: hashlib.sha256(p).hexdigest() for k, p in payloads.items()}
    assert len(released) == len(payloads)
