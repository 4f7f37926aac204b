"""Flower's Grid inside one process: no ports, no Ray, no start-up; the same apps."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["CLIENT_APP_RAISED", "InProcessGrid", "Joint", "Transaction", "quiet_flower"]

CLIENT_APP_RAISED = 2  # Flower's own code for a ClientApp that raised
_SERVER_NODE = 1


class Transaction(Protocol):
    """Wraps a cohort's work, so that what it needs on disk is written once for all clients."""

    def begin(self, work: Iterable[tuple[Message, Context]]) -> None:
        """Before any client runs."""
        ...

    def commit(self) -> None:
        """After all have run, before the last replies are seen."""
        ...

    def commit_if_much(self) -> bool:
        """Between two clients; whether replies so far are on disk now, being too large to wait for the others."""
        ...


class Joint(Protocol):
    """What clients have in common may be computed for all of them at once."""

    def answer(self, work: Sequence[tuple[Message, Context]]) -> Sequence[Message] | None:
        """After `begin`: the replies, or None where each client is still to be asked."""
        ...


class InProcessGrid(Grid):
    """Runs a ClientApp for each message, one after another, in the order of the nodes."""

    def __init__(
        self,
        client_app: ClientApp,
        contexts: Mapping[int, Context],
        transaction: Transaction | None = None,
        joint: Joint | None = None,
    ) -> None:
        """Connects nodes.

        Args:
            client_app: the app that every node runs.
            contexts: node id → its context; ids above 1.
            transaction: wraps each cohort, or None.
            joint: takes part of a cohort's work at once, or None.
        """
        self._client_app, self._contexts, self._transaction = client_app, dict(contexts), transaction
        self._joint = joint
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None
        # Message(...) reads these; in a Flower process the runtime sets them.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, _SERVER_NODE

    def set_run(self, run: Run) -> None:
        """Sets the run that `run` returns."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        if self._run is None:
            raise RuntimeError("expected set_run before run; an in-process grid has no run of its own")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in order."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs the clients and keeps their replies for `pull_messages`."""
        replies = list(self.send_and_receive(messages))
        identifiers = [reply.metadata.reply_to_message_id for reply in replies]
        self._replies.update(zip(identifiers, replies, strict=True))
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Runs the clients and gives their replies, in the order of the messages: each runs when its reply is due.

        The timeout is not needed: in one process a client cannot be silent.
        """
        work = [(message, self._contexts[message.metadata.dst_node_id]) for message in messages]
        for message, _ in work:
            # Flower has no setter: its own link writes the same field.
            message.metadata.__dict__["_message_id"] = secrets.token_hex(16)
        if self._transaction is not None:
            self._transaction.begin(work)
        joint = None if self._joint is None else self._joint.answer(work)
        if joint is None:
            return self._one_by_one(work)
        if self._transaction is not None:
            self._transaction.commit()
        return joint

    def _one_by_one(self, work: Sequence[tuple[Message, Context]]) -> Iterator[Message]:
        """Replies, as soon as they may leave."""
        waiting: deque[Message] = deque()
        for message, context in work:
            waiting.append(self._answer(message, context))
            if self._transaction is None or self._transaction.commit_if_much():
                while waiting:
                    yield waiting.popleft()
        if self._transaction is not None:
            self._transaction.commit()
        while waiting:
            yield waiting.popleft()

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            return self._client_app(message, context)
        except Exception as error:  # noqa: BLE001  # as Flower does: a client's failure is a reply, not the run's end
            return Message(Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def quiet_flower() -> None:
    """Keeps Flower's own log lines off the console; ours carry the progress."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
