"""PyTorch to ONNX: the only user of torch.onnx."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import onnx
import torch
from torch import nn

from tacit.compression.forms import FormRefused
from tacit.compression.norms import Spelling, respell_norms
from tacit.compression.refusals import layer_at, operator_at, reason_of
from tacit.compression.silence import silenced

Batch = Literal["free", "one"]

_OPSETS = range(18, 24)
_MOST_BYTES = 2**31 - 2**24  # protobuf's limit, less what is no weight
# Says what the whole numbers at a file's ends stand for; devices/agent.py reads it, and stamping leaves it.
SCALES = "tacit.scales"


def input_names(count: int) -> list[str]:
    """Names of a file's inputs, in the order of the model's arguments.

    >>> input_names(1), input_names(2)
    (['input'], ['input_0', 'input_1'])
    """
    return ["input"] if count == 1 else [f"input_{number}" for number in range(count)]


def output_names(count: int) -> list[str]:
    """Names of a file's outputs, in the order of the model's.

    >>> output_names(1), output_names(2)
    (['logits'], ['output_0', 'output_1'])
    """
    return ["logits"] if count == 1 else [f"output_{number}" for number in range(count)]


def check_examples(examples: tuple[torch.Tensor, ...]) -> None:
    """Refuse what is not one example of each input.

    Raises:
        ValueError: If so.

    >>> check_examples((torch.zeros(1, 4),))
    """
    if not examples or any(example.dim() < 1 or example.shape[0] != 1 for example in examples):
        shapes = ", ".join(str(tuple(example.shape)) for example in examples) or "none"
        raise ValueError(f"expected an example (1, *shape) of each input, got {shapes}; give one with its batch axis")


def count_outputs(model: nn.Module, examples: tuple[torch.Tensor, ...]) -> int:
    """How many tensors a model returns.

    Raises:
        ValueError: Something else than a tensor, or a tuple or list of them.

    >>> count_outputs(nn.Linear(4, 2), (torch.zeros(1, 4),))
    1
    """
    with torch.no_grad():
        answer = model(*examples)
    if isinstance(answer, torch.Tensor):
        return 1
    if isinstance(answer, tuple | list) and answer and all(isinstance(one, torch.Tensor) for one in answer):
        return len(answer)
    raise ValueError(
        f"expected {type(model).__name__} to return a tensor, or a tuple of them, got {type(answer).__name__}; wrap it"
    )


def export_onnx(
    model: nn.Module,
    examples: tuple[torch.Tensor, ...],
    path: Path,
    *,
    opset: int = 20,
    batch: Batch = "free",
    norms: Spelling = "batch",
) -> None:
    """Write `model` as one float32 ONNX file, channel first.

    Args:
        model: Exported in evaluation mode; left as it is.
        examples: One example of each input, (1, *shape).
        path: Of the file; replaced if it exists.
        opset: Of the default operator domain, 18 to 23. From 20 on GELU is one operator; from 21 on GroupNorm of
            functions is too, which onnxruntime takes apart again, more slowly than the exporter does below.
        batch: "free", or "one" for models that are made for a single example.
        norms: How GroupNorm layers are spelled, see `norms.respell_norms`.

    Raises:
        FormRefused: ONNX cannot hold the model; the layer is named.
        ValueError: If an example is not one input, or the opset is not one of those.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.onnx")
        ...     export_onnx(nn.Linear(3, 2), (torch.zeros(1, 3),), path)
        ...     [node.op_type for node in onnx.load(path).graph.node]
        ['Gemm']
    """
    check_examples(examples)
    if opset not in _OPSETS or batch not in get_args(Batch):
        raise ValueError(
            f"expected opset from {_OPSETS[0]} to {_OPSETS[-1]} and batch free or one, got opset={opset}, "
            f"batch={batch!r}; choose another"
        )
    _check_size(model)
    frozen = respell_norms(model, norms).eval()
    outputs = count_outputs(frozen, examples)
    with silenced():
        program = _capture(frozen, examples, batch)
        exported = _translate(program, opset, input_names(len(examples)), output_names(outputs))
        _name_batch(exported, batch)
        pool_before_relu(exported)
        save_onnx(exported, path)


def _check_size(model: nn.Module) -> None:
    tensors = (*model.parameters(), *model.buffers())
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size_bytes > _MOST_BYTES:
        raise FormRefused(f"expected weights of less than 2 GB in one ONNX file, got {size_bytes:,} bytes; use fewer")


def _capture(model: nn.Module, examples: tuple[torch.Tensor, ...], batch: Batch) -> torch.export.ExportedProgram:
    # Two examples: of one alone the tracer concludes that there is never more, in attention and recurrent layers.
    given = tuple(torch.cat((example, example)) for example in examples) if batch == "free" else examples
    free = tuple({0: torch.export.Dim("batch")} for _ in examples) if batch == "free" else None
    try:
        return torch.export.export(model, given, dynamic_shapes=free, strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        reason = reason_of(error)
        advice = "; if it is made for a single example, export with batch='one'"
        raise FormRefused(
            f"{layer_at(error, model)} cannot be exported: {reason}{advice if _of_batch(error, batch) else ''}"
        ) from error


def _of_batch(error: BaseException, batch: Batch) -> bool:
    """Whether the number of examples may be to blame: it goes by a symbol in the messages of torch."""
    return batch == "free" and ("batch" in str(error) or re.search(r"\bs\d+\b", str(error)) is not None)


def _translate(
    program: torch.export.ExportedProgram, opset: int, inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    try:
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            external_data=False,
            input_names=inputs,
            output_names=outputs,
            optimize=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise FormRefused(operator_at(error, program)) from error
    if translated is None:
        raise FormRefused("expected torch.onnx.export to return a program, got None; simplify the model")
    exported: onnx.ModelProto = translated.model_proto
    version = next(entry.version for entry in exported.opset_import if entry.domain == "")
    if version != opset:
        raise FormRefused(f"expected a file of opset {opset}, got opset {version}; export with that one")
    return exported


def _name_batch(model: onnx.ModelProto, batch: Batch) -> None:
    """Names the free axis, and refuses outputs that have other free ones, or none."""
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param if model.graph.input else ""
    for value in (*model.graph.input, *model.graph.output):
        first, *others = value.type.tensor_type.shape.dim or (None,)
        fits = first is not None and (first.dim_param == symbol if batch == "free" else first.dim_value == 1)
        if not fits or any(dim.dim_param or not dim.dim_value for dim in others):
            shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            raise FormRefused(
                f"expected {value.name} to have a batch axis and else fixed sizes, got {shape}; return a tensor of one "
                "shape for each example"
            )
        if first is not None and batch == "free":
            first.dim_param = "batch"


def pool_before_relu(model: onnx.ModelProto) -> None:
    """Swap Relu and the MaxPool that alone uses it: the same numbers, and fewer of them to clip.

    Behind the pool a Relu also keeps the quantiser's rounding from moving in front of it, where onnxruntime pools
    8-bit images several times slower than floats. Right after a convolution Relu is left, being part of it there.

    Example:
        >>> node = onnx.helper.make_node
        >>> nodes = [node("Relu", ["x"], ["a"]), node("MaxPool", ["a"], ["y"], kernel_shape=[2, 2])]
        >>> model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], []))
        >>> pool_before_relu(model)
        >>> [(node.op_type, *node.input, *node.output) for node in model.graph.node]
        [('MaxPool', 'x', 'a'), ('Relu', 'a', 'y')]
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    for pool in [node for node in graph.node if node.op_type == "MaxPool" and len(node.output) == 1]:
        relu = makers.get(pool.input[0])
        if relu is None or relu.op_type != "Relu" or uses[relu.output[0]] > 1:
            continue
        maker = makers.get(relu.input[0])
        if maker is not None and maker.op_type == "Conv":
            continue
        first, second = list(graph.node).index(relu), list(graph.node).index(pool)
        swapped = onnx.NodeProto(), onnx.NodeProto()
        for copied, node, source, result in zip(
            swapped, (pool, relu), (relu.input[0], relu.output[0]), (relu.output[0], pool.output[0]), strict=True
        ):
            copied.CopyFrom(node)
            copied.input[0], copied.output[0] = source, result
        graph.node[first].CopyFrom(swapped[0])
        graph.node[second].CopyFrom(swapped[1])
        makers.update({swapped[0].output[0]: graph.node[first], swapped[1].output[0]: graph.node[second]})


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model without what no runtime reads, and check what is left.

    The exporter writes a stack trace into every node and the shape of every intermediate value: a third of the
    file of a small model, with the paths of the machine it was made on. The quantiser declares every operator domain
    it knows, which a runtime without them may refuse.

    Example:
        >>> import tempfile
        >>> graph = onnx.helper.make_graph([], "graph", [], [], doc_string="how it was made")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.onnx")
        ...     save_onnx(onnx.helper.make_model(graph), path)
        ...     onnx.load(path).graph.doc_string
        ''
    """
    graph = model.graph
    kept = [entry for entry in model.metadata_props if entry.key == SCALES]
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    model.metadata_props.extend(kept)
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
    """Write `stamp` into the file's metadata, replacing any stamp there; nothing else changes, scales neither.

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
    scales = {entry.key: entry.value for entry in model.metadata_props if entry.key == SCALES}
    onnx.helper.set_model_props(model, dict(sorted({**stamp, **scales}.items())))
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
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props if entry.key != SCALES}


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))  # by path, which also serves models past protobuf's 2 GiB
