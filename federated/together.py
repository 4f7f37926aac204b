"""Between a grid and its clients: a cohort's steps are taken at once, and what comes back stays in one matrix.

Whatever is charged, released or kept by an owner stays where it is for one owner alone (`client_app`): here only the
steps themselves are computed, for all owners that may be read. Where there is no more to an answer, the replies are one
`Cohort`, and the messages that Flower would see are made when somebody asks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Error, Message, MessageType
from safetensors.numpy import save

from tacit.devices.failpoint import reach
from tacit.federated.averaging import from_record
from tacit.federated.client_app import REFUSAL, asked_of, reply_of, wants_loss
from tacit.federated.clipping import Arrays
from tacit.federated.cohort import CohortSteps, Taken, Walk
from tacit.federated.model_arrays import joined
from tacit.federated.owner import Owner
from tacit.federated.personal import Asked
from tacit.federated.replies import Cohort, arrays_in
from tacit.federated.turns import Granted, Reservation, Turn

__all__ = ["AtOnce", "Takes", "Together", "matrix_of"]

_LOG = logging.getLogger("tacit")
Work = Sequence[tuple[Message, Context]]


class Takes(Protocol):
    """Takes the steps of owners that may be read."""

    def __call__(self, chosen: Sequence[tuple[Asked, Owner]]) -> list[Taken | Exception] | None:
        """What each owner's steps came to, or what went wrong with them; None where each is to be tried for itself."""
        ...


class Grants(Protocol):
    """What was charged for a cohort, and where its payloads go; nothing leaves before the grid's transaction ends."""

    def granted(self, message: Message) -> Reservation | None:
        """What a message was granted, as long as nobody has taken it up; None where it may not be computed."""
        ...

    def reserve(self, request: Reservation) -> Turn:
        """Takes it up."""
        ...

    def release(self, request: Reservation, payload: bytes) -> None:
        """Makes the payload ready to leave."""
        ...

    def fail(self, request: Reservation) -> None:
        """Says that nothing will leave."""
        ...


class Together:
    """Takes the steps of a cohort's owners before each of them answers."""

    def __init__(self, takes: Takes, find: Callable[[Context], Owner], grants: Grants | None) -> None:
        """Connects.

        Args:
            takes: the steps.
            find: the owner of a context.
            grants: what was charged; None where nothing is.
        """
        self._takes, self._find, self._grants = takes, find, grants
        self._taken: dict[int, Taken | Exception] = {}
        self._decoded: tuple[object, Arrays] = (None, {})

    def find(self, context: Context) -> Owner:
        """The owner of a context; one whose steps were taken already goes on from there."""
        owner = self._find(context)
        taken = self._taken.pop(owner.index, None)
        if taken is None:
            return owner
        if isinstance(taken, Exception):  # once is enough: trying until it works would tell of the records
            return replace(owner, records=partial(_raise, taken))
        trained = replace(owner, trainer=owner.trainer.given(taken.arrays))
        walk = taken.walk
        if walk is None:
            return trained
        # Where it stands: what follows the steps draws from it too.
        return replace(trained, records=lambda: walk.records, randomness=lambda _: walk.randomness)

    def answer(self, work: Work) -> Sequence[Message] | None:
        """Takes the steps. Returns the replies where that is all there is to it; otherwise owners answer themselves."""
        self._taken = {}
        if not work or any(not _is_training(message) for message, _ in work):
            return None
        asked = [(message, self._find(context)) for message, context in work]
        if len({owner.index for _, owner in asked}) < len(asked):  # asked twice: the gate answers once
            return None
        chosen = [(message, owner) for message, owner in asked if self._may_read(message, owner)]
        reach("client.before_records")
        asked_by: dict[int, Asked] = {}
        for message, _ in chosen:  # a round's messages share their content, or most of them
            if id(message.content) not in asked_by:
                asked_by[id(message.content)] = asked_of(message, arrays=self._arrays(message))
        taken = self._takes([(asked_by[id(message.content)], owner) for message, owner in chosen])
        if taken is None:
            return None
        good = [one for one in taken if isinstance(one, Taken)]
        bare = not any(wants_loss(message) for message in {id(m.content): m for m, _ in chosen}.values())
        if bare and len(good) == len(work) and all(_is_bare(owner) for _, owner in chosen):
            rows = matrix_of([one.row for one in good])
            questions, indices = [message for message, _ in chosen], [owner.index for _, owner in chosen]
            return self._released(Cohort(rows, indices, questions, good[0].unfold, reply_of))
        self._taken = {owner.index: one for (_, owner), one in zip(chosen, taken, strict=True)}
        return None

    def _released(self, cohort: Cohort) -> Sequence[Message]:
        """The replies, each on its way to the outbox where it was charged, as `under_charge` does it for one owner."""
        if self._grants is None:
            return cohort
        finite = cohort.finite()
        reach("client.after_training")
        for question, row, good in zip(cohort.questions, cohort.rows, finite, strict=True):
            request = self._grants.granted(question)
            if request is None or not isinstance(self._grants.reserve(request), Granted):
                raise RuntimeError("expected a reservation that nobody has taken up; ask again")
            if good:
                self._grants.release(request, save(cohort.unfold(row)))
            else:
                self._grants.fail(request)
        if finite.all():
            return cohort
        lost = [question for question, good in zip(cohort.questions, finite, strict=True) if not good]
        return [*cohort.take(finite), *(Message(Error(REFUSAL, "unavailable"), reply_to=question) for question in lost)]

    def _may_read(self, message: Message, owner: Owner) -> bool:
        if not owner.mechanism.private or owner.mechanism.unit == "client":
            return True  # nothing is charged, or the server has charged it
        return self._grants is not None and self._grants.granted(message) is not None

    def _arrays(self, message: Message) -> Arrays:
        """Requests of a round share one record, which is decoded once."""
        record = arrays_in(message.content)
        if self._decoded[0] is not record:
            self._decoded = (record, from_record(record))
        return self._decoded[1]


def matrix_of(rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Rows as a matrix: the one that they lie in one after another, where they do, without a copy.

    >>> matrix = np.zeros((2, 3), np.float32)
    >>> matrix_of(list(matrix)) is matrix
    True
    >>> matrix_of([matrix[1], matrix[0]]) is matrix
    False
    """
    whole = rows[0].base
    if not isinstance(whole, np.ndarray) or whole.shape != (len(rows), *rows[0].shape):
        return np.stack(rows)
    start, stride = whole.ctypes.data, whole.strides[0]
    lies = all(row.base is whole and row.ctypes.data == start + place * stride for place, row in enumerate(rows))
    return whole if lies and whole.dtype == rows[0].dtype else np.stack(rows)


def _is_training(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def _is_bare(owner: Owner) -> bool:
    """Whether an owner's model after its steps is its whole answer."""
    return owner.mechanism.unit in ("none", "record") and owner.kept.bare


class AtOnce:
    """All owners' steps together, in a few passes through the model; a pass that fails fails all of them."""

    def __init__(self, steps: CohortSteps) -> None:
        """Of one model."""
        self._steps = steps

    def __call__(self, chosen: Sequence[tuple[Asked, Owner]]) -> list[Taken | Exception] | None:
        """As `Takes`."""
        found: list[Walk | Exception] = [_walk(asked, owner) for asked, owner in chosen]
        walks = [one for one in found if isinstance(one, Walk)]
        try:
            rows = iter(self._steps(walks).numpy() if walks else ())
        except Exception as error:  # noqa: BLE001  # whose it is cannot be told
            if not isinstance(error, MemoryError) and not any(walk.mechanism.private for walk in walks):
                _LOG.debug("steps are taken one by one: %s", type(error).__name__)
                return None
            # Not tried again: whether it works may depend on which records were drawn (privacy by rejection is none).
            _LOG.warning(
                "all owners of a round failed together (%s); federated.engine='sequential' keeps them apart",
                error if isinstance(error, MemoryError) else type(error).__name__,
            )
            return [error if isinstance(one, Walk) else one for one in found]
        return [
            Taken(row=next(rows), unfold=self._steps.arrays, walk=one) if isinstance(one, Walk) else one
            for one in found
        ]


def _walk(asked: Asked, owner: Owner) -> Walk | Exception:
    try:
        own = owner.kept.own_before(asked.server_round)
        return Walk(
            arrays=asked.arrays if not own else joined(owner.trainer.model, asked.arrays, own),
            records=owner.records(),
            randomness=owner.randomness(asked.server_round),
            mechanism=owner.mechanism,
            correction=asked.correction,
        )
    except Exception as error:  # noqa: BLE001  # one owner's trouble is not the others'
        return error


def _raise(error: Exception) -> NoReturn:
    raise error
