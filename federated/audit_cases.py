"""The worst neighbouring inputs that anybody could choose, released by each code path that a run takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.canary_model import CanaryModel, along, canary_records, canary_task, head_directions
from tacit.federated.clipping import Arrays, clipped_sum
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import Randomness, public_generator
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

__all__ = ["Case", "mechanism_cases"]

# Tensors of every kind, one of no dimension among them: a clip by tensor, or one that forgets a kind, shows.
_SHAPES: dict[str, tuple[int, ...]] = {"weight": (3, 4), "bias": (4,), "scale": (), "gain": (2, 3)}
_HUGE = 1e3  # a canary's norm over C, and over the divisor too, so that a clip after the average shows
# A fault that a case is there for is a gross one, or its trial is slow.
_FEW, _SOME = 1_000, 2_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two neighbouring inputs, released by one code path.

    Attributes:
        name: in words.
        score: of one fresh release, with the canary or without it: how far it lies along the canary's direction, in
            units of the sensitivity, so that a correct mechanism gives about N(0, z²) without and N(1, z²) with it.
        most_trials: releases on each input beyond which more would not pay.
    """

    name: str
    score: Callable[[bool], float]
    most_trials: int = 1_000_000


def mechanism_cases(mechanism: Mechanism, randomness: Randomness) -> list[Case]:
    """The neighbouring inputs of a mechanism's unit, through each code path; the plainest case comes first.

    Args:
        mechanism: with q = 1 and one local step, so that a release costs one Gaussian.
        randomness: where its noise comes from.
    """
    paths = {"record": _record_cases, "client": _client_cases, "local": _local_cases}
    cases = paths[mechanism.unit](mechanism, randomness)
    trainer = Case(name="a step of the trainer", score=_trainer_score(mechanism, randomness), most_trials=_SOME)
    # Noise that comes again would cancel; fresh noise only adds up.
    first = cases[0].score
    twice = Case(name="two releases, one subtracted", score=lambda canary: first(canary) - first(False))
    return [*cases, trainer, twice]


def _record_cases(mechanism: Mechanism, randomness: Randomness) -> list[Case]:
    direction, bound = _direction(), mechanism.max_grad_norm
    shapes = [torch.Size(shape) for shape in _SHAPES.values()]
    canary = _batch([_canary(mechanism)])
    company = _batch(_company(mechanism))
    damaged = _batch([_damaged(mechanism)])

    def score(release: Sequence[torch.Tensor]) -> float:
        return _along([tensor.numpy() for tensor in release], direction) * mechanism.normaliser / bound

    def noisy(*chunks: Sequence[torch.Tensor]) -> float:
        return score(mechanism.noisy_mean(chunks, shapes, randomness))

    def summed(with_canary: bool) -> float:
        total = clipped_sum(canary, bound) if with_canary else [torch.zeros(shape) for shape in shapes]
        return score(mechanism.noised(total, randomness))

    cases = [
        Case(name="a record alone", score=lambda c: noisy(canary) if c else noisy()),
        Case(name="a record among others", score=lambda c: 1.0 + (noisy(company, canary) if c else noisy(company))),
        Case(
            name="a record that is not finite",
            score=lambda c: 1.0 + (noisy(company, damaged) if c else noisy(company)),
            most_trials=_FEW,
        ),
    ]
    # Hardened noise is added to records on the grid only, never to a sum that somebody else has made.
    return cases if mechanism.hardened else [*cases, Case(name="a sum made elsewhere", score=summed)]


def _client_cases(mechanism: Mechanism, randomness: Randomness) -> list[Case]:
    direction, bound = _direction(), mechanism.max_grad_norm
    canary, company, damaged = _canary(mechanism), _company(mechanism), _damaged(mechanism)

    def noisy(*updates: Arrays, clip_norm: float = bound) -> float:
        release = mechanism.noisy_average(updates, direction, randomness, clip_norm=clip_norm)
        return _along(list(release.values()), direction) * mechanism.normaliser / clip_norm

    # The noise of a round whose clip was learned must follow that round's clip.
    learned = bound / 3.0
    return [
        Case(name="a client alone", score=lambda c: noisy(canary) if c else noisy()),
        Case(name="a client among others", score=lambda c: 1.0 + (noisy(*company, canary) if c else noisy(*company))),
        Case(
            name="a client that is not finite",
            score=lambda c: 1.0 + (noisy(*company, damaged) if c else noisy(*company)),
            most_trials=_FEW,
        ),
        Case(
            name="a round with another clip",
            score=lambda c: noisy(canary, clip_norm=learned) if c else noisy(clip_norm=learned),
        ),
    ]


def _local_cases(mechanism: Mechanism, randomness: Randomness) -> list[Case]:
    direction, bound = _direction(), mechanism.max_grad_norm
    this, damaged = _canary(mechanism), _damaged(mechanism)
    that = _scaled(this, -1.0)

    def noisy(update: Arrays) -> float:  # replacing one by the other moves it by 2C, from -C to C
        release = mechanism.release_locally(update, randomness)
        return 0.5 + _along(list(release.values()), direction) / (2.0 * bound)

    return [
        Case(name="an owner with the opposite update", score=lambda c: noisy(this if c else that)),
        Case(
            name="an owner that is not finite",
            score=lambda c: noisy(damaged if c else that),
            most_trials=_FEW,
        ),
    ]


def _direction() -> Arrays:
    """A unit vector with the same norm in each tensor; signs alternate, so that noise common to all would cancel."""
    sizes = [math.prod(shape) for shape in _SHAPES.values()]
    signs = np.split(np.where(np.arange(sum(sizes)) % 2 == 0, 1.0, -1.0), np.cumsum(sizes)[:-1])
    return {
        name: np.asarray(sign.reshape(shape) / math.sqrt(len(sign) * len(sizes)), dtype=np.float32)
        for (name, shape), sign in zip(_SHAPES.items(), signs, strict=True)
    }


def _scaled(arrays: Arrays, factor: float) -> Arrays:
    return {name: np.asarray(array * factor, dtype=np.float32) for name, array in arrays.items()}


def _canary(mechanism: Mechanism) -> Arrays:
    return _scaled(_direction(), _HUGE * mechanism.max_grad_norm * max(1.0, mechanism.normaliser))


def _damaged(mechanism: Mechanism) -> Arrays:
    return {**_canary(mechanism), "scale": np.array(math.nan, np.float32)}


def _company(mechanism: Mechanism) -> list[Arrays]:
    """Company that is bad for a canary: one that pulls the other way, and two that are too small to be clipped.

    Half as long as the canary, so that a clip after the sum goes all the way from -C to C.
    """
    small = _scaled(_direction(), 0.01 * mechanism.max_grad_norm)
    return [_scaled(_canary(mechanism), -0.5), small, _scaled(small, -1.0)]


def _batch(gradients: Sequence[Arrays]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.stack([g[name] for g in gradients])) for name in _SHAPES]  # (records, *shape) each


def _along(release: Sequence[npt.NDArray[Any]], direction: Arrays) -> float:
    pairs = zip(release, direction.values(), strict=True)
    return float(sum(np.vdot(r.astype(np.float64), d.astype(np.float64)) for r, d in pairs))


def _trainer_score(mechanism: Mechanism, randomness: Randomness) -> Callable[[bool], float]:
    """One whole step at an owner, on a record whose gradient is known, and as long in each layer as C many times."""
    model, bound = CanaryModel(None, shape=(), dimension=8), mechanism.max_grad_norm
    trainer = LocalTrainer(canary_task(model, 2), model, mechanism, learning_rate=1.0)
    before, direction = write_arrays(model), head_directions(1, 8, public_generator(0, "audit"))
    huge = _HUGE * bound * max(1.0, mechanism.normaliser)
    # A step goes against the gradient.
    this, that = (canary_records(sign * direction, width=0, scale=huge) for sign in (-1.0, 1.0))
    both = Records(np.concatenate([that.inputs, this.inputs]), np.zeros(2, np.int64))

    def moved(arrays: Arrays) -> float:
        return float(along(arrays) @ direction[0])

    def score(canary: bool) -> float:
        if mechanism.unit == "record":
            after = trainer.update(before, both if canary else that, randomness)
            return 1.0 + moved(after) * mechanism.normaliser / bound
        if mechanism.unit == "local":
            return 0.5 + moved(trainer.update(before, this if canary else that, randomness)) / (2.0 * bound)
        after, _ = trainer.client_update(before, this, randomness, clip_norm=bound)
        release = mechanism.noisy_average([after] if canary else [], before, randomness)
        return moved({name: np.asarray(array) for name, array in release.items()}) * mechanism.normaliser / bound

    return score
