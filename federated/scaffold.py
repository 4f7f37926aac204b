"""SCAFFOLD's control variates, kept by the server (Karimireddy et al. 2020, option II).

An owner's c_i is a function of the models it was sent and sent back: the server that saw both can keep it, so that an
owner keeps nothing, sends nothing more than its model, and a checkpoint holds all there is. Under record and local
privacy the models that came back are noised, and so is everything made of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tacit.federated.clipping import Arrays

__all__ = ["ControlVariates", "Moved"]


@dataclass(kw_only=True)
class ControlVariates:
    """c and every c_i; an owner's steps use gradient + c - c_i.

    Attributes:
        owners: N, of all that there are.
        scale: K·η, local steps times their learning rate.
        shared: c, by parameter name; empty for zero.
        own: c_i by owner; absent for zero.

    >>> variates = ControlVariates(owners=2, scale=0.5)
    >>> moved = variates.begin({"w": np.float32([1.0])})
    >>> moved.add(0, {"w": np.float32([0.5])})  # a mean gradient of 1
    >>> moved.finish()
    >>> variates.shared["w"].tolist(), variates.own[0]["w"].tolist()
    ([0.5], [1.0])
    >>> variates.correction(0, {"w": np.float32([1.0])})["w"].tolist()
    [-0.5]
    """

    owners: int
    scale: float
    shared: Arrays = field(default_factory=dict)
    own: dict[int, Arrays] = field(default_factory=dict)

    def correction(self, owner: int | None, like: Arrays) -> Arrays:
        """What is added to a gradient, c - c_i, in the names and shapes of `like`; an unknown owner has no c_i yet."""
        own = {} if owner is None else self.own.get(owner, {})
        return {
            name: np.asarray(self.shared.get(name, _zero(array)) - own.get(name, _zero(array)), dtype=np.float32)
            for name, array in like.items()
        }

    def begin(self, before: Arrays) -> Moved:
        """What takes up a round's answers.

        Args:
            before: x, the model that the round began with.
        """
        return Moved(self, before)

    def state(self) -> Arrays:
        """What a checkpoint keeps."""
        kept = {f"shared.{name}": array for name, array in self.shared.items()}
        for owner, arrays in self.own.items():
            kept |= {f"{owner}.{name}": array for name, array in arrays.items()}
        return kept

    def restore(self, state: Arrays) -> None:
        """Takes up what `state` kept."""
        self.shared, self.own = {}, {}
        for key, array in state.items():
            whose, _, name = key.partition(".")
            if whose == "shared":
                self.shared[name] = array
            else:
                self.own.setdefault(int(whose), {})[name] = array


class Moved:
    """A round's change: c_i ← c_i - c + (x - y_i)/(Kη) of those that answer, c ← c + Σ(c_i' - c_i)/N."""

    def __init__(self, variates: ControlVariates, before: Arrays) -> None:
        """Nothing has moved until `finish`."""
        self._variates, self._before = variates, before
        self._total = {name: np.zeros(array.shape) for name, array in before.items()}
        self._own: dict[int, Arrays] = {}

    def add(self, owner: int, after: Arrays) -> None:
        """Takes up an answer, y_i."""
        variates = self._variates
        own, fresh = variates.own.get(owner, {}), {}
        for name, array in self._before.items():
            gradient = (array.astype(np.float64) - after[name]) / variates.scale
            change = gradient - variates.shared.get(name, _zero(array))
            fresh[name] = np.asarray(own.get(name, _zero(array)) + change, dtype=np.float32)
            self._total[name] += change
        self._own[owner] = fresh

    def finish(self) -> None:
        """Moves the variates."""
        shared, owners = self._variates.shared, self._variates.owners
        self._variates.own |= self._own
        self._variates.shared = {
            name: np.asarray(shared.get(name, _zero(array)) + self._total[name] / owners, dtype=np.float32)
            for name, array in self._before.items()
        }


def _zero(like: np.ndarray) -> np.ndarray:
    return np.zeros(like.shape, np.float32)
