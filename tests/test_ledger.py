"""The privacy ledger: the charge is on disk first, the budget holds, and for one key at most one payload leaves."""

import hashlib
import json
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated import stop_rule
from tacit.federated.accounting import Event, epsilon_pld, epsilon_rdp
from tacit.federated.accounts import read_ledger
from tacit.federated.chain import GENESIS, Chain, ChainDamaged, ChainHeld
from tacit.federated.ledger import Granted, Ledger, Refused, Replay, Reservation
from tacit.federated.outbox import Outbox

STEPS = 4
EVENT = Event(sample_rate=1.0, noise_multiplier=4.0)  # without sampling, accounting takes milliseconds
OTHER = Event(sample_rate=1.0, noise_multiplier=2.0)
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


def test_a_mechanism_that_was_not_planned_is_held_to_the_rdp_filter(tmp_path):
    """A later mechanism may be chosen by what an earlier one gave; PLD only holds for a plan fixed in advance."""
    history = {EVENT: STEPS, OTHER: STEPS}
    pld, rdp = epsilon_pld(history, DELTA), epsilon_rdp(history, DELTA)
    assert pld + 0.01 < rdp
    for number, (budget, fits) in enumerate([(pld + 0.01, False), (rdp + 1e-9, True)]):
        ledger = open_ledger(tmp_path / str(number), budget)
        assert ledger.plan({EVENT: STEPS})
        ledger.reserve([request(1)])
        assert isinstance(ledger.reserve([request(2, noise_multiplier=2.0)])[0], Granted) == fits
        ledger.close()


def test_a_planned_history_of_two_kinds_is_granted_whole_by_pld_and_in_any_order(tmp_path):
    history = {EVENT: 2 * STEPS, OTHER: STEPS}
    budget = epsilon_pld(history, DELTA) + 1e-9
    for number, order in enumerate([(4.0, 4.0, 2.0), (2.0, 4.0, 4.0), (4.0, 2.0, 4.0)]):
        ledger = open_ledger(tmp_path / str(number), budget)
        assert ledger.plan(history)
        turns = [ledger.reserve([request(n, noise_multiplier=z)])[0] for n, z in enumerate((*order, 2.0, 4.0))]
        assert [isinstance(turn, Granted) for turn in turns] == [True] * 3 + [False] * 2
        ledger.close()


def test_a_plan_that_does_not_fit_is_none_and_says_so(tmp_path):
    ledger = open_ledger(tmp_path)
    assert not ledger.plan({EVENT: 3 * STEPS, OTHER: 1})
    ledger.reserve([request(1)])
    assert "opening" not in ledger.entries[0]
    ledger.close()


def test_the_plan_of_an_account_is_the_one_it_was_opened_with(tmp_path):
    """A later run plans what it likes, also after having seen what the first one gave: the filter decides then."""
    later = {EVENT: STEPS, OTHER: STEPS}
    budget = epsilon_pld(later, DELTA) + 1e-9
    ledger = open_ledger(tmp_path, budget)
    assert ledger.plan({EVENT: STEPS})
    ledger.reserve([request(1)])
    ledger.close()
    ledger = open_ledger(tmp_path, budget)
    assert ledger.plan(later), "an account without charges could afford it"
    assert ledger.short_of({OTHER: STEPS}, "another run") == ["ann"]
    assert ledger.reserve([request(2, noise_multiplier=2.0)]) == [Refused("exhausted")]
    opening = ledger.accounts["ann", "digits"].opening
    assert (opening.plan, opening.epsilon, opening.delta) == ({EVENT: STEPS}, budget, DELTA)
    ledger.close()


def test_only_the_first_reserve_of_an_account_says_how_it_was_opened(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.plan({EVENT: 3 * STEPS})
    ledger.reserve([request(1), request(2), request(1, owner="bob")])
    ledger.reserve([request(3)])
    assert [("opening" in entry, "status" in entry) for entry in ledger.entries] == [
        (True, True),
        (False, False),
        (True, True),
        (False, False),
    ]
    assert ledger.entries[0]["status"] == "public-benchmark"
    assert ledger.entries[0]["opening"]["plan"] == [[1.0, 4.0, 3 * STEPS]]
    ledger.close()


def test_what_a_run_was_charged_already_is_part_of_its_plan_when_asked_who_is_short(ledger):
    plan = {EVENT: 3 * STEPS}
    ledger.plan(plan)
    ledger.reserve([request(1), request(2)])
    assert ledger.short_of(plan, "run") == []
    assert ledger.short_of(plan, "another") == ["ann"]
    assert (ledger.short_of(plan, "another", "ann"), ledger.short_of(plan, "another", "bob")) == (["ann"], [])


def test_charges_at_client_level_and_others_do_not_add_up_in_one_account(ledger):
    ledger.reserve([request(1)])
    assert ledger.reserve([request(2, unit="client")]) == [Refused("refused")]


LOCAL, RECORD, SIZED = ("local", "replace-one"), ("record", "add/remove"), ("record", "zero-out")


@pytest.mark.parametrize(
    ("charged", "claimed"),
    [
        ([LOCAL], LOCAL),
        ([RECORD, LOCAL], RECORD),
        ([LOCAL, RECORD, LOCAL], RECORD),
        ([RECORD, SIZED, RECORD], SIZED),
        ([SIZED, LOCAL], SIZED),
    ],
)
def test_an_account_with_charges_at_two_levels_claims_the_weaker_one(tmp_path, charged, claimed):
    ledger = open_ledger(tmp_path, 50.0)
    for number, (unit, relation) in enumerate(charged):
        assert isinstance(ledger.reserve([request(number, unit=unit, relation=relation)])[0], Granted)
    account = ledger.accounts["ann", "digits"]
    assert (account.unit, account.relation) == claimed
    ledger.close()


def test_an_owner_may_have_a_plan_of_its_own(tmp_path):
    ledger = open_ledger(tmp_path, epsilon_pld({OTHER: 2 * STEPS}, DELTA) + 1e-9)
    assert ledger.plan({EVENT: STEPS})
    assert ledger.plan({OTHER: 2 * STEPS}, "bob")
    assert not ledger.plan({OTHER: 3 * STEPS}, "eve")
    ledger.reserve([request(1), request(1, owner="bob", noise_multiplier=2.0), request(1, owner="eve")])
    plans = {owner: account.opening.plan for (owner, _), account in ledger.accounts.items()}
    assert plans == {"ann": {EVENT: STEPS}, "bob": {OTHER: 2 * STEPS}, "eve": {EVENT: STEPS}}
    ledger.close()


# Data and policies of owners.


def open_private(folder, data, **more):
    return Ledger(
        folder / "ledger.jsonl",
        Outbox(folder / "outbox"),
        epsilon=THREE_ROUNDS,
        delta=DELTA,
        status="private",
        data=data,
        **more,
    )


def test_private_data_are_refused_without_a_fingerprint_and_charged_with_one(tmp_path):
    ledger = open_private(tmp_path, {"ann": "a" * 64})
    granted, refused, server = ledger.reserve(
        [request(1), request(1, owner="bob"), request(1, owner="server", unit="client")]
    )
    assert isinstance(granted, Granted)
    assert refused == Refused("refused")
    assert isinstance(server, Granted), "the server that keeps this ledger has no records"
    assert [entry.get("data") for entry in ledger.entries] == ["a" * 64, None]
    ledger.close()


def test_data_that_changed_within_a_run_are_refused_and_between_runs_inherit_what_was_spent(tmp_path):
    ledger = open_private(tmp_path, {"ann": "a" * 64})
    ledger.reserve([request(1), request(2)])
    ledger.close()
    ledger = open_private(tmp_path, {"ann": "b" * 64})
    assert ledger.reserve([request(3)]) == [Refused("refused")]
    assert ledger.reserve([request(2)]) == [Refused("refused")], "nor is what was open taken up"
    later = [replace(request(n), run="later") for n in (1, 2)]
    assert [type(turn) for turn in ledger.reserve(later)] == [Granted, Refused], "two of three rounds were spent"
    assert ledger.accounts["ann", "digits"].history == {EVENT: 3 * STEPS}
    ledger.close()


def test_after_a_new_cohort_other_data_begin_from_nothing_and_charged_ones_are_refused_for_ever(tmp_path):
    ledger = open_private(tmp_path, {"ann": "a" * 64})
    ledger.reserve([request(n) for n in (1, 2, 3)])
    ledger.close()
    chain = Chain(tmp_path / "ledger.jsonl")
    chain.append([{"kind": "new-cohort", "owner": "ann", "source": "digits", "reason": "other patients"}])
    chain.close()
    for data, run, count in [("a", "second", 0), ("a", "run", 0), ("b", "run", 0), ("b", "third", 3)]:
        ledger = open_private(tmp_path, {"ann": data * 64})
        turns = ledger.reserve([replace(request(n, body=run), run=run) for n in (1, 2, 3, 4)])
        assert sum(isinstance(turn, Granted) for turn in turns) == count, (data, run)
        ledger.close()
    (account,), _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert (account.history, account.reserved) == ({EVENT: 3 * STEPS}, 3)
    assert [(cohort.reason, cohort.history) for cohort in account.cohorts] == [("other patients", {EVENT: 3 * STEPS})]


def test_an_owners_objection_refuses_what_is_new_and_not_what_it_answered_before(tmp_path, caplog):
    said = []

    def objection(request, account):
        said.append(account.reserved)
        return "expected less" if account.reserved >= 1 else None

    ledger = open_private(tmp_path, {"ann": "a" * 64}, objection=objection)
    key = ledger.reserve([request(1)])[0].key
    ledger.release(1, {key: b"noised"})
    assert ledger.reserve([request(1)]) == [Replay(key, b"noised")]
    assert ledger.reserve([request(2)]) == [Refused("refused")]
    assert said == [0, 1]
    assert "expected less" in caplog.text
    ledger.close()


def test_a_cohort_of_two_thousand_owners_is_one_write_and_one_fsync(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    ledger.plan({EVENT: 3 * STEPS})
    calls = []
    real_write, real_fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda d, data: (calls.append("write"), real_write(d, data))[1])
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append("fsync"), real_fsync(d))[1])
    turns = ledger.reserve([request(1, owner=f"owner-{n:04d}") for n in range(2000)])
    assert all(isinstance(turn, Granted) for turn in turns)
    assert calls == ["write", "fsync"]
    ledger.close()


def test_a_check_within_the_plan_computes_no_epsilon(ledger, monkeypatch):
    assert ledger.plan({EVENT: 3 * STEPS})
    ledger.reserve([request(1)])

    def none(*_, **__):
        raise AssertionError("expected counts to be compared")

    monkeypatch.setattr(stop_rule, "epsilon_rdp", none)
    monkeypatch.setattr(stop_rule, "reported_epsilon", none)
    assert all(isinstance(turn, Granted) for turn in ledger.reserve([request(2), request(3), request(1, owner="bob")]))


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "reserve", "mechanism": {"sample_rate": 1.0, "steps": 1}},
        {"kind": "reserve", "mechanism": {"sample_rate": 2.0, "noise_multiplier": 1.0, "steps": 1}},
        {"kind": "reserve", "mechanism": {**MECHANISM, "steps": 1}, "opening": {"plan": 3}},
        {"kind": "new-cohort"},
        {"kind": "extract", "history": [[1.0, 2.0]]},
    ],
)
def test_an_entry_that_chains_but_lacks_what_its_kind_needs_is_damage(tmp_path, broken):
    chain = Chain(tmp_path / "ledger.jsonl")
    chain.append([{"owner": "ann", "source": "digits", "key": "k", **broken}])
    chain.close()
    for read in (open_ledger, lambda folder: read_ledger(folder / "ledger.jsonl")):
        with pytest.raises(ChainDamaged, match=r"entry 0|steps|mechanism"):
            read(tmp_path)


@pytest.mark.parametrize("planned", [2, 3])
def test_a_plan_neither_adds_to_the_budget_nor_takes_from_it_while_it_lasts(tmp_path, planned):
    ledger = open_ledger(tmp_path)
    assert ledger.plan({EVENT: planned * STEPS})
    turns = [ledger.reserve([request(n)])[0] for n in range(1, 6)]
    granted = sum(isinstance(turn, Granted) for turn in turns)
    assert granted >= planned
    assert epsilon_pld({EVENT: granted * STEPS}, DELTA) <= THREE_ROUNDS
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
