"""The device that is always there: this computer, with model files kept in a sandbox."""

import json
import shutil
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tacit.devices import agent
from tacit.devices.answers import read_answer
from tacit.devices.remote_files import checked_name, packed
from tacit.devices.sandbox import ArtifactRefused, Completed, Limits, run_limited


class LocalDevice:
    """Runs ``agent.py`` on this computer, each request in a fresh limited process.

    Files are copied into a private folder, as on any device. An ONNX file that names external data therefore finds
    nothing beside itself, and a file that changes later changes no measurement. ``with`` or ``close`` removes the
    folder at once; otherwise it goes with the object.

    >>> with tempfile.TemporaryDirectory() as folder, LocalDevice() as device:
    ...     _ = Path(folder, "note.txt").write_bytes(b"seen")
    ...     device.get(device.put(Path(folder, "note.txt")))
    b'seen'
    """

    def __init__(self, name: str = "local", *, limits: Limits | None = None, python: Path | None = None) -> None:
        """Make the device's folder; ``python`` runs the agent, by default the one that runs this."""
        self.name = name
        self._python = str(python or sys.executable)
        self._limits = limits or Limits()
        self._folder = Path(tempfile.mkdtemp(prefix="tacit-device-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything that was put on the device."""
        self._remove()

    def put(self, path: Path) -> str:
        """Copy a file onto the device and return the name by which requests refer to it; ``packed`` says more."""
        remote, content = packed(path)
        self._local(remote).write_bytes(content)
        return remote

    def get(self, remote: str) -> bytes:
        """Return a file that the device wrote.

        Raises:
            ArtifactRefused: There is no such file, or it is not a plain file.
        """
        local = self._local(remote)
        if local.is_symlink() or not local.is_file():
            raise ArtifactRefused(f"expected a plain file on device {self.name}, got remote={remote!r}; run it again")
        return local.read_bytes()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request to the agent.

        Args:
            request: As described in ``agent.py``. ``limit_s``, if given, bounds the wall-clock and CPU seconds; the
                default is that of the device's limits.

        Returns:
            The agent's answer, a JSON object of unchecked content.

        Raises:
            ArtifactRefused: The model file could not be run, crashed its runtime or took too long.
            ModuleNotFoundError: The runtime is not installed.
        """
        return self._read(self._ask(request))

    def facts(self) -> dict[str, Any]:
        """Describe this computer, and whether its sandbox has a network ("none" or "host")."""
        completed = self._ask({"op": "facts"})
        return {**self._read(completed), "sandbox_network": completed.network}

    def _ask(self, request: dict[str, Any]) -> Completed:
        limit_s = float(request.get("limit_s", self._limits.wall_s))
        threads = max(
            [1, *(model.get("threads", 1) for model in [*request.get("models", []), request.get("model", {})])]
        )
        # -P keeps this folder off the agent's sys.path, where statistics.py would shadow the standard library's.
        return run_limited(
            [self._python, "-P", agent.__file__],
            stdin=json.dumps(request).encode(),
            limits=replace(self._limits, wall_s=limit_s, cpu_s=int(limit_s * threads) + 1),
            cwd=self._folder,
        )

    def _read(self, completed: Completed) -> dict[str, Any]:
        return read_answer(completed.stdout, completed.stderr, returncode=completed.returncode)

    def _local(self, remote: str) -> Path:
        return self._folder / checked_name(remote)
