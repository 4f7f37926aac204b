"""Runs a model file in a browser: .onnx in onnxruntime-web, .tflite in LiteRT.js, in headless Chromium without network.

The page and the model come from a server on the loopback, under a name that nobody can guess, and what the page sends
back is bounded and checked: it may come from a file of unknown honesty. Latency in a browser is another question.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import printable
from tacit.devices.browser_server import HEADERS, KINDS
from tacit.devices.formats import examine
from tacit.devices.sandbox import ArtifactRefused, ArtifactTimeout

__all__ = ["BrowserRuntime"]

Values = npt.NDArray[Any]
_WEB = Path(__file__).with_name("web")
_VERSIONS = _WEB / "vendor" / "versions.json"
_NAMES = {"onnxruntime": "onnxruntime-web", "litert": "LiteRT.js"}
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4"), "int64": np.dtype("<i8")}
_MOST_BYTES, _HEAD_BYTES, _SAID = 64 << 20, 4096, 300
_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class BrowserRuntime:
    """A model file in headless Chromium; each call opens a browser of its own.

    Attributes:
        path: An .onnx or .tflite file with float inputs and outputs.
        layouts: What the file expects, of all inputs or of each; ``run`` takes channel-first inputs in either case.
        limit_s: Seconds that one call may take.
    """

    path: Path
    layouts: Sequence[Literal["channel_first", "channel_last"]] = ("channel_first",)
    limit_s: float = _LIMIT_S

    @property
    def name(self) -> str:
        """The runtime, "onnxruntime-web" or "LiteRT.js".

        Raises:
            ArtifactRefused: The file is of neither.
        """
        found = examine(self.path)
        if found not in _NAMES or self.path.suffix.lower() == ".ort":
            raise ArtifactRefused(f"expected an .onnx or .tflite file for a browser, got path={self.path.name!r}")
        return _NAMES[found]

    @property
    def version(self) -> str:
        """The runtime's version.

        Raises:
            ModuleNotFoundError: It is not there.
        """
        if not _VERSIONS.is_file():
            raise ModuleNotFoundError(f"expected {self.name} in {_VERSIONS.parent}, got nothing; run make web")
        return str(json.loads(_VERSIONS.read_text(encoding="utf-8"))[self.name])

    def predict(self, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map preprocessed inputs ``(n, *shape)``, channel first, to outputs ``(n, ...)``, such as logits."""
        (outputs,) = self.run([inputs])
        return outputs

    def run(self, inputs: Sequence[Values], *, outputs: int = 1) -> list[Values]:
        """Map all inputs, each ``(n, *shape)``, to so many outputs, each ``(n, ...)``, one example at a time.

        Raises:
            ArtifactRefused: The file does not run there, its answer is not what was asked for, or comes too late.
            ModuleNotFoundError: The runtime or Chromium is not there.
            ValueError: Inputs of types that no browser's runtime takes.
        """
        kind = "onnx" if self.name == _NAMES["onnxruntime"] else "tflite"
        job = _job(kind, self.path, inputs, self.layouts)
        with _served(job) as address, _browser(address):
            if not job.answered.wait(self.limit_s):
                raise ArtifactTimeout(
                    f"the model file kept {self.name} {self.version} busy for more than {self.limit_s:g} s"
                )
        if job.error is not None:
            raise ArtifactRefused(
                f"the model file could not be run in {self.name} {self.version}: {printable(job.error)}"
            )
        return _read_answer(job.answer, count=len(inputs[0]), outputs=outputs)


@dataclass
class _Job:
    files: dict[str, tuple[str, bytes]]  # by name, besides those of the page
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    answer: bytes = b""
    error: str | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)  # of the one answer that is taken
    answered: threading.Event = field(default_factory=threading.Event)  # and replied to: the browser may go


def _job(kind: str, path: Path, inputs: Sequence[Values], layouts: Sequence[str]) -> _Job:
    each = list(layouts) * len(inputs) if len(layouts) == 1 else list(layouts)
    files, described = {"model": ("application/octet-stream", path.read_bytes())}, []
    for place, (values, layout) in enumerate(zip(inputs, each, strict=True)):
        if values.dtype.name not in TYPES or values.ndim < 1 or len(values) != len(inputs[0]) or not values.size:
            raise ValueError(f"expected inputs (n, *shape) of {', '.join(TYPES)}, got {values.dtype} {values.shape}")
        laid = np.moveaxis(values, 1, -1) if layout == "channel_last" and values.ndim > 2 else values
        content = np.ascontiguousarray(laid, dtype=TYPES[values.dtype.name]).tobytes()
        files[f"input/{place}"] = ("application/octet-stream", content)
        described.append({"type": values.dtype.name, "shape": list(laid.shape[1:])})
    job = json.dumps({"kind": kind, "n": len(inputs[0]), "inputs": described})
    return _Job(files={**files, "job": ("application/json", job.encode())})


@contextmanager
def _served(job: _Job) -> Iterator[str]:
    """The address of the page, as long as it is served."""
    bound = type("_Bound", (_Exchange,), {"served": job})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/{job.token}/parity.html"
        finally:
            server.shutdown()
            thread.join()


class _Exchange(BaseHTTPRequestHandler):
    """Gives the page's files and the job's to whoever knows the token, and takes one answer."""

    served: _Job
    timeout = 30.0

    def do_GET(self) -> None:
        name = self._name()
        found = self.served.files.get(name) if name is not None else None
        if name is not None and found is None:
            path = (_WEB / name).resolve()
            if path.is_file() and path.is_relative_to(_WEB.resolve()) and path.suffix in KINDS:
                found = (KINDS[path.suffix], path.read_bytes())
        self._answer(*found) if found else self.send_error(404)

    def do_POST(self) -> None:
        name, length = self._name(), self.headers.get("Content-Length", "")
        job = self.served
        if name not in ("answer", "error"):
            self.send_error(404)
        elif not length.isascii() or not length.isdigit() or int(length) > _MOST_BYTES:
            self.send_error(413)
        elif not job.turn.acquire(blocking=False):
            self.send_error(404)
        else:
            content = self.rfile.read(int(length))
            if name == "answer":
                job.answer = content
            else:
                job.error = content[: 4 * _SAID].decode("utf-8", errors="replace")
            self._answer("text/plain", b"")
            job.answered.set()

    def _name(self) -> str | None:
        """Of the file asked for; None for those who do not know the token, or come from another page."""
        path, host = self.path.partition("?")[0], self.headers.get("Host", "")
        parts = path.split("/", 2)
        known = len(parts) == 3 and secrets.compare_digest(parts[1].encode(), self.served.token.encode())
        return parts[2] if known and host.startswith("127.0.0.1:") else None

    def _answer(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # named by the standard library
        """Says nothing."""


@contextmanager
def _browser(address: str) -> Iterator[None]:
    program = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if program is None:
        raise ModuleNotFoundError("expected Chromium, got none; install it (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="tacit-browser-", ignore_cleanup_errors=True) as profile:
        command = [
            program,
            "--headless=new",
            f"--user-data-dir={profile}",
            # Nothing but the loopback is reached, whatever the page or the browser itself asks for.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-sync",
            "--no-default-browser-check",
            "--no-first-run",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium's own does not start for root
            address,
        ]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True) as process:
            try:
                yield
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def _read_answer(content: bytes, *, count: int, outputs: int) -> list[Values]:
    """Outputs from what the page sent: its first line must agree with the rest before anything is allocated."""
    head, newline, _ = content[:_HEAD_BYTES].partition(b"\n")
    try:
        described = [(TYPES[one["type"]], tuple(one["shape"])) for one in json.loads(head)] if newline else []
    except (ValueError, KeyError, TypeError, RecursionError):
        described = []
    sizes = [kind.itemsize * math.prod(shape) * count for kind, shape in described if is_shape(shape)]
    if len(described) != outputs or len(sizes) != outputs or sum(sizes) != len(content) - len(head) - 1:
        raise ArtifactRefused(
            f"expected {outputs} outputs (1, ...) of {count} examples, got something else of the page"
        )
    taken, start = [], len(head) + 1
    for (kind, shape), size in zip(described, sizes, strict=True):
        taken.append(np.frombuffer(content[start : start + size], dtype=kind).reshape(count, *shape[1:]).copy())
        start += size
    return taken


def is_shape(shape: tuple[Any, ...]) -> bool:
    """Tell whether that is a shape of one example, with the batch of one."""
    whole = all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < _MOST_BYTES for side in shape)
    return whole and 1 <= len(shape) <= 8 and shape[0] == 1
