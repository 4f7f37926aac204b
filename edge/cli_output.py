"""What a command gives back: text for people, data for scripts, a code for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        text: for stdout with `--format text`.
        data: for the envelope with `--format json`.
        code: the exit code.
    """

    text: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    code: int = 0
