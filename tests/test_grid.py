"""An in-process grid does what Flower's own does: one reply for each message, errors included."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tacit.federated.averaging import from_record, to_record
from tacit.federated.grid import CLIENT_APP_RAISED, InProcessGrid

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


def make_grid(nodes=(2, 3, 4), *, broken=(), transaction=None):
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in nodes}
    return InProcessGrid(adding_app(broken=broken), contexts, transaction)


def message(grid, node):
    content = RecordDict({"arrays": to_record(START), "config": ConfigRecord({})})
    return grid.create_message(content, MessageType.TRAIN, node, "1")


def test_each_message_gets_its_own_reply_in_order():
    grid = make_grid()
    sent = [message(grid, node) for node in (4, 2, 3, 2)]
    replies = list(grid.send_and_receive(sent))
    assert [r.metadata.src_node_id for r in replies] == [4, 2, 3, 2]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in sent]
    assert len({m.metadata.message_id for m in sent}) == 4
    assert [from_record(r.content.array_records["arrays"])["w"][0] for r in replies] == [4, 2, 3, 2]


def test_replies_can_be_pushed_and_pulled_each_once():
    grid = make_grid()
    names = list(grid.push_messages([message(grid, 2), message(grid, 3)]))
    (second,) = grid.pull_messages(names[1:])
    assert second.metadata.src_node_id == 3
    assert [r.metadata.src_node_id for r in grid.pull_messages(names)] == [2]
    assert list(grid.pull_messages(names)) == []


def test_a_client_that_raises_is_an_error_reply_and_the_others_go_on():
    grid = make_grid(broken=(3,))
    good, bad = grid.send_and_receive([message(grid, 2), message(grid, 3)])
    assert good.has_content()
    assert (bad.error.code, bad.error.reason) == (CLIENT_APP_RAISED, "RuntimeError: disk on fire")


class Recorded:
    """A transaction that writes down when it is called."""

    def __init__(self, fails=False, much=False):
        self.events, self.fails, self.much = [], fails, much

    def commit_if_much(self):
        self.events.append("look")
        return self.much

    def begin(self, work):
        self.events.append(("begin", [context.node_id for _, context in work]))

    def commit(self):
        self.events.append("commit")
        if self.fails:
            raise OSError("disk full")


def test_a_transaction_wraps_each_cohort():
    transaction = Recorded()
    grid = make_grid(transaction=transaction)
    for _ in range(2):
        assert len(list(grid.send_and_receive([message(grid, node) for node in (2, 3, 4)]))) == 3
    assert transaction.events == [("begin", [2, 3, 4]), "look", "look", "look", "commit"] * 2


def noting_app(ran):
    app = ClientApp()

    @app.train()
    def train(message, context):
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    return app


def test_a_client_runs_when_its_reply_is_due_where_nothing_waits_for_the_others():
    for transaction in (None, Recorded(much=True)):
        ran = []
        contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in (2, 3)}
        grid = InProcessGrid(noting_app(ran), contexts, transaction)
        replies = iter(grid.send_and_receive([message(grid, 2), message(grid, 3)]))
        assert ran == []
        assert next(replies).has_content()
        assert ran == [2]
        assert (len(list(replies)), ran) == (1, [2, 3])


def test_what_waits_for_its_commit_is_not_seen_before():
    ran, transaction = [], Recorded()
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in (2, 3)}
    grid = InProcessGrid(noting_app(ran), contexts, transaction)
    next(iter(grid.send_and_receive([message(grid, 2), message(grid, 3)])))
    assert (ran, transaction.events[-1]) == ([2, 3], "commit")


def test_no_reply_is_seen_when_the_transaction_fails_to_commit():
    grid = make_grid(transaction=Recorded(fails=True))
    with pytest.raises(OSError, match="disk full"):
        grid.push_messages([message(grid, 2)])
    assert grid._replies == {}


def test_a_run_must_be_set_before_it_is_asked_for():
    with pytest.raises(RuntimeError, match="set_run"):
        _ = make_grid().run
