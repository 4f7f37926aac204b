"""Averaging, and the strategy that asks owners and combines what they answer."""

import gc
import tracemalloc

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.averaging import FederatedAveraging, from_record, to_record
from tacit.federated.evaluation import Evaluations, evaluation_mechanism
from tacit.federated.folding import mean
from tacit.federated.grid import InProcessGrid
from tacit.federated.mechanism import Mechanism
from tacit.federated.server_optimizer import ServerOptimizer


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
    """Sums of float32 values are exact in float64 as long as a coordinate's values lie within 2^29 of each other."""
    results = []
    updates = [{"w": np.float32([value, 1.0 / value])} for value in (3e7, -3e7, 0.7)]
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        strategy = FederatedAveraging(rounds=4, optimizer=ServerOptimizer(name="momentum", learning_rate=0.5))
        messages = list(strategy.configure_train(1, to_record({"w": np.zeros(2, np.float32)}), ConfigRecord({}), grid))
        replies = replies_of(messages, [updates[n] for n in order], order)
        record, metrics = strategy.aggregate_train(1, replies)
        results.append([array.tobytes() for array in from_record(record).values()])
        assert dict(metrics) == {"clients": 3}
    assert results[0] == results[1] == results[2]


def test_a_stream_of_replies_is_folded_and_none_of_them_is_kept(grid):
    """Peak memory while 40 replies come is that of 4: the sum, and a reply at a time."""
    model = {f"layer{n}": np.ones(65_536, np.float32) for n in range(4)}  # 1 MB
    peaks = []
    for count in (4, 40):
        strategy = FederatedAveraging(rounds=1)
        (message, *_) = strategy.configure_train(1, to_record(model), ConfigRecord({}), grid)
        stream = (replies_of([message], [model], [owner])[0] for owner in range(count))
        gc.collect()
        tracemalloc.start()
        record, _ = strategy.aggregate_train(1, stream)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
        close(from_record(record), model)
    assert peaks[1] < peaks[0] + 0.1
    assert peaks[1] < 5.5  # two for the sum, one for the reply, two that this test makes of it


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
