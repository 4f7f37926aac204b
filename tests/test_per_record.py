"""The clipped sum against one record at a time with plain autograd, and against inputs made to break it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tacit.federated.clipping import CLIP_SLACK
from tacit.federated.per_record import PerRecordSum, RecordsUnclear, unsupported_layers
from tacit.federated.per_record_layers import KINDS, Use
from tacit.federated.per_record_parts import from_factors, ghost_is_cheaper, norm_from_above

CLASSES = 5


def loss(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum")


def gradient_of_one(model, inputs, labels, its_loss=loss):
    """One record's gradient over all trainable parameters, in a row, float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(its_loss(model(inputs), labels), parameters, materialize_grads=True)
    return torch.cat([g.flatten().double() for g in gradients])


def naive_sum(model, inputs, labels, bound, its_loss=loss):
    total = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad), dtype=torch.float64)
    for i in range(len(inputs)):
        gradient = gradient_of_one(model, inputs[[i]], labels[[i]], its_loss)
        norm = float(gradient.norm())
        if math.isfinite(norm):
            total += gradient * min(1.0, bound * CLIP_SLACK / norm if norm else 1.0)
    return total


def seeded(seed, build):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():  # normalisations begin at ones and zeros, which would hide a mistake
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(seed, count):
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def agrees(model, inputs, bounds=(0.05, 1.0, math.inf), **settings):
    labels = labels_of(1, len(inputs))
    add = PerRecordSum(model, loss, **settings)
    for bound in bounds:
        found, wanted = add(inputs, labels, bound).double(), naive_sum(model, inputs, labels, bound)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()) + 1e-9, bound
    return True


class Attention(nn.Module):
    """Tokens, positions, one layer used several times, one activation in place on what a layer returned."""

    def __init__(self, width=16, in_place=True):
        super().__init__()
        self.token, self.position = nn.Embedding(20, width, padding_idx=0), nn.Embedding(7, width)
        self.before, self.after = nn.LayerNorm(width), nn.RMSNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out, self.in_place = nn.Linear(width, CLASSES), in_place

    def forward(self, x):
        h = self.token(x.long()) + self.position(torch.arange(x.shape[1]).expand(x.shape))
        n = self.before(h)
        h = self.after(h + F.softmax(self.query(n) @ self.key(n).mT, -1) @ self.query(h))
        return self.out(F.relu(self.query(h), inplace=self.in_place).mean(1))


class Branches(nn.Module):
    """One convolution on two sizes of image, added; a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6)
        self.out, self.unused = nn.Linear(6, CLASSES), nn.Linear(3, 3)

    def forward(self, x):
        small = self.conv(x[:, :, ::2, ::2])
        return self.out(self.norm(self.conv(x)).mean((2, 3)) + self.norm(small).mean((2, 3)))


def flat(*layers, outputs):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(outputs, CLASSES))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, CLASSES)), (20,)),
    "mlp without bias": (lambda: nn.Sequential(nn.Linear(9, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES)), (9,)),
    "narrow sequence": (lambda: flat(nn.Linear(4, 3), nn.LayerNorm(3), outputs=18), (6, 4)),
    "wide sequence": (lambda: flat(nn.Linear(90, 80), nn.GELU(), outputs=160), (2, 90)),
    "two leading dimensions": (lambda: flat(nn.Linear(4, 3), nn.LayerNorm((3, 3)), outputs=18), (2, 3, 4)),
    "convolutions": (
        lambda: flat(
            nn.Conv2d(1, 8, 3, padding="same"),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, (2, 3), stride=2, padding=(1, 0), bias=False),
            nn.GroupNorm(12, 12),
            outputs=300,
        ),
        (1, 8, 11),
    ),
    "dilation": (
        lambda: flat(nn.Conv2d(2, 4, 3, dilation=(2, 1)), nn.Conv2d(4, 8, 2, dilation=2), outputs=32),
        (2, 8, 6),
    ),
    "channels in groups": (
        lambda: flat(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), outputs=32),
        (4, 6, 6),
    ),
    "reflected borders": (lambda: flat(nn.Conv2d(9, 4, 3, padding=2, padding_mode="reflect"), outputs=196), (9, 5, 5)),
    "circular borders": (lambda: flat(nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), outputs=28), (2, 5)),
    "sound": (lambda: flat(nn.Conv1d(3, 8, 4, padding="same"), nn.Conv1d(8, 6, 5, stride=3), outputs=54), (3, 30)),
    "a volume": (lambda: flat(nn.Conv3d(1, 8, 2), nn.Conv3d(8, 4, 2, padding=1), outputs=256), (1, 4, 4, 4)),
    "wide convolution": (lambda: flat(nn.Conv2d(64, 64, 3, stride=2), outputs=64), (64, 4, 4)),
    "a convolution at one position": (lambda: flat(nn.Conv2d(3, 8, 4), outputs=8), (3, 4, 4)),
    "channels after positions": (lambda: flat(nn.GroupNorm(2, 4), nn.Linear(4, 3), outputs=3), (4,)),
    "branches": (Branches, (2, 8, 8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_a_loop_over_records(name):
    build, shape = MODELS[name]
    assert agrees(seeded(3, build), draw(2, 7, *shape))


@pytest.mark.parametrize("in_place", [True, False])
def test_tokens_and_a_layer_that_is_used_three_times(in_place):
    tokens = torch.randint(20, (6, 7), generator=torch.Generator().manual_seed(2))
    assert agrees(seeded(3, lambda: Attention(in_place=in_place)), tokens)


def test_both_ways_to_a_norm_are_among_the_models():
    assert not ghost_is_cheaper(6, 4, 3)  # "narrow sequence"
    assert ghost_is_cheaper(2, 90, 80)  # "wide sequence"
    assert ghost_is_cheaper(1, 576, 64)  # "wide convolution"
    assert not ghost_is_cheaper(88, 9, 8)  # "convolutions"


LAYERS = [
    lambda c, g: (nn.Conv2d(c, 2 * g, 3, padding=1, bias=bool(g % 2)), 2 * g),
    lambda c, g: (nn.Conv2d(c, 2 * g, 1), 2 * g),
    lambda c, g: (nn.Conv2d(c, 10, (1, 3), padding="same"), 10),
    lambda c, _: (nn.GroupNorm(1, c), c),
    lambda c, _: (nn.Tanh(), c),
    lambda c, _: (nn.AvgPool2d(3, 1, 1), c),
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(LAYERS) - 1), st.integers(1, 6)), max_size=5),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_any_stack_of_layers_any_batch_and_any_pieces(choices, records, chunk, seed):
    def build():
        layers, channels = [], 2
        for kind, growth in choices:
            layer, channels = LAYERS[kind](channels, growth)
            layers.append(layer)
        return flat(*layers, outputs=channels * 25)

    assert agrees(seeded(seed, build), draw(seed, records, 2, 5, 5), chunk=chunk)


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["2.weight"], ["4.weight"]])
@pytest.mark.parametrize("kind", ["convolution", "sequence"])
def test_frozen_parameters_are_left_out_of_norm_and_sum(frozen, kind):
    def image():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, CLASSES))

    def sequence():
        return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.LayerNorm(4), nn.Flatten(), nn.Linear(24, CLASSES))

    model = seeded(3, image if kind == "convolution" else sequence)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    assert agrees(model, draw(2, 5, 1, 6, 6) if kind == "convolution" else draw(2, 5, 6, 6))


def test_the_norm_is_over_all_parameters_together():
    model = seeded(3, MODELS["convolutions"][0])
    inputs, labels = draw(2, 1, 1, 8, 11), labels_of(1, 1)
    norm = float(gradient_of_one(model, inputs, labels).norm())
    add = PerRecordSum(model, loss)
    assert float(add(inputs, labels, norm / 3).double().norm()) == pytest.approx(norm / 3, rel=2e-4)
    assert float(add(inputs, labels, norm * 1.01).double().norm()) == pytest.approx(norm, rel=1e-5)


def test_an_empty_batch_sums_to_zeros():
    build, shape = MODELS["convolutions"]
    total = PerRecordSum(seeded(3, build), loss)(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.long), 1.0)
    assert not total.any()


def test_views_in_the_shapes_of_the_parameters():
    model = seeded(3, MODELS["convolutions"][0])
    add = PerRecordSum(model, loss)
    pieces = add.split(add(draw(2, 4, 1, 8, 11), labels_of(1, 4), 1.0))
    assert [p.shape for p in pieces] == [p.shape for p in model.parameters()]


# Records that are not finite


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize(
    "name", ["mlp", "convolutions", "wide convolution", "wide sequence", "narrow sequence", "sound"]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_record_that_is_not_finite_contributes_nothing_and_changes_nothing_else(name, poison):
    build, shape = MODELS[name]
    inputs, labels, add = draw(2, 7, *shape), labels_of(1, 7), PerRecordSum(seeded(3, build), loss)
    broken = inputs.clone()
    broken[3].view(-1)[::2] = poison
    others = [0, 1, 2, 4, 5, 6]
    found, wanted = add(broken, labels, 1.0), add(inputs[others], labels[others], 1.0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "wide convolution", "wide sequence", "narrow sequence", "convolutions"])
def test_zero_times_nan_is_not_added(name):
    """What went in is not finite, but the gradient at what came out is an honest 0."""
    build, shape = MODELS[name]
    inputs, weights = draw(2, 5, *shape), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])

    def weighted(outputs, its_weights):
        return (outputs.sum(1) * its_weights).sum()

    broken = inputs.clone()
    broken[2] = math.nan
    add = PerRecordSum(seeded(3, build), weighted)
    torch.testing.assert_close(add(broken, weights, 1.0), add(inputs, weights, 1.0))  # whose record 2 weighs nothing


def test_a_record_that_cannot_be_used_is_masked_in_every_kind_of_layer():
    """Each layer's own part, with a gradient that the mask, and nothing else, keeps out."""
    layers = {
        nn.Linear(3, 4): (3,),
        nn.Conv2d(2, 4, 3): (2, 5, 5),
        nn.Conv2d(9, 4, 3): (9, 5, 5),
        nn.Conv2d(64, 64, 3): (64, 4, 4),
        nn.GroupNorm(2, 4): (4, 3, 3),
        nn.LayerNorm(4): (3, 4),
        nn.RMSNorm(4): (3, 4),
    }
    for layer, shape in layers.items():
        inputs = draw(1, 3, *shape)
        out, kept = KINDS[type(layer)].call(layer, inputs)
        gradient = torch.ones_like(out)
        gradient[1] = math.nan
        part = KINDS[type(layer)].part(layer, [Use(inputs=inputs, gradient=gradient, kept=kept)])
        places = [torch.zeros(parameter.numel()) for parameter in layer.parameters()]
        with torch.no_grad():
            part.add(places, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, False, True]))
        assert all(torch.isfinite(place).all() and place.any() for place in places), layer
        size = sum(parameter.numel() for parameter in layer.parameters())
        assert norm_from_above([part], records=3, parameters=size).isfinite().tolist() == [True, False, True], layer


# Norms that are made to come out too small


def kept_below(build, inputs, its_loss, bound=1.0):
    """What each record by itself adds, for records of any values, is at most C."""
    add = PerRecordSum(build, its_loss)
    norms = [float(add(inputs[[i]], torch.zeros(1), bound).double().norm()) for i in range(len(inputs))]
    assert max(norms) <= bound
    return norms


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1.0, 1e6, 1e12, 1e18])
@pytest.mark.parametrize("width", [1, 8, 784, 5000])
def test_no_record_of_any_size_adds_more_than_c(width, scale):
    model = seeded(3, lambda: nn.Linear(width, 6))
    inputs = draw(2, 5, width) * scale * torch.logspace(-9, 0, 5)[:, None]

    def steep(outputs, _):
        return (outputs * 1e3).sum()

    norms = kept_below(model, inputs, steep)
    assert max(norms) >= 1.0 - 1e-3


def test_values_so_small_that_their_squares_vanish_are_counted():
    """Inputs of 1e-23, whose squares float32 does not hold, under a loss that makes them matter."""

    def steep(outputs, _):
        return outputs.sum() * 1e18

    gradients = 20 * 1e-23 * 1e18
    kept_below(nn.Linear(400, 1, bias=False), torch.full((1, 400), 1e-23), steep, bound=gradients / 2)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (5000,)])
def test_inputs_so_large_that_the_rest_would_be_denormal_count_as_not_finite(shape):
    """The clip factor times the output gradient would have fewer digits than the clip's slack needs."""
    model = nn.Linear(shape[-1], 64, bias=False)

    def gentle(outputs, _):
        return outputs.sum() * 1e-9

    assert not PerRecordSum(model, gentle)(torch.full((1, *shape), 1e30), torch.zeros(1), 1.0).any()
    assert PerRecordSum(model, gentle)(torch.full((1, *shape), 1e12), torch.zeros(1), 1.0).any()


@pytest.mark.parametrize("kind", ["sequence", "convolution"])
@pytest.mark.parametrize("leftover", [0.0, 1e-7, 1e-4, 1e-2])
def test_positions_that_cancel_do_not_hide_a_norm(kind, leftover):
    """Gradients +v, -v at two positions of nearly the same input: Gram matrices are large, their sum is not."""
    positions, width = 4, 64
    base = draw(5, 1, width) * 1e3
    inputs = (base + leftover * draw(6, positions, width))[None]
    direction = draw(7, 1, width) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * 1e3  # (positions, width)

    def pull(outputs, _):
        return (outputs * direction).sum()

    model = nn.Linear(width, width, bias=False)
    if kind == "convolution":
        model, inputs, direction = nn.Conv1d(width, width, 1, bias=False), inputs.mT, direction.mT
    assert ghost_is_cheaper(positions, width, width)
    kept_below(model, inputs, pull)


def test_the_gram_matrices_of_float32_would_have_hidden_it():
    """The negative control: without float64, the norm is less than half of the true one."""
    inputs, gradient = draw(5, 1, 1, 64) * 1e3 + 1e-3 * draw(6, 1, 4, 64), draw(7, 1, 1, 64).repeat(1, 4, 1)
    gradient *= torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    true = float(torch.linalg.norm((gradient.double().mT @ inputs.double())[0]))
    naive = float(((inputs @ inputs.mT) * (gradient @ gradient.mT)).sum().clamp(min=0.0).sqrt())
    part = from_factors(inputs, gradient, [], lambda *_: None)
    ours = float(norm_from_above([part], records=1, parameters=64 * 64))
    assert not 0.5 * true <= naive <= 2.0 * true
    assert true <= ours


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 12), st.integers(0, 12))
def test_a_norm_is_never_less_than_the_true_one(seed, positions, range_in, range_out):
    """Inputs and gradients over many orders of magnitude, nearly collinear or not."""
    generator = np.random.default_rng(seed)

    def values(width, orders):
        sizes = 10.0 ** generator.uniform(-orders, orders / 2, (3, positions, width))
        shared = generator.normal(size=(3, 1, width)) * generator.choice([0.0, 1.0, 1e4])
        return torch.from_numpy((generator.normal(size=sizes.shape) * sizes + shared).astype(np.float32))

    inputs, gradient = values(40, range_in), values(30, range_out)
    part = from_factors(inputs, gradient, [], lambda *_: None)
    norms = norm_from_above([part], records=3, parameters=1200)
    true = torch.linalg.matrix_norm(gradient.double().mT @ inputs.double())
    assert bool((norms >= true).all())


# Layers that are not known, and uses that cannot be told apart


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) * self.scale


def test_layers_that_are_not_known_are_named():
    class Other(nn.Linear):
        pass

    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 3),
            "lstm": nn.LSTM(3, 3),
            "bag": Bag(),
            "other": Other(3, 3),
            "tied": tied,
            "sparse": nn.Embedding(4, 3, sparse=True),
            "wide": nn.Linear(3, 3).double(),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    wanted = ["lstm", "bag", "other", "tied.0", "tied.1", "sparse", "wide", "attention", "attention.out_proj"]
    assert unsupported_layers(model) == wanted
    with pytest.raises(ValueError, match="lstm, bag"):
        PerRecordSum(model, loss)


def test_frozen_layers_may_be_of_any_kind():
    model = nn.Sequential(Bag().requires_grad_(False), nn.Linear(3, CLASSES))
    assert agrees(model, draw(2, 4, 3))


def test_a_first_dimension_that_is_not_the_records_is_an_error():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.out(self.inner(x.transpose(0, 1)).mean(0))

    with pytest.raises(RecordsUnclear, match="first dimension"):
        PerRecordSum(Swapped(), loss)(draw(1, 4, 6, 3), labels_of(1, 4), 1.0)


def test_an_input_that_is_changed_after_the_layer_saw_it_is_an_error():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.out = nn.Linear(3, 3), nn.GroupNorm(1, 3), nn.Linear(3, CLASSES)

        def forward(self, x):
            h = self.first(x)
            out = self.out(h)
            return out + h.mul_(2.0).sum()

    with pytest.raises(RuntimeError):
        PerRecordSum(Changing(), loss)(draw(1, 4, 3), labels_of(1, 4), 1.0)


def test_a_call_that_was_interrupted_leaves_nothing_behind():
    model = seeded(3, MODELS["convolutions"][0])
    before = {id(module): set(vars(module)) for module in model.modules()}
    inputs, labels = draw(2, 8, 1, 8, 11), labels_of(1, 8)
    wanted, calls = PerRecordSum(model, loss, chunk=3)(inputs, labels, 1.0), []

    def interrupted(outputs, its_labels):
        calls.append(len(outputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(outputs, its_labels)

    add = PerRecordSum(model, interrupted, chunk=3)
    with pytest.raises(KeyboardInterrupt):
        add(inputs + 1, labels, 1.0)
    assert calls == [3, 3]
    assert {id(module): set(vars(module)) for module in model.modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(add(inputs, labels, 1.0), wanted)


def test_a_batch_is_taken_in_pieces_that_hold_every_record_once():
    seen = []

    def counted(outputs, labels):
        seen.extend(labels.tolist())
        return loss(outputs, labels % CLASSES)

    add = PerRecordSum(seeded(3, MODELS["mlp"][0]), counted, chunk=16)
    add(draw(2, 50, 20), torch.arange(50), 1.0)
    assert seen == list(range(50))
