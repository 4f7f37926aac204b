"""What is wrong with a recipe, in one line that names the place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

__all__ = ["RecipeInvalid", "RecipeRefused", "first_error", "syntax_error"]


class RecipeInvalid(ValueError):
    """A recipe that cannot be read; `where` is file:line:column."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class RecipeRefused(ValueError):
    """Keys that are each valid but cannot hold together."""


def syntax_error(path: Path, message: str) -> RecipeInvalid:
    """What tomllib says, with the place in front.

    Example:
        >>> syntax_error(Path("r.toml"), "Invalid value (at line 2, column 5)").where
        'r.toml:2:5'
    """
    reason, _, place = message.partition(" (at ")
    numbers = [word.strip(",)") for word in place.split() if word.strip(",)").isdigit()]
    where = ":".join([str(path), *numbers]) if numbers else f"{path} ({place.strip(')')})"
    return RecipeInvalid(f"expected TOML, got a syntax error: {reason[:1].lower()}{reason[1:]}", where)


def first_error(
    error: ValidationError, text: str, path: Path, overrides: Sequence[str], schema: type[BaseModel]
) -> RecipeInvalid:
    """One line for the first thing that is wrong; the others show once it is mended."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not (isinstance(part, str) and _is_tag(part))]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    overridden = [o for o in overrides if _overlap(o.partition("=")[0].strip(), key)]
    where = f"--set {overridden[-1]}" if overridden else _place(text, location, path)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(location[-1]), _known_keys(schema, location[:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_known_keys(schema, location[:-1]))}"
        return RecipeInvalid(f"expected a known key, got {key!r}{hint}", where)
    if first["type"] == "missing":
        return RecipeInvalid(f"expected the key {key!r}, got none", where)
    got = first["input"]
    shown = json.dumps(got) if isinstance(got, (str, int, bool, list, dict)) else str(got)
    asked = first["msg"][:1].lower() + first["msg"][1:]
    return RecipeInvalid(
        f"{key} = {shown}: {asked.removeprefix('value error, ').replace('input should be', 'expected')}", where
    )


def _known_keys(schema: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    fields: Any = schema
    for part in location:
        if isinstance(part, str):
            annotation = fields.model_fields[part].annotation
            fields = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    return list(fields.model_fields)


def _overlap(first: str, second: str) -> bool:
    """Whether one of two dotted keys is the other or holds it."""
    short, long = sorted((first, second), key=len)
    return long.startswith(short) and long[len(short) :][:1] in ("", ".", "[")


def _is_tag(part: str) -> bool:
    """Whether a part of a place names a member of a union rather than a key."""
    return part in _UNION_TAGS or part.startswith(("literal[", "constrained-", "list["))


_UNION_TAGS = {"float", "int", "str", "bool", "none"}


def _place(text: str, location: Sequence[str | int], path: Path) -> str:
    """file:line:column of a key; tomllib keeps no positions, so the text is read once more, headers and keys only."""
    wanted = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), None)
    where, depth = str(path), 0
    for line, column, keys, entry in _keys(text):
        elsewhere = index is not None and entry is not None and entry != index
        if not elsewhere and keys == wanted[: len(keys)] and len(keys) > depth:
            where, depth = f"{path}:{line}:{column}", len(keys)
    return where


def _keys(text: str) -> Iterator[tuple[int, int, list[str], int | None]]:
    """Line, column, dotted path and array-of-tables index of each header and key."""
    table: list[str] = []
    entry: int | None = None
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        column = len(line) - len(line.lstrip()) + 1
        if stripped.startswith("["):
            header = stripped.partition("#")[0].strip()
            table = [part.strip().strip("\"'") for part in header.strip("[] ").split(".")]
            entry = None
            if header.startswith("[["):
                name = ".".join(table)
                entry = counts[name] = counts.get(name, -1) + 1
            yield number, column, table, entry
        elif "=" in stripped and not stripped.startswith("#"):
            key = stripped.partition("=")[0].strip()
            yield number, column, [*table, *(part.strip().strip("\"'") for part in key.split("."))], entry
