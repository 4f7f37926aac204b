"""The grid of a deployed server: only nodes that were registered under an owner's name, and answers as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from tacit.federated.replies import array_bytes
from tacit.federated.roster import Roster

__all__ = ["DeployedGrid"]

_PULLED_BYTES = 2**25
_LOOK_S = 2.0  # between two looks at which nodes were started anew


class DeployedGrid(Grid):
    """A Flower grid that reaches the owners of a deployment and nobody else.

    Node ids are made at registration, so which node is whose is known by the name that it was registered under. A node
    of another name, or one of two of the same name, is neither asked nor counted. Flower's own grid looks for answers
    every 3 s; this one every quarter of a second.

    Attributes:
        roster: told which node speaks for which owner before anybody is asked; None where it means nothing.
    """

    def __init__(self, grid: Grid, owners: Sequence[str], roster: Roster | None, *, poll_s: float = 0.25) -> None:
        """Wraps a grid.

        Args:
            grid: Flower's.
            owners: names in the order of their indices; empty to reach every node, as Flower's grid does.
            roster: as above.
            poll_s: how often to look for answers.
        """
        self.roster = roster
        self._grid, self._owners, self._poll_s = grid, list(owners), poll_s

    @property
    def run(self) -> Run:
        """As Flower's."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that speak for an owner."""
        nodes = list(self._grid.get_nodes())
        if not self._owners:
            return nodes
        names = [node.name for node in nodes]
        known = [node for node in nodes if node.name in self._owners and names.count(node.name) == 1]
        if self.roster is not None:
            self.roster.closed = True
            for node in known:
                self._bind(self.roster, node.node_id, self._owners.index(node.name))
        return known

    def get_node_ids(self) -> Iterable[int]:
        """Their ids."""
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends, and gives answers as they come until all have answered or the time is over.

        A node that was started anew has lost what it was asked, so it is asked again: the owner's ledger knows the
        request, and answers with the same bytes or, where none had left, at the same charge.
        """
        asked = list(messages)
        activated = self._activations()
        questions = dict(zip(self.push_messages(asked), asked, strict=True))  # id under which it was sent → question
        # Answers are as large as their questions: of large ones few are pulled at a time.
        at_once = max(1, _PULLED_BYTES // max([1, *map(array_bytes, asked[:1])]))
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._answers(questions, activated, deadline, at_once)

    def _answers(
        self, questions: dict[str, Message], activated: dict[int, str], deadline: float | None, at_once: int
    ) -> Iterator[Message]:
        looked = time.monotonic()
        while questions and (deadline is None or time.monotonic() < deadline):
            for some in _in_pieces(list(questions), at_once):
                pulled = deque(self.pull_messages(some))
                while pulled:
                    reply = pulled.popleft()
                    question = questions.get(reply.metadata.reply_to_message_id)
                    if question is None:
                        continue
                    reply.metadata.__dict__["_reply_to_message_id"] = question.metadata.message_id
                    questions = {sent: other for sent, other in questions.items() if other is not question}
                    if reply.metadata.src_node_id == question.metadata.dst_node_id:
                        yield reply  # else the SuperLink's own word that the node is gone: no answer
                    del reply
            if questions and time.monotonic() - looked >= _LOOK_S:
                looked, before, activated = time.monotonic(), activated, self._activations()
                restarted = {node for node, since in activated.items() if before.get(node, since) != since}
                activated = {**before, **activated}  # one that is away now is known when it comes back
                questions |= self._ask_again(questions, restarted)
            if questions:
                time.sleep(self._poll_s)

    def _activations(self) -> dict[int, str]:
        """When each node was started."""
        return {node.node_id: node.last_activated_at for node in self.get_nodes()}

    def _ask_again(self, questions: Mapping[str, Message], restarted: set[int]) -> dict[str, Message]:
        again = {id(q): q for q in questions.values() if q.metadata.dst_node_id in restarted}
        copies = [
            Message(
                question.content,
                question.metadata.dst_node_id,
                question.metadata.message_type,
                group_id=question.metadata.group_id,
                ttl=question.metadata.ttl,
            )
            for question in again.values()
        ]
        return dict(zip(self.push_messages(copies), again.values(), strict=True)) if copies else {}

    @staticmethod
    def _bind(roster: Roster, node: int, index: int) -> None:
        """An owner whose node was registered anew speaks through the new one."""
        for other in [known for known, owner in roster.indices.items() if owner == index and known != node]:
            del roster.indices[other]
        roster.learn(node, index)


def _in_pieces(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
