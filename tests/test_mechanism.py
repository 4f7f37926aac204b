"""Sampler, clip and noise against naive versions; each statistical test alarms below p = 1e-9 and has a control."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tacit.federated import mechanism as module
from tacit.federated.accounting import reported_epsilon
from tacit.federated.clipping import clipped_sum
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.mixing import refuse_mixing_layers
from tacit.federated.noise import SecretGenerator, SeededGenerator

SIX_SIGMA = 6.5  # p = 8e-11, two-sided
SHAPES = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]), min_size=1, max_size=3)
ODD = st.sampled_from([0.0, 1.0, -2.5, 1e-30, 1e30, -1e38, math.nan, math.inf, -math.inf])
ANY_COUNT = st.integers(0, 6)
VALUES = st.one_of(ODD, st.floats(-5, 5, width=32))


def make(**changed):
    settings = {
        "unit": "record",
        "sample_rate": 0.1,
        "max_grad_norm": 1.5,
        "noise_multiplier": 0.8,
        "steps_per_round": 2,
        "rounds": 3,
        "reference_size": 40,
        "delta": 1e-5,
    }
    return Mechanism(**{**settings, **changed})


@st.composite
def per_record_gradients(draw, records=ANY_COUNT):
    count, shapes = draw(records), draw(SHAPES)
    return [_tensor(draw, (count, *shape)) for shape in shapes]


def _tensor(draw, shape):
    values = draw(st.lists(VALUES, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def naive_sum(gradients, bound):
    """Record by record, in float64: scale to the bound, leave out what is not finite or beyond 1e30."""
    total = [np.zeros(g.shape[1:]) for g in gradients]
    for record in range(gradients[0].shape[0]):
        parts = [g[record].numpy().astype(np.float64) for g in gradients]
        norm = math.sqrt(sum(float((part**2).sum()) for part in parts))
        if math.isfinite(norm) and norm < 1e30:
            factor = 1.0 if norm <= bound * (1 - 1e-6) else bound * (1 - 1e-6) / norm
            total = [t + factor * part for t, part in zip(total, parts, strict=True)]
    return total


def norm_of(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


@given(per_record_gradients(), st.sampled_from([1e-3, 1.0, 1.5, 100.0]))
def test_clipped_sum_is_the_naive_sum_over_records(gradients, bound):
    total = clipped_sum(gradients, bound)
    assert [t.shape for t in total] == [g.shape[1:] for g in gradients]
    for ours, naive in zip(total, naive_sum(gradients, bound), strict=True):
        np.testing.assert_allclose(ours.numpy(), naive, rtol=1e-5, atol=1e-5 * bound)


@given(per_record_gradients(st.just(1)), st.sampled_from([1e-3, 1.0, 1.5, 100.0]))
def test_the_sum_over_one_record_never_exceeds_the_bound(gradients, bound):
    assert norm_of(clipped_sum(gradients, bound)) <= bound


@given(per_record_gradients(st.integers(1, 6)), st.sampled_from([0.1, 1.5]), st.data())
def test_removing_or_breaking_one_record_moves_the_sum_by_at_most_the_bound(gradients, bound, data):
    record = data.draw(st.integers(0, gradients[0].shape[0] - 1))
    kept = [index for index in range(gradients[0].shape[0]) if index != record]
    before, without = clipped_sum(gradients, bound), clipped_sum([g[kept] for g in gradients], bound)
    broken = [g.clone() for g in gradients]
    broken[0][record] = math.nan
    for after in (without, clipped_sum(broken, bound)):
        assert norm_of([a - b for a, b in zip(before, after, strict=True)]) <= bound * (1 + 1e-5)


def test_a_record_that_is_not_finite_in_one_parameter_contributes_to_none():
    gradients = [torch.ones(3, 2), torch.ones(3)]
    gradients[1][1] = math.inf
    expected = clipped_sum([g[[0, 2]] for g in gradients], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(clipped_sum(gradients, 1.0), expected, strict=True))


def test_the_clip_is_joint_over_all_parameters_and_not_one_for_each():
    weight, bias = clipped_sum([torch.full((1, 4), 10.0), torch.tensor([20.0])], 1.0)  # norms 20 and 20
    np.testing.assert_allclose(weight.numpy(), [0.5 / math.sqrt(2)] * 4, rtol=1e-5)
    np.testing.assert_allclose(bias.numpy(), 1 / math.sqrt(2), rtol=1e-5)


def test_each_record_is_clipped_before_the_sum():
    assert float(clipped_sum([torch.tensor([[10.0], [10.0]])], 1.0)[0]) == pytest.approx(2.0, rel=1e-5)


def test_rounding_does_not_lift_a_clipped_record_over_the_bound():
    gradients = torch.randn(300, 1, 50, generator=torch.Generator().manual_seed(1)) * 10
    assert max(norm_of(clipped_sum([g], 1.0)) for g in gradients) <= 1.0


def test_records_below_the_bound_are_not_touched_and_zero_gradients_stay_zero():
    gradients = [torch.tensor([[0.1, 0.2], [0.0, 0.0], [-0.3, 0.1]])]
    assert torch.allclose(clipped_sum(gradients, 1.0)[0], gradients[0].sum(0), atol=1e-7)
    assert torch.equal(clipped_sum([torch.zeros(5, 3)], 1.0)[0], torch.zeros(3))


def test_an_infinite_bound_sums_unclipped_and_still_leaves_out_what_is_not_finite():
    total = clipped_sum([torch.tensor([[3.0], [4e5], [math.nan]])], math.inf)
    assert float(total[0]) == pytest.approx(400003.0)


def noise_z(mechanism, standard_deviation, count=1_000_000):
    """z-score of the variance of the noise in a step without records, scaled back by the normaliser."""
    shapes = [torch.Size([count - 1]), torch.Size([])]
    pieces = mechanism.noisy_mean([], shapes, SeededGenerator(20))
    noise = torch.cat([piece.reshape(-1) for piece in pieces]).double().numpy() * mechanism.normaliser
    assert noise.shape == (count,)
    assert len(np.unique(noise)) > 0.9 * count
    assert abs(noise.mean()) * math.sqrt(count) / standard_deviation < SIX_SIGMA
    return (noise.var() / standard_deviation**2 - 1) / math.sqrt(2 / count)


def test_an_empty_batch_gives_noise_of_the_declared_deviation_and_the_test_would_see_another():
    mechanism = make()
    sigma = mechanism.noise_multiplier * mechanism.max_grad_norm
    assert abs(noise_z(mechanism, sigma)) < SIX_SIGMA
    assert abs(noise_z(mechanism, sigma * 2 / 3)) > SIX_SIGMA
    assert abs(noise_z(mechanism, sigma * 3 / 2)) > SIX_SIGMA
    assert abs(noise_z(mechanism, sigma * 1.01)) > SIX_SIGMA


def test_noise_does_not_depend_on_the_records_and_the_normaliser_does_not_depend_on_their_number():
    mechanism = make(sample_rate=0.25, reference_size=40)
    assert mechanism.normaliser == 10.0
    gradients = [torch.randn(7, 3, generator=torch.Generator().manual_seed(1))]
    noised = mechanism.noisy_mean([gradients], [torch.Size([3])], SeededGenerator(5))[0]
    empty = mechanism.noisy_mean([], [torch.Size([3])], SeededGenerator(5))[0]
    clipped = clipped_sum(gradients, mechanism.max_grad_norm)[0]
    assert torch.allclose((noised - empty) * 10.0, clipped, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_batch_taken_in_chunks_gives_the_sum_of_one_piece(records, chunk):
    gradients = torch.randn(records, 5, generator=torch.Generator().manual_seed(records))
    mechanism, shapes = make(noise_multiplier=0.0, unit="none"), [torch.Size([5])]
    pieces = [[gradients[start : start + chunk]] for start in range(0, records, chunk)]
    whole = mechanism.noisy_mean([[gradients]], shapes, SeededGenerator(0))[0]
    assert torch.allclose(mechanism.noisy_mean(pieces, shapes, SeededGenerator(0))[0], whole, atol=1e-5)


def test_batches_are_poisson_each_record_by_its_own_coin():
    mechanism, records, draws = make(sample_rate=0.1), 200, 3000
    generator = SeededGenerator(3)
    joined = np.zeros((draws, records), bool)
    for draw in range(draws):
        joined[draw, mechanism.draw_batch(records, generator)] = True
    sizes = joined.sum(1)
    variance = records * 0.1 * 0.9
    assert len(set(sizes.tolist())) > 10
    assert abs(sizes.mean() - 20) / math.sqrt(variance / draws) < SIX_SIGMA
    # A fixed batch size would have no variance at all, one coin for all records 200 times as much.
    assert abs(sizes.var() / variance - 1) / math.sqrt(2 / draws) < SIX_SIGMA
    by_record = (joined.mean(0) - 0.1) / math.sqrt(0.09 / draws)
    assert np.abs(by_record).max() < SIX_SIGMA


def test_batches_may_be_empty_and_with_rate_one_are_everything():
    assert make(sample_rate=1.0).draw_batch(5, SecretGenerator()).tolist() == [0, 1, 2, 3, 4]
    assert make().draw_batch(0, SecretGenerator()).tolist() == []
    assert any(len(make().draw_batch(3, SeededGenerator(seed))) == 0 for seed in range(20))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False, track_running_stats=False), nn.SyncBatchNorm(4)],
)
def test_layers_that_mix_records_are_refused_by_name(layer):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(layer))
    with pytest.raises(PrivacyRefused, match=r"layer\(s\) 1\.0; use GroupNorm"):
        refuse_mixing_layers(model)


def test_a_buffer_that_would_carry_what_it_saw_past_the_noise_is_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_buffer("seen", torch.zeros(1))
    with pytest.raises(PrivacyRefused, match="buffers"):
        refuse_mixing_layers(model)


def test_dropout_is_refused_because_its_randomness_is_not_secret():
    with pytest.raises(PrivacyRefused, match=r"dropout, got layer\(s\) 1"):
        refuse_mixing_layers(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))


def test_layers_that_treat_each_record_alone_are_accepted():
    refuse_mixing_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(3)))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"noise_multiplier": 0.0}, PrivacyRefused),
        ({"noise_multiplier": math.nan}, PrivacyRefused),
        ({"noise_multiplier": -1.0}, PrivacyRefused),
        ({"noise_multiplier": math.inf}, PrivacyRefused),
        ({"max_grad_norm": math.inf}, PrivacyRefused),
        ({"unit": "owner"}, PrivacyRefused),
        ({"unit": "local", "sample_rate": 0.5}, ValueError),
        ({"twin": True}, ValueError),
        ({"max_grad_norm": 0.0}, ValueError),
        ({"max_grad_norm": math.nan}, ValueError),
        ({"sample_rate": 0.0}, ValueError),
        ({"sample_rate": 1.1}, ValueError),
        ({"sample_rate": math.nan}, ValueError),
        ({"steps_per_round": 0}, ValueError),
        ({"rounds": 0}, ValueError),
        ({"reference_size": 0}, ValueError),
        ({"delta": 0.0}, ValueError),
        ({"delta": 1.0}, ValueError),
        ({"delta": math.nan}, ValueError),
        ({"unit": "none"}, ValueError),
    ],
)
def test_a_mechanism_that_promises_nothing_or_nonsense_is_refused(changed, error):
    with pytest.raises(error, match="expected"):
        make(**changed)


def test_a_mechanism_made_for_a_budget_keeps_it_over_all_planned_steps():
    made = make(sample_rate=1.0, rounds=5, steps_per_round=4).calibrated(3.0)
    assert 2.985 < made.planned_epsilon() <= 3.0
    assert made.planned_epsilon() == reported_epsilon({made.event: 20}, 1e-5)
    assert made.planned_epsilon() > replace(made, rounds=1).planned_epsilon()


def test_what_a_ledger_entry_states_holds_no_figure_of_an_owner():
    assert make().describe() == {
        "unit": "record",
        "relation": "add/remove",
        "sampler": "poisson",
        "noise": "gaussian",
        "sample_rate": 0.1,
        "noise_multiplier": 0.8,
        "max_grad_norm": 1.5,
        "steps": 2,
    }


REAL_NOISE, REAL_SUM = module._add_noise, module.clipped_sum


def no_noise(total, standard_deviation, randomness):
    return total


def half_noise(total, standard_deviation, randomness):
    return REAL_NOISE(total, standard_deviation / 2, randomness)


def noise_without_the_bound(total, standard_deviation, randomness):
    return REAL_NOISE(total, standard_deviation / 1.5, randomness)


def clip_per_layer(gradients, bound):
    return [REAL_SUM([g], bound)[0] for g in gradients]


def clip_after_the_sum(gradients, bound):
    return REAL_SUM([g.sum(0, keepdim=True) for g in gradients], bound)


def clip_without_slack(gradients, bound):
    return [t / (1 - 1e-6) for t in REAL_SUM(gradients, bound)]


def zero_times_nan(gradients, bound):
    norms = sum((g.reshape(len(g), -1) ** 2).sum(1) for g in gradients).sqrt()
    factors = torch.where(norms.isfinite(), (bound / norms).clamp(max=1.0), 0.0)
    return [torch.tensordot(factors, g, 1) for g in gradients]


@pytest.mark.parametrize("mutant", [no_noise, half_noise, noise_without_the_bound])
def test_the_noise_test_fails_for_a_mechanism_with_too_little(monkeypatch, mutant):
    monkeypatch.setattr(module, "_add_noise", mutant)
    with pytest.raises(AssertionError):
        test_an_empty_batch_gives_noise_of_the_declared_deviation_and_the_test_would_see_another()


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (clip_per_layer, test_the_clip_is_joint_over_all_parameters_and_not_one_for_each),
        (clip_after_the_sum, test_each_record_is_clipped_before_the_sum),
        (clip_without_slack, test_rounding_does_not_lift_a_clipped_record_over_the_bound),
        (zero_times_nan, test_a_record_that_is_not_finite_in_one_parameter_contributes_to_none),
    ],
)
def test_the_clip_tests_fail_for_a_wrong_clip(monkeypatch, mutant, test):
    monkeypatch.setitem(globals(), "clipped_sum", mutant)
    with pytest.raises(AssertionError):
        test()


def test_the_hardened_mean_is_the_fast_one_on_a_grid():
    """With next to no noise both are the clipped sum over the normaliser, empty batches included."""
    from tacit.federated.secure_noise import SecureGenerator

    generator = torch.Generator().manual_seed(3)
    chunk = [torch.randn(5, 4, 3, generator=generator), torch.randn(5, generator=generator)]
    shapes = [torch.Size([4, 3]), torch.Size([])]
    for chunks in ([chunk], [chunk, chunk], []):
        fast, hard = (
            make(noise_multiplier=1e-7, hardened=hardened).noisy_mean(chunks, shapes, SecureGenerator())
            for hardened in (False, True)
        )
        for a, b in zip(fast, hard, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hardened", [False, True])
def test_every_number_of_every_tensor_has_a_noise_of_its_own(hardened):
    """The draws of a generator with a known seed, each used once, in the order of the parameters."""
    mechanism = make(hardened=hardened)
    chunk = [torch.randn(6, *shape, generator=torch.Generator().manual_seed(3)) for shape in ((3, 2), (), (4,))]
    shapes = [gradient.shape[1:] for gradient in chunk]
    noised = mechanism.noisy_mean([chunk], shapes, SeededGenerator(5))
    clipped = clipped_sum(chunk, mechanism.max_grad_norm)
    found = [(n * mechanism.normaliser - c).reshape(-1) for n, c in zip(noised, clipped, strict=True)]
    drawn = SeededGenerator(5).gaussian(11, mechanism.noise_multiplier * mechanism.max_grad_norm)
    np.testing.assert_allclose(torch.cat(found).numpy(), drawn, atol=1e-5)


class SureCoins:
    """Coins that all fall on the same side, as they may."""

    def bernoulli(self, count, probability):
        return np.ones(count, bool)


def test_a_batch_or_cohort_is_everybody_whose_coin_says_so_however_many_that_are():
    mechanism = make(sample_rate=0.01)
    assert mechanism.draw_batch(500, SureCoins()).tolist() == list(range(500))
    assert mechanism.draw_cohort(range(500), SureCoins()) == list(range(500))
