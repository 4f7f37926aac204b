"""Local training against a loop over records with plain autograd."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tacit.federated.datasets import find_task
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SeededGenerator
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, read_arrays, write_arrays

TASK = find_task("digits")
RATE = 0.3


class Scale(nn.Module):
    """A parameter of no dimension."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.factor


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), Scale(), nn.Flatten(), nn.Linear(256, 10)
        )


def records(count=30, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, 1, 8, 8)).astype(np.float32)
    return Records(inputs, generator.integers(0, 10, count))


def mechanism(**changed):
    settings = {
        "unit": "record",
        "sample_rate": 0.5,
        "max_grad_norm": 0.7,
        "noise_multiplier": 0.6,
        "steps_per_round": 1,
        "rounds": 1,
        "reference_size": 20,
        "delta": 1e-5,
    }
    return Mechanism(**{**settings, **changed})


def gradient_of(model, inputs, labels):
    loss = nn.functional.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(labels), reduction="sum")
    return torch.autograd.grad(loss, list(model.parameters()))


def naive_update(model, data, settings, randomness):
    """DP-SGD as the paper writes it, one record at a time, in float64 where it adds up."""
    parameters = list(model.parameters())
    for _ in range(settings.steps_per_round):
        batch = np.flatnonzero(randomness.bernoulli(len(data), settings.sample_rate))
        total = [np.zeros(p.shape) for p in parameters]
        for index in batch:
            gradient = gradient_of(model, data.inputs[[index]], data.labels[[index]])
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient))
            if math.isfinite(norm):
                factor = min(1.0, settings.max_grad_norm / norm)
                total = [t + factor * g.numpy() for t, g in zip(total, gradient, strict=True)]
        sigma = settings.noise_multiplier * settings.max_grad_norm
        noise = randomness.gaussian(sum(p.numel() for p in parameters), sigma)
        place = 0
        with torch.no_grad():
            for parameter, t in zip(parameters, total, strict=True):
                piece = noise[place : place + parameter.numel()].reshape(tuple(parameter.shape))
                place += parameter.numel()
                step = (t + piece) / (settings.sample_rate * settings.reference_size)
                parameter -= RATE * torch.from_numpy(np.asarray(step)).float()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("chunk", [4, 256])
def test_private_steps_are_those_of_a_loop_over_records(steps, chunk):
    settings, data = mechanism(steps_per_round=steps), records()
    trainer = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE, chunk=chunk)
    ours = trainer.update(write_arrays(small_model()), data, SeededGenerator(9))
    naive = naive_update(small_model(), data, settings, SeededGenerator(9))
    assert list(ours) == list(naive)
    for name in ours:
        np.testing.assert_allclose(ours[name], naive[name], atol=1e-5 * steps, err_msg=name)


def test_without_a_guarantee_a_step_is_plain_sgd_on_the_mean_of_the_batch():
    settings = mechanism(unit="none", noise_multiplier=0.0, max_grad_norm=math.inf, sample_rate=1.0)
    data, model = records(), small_model()
    ours = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE).update(
        write_arrays(model), data, SeededGenerator(1)
    )
    gradient = gradient_of(model, data.inputs, data.labels)
    for (name, parameter), g in zip(model.named_parameters(), gradient, strict=True):
        np.testing.assert_allclose(ours[name], (parameter - RATE * g / len(data)).detach().numpy(), atol=1e-5)


def test_without_a_guarantee_an_empty_batch_changes_nothing():
    settings = mechanism(unit="none", noise_multiplier=0.0, max_grad_norm=math.inf)
    start = write_arrays(small_model())
    trainer = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE)
    ours = trainer.update(start, records(0), SeededGenerator(1))
    assert all(np.array_equal(ours[name], start[name]) for name in start)


def test_a_private_owner_whose_batch_is_empty_sends_noise():
    start = write_arrays(small_model())
    trainer = LocalTrainer(TASK, small_model(), mechanism(), learning_rate=RATE)
    ours = trainer.update(start, records(0), SeededGenerator(1))
    moved = np.concatenate([(ours[name] - start[name]).ravel() for name in start])
    assert moved.std() == pytest.approx(RATE * 0.6 * 0.7 / 10, rel=0.05)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_a_record_that_is_not_finite_leaves_the_update_as_if_it_were_not_there(poison):
    settings, data = mechanism(sample_rate=1.0), records()
    broken = Records(data.inputs.copy(), data.labels)
    broken.inputs[7] = poison
    trainer = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE)
    start = write_arrays(small_model())

    class Noise:  # the same noise whatever the number of records
        def bernoulli(self, count, probability):
            return np.ones(count, bool)

        def gaussian(self, count, standard_deviation):
            return SeededGenerator(3).gaussian(count, standard_deviation)

    with_it = trainer.update(start, broken, Noise())
    without = trainer.update(start, data.take(np.delete(np.arange(30), 7)), Noise())
    for name in start:
        assert np.isfinite(with_it[name]).all()
        np.testing.assert_allclose(with_it[name], without[name], atol=1e-6)


def test_an_owner_whose_data_raises_leaves_nothing_behind_for_the_next():
    """A label outside the classes fails between Opacus' forward and backward hooks."""
    settings, data = mechanism(), records()
    trainer = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE, chunk=5)
    start = write_arrays(small_model())
    before = trainer.update(start, data, SeededGenerator(2))
    broken = Records(data.inputs, np.where(np.arange(30) > 20, 10, data.labels))
    for _ in range(2):
        with pytest.raises(IndexError):
            trainer.update(start, broken, SeededGenerator(2))
    after = trainer.update(start, data, SeededGenerator(2))
    assert all(np.array_equal(before[name], after[name]) for name in start)


def test_what_an_owner_gets_back_does_not_depend_on_who_trained_before():
    trainer = LocalTrainer(TASK, small_model(), mechanism(), learning_rate=RATE)
    start = write_arrays(small_model())
    alone = trainer.update(start, records(), SeededGenerator(2))
    trainer.update({n: np.asarray(a + 1) for n, a in start.items()}, records(50, seed=1), SeededGenerator(5))
    again = trainer.update(start, records(), SeededGenerator(2))
    assert all(np.array_equal(alone[name], again[name]) for name in start)
    assert all(np.array_equal(start[name], write_arrays(small_model())[name]) for name in start)


@pytest.mark.parametrize("settings", [{}, {"unit": "none", "noise_multiplier": 0.0}])
def test_batch_statistics_are_refused_before_any_record_is_read(settings):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(PrivacyRefused, match=r"layer\(s\) 1"):
        LocalTrainer(TASK, model, mechanism(**settings), learning_rate=RATE)


def with_statistics():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_integer_buffers_never_travel_and_float_ones_do():
    model = with_statistics()
    arrays = write_arrays(model)
    assert list(arrays) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert all(array.dtype == np.float32 for array in arrays.values())
    model[1].num_batches_tracked.fill_(7)
    read_arrays(model, {name: array + 1 for name, array in arrays.items()})
    assert int(model[1].num_batches_tracked) == 7
    assert all(np.array_equal(write_arrays(model)[name], arrays[name] + 1) for name in arrays)


def test_arrays_written_are_copies():
    model = with_statistics()
    arrays = write_arrays(model)
    arrays["0.weight"][:] = 9
    assert not (write_arrays(model)["0.weight"] == 9).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("0.bias"),
        lambda a: a.update(extra=np.zeros(1, np.float32)),
        lambda a: a.update({"0.weight": a.pop("0.weight")}),  # another order
        lambda a: a.update({"0.bias": np.zeros(5, np.float32)}),
        lambda a: a.update({"0.bias": np.zeros((4, 1), np.float32)}),
        lambda a: a.update({"0.bias": np.zeros((), np.float32)}),
    ],
)
def test_arrays_with_other_names_or_shapes_are_refused(change):
    model = with_statistics()
    arrays = write_arrays(model)
    change(arrays)
    with pytest.raises(ValueError, match="expected"):
        read_arrays(model, arrays)
