"""What a file from outside is: by suffix, first bytes and what it states about itself, before any runtime sees it."""

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tacit.devices.sandbox import ArtifactRefused, Limits, run_limited

__all__ = ["Format", "RuntimeName", "ask_reader", "examine", "identify", "recognise", "require"]

Format = Literal["onnx", "ort", "tflite", "pte", "safetensors"]
RuntimeName = Literal["onnxruntime", "litert", "tflite-runtime", "micro", "executorch"]
_SUFFIXES: Mapping[str, Format] = MappingProxyType(
    {".onnx": "onnx", ".ort": "ort", ".tflite": "tflite", ".pte": "pte", ".safetensors": "safetensors"}
)
_RUNTIMES: Mapping[Format, RuntimeName] = MappingProxyType(
    {"onnx": "onnxruntime", "ort": "onnxruntime", "tflite": "litert", "pte": "executorch"}
)
_IDENTIFIERS: Mapping[bytes, Format] = MappingProxyType({b"ORTM": "ort", b"TFL3": "tflite", b"ET12": "pte"})
# Scripts that read what a file states about itself, in a child.
_READERS: Mapping[Format, str] = MappingProxyType({"onnx": "onnx_structure.py", "tflite": "tflite_structure.py"})
_MAX_BYTES = (2 << 30) - 1  # where protobuf and flatbuffers end
_HEAD_BYTES = 512
_TAIL_BYTES = 1 << 18  # of a ZIP archive: holds the directory of all but the largest
_LIMITS = Limits(wall_s=60, cpu_s=60, file_size_bytes=0, output_bytes=32 << 20)
_VARINT, _BYTES = 0, 2
_ONNX_FIELDS = {1: _VARINT, 5: _VARINT, **dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _BYTES)}
_SAID = 300


def recognise(path: Path) -> Format:
    """Say which format a file is of, by suffix and checked against its first bytes.

    *Guarantees.* Only a plain file is opened, and of it only a few bytes are read; nothing is unpickled or unpacked.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is none of these formats; what it is instead is said, where that can be told.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.ort")
    ...     _ = path.write_bytes(b"....ORTM")
    ...     recognise(path)
    'ort'
    """
    suffix = _SUFFIXES.get(path.suffix.lower())
    require(path, suffix)
    if suffix is None:
        endings = ", ".join(_SUFFIXES)
        raise ArtifactRefused(f"expected a file ending in one of {endings}, got path={path.name!r}; export it again")
    return suffix


def identify(path: Path) -> RuntimeName:
    """Say which runtime a model file is for.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: As of ``recognise``, or a file that holds weights and no model.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.tflite")
    ...     _ = path.write_bytes(b"....TFL3")
    ...     identify(path)
    'litert'
    """
    found = recognise(path)
    if found not in _RUNTIMES:
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, which holds weights only; export the model")
    return _RUNTIMES[found]


def examine(path: Path) -> RuntimeName:
    """Identify a model file, and check in the sandbox what it states about itself.

    An ONNX file must hold all its weights: one that names another file is refused, wherever it does so. All inputs of
    an ONNX or TFLite file have fixed sizes but for the batch. ``onnx.checker`` reads the file too, where it is
    installed.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: As of ``identify``, or the structure is not acceptable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     path = Path(folder, "model.onnx")
    ...     _ = path.write_bytes(bytes([8, 10, 18, 200]))
    ...     examine(path)
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactRefused: path='model.onnx': expected whole fields, got one that ends early; ...
    """
    runtime = identify(path)
    reader = _READERS.get(_SUFFIXES[path.suffix.lower()])
    if reader is not None:
        ask_reader(reader, path)
    return runtime


def require(path: Path, wanted: Format | None) -> None:
    """Refuse what is not a plain file, or has not the content of the wanted format, whatever its name.

    Args:
        path: The file.
        wanted: The format; with None every content is refused that is known not to be a model.

    Raises:
        FileNotFoundError: There is no such file.
        ArtifactRefused: The file is something else, which is named.
    """
    head, tail = _read_ends(path)
    found = _format_of(head, wanted)
    if wanted is not None and found is not None:
        if found == wanted:
            return
        raise ArtifactRefused(
            f"expected the content of a .{wanted} file, got path={path.name!r}, which is .{found}; export it again"
        )
    kind = f"a .{wanted} file" if wanted else "a model"
    for is_it, what, remedy in _STRANGERS:
        if is_it(head, tail):
            raise ArtifactRefused(f"expected {kind}, got path={path.name!r}, {what}; {remedy}")
    if wanted is not None:
        raise ArtifactRefused(f"expected the content of a .{wanted} file, got path={path.name!r}; export it again")


def ask_reader(script: str, path: Path) -> dict[str, Any]:
    """Run one of this folder's readers on a file in the sandbox and return what it found.

    A reader is a script of the standard library alone, and of the one checker that it names.

    Raises:
        ArtifactRefused: The reader refused the file, crashed, or used too much time or memory.
    """
    reader = str(Path(__file__).with_name(script))
    # -B: it has nothing to write, and the limit on the size of files would cut its bytecode short.
    completed = run_limited([sys.executable, "-I", "-B", reader, str(path.absolute())], stdin=b"", limits=_LIMITS)
    try:
        answer = json.loads(completed.stdout)
    except (ValueError, RecursionError):
        answer = None
    if completed.returncode != 0 or not isinstance(answer, dict):
        lines = completed.stderr.decode("utf-8", errors="replace").strip().splitlines()
        raise ArtifactRefused(
            f"path={path.name!r}: the structure could not be read ({_one_line(lines[-1] if lines else 'no answer')})"
        )
    if "refused" in answer:
        raise ArtifactRefused(f"path={path.name!r}: {_one_line(str(answer['refused']))}")
    return answer


def _read_ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a plain file; nothing else is ever opened, because that alone can hang or act."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"expected a model file, got path={str(path)!r}; check the path") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, a loop of symbolic links") from None
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactRefused(f"expected a model, got path={path.name!r}, {_kind(status.st_mode)}; name a plain file")
    # Not blocking, should it have become a FIFO since.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > _MAX_BYTES:
            raise ArtifactRefused(
                f"expected a model of at most 2 GiB, got path={path.name!r} of {size_bytes / (1 << 30):.1f} GiB; "
                "shrink it"
            )
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, size_bytes - _TAIL_BYTES))
        return head, file.read(_TAIL_BYTES) if head.startswith(b"PK") else b""


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_it, name in kinds if is_it(mode)), "a device")


def _format_of(head: bytes, wanted: Format | None) -> Format | None:
    """The format of a file's first bytes; those of ONNX and safetensors say little, so they count where wanted."""
    found = _IDENTIFIERS.get(head[4:8])
    if found is not None:
        return found
    if wanted == "onnx" and not _is_text(head) and _ONNX_FIELDS.get(head[0] >> 3) == head[0] & 7:
        return "onnx"
    return "safetensors" if head[8:9] == b"{" and head[6:8] == b"\0\0" else None


def _starts_with(*beginnings: bytes) -> Callable[[bytes, bytes], bool]:
    return lambda head, tail: head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(beginnings)


def _text_with(*beginnings: bytes) -> Callable[[bytes, bytes], bool]:
    return lambda head, tail: _is_text(head) and _starts_with(*beginnings)(head, tail)


def _archive_with(*names: bytes) -> Callable[[bytes, bytes], bool]:
    return lambda head, tail: head.startswith(b"PK\x03\x04") and any(name in tail for name in names)


def _is_pickle(head: bytes, tail: bytes) -> bool:
    # Protocols 2 to 5; older ones have no beginning of their own.
    return head[:1] == b"\x80" and head[1:2] in {b"\2", b"\3", b"\4", b"\5"}


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # or a letter that the end of the head cuts through
            return False
    return all(byte >= 32 or byte in b"\t\n\r" for byte in head)


_DOWNLOAD = "download the raw file"
_PICKLED = "a pickle can run any code and is never opened: export to ONNX, TFLite or ExecuTorch"
_STRANGERS: tuple[tuple[Callable[[bytes, bytes], bool], str, str], ...] = (
    (lambda head, tail: not head, "which is empty", "export it again"),
    (_starts_with(b"version https://git-lfs"), "a Git LFS pointer", "run git lfs pull"),
    (_starts_with(b"<!doctype", b"<html", b"<head", b"<body"), "a web page", _DOWNLOAD),
    (_text_with(b"<"), "XML, such as a server's error message", _DOWNLOAD),
    (_text_with(b"{", b"["), "JSON, such as a server's error message", _DOWNLOAD),
    (_is_pickle, "a pickle", _PICKLED),
    (_archive_with(b"/constants.pkl", b"/code/"), "a TorchScript archive", _PICKLED),
    (_archive_with(b"data.pkl"), "a torch.save archive", _PICKLED),
    (_archive_with(b""), "a ZIP archive", "unpack it"),
    (lambda head, tail: head.startswith(b"\x1f\x8b"), "gzip data", "unpack it"),
    (_text_with(b""), "text", _DOWNLOAD),
)


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * _SAID]).split())[:_SAID]
