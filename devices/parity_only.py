"""Devices that tell what a model answers and never how long it takes: microcontroller kernels here, and an emulator."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tacit.devices import agent
from tacit.devices.answers import believe_facts
from tacit.devices.asking import put_inputs
from tacit.devices.device import Artifact, Placed
from tacit.devices.formats import RuntimeName, examine
from tacit.devices.local import LocalDevice
from tacit.devices.runtime import open_artifact, read_outputs
from tacit.devices.sandbox import ArtifactRefused

__all__ = ["LatencyRefused", "ParityOnly", "measure_parity"]

Values = npt.NDArray[Any]
_SCHEMA_VERSION = 1
_OPERATIONS = frozenset({"facts", "predict"})
# All that the agent can truly say of a device without a clock: the host's own speed, load and heat are not it.
_FACTS = ("agent_version", "machine", "python", "numpy", *agent.RUNTIME_PACKAGES, "sandbox_network")
_MAX_INPUTS = 64
_REFUSALS = (ArtifactRefused, FileNotFoundError, ModuleNotFoundError)


class LatencyRefused(ArtifactRefused):
    """A device was asked for a time or an amount of memory that it cannot know."""


class ParityOnly:
    """A device that predicts and refuses to be timed.

    >>> with ParityOnly(LocalDevice("micro"), why="not measured", runtimes=("micro",)) as device:
    ...     device.run({"op": "time"})
    Traceback (most recent call last):
        ...
    tacit.devices.parity_only.LatencyRefused: not measured
    """

    def __init__(
        self,
        device: LocalDevice,
        *,
        why: str,
        runtimes: Sequence[RuntimeName],
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Stand before a device.

        Args:
            device: That runs the agent.
            why: What is said instead of a latency.
            runtimes: That it has; the first that reads a file's format runs it.
            facts: That are known better than the agent, which sees this computer.
        """
        self.name = device.name
        self.why = why
        self.runtimes = tuple(runtimes)
        self._device = device
        self._known = dict(facts or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything that was put on the device."""
        self._device.close()

    def put(self, path: Path) -> str:
        """Copy a file onto the device and return the name by which requests refer to it."""
        return self._device.put(path)

    def get(self, remote: str) -> bytes:
        """Return a file that the device wrote."""
        return self._device.get(remote)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the agent, unless it is to measure.

        Raises:
            LatencyRefused: It is.
            ArtifactRefused: The model file could not be run, or is for a runtime that the device has not.
            ModuleNotFoundError: The runtime is not installed.
        """
        if request.get("op") not in _OPERATIONS:
            raise LatencyRefused(self.why)
        runtime = request.get("model", {}).get("runtime")
        if runtime is not None and runtime not in self.runtimes:
            wanted = ", ".join(self.runtimes)
            raise ArtifactRefused(f"expected a file for {wanted} on {self.name}, got one for {runtime}")
        return self._device.run(request)

    def facts(self) -> dict[str, Any]:
        """Describe the device without what is this computer's own."""
        seen = self._device.facts()
        return {**{key: seen.get(key) for key in _FACTS}, **self._known, "latency": self.why}

    def runtime_for(self, path: Path) -> RuntimeName:
        """Which of the device's runtimes runs a file.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactRefused: The file is not acceptable, or none of them runs it.
        """
        found = examine(path)
        alike = ("micro",) if found == "litert" else ()
        for runtime in self.runtimes:
            if runtime == found or runtime in alike:
                return runtime
        raise ArtifactRefused(
            f"expected a file for {', '.join(self.runtimes)} on {self.name}, got path={path.name!r}, one for {found}"
        )


def measure_parity(
    device: ParityOnly, artifacts: Sequence[Artifact], inputs: Sequence[Values], *, outputs: int = 1
) -> dict[str, Any]:
    """Compare what model files answer on a device with what they answer here, in their format's own runtime.

    Args:
        device: Where to run them.
        artifacts: Model files, no two of one name.
        inputs: All inputs of the models, each ``(n, *shape)``, channel first; the first 64 of each are used.
        outputs: How many outputs the models have.

    Returns:
        ``{"schema_version", "device", "mode": "parity", "latency": why there is none, "facts", "artifacts": {name:
        ...}, "failed": {name: reason}}``, ready for ``json.dumps``. Of an artifact: ``sha256``, ``runtime``, ``n``,
        ``max_abs`` (the largest difference of any number, in units of the output), ``scale`` (the largest magnitude of
        the reference), ``top1_agreement`` (the share of inputs whose largest output is the same one).

    Raises:
        ValueError: Names repeat, or there are no inputs.
        ArtifactRefused: The device does not answer at all.
    """
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise ValueError(f"expected artifacts of different names, got names={names}; rename one")
    if not inputs or any(len(values) != len(inputs[0]) or not len(values) for values in inputs):
        raise ValueError(f"expected inputs (n, *shape), n >= 1, got {[v.shape for v in inputs]}; give one of each")
    few = [values[:_MAX_INPUTS] for values in inputs]
    found, failed = {}, {}
    facts = believe_facts(device.facts())
    for artifact in artifacts:
        try:
            found[artifact.name] = _compare(device, artifact, few, outputs)
        except _REFUSALS as error:
            failed[artifact.name] = str(error)
    return {
        "schema_version": _SCHEMA_VERSION,
        "device": device.name,
        "mode": "parity",
        "latency": device.why,
        "facts": facts,
        "artifacts": found,
        "failed": failed,
    }


def _compare(device: ParityOnly, artifact: Artifact, inputs: list[Values], outputs: int) -> dict[str, Any]:
    runtime = device.runtime_for(artifact.path)
    there = _predict(device, artifact, runtime, inputs, outputs)
    here = open_artifact(artifact.path, input_layout=artifact.input_layout).run(inputs, outputs=outputs)
    for a, b in zip(there, here, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ArtifactRefused(f"expected outputs {b.dtype} {b.shape}, got {a.dtype} {a.shape}; export it again")
    return {
        "sha256": hashlib.sha256(artifact.path.read_bytes()).hexdigest(),
        "runtime": runtime,
        "n": len(inputs[0]),
        "max_abs": max(_distance(a, b) for a, b in zip(there, here, strict=True)),
        "scale": max(float(np.abs(b.astype(np.float64)).max()) for b in here),
        "top1_agreement": float(np.mean(_winners(there[0]) == _winners(here[0]))),
    }


def _predict(
    device: ParityOnly, artifact: Artifact, runtime: RuntimeName, inputs: list[Values], outputs: int
) -> list[Values]:
    sha256 = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    placed = Placed(artifact=artifact, runtime=runtime, sha256=sha256, remote=device.put(artifact.path))
    names = [f"outputs{number}.npy" for number in range(outputs)]
    model, put = placed.request(len(inputs)), list(put_inputs(device, inputs))
    device.run({"op": "predict", "model": model, "inputs": put, "outputs": names})
    return [read_outputs(device.get(name), count=len(inputs[0])) for name in names]


def _distance(a: Values, b: Values) -> float:
    """The largest difference; what is not finite on one side only is infinitely far."""
    same = (a == b) | (np.isnan(a) & np.isnan(b)) if a.dtype.kind == "f" else a == b
    with np.errstate(invalid="ignore"):
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart)).max())


def _winners(values: Values) -> npt.NDArray[np.int64]:
    return np.asarray(np.argmax(values.reshape(len(values), -1), axis=1), dtype=np.int64)
