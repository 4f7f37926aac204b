"""What is sent of an update against a few naive lines; what is not sent comes later; what nobody sends is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tacit.federated.clipping import update_norm
from tacit.federated.update_codec import Int8, TopK, codec_named, wire_bytes

CODECS = [TopK(0.2), TopK(1.0), Int8()]
SEEDS = st.integers(0, 10**6)
LARGEST = float(np.finfo(np.float32).max)
FLOATS = st.floats(-LARGEST, LARGEST, width=32, allow_nan=False)


def update(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    made = {"w": generator.normal(size=(4, 3)), "none": np.zeros((0, 2)), "b": generator.normal(size=5)}
    made["scale"] = generator.normal() * 100.0
    return {name: np.asarray(array * scale, dtype=np.float32) for name, array in made.items()}


def flat(arrays):
    return np.concatenate([np.ravel(array) for array in arrays.values()])


def zeros(like):
    return {name: np.zeros_like(array) for name, array in like.items()}


def same_form(made, like):
    assert list(made) == list(like)
    for name, array in made.items():
        assert isinstance(array, np.ndarray)
        assert (array.dtype, array.shape) == (np.float32, like[name].shape)
        assert np.isfinite(array).all()


@given(SEEDS, st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_top_k_sends_the_largest_of_the_whole_update_as_they_are(seed, fraction):
    sent = update(seed)
    values = flat(sent)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[: math.ceil(fraction * len(values))]
    expected = np.zeros_like(values)
    expected[order] = values[order]
    wire, left = TopK(fraction).encode(sent, None)
    assert wire["top-k.indices"].tolist() == sorted(order)
    np.testing.assert_array_equal(flat(TopK(fraction).decode(wire, sent)), expected)
    np.testing.assert_array_equal(flat(left), values - expected)


def test_of_equal_magnitudes_the_first_are_sent():
    sent = {"a": np.float32([1.0, -1.0, 0.5]), "b": np.float32([1.0, 1.0, -2.0])}
    assert TopK(0.5).encode(sent, None)[0]["top-k.indices"].tolist() == [0, 1, 5]
    assert TopK(0.5).encode(zeros(sent), None)[0]["top-k.indices"].tolist() == [0, 1, 2]


def test_a_fraction_counts_as_it_is_written():
    """0.07 * 100 is 7.000000000000001, and yet it is seven; a part of an entry is an entry."""
    like = {"w": np.zeros(100, np.float32)}
    kept = {fraction: TopK(fraction).wire_like(like)["top-k.values"][1][0] for fraction in (0.07, 0.071, 1e-9, 1.0)}
    assert kept == {0.07: 7, 0.071: 8, 1e-9: 1, 1.0: 100}


@given(SEEDS, st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_eight_bits_are_the_nearest_of_255_multiples_of_each_arrays_scale(seed, scale):
    sent = update(seed, scale)
    wire, left = Int8().encode(sent, None)
    made = Int8().decode(wire, sent)
    same_form(made, sent)
    for name, step in zip(sent, wire["8-bit.scales"].astype(np.float64), strict=True):
        grid = np.arange(-127, 128) * step
        for value, decoded in zip(np.ravel(sent[name]), np.ravel(made[name]), strict=True):
            assert decoded == np.float32(grid[np.argmin(np.abs(grid - value))])
        np.testing.assert_array_equal(left[name], sent[name] - made[name])


@given(hnp.arrays(np.float32, st.integers(1, 8), elements=FLOATS))
def test_an_entry_of_eight_bits_is_off_by_at_most_half_a_scale_whatever_its_size(values):
    """Also among denormals, where the largest over 127 is no float, and at the largest of all floats."""
    wire, _ = Int8().encode({"w": values}, None)
    step = float(wire["8-bit.scales"][0])
    made = Int8().decode(wire, {"w": values})["w"]
    assert np.isfinite(made).all()
    off = np.abs(made.astype(np.float64) - values)
    assert (off <= step * 0.50001).all()
    assert step * 127.0 <= float(np.abs(values).max()) * (1 + 1e-6) + 127 * 1.5e-45  # one denormal step each


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(seed=SEEDS, rounds=st.integers(1, 12))
def test_with_error_feedback_all_that_was_sent_and_what_is_left_is_all_that_there_was(codec, seed, rounds):
    total, arrived, left = np.zeros(18), np.zeros(18), zeros(update(0))
    for step in range(rounds):
        made = update(seed + step)
        total += flat(made)
        wire, left = codec.encode(made, left)
        arrived += flat(codec.decode(wire, made))
        same_form(left, made)
    np.testing.assert_allclose(arrived + flat(left), total, rtol=1e-5, atol=1e-4)


def test_with_error_feedback_the_running_mean_arrives_and_without_it_never():
    """The residual stays bounded, so over T rounds the mean is off by no more than it over T."""
    codec, sent = TopK(0.2), update(3)
    off = {}
    for rounds in (10, 1000):
        left, arrived, without = zeros(sent), 0.0, 0.0
        for _ in range(rounds):
            wire, left = codec.encode(sent, left)
            arrived = arrived + flat(codec.decode(wire, sent)).astype(np.float64)
            without = without + flat(codec.decode(codec.encode(sent, None)[0], sent)).astype(np.float64)
        off[rounds] = np.abs(arrived / rounds - flat(sent)).max()
    assert off[1000] < 0.02 * off[10]
    assert np.abs(without / 1000 - flat(sent)).max() > 0.5


@given(SEEDS)
def test_top_k_leaves_at_most_a_share_of_the_squares(seed):
    """‖x - sent‖² ≤ (1 - k/n)‖x‖²: what the convergence of error feedback rests on (Karimireddy et al. 2019)."""
    sent = update(seed)
    left = TopK(0.25).encode(sent, None)[1]
    assert update_norm(left) ** 2 <= (1 - 5 / 18) * update_norm(sent) ** 2 * (1 + 1e-6)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_is_sent_has_the_promised_form_is_the_same_every_time_and_its_input_stays(codec):
    sent, left = update(1), update(2)
    wire, _ = codec.encode(sent, left)
    assert {name: (str(array.dtype), array.shape) for name, array in wire.items()} == codec.wire_like(sent)
    assert list(wire) == list(codec.wire_like(sent))
    assert [array.tobytes() for array in wire.values()] == [a.tobytes() for a in codec.encode(sent, left)[0].values()]
    np.testing.assert_array_equal(flat(sent), flat(update(1)))
    np.testing.assert_array_equal(flat(left), flat(update(2)))
    same_form(codec.decode(wire, sent), sent)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_an_update_of_nothing_and_one_of_zeros_come_back(codec):
    for sent in ({}, {"none": np.zeros((0, 3), np.float32)}, {"w": np.zeros((2, 2), np.float32)}):
        wire, left = codec.encode(sent, None)
        same_form(codec.decode(wire, sent), sent)
        same_form(left, sent)


def test_bytes_on_the_wire():
    sent = {"w": np.ones((100, 100), np.float32), "b": np.ones(100, np.float32)}
    assert wire_bytes(sent) == 40_400
    assert wire_bytes(TopK(0.01).encode(sent, None)[0]) == 101 * 8
    assert wire_bytes(Int8().encode(sent, None)[0]) == 10_100 + 8


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_sent(codec, value):
    bad = update(0)
    bad["b"][2] = value
    for made, left in ((bad, None), (update(0), bad)):
        with pytest.raises(ValueError, match="expected finite values in an update and its residual"):
            codec.encode(made, left)


@pytest.mark.filterwarnings("ignore:overflow encountered in add:RuntimeWarning")
def test_an_update_and_a_residual_that_only_together_are_too_large_are_refused():
    large = {"w": np.float32([LARGEST])}
    with pytest.raises(ValueError, match="expected finite values"):
        Int8().encode(large, large)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_a_residual_of_another_model_is_refused(codec):
    for other in ({"w": np.zeros(2, np.float32)}, {**update(0), "w": np.zeros((3, 4), np.float32)}):
        with pytest.raises(ValueError, match="expected a residual of the update's names and shapes"):
            codec.encode(update(0), other)


def replaced(codec, **arrays):
    wire, _ = codec.encode(update(0), None)
    return {name: arrays.get(name.partition(".")[2], array) for name, array in wire.items()}


def ints(*values):
    return np.array(values, np.int32)


TOP, EIGHT = TopK(0.2), Int8()  # 18 entries: k is 4
HOSTILE = {
    "missing": (TOP, {"top-k.indices": ints(0, 1, 2, 3)}, "expected arrays top-k.indices, top-k.values"),
    "extra": (TOP, {**TOP.encode(update(0), None)[0], "more": ints(1)}, "expected arrays top-k.indices"),
    "nothing": (EIGHT, {}, "expected arrays 8-bit.scales"),
    "another codec's": (EIGHT, TOP.encode(update(0), None)[0], "expected arrays 8-bit.scales"),
    "a whole model": (TOP, update(0), "expected arrays top-k.indices"),
    "no array": (TOP, replaced(TOP, indices=[0, 1, 2, 3]), r"to be int32 \(4,\), got list"),
    "long indices": (TOP, replaced(TOP, indices=ints(0, 1, 2, 3).astype(np.int64)), "got int64"),
    "unsigned indices": (TOP, replaced(TOP, indices=ints(0, 1, 2, 3).astype(np.uint32)), "got uint32"),
    "float indices": (TOP, replaced(TOP, indices=np.float32([0, 1, 2, 3])), "got float32"),
    "another byte order": (TOP, replaced(TOP, indices=ints(0, 1, 2, 3).astype(">i4")), "expected top-k.indices"),
    "double values": (TOP, replaced(TOP, values=np.zeros(4)), "got float64"),
    "objects": (TOP, replaced(TOP, values=np.array([None] * 4)), "got object"),
    "too many": (TOP, replaced(TOP, indices=ints(0, 1, 2, 3, 4), values=np.zeros(5, np.float32)), r"got int32 \(5,\)"),
    "too few": (TOP, replaced(TOP, indices=ints(0, 1), values=np.zeros(2, np.float32)), r"got int32 \(2,\)"),
    "of two lengths": (TOP, replaced(TOP, values=np.zeros(5, np.float32)), r"got float32 \(5,\)"),
    "another shape": (TOP, replaced(TOP, values=np.zeros((2, 2), np.float32)), r"got float32 \(2, 2\)"),
    "out of range": (TOP, replaced(TOP, indices=ints(0, 1, 2, 18)), "expected ascending positions from 0 to below 18"),
    "negative": (TOP, replaced(TOP, indices=ints(-1, 1, 2, 3)), "expected ascending positions"),
    "least int": (TOP, replaced(TOP, indices=ints(-(2**31), 0, 1, 2**31 - 1)), "expected ascending positions"),
    "twice": (TOP, replaced(TOP, indices=ints(0, 1, 1, 3)), "expected ascending positions"),
    "out of order": (TOP, replaced(TOP, indices=ints(0, 2, 1, 3)), "expected ascending positions"),
    "NaN": (TOP, replaced(TOP, values=np.float32([0, 0, math.nan, 0])), "expected finite values in top-k.values"),
    "infinite": (TOP, replaced(TOP, values=np.float32([0, -math.inf, 0, 0])), "expected finite values"),
    "NaN scale": (EIGHT, replaced(EIGHT, scales=np.float32([1, 1, math.nan, 1])), "expected finite scales"),
    "infinite scale": (EIGHT, replaced(EIGHT, scales=np.float32([1, 1, math.inf, 1])), "expected finite scales"),
    "negative scale": (
        EIGHT,
        replaced(EIGHT, scales=np.float32([1, 1, -1, 1])),
        "expected finite scales of at least 0",
    ),
    "too few scales": (EIGHT, replaced(EIGHT, scales=np.float32([1])), r"got float32 \(1,\)"),
    "level -128": (EIGHT, replaced(EIGHT, values=np.full(18, -128, np.int8)), "got -128"),
    "unsigned levels": (EIGHT, replaced(EIGHT, values=np.zeros(18, np.uint8)), "got uint8"),
    "too many levels": (EIGHT, replaced(EIGHT, values=np.zeros(19, np.int8)), r"got int8 \(19,\)"),
}


@pytest.mark.parametrize(("codec", "wire", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_owner_sends_is_refused(codec, wire, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(wire, update(0))


@given(hnp.arrays(np.float32, 4), hnp.arrays(np.int8, 18))
@pytest.mark.filterwarnings("error")
def test_whatever_scales_and_levels_arrive_they_decode_to_finite_values_or_are_refused(scales, levels):
    try:
        made = EIGHT.decode({"8-bit.scales": scales, "8-bit.values": levels}, update(0))
    except ValueError:
        assert not (np.isfinite(scales).all() and (scales >= 0.0).all() and (levels > -128).all())
    else:
        same_form(made, update(0))


@given(hnp.arrays(np.int32, 4), hnp.arrays(np.float32, 4))
def test_whatever_positions_and_values_arrive_they_decode_to_finite_values_or_are_refused(indices, values):
    try:
        made = TOP.decode({"top-k.indices": indices, "top-k.values": values}, update(0))
    except ValueError:
        held = sorted(set(indices.tolist()))
        assert held != indices.tolist() or held[0] < 0 or held[-1] > 17 or not np.isfinite(values).all()
    else:
        same_form(made, update(0))
        np.testing.assert_array_equal(flat(made)[indices], values)


def test_codecs_have_names_and_fractions_have_a_range():
    assert codec_named("none", 0.5) is None
    assert codec_named("top-k", 0.5) == TopK(0.5)
    assert codec_named("8-bit", 0.5) == Int8()
    with pytest.raises(ValueError, match="expected none, top-k or 8-bit, got codec='zip'"):
        codec_named("zip", 0.5)
    for fraction in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected a share above 0 and at most 1, got fraction="):
            TopK(fraction)
