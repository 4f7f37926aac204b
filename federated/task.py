"""What is learned: data, model, loss and the interface that training and devices share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy, mse_loss

from tacit.devices.interface import Interface
from tacit.federated.noise import public_seed

__all__ = ["Data", "DataProblem", "Kind", "Records", "Task", "accuracy", "area_under_roc", "initial_model", "r_squared"]

Model = torch.nn.Module
Kind = Literal["classification", "regression", "anomaly"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Score = Callable[[npt.NDArray[np.float32], npt.NDArray[Any]], float]

_OUTPUT = {"classification": "logits", "regression": "values", "anomaly": "reconstruction"}
_METRIC = {"classification": "accuracy", "regression": "R2", "anomaly": "AUROC"}


class DataProblem(ValueError):
    """Data that cannot be trained on."""


@dataclass(frozen=True)
class Records:
    """Examples with their labels, preprocessed.

    Attributes:
        inputs: (records, *shape), float32.
        labels: (records,), int64 classes; of an anomaly task 0 is normal and 1 is not. Of a regression (records,
            outputs), float32, as `Interface.targets` makes them.
    """

    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]

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
        owners: names of the owners that there are, where the data know them; an index of `of_owner` is a position here.
        status: "public-benchmark" when ε describes the mechanism rather than protects these records.
    """

    private: Records | None
    public: npt.NDArray[np.float32] | None
    test: Records | None
    status: Literal["private", "public-benchmark"]
    of_owner: Callable[[int], Records] | None = None
    owners: tuple[str, ...] | None = None

    @property
    def owner_count(self) -> int | None:
        """How many owners the data come from, where they know it.

        >>> Data(private=None, public=None, test=None, status="private", owners=("anna", "ben")).owner_count
        2
        """
        return None if self.owners is None else len(self.owners)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named learning problem.

    Attributes:
        name: as a recipe names it.
        title: for people.
        interface: input spec, preprocessing and labels.
        load: reads the data; called in the process that needs it.
        build: makes an untrained model from the recipe's model parameters.
        kind: what is told about a record: its class, values, or how unlike the others it is.
        loss_fn: a loss of one's own, from outputs and targets to a number: a sum with a term for each record.
        score_fn: a metric of one's own, from outputs and targets as arrays to a number, higher being better; targets
            are the records' labels, also of an anomaly task.
        score_name: of that metric.

    Raises:
        ValueError: the interface's output is not that of the kind, or one of score_fn and score_name is missing.

    >>> from tacit.federated.datasets import find_task
    >>> digits = find_task("digits")
    >>> digits.metric, digits.outputs
    ('accuracy', 10)
    """

    name: str
    title: str
    interface: Interface
    load: Callable[[], Data]
    build: Callable[[Mapping[str, object]], Model]
    kind: Kind = "classification"
    loss_fn: Loss | None = None
    score_fn: Score | None = None
    score_name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _OUTPUT:
            raise ValueError(f"expected a kind among {', '.join(_OUTPUT)}, got kind={self.kind!r}; choose one")
        if self.interface.output != _OUTPUT[self.kind]:
            raise ValueError(
                f"expected an interface with output={_OUTPUT[self.kind]!r} for kind={self.kind!r}, "
                f"got output={self.interface.output!r}; change one of them"
            )
        if (self.score_fn is None) != (self.score_name is None):
            raise ValueError(
                f"expected score_fn and score_name together, got score_name={self.score_name!r}; give both"
            )

    @property
    def metric(self) -> str:
        """Name of what `score` returns."""
        return self.score_name or _METRIC[self.kind]

    @property
    def outputs(self) -> int:
        """How many numbers a model returns for a record: one a class, one a value, or as many as go in."""
        interface = self.interface
        return math.prod(interface.shape) if self.kind == "anomaly" else len(interface.labels)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A sum over records, so that each record has a gradient of its own.

        Cross-entropy of a class; squared error of values, summed over them; squared error of a reconstruction, as a
        mean over the record's elements.

        Args:
            outputs: the model's, (records, ...).
            targets: of `targets`, for the same records.
        """
        if self.loss_fn is not None:
            return self.loss_fn(outputs, targets)
        if self.kind == "classification":
            return cross_entropy(outputs, targets, reduction="sum")
        if outputs.shape != targets.shape:  # torch would broadcast, and mix records
            raise ValueError(
                f"expected outputs of shape {tuple(targets.shape)}, got {tuple(outputs.shape)}; fix the model"
            )
        squares = mse_loss(outputs, targets, reduction="sum")
        return squares / math.prod(targets.shape[1:]) if self.kind == "anomaly" else squares

    def targets(self, records: Records) -> npt.NDArray[Any]:
        """What the loss compares outputs with: labels, or the inputs themselves where they are to be reconstructed.

        >>> from tacit.federated.datasets import find_task
        >>> find_task("digits").targets(Records(np.zeros((2, 1, 8, 8), np.float32), np.int64([3, 4])))
        array([3, 4])
        """
        return records.inputs if self.kind == "anomaly" else records.labels

    def trial_targets(self, records: int) -> torch.Tensor:
        """Public targets that are valid, for a few records to try a model on: the same each time, and not all alike.

        >>> from tacit.federated.datasets import find_task
        >>> find_task("digits").trial_targets(3)
        tensor([0, 1, 2])
        """
        if self.kind == "classification":
            return torch.arange(records) % len(self.interface.labels)
        shape = self.interface.shape if self.kind == "anomaly" else (len(self.interface.labels),)
        return torch.randn(records, *shape, generator=torch.Generator().manual_seed(0))

    def score(self, model: Model, records: Records) -> float:
        """How good a model is on records: `metric`, of which more is better.

        Raises:
            DataProblem: no records, or an AUROC over records that are all normal or all not.

        >>> from tacit.federated.datasets import find_task
        >>> digits = find_task("digits")
        >>> round(digits.score(initial_model(digits, {}, seed=1), digits.load().test), 1)
        0.1
        """
        if not len(records):
            raise DataProblem(f"expected records to compute {self.metric} on, got none; give a test split some")
        return self.score_outputs(records, _outputs(model, records))

    def score_outputs(self, records: Records, outputs: npt.NDArray[np.float32]) -> float:
        """`score` of outputs that are already there, for instance from an artifact.

        Args:
            records: one or more.
            outputs: (records, ...), in the same order.

        >>> from tacit.federated.datasets import find_task
        >>> records = Records(np.zeros((2, 1, 8, 8), np.float32), np.int64([3, 4]))
        >>> find_task("digits").score_outputs(records, np.eye(10, dtype=np.float32)[[3, 5]])
        0.5
        """
        if self.score_fn is not None:
            return float(self.score_fn(outputs, records.labels))
        if self.kind == "classification":
            return float((outputs.argmax(1) == records.labels).mean())
        if self.kind == "regression":
            return r_squared(outputs, records.labels)
        squares = (outputs.astype(np.float64) - records.inputs) ** 2
        return area_under_roc(squares.reshape(len(squares), -1).mean(axis=1), records.labels)


def r_squared(outputs: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Coefficient of determination, 1 - Σ(y - ŷ)² / Σ(y - ȳ)², as a mean over outputs; 1 is perfect, 0 the mean.

    An output that is the same for all records counts as 1 when it is met exactly, else as 0, as in scikit-learn.

    Args:
        outputs: (records, outputs).
        labels: (records, outputs).

    >>> r_squared(np.float32([[1.0], [2.0]]), np.float32([[1.0], [3.0]]))
    0.5
    """
    wanted = labels.astype(np.float64)
    left = ((wanted - outputs) ** 2).sum(axis=0)
    spread = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=0)
    constant = spread == 0
    explained = 1 - left / np.where(constant, 1.0, spread)
    return float(np.where(constant, left == 0, explained).mean())


def area_under_roc(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Probability that an anomalous record scores higher than a normal one, ties counting half (Mann and Whitney).

    Args:
        scores: (records,), higher for what is more anomalous; what is not a number counts as highest.
        labels: (records,), 0 for normal and 1 for anomalous.

    Raises:
        DataProblem: only one of the two is there.

    >>> area_under_roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    anomalous = labels == 1
    positives, negatives = int(anomalous.sum()), int((~anomalous).sum())
    if not positives or not negatives:
        raise DataProblem(
            f"expected normal and anomalous records for an AUROC, got {negatives} and {positives}; label both"
        )
    _, which, counts = np.unique(np.where(np.isnan(scores), np.inf, scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # from 1, those of equals averaged
    return float((ranks[anomalous].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _outputs(model: Model, records: Records, chunk: int = 1024) -> npt.NDArray[np.float32]:
    model.eval()
    with torch.inference_mode():
        starts = range(0, len(records), chunk)
        return np.concatenate([model(torch.from_numpy(records.inputs[s : s + chunk])).numpy() for s in starts])


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
