"""A model file that can predict, whatever its format: ``open_artifact``."""

import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from tacit.devices import agent, tflite_runtime
from tacit.devices.formats import RuntimeName as RuntimeName
from tacit.devices.formats import examine
from tacit.devices.formats import identify as identify
from tacit.devices.local import LocalDevice
from tacit.devices.sandbox import ArtifactRefused

InputLayout = Literal["channel_first", "channel_last"]
Layouts = InputLayout | Sequence[InputLayout]
Values = npt.NDArray[Any]
# Files of one format that several runtimes read.
_ALIKE: dict[RuntimeName, tuple[RuntimeName, ...]] = {"litert": ("litert", "tflite-runtime", "micro")}
_ADAPTERS: dict[RuntimeName, str] = {"micro": "micro.py", "executorch": "executorch.py"}
_EXTRAS: dict[RuntimeName, str] = {"micro": "micro", "executorch": "executorch"}
_PACKAGES: dict[RuntimeName, str] = {
    **{name: agent.RUNTIME_PACKAGES[name] for name in get_args(RuntimeName) if name in agent.RUNTIME_PACKAGES},
    "micro": "tflite-micro",
    "executorch": "executorch",
}


class Runtime(Protocol):
    """A loaded model, as training, parity and the audit see it."""

    @property
    def name(self) -> str:
        """The runtime, such as "onnxruntime"."""

    @property
    def version(self) -> str:
        """The runtime's version."""

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map preprocessed inputs ``(n, *shape)``, channel first, to outputs ``(n, ...)``, such as logits."""

    def run(self, inputs: Sequence[Values], *, outputs: int = 1) -> list[Values]:
        """Map all inputs, each ``(n, *shape)``, to so many outputs, each ``(n, ...)``; of a model that has several."""


def open_artifact(
    path: Path | str,
    *,
    input_layout: Layouts = "channel_first",
    runtime: RuntimeName | None = None,
    threads: int = 1,
) -> Runtime:
    """Open a model file for prediction.

    *Guarantees.* The file is read only by ``agent.py`` in the sandbox, a fresh process for each call of ``predict``,
    with a batch of one: as on a device. A file that crashes its runtime raises here and harms nothing. One that names
    other files is refused before any runtime sees it.

    Args:
        path: A model file. Whole-number inputs and outputs that have a scale are given and returned as floats.
        input_layout: What the file expects, of all inputs or of each. ``predict`` takes channel-first inputs in either
            case.
        runtime: In which to run it; by default ONNX Runtime for .onnx and .ort, LiteRT for .tflite, ExecuTorch for
            .pte.
        threads: Threads that work on one inference.

    Returns:
        A runtime; its ``predict`` raises ``ArtifactRefused`` when the file does not load, crashes or takes too long.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is not a model, or one of another runtime's; it needs other files; its inputs have no
            fixed sizes.
        ModuleNotFoundError: The runtime is not installed.
        ValueError: ``threads`` is less than one or ``input_layout`` is unknown.
    """
    path = Path(path)
    if threads < 1:
        raise ValueError(f"expected threads >= 1, got threads={threads}; give 1")
    layouts = [input_layout] if isinstance(input_layout, str) else list(input_layout)
    if not layouts or not set(layouts) <= {"channel_first", "channel_last"}:
        raise ValueError(f"expected channel_first or channel_last, got input_layout={input_layout!r}; give one of them")
    found = examine(path)
    if runtime is not None and runtime not in _ALIKE.get(found, (found,)):
        raise ArtifactRefused(f"expected a file for {runtime}, got path={path.name!r}, one for {found}; export another")
    name = runtime or found
    return _SandboxedRuntime(
        name=name, version=installed_version(name), path=path, layouts=tuple(layouts), threads=threads
    )


@dataclass(frozen=True, kw_only=True)
class _SandboxedRuntime:
    name: RuntimeName
    version: str
    path: Path
    layouts: tuple[InputLayout, ...]
    threads: int

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
            found = f"inputs of {inputs.dtype} {inputs.shape}"
            raise ValueError(f"expected float32 inputs (n, *shape), n >= 1, got {found}; use Interface.preprocess")
        (outputs,) = self.run([inputs])
        if outputs.dtype != np.float32 or outputs.ndim < 2:
            raise ArtifactRefused(f"expected float32 outputs ({len(inputs)}, ...), got {outputs.dtype} {outputs.shape}")
        return outputs

    def run(self, inputs: Sequence[Values], *, outputs: int = 1) -> list[Values]:
        with _device_of(self.name) as device, tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
            names = [f"outputs{number}.npy" for number in range(outputs)]
            layouts = self.layouts * len(inputs) if len(self.layouts) == 1 else self.layouts
            model = {
                "name": "model",
                "path": device.put(self.path),
                "runtime": self.name,
                "layouts": list(layouts),
                "threads": self.threads,
                "adapter": adapter_of(self.name),
            }
            put = [_put(device, values, Path(scratch, f"{number}.npy")) for number, values in enumerate(inputs)]
            device.run({"op": "predict", "model": model, "inputs": put, "outputs": names})
            return [read_outputs(device.get(name), count=len(inputs[0])) for name in names]


def adapter_of(name: RuntimeName) -> str | None:
    """The file that opens models of a runtime which ``agent.py`` does not know itself.

    >>> adapter_of("litert") is None
    True
    """
    return str(Path(__file__).with_name(_ADAPTERS[name])) if name in _ADAPTERS else None


def installed_version(name: RuntimeName) -> str:
    """The version of a runtime. The environment of tflite-runtime, which has one of its own, is made if need be.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if name == "tflite-runtime":
        tflite_runtime.environment_python()
        return tflite_runtime.VERSION
    package = _PACKAGES[name]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        extra = _EXTRAS.get(name, "devices")
        raise ModuleNotFoundError(
            f"expected the runtime {name}, got no package {package}; pip install 'tacit[{extra}]'"
        ) from None


def _device_of(name: RuntimeName) -> LocalDevice:
    return LocalDevice(python=tflite_runtime.environment_python() if name == "tflite-runtime" else None)


def _put(device: LocalDevice, values: Values, staged: Path) -> str:
    np.save(staged, values, allow_pickle=False)
    return device.put(staged)


def read_outputs(content: bytes, *, count: int) -> Values:
    """Read a .npy file of unknown honesty: its header must agree with its size before anything is allocated.

    Raises:
        ArtifactRefused: It is no such file, or not of so many examples.
    """
    stream = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("unknown version")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise ArtifactRefused(f"the runtime wrote outputs that are no .npy file: {error}") from None
    body = content[stream.tell() :]
    whole = not fortran_order and dtype.kind in "fiub" and len(shape) >= 1 and shape[0] == count
    if not whole or min(shape) < 1 or dtype.itemsize * math.prod(shape) != len(body):
        raise ArtifactRefused(f"expected outputs ({count}, ...), got {dtype} {shape} in {len(body)} bytes")
    return np.frombuffer(body, dtype=dtype).reshape(shape).copy()
