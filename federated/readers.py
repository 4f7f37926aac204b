"""Reads tables and folders of images where they lie: cells as they are written, each parsed from its own text alone.

CSV is read with the standard library, Parquet with pyarrow and images with Pillow rather than with `datasets`, which
would leave a copy of every record in its cache. A reader that guesses a column's type from all of its rows lets one
record decide how another is read; here nothing is guessed. Messages name a line and a column, never a value.
"""

from __future__ import annotations

import csv
import json
import math
import struct
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tacit.federated.task import DataProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MISSING", "Cell", "Table", "column_names", "extra_of_data", "list_images", "read_image", "read_table"]

Cell = str | int | float | bool | bytes | Mapping[str, Any] | Path | None

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of one file, or of one folder of images.

    Attributes:
        rows: how many records.
        texts: cells of labels, owners and images; None where there is nothing.
        numbers: cells of features and values, (rows,) float64; NaN where there is nothing.
        place: where a row is, for people.
    """

    rows: int
    texts: Mapping[str, Sequence[Cell]]
    numbers: Mapping[str, npt.NDArray[np.float64]]
    place: Callable[[int], str]


@contextmanager
def extra_of_data() -> Iterator[None]:
    """Says which extra brings a package that is not installed.

    >>> with extra_of_data():
    ...     raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: expected the package 'pyarrow', got none; pip install 'tacit[data]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"expected the package {error.name!r}, got none; pip install 'tacit[data]'"
        raise ModuleNotFoundError(message, name=error.name) from None


def column_names(path: Path, *, delimiter: str = ",") -> tuple[str, ...]:
    """The columns of a table, without its records.

    Args:
        path: ends in .parquet, or is text.
        delimiter: between the columns of text.

    Raises:
        DataProblem: nothing there, nothing in it, not a table, or another delimiter.
    """
    if path.suffix == ".parquet":
        return tuple(_parquet(path).schema_arrow.names)
    with _text_of(path) as lines:
        return _header(path, csv.reader(lines, delimiter=delimiter, strict=True), delimiter)


def read_table(path: Path, *, texts: Sequence[str], numbers: Sequence[str], delimiter: str = ",") -> Table:
    """Reads some columns of a CSV or Parquet file.

    Args:
        path: ends in .parquet, or is text with a header.
        texts: columns whose cells are kept as they are.
        numbers: columns that must be numeric.
        delimiter: between the columns of text.

    Raises:
        DataProblem: nothing there, not a table, a column that is missing or not numeric, a row of another length.
    """
    names = column_names(path, delimiter=delimiter)
    for name in (*texts, *numbers):
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(names[:8])}"
            raise DataProblem(f"expected a column {name!r} in {path}, got none; {hint}")
    table = (
        _read_parquet(path, texts, numbers)
        if path.suffix == ".parquet"
        else _read_csv(path, names, texts, numbers, delimiter)
    )
    if not table.rows:
        raise DataProblem(f"expected records in {path}, got none below the header; give a file with some")
    return table


def _expect_file(path: Path) -> None:
    if not path.exists():
        raise DataProblem(f"expected data at {path}, got no such path; correct task.path")
    if not path.is_file():
        raise DataProblem(f"expected a file at {path}, got a folder; name the file")
    if not path.stat().st_size:
        raise DataProblem(f"expected a table in {path}, got an empty file; give a file with a header and records")


@contextmanager
def _text_of(path: Path) -> Iterator[Iterator[str]]:
    _expect_file(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError:
        raise DataProblem(f"expected UTF-8 text in {path}, got other bytes; save the file as UTF-8") from None
    except csv.Error as error:
        raise DataProblem(
            f"expected a table of text in {path}, got one that cannot be read: {error}; repair it"
        ) from None


def _header(path: Path, rows: Iterator[list[str]], delimiter: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in next(rows, []))
    if not any(names):
        raise DataProblem(f"expected column names in the first line of {path}, got none; write a header")
    if len(names) == 1:
        other = next((sign for sign in ",;\t|" if sign != delimiter and sign in names[0]), None)
        hint = f"set task.delimiter to {other!r}" if other else "give a file with features and a label"
        raise DataProblem(f"expected columns apart by delimiter={delimiter!r} in {path}, got one column; {hint}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataProblem(f"expected different column names in {path}, got {twice!r} twice; rename one")
    return names


def _read_csv(
    path: Path, names: tuple[str, ...], texts: Sequence[str], numbers: Sequence[str], delimiter: str
) -> Table:
    kept: dict[str, list[Cell]] = {name: [] for name in texts}
    parsed = {name: array("d") for name in numbers}
    wanted = [(names.index(name), name) for name in numbers]
    written = [(names.index(name), name) for name in texts]
    lines = array("q")
    with _text_of(path) as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        next(rows)
        for row in rows:
            if not row:  # an empty line
                continue
            if len(row) != len(names):
                raise DataProblem(
                    f"expected {len(names)} columns, got {len(row)} in line {rows.line_num} of {path}; repair the line"
                )
            for index, name in written:
                cell = row[index].strip()
                kept[name].append(None if cell.lower() in MISSING else cell)
            for index, name in wanted:
                parsed[name].append(_number(row[index], name, path, rows.line_num))
            lines.append(rows.line_num)
    return Table(
        rows=len(lines),
        texts=kept,
        numbers={name: np.frombuffer(cells, np.float64) if cells else np.empty(0) for name, cells in parsed.items()},
        place=lambda row: f"line {lines[row]} of {path}",
    )


def _number(cell: str, name: str, path: Path, line: int) -> float:
    """A cell as a number, NaN when it is missing; an infinity is one."""
    if cell.strip().lower() in MISSING:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise DataProblem(
            f"expected a number in column {name!r}, got text in line {line} of {path}; list numeric columns in "
            "task.features"
        ) from None


def _parquet(path: Path) -> Any:
    _expect_file(path)
    with extra_of_data():
        import pyarrow.parquet as pq
    try:
        return pq.ParquetFile(path)
    except (ValueError, OSError):  # its text may quote what is in the file
        raise DataProblem(f"expected a Parquet file, got something else in {path}; write it again") from None


def _read_parquet(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    import pyarrow as pa

    file = _parquet(path)
    try:
        content = file.read(columns=[*texts, *numbers])
    except (ValueError, OSError):
        raise DataProblem(f"expected a whole Parquet file, got a damaged one: {path}; write it again") from None
    classes = _class_names(file.schema_arrow.metadata)
    parsed = {}
    for name in numbers:
        kind = content.schema.field(name).type
        types = pa.types
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
            raise DataProblem(
                f"expected numbers in column {name!r} of {path}, got type {kind}; list numeric columns in task.features"
            )
        cells = content.column(name)
        cells = cells.cast(pa.int8()) if types.is_boolean(kind) else cells
        parsed[name] = np.array(cells.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    kept = {name: _named(content.column(name).to_pylist(), classes.get(name)) for name in texts}
    return Table(rows=content.num_rows, texts=kept, numbers=parsed, place=lambda row: f"row {row + 1} of {path}")


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of classes that `datasets` wrote beside a column of their positions."""
    written = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features = written.get("info", {}).get("features", {})
    return {name: one["names"] for name, one in features.items() if isinstance(one, dict) and "names" in one}


def _named(cells: list[Cell], names: Sequence[str] | None) -> list[Cell]:
    def named(cell: Cell) -> Cell:
        if isinstance(cell, float) and math.isnan(cell):
            return None
        if names is None or not isinstance(cell, int):
            return cell
        return names[cell] if 0 <= cell < len(names) else None

    return [named(cell) for cell in cells]


def list_images(folder: Path, levels: Sequence[str] | None) -> Table:
    """The images of a folder by its subfolders, in the order of their paths; none is opened.

    Args:
        folder: outermost.
        levels: what the names of its nested folders are, from outside to inside, like ("folder", "label"); None for
            any folders, whose names mean nothing.

    Returns:
        texts: "image" with paths, and each level.

    Raises:
        DataProblem: nothing there, no images, a file that is none, or folders of another depth.
    """
    if not folder.is_dir():
        raise DataProblem(f"expected a folder of images at {folder}, got none; correct task.path")
    parts = {path: path.relative_to(folder).parts for path in folder.rglob("*")}
    files = sorted(path for path, names in parts.items() if path.is_file() and not any(n[0] == "." for n in names))
    for path in files:
        if path.suffix.lower() not in _IMAGES:
            raise DataProblem(f"expected images alone in {folder}, got {path}; remove it")
        if levels is not None and len(parts[path]) != len(levels) + 1:
            wanted = "/".join([*(f"<{level}>" for level in levels), "<image>"])
            raise DataProblem(f"expected images as {wanted} in {folder}, got {path}; move it")
    if not files:
        raise DataProblem(f"expected images in {folder}, got none; give a folder with some")
    texts: dict[str, Sequence[Cell]] = {
        level: [parts[path][i] for path in files] for i, level in enumerate(levels or ())
    }
    return Table(rows=len(files), texts={**texts, "image": files}, numbers={}, place=lambda row: str(files[row]))


def read_image(cell: Cell, shape: tuple[int, ...], place: str) -> npt.NDArray[np.uint8]:
    """One image, upright and of the size that is asked for.

    Args:
        cell: a path, an image's bytes, or what `datasets` stores: a mapping with bytes or a path.
        shape: (channels, height, width).
        place: where it is, for people.

    Returns:
        (channels, height, width), from 0 to 255.

    Raises:
        DataProblem: cut off, not an image, or another number of channels.
    """
    with extra_of_data():
        from PIL import Image, ImageOps
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or isinstance(cell, int | float):
        raise DataProblem(f"expected an image, got none at {place}; remove the record")
    source = BytesIO(cell) if isinstance(cell, bytes) else cell
    # What Pillow raises on damaged files is no family of its own.
    damaged = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image = image.convert("RGB") if image.mode == "P" else image
            found = _CHANNELS.get(image.mode)
            if found == shape[0]:
                image = image.convert("L") if image.mode == "1" else image
                # Pillow speaks of (width, height).
                image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
                return np.asarray(image, np.uint8).reshape(shape[1], shape[2], shape[0]).transpose(2, 0, 1)
            mode = image.mode
    except (*damaged, Image.DecompressionBombError):
        raise DataProblem(
            f"expected a whole image, got one that cannot be read: {place}; repair or remove it"
        ) from None
    raise DataProblem(
        f"expected an image of {shape[0]} channels, got mode {mode} at {place}; convert it, or change task.shape"
    )
