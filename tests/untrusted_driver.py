"""Opens many files of unknown honesty, each in a forked child of this process, which runs in the sandbox.

Used by test_untrusted.py, because a fresh interpreter for each of ten thousand files would take an hour. What a child
does is what the product's two children do one after the other: read the structure, then load and run the file. Reads
from stdin JSON, {"source": folder that holds tacit, "format": F, "files": [...], "inputs": file}; prints a word a file.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RAN, STRUCTURE, RUNTIME = 0, 10, 11
WORDS = {RAN: "ran", STRUCTURE: "structure", RUNTIME: "runtime"}
SECONDS = 20


def run_by_agent(runtime: Any, layout: str) -> Callable[[str, np.ndarray], object]:
    """How the agent runs a file."""

    def run(name: str, inputs: np.ndarray) -> object:
        from tacit.devices import agent
        from tacit.devices.runtime import adapter_of

        adapter = adapter_of(runtime)
        model = {"name": "m", "path": name, "runtime": runtime, "layouts": [layout], "adapter": adapter}
        return agent.open_model(model).run([inputs])

    return run


RUN = {
    "onnx": run_by_agent("onnxruntime", "channel_first"),
    "ort": run_by_agent("onnxruntime", "channel_first"),
    "tflite": run_by_agent("litert", "channel_last"),
    "pte": run_by_agent("executorch", "channel_first"),
}


def open_file(order: dict[str, str], name: str) -> int:
    """As the product does; the exit status of a child."""
    from tacit.devices import onnx_structure, safetensors_header, tflite_structure, weights
    from tacit.devices.sandbox import ArtifactRefused

    path, form = Path(name), order["format"]
    readers = {
        "onnx": onnx_structure.examine,
        "tflite": tflite_structure.examine,
        "safetensors": safetensors_header.examine,
    }
    try:
        answer = readers[form](path) if form in readers else {}
    except ValueError:
        return STRUCTURE
    if form == "safetensors":
        try:
            weights.read_arrays(path, weights.header_of(answer))
        except ArtifactRefused:
            return RUNTIME
        return RAN
    try:
        RUN[form](name, np.load(order["inputs"], allow_pickle=False))
    except Exception:  # noqa: BLE001  # the agent's excepthook answers all of them
        return RUNTIME
    return RAN


def in_child(order: dict[str, str], name: str) -> str:
    """What became of a file: a word, or the name of the signal that ended its child."""
    child = os.fork()
    if child == 0:
        status = 12
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(3 * SECONDS)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            status = open_file(order, name)
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return WORDS.get(os.WEXITSTATUS(status), f"unexpected {os.WEXITSTATUS(status)}")


def main() -> None:
    """Answer the order on stdin."""
    order = json.loads(sys.stdin.read())
    sys.path.insert(0, order["source"])
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # What takes long to import, once for all.
    if order["format"] == "onnx":
        from onnx import checker  # noqa: F401
    if order["format"] in {"onnx", "ort"}:
        import onnxruntime  # noqa: F401
    if order["format"] == "tflite":
        from ai_edge_litert import interpreter  # noqa: F401
    if order["format"] == "pte":
        import torch  # noqa: F401
        from executorch.extension.pybindings import _C  # noqa: F401
    from tacit.devices import onnx_structure, runtime, safetensors_header, tflite_structure, weights  # noqa: F401

    for name in order["files"]:
        print(in_child(order, name), flush=True)  # noqa: T201  # its answer


if __name__ == "__main__":
    main()
