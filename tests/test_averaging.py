"""The server's step against a few lines of plain arithmetic."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.averaging import (
    FederatedAveraging,
    ServerOptimizer,
    from_record,
    mean,
    momentum_step,
    to_record,
)
from tacit.federated.evaluation import Evaluations, evaluation_mechanism
from tacit.federated.grid import InProcessGrid
from tacit.federated.mechanism import Mechanism


def arrays(seed):
    generator = np.random.default_rng(seed)
    made = {"w": generator.normal(size=(3, 2)), "b": generator.normal(size=2), "scale": generator.normal()}
    return {name: np.asarray(array, dtype=np.float32) for name, array in made.items()}


def close(a, b, tolerance=1e-6):
    assert list(a) == list(b)
    for name in a:
        assert isinstance(a[name], np.ndarray)
        assert a[name].dtype == np.float32
        np.testing.assert_allclose(a[name], b[name], atol=tolerance, err_msg=name)


@given(st.integers(1, 8))
def test_mean_is_the_unweighted_mean_in_float64(count):
    updates = [arrays(seed) for seed in range(count)]
    close(mean(updates), {n: np.mean([u[n].astype(np.float64) for u in updates], axis=0) for n in updates[0]})


def test_mean_leaves_its_inputs_alone_and_gives_the_same_bytes_for_the_same_order():
    updates = [arrays(seed) for seed in range(5)]
    first = mean(updates)
    assert all(first[name].tobytes() == mean(updates)[name].tobytes() for name in first)
    close(updates[0], arrays(0), 0.0)


def test_rate_one_without_momentum_is_plain_averaging():
    moved, _ = momentum_step(arrays(0), arrays(1), None, learning_rate=1.0, momentum=0.0)
    close(moved, arrays(1))


def test_momentum_is_that_of_a_plain_loop():
    weights = ours = arrays(0)
    velocity, naive_velocity = None, dict.fromkeys(weights, 0.0)
    for step in range(1, 6):
        target = arrays(step)
        ours, velocity = momentum_step(ours, target, velocity, learning_rate=0.5, momentum=0.9)
        naive_velocity = {n: 0.9 * naive_velocity[n] + (weights[n].astype(float) - target[n]) for n in weights}
        weights = {n: weights[n] - 0.5 * naive_velocity[n] for n in weights}
    close(ours, weights, 1e-5)
    close(velocity, naive_velocity, 1e-5)


def test_the_cosine_falls_from_the_rate_to_nearly_zero_and_a_constant_stays():
    cosine = ServerOptimizer(learning_rate=2.0, schedule="cosine")
    rates = [cosine.rate(server_round, 10) for server_round in range(1, 11)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0)
    assert rates == sorted(rates, reverse=True)
    assert 0.0 < rates[-1] < 0.1
    assert rates[3] == pytest.approx(1.0 + math.cos(0.3 * math.pi))
    assert {ServerOptimizer(learning_rate=0.7).rate(n, 10) for n in range(1, 11)} == {0.7}


def test_records_of_every_dimension_travel_bit_for_bit():
    sent = arrays(3)
    received = from_record(to_record(sent))
    assert [(n, a.shape, a.dtype, a.tobytes()) for n, a in received.items()] == [
        (n, a.shape, a.dtype, a.tobytes()) for n, a in sent.items()
    ]


@pytest.fixture
def grid():
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in (5, 2, 9)}
    return InProcessGrid(ClientApp(), contexts)


def replies_of(messages, updates, owners):
    made = []
    for message, update, owner in zip(messages, updates, owners, strict=True):
        content = {"arrays": to_record(update), "metrics": MetricRecord({"num-examples": 1, "owner": owner})}
        made.append(Message(RecordDict(content), reply_to=message))
    return made


def test_every_node_gets_the_model_and_the_round(grid):
    strategy = FederatedAveraging(rounds=4)
    messages = list(strategy.configure_train(3, to_record(arrays(0)), ConfigRecord({"run": "r"}), grid))
    assert [message.metadata.dst_node_id for message in messages] == [2, 5, 9]
    for message in messages:
        assert dict(message.content.config_records["config"]) == {"run": "r", "server-round": 3}
        close(from_record(message.content.array_records["arrays"]), arrays(0), 0.0)


def test_the_order_in_which_replies_arrive_changes_no_bit(grid):
    """1e17 - 1e17 + 1 is 1, 1e17 + 1 - 1e17 is 0: in float64 the order decides, so it is the owners' own."""
    results = []
    updates = [{"w": np.full(2, value, np.float32)} for value in (1e17, -1e17, 1.0)]
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        strategy = FederatedAveraging(rounds=4, optimizer=ServerOptimizer(learning_rate=0.5, momentum=0.9))
        messages = list(strategy.configure_train(1, to_record({"w": np.zeros(2, np.float32)}), ConfigRecord({}), grid))
        replies = replies_of(messages, [updates[n] for n in order], order)
        record, metrics = strategy.aggregate_train(1, replies)
        results.append([array.tobytes() for array in from_record(record).values()])
        assert dict(metrics) == {"clients": 3}
    assert results[0] == results[1] == results[2]


def test_error_replies_are_left_out_and_a_round_without_any_update_gives_nothing(grid):
    strategy = FederatedAveraging(rounds=4)
    messages = list(strategy.configure_train(1, to_record(arrays(0)), ConfigRecord({}), grid))
    error = Message(Error(4, "exhausted"), reply_to=messages[0])
    record, metrics = strategy.aggregate_train(1, [error, *replies_of(messages[1:2], [arrays(7)], [1])])
    close(from_record(record), arrays(7))
    assert dict(metrics) == {"clients": 1}
    assert strategy.aggregate_train(1, [error]) == (None, None)


def counting(noise=10.0):
    training = Mechanism(
        unit="record",
        sample_rate=0.1,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        steps_per_round=1,
        rounds=4,
        reference_size=10,
        delta=1e-5,
    )
    return Evaluations(mechanism=evaluation_mechanism(training, noise, 2), rounds=4, every=3)


@pytest.mark.parametrize(("evaluations", "due"), [(None, []), (counting(), [3, 4])], ids=["none planned", "planned"])
def test_owners_are_asked_to_evaluate_in_the_rounds_that_were_planned_and_never_else(grid, evaluations, due):
    strategy = FederatedAveraging(rounds=4, evaluations=evaluations)
    for server_round in range(1, 5):
        config = ConfigRecord({"run": "r"})
        messages = list(strategy.configure_evaluate(server_round, to_record(arrays(0)), config, grid))
        assert [message.metadata.dst_node_id for message in messages] == ([2, 5, 9] if server_round in due else [])
        for message in messages:
            assert message.metadata.message_type == MessageType.EVALUATE
            assert dict(message.content.config_records["config"]) == {"run": "r", "server-round": server_round}
            close(from_record(message.content.array_records["arrays"]), arrays(0), 0.0)
    assert strategy.aggregate_evaluate(1, []) is None


def test_evaluations_that_came_back_are_pooled_and_errors_left_out(grid):
    strategy = FederatedAveraging(rounds=4, evaluations=counting())
    messages = list(strategy.configure_evaluate(3, to_record(arrays(0)), ConfigRecord({}), grid))
    counts = MetricRecord({"num-examples": 1, "owner": 1, "right": 75.0, "wrong": 25.0})
    replies = [
        Message(Error(4, "exhausted"), reply_to=messages[0]),
        Message(RecordDict({"metrics": counts}), reply_to=messages[1]),
    ]
    found = strategy.aggregate_evaluate(3, replies)
    assert (found["owner"], found["accuracy"], found["noise-sd"]) == ([1], 0.75, 10.0)
