"""Parity is plain arithmetic on logits, and never hides a NaN."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from tacit.compression.parity import THRESHOLDS, check_parity, compare

LOGITS = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 0.5], [4.0, 5.0]], dtype=np.float32)


def naive_cosine(a, b):
    total = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        norms = math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y))
        total += dot / norms
    return total / len(a)


def test_equal_logits_are_in_perfect_parity():
    parity = compare(LOGITS, LOGITS.copy())
    assert (parity.top1_agreement, parity.max_abs) == (1.0, 0.0)
    assert parity.cosine == pytest.approx(1.0)
    assert all(parity.passes(label) for label in THRESHOLDS)


def test_one_changed_answer_of_four_is_three_quarters():
    changed = LOGITS.copy()
    changed[2] = [0.5, 1.0]
    parity = compare(LOGITS, changed)
    assert (parity.top1_agreement, parity.max_abs) == (0.75, 0.5)
    assert not parity.passes("static int8 (float I/O)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_even_among_many_right_answers(value):
    reference = np.tile(LOGITS, (1000, 1))
    artifact = reference.copy()
    artifact[1, 0] = value
    parity = compare(reference, artifact)
    assert parity.max_abs == math.inf
    assert parity.top1_agreement == 1.0 - 1 / 4000
    assert parity.cosine == pytest.approx(1.0 - 2 / 4000)
    assert not any(parity.passes(label) for label in THRESHOLDS)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.float32, (5, 3), elements=st.floats(0.125, 8, width=32)),
    hnp.arrays(np.float32, (5, 3), elements=st.floats(-8, -0.125, width=32)),
)
def test_cosine_is_the_mean_over_inputs(a, b):
    mixed = a.copy()
    mixed[:, 1] = b[:, 1]
    assert compare(a, mixed).cosine == pytest.approx(naive_cosine(a, mixed), abs=1e-9)


def test_zero_rows_have_a_cosine_too():
    zero = np.zeros((1, 3), dtype=np.float32)
    assert compare(zero, zero).cosine == 1.0
    assert compare(zero, np.ones((1, 3), dtype=np.float32)).cosine == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        compare(LOGITS, LOGITS[:2])
    with pytest.raises(ValueError, match="one shape"):
        compare(LOGITS[:0], LOGITS[:0])
    with pytest.raises(ValueError, match="reference"):
        compare(np.full_like(LOGITS, np.nan), LOGITS)
    with pytest.raises(ValueError, match="expected a label"):
        compare(LOGITS, LOGITS).passes("int8")


class _Rounded:
    """A runtime that answers with the model's logits, rounded to a grid."""

    def __init__(self, model: nn.Module, step: float) -> None:
        self.model, self.step = model, step

    def predict(self, inputs):
        with torch.no_grad():
            return (torch.round(self.model(torch.from_numpy(inputs)) / self.step) * self.step).numpy()


# Values: there is no class to agree on.

VALUES = np.array([[10.0], [11.0], [12.0], [13.0]], dtype=np.float32)


def test_equal_values_are_in_perfect_parity_whatever_their_shape():
    for reference in (VALUES, np.arange(24, dtype=np.float32).reshape(4, 2, 3)):
        parity = compare(reference, reference.copy(), answers="values")
        assert (parity.top1_agreement, parity.max_abs) == (None, 0.0)
        assert parity.cosine == pytest.approx(1.0)
        assert all(parity.passes(label) for label in THRESHOLDS)


def test_a_difference_of_values_counts_against_the_spread_of_the_model_not_against_their_size():
    """Around a thousand, an offset of three leaves the plain cosine at 1; it must not pass."""
    shifted = compare(VALUES + 1000, VALUES + np.float32(1003), answers="values")
    assert shifted.spread == pytest.approx(np.std(VALUES))
    assert shifted.cosine < 0.4
    assert not any(shifted.passes(label) for label in THRESHOLDS)


def test_the_spread_and_the_cosine_of_values_are_those_of_all_deviations_together():
    reference, artifact = np.random.default_rng(3).normal(size=(2, 7, 2)).astype(np.float32)
    parity = compare(reference, artifact, answers="values")
    flat, other = [], []
    for column in range(2):
        middle = sum(map(float, reference[:, column])) / 7
        flat += [float(value) - middle for value in reference[:, column]]
        other += [float(value) - middle for value in artifact[:, column]]
    dot = sum(a * b for a, b in zip(flat, other, strict=True))
    assert parity.spread == pytest.approx(math.sqrt(sum(a * a for a in flat) / 14))
    assert parity.cosine == pytest.approx(dot / math.hypot(*flat) / math.hypot(*other))
    assert parity.max_abs == pytest.approx(np.abs(reference - artifact).max())


@pytest.mark.parametrize("label", list(THRESHOLDS))
def test_values_that_are_off_by_more_than_their_labels_share_of_the_spread_fail(label):
    reference = np.tile(VALUES, (500, 1))
    for factor, passes in ((1.1, False), (0.9, True)):
        artifact = reference.copy()
        artifact[7] += np.float32(factor * THRESHOLDS[label].difference * reference.std())
        assert compare(reference, artifact, answers="values").passes(label) is passes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails(value):
    artifact = VALUES.copy()
    artifact[2] = value
    parity = compare(VALUES, artifact, answers="values")
    assert (parity.max_abs, parity.cosine) == (math.inf, -1.0)
    assert not any(parity.passes(label) for label in THRESHOLDS)


def test_a_model_that_answers_everybody_alike_passes_only_when_met_exactly():
    alike = np.full((4, 1), 2.0, np.float32)
    assert compare(alike, alike.copy(), answers="values").passes("float32")
    assert not compare(alike, alike + np.float32(1e-6), answers="values").passes("static int8 (float I/O)")


def test_logits_of_more_than_two_axes_are_refused():
    with pytest.raises(ValueError, match="classes"):
        compare(LOGITS[None], LOGITS[None])


def test_check_parity_runs_both_and_leaves_the_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    inputs = np.random.default_rng(0).random((50, 1, 2, 2), dtype=np.float32)
    parity = check_parity(model, _Rounded(model.eval(), 0.01), inputs)
    model.train()
    assert 0.0 < parity.max_abs <= 0.0051
    assert check_parity(model, _Rounded(nn.Sequential(nn.Flatten(), model[2]), 0.01), inputs) == parity
    assert model.training
