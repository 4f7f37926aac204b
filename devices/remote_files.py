"""Files on their way to devices, and the names that they have there."""

import hashlib
import re
from pathlib import Path

from tacit.devices.sandbox import ArtifactRefused

__all__ = ["checked_name", "packed"]

_REMOTE_NAME = re.compile(r"[a-z0-9]{1,64}(\.[a-z0-9]{1,16})?")
_MAX_FILE_BYTES = 2 << 30


def packed(path: Path) -> tuple[str, bytes]:
    """Return the name under which a file goes onto a device, and its content.

    The name is made of the content's SHA-256 and the suffix; nothing else of the path is used.

    Raises:
        ArtifactRefused: The file is larger than 2 GiB.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ArtifactRefused(f"expected at most {_MAX_FILE_BYTES} bytes, got path={path.name!r}; make it smaller")
    content = path.read_bytes()
    return checked_name(hashlib.sha256(content).hexdigest()[:32] + path.suffix.lower()), content


def checked_name(remote: str) -> str:
    """Return a name that a device gave a file, if it is one that becomes no other path.

    >>> checked_name("../other")
    Traceback (most recent call last):
        ...
    ValueError: expected a name that put() returned, got remote='../other'; put the file first
    """
    if not _REMOTE_NAME.fullmatch(remote):
        raise ValueError(f"expected a name that put() returned, got remote={remote!r}; put the file first")
    return remote
