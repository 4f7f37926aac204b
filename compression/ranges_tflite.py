"""What the tensors of a TFLite file reach on calibration inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.compression.export_onnx import input_names, output_names
from tacit.compression.export_tflite import SIGNATURE, channel_last
from tacit.compression.forms import Calibration, Source
from tacit.compression.tflite_graph import read_model

__all__ = ["Ranges", "ranges_of"]

# Tensor name -> {"min": array, "max": array}, as ai-edge-quantizer calls them.
Ranges = dict[str, dict[str, npt.NDArray[np.float32]]]

# An output that is clipped is wrong by as much as it is out of range; a quarter more costs a third of a bit.
_HEADROOM_OUTPUTS = 1.25


def ranges_of(
    source: Source, recipe: list[dict[str, Any]], calibration: Calibration, *, headroom: float = 1.0
) -> Ranges:
    """The least and the greatest value of every tensor over the calibration inputs, in any order.

    Args:
        source: With a float32 TFLite file.
        recipe: Of ai-edge-quantizer; what it leaves alone has no range.
        calibration: One array of inputs (n, *shape), channel first, for each input of the model.
        headroom: By which factor ranges are wider than what was seen; those of the model's outputs by 1.25 more.
    """
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.recipe_manager import RecipeManager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    manager = RecipeManager()
    manager.load_quantization_recipe(recipe)
    calibrator = Calibrator(str(source.exported), num_threads=1, qsv_update_func=min_max_update)
    calibrator.calibrate({SIGNATURE: list(_feeds(calibration))}, manager)
    ranges: Ranges = calibrator.get_model_qsvs()
    outputs = output_names(len(read_model(source.exported).subgraphs[0].outputs))
    widened = {name: headroom * (_HEADROOM_OUTPUTS if name in outputs else 1.0) for name in ranges}
    return {name: _widened(extremes, widened[name]) for name, extremes in ranges.items()}


def _feeds(calibration: Calibration) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    names = input_names(len(calibration))
    for example in zip(*(channel_last(values) for values in calibration), strict=True):
        # The converter takes 64 bits for 32, which is what TFLite looks up and counts with.
        given = [values.astype(np.int32) if values.dtype == np.int64 else values for values in example]
        yield {name: values[None] for name, values in zip(names, given, strict=True)}


def _widened(extremes: dict[str, npt.NDArray[np.float32]], factor: float) -> dict[str, npt.NDArray[np.float32]]:
    """A wider range, on the sides of zero that it has."""
    if factor == 1.0 or "min" not in extremes:
        return extremes
    more = (extremes["max"] - extremes["min"]) * np.float32((factor - 1) / 2)
    return {
        "min": np.where(extremes["min"] < 0, extremes["min"] - more, extremes["min"]),
        "max": np.where(extremes["max"] > 0, extremes["max"] + more, extremes["max"]),
    }
