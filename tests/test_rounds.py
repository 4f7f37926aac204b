"""The round loop with our strategy and with Flower's own, over an in-process grid."""

import logging
import random

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from tacit.federated.averaging import FederatedAveraging, from_record, to_record
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.rounds import FederationFailed, RoundReport, run_rounds

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
