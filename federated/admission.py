"""The front door: a reply is used only if it is what the server's own model and its own questions say it must be.

Every rule looks at one reply, so the door keeps every unit's guarantee: what it sets aside contributes nothing. Cheap
rules come first and nothing that a client wrote is parsed: an array's header must be the text that NumPy writes for the
expected dtype and shape. (`np.load` would open a ZIP archive as readily as an array.)
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from tacit.federated.clipping import Arrays
from tacit.federated.roster import Roster, Sent

__all__ = [
    "Admitted",
    "FrontDoor",
    "Roster",
    "Sent",
    "admit",
    "admitted",
    "checked_view",
    "is_bit",
    "is_loss",
    "is_number",
    "is_this_round",
    "refusal_reason",
    "schema",
]

Shape = tuple[int, ...]
Values = npt.NDArray[np.float32]  # or what else a codec sends
Check = Callable[[object, int], bool]  # a metric's value, and the round

_MAGIC = b"\x93NUMPY\x01\x00"
_PADDING = 128  # bytes: NumPy's versions fill a header up to different lengths
_LONGEST_REASON = 160  # characters
_LARGEST_METRIC = 1e12  # sums and squares of that size overflow nothing


def schema(arrays: Arrays) -> dict[str, tuple[str, Shape]]:
    """Names, dtypes and shapes, in order.

    >>> schema({"w": np.zeros((2, 3), np.float32)})
    {'w': ('float32', (2, 3))}
    """
    return {name: (str(array.dtype), array.shape) for name, array in arrays.items()}


def is_bit(value: object, server_round: int) -> bool:
    """Whether a metric is 0 or 1.

    >>> is_bit(1, 1), is_bit(1.0, 1), is_bit([1], 1)
    (True, False, False)
    """
    return isinstance(value, int) and value in (0, 1)


def is_number(value: object, server_round: int) -> bool:
    """Whether a metric is a float that sums and squares of it do not lift out of range: within 1e12.

    >>> is_number(0.5, 1), is_number(math.nan, 1), is_number(1e300, 1)
    (True, False, False)
    """
    return isinstance(value, float) and abs(value) <= _LARGEST_METRIC


def is_loss(value: object, server_round: int) -> bool:
    """Whether a metric is a float from 0 to 1e12.

    >>> is_loss(0.5, 1), is_loss(-0.5, 1)
    (True, False)
    """
    return isinstance(value, float) and 0.0 <= value <= _LARGEST_METRIC


def is_this_round(value: object, server_round: int) -> bool:
    """Whether a metric names the round in which the question was asked.

    >>> is_this_round(3, 3), is_this_round(2, 3)
    (True, False)
    """
    return isinstance(value, int) and value == server_round


def _one(index: int) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class FrontDoor:
    """What every reply to one kind of question must look like.

    Attributes:
        expected: name → (dtype, shape) of each array on the wire, in order; empty for replies of metrics alone. A
            codec's may differ from the model's.
        owners: how many there are; indices are 0 to owners - 1.
        metrics: further metric → its check; each must be there, and no other.
        sample_count: what "num-examples" must say, by owner index: the public constant 1, or a declared size.
        largest: of any float's magnitude. The default's square, ten million times, still fits float32, so nothing the
            server computes overflows; how far an update may move the model is for a clip or a robust rule to say.
        decode: a codec's, from wire arrays to an update, raising ValueError for what it cannot mean (an index out of
            range); what it gives is held to `largest` too. None where whole models are sent.
    """

    expected: Mapping[str, tuple[str, Shape]]
    owners: int
    metrics: Mapping[str, Check] = field(default_factory=dict)
    sample_count: Callable[[int], int] = _one
    largest: float = 1e15
    decode: Callable[[Arrays], Arrays] | None = None

    def __post_init__(self) -> None:
        if self.owners < 1:
            raise ValueError(f"expected at least one owner, got owners={self.owners}; give their number")
        if not 0.0 < self.largest < math.inf:
            raise ValueError(f"expected a finite bound above 0, got largest={self.largest}; leave the default")
        own = {"owner", "num-examples"} & set(self.metrics)
        if own:
            raise ValueError(f"expected metrics besides owner and num-examples, got {sorted(own)}; leave them out")
        for name, (dtype, _) in self.expected.items():
            if np.dtype(dtype).kind not in "biuf" or not np.dtype(dtype).isnative or str(np.dtype(dtype)) != dtype:
                raise ValueError(f"expected a plain dtype such as 'float32', got {name}={dtype!r}; send another")

    @classmethod
    def of_training(
        cls,
        expected: Mapping[str, tuple[str, Shape]],
        *,
        owners: int,
        unit: str,
        loss: bool = False,
        decode: Callable[[Arrays], Arrays] | None = None,
    ) -> FrontDoor:
        """For updates as this package's own clients send them.

        Args:
            expected: `schema` of the server's model, or what a codec makes of it.
            owners: how many there are.
            unit: of privacy; clients add a bit under "client".
            loss: whether it was asked for.
            decode: as in the attributes.

        >>> model = {"w": np.zeros(3, np.float32)}
        >>> sorted(FrontDoor.of_training(schema(model), owners=2, unit="client").metrics)
        ['server-round', 'unclipped']
        """
        checks: dict[str, Check] = {"server-round": is_this_round}
        checks |= {"unclipped": is_bit} if unit == "client" else {}
        checks |= {"loss": is_loss} if loss else {}
        return cls(expected=expected, owners=owners, metrics=checks, decode=decode)

    @classmethod
    def of_evaluation(cls, *, owners: int) -> FrontDoor:
        """For the counts of `evaluation.reply_metrics`.

        >>> sorted(FrontDoor.of_evaluation(owners=2).metrics)
        ['right', 'wrong']
        """
        return cls(expected={}, owners=owners, metrics={"right": is_number, "wrong": is_number})

    def judge(self, reply: Message, sent: Sent) -> str | None:
        """Why a reply is set aside, in words of the server's own; None where it is admitted.

        A well-addressed error is admitted as what it is: a refusal. Its reason is the client's text; print it with
        `refusal_reason`.

        Args:
            reply: undecoded.
            sent: the questions.
        """
        complaint = sent.complaint(reply)
        if complaint is not None or (reply.has_error() and not reply.has_content()):
            return complaint
        if not reply.has_content() or reply.has_error() or not isinstance(reply.content, RecordDict):
            return "holds neither records nor an error"
        return self._judge_content(reply.content, sent.round_of(reply))

    def _judge_content(self, content: RecordDict, server_round: int) -> str | None:
        names = ("arrays", "metrics") if self.expected else ("metrics",)
        metrics, arrays = content.get("metrics"), content.get("arrays")
        if len(content) != len(names) or not isinstance(metrics, MetricRecord):
            return f"expected the records {' and '.join(names)} and no other"
        complaint = self._judge_metrics(metrics, server_round)
        if complaint is not None or not self.expected:
            return complaint
        return self._judge_arrays(arrays) if isinstance(arrays, ArrayRecord) else "expected arrays as an ArrayRecord"

    def _judge_metrics(self, metrics: MetricRecord, server_round: int) -> str | None:
        names = ("owner", "num-examples", *self.metrics)
        if len(metrics) != len(names) or not all(name in metrics for name in names):
            return f"expected the metrics {', '.join(sorted(names))} and no other"
        owner, count = metrics["owner"], metrics["num-examples"]
        if not isinstance(owner, int) or not 0 <= owner < self.owners:
            return "metric 'owner' is no owner's index"
        if not isinstance(count, int) or count != self.sample_count(owner):
            return "metric 'num-examples' is not the number that the server knows"
        wrong = [name for name, check in self.metrics.items() if not check(metrics[name], server_round)]
        return f"metric {wrong[0]!r} is out of bounds" if wrong else None

    def _judge_arrays(self, record: ArrayRecord) -> str | None:
        """All headers before any value."""
        if len(record) != len(self.expected) or list(record) != list(self.expected):
            return "arrays have other names than the model's, or another order"
        starts: dict[str, int] = {}
        for name, (dtype, shape) in self.expected.items():
            start = _payload_start(record[name], dtype, shape)
            if start is None:
                return f"expected array {name!r} as {dtype} {shape} in C order, as NumPy writes it"
            starts[name] = start
        arrays = {name: _values(record[name].data, *self.expected[name], start) for name, start in starts.items()}
        return self._judge_values(arrays) or self._judge_meaning(arrays)

    def _judge_values(self, arrays: Mapping[str, Values]) -> str | None:
        for name, values in arrays.items():
            if values.dtype.kind != "f" or values.size == 0:
                continue
            low, high = float(values.min()), float(values.max())  # NaN shows in either; as fast as isfinite, no copy
            if not (math.isfinite(low) and math.isfinite(high)):
                return f"array {name!r} holds NaN or infinity"
            if max(-low, high) > self.largest:
                return f"array {name!r} holds values above {self.largest:g}"
        return None

    def _judge_meaning(self, arrays: Arrays) -> str | None:
        if self.decode is None:
            return None
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                update = self.decode(arrays)
        except ValueError:
            return "arrays that the codec cannot decode"
        return self._judge_values(update)


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What came through the door.

    Attributes:
        replies: admitted ones and errors, unchanged, in the order given.
        aside: node id (0 for nobody's) → why its first bad reply was set aside, in the server's own words. Under unit
            client this is for a file that only the server opens: it tells who took part.
    """

    replies: Sequence[Message]
    aside: dict[int, str]


def admit(replies: Iterable[Message], sent: Sent, roster: Roster | None, door: FrontDoor) -> Admitted:
    """Judges each reply by itself and lets the round go on with the rest; raises nothing, whatever they hold.

    Args:
        replies: as a grid gives them.
        sent: the questions; those answered are closed.
        roster: learns who was admitted. None where nothing depends on the owner that a reply names (unit client).
        door: for this kind of question.

    >>> from flwr.clientapp import ClientApp
    >>> from tacit.federated.grid import InProcessGrid
    >>> asked = InProcessGrid(ClientApp(), {}).create_message(RecordDict(), "evaluate", 7, "1")
    >>> reply = Message(RecordDict({"metrics": MetricRecord({"owner": 10**6})}), reply_to=asked)
    >>> sent = Sent({"": (7, 1)})  # message id: node and round; of a grid's messages `Sent.of` reads them
    >>> admit([reply, reply], sent, Roster(), FrontDoor.of_evaluation(owners=2)).aside
    {7: 'expected the metrics num-examples, owner, right, wrong and no other'}
    """
    aside: dict[int, str] = {}
    return Admitted(replies=list(admitted(replies, sent, roster, door, aside)), aside=aside)


def admitted(
    replies: Iterable[Message], sent: Sent, roster: Roster | None, door: FrontDoor, aside: dict[int, str]
) -> Iterator[Message]:
    """As `admit`, one by one as they come; `aside` grows on the way."""
    for reply in replies:
        complaint = door.judge(reply, sent)
        sent.take(reply)
        node = reply.metadata.src_node_id
        if roster is not None and complaint is None and reply.has_content():
            owner = _owner(reply)
            complaint = roster.complaint(node, owner)
            if complaint is None:
                roster.learn(node, owner)
        if complaint is None:
            yield reply
        else:
            aside.setdefault(node if isinstance(node, int) else 0, complaint)
        del reply  # before the next one is made


def refusal_reason(reply: Message) -> str:
    r"""The reason of an error, fit to be printed: short, one line, nothing that moves a cursor.

    >>> from flwr.app import Error
    >>> from flwr.clientapp import ClientApp
    >>> from tacit.federated.grid import InProcessGrid
    >>> asked = InProcessGrid(ClientApp(), {}).create_message(RecordDict(), "train", 7, "1")
    >>> [refusal_reason(Message(Error(4, reason), reply_to=asked)) for reason in ("exhausted", "a\x1b[2Jb", None)]
    ['exhausted', 'a?[2Jb', 'no reason given']
    """
    reason = reply.error.reason
    if not isinstance(reason, str) or not reason:
        return "no reason given"
    short = reason[:_LONGEST_REASON]
    return "".join(character if character.isprintable() else "?" for character in short)


def _owner(reply: Message) -> int:
    """Of a reply whose metrics were checked."""
    metrics = reply.content["metrics"]
    owner = metrics["owner"] if isinstance(metrics, MetricRecord) else None
    return owner if isinstance(owner, int) else -1


def checked_view(array: Array, dtype: str, shape: Shape) -> Values | None:
    """An array's values, read-only and not copied; None unless its bytes are what NumPy writes of dtype and shape."""
    if np.dtype(dtype).kind not in "biuf":
        return None
    start = _payload_start(array, dtype, shape)
    return None if start is None else _values(array.data, dtype, shape, start)


def _payload_start(array: Array, dtype: str, shape: Shape) -> int | None:
    """Where an array's values begin; None unless dtype, shape, header and length are exactly as expected.

    The format is NumPy's .npy, version 1.0: magic, the header's length in two bytes, a Python literal, spaces, newline.
    """
    claimed = array.stype == "numpy.ndarray" and array.dtype == dtype
    if not claimed or not isinstance(array.shape, tuple) or array.shape != shape:
        return None
    data, text = array.data, _header(dtype, shape)
    if not isinstance(data, bytes) or data[:8] != _MAGIC:
        return None
    start = 10 + int.from_bytes(data[8:10], "little")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != start + nbytes or not 0 <= start - 10 - len(text) <= _PADDING:
        return None
    return start if data[10:start].rstrip(b"\n").rstrip(b" ") == text else None


def _values(data: bytes, dtype: str, shape: Shape, start: int) -> Values:
    """The array behind a header that was checked: no copy, and read-only."""
    return np.ndarray(shape, np.dtype(dtype), data, offset=start)


@functools.lru_cache(maxsize=4096)
def _header(dtype: str, shape: Shape) -> bytes:
    """What NumPy writes of an array, without what it fills up with."""
    file = io.BytesIO()
    about: dict[str, object] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()[10:].rstrip(b" \n")
