"""What goes into a model and what comes out: as data, and as the one implementation that everybody uses.

Training, parity, bundles and devices prepare inputs here and nowhere else, so that a model meets in the field what it
met in training. Augmentation is not part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one example: the most probable label, and the probability of each."""

    label: str
    index: int
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Input spec, preprocessing, labels and postprocessing of a classifier.

    Preprocessing is ``(raw * scale - mean) / std`` in float32; postprocessing is the softmax.

    Args:
        shape: One example without the batch, channel first: ``(1, 8, 8)``, or ``(features,)`` for a table.
        scale: Factor on raw values, for instance 1/255.
        mean: What is subtracted after scaling: one value, or one per channel.
        std: What is divided by after that: one value, or one per channel; greater than zero.
        labels: Names of the classes, in the order of the logits; no two alike.
        output: What the model returns.

    Raises:
        ValueError: A field is out of range, or of the wrong length.

    >>> digits = Interface(shape=(1, 2, 2), scale=1 / 16, mean=(0.5,), std=(0.5,), labels=("even", "odd"))
    >>> digits.preprocess(np.array([[[[0, 8], [16, 4]]]]))
    array([[[[-1. ,  0. ],
             [ 1. , -0.5]]]], dtype=float32)
    >>> digits.postprocess(np.array([[0.0, 2.0]]))[0].label
    'odd'
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    labels: tuple[str, ...]
    output: Literal["logits"] = "logits"

    def __post_init__(self) -> None:
        if not self.shape or any(not _is_integer(size) or size < 1 for size in self.shape):
            raise ValueError(f"expected positive sizes, got shape={self.shape}; give one example's, like (1, 8, 8)")
        if not _is_finite(self.scale) or self.scale == 0:
            raise ValueError(f"expected a finite scale other than 0, got scale={self.scale}; give one, like 1/255")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.shape[0]} or not all(map(_is_finite, values)):
                wanted = f"1 or {self.shape[0]} finite values"
                raise ValueError(f"expected {wanted}, got {name}={values}; give one per channel or one for all")
        if min(self.std) <= 0:
            raise ValueError(f"expected values greater than 0, got std={self.std}; leave out a constant channel")
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"expected one or more labels, no two alike, got labels={self.labels}; rename them")
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"expected labels that are strings, got labels={self.labels}; write them in quotes")
        if self.output != "logits":
            raise ValueError(f"expected output 'logits', got output={self.output!r}; export the model without softmax")

    def preprocess(self, raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Turn raw values into the model's input.

        Args:
            raw: ``(batch, *shape)``, channel first, of any real type.

        Returns:
            ``(batch, *shape)``, float32, contiguous.

        Raises:
            ValueError: The type is not real, the shape is another, or a value is not finite (also after scaling).

        >>> table = Interface(shape=(2,), mean=(1.0,), std=(2.0,), labels=("no", "yes"))
        >>> table.preprocess(np.array([[1, 5]]))
        array([[0., 2.]], dtype=float32)
        """
        raw = np.asarray(raw)
        if raw.dtype.kind not in "biuf":
            raise ValueError(f"expected real numbers, got dtype={raw.dtype}; convert them first")
        if raw.shape[1:] != self.shape or raw.ndim == 0:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"expected raw values of shape (batch, {wanted}), got shape={raw.shape}; reshape them")
        per_channel = (-1, *[1] * (len(self.shape) - 1))
        mean = np.array(self.mean, dtype=np.float32).reshape(per_channel)
        std = np.array(self.std, dtype=np.float32).reshape(per_channel)
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with its place
            ready = (raw.astype(np.float32) * np.float32(self.scale) - mean) / std
        finite = np.isfinite(ready)
        if not finite.all():
            first = tuple(map(int, np.argwhere(~finite)[0]))
            raise ValueError(f"expected finite values, got raw[{first}]={raw[first]}; clean or clip the data")
        return np.ascontiguousarray(ready, dtype=np.float32)

    def postprocess(self, logits: npt.NDArray[Any]) -> list[Prediction]:
        """Turn the model's output into answers.

        Args:
            logits: ``(batch, classes)``, classes as many as labels.

        Returns:
            One prediction per example; of equal logits the first wins.

        Raises:
            ValueError: The shape is another, or a logit is not finite.

        >>> table = Interface(shape=(2,), labels=("no", "yes"))
        >>> table.postprocess(np.array([[0.0, 0.0]]))
        [Prediction(label='no', index=0, probability=0.5, probabilities=(0.5, 0.5))]
        """
        logits = np.asarray(logits, dtype=np.float64)
        if logits.ndim != 2 or logits.shape[1] != len(self.labels):
            wanted = f"(batch, {len(self.labels)})"
            raise ValueError(f"expected logits of shape {wanted}, got shape={logits.shape}; check model and labels")
        if not np.isfinite(logits).all():
            raise ValueError("expected finite logits, got NaN or infinity; the model or its input is damaged")
        if not len(logits):
            return []
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return [self._prediction(row) for row in exponentials / exponentials.sum(axis=1, keepdims=True)]

    def _prediction(self, probabilities: npt.NDArray[np.float64]) -> Prediction:
        index = int(probabilities.argmax())
        return Prediction(
            label=self.labels[index],
            index=index,
            probability=float(probabilities[index]),
            probabilities=tuple(probabilities.tolist()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict that ``json.dumps`` takes.

        >>> Interface(shape=(2,), labels=("no", "yes")).to_json()["shape"]
        [2]
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild an interface from ``to_json``'s dict.

        Raises:
            ValueError: A key is unknown or missing, or a value is not acceptable.

        >>> table = Interface(shape=(2,), labels=("no", "yes"))
        >>> Interface.from_json(table.to_json()) == table
        True
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            difference = sorted(map(str, set(data) ^ known))
            raise ValueError(f"expected the keys {sorted(known)}, got another set, differing in {difference}; fix them")
        sequences = ("shape", "mean", "std", "labels")
        if not all(isinstance(data[name], list | tuple) for name in sequences):
            raise ValueError(f"expected lists for {sorted(sequences)}, got another type; write them in brackets")
        return cls(
            shape=tuple(data["shape"]),
            scale=data["scale"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            labels=tuple(data["labels"]),
            output=data["output"],
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
