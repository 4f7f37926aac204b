"""The server's steps against plain loops, against what they replace, and against Flower's own classes."""

import math
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.averaging import from_record, to_record
from tacit.federated.grid import InProcessGrid
from tacit.federated.server_optimizer import OPTIMIZERS, ServerOptimizer

STATE = {
    "sgd": set(),
    "momentum": {"velocity"},
    "adam": {"velocity", "second"},
    "yogi": {"velocity", "second"},
    "adagrad": {"second"},
    "rmsprop": {"second"},
}


def arrays(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    made = {"w": generator.normal(size=(3, 2)), "b": generator.normal(size=2), "scale": generator.normal()}
    return {name: np.asarray(array * scale, dtype=np.float32) for name, array in made.items()}


def flat(made):
    return np.concatenate([np.ravel(array).astype(np.float64) for array in made.values()])


def same_bytes(a, b):
    return [(n, x.shape, x.dtype, x.tobytes()) for n, x in a.items()] == [
        (n, x.shape, x.dtype, x.tobytes()) for n, x in b.items()
    ]


def walk(optimizer, targets, weights):
    """All weights that the optimizer passes through, the first included."""
    state, passed = {}, [weights]
    for number, target in enumerate(targets, 1):
        weights, state = optimizer.step(weights, target, state, server_round=number, rounds=len(targets))
        passed.append(weights)
    return passed, state


def momentum_step(weights, averaged, velocity, *, learning_rate, momentum):
    """The step that runs were made with before there were other optimizers, kept word for word."""
    gradient = {name: weights[name] - averaged[name] for name in weights}
    fresh = gradient if velocity is None else {n: momentum * velocity[n] + gradient[n] for n in weights}
    moved = {n: np.asarray(weights[n] - np.float32(learning_rate) * fresh[n], dtype=np.float32) for n in weights}
    return moved, {n: np.asarray(v, dtype=np.float32) for n, v in fresh.items()}


def naive(optimizer, targets, weights):
    """Algorithm 2 of Reddi et al. 2021, coordinate by coordinate in Python's floats."""
    lr, b1, b2, tau = optimizer.learning_rate, optimizer.momentum, optimizer.second_momentum, optimizer.tau
    b1 = b1 if optimizer.name in ("adam", "yogi") else 0.0
    w, m, v = flat(weights).tolist(), [0.0] * 9, [tau**2] * 9
    for target in map(flat, targets):
        for i in range(9):
            delta = target[i] - w[i]
            m[i] = b1 * m[i] + (1 - b1) * delta
            if optimizer.name == "adagrad":
                v[i] += delta**2
            elif optimizer.name == "yogi":
                v[i] -= (1 - b2) * delta**2 * math.copysign(1.0, v[i] - delta**2)
            else:
                v[i] = b2 * v[i] + (1 - b2) * delta**2
            w[i] += lr * m[i] / (math.sqrt(v[i]) + tau)
    return w, v


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad", "rmsprop"])
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 1.0, 30.0]), st.sampled_from([0.0, 0.6, 0.9]))
def test_adaptive_steps_are_those_of_the_papers_algorithm(name, seed, scale, beta):
    optimizer = ServerOptimizer(name=name, learning_rate=0.05, momentum=beta, second_momentum=0.9, tau=0.01)
    targets = [arrays(seed + step, scale) for step in range(1, 6)]
    passed, state = walk(optimizer, targets, arrays(seed, scale))
    weights, second = naive(optimizer, targets, arrays(seed, scale))
    # A weight that has come near zero keeps the float32 rounding of where it has been: half a unit a step.
    atol = max(1e-6 * scale, 5 * 6e-8 * max(float(np.abs(flat(one)).max()) for one in passed))
    np.testing.assert_allclose(flat(passed[-1]), weights, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(flat({n: a for n, a in state.items() if n.startswith("second")}), second, rtol=1e-5)


def test_one_adam_step_by_hand():
    """Δ = 1: m = 0.1, v = 0.99e-6 + 0.01, so the weight moves by 0.5 · 0.1 / (√0.01000099 + 0.001)."""
    optimizer = ServerOptimizer(name="adam", learning_rate=0.5)
    moved, state = optimizer.step({"w": np.float32([2.0])}, {"w": np.float32([3.0])}, {}, server_round=1, rounds=1)
    assert moved["w"][0] == pytest.approx(2.0 + 0.05 / (math.sqrt(0.01000099) + 0.001), rel=1e-6)
    assert state["velocity.w"][0] == pytest.approx(0.1)
    assert state["second.w"][0] == pytest.approx(0.01000099)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.1, 0.3, 1.0]))
def test_momentum_is_the_step_of_earlier_runs_bit_for_bit(seed, momentum, rate):
    optimizer = ServerOptimizer(name="momentum", learning_rate=rate, momentum=momentum, schedule="cosine")
    weights, state, theirs, velocity = arrays(seed), {}, arrays(seed), None
    for number in range(1, 8):
        target = arrays(seed + number)
        weights, state = optimizer.step(weights, target, state, server_round=number, rounds=7)
        theirs, velocity = momentum_step(
            theirs, target, velocity, learning_rate=optimizer.rate(number, 7), momentum=momentum
        )
        assert same_bytes(weights, theirs)
        assert same_bytes(state, {f"velocity.{name}": array for name, array in velocity.items()})


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 1.0]))
def test_sgd_is_that_step_without_momentum_and_remembers_nothing(seed, rate):
    targets = [arrays(seed + step) for step in range(1, 4)]
    passed, state = walk(ServerOptimizer(learning_rate=rate), targets, arrays(seed))
    assert state == {}
    for target, (before, after) in zip(targets, pairwise(passed), strict=True):
        theirs, _ = momentum_step(before, target, None, learning_rate=rate, momentum=0.0)
        assert same_bytes(after, theirs)


def test_rate_one_of_sgd_is_plain_averaging():
    moved, _ = ServerOptimizer().step(arrays(0), arrays(1), {}, server_round=1, rounds=1)
    np.testing.assert_allclose(flat(moved), flat(arrays(1)), atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_weights_are_float32_arrays_of_their_shapes_and_the_arguments_stay(name):
    weights, target, state = arrays(0), arrays(1), {}
    optimizer = ServerOptimizer(name=name, learning_rate=0.1)
    for number in (1, 2):
        moved, state = optimizer.step(weights, target, state, server_round=number, rounds=2)
        assert list(moved) == list(weights)
        assert {key.partition(".")[0] for key in state} == STATE[name]
        for key, array in {**moved, **state}.items():
            assert isinstance(array, np.ndarray)
            assert array.dtype == np.float32
            assert array.shape == weights[key.removeprefix("velocity.").removeprefix("second.")].shape
    assert same_bytes(weights, arrays(0))
    assert same_bytes(target, arrays(1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_a_kept_state_is_going_on(name):
    optimizer = ServerOptimizer(name=name, learning_rate=0.1)
    targets = [arrays(step) for step in range(1, 7)]
    whole, _ = walk(optimizer, targets, arrays(0))
    state, weights = {}, arrays(0)
    for number, target in enumerate(targets, 1):
        weights, state = optimizer.step(weights, target, state, server_round=number, rounds=6)
        kept = {key: array.tobytes() for key, array in state.items()}
        state = {key: np.frombuffer(kept[key], np.float32).reshape(state[key].shape) for key in state}
    assert same_bytes(weights, whole[-1])


@pytest.fixture
def message():
    grid = InProcessGrid(ClientApp(), {5: Context(1, 5, {}, RecordDict(), {})})
    content = RecordDict({"arrays": to_record(arrays(0)), "config": ConfigRecord()})
    return Message(content, next(iter(grid.get_node_ids())), MessageType.TRAIN)


FLOWERS = {
    "adam": lambda lr: FedAdam(eta=lr, beta_1=0.9, beta_2=0.99, tau=0.01),
    "yogi": lambda lr: FedYogi(eta=lr, beta_1=0.9, beta_2=0.99, tau=0.01),
    "adagrad": lambda lr: FedAdagrad(eta=lr, tau=0.01),
}


@pytest.mark.parametrize("name", FLOWERS)
def test_flowers_classes_make_the_same_steps_once_they_begin_at_tau_squared(name, message):
    """Flower begins at v = 0 and corrects FedAdam's bias by the round, which a late round makes 1."""
    flower, ours = FLOWERS[name](0.1), ServerOptimizer(name=name, learning_rate=0.1, tau=0.01)
    weights, state = arrays(0), {}
    flower.v_t = {key: np.full(array.shape, 0.01**2, np.float32) for key, array in weights.items()}
    flower.current_arrays = arrays(0)
    for number in range(1, 8):
        content = {"arrays": to_record(arrays(number)), "metrics": MetricRecord({"num-examples": 1})}
        record, _ = flower.aggregate_train(10**9, [Message(RecordDict(content), reply_to=message)])
        flower.current_arrays = from_record(record)
        weights, state = ours.step(weights, arrays(number), state, server_round=number, rounds=7)
        np.testing.assert_allclose(flat(weights), flat(flower.current_arrays), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(weights), flat(walk(ours, [arrays(n) for n in range(1, 8)], arrays(0))[0][-1]))


def test_the_cosine_falls_from_the_rate_to_nearly_zero_and_a_constant_stays():
    cosine = ServerOptimizer(learning_rate=2.0, schedule="cosine")
    rates = [cosine.rate(server_round, 10) for server_round in range(1, 11)]
    assert rates[0] == 2.0
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(1.0 + math.cos(0.3 * math.pi))
    assert {ServerOptimizer(learning_rate=0.7).rate(n, 10) for n in range(1, 11)} == {0.7}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_schedule_reaches_the_step(name):
    fixed = ServerOptimizer(name=name, learning_rate=0.1)
    falling = ServerOptimizer(name=name, learning_rate=0.1, schedule="cosine")
    late = [o.step(arrays(0), arrays(1), {}, server_round=10, rounds=10)[0] for o in (fixed, falling)]
    moves = [np.abs(flat(made) - flat(arrays(0))).max() for made in late]
    assert moves[1] < 0.05 * moves[0]


def test_the_state_of_another_optimizer_or_of_another_model_is_refused():
    _, state = ServerOptimizer(name="adam").step(arrays(0), arrays(1), {}, server_round=1, rounds=2)
    with pytest.raises(ValueError, match="expected the state of server optimizer 'momentum' to match"):
        ServerOptimizer(name="momentum").step(arrays(0), arrays(1), state, server_round=2, rounds=2)
    wrong = {**state, "second.w": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match=r"got second.w of shape \(1,\) where \(3, 2\) is due"):
        ServerOptimizer(name="adam").step(arrays(0), arrays(1), wrong, server_round=2, rounds=2)
    with pytest.raises(ValueError, match=r"expected averaged arrays to match the weights, got w of shape \(2,\)"):
        ServerOptimizer().step(arrays(0), {**arrays(1), "w": np.zeros(2, np.float32)}, {}, server_round=1, rounds=2)
    only = {name: array for name, array in arrays(1).items() if name != "b"}
    with pytest.raises(ValueError, match="got b of shape none"):
        ServerOptimizer().step(arrays(0), only, {}, server_round=1, rounds=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "lion"),
        ("schedule", "linear"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("second_momentum", math.nan),
        ("tau", 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(key, value):
    with pytest.raises(ValueError, match=f"got {key}="):
        ServerOptimizer(**{key: value})
