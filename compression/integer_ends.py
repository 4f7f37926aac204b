"""Gives a static int8 ONNX file whole numbers as inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from tacit.compression.export_onnx import SCALES, input_names
from tacit.compression.forms import Calibration

__all__ = ["whole_ends"]

_LARGEST = 255


def whole_ends(model: onnx.ModelProto, exported: Path, calibration: Calibration) -> onnx.ModelProto:
    """Make every float input and output of a model uint8, and note its scale and zero point in the metadata.

    Where the model rounds an input or output itself, that node goes, and its scale holds. Elsewhere one is added, with
    the range of the values that calibration shows. Inputs that are whole numbers already, such as words, stay.

    Args:
        model: In quantise-dequantise form.
        exported: The float32 file that it was made from.
        calibration: Inputs, one array for each.

    Returns:
        A model that takes and gives what `scale * (whole - zero)` stands for; metadata `tacit.scales` is JSON of
        {name: [scale, zero]}.
    """
    ends = _Ends(model)
    outputs = _run(exported, calibration)
    scales: dict[str, tuple[float, int]] = {}
    for value, values in zip(ends.model.graph.input, calibration, strict=True):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            scales[value.name] = ends.round_input(value, values)
    for value, values in zip(ends.model.graph.output, outputs, strict=True):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            scales[value.name] = ends.round_output(value, values)
    helper.set_model_props(ends.model, {SCALES: json.dumps(scales)})
    return ends.model


class _Ends:
    """A copy of a model whose ends are being changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self._graph = self.model.graph
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self._graph.initializer}

    def round_input(self, value: onnx.ValueInfoProto, values: npt.NDArray[np.generic]) -> tuple[float, int]:
        users = [node for node in self._graph.node if value.name in node.input]
        value.type.tensor_type.elem_type = TensorProto.UINT8
        if users and all(node.op_type == "QuantizeLinear" for node in users) and self._alike(users):
            scale = self._scale_of(users[0])
            for node in users:
                self._rename_uses(node.output[0], value.name)
                self._graph.node.remove(node)
            return scale
        scale = _scale(values)
        self._rename_uses(value.name, f"{value.name}.float")
        names = [value.name, *self._constants_of(value.name, scale)]
        self._graph.node.insert(0, helper.make_node("DequantizeLinear", names, [f"{value.name}.float"]))
        return scale

    def round_output(self, value: onnx.ValueInfoProto, values: npt.NDArray[np.generic]) -> tuple[float, int]:
        (maker,) = (node for node in self._graph.node if value.name in node.output)
        value.type.tensor_type.elem_type = TensorProto.UINT8
        inner = f"{value.name}.float"
        self._rename_uses(value.name, inner)
        maker.output[list(maker.output).index(value.name)] = inner
        whole = maker.input[0] if maker.op_type == "DequantizeLinear" else None
        rounded = [node for node in self._graph.node if whole in node.output and node.op_type == "QuantizeLinear"]
        if whole is not None and rounded:
            self._rename_uses(whole, value.name)
            rounded[0].output[0] = value.name
            return self._scale_of(maker)
        scale = _scale(values)
        names = [inner, *self._constants_of(value.name, scale)]
        self._graph.node.append(helper.make_node("QuantizeLinear", names, [value.name]))
        return scale

    def _alike(self, nodes: list[onnx.NodeProto]) -> bool:
        return len({(*node.input[1:], node.domain) for node in nodes}) == 1

    def _scale_of(self, node: onnx.NodeProto) -> tuple[float, int]:
        return float(self._constants[node.input[1]]), int(self._constants[node.input[2]])

    def _constants_of(self, name: str, scale: tuple[float, int]) -> tuple[str, str]:
        arrays = {f"{name}.scale": np.float32(scale[0]), f"{name}.zero": np.uint8(scale[1])}
        self._graph.initializer.extend(numpy_helper.from_array(np.array(a), name) for name, a in arrays.items())
        return f"{name}.scale", f"{name}.zero"

    def _rename_uses(self, old: str, new: str) -> None:
        for node in self._graph.node:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new


def _scale(values: npt.NDArray[np.generic]) -> tuple[float, int]:
    """A scale and zero point that hold these values, and 0."""
    least, most = min(0.0, float(np.min(values.astype(np.float64)))), max(0.0, float(np.max(values.astype(np.float64))))
    scale = float(np.float32((most - least) / _LARGEST)) or 1.0
    return scale, round(-least / scale)


def _run(exported: Path, calibration: Calibration) -> list[npt.NDArray[np.generic]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    names = input_names(len(calibration))
    rows = ({n: v[None] for n, v in zip(names, row, strict=True)} for row in zip(*calibration, strict=True))
    answers = [session.run(None, row) for row in rows]
    return [np.concatenate(column) for column in zip(*answers, strict=True)]
