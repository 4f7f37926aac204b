"""The round loop with our strategy and with Flower's own, over an in-process grid."""

import logging
import random

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from tacit.federated.admission import FrontDoor, schema
from tacit.federated.averaging import FederatedAveraging, from_record, to_record
from tacit.federated.doors import Doors
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.roster import Roster
from tacit.federated.rounds import FederationFailed, RoundReport, run_rounds, wait_for

START = {"w": np.zeros(3, np.float32)}


def adding_app(*, broken=()):
    """Each node adds its number to the model; the broken ones raise."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_id in broken:
            raise RuntimeError("disk on fire")
        arrays = from_record(message.content.array_records["arrays"])
        moved = {name: array + np.float32(context.node_id) for name, array in arrays.items()}
        metrics = MetricRecord({"num-examples": 1, "owner": context.node_id})
        return Message(RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message)

    return app


def make_grid(nodes=(2, 3, 4), *, broken=()):
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in nodes}
    return InProcessGrid(adding_app(broken=broken), contexts)


def rounds(strategy, grid, **changed):
    reports = []
    settings = {"rounds": 3, "first_round": 1, "quorum": 1, "config": {"run": "r"}}
    record = run_rounds(
        strategy,
        grid,
        to_record(START),
        on_round=lambda report, arrays: reports.append((report, from_record(arrays)["w"][0])),
        **{**settings, **changed},
    )
    return float(from_record(record)["w"][0]), reports


def test_rounds_with_our_strategy_add_up():
    final, reports = rounds(FederatedAveraging(rounds=3), make_grid())
    assert final == pytest.approx(9.0)  # the mean of 2, 3 and 4, three times
    assert [weight for _, weight in reports] == pytest.approx([3.0, 6.0, 9.0])
    assert [(r.round, r.clients, r.refusals) for r, _ in reports] == [(1, 3, {}), (2, 3, {}), (3, 3, {})]
    assert all(isinstance(r, RoundReport) and r.wall_s >= 0 for r, _ in reports)


def test_rounds_with_flowers_own_fedavg_give_the_same(caplog):
    random.seed(0)
    quiet_flower()
    strategy = FedAvg(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)
    final, reports = rounds(strategy, make_grid())
    assert final == pytest.approx(9.0)
    assert [report.clients for report, _ in reports] == [3, 3, 3]
    assert logging.getLogger("flwr").level == logging.ERROR


def test_an_owner_that_fails_is_counted_and_left_out():
    final, reports = rounds(FederatedAveraging(rounds=1), make_grid(broken=(4,)), rounds=1, quorum=2)
    assert final == pytest.approx(2.5)
    assert reports[0][0].refusals == {"RuntimeError: disk on fire": 1}


@pytest.mark.parametrize("strategy", [FederatedAveraging(rounds=3), FedAvg(min_train_nodes=3, min_available_nodes=3)])
def test_fewer_owners_than_the_quorum_end_the_run_with_the_counts(strategy):
    grid = make_grid(broken=(3, 4))
    with pytest.raises(FederationFailed, match=r"at least 2 owners in round 1, got 1 \(2 RuntimeError: disk on fire\)"):
        rounds(strategy, grid, quorum=2)


def test_a_federation_without_owners_fails_with_no_reply():
    with pytest.raises(FederationFailed, match=r"got 0 \(no reply\)"):
        rounds(FederatedAveraging(rounds=3), make_grid(()))


def test_a_resumed_run_does_the_rounds_that_are_left():
    _, reports = rounds(FederatedAveraging(rounds=3), make_grid(), first_round=3)
    assert [report.round for report, _ in reports] == [3]


def test_a_run_that_was_finished_does_nothing_and_returns_its_model():
    final, reports = rounds(FederatedAveraging(rounds=3), make_grid(), first_round=4)
    assert (final, reports) == (0.0, [])


class Unavailable:
    """A grid whose owners have lost what they owe for the rounds named."""

    def __init__(self, grid, lost):
        self.grid, self.lost = grid, lost

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].content.config_records["config"]["server-round"] in self.lost:
            return [Message(Error(4, "unavailable"), reply_to=message) for message in messages]
        return self.grid.send_and_receive(messages, timeout=timeout)

    def __getattr__(self, name):
        return getattr(self.grid, name)


def test_a_resumed_run_leaves_out_the_round_that_nobody_can_answer_any_more_and_says_so():
    final, reports = rounds(FederatedAveraging(rounds=3), Unavailable(make_grid(), {2}), first_round=2, skip_lost=True)
    assert [(report.round, report.clients, report.left_out) for report, _ in reports] == [(2, 0, True), (3, 3, False)]
    assert [weight for _, weight in reports] == [0.0, 3.0]
    assert reports[0][0].refusals == {"unavailable": 3}
    assert final == 3.0


@pytest.mark.parametrize(("first_round", "skip_lost"), [(1, True), (2, False)], ids=["later round", "not resumed"])
def test_any_other_round_that_nobody_answers_ends_the_run(first_round, skip_lost):
    grid = Unavailable(make_grid(), {2})
    with pytest.raises(FederationFailed, match="3 unavailable"):
        rounds(FederatedAveraging(rounds=3), grid, first_round=first_round, skip_lost=skip_lost)


# The front door, and who is there.


def lying_app(answers):
    """Nodes move the model by their number; some change what they say."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = {"w": np.full(3, context.node_id, np.float32)}
        metrics = {"num-examples": 1, "owner": context.node_id - 2, "server-round": 1}
        arrays, metrics = answers.get(context.node_id, lambda a, m: (a, m))(arrays, metrics)
        return Message(RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def doors(owners=4):
    training = FrontDoor.of_training(schema(START), owners=owners, unit="none")
    roster = Roster({n + 2: n for n in range(owners)}, closed=True)
    return Doors(training=training, evaluation=FrontDoor.of_evaluation(owners=owners), roster=roster)


LIES = {
    "nan": lambda arrays, metrics: ({"w": np.full(3, np.nan, np.float32)}, metrics),
    "broadcast": lambda arrays, metrics: ({"w": np.float32([9.0])}, metrics),
    "count": lambda arrays, metrics: (arrays, {**metrics, "num-examples": 10**9}),
    "owner": lambda arrays, metrics: (arrays, {**metrics, "owner": 0}),
    "round": lambda arrays, metrics: (arrays, {**metrics, "server-round": 7}),
    "more": lambda arrays, metrics: ({**arrays, "v": arrays["w"]}, metrics),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_not_as_the_servers_model_says_is_set_aside_and_the_round_goes_on(lie):
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in (2, 3, 4, 5)}
    grid = InProcessGrid(lying_app({5: LIES[lie]}), contexts)
    final, reports = rounds(FederatedAveraging(rounds=1), grid, rounds=1, quorum=3, doors=doors())
    assert final == pytest.approx(3.0)
    assert list(reports[0][0].aside) == [5]
    assert reports[0][0].clients == 3


def test_too_many_set_aside_end_the_run_and_are_counted():
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in (2, 3, 4)}
    grid = InProcessGrid(lying_app({3: LIES["nan"], 4: LIES["count"]}), contexts)
    with pytest.raises(FederationFailed, match="2 set aside"):
        rounds(FederatedAveraging(rounds=1), grid, rounds=1, quorum=2, doors=doors())


def test_bytes_of_arrays_are_counted_both_ways():
    _, reports = rounds(FederatedAveraging(rounds=1), make_grid(), rounds=1)
    one = len(to_record(START)["w"].data)
    assert (reports[0][0].bytes_down, reports[0][0].bytes_up) == (3 * one, 3 * one)


class Arriving:
    """A grid of which one more node can be reached at each look."""

    def __init__(self):
        self.looks = 0

    def get_node_ids(self):
        self.looks += 1
        return range(self.looks)


def test_a_round_waits_for_owners_and_counts_down():
    said = []
    wait_for(Arriving(), 3, 60.0, said.append, poll_s=0.0)
    assert [text.partition(",")[0] for text in said] == [
        "waiting for owners: 1 of 3",
        "waiting for owners: 2 of 3",
    ]


def test_waiting_ends_and_says_how_many_came():
    with pytest.raises(FederationFailed, match=r"at least 4 owners to be reachable, got 3 after 0 s"):
        wait_for(make_grid(), 4, 0.0, lambda text: None)
