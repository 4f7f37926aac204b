"""Opens ExecuTorch programs for ``agent.py``; needs numpy, torch and executorch, and nothing of Tacit.

The runtime itself needs no torch; its Python binding does. The binding is imported by itself, without the tools for
exporting that come with it: those take seconds.
"""

from __future__ import annotations

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


def open_model(path: str, threads: int) -> Tuple[Callable[[List[np.ndarray]], List[np.ndarray]], Any, Any]:
    """Load a program; its inputs and outputs are as the model has them, so no port has a scale."""
    import torch
    from executorch.extension.pybindings import _C

    torch.set_num_threads(threads)
    _C._unsafe_reset_threadpool(threads)
    program = _C._load_for_executorch(path)
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
