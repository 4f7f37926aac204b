"""The built-in tasks and how a recipe's task is found."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module

import numpy as np
from torch import nn

from tacit.devices.interface import Interface
from tacit.federated import writers
from tacit.federated.files import DataDescription, describe_task
from tacit.federated.models import build_family
from tacit.federated.noise import public_generator
from tacit.federated.task import Data, Records, Task

__all__ = ["find_task"]

_TEST_RECORDS = 360
_PUBLIC_RECORDS = 90


def find_task(name: str, description: DataDescription | None = None) -> Task:
    """The task that a recipe names: a built-in one, or "package.module:name" of an importable `Task`.

    A name that stands for a function is called without arguments.

    Args:
        name: of the task.
        description: of a user's own files, of which the task is made instead.

    Raises:
        DataProblem: described files whose header cannot be read.
        ValueError: no such task; the message suggests one.

    >>> find_task("digits").interface.shape
    (1, 8, 8)
    """
    if description is not None:
        return describe_task(description)
    if ":" in name:
        return _imported(name)
    tasks = {"digits": _digits, "writers": _writers}
    if name not in tasks:
        near = get_close_matches(name, tasks, n=1)
        raise ValueError(
            f"expected a task among {', '.join(sorted(tasks))}, or package.module:name, got task.name={name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return tasks[name]()


def _imported(name: str) -> Task:
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(import_module(module), attribute)
        task = found() if callable(found) else found
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected task.name='package.module:name' to be importable, got {name!r}: {error}; "
            "install the package or put its folder on PYTHONPATH"
        ) from error
    if not isinstance(task, Task):
        raise ValueError(f"expected {name!r} to be a tacit.federated.task.Task, got {type(task).__name__}")
    return task


def _digits() -> Task:
    """1,797 real handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998), shipped with scikit-learn."""
    interface = Interface(
        shape=(1, 8, 8), scale=1 / 16, mean=(0.0,), std=(1.0,), labels=tuple("0123456789"), output="logits"
    )

    def load() -> Data:
        from sklearn.datasets import load_digits

        bundle = load_digits()
        raw = bundle.images[:, None]  # (1797, 1, 8, 8), 0 to 16
        records = Records(interface.preprocess(raw), bundle.target.astype(np.int64))
        # The split is part of the task, not of a recipe: every run is judged on the same images.
        order = public_generator(0, "digits split").permutation(len(records))
        public_end = _TEST_RECORDS + _PUBLIC_RECORDS
        return Data(
            private=records.take(order[public_end:]),
            public=records.inputs[order[_TEST_RECORDS:public_end]],
            test=records.take(order[:_TEST_RECORDS]),
            status="public-benchmark",
        )

    def build(parameters: Mapping[str, object]) -> nn.Module:
        return build_family(parameters, shape=interface.shape, outputs=len(interface.labels))

    return Task(name="digits", title="Handwritten digits", interface=interface, load=load, build=build)


def _writers() -> Task:
    """Characters by any number of writers, drawn from strokes: public by construction, and data that come by owner."""

    def load() -> Data:
        return Data(
            private=None,
            public=writers.public_inputs(),
            test=writers.test_records(),
            status="public-benchmark",
            of_owner=writers.writer_records,
        )

    def build(parameters: Mapping[str, object]) -> nn.Module:
        return build_family(parameters, shape=writers.INTERFACE.shape, outputs=len(writers.CLASSES))

    return Task(name="writers", title="Characters by many writers", interface=writers.INTERFACE, load=load, build=build)
