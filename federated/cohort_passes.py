"""Many owners' sums of gradients in passes through a model: who goes together, on which device, in how much memory."""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.accelerator import Accelerator
from tacit.federated.stacked_layers import Order
from tacit.federated.stacked_model import StackedModel
from tacit.federated.task import Records, Task

__all__ = ["Batch", "CohortPasses", "CohortRecords", "Pass", "Prepare", "Shares", "is_short_of_memory"]

_LOG = logging.getLogger("tacit")
# What one pass through the model should hold: about what a processor's cache does, or what keeps a GPU at work.
_PASS_BYTES, _PASS_BYTES_OF_GPU = 2**25, 2**29
# With convolutions, so that there are a few passes to share; smaller ones cost 4 % on one core.
_PASS_BYTES_OF_CONVOLUTIONS = 2**24
# Of the C library's `mallopt`: when freed memory goes back to the system, and what is taken from it piece by piece.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BYTES = 2**28, 2**25
# How torch's allocators and libraries say it, in a RuntimeError that has no class of its own.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")

Tensor = torch.Tensor
Coins = Sequence[npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some owners' batches, each filled up with zeros to the same number of records.

    Attributes:
        inputs: (owners, records, *shape).
        targets: (owners, records, ...).
        there: (owners, records); False for what only fills.
    """

    inputs: Tensor
    targets: Tensor
    there: Tensor

    def on(self, device: torch.device) -> Batch:
        """The same there."""
        return Batch(inputs=self.inputs.to(device), targets=self.targets.to(device), there=self.there.to(device))

    def pieces(self, width: int) -> Iterator[Batch]:
        """The same in pieces of at most so many records of each owner."""
        for start in range(0, self.there.shape[1], width):
            part = slice(start, start + width)
            yield Batch(inputs=self.inputs[:, part], targets=self.targets[:, part], there=self.there[:, part])


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All that a pass through the model depends on, wherever it is taken.

    Attributes:
        rows: the owners' models, (owners, parameters).
        batch: theirs.
        max_grad_norm: C; None for the plain mean.
        width: how many records of each owner go through at a time.
    """

    rows: Tensor
    batch: Batch
    max_grad_norm: float | None
    width: int

    def sums(self, stacked: StackedModel) -> Tensor:
        """Each owner's sum of clipped gradients, or its mean gradient, (owners, parameters)."""
        records = self.batch.there.sum(1, keepdim=True).clamp(min=1)
        total = None
        for piece in self.batch.pieces(self.width):
            if self.max_grad_norm is None:
                found = stacked.weighted_sum(self.rows, piece.inputs, piece.targets, piece.there / records)
            else:
                found = stacked.clipped_sum(self.rows, piece.inputs, piece.targets, piece.there, self.max_grad_norm)
            total = found if total is None else total.add_(found)
        return torch.zeros_like(self.rows) if total is None else total


# Makes a pass, and says which rows of the whole its sums are.
Prepare = Callable[[], tuple[Tensor, Pass]]


class Shares(Protocol):
    """Has passes taken in more processes than this one."""

    def __call__(self, stacked: StackedModel, passes: Sequence[Prepare], total: Tensor) -> None:
        """Writes each pass's sums to their rows of the total; passes come longest first."""
        ...


@dataclass(frozen=True)
class CohortRecords:
    """All owners' records, each owner's filled up with zeros to the longest.

    Attributes:
        inputs: (owners, records, *shape).
        targets: (owners, records, ...).
        known: (owners, records); whether a record has a class that there is.
    """

    inputs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.generic]
    known: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, everybody: Sequence[Records], task: Task) -> CohortRecords:
        """Of owners in their order."""
        most = max(1, *(len(records) for records in everybody))
        pairs = [(records.inputs, task.targets(records)) for records in everybody]
        inputs = np.zeros((len(everybody), most, *pairs[0][0].shape[1:]), np.float32)
        targets = np.zeros((len(everybody), most, *pairs[0][1].shape[1:]), pairs[0][1].dtype)
        known = np.zeros((len(everybody), most), bool)
        for place, (given, wanted) in enumerate(pairs):
            inputs[place, : len(given)], targets[place, : len(given)] = given, wanted
            known[place, : len(given)] = True
        if task.kind == "classification":
            wrong = (targets < 0) | (targets >= len(task.interface.labels))
            known &= ~wrong
            targets[wrong] = 0
        return cls(inputs, targets, known)

    def batch(self, owners: npt.NDArray[np.int64], coins: Coins, width: int) -> Batch:
        """Of some owners, each filled up to `width` records."""
        places = np.zeros((len(coins), width), np.int64)
        there = np.zeros((len(coins), width), bool)
        for row, chosen in enumerate(coins):
            places[row, : len(chosen)] = chosen
            there[row, : len(chosen)] = True
        there &= self.known[owners[:, None], places]
        inputs, targets = self.inputs[owners[:, None], places], self.targets[owners[:, None], places]
        # What fills is somebody's first record: zeros are finite whatever that one is.
        inputs[~there] = 0.0
        if targets.dtype.kind == "f":
            targets[~there] = 0.0
        # Copied to memory of torch's, which begins at the same offset everywhere: products may round by it.
        ours = [torch.from_numpy(array).clone() for array in (inputs, targets, there)]
        return Batch(inputs=ours[0], targets=ours[1], there=ours[2])


class CohortPasses:
    """Takes batches of many owners through one model, each owner with weights of its own.

    One thread a process: two were a third slower, because what a pass does between its products needs Python's lock.
    Other processes share the passes of convolutions, which cost much more than to send what they need.

    *Guarantees*: who goes together depends on the sizes of batches alone, not on who takes the passes. Where memory is
    short, fewer go together from then on: the same batches again, and no new draws.
    """

    def __init__(self, task: Task, model: torch.nn.Module, *, device: Accelerator, share: Shares | None = None) -> None:
        """Prepares a copy of a model.

        Args:
            task: gives the loss.
            model: without layers that `unstackable_layers` names.
            device: where.
            share: takes passes in other processes too, where that is worth it; whoever made it ends it.
        """
        alone, drawn = StackedModel(model, task.loss), torch.get_rng_state()
        record_bytes = alone.record_bytes(torch.zeros(1, *task.interface.shape))
        # A model that draws (dropout) goes on drawing in this process: in others it would draw the same again.
        draws = not torch.equal(drawn, torch.get_rng_state())
        self._share = share if device == "cpu" and Order.mixes(model) and not draws else None
        self._device = torch.device(device)
        self._stacked = StackedModel(copy.deepcopy(model).to(self._device), task.loss)
        self._at_once = max(1, _pass_bytes(model, device) // max(1, record_bytes))
        self._warned = False
        if device == "cpu":
            _keep_freed_memory()

    def __call__(self, rows: Tensor, records: CohortRecords, coins: Coins, max_grad_norm: float | None) -> Tensor:
        """Each owner's sum of clipped gradients, or its mean gradient, (owners, parameters).

        Args:
            rows: the owners' models, (owners, parameters).
            records: of the owners.
            coins: which of each owner's records are its batch; an empty one gives zeros.
            max_grad_norm: C; None for the plain mean.

        Raises:
            MemoryError: there is not enough for one record.
        """
        while True:
            try:
                return self._sums(rows, records, coins, max_grad_norm)
            except (RuntimeError, MemoryError) as error:
                if not is_short_of_memory(error):
                    raise
            self._take_fewer(max(len(chosen) for chosen in coins) * len(coins))

    def _take_fewer(self, asked: int) -> None:
        tried = min(self._at_once, asked)
        if tried <= 1:
            raise MemoryError(
                "expected memory to take one record through the model, got less; train a smaller model, or where there "
                "is more memory"
            )
        self._at_once = tried // 2
        if not self._warned:  # with no number: how many records a batch holds is secret
            _LOG.warning("memory is short: fewer owners' records go through the model at once from here on")
        self._warned = True

    def _sums(self, rows: Tensor, records: CohortRecords, coins: Coins, max_grad_norm: float | None) -> Tensor:
        passes = list(_passes([len(chosen) for chosen in coins], self._at_once))

        def prepared(some: npt.NDArray[np.int64], width: int) -> tuple[Tensor, Pass]:
            batch = records.batch(some, [coins[n] for n in some], width).on(self._device)
            where = torch.from_numpy(some).to(self._device)
            own, at_a_time = rows if len(passes) == 1 else rows[where], max(1, self._at_once // len(some))
            return where, Pass(rows=own, batch=batch, max_grad_norm=max_grad_norm, width=at_a_time)

        if len(passes) == 1:
            return prepared(*passes[0])[1].sums(self._stacked)
        total = torch.empty_like(rows)
        share = self._share if torch.get_num_threads() == 1 else None
        (share or _alone)(self._stacked, [partial(prepared, some, width) for some, width in passes], total)
        return total


def _alone(stacked: StackedModel, passes: Sequence[Prepare], total: Tensor) -> None:
    """As `Shares`, in this process alone."""
    for prepare in passes:
        where, one = prepare()
        total[where] = one.sums(stacked)


def _pass_bytes(model: torch.nn.Module, device: Accelerator) -> int:
    """From the model and device alone: what is in a pass shows in how its sums are rounded."""
    if device != "cpu":
        return _PASS_BYTES_OF_GPU
    return _PASS_BYTES_OF_CONVOLUTIONS if Order.mixes(model) else _PASS_BYTES


def _passes(lengths: Sequence[int], at_once: int) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Who goes through the model together, and what their batches are filled up to.

    Owners whose batches are about as long go together, so that little is filled up. Passes are of as few shapes as may
    be, because libraries prepare a convolution for each: all of a step are of as many owners, the last one made up with
    some that are there already. A single pass leaves the owners in their order.

    >>> [(some.tolist(), width) for some, width in _passes([3, 17, 0, 9, 4], 40)]
    [([1, 3], 18), ([4, 0], 4), ([2, 2], 1)]
    """
    order = np.argsort([-length for length in lengths], kind="stable")
    most = max(1, at_once // _filled(lengths[order[0]]))
    size = -(-len(order) // -(-len(order) // most))
    if size == len(order):
        yield np.arange(size), _filled(lengths[order[0]])
        return
    for start in range(0, len(order), size):
        some = order[start : start + size]
        yield np.resize(some, size), _filled(lengths[some[0]])


def _filled(length: int) -> int:
    """At least the length and 1, of four binary digits and zeros.

    >>> [_filled(length) for length in (0, 1, 15, 16, 17, 100)]
    [1, 1, 15, 16, 18, 104]
    """
    unit = 1 << max(0, length.bit_length() - 4)
    return max(1, -(-length // unit) * unit)


def _keep_freed_memory() -> None:
    """Has this process keep a quarter of a gigabyte of what it frees, where the C library is GNU's.

    Each pass needs as much as the last, and what comes from the system anew is cleared by it page by page: with
    convolutions a third of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)


def is_short_of_memory(error: Exception) -> bool:
    """Whether something failed for want of memory, however torch says it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in _NO_MEMORY)
