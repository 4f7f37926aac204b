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
RENT = Interface(
    shape=(2,), labels=("euros", "rooms"), output="values", target_mean=(500.0, 3.0), target_std=(100.0, 2.0)
)
PUMP = Interface(shape=(2, 3), labels=("normal", "anomalous"), output="reconstruction", threshold=0.5)
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
        {"output": "probability"},
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


@given(hnp.arrays(np.float64, (3, 2), elements=FINITE))
def test_values_come_back_from_what_a_model_is_trained_towards(values):
    targets = RENT.targets(values)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, (values - [500, 3]) / [100, 2], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(RENT.values(targets), values, rtol=1e-6, atol=1e-3)


def test_one_mean_and_deviation_hold_for_all_values():
    interface = Interface(shape=(2,), labels=("a", "b"), output="values", target_mean=(1.0,), target_std=(2.0,))
    assert interface.values(np.array([[0.0, 1.0]])).tolist() == [[1.0, 3.0]]


@given(hnp.arrays(np.float32, (2, 2, 3), elements=st.floats(-100, 100, width=32)))
def test_an_anomaly_score_is_the_mean_squared_error_of_one_example(inputs):
    outputs = inputs[::-1]
    wanted = [
        sum((float(a) - float(b)) ** 2 for a, b in zip(x.flat, y.flat, strict=True)) / 6
        for x, y in zip(inputs, outputs, strict=True)
    ]
    assert PUMP.anomaly_scores(inputs, outputs).tolist() == pytest.approx(wanted)


def test_what_a_model_does_not_return_is_refused_with_what_to_call_instead():
    with pytest.raises(ValueError, match=r"output='values'; use values\(\)"):
        RENT.postprocess(np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"output='logits'; use postprocess\(\)"):
        DIGITS.values(np.zeros((1, 10)))
    with pytest.raises(ValueError, match="output='logits'; use postprocess"):
        DIGITS.anomaly_scores(np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 8, 8)))
    with pytest.raises(ValueError, match="output='reconstruction'"):
        PUMP.targets(np.zeros((1, 2)))


def test_damaged_values_and_reconstructions_are_refused():
    with pytest.raises(ValueError, match=r"expected values of shape \(batch, 2\)"):
        RENT.values(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="expected finite values"):
        RENT.values(np.array([[0.0, math.inf]]))
    with pytest.raises(ValueError, match=r"expected outputs of shape \(batch, 2, 3\)"):
        PUMP.anomaly_scores(np.zeros((1, 2, 3)), np.zeros((1, 6)))
    with pytest.raises(ValueError, match="as many outputs as inputs"):
        PUMP.anomaly_scores(np.zeros((1, 2, 3)), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="expected finite outputs"):
        PUMP.anomaly_scores(np.zeros((1, 2, 3)), np.full((1, 2, 3), math.nan))


@pytest.mark.parametrize("interface", [RENT, PUMP])
def test_what_is_no_classifier_survives_json(interface):
    assert Interface.from_json(json.loads(json.dumps(interface.to_json()))) == interface


def test_json_from_before_there_were_values_and_reconstructions_is_read():
    written = '{"shape": [2], "scale": 1.0, "mean": [0.0], "std": [1.0], "labels": ["a", "b"], "output": "logits"}'
    assert Interface.from_json(json.loads(written)) == Interface(shape=(2,), labels=("a", "b"))


@pytest.mark.parametrize(
    ("interface", "change"),
    [
        (RENT, {"target_std": [0.0]}),
        (RENT, {"target_std": [1.0, 1.0, 1.0]}),
        (RENT, {"target_mean": [math.nan]}),
        (RENT, {"target_mean": 3.0}),
        (RENT, {"threshold": 1.0}),
        (RENT, {"output": "logits"}),
        (PUMP, {"threshold": -1.0}),
        (PUMP, {"threshold": math.inf}),
        (PUMP, {"threshold": True}),
        (PUMP, {"labels": ["normal"]}),
        (PUMP, {"target_mean": [1.0]}),
        (DIGITS, {"threshold": 1.0}),
    ],
)
def test_what_belongs_to_another_kind_of_output_is_refused(interface, change):
    with pytest.raises(ValueError, match="expected"):
        Interface.from_json(interface.to_json() | change)
