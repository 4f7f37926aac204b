"""Who was asked what, and which node speaks for which owner: what a reply's sender is held to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

__all__ = ["Roster", "Sent"]


@dataclass
class Sent:
    """What the server asked, and what of it was answered.

    Attributes:
        asked: message id → (node id, round).
        answered: ids whose node has answered, well or badly; each is answered once.
    """

    asked: Mapping[str, tuple[int, int]]
    answered: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, messages: Iterable[Message], server_round: int) -> Sent:
        """Messages that a grid has sent: before, they have no id.

        Args:
            messages: a round's.
            server_round: from 1.
        """
        metadata = (message.metadata for message in messages)
        return cls({m.message_id: (m.dst_node_id, server_round) for m in metadata if m.message_id})

    def complaint(self, reply: Message) -> str | None:
        """Why a reply answers no open question of the server's; None where it does."""
        identifier = reply.metadata.reply_to_message_id
        if not isinstance(identifier, str) or identifier not in self.asked:
            return "answers no message of this round"
        if reply.metadata.src_node_id != self.asked[identifier][0]:
            return "answers a message that another node was sent"
        return "answers a message a second time" if identifier in self.answered else None

    def take(self, reply: Message) -> None:
        """Closes the question that a reply answers."""
        if self.complaint(reply) is None:
            self.answered.add(reply.metadata.reply_to_message_id)

    def round_of(self, reply: Message) -> int:
        """The round of the question that a reply answers."""
        return self.asked[reply.metadata.reply_to_message_id][1]


@dataclass
class Roster:
    """Which node speaks for which owner: one node each, and it stays that way.

    Give the binding up front and close the roster wherever it is known. An open one believes whoever comes first, and
    then a reply's fate depends on other nodes' replies, and its state tells who has answered: under unit client it must
    be closed.

    Attributes:
        indices: node id → owner index.
        closed: whether other nodes are set aside.

    >>> roster = Roster({7: 0})
    >>> roster.learn(8, 1)
    >>> roster.complaint(8, 1), roster.complaint(8, 0), roster.complaint(9, 1)
    (None, 'speaks for another owner than before', 'speaks for an owner that another node speaks for')
    """

    indices: dict[int, int] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        if len(set(self.indices.values())) < len(self.indices):
            raise ValueError("expected one node for each owner, got an owner with two; give each node an owner's index")

    def complaint(self, node: int, index: int) -> str | None:
        """Why a node may not speak for an owner; None where it may."""
        if node in self.indices:
            return None if self.indices[node] == index else "speaks for another owner than before"
        if self.closed:
            return "is not on the roster"
        taken = index in self.indices.values()
        return "speaks for an owner that another node speaks for" if taken else None

    def learn(self, node: int, index: int) -> None:
        """Remembers an admitted node."""
        self.indices[node] = index

    def state(self) -> dict[int, int]:
        """What a checkpoint keeps: node id → owner index."""
        return dict(self.indices)

    def restore(self, state: Mapping[int, int] | Mapping[str, int]) -> None:
        """Takes up what `state` kept; JSON makes strings of the keys.

        Raises:
            ValueError: two nodes for one owner.

        >>> roster = Roster()
        >>> roster.restore({"7": 0})
        >>> roster.state()
        {7: 0}
        """
        self.indices = Roster({int(node): int(index) for node, index in state.items()}).indices
