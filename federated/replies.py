"""Replies of a cohort that was calculated at once: one matrix, and messages for whoever wants to see messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from tacit.federated.clipping import Arrays

__all__ = ["Cohort", "array_bytes", "arrays_in", "metrics_in"]


def array_bytes(message: Message) -> int:
    """Of all arrays that a message carries, as they are sent."""
    if not message.has_content():
        return 0
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())


# Flower's own `content.array_records` ties content into a cycle, so that its arrays stay until garbage is collected.


def arrays_in(content: RecordDict, name: str = "arrays") -> ArrayRecord:
    """A record of arrays.

    Raises:
        KeyError: there is none of that name.

    >>> len(arrays_in(RecordDict({"arrays": ArrayRecord()})))
    0
    """
    record = content[name]
    if not isinstance(record, ArrayRecord):
        raise KeyError(name)
    return record


def metrics_in(content: RecordDict) -> MetricRecord:
    """The metrics.

    Raises:
        KeyError: there are none.

    >>> dict(metrics_in(RecordDict({"metrics": MetricRecord({"owner": 1})})))
    {'owner': 1}
    """
    record = content["metrics"]
    if not isinstance(record, MetricRecord):
        raise KeyError("metrics")
    return record


@dataclass(frozen=True)
class Cohort(Sequence[Message]):
    """Replies of a cohort: ordinary messages, made when they are asked for, and all their arrays as one matrix.

    Attributes:
        rows: (clients, parameters), float32: each client's model, one array after another.
        owners: index of each client.
        questions: the messages that they answer.
        unfold: a row as arrays by name.
        make: the message that answers a question, from an owner's index and arrays.
    """

    rows: npt.NDArray[np.float32]
    owners: list[int]
    questions: list[Message]
    unfold: Callable[[npt.NDArray[np.float32]], Arrays]
    make: Callable[[Message, int, Arrays], Message]

    def __len__(self) -> int:
        return len(self.owners)

    @overload
    def __getitem__(self, place: int) -> Message: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Message]: ...

    def __getitem__(self, place: int | slice) -> Message | Sequence[Message]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return self.make(self.questions[place], self.owners[place], self.unfold(self.rows[place]))

    def __iter__(self) -> Iterator[Message]:
        return (self[place] for place in range(len(self)))

    @cached_property
    def array_bytes(self) -> int:
        """Of all arrays, if every message were sent."""
        return len(self) * array_bytes(self[0]) if len(self) else 0

    @property
    def nodes(self) -> list[int]:
        """Node of each client."""
        return [question.metadata.dst_node_id for question in self.questions]

    def finite(self) -> npt.NDArray[np.bool_]:
        """Which clients' models hold neither NaN nor infinity, (clients,)."""
        return np.asarray(np.isfinite(self.rows).all(axis=1))

    def take(self, chosen: npt.NDArray[np.bool_]) -> Cohort:
        """Some of the clients."""
        places = np.flatnonzero(chosen)
        return replace(
            self,
            rows=self.rows[places],
            owners=[self.owners[place] for place in places],
            questions=[self.questions[place] for place in places],
        )
