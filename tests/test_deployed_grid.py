"""Who a deployed server asks, and what becomes of a node that is started anew in the middle of a round."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from safetensors.numpy import load, save

from tacit.edge import deployed_grid
from tacit.edge.deployed_grid import DeployedGrid
from tacit.federated.averaging import FederatedAveraging
from tacit.federated.grid import InProcessGrid
from tacit.federated.roster import Roster, Sent
from tacit.federated.scaffold import ControlVariates


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


@dataclass
class Nodes:
    """Names and starts of nodes, and which of them have lost what they were asked."""

    names: dict[int, str]
    started: dict[int, str] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)


class Network(InProcessGrid):
    """Nodes that can be away: a message to one that is silent is lost."""

    def __init__(self, nodes: Nodes) -> None:
        contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in nodes.names}
        super().__init__(echo(), contexts)
        self.nodes, self.pushed, self.looks = nodes, list[int](), 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looks += 1
        return [
            NodeInfo(node_id=node, name=name, last_activated_at=self.nodes.started.get(node, "first"))
            for node, name in self.nodes.names.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        self.pushed += [message.metadata.dst_node_id for message in asked]
        for message in asked:
            (reply,) = self.send_and_receive([message])
            if message.metadata.dst_node_id not in self.nodes.silent:
                self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in asked]


def asked(grid: Network, nodes: Iterable[int]) -> list[Message]:
    return [grid.create_message(RecordDict(), "train", node, "1") for node in nodes]


def test_only_a_node_registered_under_an_owners_name_and_no_second_one_is_asked():
    network = Network(Nodes({11: "ben", 12: "stranger", 13: "anna", 14: "carl", 15: "carl", 16: ""}))
    roster = Roster()
    grid = DeployedGrid(network, ["anna", "ben", "carl"], roster)
    assert list(grid.get_node_ids()) == [11, 13]
    assert roster.state() == {11: 1, 13: 0}
    assert roster.closed
    assert roster.complaint(12, 2) == "is not on the roster"
    assert roster.complaint(11, 0) == "speaks for another owner than before"


def test_without_names_every_node_is_asked_as_by_flowers_own_grid():
    roster = Roster()
    assert list(DeployedGrid(Network(Nodes({11: "", 12: "x"})), [], roster).get_node_ids()) == [11, 12]
    assert not roster.closed


def test_an_owner_whose_node_was_registered_anew_speaks_through_the_new_one():
    nodes = Nodes({11: "anna"})
    roster = Roster({11: 0})
    grid = DeployedGrid(Network(nodes), ["anna"], roster)
    nodes.names = {21: "anna"}
    assert list(grid.get_node_ids()) == [21]
    assert roster.state() == {21: 0}


def test_a_node_that_is_started_anew_is_asked_again_and_its_answer_answers_the_first_question(monkeypatch):
    monkeypatch.setattr(deployed_grid, "_LOOK_S", 0.0)
    nodes = Nodes({11: "anna", 12: "ben"}, silent={12})
    network = Network(nodes)
    grid = DeployedGrid(network, ["anna", "ben"], Roster(), poll_s=0.001)
    questions = asked(network, [11, 12])

    def come_back() -> None:
        nodes.started[12], nodes.silent = "second", set()

    network.get_nodes = after(network.get_nodes, 4, come_back)  # type: ignore[method-assign]  # on the fourth look
    replies = list(grid.send_and_receive(questions, timeout=5.0))
    assert network.pushed == [11, 12, 12]
    sent = Sent.of(questions, 1)
    assert [sent.complaint(reply) for reply in replies] == [None, None]
    assert sorted(reply.metadata.src_node_id for reply in replies) == [11, 12]


def after(look, count, happens):
    seen = iter(range(count))

    def looked():
        if next(seen, None) is None:
            happens()
        return look()

    return looked


def test_a_node_that_stays_is_asked_once_and_one_that_stays_away_costs_the_time_that_was_given(monkeypatch):
    monkeypatch.setattr(deployed_grid, "_LOOK_S", 0.0)
    network = Network(Nodes({11: "anna", 12: "ben"}, silent={12}))
    grid = DeployedGrid(network, ["anna", "ben"], Roster(), poll_s=0.001)
    replies = list(grid.send_and_receive(asked(network, [11, 12]), timeout=0.2))
    assert [reply.metadata.src_node_id for reply in replies] == [11]
    assert network.pushed == [11, 12]


def test_a_node_that_the_superlink_gives_up_has_not_answered_and_is_not_waited_for():
    network = Network(Nodes({11: "anna", 12: "ben"}))
    questions = asked(network, [11, 12])
    network.pull_messages = lambda ids: [  # type: ignore[method-assign]  # Flower's error has its own node's number
        given_up(reply) if reply.metadata.src_node_id == 12 else reply for reply in Network.pull_messages(network, ids)
    ]
    replies = list(DeployedGrid(network, ["anna", "ben"], None).send_and_receive(questions, timeout=60.0))
    assert [reply.metadata.src_node_id for reply in replies] == [11]


def given_up(reply: Message) -> Message:
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


def test_nobody_to_ask_is_no_wait():
    network = Network(Nodes({11: "anna"}))
    assert list(DeployedGrid(network, ["anna"], None).send_and_receive([])) == []


@pytest.mark.parametrize("owners", [["anna"], []])
def test_an_answer_of_nobody_that_was_asked_is_left_out(owners):
    network = Network(Nodes({11: "anna"}))
    grid = DeployedGrid(network, owners, None)
    (question,) = asked(network, [11])
    network.pull_messages = lambda ids: [  # type: ignore[method-assign]  # answers more than it was asked
        *Network.pull_messages(network, ids),
        *([] if not ids else [foreign(network)]),
    ]
    assert len(list(grid.send_and_receive([question], timeout=1.0))) == 1


def foreign(network: Network) -> Message:
    (reply,) = network.send_and_receive(asked(network, [11]))
    return reply


def test_what_a_strategy_remembers_holds_node_ids_as_large_as_flowers():
    largest = 2**64 - 1

    def fresh() -> FederatedAveraging:
        variates = ControlVariates(owners=2, scale=0.5, shared={"w": np.float32([1.0])})
        return FederatedAveraging(rounds=2, variates=variates)

    strategy, again = fresh(), fresh()
    strategy._owner_of = {largest: 1, 7: 0}
    again.restore(load(save(dict(strategy.state()))))
    assert again._owner_of == {largest: 1, 7: 0}
