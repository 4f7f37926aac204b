"""What is done to records before training: to each from itself and declared constants alone.

A column's mean, the classes that occur or the outliers among records are statistics of private data, and whoever uses
them has accessed these data. They are declared here or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.readers import Cell
from tacit.federated.task import DataProblem, Records

__all__ = ["Missing", "class_positions", "cleaning_refusal", "fill_missing", "refuse_imputation", "without_duplicates"]

Missing = Literal["refuse", "zero", "drop"] | Mapping[str, float]

_STATISTICS = frozenset({"mean", "median", "mode", "most_frequent", "interpolate", "ffill", "bfill", "knn"})


def refuse_imputation(missing: object) -> None:
    """Refuses to fill what is missing with what other records say.

    Raises:
        PrivacyRefused: a statistic.
        ValueError: something else that is not "refuse", "zero", "drop" or constants by column.

    >>> refuse_imputation({"age": 40.0})
    >>> refuse_imputation("mean")
    Traceback (most recent call last):
        ...
    tacit.federated.mechanism.PrivacyRefused: expected what is missing to be a declared constant, got missing='mean', \
which other records decide; declare one by column, like {age = 40.0}
    """
    if isinstance(missing, str) and missing in _STATISTICS:
        raise PrivacyRefused(
            f"expected what is missing to be a declared constant, got missing={missing!r}, which other records decide; "
            "declare one by column, like {age = 40.0}"
        )
    if isinstance(missing, Mapping):
        wrong = [c for c, v in missing.items() if isinstance(v, bool) or not isinstance(v, int | float)]
        wrong += [c for c, v in missing.items() if c not in wrong and not np.isfinite(v)]
        if wrong:
            raise ValueError(f"expected a finite number for what is missing in column {wrong[0]!r}, got another value")
    elif missing not in ("refuse", "zero", "drop"):
        raise ValueError(
            f"expected missing to be 'refuse', 'zero', 'drop' or constants by column, got {missing!r}; choose one"
        )


def cleaning_refusal(
    *, duplicates: str, missing: object, unit: Literal["record", "client", "local", "none"], sizes: str
) -> str | None:
    """Why a way of cleaning would break the guarantee, or None.

    Let r be what is done to one record (it stays, is filled in, or is dropped), and s the removal of exact duplicates
    within one owner. Adding a record x to an owner's D adds at most r(x) to r(D), and at most x to the set s(D): if it
    was there it still is, once; what is kept of equal records is the same whichever it is. So data that differ by one
    record differ by at most one after cleaning, and the guarantee of what follows is that of the whole (a stability of
    1: McSherry 2009, "Privacy integrated queries"). Where an owner is the unit nothing needs to be shown.

    How many records are left does depend on them. Where sizes are public the guarantee compares data in which a record
    is blanked and the size stays, so that a size taken after cleaning tells of a record: refused.

    Duplicates of *another* owner's records are never dropped: an owner would answer for what another holds.

    Args:
        duplicates: "keep" or "drop".
        missing: of `refuse_imputation`.
        unit: of the guarantee.
        sizes: "public" where owners declare how much they hold.

    >>> cleaning_refusal(duplicates="drop", missing="zero", unit="record", sizes="secret")
    >>> cleaning_refusal(duplicates="drop", missing="zero", unit="record", sizes="public")
    "expected task.duplicates='keep' with privacy.sizes='public', got 'drop'; how many are left tells of a record"
    """
    if unit != "record" or sizes != "public":
        return None
    if duplicates == "drop":
        return (
            "expected task.duplicates='keep' with privacy.sizes='public', got 'drop'; how many are left tells of a "
            "record"
        )
    if missing == "drop":
        return (
            "expected task.missing other than 'drop' with privacy.sizes='public', got 'drop'; how many are left tells "
            "of a record"
        )
    return None


def fill_missing(
    columns: Mapping[str, npt.NDArray[np.float64]], rule: Missing, place: Callable[[int], str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Columns as a matrix without gaps.

    Args:
        columns: by name, (records,); NaN is missing.
        rule: what is put there.
        place: where a record is, for people.

    Returns:
        Values, (records, columns), and which records stay, (records,); of those that do not the values mean nothing.

    Raises:
        DataProblem: a missing value for which no constant is declared, or an infinity.

    >>> values, stays = fill_missing({"age": np.array([30.0, np.nan])}, {"age": 40.0}, str)
    >>> values.tolist(), stays.tolist()
    ([[30.0], [40.0]], [True, True])
    """
    values = np.stack(list(columns.values()), axis=1)  # (records, columns)
    names = list(columns)
    with np.errstate(over="ignore"):  # reported below, with its place
        infinite = np.argwhere(np.isinf(values.astype(np.float32)))
    if len(infinite):
        row, column = infinite[0]
        raise DataProblem(
            f"expected a finite number in column {names[column]!r}, got another at {place(int(row))}; fix it"
        )
    gaps = np.isnan(values)
    if rule == "drop":
        return values, np.logical_not(gaps.any(axis=1, keepdims=True))[:, 0]
    constants = rule if isinstance(rule, Mapping) else dict.fromkeys(names, 0.0) if rule == "zero" else {}
    for index, name in enumerate(names):
        rows = np.flatnonzero(gaps[:, index])
        if len(rows) and name not in constants:
            raise DataProblem(
                f"expected a number in column {name!r}, got none at {place(int(rows[0]))}; set task.missing to 'drop', "
                "'zero' or a constant for it"
            )
        values[rows, index] = constants.get(name, 0.0)
    return values, np.ones(len(values), np.bool_)


def class_positions(
    cells: Sequence[Cell], labels: Sequence[str], place: Callable[[int], str], *, drop: bool = False
) -> npt.NDArray[np.int64]:
    """Positions of cells among declared classes; -1 for one that is missing and is to be dropped.

    A cell is a class by its name. A whole number is a position, from 0, where no class has a number for a name.

    Raises:
        DataProblem: no class, or none of these.

    >>> class_positions(["cat", 1, 0.0], ("dog", "cat"), str).tolist()
    [1, 1, 0]
    >>> class_positions(["7", 8], ("7", "8"), str).tolist()
    [0, 1]
    """
    by_name = {label: index for index, label in enumerate(labels)}
    numbered = not any(_whole(label) is not None for label in labels)
    found = np.empty(len(cells), np.int64)
    for row, cell in enumerate(cells):
        if cell is None and drop:
            found[row] = -1
            continue
        position = next((by_name[name] for name in _spellings(cell) if name in by_name), None)
        number = _whole(cell)
        if position is None and numbered and number is not None and 0 <= number < len(labels):
            position = number
        if position is None:
            what = "none" if cell is None else "another"
            shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
            raise DataProblem(f"expected a class among {shown}, got {what} at {place(row)}; declare it in task.labels")
        found[row] = position
    return found


def _spellings(cell: Cell) -> tuple[str, ...]:
    if isinstance(cell, bool):
        return (str(cell), str(cell).lower(), str(int(cell)))
    if isinstance(cell, float) and cell.is_integer():
        return (str(int(cell)), str(cell))
    return (str(cell).strip(),) if isinstance(cell, str | int | float) else ()


def _whole(cell: Cell) -> int | None:
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        number = float(cell)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def without_duplicates(records: Records) -> Records:
    """One owner's records without exact repetitions, those of the same input and label; the first of them stay.

    >>> twice = Records(np.float32([[1.0], [2.0], [1.0], [1.0]]), np.int64([0, 0, 0, 1]))
    >>> kept = without_duplicates(twice)
    >>> kept.inputs.tolist(), kept.labels.tolist()
    ([[1.0], [2.0], [1.0]], [0, 0, 1])
    """
    if not len(records):
        return records
    rows = [
        np.ascontiguousarray(part.reshape(len(records), -1)).view(np.uint8).reshape(len(records), -1)
        for part in (records.inputs, records.labels)
    ]
    first = np.unique(np.concatenate(rows, axis=1), axis=0, return_index=True)[1]
    return records.take(np.sort(first))
