"""From described files to records: by owner where a column says whose they are, else all together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tacit.devices.interface import Interface
from tacit.federated.cleaning import class_positions, fill_missing, without_duplicates
from tacit.federated.hub import fetch_splits
from tacit.federated.readers import Table, list_images, read_image, read_table
from tacit.federated.task import Data, DataProblem, Records

if TYPE_CHECKING:
    from tacit.federated.files import DataDescription

__all__ = ["ELSEWHERE", "load_data", "load_own", "split_path"]

ELSEWHERE = "@owners"  # as a path: each owner's records are in a file of its own, on its own disk

Split = Literal["private", "test", "public"]
Indices = npt.NDArray[np.int64]

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = "server"  # its ledger would be taken for an owner's
_PLACE = re.compile(r"raw\[\((\d+)")


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A split that is ready to be read.

    Attributes:
        table: as it was read.
        labels: (records,) or (records, values), ready.
        stays: (records,), False for a record that is dropped.
        inputs: reads some records' inputs, ready.
    """

    table: Table
    labels: npt.NDArray[Any]
    stays: npt.NDArray[np.bool_]
    inputs: Callable[[Indices], npt.NDArray[np.float32]]

    def records(self, indices: Indices) -> Records:
        """Some records, but for those that are dropped."""
        kept = indices[self.stays[indices]]
        return Records(self.inputs(kept), self.labels[kept])

    @property
    def everything(self) -> Indices:
        return np.arange(self.table.rows)


def load_data(description: DataDescription, interface: Interface) -> Data:
    """The data of a description, read once a process as long as the files do not change.

    Raises:
        DataProblem: names the file, the line or row, and the column.
    """
    return _load(_Key(description, interface))


def load_own(description: DataDescription, interface: Interface, path: Path) -> Data:
    """What a deployed owner has: all of its own file is its, and no other split is read.

    Nothing is read before its records are asked for, which is after the charge: whether they can be read, and what is
    in them, decides no earlier answer.

    Args:
        description: the recipe's; who owns what, and the public splits, do not count here.
        interface: of the task.
        path: of the owner's file or folder.
    """
    own = replace(description, path=str(path), owner_column=None, test=None, public=None)

    @cache
    def records(_: int) -> Records:
        split = _prepared(own, interface, "private")
        return _cleaned(own, split.records(split.everything))

    return Data(private=None, public=None, test=None, status=description.status, of_owner=records)


def _elsewhere(_: int) -> Records:
    raise DataProblem(
        "expected a question that no owner's records answer, got one for them; they are on the owners' own disks"
    )


class _Key:
    """A description with the state of its files, equal to another of the same: a mapping in it has no hash."""

    def __init__(self, description: DataDescription, interface: Interface) -> None:
        self.description, self.interface = description, interface
        self._text = repr((description, interface, _state(description)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def _state(description: DataDescription) -> list[tuple[str, int, int]]:
    """When each file was changed, and how large it is."""
    if description.source == "hub":
        return []
    files: list[Path] = []
    for name in (description.path, description.test, description.public):
        root = Path(name or "").expanduser()
        if name:
            files += sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    return [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists()]


@lru_cache(maxsize=2)  # a run asks for its data at each stage
def _load(key: _Key) -> Data:
    description, interface = key.description, key.interface
    if description.path == ELSEWHERE:
        test, public = _public_splits(description, interface)
        return Data(private=None, public=public, test=test, status=description.status, of_owner=_elsewhere)
    private = _prepared(description, interface, "private")
    if private.table.rows < 2:
        raise DataProblem(f"expected two or more records at {description.path}, got one; give more")
    if description.kind == "classification" and len(np.unique(private.labels[private.labels >= 0])) < 2:
        raise DataProblem(f"expected records of two or more classes at {description.path}, got one class; give others")
    test, public = _public_splits(description, interface)
    if description.owner_column is None:
        records = _cleaned(description, private.records(private.everything))
        return Data(private=records, public=public, test=test, status=description.status)
    names, of_owner = _by_owner(description, private)
    return Data(
        private=None, public=public, test=test, status=description.status, of_owner=of_owner, owners=tuple(names)
    )


def _public_splits(
    description: DataDescription, interface: Interface
) -> tuple[Records | None, npt.NDArray[np.float32] | None]:
    """The test split and the public inputs, where there are any."""
    test = None if description.test is None else _test(description, interface)
    if description.public is None:
        return test, None
    split = _prepared(description, interface, "public")
    return test, split.records(split.everything).inputs


def _test(description: DataDescription, interface: Interface) -> Records:
    split = _prepared(description, interface, "test")
    records = split.records(split.everything)
    if not len(records):
        raise DataProblem(f"expected a test split at {description.test}, got no record that is whole; give some")
    if description.kind == "anomaly" and len(np.unique(records.labels)) < 2:
        raise DataProblem(
            f"expected normal and anomalous records at {description.test}, got one of the two; an AUROC needs both"
        )
    return records


def _cleaned(description: DataDescription, records: Records) -> Records:
    return without_duplicates(records) if description.duplicates == "drop" else records


def _by_owner(description: DataDescription, split: _Prepared) -> tuple[list[str], Callable[[int], Records]]:
    """Names of owners in order, and a reader of the records of one, which remembers what it read.

    An owner is listed whose records are all dropped: who there is must not depend on what records hold.
    """
    cells = split.table.texts[str(description.owner_column)]
    named = [_owner_name(cell, split.table.place(row)) for row, cell in enumerate(cells)]
    names, positions = np.unique(np.array(named), return_inverse=True)
    order = np.argsort(positions, kind="stable")
    shares = np.split(order, np.cumsum(np.bincount(positions))[:-1])

    @cache
    def of_owner(index: int) -> Records:
        if not 0 <= index < len(shares):
            raise DataProblem(
                f"expected an owner below {len(shares)}, got {index}; set federated.owners={len(shares)} or lower"
            )
        return _cleaned(description, split.records(shares[index]))

    return [str(name) for name in names], of_owner


def _owner_name(cell: object, place: str) -> str:
    name = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    if cell is None:
        raise DataProblem(f"expected an owner of each record, got none at {place}; say whose it is")
    if not _OWNER.fullmatch(name) or name == _RESERVED:
        raise DataProblem(
            f"expected an owner's name of letters, digits, '_', '.' and '-', at most 64, and not {_RESERVED!r}, got "
            f"another at {place}; rename it"
        )
    return name


def split_path(description: DataDescription, split: Split) -> Path:
    """Where a split lies; one of the hub is fetched first, once a process.

    Raises:
        DataProblem: the hub does not answer, or has no such data set or split.
    """
    given = {"private": description.path, "test": description.test, "public": description.public}[split] or ""
    if description.source != "hub":
        return Path(given).expanduser()
    splits = ("train", *(name for name in (description.test, description.public) if name))
    folder = _fetched(description.path, tuple(dict.fromkeys(splits)), description.status == "private")
    return folder / f"{'train' if split == 'private' else given}.parquet"


_TEMPORARY: list[TemporaryDirectory[str]] = []  # kept until the process ends, when each removes itself


@cache
def _fetched(dataset: str, splits: tuple[str, ...], private: bool) -> Path:
    folder = TemporaryDirectory(prefix="tacit-hub-")  # for its user alone (0700)
    fetch_splits(dataset, splits, Path(folder.name), private=private)
    _TEMPORARY.append(folder)
    return Path(folder.name)


def _prepared(description: DataDescription, interface: Interface, split: Split) -> _Prepared:
    path = split_path(description, split)
    table = _listed(description, path, split) if description.source == "images" else _read(description, path, split)
    labels = _labels(description, interface, table, split)
    stays = labels >= 0 if labels.ndim == 1 else np.isfinite(labels).all(axis=1)
    if description.holds_images:
        return _Prepared(table=table, labels=labels, stays=stays, inputs=_image_reader(description, interface, table))
    columns = {name: table.numbers[name] for name in description.features}
    values, whole = fill_missing(columns, description.missing, table.place)
    whole &= stays
    ready = np.zeros((table.rows, *interface.shape), np.float32)
    rows = np.flatnonzero(whole)
    ready[rows] = _preprocessed(interface, values[rows].reshape(-1, *interface.shape), lambda i: table.place(rows[i]))
    return _Prepared(table=table, labels=labels, stays=whole, inputs=lambda indices: ready[indices])


def _listed(description: DataDescription, folder: Path, split: Split) -> Table:
    """A folder of images: by owner, then by class, where there are such."""
    levels = ["folder"] if split == "private" and description.owner_column else []
    labelled = split == "test" or (split == "private" and description.kind == "classification")
    return list_images(folder, None if split == "public" else [*levels, *(["label"] if labelled else [])])


def _read(description: DataDescription, path: Path, split: Split) -> Table:
    texts = [] if description.kind == "regression" or split == "public" else list(description.label_columns)
    if split == "private" and description.owner_column:
        texts.append(description.owner_column)
    numbers = list(description.features)
    if description.holds_images:
        texts, numbers = [*texts, *numbers], []
    if description.kind == "regression" and split != "public":
        numbers += description.label_columns
    return read_table(path, texts=texts, numbers=numbers, delimiter=description.delimiter)


def _labels(description: DataDescription, interface: Interface, table: Table, split: Split) -> npt.NDArray[Any]:
    """Labels as a task has them; of one that is dropped -1, or NaN."""
    drop = description.missing == "drop"
    if split == "public":
        return np.zeros(table.rows, np.int64)
    if description.kind == "regression":
        columns = {name: table.numbers[name] for name in description.label_columns}
        values, whole = fill_missing(columns, "drop" if drop else "refuse", table.place)
        labels = np.full(values.shape, np.nan, np.float32)
        labels[whole] = interface.targets(values[whole])
        return labels
    column = "label" if description.source == "images" else (*description.label_columns, None)[0]
    cells: Sequence[Any] | None = table.texts.get(column or "")
    if cells is None and split == "test":
        raise DataProblem(
            f"expected labels at {description.test}, got no task.label; name the column, or leave out test"
        )
    if cells is None:  # an anomaly task learns from records that nobody has looked through
        return np.zeros(table.rows, np.int64)
    return class_positions(cells, interface.labels, table.place, drop=drop)


def _image_reader(
    description: DataDescription, interface: Interface, table: Table
) -> Callable[[Indices], npt.NDArray[np.float32]]:
    cells = table.texts["image" if description.source == "images" else description.features[0]]

    def read(indices: Indices) -> npt.NDArray[np.float32]:
        ready = np.empty((len(indices), *interface.shape), np.float32)
        for position, index in enumerate(indices):  # one after another: raw and ready together take twice the memory
            image = read_image(cells[index], interface.shape, table.place(int(index)))
            ready[position] = interface.preprocess(image[None])[0]
        return ready

    return read


def _preprocessed(interface: Interface, raw: npt.NDArray[Any], place: Callable[[int], str]) -> npt.NDArray[np.float32]:
    try:
        return interface.preprocess(raw)
    except ValueError as error:  # values that leave float32 when they are scaled
        row = _PLACE.search(str(error))
        where = f" at {place(int(row[1]))}" if row else ""
        raise DataProblem(
            f"expected finite values after scaling, got others{where}; check task.scale and std"
        ) from None
