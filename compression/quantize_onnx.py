"""float32 ONNX to int8 ONNX, with float inputs and outputs: the only user of onnxruntime's quantiser."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tacit.compression.export_onnx import INPUT_NAME, strip_onnx
from tacit.compression.silence import silenced

# ONNX Runtime reports usage and writes a device identifier into the home folder unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The norms stay float: quantising their pieces costs accuracy and makes the file larger and slower.
_OPERATORS = ["Conv", "Gemm", "MatMul"]


def dynamic_int8(src: Path, dst: Path) -> None:
    """Write int8 weights; activation ranges are taken at run time, so no data are needed.

    Args:
        src: A float32 ONNX file.
        dst: The quantised file; replaced if it exists.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with silenced(), tempfile.TemporaryDirectory() as scratch:
        prepared = _prepare(src, Path(scratch))
        quantize_dynamic(prepared, dst, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=_OPERATORS)
        strip_onnx(dst)


def static_int8(src: Path, dst: Path, calibration: npt.NDArray[np.float32]) -> None:
    """Write int8 weights and activations (quantise-dequantise form), ranges from `calibration`.

    Guarantees: the file is a function of `src` and `calibration`, not of the order of the latter. It *depends* on
    each calibration input, so private inputs here would void any privacy guarantee: give public ones.

    Args:
        src: A float32 ONNX file.
        dst: The quantised file; replaced if it exists.
        calibration: Public inputs, shape (n, *shape), channel first.

    Raises:
        ValueError: If there is no calibration input, or one is not finite.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    check_calibration(calibration)

    class _Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime ships no types
        def __init__(self) -> None:
            self._inputs: Iterator[npt.NDArray[np.float32]] = iter(calibration)

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            image = next(self._inputs, None)
            return None if image is None else {INPUT_NAME: image[None]}

    with silenced(), tempfile.TemporaryDirectory() as scratch:
        prepared = _prepare(src, Path(scratch))
        quantize_static(
            prepared,
            dst,
            _Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_OPERATORS,
        )
        strip_onnx(dst)


def check_calibration(calibration: npt.NDArray[np.float32]) -> None:
    """Refuse an empty or non-finite calibration set: its ranges would be silently wrong.

    Raises:
        ValueError: If so.

    Example:
        >>> check_calibration(np.zeros((4, 1, 8, 8), dtype=np.float32))
        >>> check_calibration(np.full((4, 1, 8, 8), np.nan, dtype=np.float32))
        Traceback (most recent call last):
            ...
        ValueError: expected finite calibration inputs, got NaN or infinity; clean them first
    """
    if calibration.ndim < 2 or len(calibration) == 0 or calibration.dtype != np.float32:
        raise ValueError(
            f"expected calibration float32 of shape (n, *shape), n >= 1, got {calibration.dtype} "
            f"of shape={calibration.shape}; give public inputs as the model takes them"
        )
    if not np.isfinite(calibration).all():
        raise ValueError("expected finite calibration inputs, got NaN or infinity; clean them first")


def _prepare(src: Path, scratch: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = scratch / "prepared.onnx"
    quant_pre_process(src, prepared)
    return prepared
