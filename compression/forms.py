"""The forms that a model can ship in, under honest names, and what each of them is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Label = Literal[
    "float32",
    "float16",
    "dynamic-range int8",
    "weight-only int8",
    "weight-only int4",
    "static int8 (float I/O)",
    "static int8 (integer I/O)",
    "full-integer int8",
    "static int16 activations, int8 weights (float I/O)",
]
# One array of inputs (n, *shape), channel first, for each input of the model.
Calibration = tuple[npt.NDArray[np.generic], ...]


class FormRefused(ValueError):
    """A target that cannot hold a model in a form; it names the layer, where one is to blame, and what would do."""


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        label: What reports call it, where its target has no other (`targets.label_of`): never just "int8".
        calibrated: Whether ranges of activations are taken from inputs, on which the file then depends.
    """

    label: Label
    calibrated: bool


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "float32": Form("float32", calibrated=False),
        "float16": Form("float16", calibrated=False),
        "dynamic_int8": Form("dynamic-range int8", calibrated=False),
        "weight_int8": Form("weight-only int8", calibrated=False),
        "weight_int4": Form("weight-only int4", calibrated=False),
        "static_int8": Form("static int8 (float I/O)", calibrated=True),
        "full_int8": Form("full-integer int8", calibrated=True),
        "static_int16": Form("static int16 activations, int8 weights (float I/O)", calibrated=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a form of a model is made from.

    Attributes:
        model: In evaluation mode; left as it is.
        examples: One example of each input, (1, *shape); only shapes and types are used.
        exported: The model as a float32 file of the target.
        calibration: Inputs that are public or made from the model alone, for forms that are calibrated.
    """

    model: nn.Module
    examples: tuple[torch.Tensor, ...]
    exported: Path
    calibration: Calibration | None = None

    def ranges_from(self) -> Calibration:
        """The calibration inputs, checked: an empty, constant or non-finite set would give silently wrong ranges.

        Raises:
            ValueError: If they are missing or useless.

        Example:
            >>> source = Source(model=nn.ReLU(), examples=(torch.zeros(1, 2),), exported=Path("model.onnx"),
            ...                 calibration=(np.zeros((4, 2), np.float32),))
            >>> source.ranges_from()
            Traceback (most recent call last):
                ...
            ValueError: expected calibration inputs that differ, got the same value everywhere; give real ones
        """
        if self.calibration is None:
            raise ValueError(
                "expected calibration inputs, got none; declare a public split, or calibrate synthetically"
            )
        if len(self.calibration) != len(self.examples):
            raise ValueError(
                f"expected calibration for each of {len(self.examples)} inputs, got {len(self.calibration)}; give all"
            )
        for values, example in zip(self.calibration, self.examples, strict=True):
            _check_calibration(values, tuple(example.shape[1:]))
        return self.calibration


def _check_calibration(values: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if values.shape[1:] != shape or len(values) == 0:
        raise ValueError(
            f"expected calibration of shape (n, {', '.join(map(str, shape))}), n >= 1, got shape={values.shape}; "
            "give inputs as the model takes them"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("expected finite calibration inputs, got NaN or infinity; clean them first")
    if values.dtype.kind == "f" and values.size > 1 and (values == values.flat[0]).all():
        raise ValueError("expected calibration inputs that differ, got the same value everywhere; give real ones")


# Writes a form of a source to a file.
Make = Callable[[Source, Path], None]
