"""One object from which sampler, clip, noise and accounting of a run are all made, so that they cannot drift apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.accounting import Event, Spend, calibrate_noise, reported_epsilon, spend
from tacit.federated.noise import Randomness

__all__ = ["Mechanism", "PrivacyRefused", "clipped_sum", "refuse_mixing_layers"]

Unit = Literal["record", "none"]

# Float rounding may lift a clipped norm by parts in 1e7; clipping a little lower keeps it below the bound.
_CLIP_SLACK = 1.0 - 1e-6
# Beyond this the clip factor is a denormal float32, too coarse for the slack above; such a record counts as non-finite.
_LARGEST_NORM = 1e30


class PrivacyRefused(ValueError):
    """What was asked for cannot keep the guarantee."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """DP-SGD with Poisson batches at one owner: `sum of clipped gradients + N(0, (zC)²)` over a public constant.

    Abadi et al. 2016, algorithm 1, with Poisson sampling and a normaliser that no record can change.

    *Guarantees*: every field is a constant of the recipe, the same for every owner and fixed before a record is read,
    so two neighbouring data sets are treated by the same mechanism.

    Attributes:
        unit: "record", or "none" for training without a guarantee.
        sample_rate: q, the probability with which each record joins a batch.
        max_grad_norm: C, the L2 bound of one record's gradient over all parameters; infinite for no clipping.
        noise_multiplier: z, the noise's standard deviation over C.
        steps_per_round: local steps of one participation.
        rounds: planned participations, a cap that the ledger enforces.
        reference_size: n_ref; gradients are divided by q·n_ref, never by an owner's size.
        delta: the δ at which ε is stated.
    """

    unit: Unit
    sample_rate: float
    max_grad_norm: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    reference_size: int
    delta: float

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise PrivacyRefused(f"expected unit among {', '.join(get_args(Unit))}, got unit={self.unit!r}")
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"expected 0 < delta < 1, got delta={self.delta}")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"expected 0 < sample_rate <= 1, got sample_rate={self.sample_rate}")
        if min(self.steps_per_round, self.rounds, self.reference_size) < 1:
            raise ValueError("expected steps_per_round, rounds and reference_size of at least 1")
        if not self.max_grad_norm > 0.0:
            raise ValueError(f"expected max_grad_norm > 0, got max_grad_norm={self.max_grad_norm}")
        if self.private and not (math.isfinite(self.max_grad_norm) and 0.0 < self.noise_multiplier < math.inf):
            raise PrivacyRefused(
                f"expected a finite max_grad_norm and noise_multiplier > 0 for unit {self.unit!r}, "
                f"got max_grad_norm={self.max_grad_norm}, noise_multiplier={self.noise_multiplier}"
            )
        if not self.private and self.noise_multiplier != 0.0:
            raise ValueError(f"expected noise_multiplier=0 for unit 'none', got {self.noise_multiplier}")

    @property
    def private(self) -> bool:
        """Whether a guarantee is claimed."""
        return self.unit != "none"

    @property
    def event(self) -> Event:
        """What one step costs."""
        return Event(sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier)

    @property
    def normaliser(self) -> float:
        """q·n_ref, the expected batch of an owner of the reference size."""
        return self.sample_rate * self.reference_size

    def planned_epsilon(self) -> float:
        """ε of all planned participations: PLD, or RDP where that exceeds 50."""
        return reported_epsilon({self.event: self.rounds * self.steps_per_round}, self.delta)

    def spend(self, participations: int) -> Spend:
        """The cost of so many participations, by three accountants."""
        return spend({self.event: participations * self.steps_per_round}, self.delta)

    def describe(self) -> dict[str, str | float | int]:
        """The mechanism as a ledger entry states it."""
        return {
            "unit": self.unit,
            "relation": "add/remove",
            "sampler": "poisson",
            "noise": "gaussian",
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "steps": self.steps_per_round,
        }

    def draw_batch(self, size: int, randomness: Randomness) -> npt.NDArray[np.int64]:
        """A Poisson batch: each of `size` records independently with probability q; it may be empty."""
        return np.flatnonzero(randomness.bernoulli(size, self.sample_rate))

    def noisy_mean(
        self, chunks: Iterable[Sequence[torch.Tensor]], shapes: Sequence[torch.Size], randomness: Randomness
    ) -> list[torch.Tensor]:
        """The only thing that leaves a step: clipped sum, plus noise, over the public normaliser.

        Args:
            chunks: per-record gradients of one batch, in pieces; each piece holds, per parameter, (records, *shape). No
                piece at all is an empty batch, which releases noise.
            shapes: shape of each parameter.
            randomness: where the noise comes from.

        Returns:
            One tensor per parameter, float32.
        """
        total = [torch.zeros(shape) for shape in shapes]
        for chunk in chunks:
            total = [a + b for a, b in zip(total, clipped_sum(chunk, self.max_grad_norm), strict=True)]
        if self.noise_multiplier > 0.0:
            total = _add_noise(total, self.noise_multiplier * self.max_grad_norm, randomness)
        return [gradient / self.normaliser for gradient in total]

    @classmethod
    def for_budget(cls, *, epsilon: float, delta: float, sample_rate: float, rounds: int, **rest: object) -> Mechanism:
        """A record-level mechanism whose noise is calibrated once, from above, to (ε, δ) over all planned steps."""
        steps = rest.get("steps_per_round")
        if not isinstance(steps, int):
            raise TypeError(f"expected steps_per_round as an integer, got {steps!r}")
        noise = calibrate_noise(epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=rounds * steps)
        return cls(unit="record", delta=delta, sample_rate=sample_rate, rounds=rounds, noise_multiplier=noise, **rest)  # type: ignore[arg-type]  # the remaining fields are checked by the dataclass


def clipped_sum(gradients: Sequence[torch.Tensor], max_grad_norm: float) -> list[torch.Tensor]:
    """Sums per-record gradients after scaling each record to an L2 norm of at most C over all parameters together.

    A record whose gradient is not finite contributes nothing: it is masked, because 0·NaN is NaN.

    *Guarantees*: adding or removing one record moves the result by at most C in L2 (up to float32 summation).

    Args:
        gradients: per parameter, (records, *shape); parameters of no dimension are (records,).
        max_grad_norm: C; infinite sums unclipped.

    >>> [round(float(s), 6) for s in clipped_sum([torch.tensor([3.0, float("nan")])], 1.0)]
    [0.999999]
    """
    records = gradients[0].shape[0]
    flat = [g.reshape(records, math.prod(g.shape[1:])) for g in gradients]  # (records, parameters of one tensor)
    squares = sum(torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) ** 2 for g in flat)
    norms = torch.sqrt(torch.as_tensor(squares))  # (records,)
    usable = norms < _LARGEST_NORM  # false for NaN as well
    if math.isfinite(max_grad_norm):
        factors = torch.where(usable, (max_grad_norm * _CLIP_SLACK / norms).clamp(max=1.0), 0.0).to(torch.float32)
    else:
        factors = usable.to(torch.float32)
    if not bool(usable.all()):
        flat = [torch.where(usable[:, None], g, 0.0) for g in flat]
    return [(factors @ g).reshape(original.shape[1:]) for g, original in zip(flat, gradients, strict=True)]


def refuse_mixing_layers(model: torch.nn.Module) -> None:
    """Refuses layers in which more than a record's own gradient depends on it, or on randomness that is not secret.

    Batch statistics mix the records of a batch; a buffer may carry what it saw past clip and noise; dropout draws from
    torch's global generator, whose default seed is a constant.

    Raises:
        PrivacyRefused: names the layers and what to use instead.
    """
    mixing = [
        name or "model"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or any(True for _ in module.buffers(recurse=False))
    ]
    if mixing:
        raise PrivacyRefused(
            f"expected a model whose records do not mix, got batch statistics or buffers in layer(s) "
            f"{', '.join(mixing)}; "
            'use GroupNorm (in a recipe: [model] norm = "group")'
        )
    seeded = [n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0.0]
    if seeded:
        raise PrivacyRefused(f"expected no dropout, got layer(s) {', '.join(seeded)}; its randomness is not secret")


def _add_noise(total: list[torch.Tensor], standard_deviation: float, randomness: Randomness) -> list[torch.Tensor]:
    noise = torch.from_numpy(randomness.gaussian(sum(t.numel() for t in total), standard_deviation))
    pieces = torch.split(noise, [t.numel() for t in total])
    return [(t.double() + n.reshape(t.shape)).float() for t, n in zip(total, pieces, strict=True)]
