"""Clipping a whole update, and learning where to clip."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tacit.federated.clipping import AdaptiveClip, clip_update, update_norm
from tacit.federated.noise import SeededGenerator

FLOATS = hnp.arrays(np.float32, st.sampled_from([(), (3,), (2, 2)]), elements=st.floats(-1e6, 1e6, width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=4), st.sampled_from([1e-3, 1.0, 50.0]))
def test_a_clipped_update_is_the_update_scaled_to_at_most_c(arrays: list[np.ndarray], clip_norm: float) -> None:
    update = {str(i): array for i, array in enumerate(arrays)}
    clipped = clip_update(update, clip_norm)
    norm = math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays))  # naive, all arrays together
    assert update_norm(update) == pytest.approx(norm)
    assert math.sqrt(sum(float((a**2).sum()) for a in clipped.values())) <= clip_norm
    factor = min(1.0, clip_norm * (1 - 1e-6) / norm) if norm else 1.0
    for name, array in update.items():
        np.testing.assert_allclose(clipped[name], array.astype(np.float64) * factor, rtol=1e-12)
        assert clipped[name].shape == array.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_contributes_zero(bad: float) -> None:
    clipped = clip_update({"a": np.float32([1.0, bad]), "scale": np.array(2.0, np.float32)}, 1.0)
    assert all((array == 0.0).all() for array in clipped.values())


def test_an_array_of_no_dimension_is_clipped_with_the_rest() -> None:
    assert float(clip_update({"logit_scale": np.array(50.0, np.float32)}, 1.0)["logit_scale"]) <= 1.0


def test_the_pair_of_bits_and_updates_costs_exactly_one_gaussian() -> None:
    """Sensitivities ½ and C, noised with σ_b and z_ΔC: the joint Gaussian has multiplier z."""
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.3, expected_cohort=80.0)
    of_updates = clip.update_noise_multiplier(1.3)
    joint = 1.0 / math.sqrt(of_updates**-2 + (0.5 / clip.bit_noise) ** 2)
    assert joint == pytest.approx(1.3, rel=1e-12)
    assert of_updates > 1.3


def test_one_client_moves_the_shifted_sum_of_bits_by_one_half() -> None:
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=100.0)

    def logarithm(unclipped: int, replies: int) -> float:
        return math.log(clip.step(unclipped, replies, 0.0).clip_norm)

    for bit in (0, 1):
        moved = abs(logarithm(40 + bit, 91) - logarithm(40, 90))
        assert moved == pytest.approx(clip.learning_rate * 0.5 / clip.expected_cohort)


@pytest.mark.parametrize("median", [20.0, 0.01])
def test_it_finds_the_median_norm_within_60_rounds(median: float) -> None:
    """Log-normal norms, cohorts of about 50 of 500, from C = 1."""
    randomness = SeededGenerator(7)
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=50.0)
    for _ in range(60):
        cohort = int(randomness.bernoulli(500, 0.1).sum())
        norms = median * np.exp(randomness.gaussian(cohort, 0.3))
        unclipped = int((norms <= clip.clip_norm).sum())
        clip = clip.step(unclipped, cohort, float(randomness.gaussian(1, clip.bit_noise)[0]))
    assert abs(clip.clip_norm / median - 1.0) < 0.2


def test_the_wrong_sign_would_run_away_from_the_median() -> None:
    """The negative control: counting clipped clients instead of unclipped ones, as Flower 1.41 does."""
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=50.0)
    for _ in range(60):
        clipped = int(clip.clip_norm < 20.0) * 50
        clip = clip.step(clipped, 50, 0.0)
    assert clip.clip_norm < 0.1


def test_a_cohort_too_small_for_its_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="cohort large enough"):
        AdaptiveClip.start(clip_norm=1.0, noise_multiplier=2.0, expected_cohort=10.0)
