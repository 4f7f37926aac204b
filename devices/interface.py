"""What goes into a model and what comes out: as data, and as the one implementation that everybody uses.

Training, parity, bundles and devices prepare inputs here and nowhere else, so that a model meets in the field what it
met in training. Augmentation is not part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

Output = Literal["logits", "probabilities", "values", "reconstruction"]

# Keys that came later than the first bundles; they belong to outputs that these did not have.
_LATER: dict[str, Any] = {"target_mean": [0.0], "target_std": [1.0], "threshold": None}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one example: the most probable label, and the probability of each."""

    label: str
    index: int
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Input spec, preprocessing, labels and postprocessing of a model.

    Preprocessing is ``(raw * scale - mean) / std`` in float32. Postprocessing follows from what the model returns: of
    logits the softmax (`postprocess`), of values ``output * target_std + target_mean`` (`values`), of a reconstruction
    its mean squared error (`anomaly_scores`).

    Args:
        shape: One example without the batch, channel first: ``(1, 8, 8)``, or ``(features,)`` for a table.
        scale: Factor on raw values, for instance 1/255.
        mean: What is subtracted after scaling: one value, or one per channel.
        std: What is divided by after that: one value, or one per channel; greater than zero.
        labels: Names of the classes in the order of the logits, or of the values; no two alike. Of a reconstruction
            two, for what is normal and what is not.
        output: What the model returns: "logits", "probabilities" where the softmax is inside, "values", or
            "reconstruction" of its own input.
        target_mean: Of values: what was subtracted before training, one or one per value.
        target_std: Of values: what was divided by after that, one or one per value; greater than zero.
        threshold: Of a reconstruction: the anomaly score above which an example is anomalous; None when nobody has
            declared one.

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
    output: Output = "logits"
    target_mean: tuple[float, ...] = (0.0,)
    target_std: tuple[float, ...] = (1.0,)
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not self.shape or any(not _is_integer(size) or size < 1 for size in self.shape):
            raise ValueError(f"expected positive sizes, got shape={self.shape}; give one example's, like (1, 8, 8)")
        if not _is_finite(self.scale) or self.scale == 0:
            raise ValueError(f"expected a finite scale other than 0, got scale={self.scale}; give one, like 1/255")
        _check_scaling(mean=self.mean, std=self.std, width=self.shape[0], each="channel")
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"expected one or more labels, no two alike, got labels={self.labels}; rename them")
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"expected labels that are strings, got labels={self.labels}; write them in quotes")
        if self.output not in get_args(Output):
            wanted = ", ".join(map(repr, get_args(Output)))
            raise ValueError(f"expected output in {wanted}, got output={self.output!r}; export without softmax")
        self._check_output()

    def _check_output(self) -> None:
        """That what belongs to one kind of output is given with that kind alone."""
        _check_scaling(target_mean=self.target_mean, target_std=self.target_std, width=len(self.labels), each="value")
        if self.output != "values" and (self.target_mean, self.target_std) != ((0.0,), (1.0,)):
            raise ValueError(
                f"expected target_mean and target_std with output='values' only, got output={self.output!r}; "
                "leave them out"
            )
        if self.output == "reconstruction" and len(self.labels) != 2:
            raise ValueError(
                f"expected 2 labels with output='reconstruction', got labels={self.labels}; name what is normal and "
                "what is not"
            )
        if self.threshold is None:
            return
        if self.output != "reconstruction":
            raise ValueError(
                f"expected a threshold with output='reconstruction' only, got output={self.output!r}; leave it out"
            )
        if not _is_finite(self.threshold) or self.threshold < 0:
            raise ValueError(f"expected a finite threshold of 0 or more, got threshold={self.threshold}; give one")

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
            logits: ``(batch, classes)``, classes as many as labels; or the probabilities, where a model returns these.

        Returns:
            One prediction per example; of equal logits the first wins.

        Raises:
            ValueError: The shape is another, a logit is not finite, or the model does not return logits.

        >>> table = Interface(shape=(2,), labels=("no", "yes"))
        >>> table.postprocess(np.array([[0.0, 0.0]]))
        [Prediction(label='no', index=0, probability=0.5, probabilities=(0.5, 0.5))]
        """
        if self.output != "probabilities":
            self._expect_output("logits", "values() or anomaly_scores()")
        logits = self._outputs(logits, self.output, (len(self.labels),))
        if not len(logits):
            return []
        if self.output == "probabilities":
            return [self._prediction(row) for row in logits]
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

    def values(self, outputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Turn the model's output into values in the units of the data: ``output * target_std + target_mean``.

        Args:
            outputs: ``(batch, values)``, values as many as labels.

        Returns:
            ``(batch, values)``, float64.

        Raises:
            ValueError: The shape is another, an output is not finite, or the model does not return values.

        >>> rent = Interface(shape=(2,), labels=("euros",), output="values", target_mean=(500.0,), target_std=(100.0,))
        >>> rent.values(np.array([[0.5], [-1.0]])).tolist()
        [[550.0], [400.0]]
        """
        self._expect_output("values", "postprocess() or anomaly_scores()")
        outputs = self._outputs(outputs, "values", (len(self.labels),))
        raw: npt.NDArray[np.float64] = outputs * np.array(self.target_std) + np.array(self.target_mean)
        return raw

    def targets(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Turn values in the units of the data into what a model is trained towards; `values` is the way back.

        Args:
            values: ``(batch, values)``, values as many as labels.

        Returns:
            ``(batch, values)``, float32: ``(value - target_mean) / target_std``.

        Raises:
            ValueError: The shape is another, a value is not finite, or the model does not return values.

        >>> rent = Interface(shape=(2,), labels=("euros",), output="values", target_mean=(500.0,), target_std=(100.0,))
        >>> rent.targets(np.array([[550], [400]])).tolist()
        [[0.5], [-1.0]]
        """
        self._expect_output("values", "class positions")
        values = self._outputs(values, "values", (len(self.labels),))
        ready: npt.NDArray[np.float32] = ((values - np.array(self.target_mean)) / np.array(self.target_std)).astype(
            "f4"
        )
        return ready

    def anomaly_scores(self, inputs: npt.NDArray[Any], outputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Say how badly each example is reconstructed: its squared error, as a mean over the example's elements.

        Args:
            inputs: preprocessed, ``(batch, *shape)``.
            outputs: the model's, of the same shape.

        Returns:
            ``(batch,)``, float64; above `threshold` an example is anomalous.

        Raises:
            ValueError: A shape is another, a value is not finite, or the model does not return a reconstruction.

        >>> pump = Interface(shape=(2,), labels=("normal", "anomalous"), output="reconstruction", threshold=1.0)
        >>> pump.anomaly_scores(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])).tolist()
        [2.0]
        """
        self._expect_output("reconstruction", "postprocess() or values()")
        wanted, found = self._outputs(inputs, "inputs", self.shape), self._outputs(outputs, "outputs", self.shape)
        if len(wanted) != len(found):
            raise ValueError(f"expected as many outputs as inputs, got {len(found)} and {len(wanted)}; pass one batch")
        scores: npt.NDArray[np.float64] = (
            ((wanted - found) ** 2).reshape(len(wanted), math.prod(self.shape)).mean(axis=1)
        )
        return scores

    def _expect_output(self, output: Output, instead: str) -> None:
        if self.output != output:
            raise ValueError(f"expected a model that returns {output}, got output={self.output!r}; use {instead}")

    def _outputs(self, values: npt.NDArray[Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        values = np.asarray(values, dtype=np.float64)
        if values.ndim == 0 or values.shape[1:] != shape:
            wanted = ", ".join(["batch", *map(str, shape)])
            raise ValueError(f"expected {name} of shape ({wanted}), got shape={values.shape}; check model and labels")
        if not np.isfinite(values).all():
            raise ValueError(f"expected finite {name}, got NaN or infinity; the model or its input is damaged")
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict that ``json.dumps`` takes; a classifier's has those of a classifier.

        >>> Interface(shape=(2,), labels=("no", "yes")).to_json()["shape"]
        [2]
        """
        own = asdict(self) if self.output != "logits" else {k: v for k, v in asdict(self).items() if k not in _LATER}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}

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
        data = _LATER | dict(data)
        if set(data) != known:
            difference = sorted(map(str, set(data) ^ known))
            raise ValueError(f"expected the keys {sorted(known)}, got another set, differing in {difference}; fix them")
        sequences = ("shape", "mean", "std", "labels", "target_mean", "target_std")
        if not all(isinstance(data[name], list | tuple) for name in sequences):
            raise ValueError(f"expected lists for {sorted(sequences)}, got another type; write them in brackets")
        return cls(
            shape=tuple(data["shape"]),
            scale=data["scale"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            labels=tuple(data["labels"]),
            output=data["output"],
            target_mean=tuple(data["target_mean"]),
            target_std=tuple(data["target_std"]),
            threshold=data["threshold"],
        )


def _check_scaling(*, width: int, each: str, **scaling: tuple[float, ...]) -> None:
    """Checks a mean and a deviation, in this order, of `width` channels or values."""
    for name, values in scaling.items():
        if len(values) not in {1, width} or not all(map(_is_finite, values)):
            wanted = f"1 or {width} finite values"
            raise ValueError(f"expected {wanted}, got {name}={values}; give one per {each} or one for all")
    name, deviation = list(scaling.items())[-1]
    if min(deviation) <= 0:
        raise ValueError(f"expected values greater than 0, got {name}={deviation}; leave out a constant {each}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
