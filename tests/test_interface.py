"""The one implementation of preprocessing and postprocessing."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tacit.devices.interface import Interface

DIGITS = Interface(shape=(1, 8, 8), scale=1 / 16, mean=(0.3,), std=(0.4,), labels=tuple("0123456789"))
COLOUR = Interface(
    shape=(3, 4, 4), scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), labels=("cat", "dog", "other")
)
FINITE = st.floats(-1e6, 1e6)


@given(hnp.arrays(np.uint8, (2, 3, 4, 4)))
def test_preprocess_is_the_formula_of_each_channel(raw):
    ready = COLOUR.preprocess(raw)
    assert ready.dtype == np.float32
    assert ready.shape == raw.shape
    for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
        np.testing.assert_allclose(ready[:, channel], (raw[:, channel] / 255 - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_preprocess_does_not_depend_on_the_type_of_the_raw_values(dtype):
    raw = np.arange(64).reshape(1, 1, 8, 8) % 17
    np.testing.assert_array_equal(DIGITS.preprocess(raw.astype(dtype)), DIGITS.preprocess(raw))


def test_preprocess_does_not_change_its_argument_and_takes_an_empty_batch():
    raw = np.ones((2, 1, 8, 8), dtype=np.float32)
    DIGITS.preprocess(raw)
    assert (raw == 1).all()
    assert DIGITS.preprocess(raw[:0]).shape == (0, 1, 8, 8)


def test_a_batch_is_prepared_like_its_examples_one_by_one():
    raw = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4))
    np.testing.assert_array_equal(
        COLOUR.preprocess(raw), np.concatenate([COLOUR.preprocess(raw[i : i + 1]) for i in range(5)])
    )


def test_a_table_has_one_mean_per_column():
    table = Interface(shape=(2,), mean=(1.0, 10.0), std=(2.0, 5.0), labels=("no", "yes"))
    np.testing.assert_array_equal(table.preprocess(np.array([[3.0, 20.0]])), [[1.0, 2.0]])


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 8, 8, 1), (1, 1, 8, 9), ()])
def test_a_wrong_shape_is_refused_with_the_right_one(shape):
    with pytest.raises(ValueError, match=r"expected raw values of shape \(batch, 1, 8, 8\)"):
        DIGITS.preprocess(np.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_value_that_is_not_finite_is_refused_with_its_place(value):
    raw = np.zeros((2, 1, 8, 8))
    raw[1, 0, 3, 4] = value
    with pytest.raises(ValueError, match=r"raw\[\(1, 0, 3, 4\)\]"):
        DIGITS.preprocess(raw)


@pytest.mark.parametrize("raw", [np.zeros((1, 1, 8, 8), dtype=complex), np.full((1, 1, 8, 8), "1")])
def test_values_that_are_not_real_are_refused(raw):
    with pytest.raises(ValueError, match="expected real numbers"):
        DIGITS.preprocess(raw)


@given(hnp.arrays(np.float64, (3, 3), elements=FINITE))
def test_postprocess_is_a_softmax_whose_winner_is_the_greatest_logit(logits):
    for row, prediction in zip(logits, COLOUR.postprocess(logits), strict=True):
        shares = [math.exp(logit - max(row)) for logit in row]
        assert prediction.probabilities == pytest.approx([share / sum(shares) for share in shares])
        assert prediction.probability == max(prediction.probabilities)
        assert prediction.label == COLOUR.labels[prediction.index]
        assert math.exp(row[prediction.index] - max(row)) == pytest.approx(1)


def test_postprocess_survives_logits_that_overflow_a_naive_softmax():
    (prediction,) = COLOUR.postprocess(np.array([[1e30, -1e30, 0.0]], dtype=np.float32))
    assert prediction.probabilities == (1.0, 0.0, 0.0)


def test_postprocess_of_nothing_is_nothing():
    assert COLOUR.postprocess(np.zeros((0, 3))) == []


def test_damaged_logits_are_refused():
    with pytest.raises(ValueError, match="expected finite logits"):
        COLOUR.postprocess(np.array([[0.0, math.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"expected logits of shape \(batch, 3\)"):
        COLOUR.postprocess(np.zeros((1, 4)))


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.floats(1e-6, 1e6),
    FINITE,
    st.floats(1e-6, 1e6),
    st.lists(st.text(), min_size=1, max_size=5, unique=True),
)
def test_an_interface_survives_json(shape, scale, mean, std, labels):
    interface = Interface(shape=tuple(shape), scale=scale, mean=(mean,), std=(std,), labels=tuple(labels))
    assert Interface.from_json(json.loads(json.dumps(interface.to_json()))) == interface


def test_the_json_form_is_fixed():
    assert json.dumps(Interface(shape=(2,), labels=("a", "b")).to_json()) == (
        '{"shape": [2], "scale": 1.0, "mean": [0.0], "std": [1.0], "labels": ["a", "b"], "output": "logits"}'
    )


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"shape": "188"},
        {"shape": [0, 8]},
        {"shape": [True]},
        {"shape": []},
        {"labels": ["a", "a"]},
        {"labels": []},
        {"labels": [1, 2]},
        {"labels": "ab"},
        {"scale": math.nan},
        {"scale": 0},
        {"scale": "1"},
        {"mean": [0, 0]},
        {"mean": [None]},
        {"std": [0]},
        {"std": [-1]},
        {"output": "probabilities"},
    ],
)
def test_json_that_is_not_an_interface_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        Interface.from_json(DIGITS.to_json() | change)


def test_json_without_a_key_is_refused_and_names_it():
    data = DIGITS.to_json()
    del data["scale"]
    with pytest.raises(ValueError, match=r"differing in \['scale'\]"):
        Interface.from_json(data)
