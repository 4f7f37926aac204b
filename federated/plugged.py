"""Any Flower `Strategy` of the user's own, in our round loop."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from tacit.federated.clipping import Arrays
from tacit.federated.noise import public_seed

__all__ = ["PluggedStrategy", "find_strategy"]


@runtime_checkable
class _Remembers(Protocol):
    def state(self) -> Arrays: ...

    def restore(self, state: Arrays) -> None: ...


@dataclass
class PluggedStrategy:
    """A Flower strategy, with what a checkpoint asks of one.

    A strategy that has `state()` and `restore(state)`, dicts of arrays by name, resumes exactly; another one begins
    anew when a run is resumed. Flower's own strategies choose nodes with Python's global generator, which is given a
    public seed for it.

    Attributes:
        strategy: Flower's.
        seed: the recipe's.
    """

    strategy: Strategy
    seed: int = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy's; what it draws from Python's global generator follows from the seed."""
        before = random.getstate()
        random.seed(public_seed(self.seed, "strategy", server_round))
        try:
            return list(self.strategy.configure_train(server_round, arrays, config, grid))
        finally:
            random.setstate(before)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy's."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody: evaluations are planned and charged by the recipe, not by a strategy."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    @property
    def forgets(self) -> bool:
        """Whether a resumed run cannot give it back what it knew."""
        return not isinstance(self.strategy, _Remembers)

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        return self.strategy.state() if isinstance(self.strategy, _Remembers) else {}

    def restore(self, state: Arrays) -> None:
        """Takes up what `state` kept."""
        if isinstance(self.strategy, _Remembers):
            self.strategy.restore(state)


def find_strategy(name: str, *, seed: int = 0) -> PluggedStrategy:
    """The strategy that "package.module:name" stands for: an object, or a class or function called without arguments.

    Raises:
        ValueError: it cannot be imported or made, or is no Flower Strategy.

    >>> find_strategy("flwr.serverapp.strategy:FedMedian").strategy.__class__.__name__
    'FedMedian'
    """
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(import_module(module), attribute)
        if inspect.isclass(found) or inspect.isfunction(found):
            found = found()
    except Exception as error:  # whatever a user's module raises is about that module
        raise ValueError(
            f"expected federated.strategy='package.module:name' to be importable and callable without arguments, got "
            f"{name!r}: {type(error).__name__}: {error}; install the package or put its folder on PYTHONPATH"
        ) from error
    if not isinstance(found, Strategy):
        raise ValueError(f"expected {name!r} to be a flwr.serverapp.strategy.Strategy, got {type(found).__name__}")
    return PluggedStrategy(found, seed)
