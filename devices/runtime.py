"""A model file that can predict, whatever its format: ``open_artifact``."""

import io
import math
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from tacit.devices import agent
from tacit.devices.local import LocalDevice
from tacit.devices.sandbox import ArtifactRefused

InputLayout = Literal["channel_first", "channel_last"]
RuntimeName = Literal["onnxruntime", "litert"]
_RUNTIMES: dict[str, RuntimeName] = {".onnx": "onnxruntime", ".tflite": "litert"}
_LFS_POINTER = b"version https://git-lfs"


class Runtime(Protocol):
    """A loaded model, as training, parity and the audit see it."""

    @property
    def name(self) -> str:
        """The runtime: "onnxruntime" or "litert"."""

    @property
    def version(self) -> str:
        """The runtime's version."""

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map preprocessed inputs ``(n, *shape)``, channel first, to outputs ``(n, ...)``, such as logits."""


def identify(path: Path) -> RuntimeName:
    """Say which runtime a model file is for, by suffix and checked against its first bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is empty, of another format, or not a model at all (a Git LFS pointer, a web page).

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.tflite")
    ...     _ = path.write_bytes(b"....TFL3")
    ...     identify(path)
    'litert'
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a model file, got path={str(path)!r}; check the path")
    runtime = _RUNTIMES.get(path.suffix.lower())
    if runtime is None:
        raise ArtifactRefused(f"expected a file ending in .onnx or .tflite, got path={path.name!r}; export it again")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, which is empty; export it again")
    if head.startswith(_LFS_POINTER):
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, a Git LFS pointer; run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, a web page; download the raw file")
    if (head[4:8] == b"TFL3") != (runtime == "litert"):
        raise ArtifactRefused(f"expected the content of a {path.suffix} file, got path={path.name!r}; export it again")
    return runtime


def open_artifact(path: Path | str, *, input_layout: InputLayout = "channel_first", threads: int = 1) -> Runtime:
    """Open a model file for prediction.

    *Guarantees.* The file is read only by ``agent.py`` in the sandbox, a fresh process for each call of ``predict``,
    with a batch of one: as on a device. A file that crashes its runtime raises here and harms nothing.

    Args:
        path: An .onnx file (ONNX Runtime) or a .tflite file (LiteRT); float32 input and output.
        input_layout: What the file expects. ``predict`` takes channel-first inputs in either case.
        threads: Threads that work on one inference.

    Returns:
        A runtime; its ``predict`` raises ``ArtifactRefused`` when the file does not load, crashes or takes too long.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is not a model.
        ModuleNotFoundError: The runtime is not installed.
        ValueError: ``threads`` is less than one or ``input_layout`` is unknown.
    """
    path = Path(path)
    if threads < 1:
        raise ValueError(f"expected threads >= 1, got threads={threads}; give 1")
    if input_layout not in {"channel_first", "channel_last"}:
        raise ValueError(f"expected channel_first or channel_last, got input_layout={input_layout!r}; give one of them")
    name = identify(path)
    return _SandboxedRuntime(
        name=name, version=_installed_version(name), path=path, input_layout=input_layout, threads=threads
    )


@dataclass(frozen=True, kw_only=True)
class _SandboxedRuntime:
    name: RuntimeName
    version: str
    path: Path
    input_layout: InputLayout
    threads: int

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
            found = f"inputs of {inputs.dtype} {inputs.shape}"
            raise ValueError(f"expected float32 inputs (n, *shape), n >= 1, got {found}; use Interface.preprocess")
        with LocalDevice() as device, tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
            staged = Path(scratch, "inputs.npy")
            np.save(staged, inputs, allow_pickle=False)
            model = {
                "name": "model",
                "path": device.put(self.path),
                "runtime": self.name,
                "input_layout": self.input_layout,
                "threads": self.threads,
            }
            device.run({"op": "predict", "model": model, "inputs": device.put(staged), "outputs": "outputs.npy"})
            return _read_outputs(device.get("outputs.npy"), count=len(inputs))


def _installed_version(name: RuntimeName) -> str:
    package = agent.RUNTIME_PACKAGES[name]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"expected the runtime {name}, got no package {package}; pip install 'tacit[devices]'"
        ) from None


def _read_outputs(content: bytes, *, count: int) -> npt.NDArray[np.float32]:
    """Read a .npy file of unknown honesty: its header must agree with its size before anything is allocated."""
    stream = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("unknown version")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise ArtifactRefused(f"the runtime wrote outputs that are no .npy file: {error}") from None
    body = content[stream.tell() :]
    whole = not fortran_order and dtype == np.float32 and len(shape) >= 2 and shape[0] == count
    if not whole or min(shape) < 1 or 4 * math.prod(shape) != len(body):
        raise ArtifactRefused(f"expected float32 outputs ({count}, ...), got {dtype} {shape} in {len(body)} bytes")
    return np.frombuffer(body, dtype=np.float32).reshape(shape).copy()
