"""Failures are inputs: the same seed fails in the same way, at the stated rates; the door sees real replies."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tacit.federated.admission import FrontDoor, Roster, Sent, admit, is_this_round, schema
from tacit.federated.averaging import FederatedAveraging, from_record, to_record
from tacit.federated.failures import Failures, choose, over_select
from tacit.federated.faulty_grid import DROPPED, LATE, FaultyGrid, corrupt
from tacit.federated.grid import InProcessGrid
from tacit.federated.rounds import run_rounds
from tacit.federated.update_codec import Int8, TopK

OWNERS = 20
MODEL = {
    "w": np.float32([[1.0, 2.0], [3.0, 4.0]]),
    "scale": np.float32([0.5]).reshape(()),
    "bias": np.zeros(1, np.float32),
}
INDICES = {owner + 2: owner for owner in range(OWNERS)}
WELL_FORMED = ("sign-flip", "scale", "random", "zero", "replay")
CAUGHT = ("nan", "shape", "count", "keys")


class Clients:
    """Owners whose arrays move by (round + index + 1) / 100, and what they were asked."""

    def __init__(self, codec=None):
        self.codec, self.ran = codec, []
        self.app = ClientApp()
        self.app.train()(self.train)
        self.app.evaluate()(self.evaluate)
        contexts = {node: Context(1, node, {"partition-id": i}, RecordDict(), {}) for node, i in INDICES.items()}
        self.grid = InProcessGrid(self.app, contexts)

    def train(self, message: Message, context: Context) -> Message:
        index, number = INDICES[context.node_id], message.content.config_records["config"]["server-round"]
        self.ran.append((number, index))
        step = np.float32((number + index + 1) / 100)
        before = from_record(message.content.array_records["arrays"])
        arrays = {name: np.asarray(array + step) for name, array in before.items()}
        if self.codec is not None:
            arrays = self.codec.encode({name: arrays[name] - before[name] for name in arrays}, None)[0]
        metrics = MetricRecord({"num-examples": 1, "owner": index, "server-round": number})
        return Message(RecordDict({"arrays": to_record(arrays), "metrics": metrics}), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        metrics = {"num-examples": 1, "owner": INDICES[context.node_id], "right": 1.0, "wrong": 0.0}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def questions(grid, server_round=1, kind=MessageType.TRAIN):
    content = RecordDict({"arrays": to_record(MODEL), "config": ConfigRecord({"server-round": server_round})})
    return [grid.create_message(content, kind, node, "1") for node in INDICES]


def one_round(grid, server_round=1, kind=MessageType.TRAIN):
    messages = questions(grid, server_round, kind)
    return messages, list(grid.send_and_receive(messages))


def faulty(clients=None, **settings):
    return FaultyGrid((clients or Clients()).grid, Failures(**{"seed": 7, **settings}), INDICES)


def summary(replies):
    """What a reply holds, apart from its time and identifiers."""
    return [
        (r.error.code, r.error.reason)
        if r.has_error()
        else {name: array.data for name, array in r.content.array_records["arrays"].items()}
        for r in replies
    ]


def binomial_alarm(hits, trials, share):
    """Six standard deviations: one in 5e8."""
    return abs(hits - trials * share) > 6 * math.sqrt(trials * share * (1 - share))


def test_without_failures_every_reply_is_the_grids_own():
    plain, wrapped = one_round(Clients().grid)[1], one_round(faulty())[1]
    assert summary(plain) == summary(wrapped)


@pytest.mark.parametrize("corruption", [*WELL_FORMED, *CAUGHT])
def test_the_same_seed_fails_in_the_same_way_and_another_does_not(corruption):
    settings = {"dropout": 0.3, "straggler_share": 0.4, "deadline_s": 2.0, "corrupt_share": 0.5}

    def play(seed):
        grid = faulty(corruption=corruption, seed=seed, **settings)
        return [(summary(one_round(grid, number)[1]), grid.last_round_s) for number in (1, 2, 3)]

    assert play(7) == play(7)
    assert play(7) != play(8)


def test_rates_are_as_stated_and_others_would_alarm():
    owners, rounds = 200, 20
    failures = Failures(dropout=0.3, straggler_share=0.2, seed=11)
    drops = [[failures.drops(owner, number) for owner in range(owners)] for number in range(rounds)]
    slow = sum(failures.is_slow(owner) for owner in range(5 * owners))
    assert not binomial_alarm(np.sum(drops), owners * rounds, 0.3)
    assert binomial_alarm(np.sum(drops), owners * rounds, 0.2)
    assert not binomial_alarm(slow, 5 * owners, 0.2)
    assert binomial_alarm(slow, 5 * owners, 0.3)
    # Neither an owner nor a round is struck as a whole.
    alone = [[failures.drops(owner, number) for number in range(200)] for owner in range(5)]
    assert not any(binomial_alarm(sum(row), len(row), 0.3) for row in [*alone, *drops])


def test_times_are_lognormal_and_slow_devices_stay_slow():
    failures = Failures(straggler_share=0.5, slowdown=8.0, base_seconds=3.0, jitter=0.1, seed=5)
    logs = {True: [], False: []}
    for owner in range(60):
        times = [failures.duration(owner, number) for number in range(1, 21)]
        assert len(set(times)) == len(times)
        logs[failures.is_slow(owner)] += [math.log(time / 3.0) for time in times]
    for slow, values in logs.items():
        assert np.mean(values) == pytest.approx(math.log(8.0) if slow else 0.0, abs=0.6 / math.sqrt(len(values)))
        assert np.std(values) == pytest.approx(0.1, rel=6 / math.sqrt(2 * len(values)))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.2, 4), (0.33, 7), (1.0, 20)])
def test_exactly_the_share_of_owners_is_corrupt(share, expected):
    assert len(Failures(corrupt_share=share, seed=3).corrupted(range(OWNERS))) == expected


def test_a_dropped_owner_is_sent_nothing_and_its_absence_is_a_reply():
    clients = Clients()
    messages, replies = one_round(faulty(clients, dropout=0.5))
    dropped = {INDICES[r.metadata.src_node_id] for r in replies if r.has_error()}
    assert 0 < len(dropped) < OWNERS
    assert {index for _, index in clients.ran} == set(range(OWNERS)) - dropped
    assert {r.error.code for r in replies if r.has_error()} == {DROPPED}
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert len({m.metadata.message_id for m in messages}) == OWNERS


def test_a_late_owner_has_run_and_is_not_used():
    clients = Clients()
    grid = faulty(clients, straggler_share=0.5, deadline_s=2.0, slowdown=10.0, jitter=0.05)
    late = [r for r in one_round(grid)[1] if r.has_error()]
    slow = {owner for owner in range(OWNERS) if Failures(straggler_share=0.5, seed=7).is_slow(owner)}
    assert {INDICES[r.metadata.src_node_id] for r in late} == slow
    assert {r.error.code for r in late} == {LATE}
    assert len(clients.ran) == OWNERS
    assert grid.last_round_s == 2.0


def test_a_round_lasts_as_long_as_its_slowest_reply_or_to_the_deadline():
    grid, failures = faulty(), Failures(seed=7)
    one_round(grid, 4)
    assert grid.last_round_s == max(failures.duration(owner, 4) for owner in range(OWNERS))
    grid = faulty(dropout=0.5, deadline_s=50.0)
    one_round(grid)
    assert grid.last_round_s == 50.0  # nobody knows who will not come
    grid = faulty(deadline_s=50.0)
    one_round(grid)
    assert 0.0 < grid.last_round_s < 50.0
    assert Failures(dropout=1.0, seed=7).round_seconds(range(3), 1) == 0.0


def test_evaluations_are_dropped_but_neither_late_nor_corrupt():
    grid = faulty(dropout=0.5, straggler_share=1.0, deadline_s=0.01, corrupt_share=1.0)
    _, replies = one_round(grid, kind=MessageType.EVALUATE)
    assert {r.error.code for r in replies if r.has_error()} == {DROPPED}
    assert any(r.has_content() for r in replies)
    assert grid.last_round_s == 0.0


def test_replies_can_be_pushed_and_pulled_each_once():
    settings = {"dropout": 0.3, "straggler_share": 0.5, "deadline_s": 2.0, "corrupt_share": 0.3, "corruption": "zero"}
    expected = summary(one_round(faulty(**settings))[1])
    grid = faulty(**settings)
    messages = questions(grid)
    names = list(grid.push_messages(messages))
    assert names == [m.metadata.message_id for m in messages]
    replies = [*grid.pull_messages(names[:5]), *grid.pull_messages(names[5:])]
    replies.sort(key=lambda r: names.index(r.metadata.reply_to_message_id))
    assert summary(replies) == expected
    assert list(grid.pull_messages(names)) == []


DOOR = FrontDoor(expected=schema(MODEL), owners=OWNERS, metrics={"server-round": is_this_round})


@pytest.mark.parametrize("corruption", [*WELL_FORMED, *CAUGHT])
def test_every_corruption_is_caught_at_the_door_or_is_a_well_formed_reply(corruption):
    grid = faulty(corrupt_share=0.3, corruption=corruption)
    corrupted = Failures(corrupt_share=0.3, seed=7).corrupted(range(OWNERS))
    honest = summary(one_round(Clients().grid, 2)[1])
    for number in (1, 2):
        messages, replies = one_round(grid, number)
        result = admit(replies, Sent.of(messages, number), Roster(dict(INDICES), closed=True), DOOR)
        aside = {INDICES[node] for node in result.aside}
        assert aside == (corrupted if corruption in CAUGHT else set())
        assert len(result.replies) == OWNERS - len(aside)
    if corruption != "count":
        changed = {i for i, (got, want) in enumerate(zip(summary(replies), honest, strict=True)) if got != want}
        assert changed == corrupted


@pytest.mark.parametrize(
    ("kind", "expected"), [("sign-flip", [-1.0, 0.0]), ("scale", [21.0, 22.0]), ("zero", [1.0, 2.0])]
)
def test_updates_are_altered_about_the_model_that_was_sent(kind, expected):
    update, origin = {"w": np.float32([3.0, 4.0])}, {"w": np.float32([1.0, 2.0])}
    assert corrupt(update, origin, kind, scale=10.0, seed=1)["w"].tolist() == expected


def test_random_updates_have_the_stated_size_and_no_direction():
    origin = {"w": np.full(10_000, 5.0, np.float32)}
    update = {"w": origin["w"] + np.float32(0.1)}
    step = corrupt(update, origin, "random", scale=10.0, seed=1)["w"] - origin["w"]
    assert np.std(step) == pytest.approx(1.0, rel=0.05)
    assert abs(np.mean(step)) < 0.06


def test_integers_and_empty_arrays_are_left_as_they_are():
    update = {"codes": np.int8([1, 2]), "none": np.zeros((0, 2), np.float32)}
    for kind in WELL_FORMED:
        altered = corrupt(update, {}, kind, scale=10.0, seed=1)
        assert altered["codes"].tolist() == [1, 2]
        assert altered["none"].shape == (0, 2)


@pytest.mark.parametrize("codec", [TopK(0.4), Int8()], ids=["top-k", "8-bit"])
@pytest.mark.parametrize(("corruption", "factor"), [("sign-flip", -1), ("scale", 3), ("zero", 0), ("replay", 1)])
def test_with_a_codec_the_decoded_update_is_altered(codec, corruption, factor):
    failures = Failures(corrupt_share=1.0, corruption=corruption, corruption_scale=3.0, seed=7)
    grid = FaultyGrid(Clients(codec).grid, failures, INDICES, codec)
    replies = [one_round(grid, number)[1] for number in (1, 2)][-1]
    honest = one_round(Clients(codec).grid, 1 if corruption == "replay" else 2)[1]
    for got, want in zip(replies, honest, strict=True):
        altered, update = (codec.decode(from_record(r.content.array_records["arrays"]), MODEL) for r in (got, want))
        assert all(np.allclose(altered[name], factor * update[name], rtol=0.02) for name in MODEL)


@pytest.mark.parametrize("codec", [TopK(0.4), Int8()], ids=["top-k", "8-bit"])
@pytest.mark.parametrize("corruption", [*WELL_FORMED, *CAUGHT])
def test_the_door_sees_corrupt_wires_too(codec, corruption):
    grid = FaultyGrid(Clients(codec).grid, Failures(corrupt_share=0.3, corruption=corruption, seed=7), INDICES, codec)
    door = FrontDoor.of_training(
        codec.wire_like(MODEL), owners=OWNERS, unit="record", decode=lambda wire: codec.decode(wire, MODEL)
    )
    for number in (1, 2):
        messages, replies = one_round(grid, number)
        result = admit(replies, Sent.of(messages, number), Roster(dict(INDICES), closed=True), door)
        assert len(result.aside) == (6 if corruption in CAUGHT else 0)


def test_a_run_goes_on_through_dropouts_and_deadlines():
    clients = Clients()
    grid = faulty(clients, dropout=0.3, straggler_share=0.2, deadline_s=2.0)
    reports = []
    run_rounds(
        FederatedAveraging(rounds=3),
        grid,
        to_record(MODEL),
        rounds=3,
        first_round=1,
        quorum=1,
        config={"run": "r"},
        on_round=lambda report, record: reports.append(report),
    )
    assert [report.clients + sum(report.refusals.values()) for report in reports] == [OWNERS] * 3
    assert {reason for report in reports for reason in report.refusals} == {"dropped", "late"}
    dropped = sum(report.refusals["dropped"] for report in reports)
    assert len(clients.ran) == 3 * OWNERS - dropped


def test_the_grid_is_otherwise_the_wrapped_one():
    clients = Clients()
    grid = faulty(clients)
    assert list(grid.get_node_ids()) == list(clients.grid.get_node_ids())
    with pytest.raises(RuntimeError, match="set_run"):
        _ = grid.run
    with pytest.raises(ValueError, match="node=2"):
        list(FaultyGrid(clients.grid, Failures(seed=7), {}).send_and_receive(questions(grid)))
    with pytest.raises(ValueError, match="server-round"):
        list(grid.send_and_receive([grid.create_message(RecordDict(), MessageType.TRAIN, 2, "1")]))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"straggler_share": 1.1},
        {"corrupt_share": 2.0},
        {"slowdown": 0.5},
        {"jitter": float("inf")},
        {"base_seconds": 0.0},
        {"deadline_s": -1.0},
        {"corruption": "unknown"},
        {"corruption_scale": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Failures(**{"seed": 7, **changes})


def test_a_choice_of_owners_is_public_uniform_and_changes_with_the_round():
    rounds, count = 600, 5
    chosen = [choose(range(OWNERS), count, seed=7, server_round=number) for number in range(rounds)]
    assert all(len(set(owners)) == count and owners == sorted(owners) for owners in chosen)
    tally = np.bincount(np.ravel(chosen), minlength=OWNERS)
    assert not any(binomial_alarm(hits, rounds, count / OWNERS) for hits in tally)
    assert len({tuple(owners) for owners in chosen}) > rounds / 2
    assert choose([], 0, seed=7, server_round=1) == []
    with pytest.raises(ValueError, match="count=21"):
        choose(range(OWNERS), 21, seed=7, server_round=1)


def test_over_selection_rounds_up_what_is_more_than_an_artefact():
    assert over_select(100, 1.1, 500) == 110
    assert over_select(10, 1.11, 100) == 12
    assert over_select(10, 1.11, 11) == 11


@pytest.mark.parametrize(("count", "factor"), [(0, 1.0), (11, 1.0), (5, 0.9), (5, float("nan"))])
def test_impossible_over_selection_is_refused(count, factor):
    with pytest.raises(ValueError, match="expected"):
        over_select(count, factor, 10)
