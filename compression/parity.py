"""Does the artifact answer as its model does? Plain numpy on logits."""

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

Logits = npt.NDArray[np.float32]

# Least top-1 agreement of an artifact with its own PyTorch model, by honest label.
MINIMUM_AGREEMENT: Mapping[str, float] = MappingProxyType(
    {"float32": 0.999, "dynamic-range int8": 0.98, "static int8 (float I/O)": 0.98}
)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How near an artifact's logits are to its model's.

    Attributes:
        top1_agreement: Fraction of inputs with the same most likely class; an answer with NaN or infinity never
            agrees.
        max_abs: Largest difference of two logits; infinite if the artifact gave NaN or infinity.
        cosine: Mean over the inputs of the cosine of the two logit vectors; an input with NaN or infinity counts -1.
    """

    top1_agreement: float
    max_abs: float
    cosine: float

    def passes(self, label: str) -> bool:
        """Tell whether the agreement suffices for an artifact of this label, and every logit is finite.

        Raises:
            ValueError: If the label is not one of `MINIMUM_AGREEMENT`.

        Example:
            >>> parity = Parity(top1_agreement=0.99, max_abs=0.5, cosine=1.0)
            >>> parity.passes("float32"), parity.passes("dynamic-range int8")
            (False, True)
        """
        if label not in MINIMUM_AGREEMENT:
            raise ValueError(f"expected a label of {sorted(MINIMUM_AGREEMENT)}, got label={label!r}; use label_of")
        return math.isfinite(self.max_abs) and self.top1_agreement >= MINIMUM_AGREEMENT[label]


class ArtifactRuntime(Protocol):
    """A loaded artifact, as parity needs it."""

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits (n, classes) for inputs (n, *shape), channel first."""
        ...


def compare(reference_logits: Logits, artifact_logits: Logits) -> Parity:
    """Compare an artifact's logits with its own model's on the same inputs.

    Args:
        reference_logits: Shape (n, classes), finite.
        artifact_logits: Shape (n, classes); NaN and infinity make the result fail, they are never dropped.

    Returns:
        The three figures.

    Raises:
        ValueError: If the shapes differ, there is nothing to compare, or the reference is not finite.

    Example:
        >>> compare(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
        Parity(top1_agreement=1.0, max_abs=0.0, cosine=1.0)
    """
    if reference_logits.shape != artifact_logits.shape or reference_logits.ndim != 2 or reference_logits.size == 0:
        raise ValueError(
            f"expected two arrays of one shape (n, classes), got {reference_logits.shape} and "
            f"{artifact_logits.shape}; predict on the same inputs"
        )
    if not np.isfinite(reference_logits).all():
        raise ValueError("expected finite reference logits, got NaN or infinity; the model itself is broken")
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(artifact_logits).all(axis=1))  # (n,)
    reference = reference_logits.astype(np.float64)
    artifact = np.where(finite[:, None], artifact_logits, 0.0).astype(np.float64)
    agrees = finite & (reference.argmax(axis=1) == artifact.argmax(axis=1))
    difference = float(np.abs(reference - artifact).max()) if finite.all() else math.inf
    cosine = np.where(finite, _cosine(reference, artifact), -1.0)
    return Parity(top1_agreement=float(agrees.mean()), max_abs=difference, cosine=float(cosine.mean()))


def check_parity(model: nn.Module, artifact_runtime: ArtifactRuntime, inputs: npt.NDArray[np.float32]) -> Parity:
    """Compare an artifact in the runtime that will run it with its own PyTorch model.

    Args:
        model: The model that was exported; evaluated, its mode is put back.
        artifact_runtime: The loaded artifact.
        inputs: Shape (n, *shape), channel first.

    Returns:
        The comparison of the two on these inputs.

    Example:
        >>> from types import SimpleNamespace
        >>> doubled = SimpleNamespace(predict=lambda inputs: 2 * inputs)
        >>> check_parity(nn.Identity(), doubled, np.eye(2, dtype=np.float32))
        Parity(top1_agreement=1.0, max_abs=1.0, cosine=1.0)
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            reference = np.asarray(model(torch.from_numpy(inputs)).numpy(), dtype=np.float32)
    finally:
        model.train(training)
    return compare(reference, artifact_runtime.predict(inputs))


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cosine by row, 1 for two zero rows and 0 for one, shape (n,)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1).astype(np.float64)
    products: npt.NDArray[np.float64] = (a * b).sum(axis=1)
    return np.where(norms > 0.0, products / np.where(norms > 0.0, norms, 1.0), equal)
