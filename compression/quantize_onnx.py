"""float32 ONNX in fewer bits, in every form that ONNX holds: the only user of onnxruntime's quantiser."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, version_converter

from tacit.compression.export_onnx import input_names, save_onnx
from tacit.compression.forms import FormRefused, Make, Source
from tacit.compression.integer_ends import whole_ends
from tacit.compression.silence import silenced
from tacit.compression.weights_onnx import RECURRENT, shrink_weights

# ONNX Runtime reports usage and writes a device identifier into the home folder unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The norms stay float: quantising their pieces costs accuracy and makes the file larger and slower.
_OPERATORS = ["Conv", "Gemm", "MatMul"]
_PRODUCTS = ["Gemm", "MatMul"]
# Part of the operator before them, where that is one of those; elsewhere the quantiser leaves them alone.
_CLIPPING = ["Relu", "Clip"]
# A matrix takes one scale, and a tenth less time, if each column's greatest weight is at least this share of all.
_EVEN = 0.25
# Weights of operators without an int8 kernel: stored in 8 bits, computed with as floats.
_STORED = RECURRENT | {"ConvTranspose", "Gather"}
_INT4_OPSET = 21


def float16(source: Source, dst: Path) -> None:
    """Write weights as float16; inputs, outputs and computing stay float32.

    onnxruntime's CPU has few float16 kernels: a graph of float16 throughout is cast to and fro there, and no faster.

    Args:
        source: With a float32 ONNX file.
        dst: Replaced if it exists.

    Raises:
        FormRefused: A weight is too great for float16, or there is none.
    """
    _store_weights(source, dst, bits=16)


def weight_int8(source: Source, dst: Path) -> None:
    """Write weights as int8, with a scale for each channel; computing stays float32.

    Args:
        source: With a float32 ONNX file.
        dst: Replaced if it exists.

    Raises:
        FormRefused: There are no weights to store.
    """
    _store_weights(source, dst, bits=8)


def weight_int4(source: Source, dst: Path) -> None:
    """Write weights as int4, with a scale for each 32 of a channel; computing stays float32. Takes opset 21.

    Args:
        source: With a float32 ONNX file.
        dst: Replaced if it exists.

    Raises:
        FormRefused: There are no weights to store.
    """
    _store_weights(source, dst, bits=4)


def _store_weights(source: Source, dst: Path, *, bits: int) -> None:
    with silenced():
        model = onnx.load(source.exported)
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        if bits == 4 and opset < _INT4_OPSET:
            model = version_converter.convert_version(model, _INT4_OPSET)
        shrink_weights(model, bits=bits)
        save_onnx(model, dst)


def dynamic_int8(source: Source, dst: Path) -> None:
    """Write int8 weights; ranges of what is multiplied with matrices are taken at run time, so no data are needed.

    Convolutions, recurrent layers and tables are stored in int8 and computed in float: onnxruntime's ConvInteger takes
    two to seven times as long.

    Args:
        source: With a float32 ONNX file.
        dst: Replaced if it exists.

    Raises:
        FormRefused: There is no matrix product by weights.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with silenced(), tempfile.TemporaryDirectory() as scratch:
        prepared, made = _prepare(source.exported, Path(scratch)), Path(scratch, "made.onnx")
        quantize_dynamic(
            prepared,
            made,
            weight_type=QuantType.QInt8,
            per_channel=not all(_matrices(onnx.load(prepared)).values()),
            op_types_to_quantize=_PRODUCTS,
        )
        model = onnx.load(made)
        if not any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in model.graph.node):
            raise FormRefused("expected a matrix product by weights, got none; choose weight-only int8")
        shrink_weights(model, bits=8, operators=_STORED | {"Conv"}, refuse_none=False)
        save_onnx(model, dst)


def static_int8(source: Source, dst: Path) -> None:
    """Write int8 weights and activations (quantise-dequantise form), ranges from the calibration inputs.

    Guarantees: the file is a function of the source, not of the order of its calibration inputs. It *depends* on
    each of them, so private ones would void any privacy guarantee.

    Args:
        source: With a float32 ONNX file, and calibration inputs.
        dst: Replaced if it exists.

    Raises:
        FormRefused: There is no convolution and no matrix product.
        ValueError: If there is no calibration input, or one is not finite.
    """
    _quantize(source, dst, activations="QUInt8")


def full_int8(source: Source, dst: Path) -> None:
    """Write static int8 whose float inputs and outputs are whole numbers of 8 bits too, from 0 to 255.

    Their scales and zero points are in the metadata, under `tacit.scales`. Operators without an int8 kernel in
    onnxruntime (norms, softmax, recurrent layers) still compute with floats inside.

    Args:
        source: With a float32 ONNX file, and calibration inputs.
        dst: Replaced if it exists.

    Raises:
        FormRefused: As `static_int8`.
        ValueError: As `static_int8`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "static.onnx")
        static_int8(source, made)
        with silenced():
            save_onnx(whole_ends(onnx.load(made), source.exported, source.ranges_from()), dst)


def static_int16(source: Source, dst: Path) -> None:
    """Write int8 weights and 16-bit activations (quantise-dequantise form), for accelerators that have them.

    onnxruntime's CPU has no kernels for these: it computes with floats that it rounds to 16 bits, more slowly than
    float32.

    Args:
        source: With a float32 ONNX file, and calibration inputs.
        dst: Replaced if it exists.

    Raises:
        FormRefused: As `static_int8`.
        ValueError: As `static_int8`.
    """
    _quantize(source, dst, activations="QUInt16")


def _quantize(source: Source, dst: Path, *, activations: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    calibration = source.ranges_from()

    class _Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime ships no types
        def __init__(self) -> None:
            self._inputs = zip(*calibration, strict=True)

        def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
            example = next(self._inputs, None)
            names = input_names(len(calibration))
            return None if example is None else {n: v[None] for n, v in zip(names, example, strict=True)}

    with silenced(), tempfile.TemporaryDirectory() as scratch:
        prepared, made = _prepare(source.exported, Path(scratch)), Path(scratch, "made.onnx")
        float_model = onnx.load(prepared)
        one_scale = {"quant_type": QuantType.QInt8, "symmetric": True}
        quantize_static(
            prepared,
            made,
            _Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType[activations],
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_OPERATORS + _CLIPPING,
            extra_options={
                "TensorQuantOverrides": {name: [one_scale] for name, even in _matrices(float_model).items() if even}
            },
        )
        model = onnx.load(made)
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            raise FormRefused("expected a convolution or a matrix product, got none; choose float16")
        shrink_weights(model, bits=8, operators=_STORED, refuse_none=False)
        save_onnx(model, dst)


def _prepare(src: Path, scratch: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = scratch / "prepared.onnx"
    # Its symbolic shapes fail on operators as plain as ReduceMax; what the quantiser asks for, onnx infers as well.
    quant_pre_process(src, prepared, skip_symbolic_shape=True)
    return prepared


def _matrices(model: onnx.ModelProto) -> dict[str, bool]:
    """Which matrices of weights there are, and whether one scale serves all columns of each."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, bool] = {}
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS or node.input[1] not in tensors or len(tensors[node.input[1]].dims) != 2:
            continue
        rows = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        greatest = np.abs(numpy_helper.to_array(tensors[node.input[1]])).max(axis=1 if rows else 0)
        found[node.input[1]] = bool(greatest.min() >= _EVEN * greatest.max())
    return found


FORMS: Mapping[str, Make] = MappingProxyType(
    {
        "float16": float16,
        "dynamic_int8": dynamic_int8,
        "weight_int8": weight_int8,
        "weight_int4": weight_int4,
        "static_int8": static_int8,
        "full_int8": full_int8,
        "static_int16": static_int16,
    }
)
