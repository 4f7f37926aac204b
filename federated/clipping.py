"""Clipping records' gradients and whole updates, and learning the norm at which to clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["CLIP_SLACK", "AdaptiveClip", "Arrays", "clip_factors", "clip_update", "clipped_sum", "update_norm"]

Arrays = dict[str, npt.NDArray[np.float32]]

# Float rounding may lift a clipped norm by parts in 1e7; clipping a little lower keeps it below the bound.
CLIP_SLACK = 1.0 - 1e-6
# Beyond this the clip factor is a denormal float32, too coarse for the slack; such a record counts as non-finite.
_LARGEST_NORM = 1e30
_SMALLEST_CLIP, _LARGEST_CLIP = 1e-10, 1e10


def update_norm(update: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """L2 norm over all arrays of an update together, those of no dimension included.

    >>> update_norm({"w": np.float32([3.0]), "scale": np.array(4.0, np.float32)})
    5.0
    """
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in update.values()))


def clip_update(update: Mapping[str, npt.NDArray[np.float32]], clip_norm: float) -> dict[str, npt.NDArray[np.float64]]:
    """Scales an update to an L2 norm of at most C over all arrays together; one that is not finite becomes zeros.

    *Guarantees*: adding or removing the update moves any sum that it enters by at most C.

    >>> float(clip_update({"w": np.float32([3.0, 4.0])}, 1.0)["w"].sum().round(4))
    1.4
    """
    wide = {name: array.astype(np.float64) for name, array in update.items()}
    norm = update_norm(wide)  # type: ignore[arg-type]  # any float array has a norm
    if not math.isfinite(norm):
        return {name: np.zeros(array.shape) for name, array in wide.items()}
    factor = min(1.0, clip_norm * CLIP_SLACK / norm) if norm > 0.0 else 1.0
    return {name: np.asarray(array * factor) for name, array in wide.items()}


def clip_factors(norms: torch.Tensor, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each record's gradient is multiplied with, so that its norm is at most C: the one place that decides it.

    Args:
        norms: each record's L2 norm over all parameters together, (records,), float64; never less than the true one.
        max_grad_norm: C; infinite clips nothing.

    Returns:
        The factors, (records,), float32, and which records are usable, (records,). One whose norm is not finite, or too
        large for a factor in float32, is not, and has factor 0; its gradient must be masked, because 0·NaN is NaN.

    >>> factors, usable = clip_factors(torch.tensor([0.5, 4.0, float("nan")], dtype=torch.float64), 1.0)
    >>> [round(float(f), 6) for f in factors], usable.tolist()
    ([1.0, 0.25, 0.0], [True, True, False])
    """
    usable = norms < _LARGEST_NORM  # false for NaN as well
    if not math.isfinite(max_grad_norm):
        return usable.to(torch.float32), usable
    factors = torch.where(usable, (max_grad_norm * CLIP_SLACK / norms).clamp(max=1.0), 0.0)
    return factors.to(torch.float32), usable


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
    factors, usable = clip_factors(torch.sqrt(torch.as_tensor(squares)), max_grad_norm)
    if not bool(usable.all()):
        flat = [torch.where(usable[:, None], g, 0.0) for g in flat]
    return [(factors @ g).reshape(original.shape[1:]) for g, original in zip(flat, gradients, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Learns a quantile of the update norms while training (Andrew et al. 2021, algorithm 1).

    For each client one bit, whether its update's norm is at most C; the bits are summed, shifted by one half, in the
    same Gaussian event as the updates, with `bit_noise` σ_b. Noise on the updates grows so that the pair costs one
    Gaussian of multiplier z: z_Δ = (z⁻² - (2σ_b)⁻²)^(-½).

    Attributes:
        clip_norm: C of the round.
        target_quantile: γ, the share of clients that should not be clipped.
        learning_rate: η of the geometric step.
        bit_noise: σ_b, standard deviation of the noise on the sum of bits.
        expected_cohort: q·N_ref, the public denominator.
    """

    clip_norm: float
    target_quantile: float
    learning_rate: float
    bit_noise: float
    expected_cohort: float

    @classmethod
    def start(
        cls,
        *,
        clip_norm: float,
        noise_multiplier: float,
        expected_cohort: float,
        target_quantile: float = 0.5,
        learning_rate: float = 0.2,
    ) -> AdaptiveClip:
        """The constants of a run: σ_b = max(qN/20, 2z).

        Raises:
            ValueError: so small a cohort that the bits would drown in their noise (σ_b/(qN) > 0.3).
        """
        bit_noise = max(expected_cohort / 20.0, 2.0 * noise_multiplier)
        if bit_noise / expected_cohort > 0.3:
            raise ValueError(
                f"expected a cohort large enough for adaptive clipping, got {expected_cohort:g} clients expected for "
                f"noise_multiplier={noise_multiplier:g}; raise sample_rate, or clip at a fixed norm"
            )
        return cls(
            clip_norm=clip_norm,
            target_quantile=target_quantile,
            learning_rate=learning_rate,
            bit_noise=bit_noise,
            expected_cohort=expected_cohort,
        )

    def update_noise_multiplier(self, noise_multiplier: float) -> float:
        """z_Δ, the multiplier for the updates once the bits have taken their part of z.

        >>> clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=100.0)
        >>> round(clip.update_noise_multiplier(1.0), 4)
        1.005
        """
        if noise_multiplier == 0.0:
            return 0.0
        return float((noise_multiplier**-2 - (2.0 * self.bit_noise) ** -2) ** -0.5)

    def step(self, unclipped: int, replies: int, noise: float) -> AdaptiveClip:
        """The next round's clip, from this round's noised share of clients that were not clipped.

        Args:
            unclipped: bits that were 1.
            replies: bits altogether.
            noise: a draw of standard deviation `bit_noise`.
        """
        shifted = unclipped - replies / 2.0  # Σ(b - ½): one client moves it by at most ½
        share = (shifted + noise) / self.expected_cohort + 0.5
        moved = self.clip_norm * math.exp(-self.learning_rate * (share - self.target_quantile))
        return self.moved_to(moved)

    def moved_to(self, clip_norm: float) -> AdaptiveClip:
        """The same at another norm, within what floats can carry."""
        return replace(self, clip_norm=min(max(clip_norm, _SMALLEST_CLIP), _LARGEST_CLIP))
