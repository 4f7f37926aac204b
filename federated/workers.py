"""Owners' steps in several processes, one thread each; the same bytes whatever their number.

Workers are forked once and stay: each has the owners, the model and the code of its parent, and a key of its own for
whatever is secret. What an owner's steps come to does not depend on who takes them, and the rows come back in the order
in which they were asked for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from tacit.federated.clipping import Arrays
from tacit.federated.cohort import Taken
from tacit.federated.owner import Owner
from tacit.federated.personal import Asked

__all__ = ["Apart", "Errand", "WorkerDied", "Workers"]


class WorkerDied(RuntimeError):
    """A worker that was killed; what it was doing is lost."""


@dataclass(frozen=True)
class Errand:
    """One owner's steps.

    Attributes:
        owner: its index.
        server_round: from 1.
        correction: SCAFFOLD's, or None.
    """

    owner: int
    server_round: int
    correction: Arrays | None = None


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers:
    """Persistent processes that take owners' steps.

    *Guarantees*: an owner's records are read in a worker only when they are asked for here, which is after the charge;
    nothing but its model after the steps comes back.
    """

    def __init__(self, owners: Sequence[Owner], *, count: int | None = None) -> None:
        """Forks.

        Args:
            owners: those that may be asked for.
            count: of processes; as many as there are cores when None.
        """
        self._owners = {owner.index: owner for owner in owners}
        self._workers = [self._start() for _ in range(count or os.cpu_count() or 1)]

    def __call__(self, arrays: Arrays, errands: Sequence[Errand]) -> list[Arrays | Exception]:
        """The model after each owner's steps, in the order asked; an exception where one's raised.

        Args:
            arrays: the model that all begin with.
            errands: whose steps.
        """
        count = len(self._workers)
        parts = [list(range(first, len(errands), count)) for first in range(count)]
        asked = []
        for place, part in enumerate(parts):
            if part:
                with contextlib.suppress(OSError):  # it is dead: what it does not answer is lost
                    self._workers[place].pipe.send((arrays, [errands[number] for number in part]))
                asked.append((place, part))
        found: list[Arrays | Exception] = [WorkerDied("expected an answer, got none")] * len(errands)
        left = {self._workers[place].pipe: (place, list(part)) for place, part in asked}
        while left:  # whoever is ready is read first: a worker whose pipe is full waits
            for pipe in wait(list(left)):
                place, part = left[pipe]  # type: ignore[index]  # what wait gives is of what it was given
                answer = self._answer(place)
                if isinstance(answer, WorkerDied):
                    for number in part:
                        found[number] = answer
                    part = []
                else:
                    found[part.pop(0)] = answer
                if not part:
                    del left[pipe]  # type: ignore[arg-type]  # as above
        return found

    def close(self) -> None:
        """Ends them."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
            worker.process.join(1.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _answer(self, place: int) -> Arrays | Exception:
        """One result; a worker that died is replaced."""
        worker = self._workers[place]
        try:
            result: Arrays | Exception = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            worker.pipe.close()
            self._workers[place] = self._start()
            return WorkerDied(f"expected a worker to stay, got exit code {code}; see the system's log for memory")
        return result

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, here, self._owners), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)


def _work(pipe: Connection, parents: Connection, owners: dict[int, Owner]) -> None:
    """A worker's life: it ends with its parent's end of the pipe, and leaves interrupts to the parent."""
    parents.close()
    _let_go(pipe.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            return
        if asked is None:
            return
        arrays, errands = asked
        for errand in errands:
            pipe.send(_taken(owners[errand.owner], arrays, errand))


def _let_go(kept: int) -> None:
    """Closes what the parent has open: a worker that outlives it must not hold its locks."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():  # noqa: PTH112, PTH208
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _taken(owner: Owner, arrays: Arrays, errand: Errand) -> Arrays | Exception:
    try:
        randomness = owner.randomness(errand.server_round)
        return owner.trainer.update(arrays, owner.records(), randomness, correction=errand.correction)
    except Exception as error:  # noqa: BLE001  # it goes to the parent, which is the owner's own process
        return RuntimeError(f"{type(error).__name__}: {error}")


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
                Errand(owner.index, asked.server_round, asked.correction)
                for asked, owner in (chosen[place] for place in places)
            ]
            results = self._workers(chosen[places[0]][0].arrays, errands)
            for place, result in zip(places, results, strict=True):
                found[place] = result if isinstance(result, Exception) else Taken.of(result)
        return [found[place] for place in range(len(chosen))]
