"""Inputs that cost no privacy, to compare artifacts and to time them with: public ones, else made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tacit.federated.noise import public_generator
from tacit.federated.task import Data, Task

__all__ = ["SampleInputs", "sample_inputs"]

_MADE_UP = 256


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """Preprocessed inputs and where they are from.

    Attributes:
        values: (inputs, *shape), float32.
        source: "test" or "public" for a split that was declared public, "synthetic" for made-up ones.
    """

    values: npt.NDArray[np.float32]
    source: Literal["test", "public", "synthetic"]


def sample_inputs(task: Task, data: Data) -> SampleInputs:
    """The test split's inputs, else public ones, else draws from N(0, 1) by a public seed, which read no record.

    Example:
        >>> from tacit.federated.datasets import find_task
        >>> digits = find_task("digits")
        >>> sample_inputs(digits, digits.load()).source
        'test'
    """
    if data.test is not None:
        return SampleInputs(values=data.test.inputs, source="test")
    if data.public is not None:
        return SampleInputs(values=data.public, source="public")
    drawn = public_generator(0, "synthetic inputs").standard_normal((_MADE_UP, *task.interface.shape))
    return SampleInputs(values=drawn.astype(np.float32), source="synthetic")
