"""Does the artifact answer as its model does? Plain numpy on outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tacit.compression.material import Answers

Outputs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Threshold:
    """What an artifact must reach against its own PyTorch model, and when a layer is to blame.

    Attributes:
        agreement: Least top-1 agreement.
        cosine: Of values: least cosine.
        difference: Of values: largest difference, over the spread of the model's own outputs.
        layer: By how much of its norm a layer may differ before it counts as the one to blame.
    """

    agreement: float
    cosine: float
    difference: float
    layer: float


_STATIC = Threshold(0.98, 0.98, 1.0, 0.2)  # clips what is out of range
# By honest label.
THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "float32": Threshold(0.999, 0.9999, 1e-3, 1e-3),
        "float16": Threshold(0.995, 0.999, 2e-2, 1e-2),
        "dynamic-range int8": Threshold(0.98, 0.98, 0.25, 0.1),
        "weight-only int8": Threshold(0.98, 0.98, 0.25, 0.1),
        "weight-only int4": Threshold(0.9, 0.9, 2.0, 0.4),
        "static int8 (float I/O)": _STATIC,
        "static int8 (integer I/O)": _STATIC,
        "full-integer int8": _STATIC,
        "static int16 activations, int8 weights (float I/O)": Threshold(0.98, 0.98, 1.0, 0.1),
    }
)
_TIE = 0.1  # of the spread of a model's logits: nearer than that, it does not tell two classes apart


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How near an artifact's outputs are to its model's.

    Attributes:
        top1_agreement: Fraction of inputs with the same most likely class; an answer with NaN or infinity never
            agrees. None of values, which have no class.
        max_abs: Largest difference of two outputs; infinite if the artifact gave NaN or infinity.
        cosine: Mean over the inputs of the cosine of the two logit vectors; an input with NaN or infinity counts -1.
            Of values one cosine over all of them, after taking the model's mean output away from both: of a single
            value, or of values far from 0, the cosine of each input says nothing.
        spread: Of values: standard deviation of the model's outputs over the inputs, by which `max_abs` is judged.
            None of classes.
        n: Inputs that were compared; 0 where nobody counted.
        clear_agreement: As `top1_agreement`, but a class that the model itself finds about as likely counts too: one
            within a tenth of the spread of its logits.
    """

    top1_agreement: float | None
    max_abs: float
    cosine: float
    spread: float | None = None
    n: int = 0
    clear_agreement: float | None = None

    def _by_chance(self, share: float) -> float:
        """How far below a share so few inputs may fall by chance: three standard deviations of a binomial one."""
        return 3.0 * math.sqrt(share * (1.0 - share) / self.n) if self.n else 0.0

    def passes(self, label: str) -> bool:
        """Tell whether the agreement suffices for an artifact of this label, and every output is finite.

        Raises:
            ValueError: If the label is not one of `THRESHOLDS`.

        Example:
            >>> parity = Parity(top1_agreement=0.99, max_abs=0.5, cosine=1.0)
            >>> parity.passes("float32"), parity.passes("dynamic-range int8")
            (False, True)
            >>> Parity(top1_agreement=None, max_abs=0.5, cosine=0.999, spread=4.0).passes("dynamic-range int8")
            True
        """
        if label not in THRESHOLDS:
            raise ValueError(f"expected a label of {sorted(THRESHOLDS)}, got label={label!r}; use label_of")
        if not math.isfinite(self.max_abs):
            return False
        threshold = THRESHOLDS[label]
        if self.top1_agreement is not None:
            exact = label.startswith("float") or self.clear_agreement is None
            agreement = self.top1_agreement if exact else max(self.top1_agreement, self.clear_agreement or 0.0)
            return agreement >= threshold.agreement - self._by_chance(threshold.agreement)
        near = self.max_abs <= threshold.difference * (self.spread or 0.0)
        return near and self.cosine >= threshold.cosine


def edge_inputs(inputs: Outputs) -> Outputs:
    """Inputs at the edge of what a model meets: zeros, and the least and the greatest value everywhere, (3, *shape).

    Example:
        >>> edge_inputs(np.float32([[1.0, -2.0]])).tolist()
        [[0.0, 0.0], [-2.0, -2.0], [1.0, 1.0]]
    """
    values = np.array([0.0, inputs.min(), inputs.max()], np.float32)
    return np.broadcast_to(values.reshape(-1, *[1] * (inputs.ndim - 1)), (3, *inputs.shape[1:])).copy()


class ArtifactRuntime(Protocol):
    """A loaded artifact, as parity needs it."""

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return outputs (n, ...) for inputs (n, *shape), channel first."""
        ...


def compare(reference: Outputs, artifact: Outputs, *, answers: Answers = "classes") -> Parity:
    """Compare an artifact's outputs with its own model's on the same inputs.

    Args:
        reference: Shape (n, classes), or (n, ...) of values; finite.
        artifact: The same shape; NaN and infinity make the result fail, they are never dropped.
        answers: "classes" of logits, "values" of numbers that count as they are.

    Returns:
        The figures.

    Raises:
        ValueError: If the shapes differ, there is nothing to compare, or the reference is not finite.

    Example:
        >>> compare(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
        Parity(top1_agreement=1.0, max_abs=0.0, cosine=1.0, spread=None, n=2, clear_agreement=1.0)
        >>> compare(np.float32([[1.0], [3.0]]), np.float32([[1.0], [3.5]]), answers="values").spread
        1.0
    """
    axes = reference.ndim == 2 or (answers == "values" and reference.ndim > 2)
    if reference.shape != artifact.shape or not axes or reference.size == 0:
        wanted = "(n, classes)" if answers == "classes" else "(n, ...)"
        raise ValueError(
            f"expected two arrays of one shape {wanted}, got {reference.shape} and {artifact.shape}; predict on the "
            "same inputs"
        )
    if not np.isfinite(reference).all():
        raise ValueError("expected finite reference outputs, got NaN or infinity; the model itself is broken")
    rows = (reference.reshape(len(reference), -1), artifact.reshape(len(artifact), -1))
    return _compare_classes(*rows) if answers == "classes" else _compare_values(*rows)


def _compare_classes(reference_logits: Outputs, artifact_logits: Outputs) -> Parity:
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(artifact_logits).all(axis=1))  # (n,)
    reference = reference_logits.astype(np.float64)
    artifact = np.where(finite[:, None], artifact_logits, 0.0).astype(np.float64)
    agrees = finite & (reference.argmax(axis=1) == artifact.argmax(axis=1))
    difference = float(np.abs(reference - artifact).max()) if finite.all() else math.inf
    cosine = np.where(finite, _cosine(reference, artifact), -1.0)
    rows = np.arange(len(reference))
    behind = reference.max(axis=1) - reference[rows, artifact.argmax(axis=1)]
    spread = float((reference - reference.mean(axis=1, keepdims=True)).std())
    return Parity(
        top1_agreement=float(agrees.mean()),
        max_abs=difference,
        cosine=float(cosine.mean()),
        n=len(reference),
        clear_agreement=float((finite & (behind <= _TIE * spread)).mean()),
    )


def _compare_values(reference_values: Outputs, artifact_values: Outputs) -> Parity:
    reference = reference_values.astype(np.float64)  # (n, values)
    around = reference - reference.mean(axis=0)
    spread = float(np.sqrt((around**2).mean()))
    if not np.isfinite(artifact_values).all():
        return Parity(top1_agreement=None, max_abs=math.inf, cosine=-1.0, spread=spread, n=len(reference))
    artifact = artifact_values.astype(np.float64)
    cosine = _cosine(around.reshape(1, -1), (artifact - reference.mean(axis=0)).reshape(1, -1))
    difference = float(np.abs(reference - artifact).max())
    return Parity(top1_agreement=None, max_abs=difference, cosine=float(cosine[0]), spread=spread, n=len(reference))


def check_parity(
    model: nn.Module,
    artifact_runtime: ArtifactRuntime,
    inputs: npt.NDArray[np.float32],
    *,
    answers: Answers = "classes",
) -> Parity:
    """Compare an artifact in the runtime that will run it with its own PyTorch model.

    Args:
        model: The model that was exported; evaluated, its mode is put back.
        artifact_runtime: The loaded artifact.
        inputs: Shape (n, *shape), channel first.
        answers: "classes" of logits, "values" of numbers that count as they are.

    Returns:
        The comparison of the two on these inputs.

    Example:
        >>> from types import SimpleNamespace
        >>> doubled = SimpleNamespace(predict=lambda inputs: 2 * inputs)
        >>> check_parity(nn.Identity(), doubled, np.eye(2, dtype=np.float32)).max_abs
        1.0
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            reference = np.asarray(model(torch.from_numpy(inputs)).numpy(), dtype=np.float32)
    finally:
        model.train(training)
    return compare(reference, artifact_runtime.predict(inputs), answers=answers)


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cosine by row, 1 for two zero rows and 0 for one, shape (n,)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1).astype(np.float64)
    products: npt.NDArray[np.float64] = (a * b).sum(axis=1)
    return np.where(norms > 0.0, products / np.where(norms > 0.0, norms, 1.0), equal)
