"""What the server does with the mean of a round: plain averaging, momentum, or steps that adapt to each coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tacit.federated.clipping import Arrays

__all__ = ["OPTIMIZERS", "ServerOptimizer"]

OPTIMIZERS = ("sgd", "momentum", "adam", "yogi", "adagrad", "rmsprop")
_VELOCITY, _SECOND = "velocity.", "second."
_ADAPTIVE = frozenset({"adam", "yogi", "adagrad", "rmsprop"})
_WITH_VELOCITY = frozenset({"momentum", "adam", "yogi"})

_Wide = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """One step of the server's weights w towards the mean of a round, a: Δ = a - w is the pseudo-gradient's negative.

    | name | step |
    |---|---|
    | sgd | w ← w + ηΔ; with η = 1 plain FedAvg |
    | momentum | u ← β₁u - Δ, w ← w - ηu (FedAvgM, Hsu et al. 2019) |
    | adam, yogi | m ← β₁m + (1 - β₁)Δ, w ← w + ηm / (√v + τ) |
    | adagrad, rmsprop | w ← w + ηΔ / (√v + τ) |

    with v = τ² before the first round and no correction of bias (Reddi et al. 2021, algorithm 2):

    | name | v |
    |---|---|
    | adagrad | v + Δ² |
    | yogi | v - (1 - β₂)Δ²·sign(v - Δ²) |
    | adam, rmsprop | β₂v + (1 - β₂)Δ² |

    Adagrad has β₁ = 0 as in that paper's experiments; rmsprop is adam with β₁ = 0. Flower's classes are
    the same but for their beginning: v = 0, and FedAdam corrects the first rounds' bias.

    *Guarantees*: reads nothing but its arguments, so what it makes of noised averages costs no privacy.

    Attributes:
        name: one of the above.
        learning_rate: η, above 0; adaptive steps are in units of weights and want it small, 0.001 to 0.1.
        momentum: β₁ in [0, 1), for momentum, adam and yogi; the others have none.
        second_momentum: β₂ in [0, 1), for adam, yogi and rmsprop.
        tau: τ above 0, the least scale to adapt to.
        schedule: η "constant", or "cosine" to zero over the planned rounds.

    Raises:
        ValueError: a value out of its range.

    >>> optimizer = ServerOptimizer(name="momentum", learning_rate=0.5)
    >>> weights, averaged = {"w": np.float32([1.0])}, {"w": np.float32([0.5])}
    >>> moved, state = optimizer.step(weights, averaged, {}, server_round=1, rounds=10)
    >>> moved["w"].tolist(), {name: array.tolist() for name, array in state.items()}
    ([0.75], {'velocity.w': [0.5]})
    """

    name: Literal["sgd", "momentum", "adam", "yogi", "adagrad", "rmsprop"] = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.9
    second_momentum: float = 0.99
    tau: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"expected one of {', '.join(OPTIMIZERS)}, got name={self.name!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"expected constant or cosine, got schedule={self.schedule!r}")
        for key in ("learning_rate", "tau"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0.0):
                raise ValueError(f"expected a finite number above 0, got {key}={getattr(self, key)}")
        for key in ("momentum", "second_momentum"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"expected a number from 0 to below 1, got {key}={getattr(self, key)}")

    def rate(self, server_round: int, rounds: int) -> float:
        """The learning rate of a round, from 1.

        >>> ServerOptimizer(schedule="cosine").rate(1, 10)
        1.0
        """
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (server_round - 1) / rounds))

    def step(
        self, weights: Arrays, averaged: Arrays, state: Arrays, *, server_round: int, rounds: int
    ) -> tuple[Arrays, Arrays]:
        """The new weights, and what the next step needs to know.

        Args:
            weights: what the round began with, float32.
            averaged: the mean of what came back, of the same names and shapes.
            state: what the last step returned; {} before the first. A checkpoint keeps it.
            server_round: from 1, for the schedule.
            rounds: planned, for the schedule.

        Returns:
            New weights and new state, float32: "velocity.NAME" (u or m) and "second.NAME" (v) where the step has them.

        Raises:
            ValueError: arrays that do not match the weights, or the state of another optimizer.
        """
        _expect("averaged arrays", _shapes(weights), averaged)
        if state:
            _expect(f"the state of server optimizer {self.name!r}", self._state_shapes(weights), state)
        rate = self.rate(server_round, rounds)
        if self.name == "momentum":
            return _momentum(weights, averaged, state, rate, self.momentum)
        if self.name == "sgd":
            return {name: _step(weights[name], averaged[name], np.float32(rate)) for name in weights}, {}
        return self._adaptive(weights, averaged, state, rate)

    def _adaptive(self, weights: Arrays, averaged: Arrays, state: Arrays, rate: float) -> tuple[Arrays, Arrays]:
        beta = self.momentum if self.name in _WITH_VELOCITY else 0.0
        second_moment = self._second_moment()
        moved, fresh = {}, {}
        for name, array in weights.items():
            wide = array.astype(np.float64)
            delta = averaged[name].astype(np.float64) - wide
            velocity = beta * state.get(_VELOCITY + name, np.float32(0.0)) + (1.0 - beta) * delta
            second = second_moment(_before(state, name, wide, self.tau), np.square(delta))
            moved[name] = wide + rate * velocity / (np.sqrt(second) + self.tau)
            if self.name in _WITH_VELOCITY:
                fresh[_VELOCITY + name] = velocity
            fresh[_SECOND + name] = second
        return _narrow(moved), _narrow(fresh)

    def _second_moment(self) -> Callable[[_Wide, _Wide], _Wide]:
        """How v takes up Δ²; both are float64."""
        beta = self.second_momentum
        if self.name == "adagrad":
            return lambda v, square: v + square
        if self.name == "yogi":
            return lambda v, square: v - (1.0 - beta) * square * np.sign(v - square)
        return lambda v, square: beta * v + (1.0 - beta) * square

    def _state_shapes(self, weights: Arrays) -> dict[str, tuple[int, ...]]:
        kinds = [_VELOCITY] * (self.name in _WITH_VELOCITY) + [_SECOND] * (self.name in _ADAPTIVE)
        return {kind + name: array.shape for kind in kinds for name, array in weights.items()}


def _step(
    weights: npt.NDArray[np.float32], averaged: npt.NDArray[np.float32], rate: np.float32
) -> npt.NDArray[np.float32]:
    """The way of plain descent, w - η(w - a), with one array besides."""
    step = np.asarray(weights - averaged)
    step *= rate
    np.subtract(weights, step, out=step)
    return step


def _momentum(weights: Arrays, averaged: Arrays, state: Arrays, rate: float, momentum: float) -> tuple[Arrays, Arrays]:
    # In float32 throughout: a run that was begun earlier goes on with the same bits.
    gradient = {name: weights[name] - averaged[name] for name in weights}
    velocity = {n: momentum * state[_VELOCITY + n] + gradient[n] for n in weights} if state else gradient
    moved = {n: weights[n] - np.float32(rate) * velocity[n] for n in weights}
    return _narrow(moved), _narrow({_VELOCITY + name: array for name, array in velocity.items()})


def _before(state: Arrays, name: str, like: _Wide, tau: float) -> _Wide:
    if not state:
        return np.full(like.shape, tau**2)
    return state[_SECOND + name].astype(np.float64)


def _narrow(arrays: Mapping[str, npt.NDArray[np.floating]]) -> Arrays:
    # asarray: NumPy's arithmetic turns arrays of no dimension into scalars, which Flower does not send.
    return {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _expect(what: str, shapes: dict[str, tuple[int, ...]], arrays: Arrays) -> None:
    found = _shapes(arrays)
    if found != shapes:
        wrong = sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))[0]
        raise ValueError(
            f"expected {what} to match the weights, got {wrong} of shape {found.get(wrong, 'none')} "
            f"where {shapes.get(wrong, 'none')} is due"
        )
