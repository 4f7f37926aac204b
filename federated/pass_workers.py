"""A cohort's passes through a model on all cores; the same bytes whatever their number.

A pass depends on what it is sent alone, so whoever is free takes the next, this process included. The others are forked
once and stay. They are asked for no owner, draw nothing and write nothing but sums: what is charged, drawn and noised
stays here. Models, batches and sums go through memory that both sides have.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock, Thread

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.cohort_passes import Batch, Pass, Prepare, is_short_of_memory
from tacit.federated.stacked_model import StackedModel
from tacit.federated.workers import WorkerDied, cores, ended, forked, how_it_ended

__all__ = ["PassWorkers"]

_ALIGNED_BYTES = 64  # as torch's own memory: products may round by where their factors begin
_SPARE = 2  # how many times the first pass a worker's memory holds; the system gives only what is written
_READY_S = 30.0  # a fork of a process with threads may hang, and one of a process with a GPU cannot calculate
# Errors as which one in a worker is raised here: the first that it is.
_KINDS = (MemoryError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, OSError, RuntimeError)

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A pass whose arrays lie in memory: rows, inputs, targets, there. Its sums are written over its rows."""

    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[str]
    max_grad_norm: float | None
    width: int

    @classmethod
    def of(cls, one: Pass) -> _Asked:
        arrays = _arrays(one)
        return cls(
            shapes=[array.shape for array in arrays],
            dtypes=[array.dtype.str for array in arrays],
            max_grad_norm=one.max_grad_norm,
            width=one.width,
        )

    @property
    def starts(self) -> list[int]:
        """Where each array begins, and where the last ends."""
        found = [0]
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found.append(found[-1] + -(-size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES)
        return found

    def views(self, memory: mmap.mmap) -> list[npt.NDArray[np.generic]]:
        places = zip(self.shapes, self.dtypes, self.starts, strict=False)
        return [np.ndarray(shape, dtype, memory, start) for shape, dtype, start in places]


@dataclass(frozen=True)
class _Wrong:
    """What went wrong in a worker: of which kind, and its type's name. Its words may quote a record and stay there."""

    kind: type[Exception]
    name: str

    @classmethod
    def of(cls, error: Exception) -> _Wrong:
        short = is_short_of_memory(error)
        kind = MemoryError if short else next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
        return cls(kind, type(error).__name__)

    def raised(self) -> Exception:
        return self.kind(f"expected a pass through the model, got {self.name} in one of this process's workers")


@dataclass(eq=False)
class _Worker:
    """A process as this one knows it: `at_work` until its answer is read, and for ever where there is none."""

    process: BaseProcess
    pipe: Connection
    memory: mmap.mmap
    at_work: bool = False

    @classmethod
    def start(cls, stacked: StackedModel, memory_bytes: int) -> _Worker | None:
        """None where there can be none, or where a fork of this process is good for nothing."""
        try:
            memory = mmap.mmap(-1, memory_bytes)
            worker = cls(*forked(partial(_answer, stacked, memory)), memory)
        except OSError:  # too little memory for it, or too many processes
            return None
        with contextlib.suppress(EOFError, OSError):
            worker.pipe.send(_Tried())
            if worker.pipe.poll(_READY_S) and worker.pipe.recv() is None:
                return worker
        worker.kill()
        return None

    def suits(self, memory_bytes: int) -> bool:
        return not self.at_work and self.process.is_alive() and len(self.memory) >= memory_bytes

    def sums(self, one: Pass) -> Tensor:
        asked = _Asked.of(one)
        views = asked.views(self.memory)
        for view, array in zip(views, _arrays(one), strict=True):
            view[...] = array
        self.at_work = True
        try:
            self.pipe.send(asked)
            wrong: _Wrong | None = self.pipe.recv()
        except (EOFError, OSError):
            self.kill()
            how = how_it_ended(self.process)
            raise WorkerDied(f"expected a worker to stay, got {how}; see the system's log for memory") from None
        self.at_work = False
        if wrong is not None:
            raise wrong.raised()
        return torch.from_numpy(views[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class _Tried:
    """Asks a worker whether it can calculate gradients."""


class PassWorkers:
    """Persistent processes that share a cohort's passes with this one.

    *Guarantees*: the sums do not depend on how many processes there are, or on who takes what. A worker that is killed
    at a pass, or raises, fails the whole call: nothing is tried again here, because what went wrong may depend on the
    records. The next call has another worker.

    >>> stacked = StackedModel(torch.nn.Linear(1, 1, bias=False), lambda outputs, targets: (outputs * targets).sum())
    >>> batch = Batch(inputs=torch.ones(2, 1, 1), targets=torch.ones(2, 1, 1), there=torch.tensor([[True], [True]]))
    >>> one = Pass(rows=torch.zeros(2, 1), batch=batch, max_grad_norm=0.5, width=1)
    >>> total, workers = torch.zeros(4, 1), PassWorkers(count=1)
    >>> workers(stacked, [lambda: (torch.tensor([0, 2]), one), lambda: (torch.tensor([1, 3]), one)], total)
    >>> [f"{each:.3f}" for each in total.flatten()]
    ['0.500', '0.500', '0.500', '0.500']
    >>> workers.close()
    """

    def __init__(self, *, count: int | None = None, tell: Callable[[str], None] = lambda _: None) -> None:
        """Prepares; workers are forked when there are passes for them.

        Args:
            count: of processes beside this one, at most; one for each core but this process's when None. None but on
                Linux.
            tell: told when a worker was killed, in a line for the run's log.
        """
        # Elsewhere what calculates may not survive a fork, at the price of a round; and daemons may have no children.
        if sys.platform != "linux" or multiprocessing.current_process().daemon:
            count = 0
        self._count, self._tell = cores() - 1 if count is None else count, tell
        self._stacked: StackedModel | None = None
        self._workers: list[_Worker] = []

    def __call__(self, stacked: StackedModel, passes: Sequence[Prepare], total: Tensor) -> None:
        """As `cohort_passes.Shares`.

        Raises:
            WorkerDied: a worker was killed.
            MemoryError: there was not enough for a pass.
        """
        if not passes:
            return
        first = passes[0]()
        turns = _Turns([lambda: first, *passes[1:]], total)
        self._make_ready(stacked, min(self._count, len(passes) - 1), _Asked.of(first[1]).starts[-1])
        threads: list[Thread] = []
        try:
            for worker in self._workers:
                threads.append(Thread(target=turns.take, args=(worker.sums,), daemon=True))
                threads[-1].start()
            turns.take(lambda one: one.sums(stacked))
        finally:
            turns.stop()
            for thread in filter(Thread.is_alive, threads):
                thread.join()
        for worker in self._workers:
            if worker.at_work:
                self._tell(f"a worker was killed ({how_it_ended(worker.process)}); the owners' steps are lost with it")
        if turns.failed:  # want of memory, after which fewer are tried, only where that is all
            raise min(turns.failed, key=is_short_of_memory)

    def close(self) -> None:
        """Ends them."""
        for worker in self._workers:
            ended(worker.process, worker.pipe)
        self._workers = []

    def _make_ready(self, stacked: StackedModel, count: int, memory_bytes: int) -> None:
        """So many workers at least, where they can be had, of this model and with memory for the longest pass."""
        if self._stacked is not stacked:
            self.close()
        self._stacked = stacked
        for worker in [worker for worker in self._workers if not worker.suits(memory_bytes)]:
            self._workers.remove(worker)
            worker.kill()
        while len(self._workers) < min(count, self._count):
            started = _Worker.start(stacked, _SPARE * memory_bytes)
            if started is None:
                self._count = 0  # nor would the next one be of use
            else:
                self._workers.append(started)


class _Turns:
    """Passes of a call: whoever is free takes the next, until there is none or something went wrong."""

    def __init__(self, passes: Sequence[Prepare], total: Tensor) -> None:
        self._left, self._total, self._lock = deque(passes), total, Lock()
        self.failed: list[Exception] = []

    def take(self, sums: Callable[[Pass], Tensor]) -> None:
        try:
            while (prepare := self._next()) is not None:
                where, one = prepare()
                self._total[where] = sums(one)
        except Exception as error:  # noqa: BLE001  # raised where the call was made, once nobody is at work
            self.failed.append(error)

    def stop(self) -> None:
        """Nobody takes another one."""
        with self._lock:
            self._left.clear()

    def _next(self) -> Prepare | None:
        with self._lock:
            return self._left.popleft() if self._left and not self.failed else None


def _arrays(one: Pass) -> list[npt.NDArray[np.generic]]:
    return [tensor.detach().numpy() for tensor in (one.rows, one.batch.inputs, one.batch.targets, one.batch.there)]


def _answer(stacked: StackedModel, memory: mmap.mmap, asked: _Asked | _Tried) -> _Wrong | None:
    """In a worker: takes a pass and writes its sums over its rows; what went wrong instead."""
    try:
        torch.set_num_threads(1)
        if isinstance(asked, _Tried):
            number = torch.ones(1, requires_grad=True)
            torch.autograd.grad(2 * number, number)
            return None
        rows, inputs, targets, there = (torch.from_numpy(view) for view in asked.views(memory))
        batch = Batch(inputs=inputs, targets=targets, there=there)
        one = Pass(rows=rows, batch=batch, max_grad_norm=asked.max_grad_norm, width=asked.width)
        rows.copy_(one.sums(stacked))
    except Exception as error:  # noqa: BLE001  # the parent raises it
        return _Wrong.of(error)
    return None
