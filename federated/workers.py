"""Owners' steps in several processes, one thread each; the same bytes whatever their number.

Workers are forked once and stay: each has the owners, the model and the code of its parent, and a key of its own for
whatever is secret. What an owner's steps come to does not depend on who takes them, so whoever is free takes the next,
and the rows come back in the order in which they were asked for. Models go through memory that a worker shares with its
parent, since a pipe holds a tenth of one and both sides would wait for each other.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays
from tacit.federated.cohort import Taken, unfolded
from tacit.federated.owner import Owner
from tacit.federated.personal import Asked

__all__ = ["Apart", "Errand", "WorkerDied", "Workers", "cores", "ended", "forked", "how_it_ended"]

_AHEAD = 2  # errands that a worker has at a time: it begins the next while the parent reads the last
_Floats = npt.NDArray[np.floating]


class WorkerDied(RuntimeError):
    """A worker that was killed; what it was doing is lost."""


@dataclass(frozen=True)
class Errand:
    """One owner's steps.

    Attributes:
        owner: its index.
        server_round: from 1.
        correction: SCAFFOLD's, or None.
        again: how often they may be taken again when their worker is killed. Never under a guarantee: what killed it
            may have been the records, and trying until it works would tell (privacy.md, section 6).
    """

    owner: int
    server_round: int
    correction: Arrays | None = None
    again: int = 0


@dataclass(frozen=True)
class _Shared:
    """Memory of a worker and its parent: the model that steps begin with, then those they end with.

    Attributes:
        shapes: of the model's arrays, by name.
        rows: (1 + _AHEAD, parameters).
    """

    shapes: Mapping[str, tuple[int, ...]]
    rows: _Floats

    @classmethod
    def like(cls, arrays: Arrays) -> _Shared:
        """Of a model; anonymous, so that nothing is left when both sides are gone."""
        dtype = np.result_type(*arrays.values())
        size = sum(array.size for array in arrays.values())
        memory = mmap.mmap(-1, max(1, (1 + _AHEAD) * size * dtype.itemsize))
        rows = np.frombuffer(memory, dtype, (1 + _AHEAD) * size).reshape(1 + _AHEAD, size)
        return cls({name: array.shape for name, array in arrays.items()}, rows)

    def put(self, place: int, arrays: Arrays) -> None:
        """Writes a model."""
        if {name: array.shape for name, array in arrays.items()} != self.shapes:
            raise ValueError("expected models of one shape, got another; make other workers for it")
        np.concatenate([arrays[name].ravel() for name in self.shapes], out=self.rows[place])


@dataclass(eq=False)
class _Worker:
    """What its parent knows of it: `given` are the errands that it has, by number, each with the place of its row."""

    process: BaseProcess
    pipe: Connection
    shared: _Shared
    given: deque[tuple[int, int]] = field(default_factory=deque)


@dataclass
class _Call:
    """Where a call stands: errands nobody has yet, what went wrong, and whose workers were killed how often."""

    errands: Sequence[Errand]
    rows: _Floats
    waiting: deque[int]
    failed: dict[int, Exception] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)

    def give(self, worker: _Worker) -> None:
        """The next errand, if there is one."""
        if self.waiting:
            number, taken = self.waiting.popleft(), {place for _, place in worker.given}
            place = min(set(range(1, 1 + _AHEAD)) - taken)
            worker.given.append((number, place))
            with contextlib.suppress(OSError):  # it is dead, which shows when its answer is read
                worker.pipe.send((place, self.errands[number]))


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Persistent processes that take owners' steps.

    *Guarantees*: an owner's records are read in a worker only when they are asked for here, which is after the charge;
    nothing but its model after the steps comes back.
    """

    def __init__(
        self, owners: Sequence[Owner], *, count: int | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Prepares; workers are forked when the first model is there.

        Args:
            owners: those that may be asked for.
            count: of processes; as many as there are cores when None.
            tell: told when a worker was killed, in a line for the run's log.
        """
        self._owners = {owner.index: owner for owner in owners}
        self._count, self._tell = count or cores(), tell
        self._workers: list[_Worker] = []

    def __call__(self, arrays: Arrays, errands: Sequence[Errand]) -> list[Taken | Exception]:
        """The model after each owner's steps, in the order asked; an exception where one's raised.

        Args:
            arrays: the model that all begin with; of the same shapes in every call.
            errands: whose steps.
        """
        if not self._workers:
            self._workers = [self._start(_Shared.like(arrays)) for _ in range(self._count)]
        shared = self._workers[0].shared
        for worker in self._workers:
            worker.shared.put(0, arrays)
        rows = np.empty((len(errands), shared.rows.shape[1]), shared.rows.dtype)
        failed = self._carried_out(errands, rows)
        unfold = partial(unfolded, shared.shapes)
        return [failed.get(number) or Taken(row=rows[number], unfold=unfold) for number in range(len(errands))]

    def close(self) -> None:
        """Ends them."""
        for worker in self._workers:
            ended(worker.process, worker.pipe)
        self._workers = []

    def _carried_out(self, errands: Sequence[Errand], rows: _Floats) -> dict[int, Exception]:
        """Fills the rows; returns what went wrong instead, by number."""
        call = _Call(errands, rows, deque(range(len(errands))))
        for _ in range(_AHEAD):
            for worker in self._workers:
                call.give(worker)
        while busy := {worker.pipe: worker for worker in self._workers if worker.given}:
            for pipe in wait(list(busy)):
                self._read(busy[pipe], call)  # type: ignore[index]  # what wait gives is of what it was given
            for worker in self._workers:
                while call.waiting and len(worker.given) < _AHEAD:
                    call.give(worker)
        return call.failed

    def _read(self, worker: _Worker, call: _Call) -> None:
        """One answer; a worker that died is replaced."""
        try:
            raised: Exception | None = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, call)
            return
        number, place = worker.given.popleft()
        if raised is None:
            call.rows[number] = worker.shared.rows[place]
        else:
            call.failed[number] = raised

    def _replace(self, worker: _Worker, call: _Call) -> None:
        """Another one for one that died: what it was at is lost, what it had not begun waits for others."""
        worker.process.join()
        worker.pipe.close()
        (number, _), *untouched = worker.given
        call.waiting.extendleft(other for other, _ in reversed(untouched))
        self._workers[self._workers.index(worker)] = self._start(worker.shared)
        call.lost[number] = call.lost.get(number, 0) + 1
        again = call.lost[number] <= call.errands[number].again
        died = self._died(worker, call.errands[number], again=again)
        if again:
            call.waiting.append(number)
        else:
            call.failed[number] = died

    def _died(self, worker: _Worker, errand: Errand, *, again: bool) -> WorkerDied:
        how = how_it_ended(worker.process)
        fate = "are taken again" if again else "are lost, and are not taken again"
        self._tell(f"round {errand.server_round}: a worker was killed ({how}); the steps of one owner {fate}")
        return WorkerDied(f"expected a worker to stay, got {how}; see the system's log for memory")

    def _start(self, shared: _Shared) -> _Worker:
        return _Worker(*forked(partial(_taken, self._owners, shared)), shared)


def forked(answer: Callable[[Any], object]) -> tuple[BaseProcess, Connection]:
    """A process that answers what it is sent, one by one, and the pipe to it; it ends with this end of the pipe.

    It has this process's memory as it is now, and none of its files; interrupts are left to this one.

    >>> process, pipe = forked(lambda asked: asked + 1)
    >>> pipe.send(2)
    >>> pipe.recv()
    3
    >>> ended(process, pipe)
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, here, answer), daemon=True)
    process.start()
    there.close()
    return process, here


def ended(process: BaseProcess, pipe: Connection) -> None:
    """Ends a forked process, one that is at work after a second."""
    with contextlib.suppress(OSError):
        pipe.send(None)
    pipe.close()
    process.join(1.0)
    if process.is_alive():
        process.kill()
        process.join()


def how_it_ended(process: BaseProcess) -> str:
    """In words, once it has been joined."""
    code = process.exitcode
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _work(pipe: Connection, parents: Connection, answer: Callable[[Any], object]) -> None:
    """A forked process's life."""
    parents.close()
    _let_go(pipe.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what the parent does about it is the parent's
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            return
        if asked is None:
            return
        with contextlib.suppress(OSError):  # the parent is gone, which shows when the next is read
            pipe.send(answer(asked))


def _let_go(kept: int) -> None:
    """Closes what the parent has open: a worker that outlives it must not hold its locks."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():  # noqa: PTH112, PTH208
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _taken(owners: Mapping[int, Owner], shared: _Shared, asked: tuple[int, Errand]) -> Exception | None:
    """Takes the steps and writes where they end; what went wrong instead."""
    place, errand = asked
    try:
        owner = owners[errand.owner]
        randomness = owner.randomness(errand.server_round)
        arrays = unfolded(shared.shapes, shared.rows[0])
        after = owner.trainer.update(arrays, owner.records(), randomness, correction=errand.correction)
        shared.put(place, after)
    except Exception as error:  # noqa: BLE001  # it goes to the parent, which is the owner's own process
        return RuntimeError(f"{type(error).__name__}: {error}")
    return None


class Apart:
    """Owners' steps in worker processes: of owners that keep nothing, and whose steps are all there is to a round."""

    def __init__(self, workers: Workers) -> None:
        """Uses them; whoever made them ends them."""
        self._workers = workers

    def __call__(self, chosen: Sequence[tuple[Asked, Owner]]) -> list[Taken | Exception] | None:
        """As `together.Takes`; what carries another model is another errand."""
        found: dict[int, Taken | Exception] = {}
        groups: dict[int, list[int]] = {}
        for place, (asked, _) in enumerate(chosen):
            groups.setdefault(id(asked.arrays), []).append(place)
        for places in groups.values():
            errands = [
                # A cohort's steps end with the same bytes whether a worker was killed meanwhile or not.
                Errand(owner.index, asked.server_round, asked.correction, again=0 if owner.mechanism.private else 2)
                for asked, owner in (chosen[place] for place in places)
            ]
            results = self._workers(chosen[places[0]][0].arrays, errands)
            found |= dict(zip(places, results, strict=True))
        return [found[place] for place in range(len(chosen))]
