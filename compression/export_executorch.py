"""PyTorch to ExecuTorch, for XNNPACK on processors: float32, int8, and the stamp after the program."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from tacit.compression import lower_executorch as lowering
from tacit.compression.export_onnx import check_examples, count_outputs
from tacit.compression.forms import Calibration, FormRefused, Make, Source
from tacit.compression.refusals import layer_at, reason_of
from tacit.compression.silence import silenced

# Ends a stamped file: the stamp, the number of its bytes, this.
_STAMP_END = b"tacit.stamp"
_LENGTH_BYTES = 4


def export_executorch(model: nn.Module, examples: tuple[Tensor, ...], path: Path) -> None:
    """Write `model` as one float32 ExecuTorch program, channel first, batch size 1.

    Guarantees: before it is written, the program has answered as the model did on a few inputs.

    Args:
        model: Exported in evaluation mode; left as it is.
        examples: One example of each input, (1, *shape).
        path: Of the file; replaced if it exists.

    Raises:
        ImportError: executorch is not installed.
        FormRefused: torch.export or ExecuTorch does not take it; by layer.
        ValueError: If an example is not one input.
    """
    _write(model, examples, path)


def dynamic_int8(source: Source, dst: Path) -> None:
    """Write int8 weights of convolutions and linear layers; ranges are taken at run time, so no data are needed.

    Guarantees: before it is written, the program has been about as near to the model on a few inputs as PyTorch is when
    it computes in int8.

    Raises:
        FormRefused: As `export_executorch`; there is nothing to quantise; a convolution of something else than images.
    """
    _write(source.model, source.examples, dst, int8=True)


def static_int8(source: Source, dst: Path) -> None:
    """Write int8 weights and activations of convolutions and linear layers, ranges from the calibration inputs.

    A range is the least and the greatest value seen, so that their order does not matter. What lies between those
    layers stays float32: as int8 it cost accuracy and saved no time.

    Guarantees: as `dynamic_int8`.

    Raises:
        FormRefused: As `export_executorch`; there is nothing to quantise.
        ValueError: There is no calibration input, or one is not finite.
    """
    _write(source.model, source.examples, dst, source.ranges_from(), int8=True)


FORMS: Mapping[str, Make] = MappingProxyType({"dynamic_int8": dynamic_int8, "static_int8": static_int8})


def _write(
    model: nn.Module,
    examples: tuple[Tensor, ...],
    path: Path,
    calibration: Calibration | None = None,
    *,
    int8: bool = False,
) -> None:
    check_examples(examples)
    frozen = copy.deepcopy(model).eval()
    count_outputs(frozen, examples)  # refuses what is no tensor
    with silenced():
        try:
            import executorch.exir  # noqa: F401  # whether it is there
        except ModuleNotFoundError as error:
            raise ImportError(f"expected executorch, got {error}; install tacit[executorch]") from error
        try:
            graph = lowering.spelled_and_folded(frozen, examples)
        except lowering.TRACING_ERRORS as error:
            raise FormRefused(
                f"expected a model that torch.export takes, got {layer_at(error, frozen)}: {reason_of(error)}"
            ) from error
        whole = lowering.quantised(graph, examples, calibration) if int8 else None
        content = lowering.lowered(graph if whole is None else whole, examples)
        lowering.check_program(content, frozen, lowering.probes(examples, calibration), whole)
        path.write_bytes(content)


def stamp_executorch(path: Path, stamp: Mapping[str, str]) -> None:
    """Write `stamp` as JSON after the program, whose header says where it ends; replaces any there, changes no more.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.pte")
        ...     _ = path.write_bytes(b"program")
        ...     stamp_executorch(path, {"tacit.task": "digits"})
        ...     read_stamp_executorch(path)
        {'tacit.task': 'digits'}
    """
    program, _ = _parted(path)
    text = json.dumps(dict(sorted(stamp.items()))).encode()
    path.write_bytes(program + text + len(text).to_bytes(_LENGTH_BYTES, "little") + _STAMP_END)


def read_stamp_executorch(path: Path) -> dict[str, str]:
    """Return the mapping written by `stamp_executorch`; empty if there is none.

    Raises:
        ValueError: If what stands there is not a JSON object of strings.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.pte")
        ...     _ = path.write_bytes(b"program")
        ...     read_stamp_executorch(path)
        {}
    """
    _, text = _parted(path)
    if text is None:
        return {}
    stamp = json.loads(text)
    if not isinstance(stamp, dict) or not all(isinstance(value, str) for value in stamp.values()):
        raise ValueError(
            f"expected a JSON object of strings as the stamp, got {stamp!r:.80} in {path}; export it again"
        )
    return stamp


def _parted(path: Path) -> tuple[bytes, bytes | None]:
    content = path.read_bytes()
    if not content.endswith(_STAMP_END):
        return content, None
    end = len(content) - len(_STAMP_END) - _LENGTH_BYTES
    start = end - int.from_bytes(content[end : end + _LENGTH_BYTES], "little")
    if start < 0:
        raise ValueError(f"expected a stamp of the length that it states, got a longer one in {path}; export it again")
    return content[:start], content[start:end]
