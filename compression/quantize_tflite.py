"""float32 TFLite to int8 TFLite, with float inputs and outputs: the only user of ai-edge-quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tacit.compression.export_tflite import INPUT_NAME, SIGNATURE, strip_tflite
from tacit.compression.quantize_onnx import check_calibration
from tacit.compression.silence import silenced

if TYPE_CHECKING:
    from ai_edge_quantizer.quantizer import Quantizer

# Tensor name -> {"min": array, "max": array}, as ai-edge-quantizer calls them.
_Ranges = dict[str, dict[str, npt.NDArray[np.float32]]]

# The weights sit here; the pieces of a GroupNorm stay float, which is smaller, faster and no less exact.
_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")


def dynamic_int8(src: Path, dst: Path) -> None:
    """Write int8 weights; activation ranges are taken at run time, so no data are needed.

    Args:
        src: A float32 TFLite file written by `export_tflite`.
        dst: The quantised file; replaced if it exists.
    """
    with silenced():
        from ai_edge_quantizer import quantizer, recipe

        _write(quantizer.Quantizer(str(src), recipe.dynamic_wi8_afp32()), dst, None)


def static_int8(src: Path, dst: Path, calibration: npt.NDArray[np.float32]) -> None:
    """Write int8 weights and activations of the layers that hold weights, ranges from `calibration`.

    A range is the least and the greatest value seen. (The quantiser's own moving average forgets the extremes, and
    clipped logits by 7 units on the digits.)

    Guarantees: the file is a function of `src` and the *set* of calibration inputs. It depends on each of them, so
    private inputs here would void any privacy guarantee: give public ones.

    Args:
        src: A float32 TFLite file written by `export_tflite`.
        dst: The quantised file; replaced if it exists.
        calibration: Public inputs, shape (n, *shape), channel first.

    Raises:
        ValueError: If there is no calibration input, or one is not finite.
    """
    check_calibration(calibration)
    with silenced():
        from ai_edge_quantizer import qtyping, quantizer, recipe
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        quantise = quantizer.Quantizer(str(src), recipe.static_wi8_ai8())
        for operation in qtyping.TFLOperationName:
            if operation.value not in (*_OPERATORS, "*"):
                quantise.update_quantization_recipe(
                    regex=".*", operation_name=operation, algorithm_key=AlgorithmName.NO_QUANTIZE
                )
        _write(quantise, dst, _ranges(quantise, np.ascontiguousarray(np.moveaxis(calibration, 1, -1))))


def _ranges(quantise: Quantizer, images: npt.NDArray[np.float32]) -> _Ranges:
    ranges: _Ranges = {}
    for image in images:
        seen = quantise.calibrate({SIGNATURE: [{INPUT_NAME: image[None]}]}, num_threads=1)
        for name, extremes in seen.items():
            so_far = ranges.setdefault(name, extremes)
            ranges[name] = {
                "min": np.minimum(so_far["min"], extremes["min"]),
                "max": np.maximum(so_far["max"], extremes["max"]),
            }
    return ranges


def _write(quantise: Quantizer, dst: Path, ranges: Mapping[str, Mapping[str, npt.NDArray[np.float32]]] | None) -> None:
    dst.write_bytes(quantise.quantize(ranges).quantized_model)
    strip_tflite(dst)
