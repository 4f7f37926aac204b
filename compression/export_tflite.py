"""PyTorch to TFLite: the only user of litert_torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tacit.compression.silence import silenced

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import MetadataT, ModelT

SIGNATURE, INPUT_NAME, OUTPUT_NAME = "serving_default", "input", "logits"
_STAMP = b"tacit"


def export_tflite(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write `model` as a float32 TFLite file, channel last, batch size 1.

    Args:
        model: Exported in evaluation mode; left as it is.
        example: One input, shape (1, channels, ...), channel first; the file takes (1, ..., channels). With two axes
            only, (1, features), there is nothing to move.
        path: Of the file; replaced if it exists.

    Raises:
        ImportError: If litert-torch is not installed.
        ValueError: If `example` is not one input.
    """
    if example.dim() < 2 or example.shape[0] != 1:
        raise ValueError(f"expected an example of shape (1, *shape), got shape={tuple(example.shape)}; give one input")
    with silenced():
        try:
            import litert_torch
        except ModuleNotFoundError as error:
            raise ImportError(f"expected litert-torch, got {error}; install tacit[tflite]") from error
        exported = copy.deepcopy(model).eval()
        if example.dim() > 2:
            exported = litert_torch.to_channel_last_io(exported, args=[0]).eval()
        litert_torch.convert(exported, (example.movedim(1, -1).contiguous(),)).export(str(path))
        strip_tflite(path)


def strip_tflite(path: Path) -> None:
    """Shorten a TFLite file's names and write it anew.

    The converter names every tensor after its whole path through the model: a sixth of the file of a small one.
    Names must stay distinct, for the quantiser finds tensors by name. Writing it anew also puts every buffer inside
    the flatbuffer: TFLite-Micro misreads, without an error, the outside buffers that ai-edge-quantizer writes from
    256 KiB on.
    """
    model = _read(path)
    for subgraph in model.subgraphs:
        for index, tensor in enumerate(subgraph.tensors):
            tensor.name = f"{index:x}".encode()
        for index, name in ((subgraph.inputs[0], INPUT_NAME), (subgraph.outputs[0], OUTPUT_NAME)):
            subgraph.tensors[index].name = name.encode()
    for signature in model.signatureDefs:
        signature.inputs[0].name, signature.outputs[0].name = INPUT_NAME.encode(), OUTPUT_NAME.encode()
    _write(model, path)


def stamp_tflite(path: Path, stamp: Mapping[str, str]) -> None:
    """Write `stamp` as JSON into a metadata entry named "tacit", replacing any there; nothing else changes."""
    from ai_edge_litert.schema_py_generated import BufferT, MetadataT

    model = _read(path)
    text = json.dumps(dict(sorted(stamp.items()))).encode()
    entry = _stamp_entry(model)
    if entry is None:
        entry = MetadataT()
        entry.name, entry.buffer = _STAMP, len(model.buffers)
        model.buffers.append(BufferT())
        model.metadata = [*(model.metadata or []), entry]
    model.buffers[entry.buffer].data = list(text)
    _write(model, path)


def read_stamp_tflite(path: Path) -> dict[str, str]:
    """Return the mapping written by `stamp_tflite`; empty if there is none.

    Raises:
        ValueError: If the entry is not a JSON object of strings.
    """
    model = _read(path)
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


def _read(path: Path) -> ModelT:
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model(path)


def _write(model: ModelT, path: Path) -> None:
    from ai_edge_litert.tools import flatbuffer_utils

    flatbuffer_utils.write_model(model, path)
