"""From a PyTorch graph to the bytes of an ExecuTorch program: the only user of executorch and its quantiser."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from tacit.compression.forms import Calibration, FormRefused
from tacit.compression.spell_executorch import aten, is_spelled, spelled, without_detours

# What torch.export raises of a model that it does not take.
TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError)
# How far a program may be from its model: times as far as its int8 graph, and a share of the largest output.
_TIMES, _FLOAT_SHARE, _INT8_SHARE, _LEAST = 3.0, 1e-3, 0.02, 1e-3
_PROBES = 6
_OPERATOR = re.compile(r"(?:aten|prims|quantized_decomposed)[.:]+(\w+)")
_WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)


def spelled_and_folded(model: nn.Module, examples: tuple[Tensor, ...]) -> fx.GraphModule:
    """The model's graph; what does not depend on the inputs is computed now, later it would take scales along."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    traced = constant_prop_pass(torch.export.export(spelled(model, examples), examples, strict=False))
    folded: fx.GraphModule = traced.module(check_guards=False)
    without_detours(folded.graph)
    folded.recompile()
    # Once more, for the values that nodes have now.
    again: fx.GraphModule = torch.export.export(folded, examples, strict=False).module(check_guards=False)
    return again


def quantised(graph: fx.GraphModule, examples: tuple[Tensor, ...], calibration: Calibration | None) -> fx.GraphModule:
    """The graph with int8 convolutions and linear layers; without calibration, their ranges are taken at run time.

    Raises:
        FormRefused: There is nothing to quantise, or a convolution that XNNPACK would leave as float32.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=calibration is None)
    if calibration is not None:
        observed = MinMaxObserver.with_args(eps=2**-12)
        config = replace(
            config,
            input_activation=replace(config.input_activation, observer_or_fake_quant_ctr=observed),
            output_activation=replace(config.output_activation, observer_or_fake_quant_ctr=observed),
        )
    if calibration is None:
        _check_convolutions(graph)
    quantizer = XNNPACKQuantizer()
    for operator in _WEIGHTED:
        quantizer.set_operator_type(operator, config)
    quantizer.set_filter_function(lambda node: not is_spelled(node))
    prepared = prepare_pt2e(graph, quantizer)
    for values in zip(*(calibration or [example.numpy() for example in examples]), strict=True):
        prepared(*(torch.from_numpy(np.ascontiguousarray(value[None])) for value in values))
    converted: fx.GraphModule = convert_pt2e(prepared)
    _check_weights(converted)
    return converted


def _check_weights(converted: fx.GraphModule) -> None:
    """A form is not called int8 whose weights are not."""
    names = [str(node.target) for node in converted.graph.nodes if node.op == "get_attr"]
    tensors = [_attribute(converted, name) for name in dict.fromkeys(names) if not name.startswith("spelled_")]
    weights = [tensor for tensor in tensors if tensor is not None and tensor.dim() > 1]
    whole = sum(tensor.numel() for tensor in weights if tensor.dtype == torch.int8)
    if 2 * whole < sum(tensor.numel() for tensor in weights) or not whole:
        raise FormRefused(
            f"expected most weights in convolutions and linear layers, which XNNPACK quantises, got {whole} of "
            f"{sum(tensor.numel() for tensor in weights)}; leave the model as float32, or use another target"
        )


def _attribute(graph: fx.GraphModule, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    found = getattr(graph.get_submodule(path), leaf)
    return found if isinstance(found, Tensor) else None


def _check_convolutions(graph: fx.GraphModule) -> None:
    """XNNPACK's ranges at run time are for images all the way from the input; others would stay float32, or fail."""
    for node in graph.graph.nodes:
        if "conv" not in str(node.target) or node.op != "call_function" or is_spelled(node):
            continue
        source = node
        while source.args and isinstance(source.args[0], fx.Node) and source.meta["val"].dim() == 4:
            source = source.args[0]
        if source.meta["val"].dim() != 4:
            layers = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
            raise FormRefused(
                f"expected convolutions of images for dynamic-range int8, got layer {''.join(layers[-1:])!r} "
                f"after {source.meta['val'].dim()} axes; use static int8, or another target"
            )


def lowered(graph: fx.GraphModule, examples: tuple[Tensor, ...]) -> bytes:
    """The program of a graph, all that XNNPACK takes in XNNPACK.

    Raises:
        FormRefused: An operator that ExecuTorch does not have; by layer.
    """
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError, InternalError
    from torch._export.verifier import SpecViolationError

    program = torch.export.export(graph, examples, strict=False)
    try:
        edge = to_edge_transform_and_lower(
            program, transform_passes=[RemoveNoopExpandCopyPass()], partitioner=[XnnpackPartitioner()]
        )
        return bytes(edge.to_executorch().buffer)
    except (*TRACING_ERRORS, ExportError, InternalError, SpecViolationError) as error:
        said = " ".join(str(error).split())[:200]
        raise FormRefused(
            f"expected operators that ExecuTorch has, got {_operator_in(said, program)}: {said}; replace it, or choose "
            "another target"
        ) from error


def check_program(
    content: bytes, model: nn.Module, inputs: list[tuple[Tensor, ...]], quantised: nn.Module | None = None
) -> None:
    """Refuse a program that does not run, or computes something else than it should: both are written at times.

    Args:
        content: The program.
        model: What it should answer as.
        inputs: Compared on these.
        quantised: Its int8 graph; the program may then be about as far from the model as that one is in PyTorch.

    Raises:
        FormRefused: So it is.
    """
    from executorch.extension.pybindings import _C

    try:
        program = _C._load_for_executorch_from_buffer(content)
        answers = [program.forward(one) for one in inputs]
    except RuntimeError as error:
        raise FormRefused(
            f"expected a program that runs, got: {' '.join(str(error).split())[:200]}; choose another form or target"
        ) from error
    wanted = _answers(model, inputs)
    plain = _answers(quantised, inputs) if quantised is not None else wanted
    for place, right in enumerate(wanted):
        off = float((torch.stack([answer[place] for answer in answers]) - right).abs().max())
        largest, expected = float(right.abs().max()), float((plain[place] - right).abs().max())
        share = _FLOAT_SHARE if quantised is None else _INT8_SHARE
        if not off <= _TIMES * expected + share * max(largest, _LEAST):
            raise FormRefused(
                f"expected XNNPACK to compute what the model does, got outputs off by {off:.2g} where the largest is "
                f"{largest:.2g}; choose another form or target"
            )


def _answers(model: nn.Module, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """One tensor (inputs, ...) an output."""
    with torch.no_grad():
        found = [model(*one) for one in inputs]
    each = [one if isinstance(one, tuple | list) else (one,) for one in found]
    return [torch.stack(column) for column in zip(*each, strict=True)]


def probes(examples: tuple[Tensor, ...], calibration: Calibration | None) -> list[tuple[Tensor, ...]]:
    """A few inputs to compare a program on: the first to calibrate with, or noise and the example."""
    if calibration is not None:
        firsts = zip(*(values[:_PROBES] for values in calibration), strict=True)
        return [tuple(torch.from_numpy(np.ascontiguousarray(value[None])) for value in values) for values in firsts]
    generator = torch.Generator().manual_seed(0)
    noise = [
        tuple(torch.randn(e.shape, generator=generator) if e.is_floating_point() else e.contiguous() for e in examples)
        for _ in range(_PROBES)
    ]
    return [*noise, tuple(example.contiguous() for example in examples)]


def _operator_in(said: str, program: torch.export.ExportedProgram) -> str:
    named = set(_OPERATOR.findall(said))
    for node in program.run_decompositions().graph.nodes:
        if node.op == "call_function" and set(_OPERATOR.findall(str(node.target))) & named:
            layers = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
            return f"{node.target} in layer {layers[-1]!r}" if layers else str(node.target)
    return "one that it does not"
