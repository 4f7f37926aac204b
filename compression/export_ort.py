"""PyTorch to ONNX Runtime's own format, for its small mobile builds: an ONNX file, optimised ahead and converted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from tacit.compression import quantize_onnx
from tacit.compression.export_onnx import SCALES, export_onnx
from tacit.compression.forms import Make, Source
from tacit.compression.ort_file import read_ort, read_properties, write_ort, write_properties
from tacit.compression.silence import silenced

__all__ = ["FORMS", "convert_to_ort", "export_ort", "read_stamp_ort", "stamp_ort"]

# Their weights are restored by constant nodes, which folding would turn into float32 weights in the file.
_STORED_WEIGHTS = frozenset({"float16", "dynamic_int8", "weight_int8"})
# onnxruntime writes tensors of four bits into such a file, and then cannot read it.
_NOT_HELD = "weight_int4"


def export_ort(model: nn.Module, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write `model` as one float32 file of the ORT format, channel first, with a free batch size.

    Args:
        model: Exported in evaluation mode; left as it is.
        examples: One example of each input, (1, *shape).
        path: Of the file; replaced if it exists.

    Raises:
        FormRefused: ONNX cannot hold the model.
        ValueError: If an example is not one input.
    """
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch, "model.onnx")
        export_onnx(model, examples, exported)
        convert_to_ort(exported, path)


def convert_to_ort(src: Path, dst: Path, *, fold: bool = True) -> None:
    """Convert an ONNX file.

    It is optimised as far as holds on any processor: operators are fused and int8 kernels chosen, but the layout of
    convolutions is not fitted to the machine that exports. onnxruntime optimises nothing when it loads such a file.

    Args:
        src: The ONNX file.
        dst: Replaced if it exists.
        fold: Compute constant nodes now.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    with silenced(), tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "model.ort")
        options.optimized_model_filepath = str(made)
        left_out = None if fold else ["ConstantFolding"]
        onnxruntime.InferenceSession(
            str(src), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
        )
        session = read_ort(made.read_bytes())
    write_properties(session, read_properties(session))  # in order, and nothing where there are none
    dst.write_bytes(write_ort(session))


def stamp_ort(path: Path, stamp: Mapping[str, str]) -> None:
    """Write `stamp` into the file's metadata, replacing any stamp there; nothing else changes, scales neither."""
    session = read_ort(path.read_bytes())
    scales = {key: value for key, value in read_properties(session).items() if key == SCALES}
    write_properties(session, {**stamp, **scales})
    path.write_bytes(write_ort(session))


def read_stamp_ort(path: Path) -> dict[str, str]:
    """Return the metadata written by `stamp_ort`; empty if there is none."""
    properties = read_properties(read_ort(path.read_bytes()))
    return {key: value for key, value in properties.items() if key != SCALES}


def _form(name: str, make: Make) -> Make:
    def write(source: Source, dst: Path) -> None:
        """Makes the ONNX file of this form from the model anew: a converted file cannot be quantised."""
        with tempfile.TemporaryDirectory() as scratch:
            exported, made = Path(scratch, "float.onnx"), Path(scratch, "form.onnx")
            export_onnx(source.model, source.examples, exported)
            make(replace(source, exported=exported), made)
            convert_to_ort(made, dst, fold=name not in _STORED_WEIGHTS)

    return write


FORMS: Mapping[str, Make] = MappingProxyType(
    {name: _form(name, make) for name, make in quantize_onnx.FORMS.items() if name != _NOT_HELD}
)
