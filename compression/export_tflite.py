"""PyTorch to TFLite: the only user of litert_torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tacit.compression.export_onnx import check_examples, count_outputs, input_names, output_names
from tacit.compression.forms import FormRefused
from tacit.compression.norms_tflite import respell_for_tflite
from tacit.compression.refusals import layer_at, reason_of
from tacit.compression.silence import silenced
from tacit.compression.tflite_graph import layer_paths, operators, read_model, simplify, write_model

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import MetadataT, ModelT

SIGNATURE = "serving_default"
_STAMP = b"tacit"
_NUMBER = re.compile(r"\d+")
# How the converter says what it was busy with.
_EXECUTING = re.compile(r"While executing %\w+ .*?target=torch\.ops\.([\w.]+)")
_TYPES = (torch.float32, torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool)


def channel_last(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Inputs (n, channels, ...) as (n, ..., channels); whole numbers, which count no colours, as they are.

    >>> channel_last(np.zeros((5, 3, 8, 6))).shape, channel_last(np.zeros((5, 3, 8), int)).shape
    ((5, 8, 6, 3), (5, 3, 8))
    """
    moved = values.ndim > 2 and values.dtype.kind == "f"
    return np.ascontiguousarray(np.moveaxis(values, 1, -1)) if moved else values


def export_tflite(model: nn.Module, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write `model` as a float32 TFLite file, channel last, batch size 1.

    Recurrent layers are unrolled: one step of the file for each step of the example.

    Args:
        model: Exported in evaluation mode; left as it is.
        examples: One example of each input, (1, channels, ...), channel first; of floats the file takes
            (1, ..., channels). With two axes only, (1, features), or whole numbers, there is nothing to move.
        path: Of the file; replaced if it exists.

    Raises:
        FormRefused: TFLite cannot hold the model; the layer is named.
        ImportError: If litert-torch is not installed.
        ValueError: If an example is not one input.
    """
    check_examples(examples)
    _check_types(examples)
    frozen = respell_for_tflite(model, examples)
    count_outputs(frozen, examples)  # refuses what is no tensor
    _refuse_chance(frozen, examples)
    moved = [place for place, example in enumerate(examples) if example.dim() > 2 and example.is_floating_point()]
    given = tuple(
        example.movedim(1, -1).contiguous() if place in moved else example for place, example in enumerate(examples)
    )
    with silenced():
        try:
            import litert_torch
        except ModuleNotFoundError as error:
            raise ImportError(f"expected litert-torch, got {error}; install tacit[tflite]") from error
        wrapped = litert_torch.to_channel_last_io(frozen, args=moved).eval() if moved else frozen
        _convert(wrapped, given, path)
        _finish(path, wrapped)


def _check_types(examples: tuple[torch.Tensor, ...]) -> None:
    for number, example in enumerate(examples):
        if example.dtype not in _TYPES:
            raise FormRefused(
                f"expected inputs of float32 or whole numbers, got example {number} of {example.dtype}; call .float() "
                "on the model and its inputs"
            )


def _refuse_chance(model: nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
    """A file draws its random numbers once, when it is written, and would answer with them for ever."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(e.shape, generator=generator) if e.is_floating_point() else e for e in examples]
    answers = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            answer = model(*inputs)
            answers.append([answer] if isinstance(answer, torch.Tensor) else list(answer))
    if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(*answers, strict=True)):
        raise FormRefused(
            f"expected {type(model).__name__} to answer the same twice, got two answers; leave chance out of evaluation"
        )


def _convert(model: nn.Module, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    import litert_torch
    from jaxlib.mlir.ir import MLIRError

    # What torch, jax and the converter raise has no common class below Exception.
    raised = (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        AssertionError,
        ArithmeticError,
        MLIRError,
    )
    try:
        litert_torch.convert(model, examples).export(str(path))
    except raised as error:
        path.unlink(missing_ok=True)
        raise FormRefused(_refusal(error, model, examples)) from error


def _refusal(error: BaseException, model: nn.Module, examples: tuple[torch.Tensor, ...]) -> str:
    wrapped = getattr(model, "wrapped", model)
    found = _EXECUTING.search(str(error))
    if found is None:
        return f"{layer_at(error, wrapped)} cannot be exported: {reason_of(error)}"
    program = torch.export.export(model, examples, strict=False)
    layer = "the model"
    for node in (*program.graph.nodes, *program.run_decompositions().graph.nodes):
        if str(node.target) == found[1] and node.meta.get("nn_module_stack"):
            name, kind = [*node.meta["nn_module_stack"].values()][-1]
            layer = f"layer {name.removeprefix('wrapped.')!r} ({str(kind).rsplit('.', 1)[-1]})"
            break
    return f"{layer} cannot be exported: TFLite has nothing for {found[1]} ({reason_of(error)}); replace it"


def _finish(path: Path, model: nn.Module) -> None:
    written = read_model(path)
    simplify(written)
    _name(written, {path: name.removeprefix("wrapped.") for path, name in layer_paths(model).items()})
    for operator in operators(written):
        # The converter writes down what it cannot translate, too.
        if operator.kind.startswith("STABLEHLO_") or operator.kind == "CUSTOM":
            path.unlink()
            layer = f"layer {operator.layer!r}" if operator.layer else "the model"
            raise FormRefused(f"{layer} cannot be exported: LiteRT has nothing that runs {operator.kind}; replace it")
    write_model(written, path)


def strip_tflite(path: Path) -> None:
    """Shorten a TFLite file's names, put its inputs and outputs in the model's order, and write it anew.

    Names must stay distinct, for the quantiser finds tensors by name. Writing it anew also puts every buffer inside
    the flatbuffer: TFLite-Micro misreads, without an error, the outside buffers that ai-edge-quantizer writes from
    256 KiB on.
    """
    model = read_model(path)
    _name(model, {})
    write_model(model, path)


def _name(model: ModelT, layers: Mapping[str, str]) -> None:
    """Names tensors by number and layer.

    The converter names every tensor after its whole path through the model: a sixth of the file of a small one.
    """
    for subgraph in model.subgraphs:
        for index, tensor in enumerate(subgraph.tensors):
            path = bytes(tensor.name).decode().partition(";")[0]
            tensor.name = (f"{index:x}:{layers[path]}" if path in layers else f"{index:x}").encode()
    for signature in model.signatureDefs:
        subgraph = model.subgraphs[signature.subgraphIndex]
        subgraph.inputs = _named(subgraph, signature.inputs, input_names(len(signature.inputs)))
        subgraph.outputs = _named(subgraph, signature.outputs, output_names(len(signature.outputs)))


def _named(subgraph: Any, ports: list[Any], names: list[str]) -> list[int]:
    """Names ports after the model's arguments, which the converter numbers; returns their tensors in that order."""
    ports.sort(key=lambda port: int(_NUMBER.findall(bytes(port.name).decode())[-1:][0]) if len(ports) > 1 else 0)
    for port, name in zip(ports, names, strict=True):
        port.name = subgraph.tensors[port.tensorIndex].name = name.encode()
    return [port.tensorIndex for port in ports]


def stamp_tflite(path: Path, stamp: Mapping[str, str]) -> None:
    """Write `stamp` as JSON into a metadata entry named "tacit", replacing any there; nothing else changes."""
    from ai_edge_litert.schema_py_generated import BufferT, MetadataT

    model = read_model(path)
    text = json.dumps(dict(sorted(stamp.items()))).encode()
    entry = _stamp_entry(model)
    if entry is None:
        entry = MetadataT()
        entry.name, entry.buffer = _STAMP, len(model.buffers)
        model.buffers.append(BufferT())
        model.metadata = [*(model.metadata or []), entry]
    model.buffers[entry.buffer].data = list(text)
    write_model(model, path)


def read_stamp_tflite(path: Path) -> dict[str, str]:
    """Return the mapping written by `stamp_tflite`; empty if there is none.

    Raises:
        ValueError: If the entry is not a JSON object of strings.
    """
    model = read_model(path)
    entry = _stamp_entry(model)
    if entry is None:
        return {}
    stamp = json.loads(bytes(bytearray(model.buffers[entry.buffer].data)))
    if not isinstance(stamp, dict) or not all(isinstance(value, str) for value in stamp.values()):
        raise ValueError(
            f"expected a JSON object of strings as the stamp, got {stamp!r:.80} in {path}; export it again"
        )
    return stamp


def _stamp_entry(model: ModelT) -> MetadataT | None:
    return next((entry for entry in model.metadata or [] if bytes(entry.name) == _STAMP), None)
