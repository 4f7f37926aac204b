"""Where a model can go: for each target how to export, which forms it holds, and how it is stamped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from tacit.compression import export_micro, export_ort, quantize_onnx, quantize_tflite
from tacit.compression.export_executorch import FORMS as EXECUTORCH_FORMS
from tacit.compression.export_executorch import export_executorch, read_stamp_executorch, stamp_executorch
from tacit.compression.export_onnx import export_onnx, read_stamp_onnx, stamp_onnx
from tacit.compression.export_tflite import export_tflite, read_stamp_tflite, stamp_tflite
from tacit.compression.forms import FORMS, FormRefused, Label, Make
from tacit.devices.runtime import InputLayout, RuntimeName

Format = Literal["onnx", "tflite", "ort", "micro", "pte"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target.

    Attributes:
        suffix: Of its files.
        runtime: In which its files are judged.
        layout: Where its inputs of more than two axes have their channels.
        export: Writes a model as float32, from one example of each input.
        forms: How each form besides float32 is made.
        stamp: Writes metadata into a file, replacing what it wrote before.
        read_stamp: Reads them.
        beside: Files that belong beside an artifact, by name; None where there are none.
        labels: What forms are called here, where that is another name than elsewhere.
    """

    suffix: str
    runtime: RuntimeName
    layout: InputLayout
    export: Callable[[nn.Module, tuple[torch.Tensor, ...], Path], None]
    forms: Mapping[str, Make]
    stamp: Callable[[Path, Mapping[str, str]], None]
    read_stamp: Callable[[Path], dict[str, str]]
    beside: Callable[[Path], Mapping[str, bytes]] | None = None
    labels: Mapping[str, Label] = field(default_factory=dict)


# onnxruntime computes norms, softmax and recurrent layers with floats whatever goes in and comes out.
_INTEGER_ENDS: Mapping[str, Label] = MappingProxyType({"full_int8": "static int8 (integer I/O)"})

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "onnx": Target(
            suffix="onnx",
            runtime="onnxruntime",
            layout="channel_first",
            export=export_onnx,
            forms=quantize_onnx.FORMS,
            stamp=stamp_onnx,
            read_stamp=read_stamp_onnx,
            labels=_INTEGER_ENDS,
        ),
        "tflite": Target(
            suffix="tflite",
            runtime="litert",
            layout="channel_last",
            export=export_tflite,
            forms=quantize_tflite.FORMS,
            stamp=stamp_tflite,
            read_stamp=read_stamp_tflite,
        ),
        "micro": Target(
            suffix="tflite",
            runtime="micro",
            layout="channel_last",
            export=export_micro.export_micro,
            forms=export_micro.FORMS,
            stamp=stamp_tflite,
            read_stamp=read_stamp_tflite,
            beside=export_micro.micro_files,
        ),
        "ort": Target(
            suffix="ort",
            runtime="onnxruntime",
            layout="channel_first",
            export=export_ort.export_ort,
            forms=export_ort.FORMS,
            stamp=export_ort.stamp_ort,
            read_stamp=export_ort.read_stamp_ort,
            labels=_INTEGER_ENDS,
        ),
        "pte": Target(
            suffix="pte",
            runtime="executorch",
            layout="channel_first",
            export=export_executorch,
            forms=EXECUTORCH_FORMS,
            stamp=stamp_executorch,
            read_stamp=read_stamp_executorch,
        ),
    }
)


def target_of(name: str) -> Target:
    """A target by name.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> target_of("onnx").runtime
        'onnxruntime'
    """
    if name not in TARGETS:
        raise ValueError(f"expected format to be one of {', '.join(TARGETS)}, got format={name!r}; choose one of these")
    return TARGETS[name]


def label_of(target: str, form: str) -> Label:
    """What reports call a form in a target.

    Example:
        >>> label_of("onnx", "full_int8"), label_of("tflite", "full_int8")
        ('static int8 (integer I/O)', 'full-integer int8')
    """
    return target_of(target).labels.get(form, FORMS[form].label)


def check_form(target: str, form: str) -> None:
    """Refuse a form that a target does not hold, before any work is done.

    Raises:
        FormRefused: With the forms that it does hold.

    Example:
        >>> check_form("onnx", "dynamic_int8")
    """
    held = ["float32", *target_of(target).forms]
    if form not in held:
        labels = ", ".join(label_of(target, name) for name in held)
        raise FormRefused(
            f"expected a form that {target} holds ({labels}), got {form!r}; choose another form or target"
        )
