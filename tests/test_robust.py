"""Each rule against a few naive lines, against liars, and against what its authors prove about it."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated.folding import Answer, bounded, combined, fairly, mean
from tacit.federated.robust import (
    RULES,
    aggregate,
    bulyan,
    geometric_median,
    krum,
    median,
    multi_krum,
    norm_bounded_mean,
    trimmed_mean,
)
from tacit.federated.stacked import checked_weights, count_clients

SEEDS = st.integers(0, 10**6)


def stack(clients, seed, scale=1.0):
    generator = np.random.default_rng(seed)
    made = {"w": generator.normal(size=(clients, 3, 2)), "b": generator.normal(size=(clients, 4))}
    made["scale"] = generator.normal(size=clients)
    return {name: (array * scale).astype(np.float32) for name, array in made.items()}


def centre_of(stacked, value=0.5):
    return {name: np.full(array.shape[1:], value, np.float32) for name, array in stacked.items()}


def rows(stacked):
    """(clients, coordinates), float64."""
    arrays = [array.reshape(len(array), -1) for array in stacked.values()]
    return np.concatenate(arrays, axis=1).astype(np.float64)


def flat(made):
    return np.concatenate([np.ravel(array) for array in made.values()]).astype(np.float64)


def close(made, expected, **tolerance):
    np.testing.assert_allclose(flat(made), expected, **({"rtol": 1e-6, "atol": 1e-6} | tolerance))


def krum_order(x, f):
    """Clients from the best to the worst of Krum, by plain loops."""
    scores = []
    for i in range(len(x)):
        others = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(len(x)) if j != i)
        scores.append((sum(others[: max(len(x) - f - 2, 1)]), sum(others)))
    return sorted(range(len(x)), key=lambda i: (scores[i], i))


def call(rule, stacked, hostile=1):
    return aggregate(rule, stacked, centre_of(stacked), hostile=hostile, trim=0.2)


@given(st.integers(1, 9), SEEDS)
def test_the_median_is_numpys(clients, seed):
    stacked = stack(clients, seed)
    close(median(stacked), np.median(rows(stacked), axis=0))


@given(st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.49]), SEEDS)
def test_the_trimmed_mean_is_the_mean_of_the_middle_of_a_sorted_list(clients, trim, seed):
    stacked = stack(clients, seed)
    out = int(trim * clients + 1e-9)
    close(trimmed_mean(stacked, trim=trim), [np.mean(sorted(c)[out : clients - out]) for c in rows(stacked).T])


def test_the_share_that_is_trimmed_is_counted_exactly():
    """0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996."""
    values = np.r_[np.zeros(71), np.full(29, 1e6)].astype(np.float32)
    assert trimmed_mean({"w": values}, trim=0.29)["w"] == 0.0


@given(st.integers(5, 12), SEEDS)
def test_krum_is_the_client_with_the_least_sum_of_distances_to_its_closest(clients, seed):
    stacked = stack(clients, seed)
    f = (clients - 3) // 2
    best = krum_order(rows(stacked), f)[0]
    made = krum(stacked, hostile=f)
    assert all(made[name].tobytes() == stacked[name][best].tobytes() for name in stacked)


@given(st.integers(5, 12), st.integers(1, 4), SEEDS)
def test_multi_krum_is_the_mean_of_the_best_of_krum(clients, keep, seed):
    stacked = stack(clients, seed)
    f = min((clients - 3) // 2, clients - 2 - keep)
    if f >= 0:
        best = krum_order(rows(stacked), f)[:keep]
        close(multi_krum(stacked, hostile=f, keep=keep), rows(stacked)[best].mean(axis=0))


@given(st.integers(3, 16), SEEDS)
def test_bulyan_is_krum_again_and_again_and_then_a_mean_around_the_median(clients, seed):
    stacked = stack(clients, seed)
    x, f = rows(stacked), (clients - 3) // 4
    left, chosen = list(range(clients)), []
    while len(chosen) < clients - 2 * f:
        chosen.append(left.pop(krum_order(x[left], f)[0]))
    kept = x[chosen]
    expected = []
    for column in kept.T:
        middle = np.median(column)
        expected.append(np.mean(sorted(column, key=lambda v: (abs(v - middle), v))[: clients - 4 * f]))
    close(bulyan(stacked, hostile=f), expected)


@given(st.integers(3, 12), SEEDS, st.sampled_from([1e-3, 1.0, 1e4]))
def test_unit_vectors_from_the_geometric_median_to_the_clients_cancel(clients, seed, scale):
    """The gradient of the sum of distances, which is zero only at its minimum."""
    stacked = stack(clients, seed, scale)
    away = rows(stacked) - flat(geometric_median(stacked))
    lengths = np.linalg.norm(away, axis=1)
    if lengths.min() > 1e-3 * scale:
        assert np.linalg.norm((away / lengths[:, None]).sum(axis=0)) < 1e-4 * clients


@given(SEEDS)
def test_the_geometric_median_is_where_plain_weiszfeld_steps_end(seed):
    stacked = stack(7, seed)
    x = rows(stacked)
    point = x.mean(axis=0)
    for _ in range(500):
        pulls = 1.0 / np.maximum(np.linalg.norm(x - point, axis=1), 1e-9)
        point = (pulls[:, None] * x).sum(axis=0) / pulls.sum()
    close(geometric_median(stacked), point, atol=1e-4)


def test_the_geometric_median_is_where_more_than_half_of_the_clients_stand():
    stacked = {name: np.repeat(array[:1], 9, axis=0) for name, array in stack(1, 3).items()}
    for name in stacked:
        stacked[name][5:] += 7.0
    close(geometric_median(stacked), rows(stacked)[0])
    close(geometric_median({name: array[:1] for name, array in stacked.items()}), rows(stacked)[0])


@pytest.mark.parametrize("far", [1e3, 1e10, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_liars_far_away_do_not_blur_the_geometric_median(far, first):
    honest = stack(5, 0)
    liars = {name: np.full_like(array[:4], far) for name, array in honest.items()}
    order = (liars, honest) if first else (honest, liars)
    stacked = {name: np.concatenate([part[name] for part in order]) for name in honest}
    point = flat(geometric_median(stacked))
    x = rows(honest)
    assert np.linalg.norm(point - x.mean(axis=0)) < 10 * np.linalg.norm(x - x.mean(axis=0), axis=1).max()
    pulled = (x - point) / np.linalg.norm(x - point, axis=1)[:, None]
    liar = np.full(x.shape[1], 1.0) / math.sqrt(x.shape[1])
    assert np.linalg.norm(pulled.sum(axis=0) + 4 * liar) < 1e-2


@given(st.integers(1, 9), SEEDS, st.floats(0.01, 10.0))
def test_a_bounded_mean_moves_by_the_scaled_steps(clients, seed, bound):
    stacked = stack(clients, seed)
    centre, weights = centre_of(stacked), [1.0 + n for n in range(clients)]
    steps = rows(stacked) - flat(centre)
    norms = np.linalg.norm(steps, axis=1)
    steps *= np.minimum(1.0, bound / norms)[:, None]
    made = norm_bounded_mean(stacked, centre, bound=bound, weights=weights)
    close(made, flat(centre) + np.average(steps, axis=0, weights=weights))
    assert np.linalg.norm(flat(made) - flat(centre)) <= bound + 1e-5


@given(st.integers(1, 9), SEEDS, st.floats(0.01, 10.0))
def test_a_bounded_mean_is_the_same_one_by_one(clients, seed, bound):
    stacked = stack(clients, seed)
    centre = centre_of(stacked)
    answers = [Answer(owner=c, arrays={n: a[c] for n, a in stacked.items()}) for c in range(clients)]
    close(combined(bounded(bound), centre, answers), flat(norm_bounded_mean(stacked, centre, bound=bound)))


@given(st.integers(1, 9), SEEDS)
def test_without_a_bound_the_cohorts_median_norm_is_it(clients, seed):
    stacked = stack(clients, seed)
    centre = centre_of(stacked)
    found = float(np.median(np.linalg.norm(rows(stacked) - flat(centre), axis=1)))
    close(norm_bounded_mean(stacked, centre, bound=None), flat(norm_bounded_mean(stacked, centre, bound=found)))


def test_clients_that_did_not_move_are_not_divided_by_zero():
    centre = centre_of(stack(1, 0))
    stacked = {name: np.stack([array] * 3) for name, array in centre.items()}
    close(norm_bounded_mean(stacked, centre, bound=None), flat(centre))
    close(q_ffl_step(centre, stacked, [0.0] * 3, q=2.0, learning_rate=0.1), flat(centre))


def q_ffl_step(centre, stacked, losses, *, q, learning_rate):
    answers = [
        Answer(owner=owner, arrays={name: array[owner] for name, array in stacked.items()}, loss=loss)
        for owner, loss in enumerate(losses)
    ]
    return combined(fairly(q, learning_rate), centre, answers)


@given(st.integers(1, 6), SEEDS, st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_q_ffl_is_the_papers_formula(clients, seed, q):
    stacked = stack(clients, seed)
    centre, lipschitz = centre_of(stacked), 1 / 0.3
    losses = np.random.default_rng(seed).uniform(0.1, 3.0, clients)
    steps = lipschitz * (flat(centre) - rows(stacked))
    above = sum(f**q * s for f, s in zip(losses, steps, strict=True))
    below = sum(q * f ** (q - 1) * np.sum(s**2) + lipschitz * f**q for f, s in zip(losses, steps, strict=True))
    close(q_ffl_step(centre, stacked, losses.tolist(), q=q, learning_rate=0.3), flat(centre) - above / below)


def test_q_ffl_without_q_is_the_mean_and_a_power_too_large_for_a_float_is_none():
    stacked = stack(4, 0)
    plain = q_ffl_step(centre_of(stacked), stacked, [1.0, 2.0, 3.0, 0.0], q=0.0, learning_rate=0.1)
    close(plain, rows(stacked).mean(axis=0))
    steep = q_ffl_step(centre_of(stacked), stacked, [1e9, 2.0, 3.0, 0.0], q=100.0, learning_rate=0.1)
    assert np.isfinite(flat(steep)).all()


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_the_mean_is_that_of_averaging_bit_for_bit(weights):
    stacked = stack(3, 1)
    made = aggregate("mean", stacked, centre_of(stacked), weights=weights)
    theirs = mean([{name: array[i] for name, array in stacked.items()} for i in range(3)], weights)
    assert [(n, a.tobytes()) for n, a in made.items()] == [(n, a.tobytes()) for n, a in theirs.items()]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_gives_float32_arrays_of_the_models_shapes_and_leaves_its_input_alone(rule):
    stacked, untouched = stack(11, 0), stack(11, 0)
    made = call(rule, stacked)
    assert list(made) == list(stacked)
    for name, array in made.items():
        assert isinstance(array, np.ndarray)
        assert (array.dtype, array.shape) == (np.float32, stacked[name].shape[1:])
        assert stacked[name].tobytes() == untouched[name].tobytes()
    assert [a.tobytes() for a in call(rule, stacked).values()] == [a.tobytes() for a in made.values()]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rule_moves_clients_that_agree(rule):
    stacked = {name: np.repeat(array, 11, axis=0) for name, array in stack(1, 5).items()}
    close(call(rule, stacked), rows(stacked)[0])


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=SEEDS)
@settings(max_examples=20)
def test_the_order_of_the_clients_does_not_decide(rule, seed):
    stacked = stack(11, seed)
    order = np.random.default_rng(seed).permutation(11)
    close(call(rule, {name: array[order] for name, array in stacked.items()}), flat(call(rule, stacked)), atol=1e-5)


@pytest.mark.parametrize("rule", sorted(RULES))
@given(seed=SEEDS)
@settings(max_examples=20)
def test_a_rule_sees_one_model_however_it_is_cut_into_arrays_and_blocks(rule, seed):
    stacked = stack(11, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tacit.federated.stacked._BLOCK", 11 * 3)
        small = flat(call(rule, stacked))
    close(call(rule, {"all": rows(stacked).astype(np.float32)}), small, atol=1e-5)
    close(call(rule, stacked), small, atol=1e-5)


@pytest.mark.parametrize("rule", sorted(RULES - {"mean"}))
@pytest.mark.parametrize("far", [100.0, 1e30])
def test_two_liars_of_eleven_move_the_mean_and_no_other_rule(rule, far):
    stacked = stack(11, 2)
    honest = rows({name: array[2:] for name, array in stacked.items()})
    for array in stacked.values():
        array[:2] = far
    reach = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    away = {r: np.linalg.norm(flat(call(r, stacked, hostile=2)) - honest.mean(axis=0)) for r in (rule, "mean")}
    assert away[rule] < 2 * reach
    assert away["mean"] > 4 * reach


@given(SEEDS)
def test_fewer_liars_than_half_cannot_take_a_median_out_of_the_honest_range(seed):
    stacked = stack(9, seed)
    honest = rows({name: array[4:] for name, array in stacked.items()})
    liars = np.random.default_rng(seed + 1)
    for array in stacked.values():
        array[:4] = liars.choice([-1e20, 0.0, 1e20], size=array[:4].shape)
    for made in (median(stacked), trimmed_mean(stacked, trim=0.45)):
        assert (flat(made) >= honest.min(axis=0) - 1e-6).all()
        assert (flat(made) <= honest.max(axis=0) + 1e-6).all()


def test_a_rule_holds_blocks_and_not_another_copy_of_all_models():
    stacked = {"w": np.random.default_rng(0).normal(size=(20, 500_000)).astype(np.float32)}  # 40 MB
    for rule in sorted(RULES):
        tracemalloc.start()
        call(rule, stacked)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6, rule


@pytest.mark.parametrize(
    ("message", "ask"),
    [
        ("expected at least 7 clients", lambda s: krum(s(6), hostile=2)),
        ("expected at least 7 clients", lambda s: multi_krum(s(6), hostile=2, keep=1)),
        ("expected at least 11 clients", lambda s: bulyan(s(10), hostile=2)),
        ("expected a count of at least 0, got hostile=-1", lambda s: krum(s(6), hostile=-1)),
        ("expected a count of at least 0, got hostile=-1", lambda s: bulyan(s(6), hostile=-1)),
        ("expected from 1 to 4 of 7 clients, got keep=5", lambda s: multi_krum(s(7), hostile=1, keep=5)),
        ("expected from 1 to 4 of 7 clients, got keep=0", lambda s: multi_krum(s(7), hostile=1, keep=0)),
        ("expected a share from 0 to below 0.5, got trim=0.5", lambda s: trimmed_mean(s(6), trim=0.5)),
        ("got trim=nan", lambda s: trimmed_mean(s(6), trim=math.nan)),
        ("got bound=0.0", lambda s: norm_bounded_mean(s(3), centre_of(s(3)), bound=0.0)),
        ("got bound=inf", lambda s: norm_bounded_mean(s(3), centre_of(s(3)), bound=math.inf)),
        ("of the model's names and shapes", lambda s: norm_bounded_mean(s(3), {}, bound=1.0)),
        ("expected one of bulyan, .* got rule='best'", lambda s: aggregate("best", s(3), {})),
        ("expected no weights with rule='median'", lambda s: aggregate("median", s(3), {}, weights=[1.0] * 3)),
        ("expected 3 finite weights", lambda s: aggregate("mean", s(3), {}, weights=[1.0] * 2)),
        ("expected 3 finite weights", lambda s: aggregate("mean", s(3), {}, weights=[1.0, -1.0, 1.0])),
        ("expected arrays of one number of clients", lambda s: median({**s(3), "more": s(4)["w"]})),
        ("expected arrays of one number of clients", lambda s: median({})),
        ("expected at least 1 clients", lambda s: median(s(0))),
        ("a finite loss", lambda s: q_ffl_step(centre_of(s(2)), s(2), [1.0, None], q=1.0, learning_rate=1.0)),
        ("a finite loss", lambda s: q_ffl_step(centre_of(s(2)), s(2), [1.0, -1.0], q=1.0, learning_rate=1.0)),
        ("got q=-1.0", lambda s: q_ffl_step(centre_of(s(1)), s(1), [1.0], q=-1.0, learning_rate=1.0)),
        ("got learning_rate=0.0", lambda s: q_ffl_step(centre_of(s(1)), s(1), [1.0], q=1.0, learning_rate=0.0)),
    ],
)
def test_what_a_rule_cannot_do_is_refused(message, ask):
    with pytest.raises(ValueError, match=message):
        ask(lambda clients: stack(clients, 0))


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_by_every_rule(rule, value):
    stacked = stack(11, 0)
    stacked["b"][3, 1] = value
    with pytest.raises(ValueError, match="expected finite values, got others in 'b'"):
        call(rule, stacked)


def test_weights_that_are_all_zero_are_refused_and_clients_are_counted():
    with pytest.raises(ValueError, match="not all of them 0"):
        checked_weights([0.0, 0.0], 2)
    assert count_clients(stack(4, 0)) == 4
