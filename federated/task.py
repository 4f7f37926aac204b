"""What is learned: data, model, loss and the interface that training and devices share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tacit.devices.interface import Interface
from tacit.federated.noise import public_seed

__all__ = ["Data", "DataProblem", "Records", "Task", "accuracy", "initial_model"]

Model = torch.nn.Module


class DataProblem(ValueError):
    """Data that cannot be trained on."""


@dataclass(frozen=True)
class Records:
    """Examples with their labels, preprocessed.

    Attributes:
        inputs: (records, *shape), float32.
        labels: (records,), integer classes.
    """

    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Records:
        """The records at some positions.

        >>> Records(np.float32([[1.0], [2.0], [3.0]]), np.int64([0, 1, 0])).take(np.int64([2])).inputs.tolist()
        [[3.0]]
        """
        return Records(self.inputs[indices], self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, split by who may see it.

    Attributes:
        private: what the owners hold between them; None when it comes by owner.
        public: inputs declared public, without labels, (records, *shape); None when there are none.
        test: a public test split, or None.
        of_owner: reads the records of one owner by its index, for data that come by owner; None otherwise.
        status: "public-benchmark" when ε describes the mechanism rather than protects these records.
    """

    private: Records | None
    public: npt.NDArray[np.float32] | None
    test: Records | None
    status: Literal["private", "public-benchmark"]
    of_owner: Callable[[int], Records] | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named learning problem.

    Attributes:
        name: as a recipe names it.
        title: for people.
        interface: input spec, preprocessing and labels.
        load: reads the data; called in the process that needs it.
        build: makes an untrained model from the recipe's model parameters.
    """

    name: str
    title: str
    interface: Interface
    load: Callable[[], Data]
    build: Callable[[Mapping[str, object]], Model]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy: a sum over records, so that each record has a gradient of its own."""
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def initial_model(task: Task, parameters: Mapping[str, object], seed: int) -> Model:
    """An untrained model whose weights depend only on the recipe's public seed.

    >>> from tacit.federated.datasets import find_task
    >>> first, second = (initial_model(find_task("digits"), {}, seed=1) for _ in range(2))
    >>> torch.equal(first[0].weight, second[0].weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(public_seed(seed, "initial weights"))
        return task.build(parameters)


def accuracy(model: Model, records: Records, *, chunk: int = 1024) -> float:
    """Share of records whose most probable class is the label, in [0, 1].

    >>> scores, labels = np.float32([[2.0, 1.0], [2.0, 1.0]]), np.int64([0, 1])
    >>> accuracy(torch.nn.Identity(), Records(scores, labels))
    0.5
    """
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(records), chunk):
            logits = model(torch.from_numpy(records.inputs[start : start + chunk]))
            correct += int((logits.argmax(1).numpy() == records.labels[start : start + chunk]).sum())
    return correct / len(records)
