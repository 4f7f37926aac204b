"""PyTorch to ONNX: the only user of torch.onnx."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from tacit.compression.silence import silenced

INPUT_NAME, OUTPUT_NAME = "input", "logits"


def export_onnx(model: nn.Module, example: torch.Tensor, path: Path, *, opset: int = 18) -> None:
    """Write `model` as one float32 ONNX file, channel first, with a free batch size.

    Opset 18 spells GroupNorm as InstanceNormalization between two reshapes, which onnxruntime runs faster than the
    GroupNormalization of opset 21 once the convolutions are int8.

    Args:
        model: Exported in evaluation mode; left as it is.
        example: One input, shape (1, *shape).
        path: Of the file; replaced if it exists.
        opset: Of the default operator domain.

    Raises:
        ValueError: If `example` is not one input.
    """
    if example.dim() < 2 or example.shape[0] != 1:
        raise ValueError(f"expected an example of shape (1, *shape), got shape={tuple(example.shape)}; give one input")
    with silenced():
        program = torch.onnx.export(
            copy.deepcopy(model).eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            external_data=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            optimize=True,
            verbose=False,
        )
        if program is None:
            raise ValueError(f"expected torch.onnx.export to return a program, got None for {type(model).__name__}")
        program.save(str(path))
        strip_onnx(path)


def strip_onnx(path: Path) -> None:
    """Remove from an ONNX file what no runtime reads, and check what is left.

    The exporter writes a stack trace into every node and the shape of every intermediate value: a third of the
    file of a small model, with the paths of the machine it was made on. The quantiser declares every operator domain
    it knows, which a runtime without them may refuse.

    Example:
        >>> import tempfile
        >>> graph = onnx.helper.make_graph([], "graph", [], [], doc_string="how it was made")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.onnx")
        ...     onnx.save(onnx.helper.make_model(graph), path)
        ...     strip_onnx(path)
        ...     onnx.load(path).graph.doc_string
        ''
    """
    model = onnx.load(path)
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    used = {"", *(node.domain for node in graph.node), *(function.domain for function in model.functions)}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _write(model, path)


def stamp_onnx(path: Path, stamp: Mapping[str, str]) -> None:
    """Write `stamp` into the file's metadata, replacing any stamp there; nothing else changes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.onnx")
        ...     onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [])), path)
        ...     stamp_onnx(path, {"tacit.task": "digits"})
        ...     read_stamp_onnx(path)
        {'tacit.task': 'digits'}
    """
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(sorted(stamp.items())))
    _write(model, path)


def read_stamp_onnx(path: Path) -> dict[str, str]:
    """Return the metadata written by `stamp_onnx`; empty if there is none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.onnx")
        ...     onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [])), path)
        ...     read_stamp_onnx(path)
        {}
    """
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))  # by path, which also serves models past protobuf's 2 GiB
