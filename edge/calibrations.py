"""Noise that was calibrated before on this machine: a deployed owner is a new process for each message.

A file below `$TACIT_HOME/cache`, by everything that the figure depends on, the versions included. It holds constants of
recipes and nothing of anybody's records. A wrong figure in it costs budget or accuracy and not the guarantee: what is
charged is the noise that is drawn, and the ledger computes the ε of a plan itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from tacit.devices.durable import write_durably
from tacit.federated.home import home_folder

__all__ = ["recall"]


def recall(asked: Mapping[str, object], compute: Callable[[], float], *, folder: Path | None = None) -> float:
    """The figure that was computed for the same question before, or else now.

    Args:
        asked: everything that the figure depends on besides the versions of the packages.
        compute: gives it, a finite number above 0.
        folder: where figures lie; `$TACIT_HOME/cache` when None.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     [recall({"epsilon": 8.0}, lambda: noise, folder=Path(home)) for noise in (1.5, 2.5)]
        [1.5, 1.5]
    """
    versions = {name: version(name) for name in ("tacit", "dp-accounting", "numpy", "scipy")}
    question = json.dumps({**asked, "versions": versions}, sort_keys=True)
    folder = home_folder() / "cache" if folder is None else folder
    path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
    found = _read(path, question)
    if found is None:
        found = compute()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, json.dumps({"question": question, "figure": found}).encode())
    return found


def _read(path: Path, question: str) -> float | None:
    """None unless the file is whole and answers exactly this question."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    figure = content.get("figure") if isinstance(content, dict) and content.get("question") == question else None
    return figure if isinstance(figure, float) and 0.0 < figure < math.inf else None
