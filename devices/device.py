"""The seam between the protocol of measurement and the places where model files run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tacit.devices.answers import Memory
from tacit.devices.runtime import InputLayout, Layouts, RuntimeName, adapter_of
from tacit.devices.side_answers import ColdStart


class Device(Protocol):
    """A place where model files run. Requests and answers are those of ``agent.py``."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def put(self, path: Path) -> str:
        """Copy a file onto the device; the result names it in requests."""

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the agent; raises ``ArtifactRefused`` if it fails, or is none of this device's."""

    def get(self, remote: str) -> bytes:
        """Fetch a file that the agent wrote."""

    def facts(self) -> dict[str, Any]:
        """Describe the device."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file to be measured, under the name that the result will use; in its format's own runtime by default.

    ``input_layout`` is that of every input, or one for each; ``threads`` work on one inference.
    """

    name: str
    path: Path
    input_layout: Layouts = "channel_first"
    runtime: RuntimeName | None = None
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An artifact that is on a device, and what its first runs there took."""

    artifact: Artifact
    runtime: RuntimeName
    sha256: str
    remote: str = ""
    memory: Memory | None = None
    cold: tuple[ColdStart, ...] = ()

    def request(self, inputs: int) -> dict[str, Any]:
        """What requests say of it."""
        layout = self.artifact.input_layout
        layouts: Sequence[InputLayout] = [layout] * inputs if isinstance(layout, str) else layout
        return {
            "name": self.artifact.name,
            "path": self.remote,
            "runtime": self.runtime,
            "layouts": list(layouts),
            "adapter": adapter_of(self.runtime),
            "threads": self.artifact.threads,
            "sha256": self.sha256,
        }
