"""What a command gives back: text for people, data for scripts, a code for both."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Outcome", "microseconds", "size", "table"]


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


def table(rows: list[list[str]], *, words_from: int) -> list[str]:
    """Aligns a name, numbers and, from a column on, words; a narrow terminal gets fewer columns, never broken lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = shutil.get_terminal_size((100, 24)).columns
    fitting = [count for count in range(1, len(widths) + 1) if sum(widths[:count]) + 2 * (count - 1) <= room]
    left = [column == 0 or column >= words_from for column in range(len(widths))]
    return [
        "  ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(row[: max(fitting, default=1)], widths, left, strict=False)
        ).rstrip()
        for row in rows
    ]


def size(size_bytes: object) -> str:
    """Bytes in a column of a table.

    Example:
        >>> size(12_345), size(None)
        ('12.3 kB', '-')
    """
    return f"{size_bytes / 1000:.1f} kB" if isinstance(size_bytes, int) else "-"


def microseconds(value_us: object) -> str:
    """A latency in a column of a table.

    Example:
        >>> microseconds(12.34), microseconds(None)
        ('12.3 µs', '-')
    """
    return f"{value_us:.1f} µs" if isinstance(value_us, float) else "-"
