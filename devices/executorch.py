"""Opens ExecuTorch programs for ``agent.py``; needs numpy, torch and executorch, and nothing of Tacit.

The runtime itself needs no torch; its Python binding does. The binding is imported by itself, without the tools for
exporting that come with it: those take seconds.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple

import numpy as np

# Of PyTorch's numbered types those that a program's inputs and outputs have.
_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}


def import_runtime() -> Any:
    """The binding, and torch, which takes most of the time."""
    import torch
    from executorch.extension.pybindings import _C

    return torch, _C


def open_model(path: str, threads: int) -> Tuple[Callable[[List[np.ndarray]], List[np.ndarray]], Any, Any]:
    """Load a program; its inputs and outputs are as the model has them, so no port has a scale."""
    _, binding = import_runtime()
    return _opened(binding._load_for_executorch(path), threads)


def open_profiled(path: str, threads: int) -> Tuple[Callable[[List[np.ndarray]], List[np.ndarray]], Any, Any, Any]:
    """Load a program that keeps an ETDump; the last of what is returned tells each operator's nanoseconds."""
    _, binding = import_runtime()
    program = binding._load_for_executorch(path, enable_etdump=True)

    def operators() -> List[Tuple[str, str, int]]:
        from executorch.devtools import Inspector

        with tempfile.TemporaryDirectory() as folder:
            written = str(Path(folder, "run.etdp"))
            program.write_etdump_result_to_file(written)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there are no outputs in it
                blocks = Inspector(etdump_path=written).event_blocks
        events = [event for block in blocks for event in block.events if block.name == "Execute" and event.perf_data]
        # XNNPACK tells its own operators; the call of the delegate and the method around them would count them again.
        inner = [event for event in events if event.is_delegated_op or event.name.startswith("native_call_")]
        found = inner or [event for event in events if event.name == "DELEGATE_CALL"]
        return [
            (event.name, event.name.split(" #")[0], int(1e6 * spent_ms))
            for event in found
            for spent_ms in event.perf_data.raw
        ]

    return (*_opened(program, threads), operators)


def _opened(program: Any, threads: int) -> Tuple[Callable[[List[np.ndarray]], List[np.ndarray]], Any, Any]:
    torch, binding = import_runtime()
    torch.set_num_threads(threads)
    binding._unsafe_reset_threadpool(threads)
    meta = program.method_meta("forward")
    sources = [_port(meta.input_tensor_meta(place)) for place in range(meta.num_inputs())]
    targets = [_port(meta.output_tensor_meta(place)) for place in range(meta.num_outputs())]

    def infer(feeds: List[np.ndarray]) -> List[np.ndarray]:
        # The inputs may be read-only; a program never writes to them.
        return [output.numpy() for output in program.forward([torch.from_numpy(feed) for feed in feeds])]

    return infer, sources, targets


def _port(meta: Any) -> Tuple[np.dtype, float, int]:
    if meta.dtype() not in _TYPES:
        raise ValueError(f"expected inputs and outputs of whole numbers or floats, got PyTorch type {meta.dtype()}")
    return np.dtype(_TYPES[meta.dtype()]), 0.0, 0
