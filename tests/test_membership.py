"""The membership attack against oracles, on a model that leaks and on one that cannot."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated.membership import (
    allowed_hit_rate,
    confidences,
    judge_attack,
    lira_scores,
    shadow_halves,
)

# Confidences.


@given(
    st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=1, max_size=5),
    st.data(),
)
def test_a_confidence_is_the_log_odds_of_the_softmax(logits, data):
    labels = np.array([data.draw(st.integers(0, 3)) for _ in logits])
    for row, label, found in zip(logits, labels, confidences(np.array(logits), labels), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        assert found == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-6, abs=1e-6)


def test_a_confidence_survives_logits_whose_softmax_is_exactly_one():
    logits = np.float32([[500.0, 0.0, 0.0], [-500.0, 0.0, 1.0]])
    found = confidences(logits, np.array([0, 0]))
    assert found[0] == pytest.approx(500.0 - math.log(2.0))
    assert found[1] < -500.0


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 4)])
def test_logits_that_do_not_fit_the_labels_are_refused(shape):
    with pytest.raises(ValueError, match="expected logits of shape"):
        confidences(np.zeros(shape), np.array([0, 0, 0]))


# Shadows.


@pytest.mark.parametrize("shadows", [2, 4, 8])
def test_every_record_is_in_half_of_the_shadows_and_every_shadow_has_about_half_of_the_records(shadows):
    halves = shadow_halves(501, shadows, seed=3)
    assert (halves.sum(axis=0) == shadows // 2).all()
    assert abs(halves.mean(axis=1) - 0.5).max() < 0.12
    assert (halves == shadow_halves(501, shadows, seed=3)).all()
    assert not (halves == shadow_halves(501, shadows, seed=4)).all()


def test_a_score_compares_with_the_shadows_that_have_not_seen_the_record():
    target = np.array([5.0, 5.0])
    shadows = np.array([[1.0, 9.0], [3.0, 9.0], [100.0, 4.0], [100.0, 6.0]])
    seen = np.array([[False, True], [False, True], [True, False], [True, False]])
    # Means 2 and 5; residuals -1, 1, -1, 1 with one degree of freedom for each record: spread √2.
    np.testing.assert_allclose(lira_scores(target, shadows, seen), [3.0 / math.sqrt(2.0), 0.0])


def test_without_shadows_the_score_is_the_confidence():
    target = np.array([1.0, -2.0])
    assert lira_scores(target, np.zeros((0, 2)), np.zeros((0, 2), dtype=bool)).tolist() == [1.0, -2.0]


def test_a_record_that_every_shadow_has_seen_is_compared_with_all_of_them():
    found = lira_scores(np.array([4.0]), np.array([[1.0], [3.0]]), np.ones((2, 1), dtype=bool))
    assert found.tolist() == [2.0]


# Judging.


def naive_area(inside, outside):
    return np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside])


def naive_delong(inside, outside):
    """The variance by its definition, with the placement values written out."""
    v10 = [np.mean([(a > b) + 0.5 * (a == b) for b in outside]) for a in inside]
    v01 = [np.mean([(a > b) + 0.5 * (a == b) for a in inside]) for b in outside]
    return np.var(v10, ddof=1) / len(inside) + np.var(v01, ddof=1) / len(outside)


@settings(deadline=None)  # the first call imports SciPy's statistics
@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_the_area_and_its_interval_are_those_of_the_definition(seed, decimals):
    generator = np.random.default_rng(seed)
    inside, outside = np.round(generator.normal(0.5, 1, 30), decimals), np.round(generator.normal(0, 1, 20), decimals)
    attack = judge_attack(np.concatenate([inside, outside]), np.arange(50) < 30)
    assert attack.auc == pytest.approx(naive_area(inside, outside))
    half = 1.959964 * math.sqrt(naive_delong(inside, outside))
    assert attack.auc_interval[0] == pytest.approx(max(0.0, attack.auc - half))
    assert attack.auc_interval[1] == pytest.approx(min(1.0, attack.auc + half))


def test_the_interval_of_the_area_covers_it_as_often_as_it_says():
    generator, truth, covered = np.random.default_rng(1), 0.5 * math.erfc(-0.5), 0  # Φ(1/√2)
    for _ in range(400):
        scores = np.concatenate([generator.normal(1, 1, 60), generator.normal(0, 1, 40)])
        low, high = judge_attack(scores, np.arange(100) < 60).auc_interval
        covered += low <= truth <= high
    assert 0.90 < covered / 400 < 0.99


def test_the_hit_rate_is_taken_where_ten_false_positives_are_expected():
    scores = np.concatenate([np.array([9.5, 8.5, 0.5]), np.arange(0.0, 100.0) / 10.0])
    attack = judge_attack(scores, np.arange(103) < 3)
    assert attack.false_rate == 0.1
    assert attack.hit_rate == pytest.approx(1 / 3)  # only 9.5 lies above the eleventh highest of the others, 8.9
    assert attack.hit_interval[0] < 1 / 3 < attack.hit_interval[1]


def test_the_curve_is_monotone_short_and_ends_in_its_corners():
    generator = np.random.default_rng(2)
    attack = judge_attack(
        np.concatenate([generator.normal(1, 1, 900), generator.normal(0, 1, 700)]), np.arange(1600) < 900
    )
    assert attack.curve[-1] == (1.0, 1.0)
    assert attack.curve[0][0] == 0.0
    assert len(attack.curve) <= 64
    assert all(a <= b for a, b in zip(attack.curve, attack.curve[1:], strict=False))
    assert [y for _, y in attack.curve] == sorted(y for _, y in attack.curve)


def test_the_advantage_of_a_guess_stays_below_chance_as_often_as_it_says():
    generator, above = np.random.default_rng(3), 0
    for _ in range(300):
        attack = judge_attack(generator.standard_normal(300), np.arange(300) < 150)
        above += attack.advantage > attack.chance
    assert above / 300 < 0.08


def test_too_few_records_are_refused():
    with pytest.raises(ValueError, match="expected 2 members and 11 others, got 5 and 10"):
        judge_attack(np.zeros(15), np.arange(15) < 5)


@given(st.floats(0, 1), st.floats(0, 12), st.floats(0, 0.1))
def test_what_a_guarantee_allows_is_what_both_of_its_inequalities_leave(false_rate, epsilon, delta):
    allowed = allowed_hit_rate(false_rate, epsilon=epsilon, delta=delta)
    assert 0.0 <= allowed <= 1.0
    assert allowed <= math.exp(epsilon) * false_rate + delta + 1e-9
    assert 1.0 - false_rate <= math.exp(epsilon) * (1.0 - allowed) + delta + 1e-9
    more = min(1.0, allowed + 1e-6)
    if allowed < 1.0:  # nothing above it satisfies both
        broken = more > math.exp(epsilon) * false_rate + delta - 1e-9
        assert broken or 1.0 - false_rate > math.exp(epsilon) * (1.0 - more) + delta - 1e-9


def test_randomised_response_is_just_what_its_guarantee_allows():
    truth = 1.0 / (1.0 + math.exp(-2.0))
    assert allowed_hit_rate(1.0 - truth, epsilon=2.0, delta=0.0) == pytest.approx(truth)


# Real models.


def _blobs(generator, count):
    labels = generator.integers(0, 2, count)
    inputs = generator.standard_normal((count, 20)) + 0.6 * (2 * labels[:, None] - 1) * np.eye(20)[0]
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)


def _trained(inputs, labels, seed, steps=150):
    """An unregularised network, trained until it knows its records by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def _asked(model, inputs, labels):
    with torch.no_grad():
        return confidences(model(inputs).numpy(), labels.numpy())


@pytest.fixture(scope="module")
def attacked():
    """A pool of 160 records, a target trained on half of it, and four shadows on other halves."""
    inputs, labels = _blobs(np.random.default_rng(6), 160)
    member = np.arange(160) < 80
    seen = shadow_halves(160, 4, seed=1)
    shadows = np.array(
        [_asked(_trained(inputs[half], labels[half], 10 + i), inputs, labels) for i, half in enumerate(seen)]
    )
    return inputs, labels, member, seen, shadows


def test_a_model_that_knows_its_records_by_heart_is_found_out(attacked):
    inputs, labels, member, seen, shadows = attacked
    target = _asked(_trained(inputs[member], labels[member], 1), inputs, labels)
    attack = judge_attack(lira_scores(target, shadows, seen), member)
    assert attack.auc_interval[0] > 0.7
    assert attack.hit_rate > 3 * attack.false_rate
    assert attack.advantage > attack.chance


def test_a_model_that_has_seen_none_of_the_records_tells_nothing(attacked):
    inputs, labels, member, seen, shadows = attacked
    others, their_labels = _blobs(np.random.default_rng(7), 80)
    target = _asked(_trained(others, their_labels, 1), inputs, labels)
    attack = judge_attack(lira_scores(target, shadows, seen), member)
    assert attack.auc_interval[0] < 0.5 < attack.auc_interval[1]
    assert attack.advantage < attack.chance


def test_shadows_take_away_that_some_records_are_easier_than_others():
    generator = np.random.default_rng(8)
    member, easy = np.arange(400) < 200, 5.0 * generator.standard_normal(400)
    target = easy + generator.standard_normal(400) + 2.0 * member
    seen = shadow_halves(400, 8, seed=1)
    shadows = easy + generator.standard_normal((8, 400)) + 2.0 * seen
    assert judge_attack(target, member).auc < 0.7
    assert judge_attack(lira_scores(target, shadows, seen), member).auc > 0.85


def test_a_rounded_copy_of_a_model_leaks_as_the_model_does(attacked):
    """As an artifact does: coarser weights, the same records by heart."""
    inputs, labels, member, seen, shadows = attacked
    model = _trained(inputs[member], labels[member], 1)
    exact = judge_attack(lira_scores(_asked(model, inputs, labels), shadows, seen), member)
    with torch.no_grad():
        for parameter in model.parameters():
            step = parameter.abs().max() / 127
            parameter.copy_((parameter / step).round() * step)
    rounded = judge_attack(lira_scores(_asked(model, inputs, labels), shadows, seen), member)
    assert rounded.auc == pytest.approx(exact.auc, abs=0.02)
