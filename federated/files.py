"""Tasks over a user's own files: described in a recipe, read where they lie, refused in one line where they are bad.

What a description leaves open is never taken from the records: classes, constants of scaling and what stands for a
missing value are declared. Only the header of a table is read to learn how many features there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Literal

from tacit.devices.interface import Interface
from tacit.federated.cleaning import Missing, refuse_imputation
from tacit.federated.file_data import load_data, split_path
from tacit.federated.models import build_family
from tacit.federated.readers import column_names
from tacit.federated.task import DataProblem, Kind, Model, Task

__all__ = ["DataDescription", "describe_task"]

Source = Literal["csv", "parquet", "images", "hub"]

_SOURCES = ("csv", "parquet", "images", "hub")
_OUTPUT = {"classification": "logits", "regression": "values", "anomaly": "reconstruction"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """What a recipe's `[task]` says about files. Lists are kept as tuples.

    Attributes:
        name: of the task and of the source in ledgers: letters, digits, '_', '.', '-'.
        source: "csv", "parquet", "images", or "hub".
        path: a file; of images a folder; of the hub a data set's name, or a local folder laid out like one.
        owner_column: whose record it is; of images "folder" for an outer folder by owner. None for a file that the
            recipe deals out to simulated owners.
        label: column of the class; of a regression one column or several. Folders of images are their label.
        features: columns of the input; all but label and owner when empty. With a shape of images, the one column of a
            Parquet file or hub data set that holds them.
        kind: "classification", "regression" or "anomaly".
        labels: names of the classes in order; of a regression those of the values, the columns' names when empty; of
            an anomaly task what is normal and what is not.
        shape: (channels, height, width) that images are resized to; of a table a shape that its features fill.
        scale: factor on raw values; 1/255 for images when None, else 1.
        mean: subtracted after that, one or one per channel or column.
        std: divided by after that, one or one per channel or column.
        target_mean: of a regression, subtracted from its values, one or one per value.
        target_std: of a regression, divided by after that.
        threshold: of an anomaly task, the score above which a record is anomalous.
        missing: "refuse", "zero", "drop" the record, or a constant by column.
        duplicates: "drop" removes an owner's exact repetitions.
        status: "public-benchmark" when ε describes the mechanism rather than protects these records.
        test: a public test split: a path like `path`; of the hub a split's name.
        public: inputs that are declared public, likewise.
        delimiter: between columns of CSV.

    Raises:
        ValueError: keys that are wrong by themselves or together.
        PrivacyRefused: what is missing would be taken from other records.

    >>> DataDescription(name="pets", source="csv", path="pets.csv", label="kind", labels=["cat", "dog"]).labels
    ('cat', 'dog')
    """

    name: str
    source: Source
    path: str
    owner_column: str | None = None
    label: str | Sequence[str] | None = None
    features: Sequence[str] = ()
    kind: Kind = "classification"
    labels: Sequence[str] = ()
    shape: Sequence[int] | None = None
    scale: float | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    target_mean: Sequence[float] = (0.0,)
    target_std: Sequence[float] = (1.0,)
    threshold: float | None = None
    missing: Missing = "refuse"
    duplicates: Literal["keep", "drop"] = "keep"
    status: Literal["private", "public-benchmark"] = "private"
    test: str | None = None
    public: str | None = None
    delimiter: str = ","

    def __post_init__(self) -> None:
        for one in fields(self):  # recipes hold lists
            value = getattr(self, one.name)
            if isinstance(value, list):
                object.__setattr__(self, one.name, tuple(value))
        self._check_words()
        refuse_imputation(self.missing)
        self._check_label()
        if self.source == "images" and (self.shape is None or len(self.shape) != 3):
            raise ValueError(
                f"expected task.shape = [channels, height, width] for images, got {self.shape}; declare it"
            )
        if self.source == "images" and self.owner_column not in (None, "folder"):
            raise ValueError(
                f"expected task.owner_column='folder' or none for images, got {self.owner_column!r}; "
                "they have no columns"
            )
        if len(self.delimiter) != 1:
            raise ValueError(f"expected one character, got task.delimiter={self.delimiter!r}; give one, like ';'")

    def _check_words(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"expected letters, digits, '_', '.' and '-', at most 64, got task.name={self.name!r}")
        choices = {
            "source": _SOURCES,
            "kind": tuple(_OUTPUT),
            "duplicates": ("keep", "drop"),
            "status": ("private", "public-benchmark"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"expected task.{key} among {', '.join(allowed)}, got {getattr(self, key)!r}")

    def _check_label(self) -> None:
        if self.kind == "classification" and len(self.labels) < 2:
            raise ValueError(
                f"expected two or more classes in task.labels, got {list(self.labels)}; declare them: taking them from "
                "the records would tell which occur"
            )
        if self.source == "images":
            if self.kind == "regression":
                raise ValueError(
                    "expected task.kind='classification' or 'anomaly' for folders of images, got 'regression'"
                )
            return
        if self.label is None and self.kind != "anomaly":
            raise ValueError("expected task.label, got none; name the column of what is learned")
        if self.kind != "regression" and isinstance(self.label, tuple):
            raise ValueError(f"expected one column as task.label, got {list(self.label)}; name one")
        twice = set(self.features) & {*self.label_columns, self.owner_column}
        if twice:
            raise ValueError(
                f"expected features without label and owner, got {sorted(map(str, twice))}; leave them out"
            )

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns of what is learned.

        >>> DataDescription(name="rent", source="csv", path="x.csv", kind="regression", label="euros").label_columns
        ('euros',)
        """
        return (self.label,) if isinstance(self.label, str) else tuple(self.label or ())

    @property
    def holds_images(self) -> bool:
        """Whether an input is an image: a file, or a cell of a table.

        >>> DataDescription(
        ...     name="pets", source="images", path="pets", labels=["cat", "dog"], shape=[3, 32, 32]
        ... ).holds_images
        True
        """
        cells = self.source in ("parquet", "hub") and len(self.shape or ()) == 3 and len(self.features) == 1
        return self.source == "images" or cells


def describe_task(description: DataDescription) -> Task:
    """The task over described files; records are read when it is loaded, once a process as long as they do not change.

    Raises:
        DataProblem: the header of a table, from which the features are taken, cannot be read.
        ValueError: constants that do not fit the shape.

    >>> task = describe_task(
    ...     DataDescription(
    ...         name="pets", source="images", path="pets", labels=("cat", "dog"), shape=(3, 32, 32), scale=1.0
    ...     )
    ... )
    >>> task.interface.shape, task.metric
    ((3, 32, 32), 'accuracy')
    """
    if not (description.features or description.source == "images"):
        description = replace(description, features=_features(description))
    _check_constants(description)
    interface = _interface(description)

    def build(parameters: Mapping[str, object]) -> Model:
        family = "autoencoder" if description.kind == "anomaly" else "cnn" if len(interface.shape) == 3 else "mlp"
        chosen = {**parameters, "family": parameters.get("family") or family}
        return build_family(chosen, shape=interface.shape, outputs=task.outputs)

    task = Task(
        name=description.name,
        title=description.name,
        interface=interface,
        load=partial(load_data, description, interface),
        build=build,
        kind=description.kind,
    )
    return task


def _check_constants(description: DataDescription) -> None:
    if not isinstance(description.missing, Mapping):
        return
    for name in description.missing:
        if name not in description.features:
            near = get_close_matches(name, description.features, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ValueError(f"expected constants in task.missing for features, got {name!r}; {hint}")


def _interface(description: DataDescription) -> Interface:
    shape = tuple(description.shape or ()) or (len(description.features),)
    if not description.holds_images and math.prod(shape) != len(description.features):
        raise ValueError(
            f"expected as many task.features as task.shape={list(shape)} has elements, got "
            f"{len(description.features)}; change one of them"
        )
    labels = tuple(description.labels)
    if not labels:
        labels = description.label_columns if description.kind == "regression" else ("normal", "anomalous")
    scale = description.scale if description.scale is not None else 1 / 255 if description.holds_images else 1.0
    return Interface(
        shape=shape,
        scale=scale,
        mean=tuple(description.mean),
        std=tuple(description.std),
        labels=labels,
        output=_OUTPUT[description.kind],  # type: ignore[arg-type]  # a literal by construction
        target_mean=tuple(description.target_mean),
        target_std=tuple(description.target_std),
        threshold=description.threshold,
    )


def _features(description: DataDescription) -> tuple[str, ...]:
    """Columns of the input; where none are named, all but label and owner."""
    if description.features:
        return tuple(description.features)
    path = split_path(description, "private")
    names = column_names(path, delimiter=description.delimiter)
    rest = tuple(name for name in names if name not in {*description.label_columns, description.owner_column})
    if not rest:
        raise DataProblem(f"expected features in {path}, got label and owner alone; add columns")
    return rest
