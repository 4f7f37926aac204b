"""Local training against a loop over records with plain autograd."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tacit.federated.datasets import find_task
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.mixing import refuse_mixing_loss, refuse_mixing_records
from tacit.federated.noise import SeededGenerator
from tacit.federated.task import Records, Task
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


def small_model(own_parameter=True):
    """With a layer of its own parameters per-record gradients come from Opacus, without from sums."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        middle = Scale() if own_parameter else nn.Identity()
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), middle, nn.Flatten(), nn.Linear(256, 10)
        )


def summed_model():
    return small_model(own_parameter=False)


BOTH = pytest.mark.parametrize("build", [small_model, summed_model])


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


@BOTH
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("chunk", [2, 256])
def test_private_steps_are_those_of_a_loop_over_records(steps, chunk, build):
    settings, data = mechanism(steps_per_round=steps), records()
    trainer = LocalTrainer(TASK, build(), settings, learning_rate=RATE, chunk=chunk)
    ours = trainer.update(write_arrays(build()), data, SeededGenerator(9))
    naive = naive_update(build(), data, settings, SeededGenerator(9))
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


def test_noise_of_a_large_model_is_drawn_as_one_and_added_in_blocks():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(64, 1200), nn.Linear(1200, 10)

        def forward(self, x):
            return self.out(self.inner(x.flatten(1)))

    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Wide()
    settings, data, start = mechanism(), records(), write_arrays(model)
    ours = LocalTrainer(TASK, model, settings, learning_rate=RATE).update(start, data, SeededGenerator(9))
    again = Wide()
    read_arrays(again, start)
    naive = naive_update(again, data, settings, SeededGenerator(9))
    for name in ours:
        np.testing.assert_allclose(ours[name], naive[name], atol=1e-5, err_msg=name)


@BOTH
def test_a_private_owner_whose_batch_is_empty_sends_noise(build):
    start = write_arrays(build())
    trainer = LocalTrainer(TASK, build(), mechanism(), learning_rate=RATE)
    ours = trainer.update(start, records(0), SeededGenerator(1))
    moved = np.concatenate([(ours[name] - start[name]).ravel() for name in start])
    assert moved.std() == pytest.approx(RATE * 0.6 * 0.7 / 10, rel=0.05)


@BOTH
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_a_record_that_is_not_finite_leaves_the_update_as_if_it_were_not_there(poison, build):
    settings, data = mechanism(sample_rate=1.0), records()
    broken = Records(data.inputs.copy(), data.labels)
    broken.inputs[7] = poison
    trainer = LocalTrainer(TASK, build(), settings, learning_rate=RATE)
    start = write_arrays(build())

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


@BOTH
def test_an_owner_whose_data_raises_leaves_nothing_behind_for_the_next(build):
    """Labels that are no integers fail between Opacus' forward and backward hooks."""
    settings, data = mechanism(), records()
    trainer = LocalTrainer(TASK, build(), settings, learning_rate=RATE, chunk=5)
    start = write_arrays(build())
    before = trainer.update(start, data, SeededGenerator(2))
    broken = Records(data.inputs, data.labels.astype(np.float32))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Long"):
            trainer.update(start, broken, SeededGenerator(2))
    after = trainer.update(start, data, SeededGenerator(2))
    assert all(np.array_equal(before[name], after[name]) for name in start)


@BOTH
def test_what_an_owner_gets_back_does_not_depend_on_who_trained_before(build):
    trainer = LocalTrainer(TASK, build(), mechanism(), learning_rate=RATE)
    start = write_arrays(build())
    alone = trainer.update(start, records(), SeededGenerator(2))
    trainer.update({n: np.asarray(a + 1) for n, a in start.items()}, records(50, seed=1), SeededGenerator(5))
    again = trainer.update(start, records(), SeededGenerator(2))
    assert all(np.array_equal(alone[name], again[name]) for name in start)
    assert all(np.array_equal(start[name], write_arrays(build())[name]) for name in start)


@pytest.mark.parametrize("settings", [{}, {"unit": "none", "noise_multiplier": 0.0}])
def test_batch_statistics_are_refused_before_any_record_is_read(settings):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(PrivacyRefused, match=r"layer\(s\) 1"):
        LocalTrainer(TASK, model, mechanism(**settings), learning_rate=RATE)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_opacus_is_used_only_where_a_sum_is_not_enough():
    """Hardened noise needs each record on the grid; its twin and known layers do not."""
    cases = [
        (small_model, {}, True),
        (summed_model, {}, False),
        (summed_model, {"hardened": True}, True),
        (summed_model, {"hardened": True, "twin": True, "noise_multiplier": 0.0}, False),
        (summed_model, {"unit": "none", "noise_multiplier": 0.0, "max_grad_norm": math.inf}, False),
    ]
    for build, settings, hooked in cases:
        model = build()
        LocalTrainer(TASK, model, mechanism(**settings), learning_rate=RATE)
        assert bool(hooks(model)) == hooked, settings


def test_hardened_steps_are_those_of_a_loop_over_records_but_for_the_noise():
    settings, data = mechanism(hardened=True, sample_rate=1.0, noise_multiplier=1e-6), records()
    trainer = LocalTrainer(TASK, summed_model(), settings, learning_rate=RATE)
    ours = trainer.update(write_arrays(summed_model()), data, SeededGenerator(9))
    naive = naive_update(summed_model(), data, settings, SeededGenerator(9))
    for name in ours:
        np.testing.assert_allclose(ours[name], naive[name], atol=1e-5, err_msg=name)


# Models and losses that mix records


class AroundItsLayer(nn.Module):
    """Uses a layer's weight without calling the layer: no hook sees it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        return F.linear(x.flatten(1), self.inner.weight * 2.0, self.inner.bias)


class Centred(nn.Module):
    """Subtracts the batch's mean without a layer that says so."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        h = self.inner(x.flatten(1))
        return h - h.mean(0)


class PositionsFirst(nn.Module):
    """Its first layer sees pixels where records should be."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(1, 4), nn.Linear(4, 10)

    def forward(self, x):
        return self.out(self.inner(x.flatten(1).t()[..., None]).mean(0))


@pytest.mark.parametrize(("build", "reason"), [(AroundItsLayer, "call layers"), (Centred, "mixes records")])
def test_a_model_whose_records_cannot_be_told_apart_is_refused(build, reason):
    with pytest.raises(PrivacyRefused, match=reason):
        LocalTrainer(TASK, build(), mechanism(), learning_rate=RATE)


def test_a_model_that_puts_records_elsewhere_trains_nobody():
    with pytest.raises((PrivacyRefused, RuntimeError, ValueError)):
        LocalTrainer(TASK, PositionsFirst(), mechanism(), learning_rate=RATE)


def test_outputs_that_depend_on_other_records_are_refused():
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    refuse_mixing_records(nn.Sequential(nn.Linear(64, 10), nn.Softmax(1)), inputs)
    with pytest.raises(PrivacyRefused, match="mixes records"):
        refuse_mixing_records(nn.Sequential(nn.Linear(64, 10), nn.Softmax(0)), inputs)


def contrast(logits, labels):
    """Each record against all others, as in contrastive learning."""
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="sum")


def of_normalised(logits, labels):
    return F.cross_entropy(F.batch_norm(logits, None, None, training=True), labels, reduction="sum")


def of_neighbours(logits, labels):
    return F.cross_entropy(logits + 0.1 * logits.roll(1, 0), labels, reduction="sum")


def weighted_by_class_share(logits, labels):
    shares = torch.bincount(labels, minlength=logits.shape[1]) / len(labels)
    return (F.cross_entropy(logits, labels, reduction="none") * shares[labels]).sum()


MIXING = [F.cross_entropy, contrast, of_normalised, of_neighbours, weighted_by_class_share]


@pytest.mark.parametrize("loss", MIXING)
def test_a_loss_that_mixes_records_is_refused(loss):
    with pytest.raises(PrivacyRefused, match="expected a loss"):
        refuse_mixing_loss(loss, torch.arange(4), shape=(10,))


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"),
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1),
        lambda logits, labels: F.multi_margin_loss(logits, labels, reduction="sum"),
        lambda logits, labels: logits.square().sum(),
    ],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_a_loss_that_sums_over_records_is_accepted(loss, classes):
    refuse_mixing_loss(loss, torch.arange(4) % classes, shape=(classes,))


@dataclass(frozen=True, kw_only=True)
class MeanTask(Task):
    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)


def test_a_trainer_refuses_a_mixing_loss_where_records_are_the_unit_and_only_there():
    task = MeanTask(**vars(TASK))
    with pytest.raises(PrivacyRefused, match="mixes records"):
        LocalTrainer(task, summed_model(), mechanism(), learning_rate=RATE)
    LocalTrainer(task, summed_model(), mechanism(unit="client"), learning_rate=RATE)


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


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("bound", [0.01, 100.0])
def test_under_unit_local_what_leaves_is_the_clipped_update_and_noise_for_twice_the_bound(hardened, bound):
    """By hand, from the same coins: plain SGD on all records, one clip over the whole update, N(0, (z·2C)²)."""
    settings = mechanism(unit="local", sample_rate=1.0, max_grad_norm=bound, hardened=hardened)
    data, model = records(), small_model()
    start = write_arrays(model)
    trainer = LocalTrainer(TASK, small_model(), settings, learning_rate=RATE, batch_rate=1.0)
    ours = trainer.update(start, data, SeededGenerator(1))
    generator = SeededGenerator(1)
    generator.bernoulli(len(data), 1.0)
    gradient = gradient_of(model, data.inputs, data.labels)
    update = np.concatenate([(-RATE * g / len(data)).numpy().ravel() for g in gradient]).astype(np.float64)
    wanted = update * min(1.0, bound * (1 - 1e-6) / np.linalg.norm(update))
    wanted += generator.gaussian(len(update), 2.0 * 0.6 * bound)
    found = np.concatenate([(ours[name].astype(np.float64) - start[name]).ravel() for name in start])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_client_clips_its_own_update_and_says_whether_it_had_to():
    data, start = records(), write_arrays(small_model())
    trainer = LocalTrainer(TASK, small_model(), mechanism(unit="client"), learning_rate=RATE, batch_rate=1.0)
    for bound, within in ((0.01, False), (100.0, True)):
        after, unclipped = trainer.client_update(start, data, SeededGenerator(1), clip_norm=bound)
        moved = math.sqrt(sum(float(((after[n].astype(np.float64) - start[n]) ** 2).sum()) for n in start))
        assert unclipped is within
        assert moved <= bound * (1 + 1e-5)  # the model itself is rounded to float32
        assert moved > 0.009
