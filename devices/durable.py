"""Files that survive a crash: written whole under their final name, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tacit.devices.failpoint import reach

__all__ = ["FileDamaged", "sync_folder", "write_durably"]


class FileDamaged(ValueError):
    """A file of ours that is not as we wrote it."""


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes `data` so that `path` holds either its old content or all of the new.

    Temporary file in the same folder, fsync, rename, fsync of the folder: a `kill -9` or a power cut at any
    instruction leaves no half-written file under the final name.

    Args:
        path: the final name; its folder must exist.
        data: the whole content.
        mode: permission bits of the new file.

    Raises:
        OSError: no space, no permission; the old content is intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_durably(Path(folder, "a.json"), b"{}")
    ...     Path(folder, "a.json").read_bytes()
    b'{}'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            reach("durable.before_fsync")
            os.fsync(file.fileno())
        reach("durable.before_rename")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    reach("durable.after_rename")
    sync_folder(path.parent)
    reach("durable.after_folder_fsync")


def sync_folder(folder: Path) -> None:
    """Makes a rename or a new name inside `folder` durable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "a.json").touch()
    ...     sync_folder(Path(folder))  # from here on the name outlives a power cut
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
