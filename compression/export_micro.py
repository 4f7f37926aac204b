"""TFLite for microcontrollers: a file that TensorFlow Lite Micro runs, and what a firmware needs beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from tacit.compression import quantize_tflite
from tacit.compression.export_tflite import export_tflite
from tacit.compression.forms import FormRefused, Make, Source
from tacit.devices.micro import method_of, micro_needs
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["FORMS", "export_micro", "micro_files"]

# GELU(x) = x / 2 * (1 + tanh(x * p(x^2))): p by least squares over -8 to 8, GELU then at most 4e-6 away. Its last term
# is positive, so that p(x^2) stays above 0 and the hyperbolic tangent where it belongs however large x is.
_GELU_TERMS = (0.797837665, 0.0364499622, -0.000115212875, -0.0000322480763, 0.00000120544346)
# What torch calls the approximation by tanh, with these very numbers.
_GELU_TANH_TERMS = (0.7978845608, 0.7978845608 * 0.044715)
_COLUMNS = 12


class _Gelu(nn.Module):
    """GELU out of what microcontrollers have; they have neither GELU nor erf."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.terms = _GELU_TANH_TERMS if approximate == "tanh" else _GELU_TERMS

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        squared = inputs * inputs
        *terms, factor = self.terms
        slope = squared * factor
        for term in terms[:0:-1]:
            slope = (slope + term) * squared
        answer: torch.Tensor = inputs * (0.5 * torch.tanh(inputs * (slope + terms[0])) + 0.5)
        return answer


def export_micro(model: nn.Module, examples: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write `model` as a float32 TFLite file that TensorFlow Lite Micro runs.

    As `export_tflite`; GELU layers are spelled with tanh, at most 4e-6 away from what they were.

    Args:
        model: Exported in evaluation mode; left as it is.
        examples: One example of each input, (1, *shape).
        path: Of the file; replaced if it exists.

    Raises:
        FormRefused: TFLite or its kernels for microcontrollers cannot hold the model.
        ImportError: If litert-torch or tflite-micro is not installed.
        ValueError: If an example is not one input.
    """
    export_tflite(_with_own_gelu(model), examples, path)
    _try(path)


def _with_own_gelu(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.GELU):
        return _Gelu(model.approximate)
    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GELU):
                setattr(module, name, _Gelu(child.approximate))
    return copied


def _try(path: Path) -> None:
    try:
        micro_needs(path)
    except ArtifactRefused as error:
        path.unlink()
        raise FormRefused(f"{error}; replace the operator, or choose the target tflite") from error


def _tried(make: Make) -> Make:
    def write(source: Source, dst: Path) -> None:
        make(source, dst)
        _try(dst)

    return write


# Floats with int8 weights, or half precision, the kernels for microcontrollers do not know.
FORMS: Mapping[str, Make] = MappingProxyType(
    {name: _tried(quantize_tflite.FORMS[name]) for name in ("static_int8", "full_int8", "static_int16")}
)


def micro_files(path: Path) -> dict[str, bytes]:
    """What a firmware needs beside a model file.

    Args:
        path: A TFLite file that TensorFlow Lite Micro runs.

    Returns:
        Name -> content: `model.cc` with the file as an aligned array, `model.h` that declares it with the operators to
        register and the size of the arena, and `micro.json` with the same for machines.

    Raises:
        ArtifactRefused: TensorFlow Lite Micro does not run the file.
    """
    found = micro_needs(path)
    methods = [method_of(kind) for kind in found["operators"]]
    facts = {
        "ops": methods,
        "arena_bytes": found["arena_bytes"],
        "persistent_bytes": found["persistent_bytes"],
        "arena_note": "measured with 64-bit pointers: persistent_bytes is less on a 32-bit microcontroller",
        "bytes": found["bytes"],
    }
    return {
        "model.cc": _array(path.read_bytes()).encode(),
        "model.h": _header(methods, found["arena_bytes"]).encode(),
        "micro.json": (json.dumps(facts, indent=1) + "\n").encode(),
    }


def _array(content: bytes) -> str:
    rows = [
        "  " + " ".join(f"0x{byte:02x}," for byte in content[start : start + _COLUMNS])
        for start in range(0, len(content), _COLUMNS)
    ]
    body = "\n".join(rows)
    return (
        '#include "model.h"\n\n'
        f"alignas(16) const unsigned char g_model[] = {{\n{body}\n}};\n"
        f"const unsigned int g_model_len = {len(content)};\n"
    )


def _header(methods: list[str], arena_bytes: int) -> str:
    registered = "\n".join(f"  TF_LITE_ENSURE_STATUS(resolver.{method}());" for method in methods)
    size = len(methods)
    return f"""#ifndef TACIT_MODEL_H_
#define TACIT_MODEL_H_

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

alignas(16) extern const unsigned char g_model[];
extern const unsigned int g_model_len;

// Exact where pointers have 64 bits; with 32 bits less is used.
constexpr int kArenaBytes = {arena_bytes};

inline TfLiteStatus RegisterOps(tflite::MicroMutableOpResolver<{size}>& resolver) {{
{registered}
  return kTfLiteOk;
}}

#endif  // TACIT_MODEL_H_
"""
