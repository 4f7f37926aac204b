"""Secure noise: a keystream that nobody can replay, and sums that are whole numbers whatever is done to them."""

import copy
import ctypes
import json
import math
import os
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from tacit.federated.clipping import clipped_sum
from tacit.federated.secure_noise import (
    SecureGenerator,
    _clipped,
    clipped_grid_sum,
    grid_step,
    secure_noisy_sum,
    to_grid,
)

SLACK = 1.0 - 1e-6
BLOCK = 2**16  # values that the generator makes at once
ALARM = 6.11  # standard deviations; a correct sampler exceeds it with probability 1e-9

# RFC 8439, appendix A.1: key, blocks to skip, the next block. The nonce is zero.
RFC_8439 = [
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30),
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


class FixedWords(SecureGenerator):
    """The sampler over words of our choice, to reach its corners."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def _words(self, count):
        return np.full(count, self.word, dtype="<u8")


def draw(generator, count=8):
    return generator.gaussian(count, 1.0).tolist()


def drawn_in_a_child(generator, fork=os.fork, before=lambda: None):
    read, write = os.pipe()
    child = fork()
    if child == 0:
        before()
        os.write(write, json.dumps(draw(generator)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return json.load(pipe)


def noise(size, generator=None, **changed):
    settings_ = {"clip_norm": 1.0, "noise_multiplier": 1.0, **changed}
    return secure_noisy_sum([], size=size, generator=generator or SecureGenerator(), **settings_)


# --- the keystream


@pytest.mark.parametrize(("key", "skipped", "block"), RFC_8439)
def test_the_keystream_is_chacha20_of_rfc_8439(key, skipped, block):
    generator = SecureGenerator._with_known_key(key)
    for _ in range(skipped):
        generator._words(8)
    assert generator._words(8).tobytes().hex() == block


def test_gaussians_are_box_and_mullers_formula_over_the_keystream():
    words = np.frombuffer(bytes.fromhex(RFC_8439[0][2]), "<u8").tolist()
    radii = [math.sqrt(-2.0 * math.log((word + 1) / 2**64)) for word in words[:4]]
    turns = [2.0 * math.pi * (word / 2**64) for word in words[4:]]
    expected = [r * math.cos(t) for r, t in zip(radii, turns, strict=True)]
    expected += [r * math.sin(t) for r, t in zip(radii, turns, strict=True)]
    assert SecureGenerator._with_known_key(bytes(32)).gaussian(8, 3.0) == pytest.approx(3.0 * np.array(expected))


def test_coins_compare_a_word_of_the_keystream_with_the_probability():
    words = np.frombuffer(bytes.fromhex(RFC_8439[0][2]), "<u8").tolist()
    coins = SecureGenerator._with_known_key(bytes(32)).bernoulli(8, 0.7)
    assert coins.tolist() == [Fraction(word, 2**64) < Fraction(0.7) for word in words]
    assert 0 < coins.sum() < 8


@pytest.mark.parametrize("count", [0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_any_count_is_drawn_and_no_part_of_it_repeats(count):
    generator = SecureGenerator()
    values = generator.gaussian(count, 1.0)
    assert values.shape == (count,)
    assert len(np.unique(values)) == count
    assert generator.bernoulli(count, 0.5).shape == (count,)


def test_a_key_is_replaced_before_its_counter_could_wrap():
    generator = SecureGenerator._with_known_key(bytes(32))
    generator._left_bytes = 64
    first, second = (generator._words(8).tobytes().hex() for _ in range(2))
    assert first == RFC_8439[0][2]
    assert second != RFC_8439[1][2]
    assert generator._left_bytes > 2**32


# --- nobody else draws the same


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_fork_does_not_repeat_its_parents_noise_nor_its_siblings():
    generator = SecureGenerator()
    draw(generator)  # keyed before the fork: the state is inherited
    streams = [*(drawn_in_a_child(generator) for _ in range(3)), draw(generator)]
    values = [value for stream in streams for value in stream]
    assert len(set(values)) == len(values) == 32


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_child_with_its_parents_process_id_still_has_another_key():
    generator = SecureGenerator._with_known_key(bytes(32))

    def take_the_parents_identity():
        generator._process = os.getpid()

    child = drawn_in_a_child(generator, before=take_the_parents_identity)
    assert not set(child) & set(draw(generator))


def test_a_fork_behind_pythons_back_is_noticed_by_its_process_id():
    """The C library's fork runs none of Python's hooks."""
    generator = SecureGenerator._with_known_key(bytes(32))
    child = drawn_in_a_child(generator, fork=ctypes.PyDLL(None).fork)
    assert not set(child) & set(draw(generator))


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_the_control_without_both_fences_the_child_repeats_its_parent():
    generator = SecureGenerator._with_known_key(bytes(32))
    stream = generator._stream

    def climb_back():
        generator._stream, generator._process = stream, os.getpid()

    assert drawn_in_a_child(generator, before=climb_back) == draw(generator)


def test_instances_share_nothing():
    values = [value for _ in range(50) for value in draw(SecureGenerator())]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_secure_generator_cannot_be_copied(take, keyed):
    generator = SecureGenerator()
    if keyed:
        draw(generator)
    with pytest.raises(TypeError, match="stays in its process"):
        take(generator)


def test_global_seeds_do_not_reach_it_and_it_leaves_them_alone():
    def seeded():
        random.seed(1)
        np.random.seed(1)  # the global generator is the one in question
        torch.manual_seed(1)
        return draw(SecureGenerator())

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    draw(SecureGenerator())
    assert states() == before
    assert not set(seeded()) & set(seeded())


# --- distributions


def variance_score(values, standard_deviation):
    return (np.mean((values / standard_deviation) ** 2) - 1.0) * math.sqrt(len(values) / 2.0)


@pytest.mark.parametrize("clip_norm", [1.0, 0.37, 1e-20])
def test_noise_has_the_variance_claimed_and_neither_two_thirds_nor_three_halves_of_sigma(clip_norm):
    values = noise(1_000_000, clip_norm=clip_norm, noise_multiplier=1.3)
    sigma = 1.3 * clip_norm
    assert abs(variance_score(values, sigma)) < ALARM
    assert abs(np.mean(values) / sigma) < ALARM / math.sqrt(len(values))
    assert abs(variance_score(values, sigma * 2 / 3)) > ALARM
    assert abs(variance_score(values, sigma * 3 / 2)) > ALARM


@pytest.mark.parametrize("make", [lambda n: SecureGenerator().gaussian(n, 2.5), lambda n: noise(n) * 2.5])
def test_noise_is_normal_and_is_not_taken_for_a_wider_normal(make):
    values = make(200_000)
    assert stats.kstest(values / 2.5, "norm").pvalue > 1e-9
    assert stats.kstest(values / 2.5 * 1.1, "norm").pvalue < 1e-9


def test_the_two_values_of_a_pair_are_independent_in_sign_and_in_size():
    values = SecureGenerator().gaussian(8 * BLOCK, 1.0).reshape(-1, 2, BLOCK // 2)
    cosines, sines = values[:, 0].ravel(), values[:, 1].ravel()
    limit = ALARM / math.sqrt(len(cosines))
    assert abs(np.corrcoef(cosines, sines)[0, 1]) < limit
    assert abs(np.corrcoef(cosines**2, sines**2)[0, 1]) < limit
    assert abs(np.corrcoef(values[0, 0], values[1, 0])[0, 1]) < ALARM / math.sqrt(BLOCK // 2)


def test_values_hardly_ever_repeat():
    assert len(np.unique(SecureGenerator().gaussian(1_000_000, 1.0))) > 999_990
    assert len(np.unique(noise(1_000_000))) > 999_000  # on the grid 131 repetitions are expected


def test_the_largest_value_is_9_42_sigma_and_no_word_gives_an_infinite_one():
    assert FixedWords(0).gaussian(2, 1.0).tolist() == [pytest.approx(9.4192, abs=1e-4), 0.0]
    assert FixedWords(2**64 - 1).gaussian(2, 1.0).tolist() == [0.0, 0.0]


def test_coins_have_their_probability():
    generator = SecureGenerator()
    ones = int(generator.bernoulli(200_000, 0.1).sum())
    assert stats.binomtest(ones, 200_000, 0.1).pvalue > 1e-9
    assert stats.binomtest(ones, 200_000, 0.11).pvalue < 1e-9
    assert generator.bernoulli(BLOCK + 9, 1.0).all()
    assert not generator.bernoulli(BLOCK + 9, 0.0).any()


def test_a_probability_is_never_rounded_up():
    assert FixedWords(0).bernoulli(1, 2.0**-64).tolist() == [True]
    assert FixedWords(0).bernoulli(1, 2.0**-65).tolist() == [False]


# --- the grid


@pytest.mark.parametrize(
    ("clip_norm", "exponent"),
    [(1.0, -30), (math.nextafter(1.0, 0.0), -31), (2.0, -29), (3.9, -29), (0.3, -32), (2.0**-200, -230)],
)
def test_the_step_is_the_power_of_two_thirty_below_the_bound(clip_norm, exponent):
    assert grid_step(clip_norm) == 2.0**exponent


CLIP_NORMS = st.floats(1e-100, 1e100) | st.floats(0.01, 10.0) | st.integers(-300, 300).map(lambda e: 2.0**e)
RECORDS = arrays.arrays(np.float64, st.tuples(st.integers(0, 6), st.integers(0, 5)), elements=st.floats(width=64))


@given(RECORDS, CLIP_NORMS)
@settings(deadline=None, max_examples=400)
def test_a_record_on_the_grid_is_never_longer_than_the_bound_nor_than_itself(records, clip_norm):
    step = Fraction(grid_step(clip_norm))
    assert 2**30 <= Fraction(clip_norm) / step < 2**31
    for record in records:
        whole = clipped_grid_sum([record[None]], size=len(record), clip_norm=clip_norm).tolist()
        assert sum(value**2 for value in whole) * step**2 <= Fraction(clip_norm) ** 2
        for value, original in zip(whole, record.tolist(), strict=True):
            assert not value or abs(value) * step <= abs(Fraction(original))
            assert value * original >= 0 or not value


@given(RECORDS, st.floats(0.01, 10.0))
@settings(deadline=None, max_examples=200)
def test_records_within_the_bound_are_truncated_toward_zero_and_others_are_refused(records, clip_norm):
    with np.errstate(over="ignore", invalid="ignore"):
        fits = np.all(np.sqrt(np.square(records).sum(axis=1)) <= clip_norm)
    if not fits:
        with pytest.raises(ValueError, match="clip them first"):
            to_grid(records, clip_norm)
        return
    step = Fraction(grid_step(clip_norm))
    expected = [[math.trunc(Fraction(value) / step) for value in record] for record in records.tolist()]
    assert to_grid(records, clip_norm).tolist() == expected


def oracle(records, clip_norm):
    """One record after the other, in whole numbers; the squares of its inputs have to be exact in float64."""
    step, total = Fraction(grid_step(clip_norm)), [0] * len(records[0])
    for record in records:
        norm = math.sqrt(sum(Fraction(value) ** 2 for value in record))
        factor = min(1.0, clip_norm * SLACK / norm) if norm else 1.0
        for place, value in enumerate(record):
            total[place] += math.trunc(Fraction(value * factor) / step)
    return total


@given(
    st.integers(1, 5).flatmap(
        lambda d: st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=d, max_size=d), min_size=1, max_size=8)
    ),
    st.integers(-30, 10),
    st.floats(0.01, 10.0),
)
@settings(deadline=None, max_examples=300)
def test_the_sum_is_that_of_a_naive_loop_over_fractions(whole, exponent, clip_norm):
    records = [[math.ldexp(value, exponent) for value in record] for record in whole]
    expected = oracle(records, clip_norm)
    for chunk in (np.array(records), np.array(records, dtype=np.float32), torch.tensor(records)):
        assert clipped_grid_sum([chunk], size=len(records[0]), clip_norm=clip_norm).tolist() == expected


def gradients(records, size, seed=1):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(records, size)) * generator.lognormal(0.0, 3.0, size=(records, 1))


@pytest.mark.parametrize("size", [1, 7, 300, 140_000])  # the last is more than is worked on at once
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_grouping_order_and_memory_layout_change_nothing(size, kind):
    records = gradients(9, size).astype(kind)
    expected = sum(clipped_grid_sum([record[None]], size=size, clip_norm=1.5) for record in records)
    shuffled = np.random.default_rng(2).permutation(records)
    groupings = [
        [records],
        [shuffled],
        [records[:4], records[4:4], records[4:]],
        [records[::2], records[1::2]],
        [np.asfortranarray(records)],
        [torch.from_numpy(records).requires_grad_()],
        [torch.from_numpy(records).T.contiguous().T],
    ]
    for chunks in groupings:
        assert np.array_equal(clipped_grid_sum(chunks, size=size, clip_norm=1.5), expected)


@pytest.mark.parametrize("size", [1, 5, 9, 300])
def test_a_record_is_clipped_to_the_same_bits_whoever_its_neighbours_are(size):
    """Truncation hides a norm's last digit from all but one value in four million."""
    records = gradients(100, size)
    alone = np.concatenate([_clipped(record[None], 1.5) for record in records])
    for neighbours in (records, np.asfortranarray(records), np.repeat(records, 2, axis=1)[:, ::2]):
        assert np.array_equal(_clipped(neighbours, 1.5), alone)


def test_the_control_float_sums_do_depend_on_the_order():
    records = torch.from_numpy(gradients(500, 20).astype(np.float32))
    sums = {tuple(clipped_sum([records[torch.randperm(500)]], 1.5)[0].tolist()) for _ in range(5)}
    assert len(sums) > 1


def test_removing_a_record_moves_the_sum_by_exactly_its_own_vector():
    records, clip_norm = gradients(40, 30), 0.7
    whole = clipped_grid_sum([records], size=30, clip_norm=clip_norm)
    for index in range(40):
        rest = clipped_grid_sum([np.delete(records, index, axis=0)], size=30, clip_norm=clip_norm)
        own = clipped_grid_sum([records[index : index + 1]], size=30, clip_norm=clip_norm)
        assert np.array_equal(whole - rest, own)
        assert sum(value**2 for value in own.tolist()) * Fraction(grid_step(clip_norm)) ** 2 <= Fraction(clip_norm) ** 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_a_record_that_is_not_finite_or_overflows_contributes_nothing(bad):
    records = gradients(5, 4)
    expected = clipped_grid_sum([np.delete(records, 2, axis=0)], size=4, clip_norm=1.0)
    records[2, 1] = bad
    assert np.array_equal(clipped_grid_sum([records], size=4, clip_norm=1.0), expected)
    assert not clipped_grid_sum([records[2:3]], size=4, clip_norm=1.0).any()


def test_a_single_number_per_record_is_clipped_too():
    """A parameter of no dimension, flattened, is one column."""
    total = clipped_grid_sum([np.array([[1e9], [-1e9], [1e9]])], size=1, clip_norm=2.0)
    assert total.tolist() == [math.trunc(2.0 * SLACK * 2**29)]


# --- sum and noise


def test_noise_added_before_or_after_rounding_is_the_same_so_rounding_is_post_processing():
    records, size, clip_norm = gradients(20, 200), 200, 0.9
    step = Fraction(grid_step(clip_norm))
    total = clipped_grid_sum([records], size=size, clip_norm=clip_norm)
    continuous = SecureGenerator._with_known_key(bytes(32)).gaussian(size, 1.7 * clip_norm).tolist()
    rounded = [round(s + Fraction(z) / step) * step for s, z in zip(total.tolist(), continuous, strict=True)]
    known = SecureGenerator._with_known_key(bytes(32))
    noisy = secure_noisy_sum([records], size=size, clip_norm=clip_norm, noise_multiplier=1.7, generator=known)
    assert noisy.dtype == np.float64
    assert [Fraction(value) for value in noisy.tolist()] == rounded


@pytest.mark.parametrize("clip_norm", [1.0, 0.3, 1e-90, 1e90])
def test_every_result_is_on_the_grid_and_plain_noise_is_not(clip_norm):
    records = gradients(20, 1000) * clip_norm
    step = grid_step(clip_norm)
    generator = SecureGenerator()
    noisy = secure_noisy_sum([records], size=1000, clip_norm=clip_norm, noise_multiplier=1.1, generator=generator)
    assert not np.any(noisy / step % 1.0)
    assert len(set((noisy / step % 2.0).tolist())) == 2  # and on no coarser one
    assert np.mean(generator.gaussian(1000, clip_norm) / step % 1.0 != 0.0) > 0.99


@pytest.mark.parametrize("chunks", [[], [np.zeros((0, 6))], [torch.zeros(0, 6)]])
def test_an_empty_batch_releases_noise(chunks):
    noisy = secure_noisy_sum(chunks, size=6, clip_norm=1.0, noise_multiplier=1.0, generator=SecureGenerator())
    assert noisy.shape == (6,)
    assert len(set(noisy.tolist())) == 6


@pytest.mark.parametrize("clip_norm", [1e-100, math.nextafter(2.0, 0.0), 1e100])
def test_the_largest_sum_and_the_largest_noise_fit_their_integers(clip_norm):
    step = grid_step(clip_norm)
    record = np.array([[clip_norm * 1e3]])
    assert int(clipped_grid_sum([record], size=1, clip_norm=clip_norm)[0]) * (2**31 - 1) < 2**62
    noisy = noise(1, FixedWords(0), clip_norm=clip_norm, noise_multiplier=2.0**18)
    assert 2**50 < noisy[0] / step < 2**53


def test_more_records_than_the_integers_hold_are_refused():
    assert clipped_grid_sum([np.empty((2**18, 0))], size=0, clip_norm=1.0).shape == (0,)
    with pytest.raises(ValueError, match="at most 2147483647 records"):
        clipped_grid_sum([np.empty((5, 0)), np.empty((2**31 - 5, 0))], size=0, clip_norm=1.0)


@pytest.mark.parametrize("chunk", [np.zeros(3), np.zeros((2, 4)), np.zeros((2, 3), int), torch.zeros(2, 3).half()])
def test_chunks_of_another_shape_or_type_are_refused(chunk):
    with pytest.raises(ValueError, match=r"expected float32 or float64 of shape \(records, 3\)"):
        clipped_grid_sum([chunk], size=3, clip_norm=1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf, 1e-101, 1e101])
def test_a_bound_outside_its_range_is_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm"):
        noise(1, clip_norm=clip_norm)


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, math.nan, math.inf, 2.0**18 + 1])
def test_a_noise_multiplier_outside_its_range_is_refused(noise_multiplier):
    with pytest.raises(ValueError, match="noise_multiplier"):
        noise(1, noise_multiplier=noise_multiplier)


@pytest.mark.parametrize("arguments", [(-1, 0.5), (3, -0.1), (3, 1.1), (3, math.nan)])
def test_impossible_coins_are_refused(arguments):
    with pytest.raises(ValueError, match="probability"):
        SecureGenerator().bernoulli(*arguments)


@pytest.mark.parametrize("arguments", [(-1, 1.0), (3, -1.0), (3, math.nan), (3, math.inf)])
def test_impossible_gaussians_are_refused(arguments):
    with pytest.raises(ValueError, match="standard_deviation"):
        SecureGenerator().gaussian(*arguments)
