"""float32 TFLite to its other forms, by ai-edge-quantizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from tacit.compression.export_tflite import strip_tflite
from tacit.compression.forms import Calibration, FormRefused, Make, Source
from tacit.compression.ranges_tflite import ranges_of
from tacit.compression.refusals import reason_of
from tacit.compression.silence import silenced
from tacit.compression.tflite_graph import Operator, operators, read_model, write_model

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import ModelT
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

# The weights sit here. Around them the pieces of a norm stay float, which is smaller, faster and no less exact.
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV")
# These give back the numbers that they are given: next to a quantised operator they cost nothing, and move a quarter.
_MOVING = ("MAX_POOL_2D", "TRANSPOSE", "RESHAPE", "PAD", "SLICE", "STRIDED_SLICE")
# What the quantiser adds to the names of tensors.
_SUFFIX = re.compile(r"(_(de|re)?quant(ized)?)+$")
# Four bits for these; depthwise and transposed convolutions, of few weights, keep eight.
_IN_FOUR_BITS = ("FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL", "EMBEDDING_LOOKUP")
# The arithmetic of a model that squares values, as norms do: in eight bits a variance has no digits left.
_IN_SIXTEEN_BITS = ("MEAN", "SUM", "SUB", "ADD", "MUL", "DIV", "RSQRT", "SQRT")
# Past the extremes that were seen, for sixteen bits have room to spare.
_HEADROOM_SIXTEEN = 4.0


def dynamic_int8(source: Source, dst: Path) -> None:
    """Write int8 weights; activation ranges are taken at run time, so no data are needed.

    Args:
        source: With a float32 TFLite file written by `export_tflite`.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
    """
    _write(source, dst, lambda quantise: quantise.add_dynamic_config(".*", _name("*"), 8))


def weight_int8(source: Source, dst: Path) -> None:
    """Write int8 weights, one scale for each output channel; they are floats again before they are used.

    Args:
        source: With a float32 TFLite file written by `export_tflite`.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
    """
    _write(source, dst, lambda quantise: quantise.add_weight_only_config(".*", _name("*"), 8))


def weight_int4(source: Source, dst: Path) -> None:
    """Write int4 weights, one scale for each output channel, int8 ones where LiteRT has no four bits.

    Scales are those of least mean squared error (OCTAV; Sakr et al. 2022, arXiv 2206.06501), which clip the largest
    weights: by their extremes, DS-CNN lost 4 points on the writers, and so none.

    Args:
        source: With a float32 TFLite file written by `export_tflite`.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    def configure(quantise: Quantizer) -> None:
        quantise.add_weight_only_config(".*", _name("*"), 8)
        for kind in _IN_FOUR_BITS:
            quantise.add_weight_only_config(".*", _name(kind), 4, algorithm_key=AlgorithmName.OCTAV)

    _write(source, dst, configure)


def float16(source: Source, dst: Path) -> None:
    """Write weights in half precision; they are float32 again before they are used.

    Args:
        source: With a float32 TFLite file written by `export_tflite`.
        dst: The file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    _write(
        source,
        dst,
        lambda quantise: quantise.add_weight_only_config(
            ".*", _name("*"), 16, algorithm_key=AlgorithmName.FLOAT_CASTING
        ),
    )


def static_int8(source: Source, dst: Path) -> None:
    """Write int8 weights and activations of the layers that hold weights, ranges from the calibration inputs.

    A range is the least and the greatest value seen. (The quantiser's own moving average forgets the extremes, and
    clipped logits by 7 units on the digits.)

    Guarantees: the file is a function of the exported one and the *set* of calibration inputs. It depends on each of
    them, so private ones would void any privacy guarantee.

    Args:
        source: With a float32 TFLite file written by `export_tflite`, and calibration inputs.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
        ValueError: If there is no calibration input, or one is not finite.
    """
    calibration = source.ranges_from()
    _write(source, dst, _static(source, 8), calibration, check=_end_in_floats)


def static_int16(source: Source, dst: Path) -> None:
    """As `static_int8`, with int16 activations, whose ranges reach four times as far as what was seen.

    Args:
        source: With a float32 TFLite file written by `export_tflite`, and calibration inputs.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: No layer has weights that this takes.
        ValueError: If there is no calibration input, or one is not finite.
    """
    calibration = source.ranges_from()
    _write(source, dst, _static(source, 16), calibration, headroom=_HEADROOM_SIXTEEN, check=_end_in_floats)


def full_int8(source: Source, dst: Path) -> None:
    """Write a file that knows whole numbers only, int8 from its inputs to its outputs, norms in int16.

    Args:
        source: With a float32 TFLite file written by `export_tflite`, and calibration inputs.
        dst: The quantised file; replaced if it exists.

    Raises:
        FormRefused: An operator has no integer form; its layer is named.
        ValueError: If there is no calibration input, or one is not finite.
    """
    calibration = source.ranges_from()
    graph = operators(read_model(source.exported))
    wide = _IN_SIXTEEN_BITS if any(_is_square(operator) for operator in graph) else ()
    moving = _moving_beside(graph, {operator.name for operator in graph if operator.kind in wide}, every=True)

    def configure(quantise: Quantizer) -> None:
        quantise.add_static_config(".*", _name("*"), 8, 8)
        for kind in wide:
            quantise.add_static_config(".*", _name(kind), 16, 8)
        if moving:  # or a variance would pass through eight bits on its way to its root
            quantise.add_static_config(_exactly(moving), _name("*"), 16, 8)

    _write(source, dst, configure, calibration, check=_refuse_floats)


def _is_square(operator: Operator) -> bool:
    twice = operator.kind == "MUL" and operator.inputs[0] == operator.inputs[1]
    return twice or operator.kind == "SQUARED_DIFFERENCE"


def _static(source: Source, activation_bits: Literal[8, 16]) -> Callable[[Quantizer], None]:
    graph = operators(read_model(source.exported))
    weighted = {operator.name for operator in graph if operator.kind in _WEIGHTED}
    if not weighted:
        raise FormRefused("expected a layer with weights, such as a convolution, got none; ship float32")
    chosen = _exactly(weighted | _moving_beside(graph, weighted, every=False))

    def configure(quantise: Quantizer) -> None:
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        quantise.add_static_config(chosen, _name("*"), activation_bits, 8)
        for end in ("INPUT", "OUTPUT"):  # named after the operators beside them, which are chosen by name
            quantise.update_quantization_recipe(".*", _name(end), algorithm_key=AlgorithmName.NO_QUANTIZE)

    return configure


def _exactly(names: set[str]) -> str:
    """Operators by the names of their outputs, which is how the quantiser tells one from another."""
    return f"^({'|'.join(map(re.escape, sorted(names)))});$"


def _moving_beside(graph: list[Operator], chosen: set[str], *, every: bool) -> set[str]:
    """Operators that only move values, before or behind chosen ones, over any number of them; or only in between."""
    makers = {number: operator.name for operator in graph for number in operator.outputs}
    users: dict[int, set[str]] = {}
    for operator in graph:
        for number in operator.inputs:
            users.setdefault(number, set()).add(operator.name)
    moving = [operator for operator in graph if operator.kind in _MOVING]
    found: set[str] = {operator.name for operator in moving} if every else set()
    before = None
    while before != found:
        before, among = set(found), chosen | found
        for operator in moving:
            behind = makers.get(operator.inputs[0]) in among
            used = users.get(operator.outputs[0], set())
            ahead = bool(used) and used <= among
            if every and not (behind and ahead):
                found.discard(operator.name)
            elif not every and (behind or ahead):
                found.add(operator.name)
    return found


def _write(
    source: Source,
    dst: Path,
    configure: Callable[[Quantizer], None],
    calibration: Calibration | None = None,
    *,
    headroom: float = 1.0,
    check: Callable[[ModelT], None] | None = None,
) -> None:
    with silenced():
        from ai_edge_quantizer import quantizer

        quantise = quantizer.Quantizer(str(source.exported))
        try:
            configure(quantise)
            recipe = quantise.get_quantization_recipe()
            ranges = ranges_of(source, recipe, calibration, headroom=headroom) if calibration else None
            content = quantise.quantize(ranges).quantized_model
        except (ValueError, RuntimeError, LookupError, NotImplementedError, AttributeError, TypeError) as error:
            raise FormRefused(
                f"the model cannot be quantised: {reason_of(error)}; choose another form or target"
            ) from error
        scratch = dst.with_name(f".{dst.name}")
        try:
            scratch.write_bytes(content)
            model = read_model(scratch)
            _refuse_unchanged(model)
            if check is not None:
                check(model)
                write_model(model, scratch)
            strip_tflite(scratch)
            scratch.replace(dst)
        finally:
            scratch.unlink(missing_ok=True)


def _refuse_unchanged(model: ModelT) -> None:
    from ai_edge_litert.schema_py_generated import TensorType

    small = {TensorType.INT8, TensorType.INT4, TensorType.FLOAT16}
    constants = (tensor for tensor in model.subgraphs[0].tensors if model.buffers[tensor.buffer].data is not None)
    if not any(tensor.type in small for tensor in constants):
        raise FormRefused("expected a layer with weights, such as a convolution, got none; ship float32")


def _end_in_floats(model: ModelT) -> None:
    """Gives floats back where the quantiser left a whole number at an output: the label says float outputs.

    It does so where an output also goes into a quantised layer.
    """
    from ai_edge_litert.schema_py_generated import BufferT, OperatorT, TensorT, TensorType

    graph, whole = model.subgraphs[0], (TensorType.INT8, TensorType.INT16)
    if any(graph.tensors[number].type in whole for number in graph.inputs):
        raise FormRefused("expected floats as inputs of the file, got whole numbers; choose full-integer int8")
    for place, number in enumerate(graph.outputs):
        before = graph.tensors[number]
        if before.type not in whole:
            continue
        after, operator = TensorT(), OperatorT()
        after.shape, after.shapeSignature, after.type = before.shape, before.shapeSignature, TensorType.FLOAT32
        after.name, after.buffer, after.hasRank = before.name + b"_floats", len(model.buffers), before.hasRank
        model.buffers.append(BufferT())
        graph.tensors.append(after)
        operator.opcodeIndex, operator.inputs = _dequantize(model), [number]
        operator.outputs = [len(graph.tensors) - 1]
        graph.operators.append(operator)
        graph.outputs[place] = len(graph.tensors) - 1
        for signature in model.signatureDefs:
            for port in signature.outputs:
                if port.tensorIndex == number:
                    port.tensorIndex = len(graph.tensors) - 1


def _dequantize(model: ModelT) -> int:
    """The number of the operator that makes floats of whole numbers, which the model learns where it has none."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator, OperatorCodeT

    codes = [code.builtinCode for code in model.operatorCodes]
    if BuiltinOperator.DEQUANTIZE not in codes:
        code = OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = BuiltinOperator.DEQUANTIZE
        code.version = 3
        model.operatorCodes.append(code)
    return [code.builtinCode for code in model.operatorCodes].index(BuiltinOperator.DEQUANTIZE)


def _refuse_floats(model: ModelT) -> None:
    from ai_edge_litert.schema_py_generated import TensorType

    tensors = model.subgraphs[0].tensors
    for operator in operators(model):
        touched = {tensors[number].type for number in (*operator.inputs, *operator.outputs) if number >= 0}
        if TensorType.FLOAT32 in touched and operator.kind not in ("QUANTIZE", "DEQUANTIZE"):
            layer = _SUFFIX.sub("", operator.layer)
            where = f"layer {layer!r}" if layer else "the model"
            raise FormRefused(
                f"{where} has no integer form: {operator.kind} stays in floats; choose static int8 with float I/O"
            )


def _name(kind: str) -> TFLOperationName:
    from ai_edge_quantizer.qtyping import TFLOperationName

    return TFLOperationName(kind)


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
