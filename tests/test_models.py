"""One battery over every model family: shapes, records apart, sums of gradients, training, artifacts. And oracles."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tacit.devices.interface import Interface
from tacit.federated.clipping import CLIP_SLACK
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.mixing import near, refuse_mixing_layers, refuse_mixing_records
from tacit.federated.models import FAMILIES, build_family
from tacit.federated.models_attention import EncoderLayer
from tacit.federated.models_image import InvertedResidual, ResidualStack
from tacit.federated.models_parts import ACTIVATIONS
from tacit.federated.models_sequence import GruLayer, LstmLayer
from tacit.federated.noise import SeededGenerator
from tacit.federated.per_record import PerRecordSum, unsupported_layers
from tacit.federated.task import Records, Task
from tacit.federated.train import LocalTrainer

OUTPUTS = 4
FLAT, IMAGE, SEQUENCE = (7,), (2, 12, 11), (3, 9)
# Odd sizes, not square, where patches and steps do not divide them, and as small as a family allows.
ODD_IMAGES = [(1, 13, 10), (3, 21, 5), (2, 3, 2)]
SHAPES = {
    "mlp": [FLAT, IMAGE, SEQUENCE, (1,)],
    "autoencoder": [FLAT, IMAGE, SEQUENCE, (1,)],
    "cnn": [IMAGE, *ODD_IMAGES],
    **{family: [IMAGE, *ODD_IMAGES, (1, 1, 1)] for family in ("ds-cnn", "resnet-8", "mobilenet", "vit-tiny")},
    "conv1d": [SEQUENCE, (1, 1), (5, 43)],
    **{family: [SEQUENCE, (1, 1), (2, 67)] for family in ("gru", "lstm", "transformer")},
}
SMALL = {
    "mlp": {"hidden": [9, 5]},
    "autoencoder": {"hidden": [9, 3]},
    "cnn": {"channels": [4, 8]},
    "ds-cnn": {"channels": [8, 8, 12]},
    "resnet-8": {"channels": [4, 8, 8], "groups": 2},
    "mobilenet": {"channels": [4, 8, 8], "depth": 2, "groups": 2},
    "vit-tiny": {"width": 8, "depth": 2, "heads": 2, "patch": 5},
    "conv1d": {"channels": [4, 8], "groups": 2},
    "gru": {"width": 6, "depth": 2},
    "lstm": {"width": 6, "depth": 2, "patch": 2},
    "transformer": {"width": 8, "heads": 2, "patch": 2},
}
CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]
NORMED = [name for name, family in FAMILIES.items() if "norm" in family.parameters]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize(("family", "shape"), CASES)


def seeded(family, shape, seed=3, **parameters):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_family({"family": family, **parameters}, shape=shape, outputs=OUTPUTS)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters())


def shaken(model):
    """Normalisations begin at ones and zeros, which would hide a mistake."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def draw(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(family):
    """Classes by cross-entropy; an autoencoder is asked for numbers of the example's shape."""
    if family == "autoencoder":
        return lambda outputs, targets: F.mse_loss(outputs, targets, reduction="sum")
    return lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum")


def targets_of(family, inputs):
    return inputs if family == "autoencoder" else torch.arange(len(inputs)) % OUTPUTS


def naive_sum(model, loss, inputs, targets, bound):
    """One record at a time with plain autograd, in float64."""
    total = 0.0
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(loss(model(inputs[[i]]), targets[[i]]), list(model.parameters()))
        gradient = torch.cat([g.flatten().double() for g in gradients])
        total = total + gradient * min(1.0, bound * CLIP_SLACK / float(gradient.norm()))
    return total


def test_the_battery_knows_every_family():
    assert set(SHAPES) == set(SMALL) == set(FAMILIES)


@every_case
def test_a_family_builds_answers_and_keeps_nothing_but_parameters(family, shape):
    model = seeded(family, shape)
    wanted = shape if family == "autoencoder" else (OUTPUTS,)
    outputs = model(draw(5, *shape))
    assert outputs.shape == (5, *wanted)
    assert bool(outputs.isfinite().all())
    assert list(model.buffers()) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_case
def test_records_stay_apart(family, shape):
    model = shaken(seeded(family, shape, **SMALL[family])).train()
    refuse_mixing_layers(model)
    refuse_mixing_records(model, draw(4, *shape))


@every_case
def test_sums_by_record_need_no_opacus_and_are_those_of_a_loop_over_records(family, shape):
    model = shaken(seeded(family, shape, **SMALL[family]))
    assert unsupported_layers(model) == []
    inputs, loss = draw(4, *shape), loss_of(family)
    targets = targets_of(family, inputs)
    add = PerRecordSum(model, loss)
    for bound in (0.05, 1.0, math.inf):
        found, wanted = add(inputs, targets, bound).double(), naive_sum(model, loss, inputs, targets, bound)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()) + 1e-9, bound


def trainer_of(family, shape, **changed):
    labels = tuple(map(str, range(OUTPUTS)))
    model = seeded(family, shape, **SMALL[family])
    task = Task(name="t", title="t", interface=Interface(shape=shape, labels=labels), load=None, build=None)
    settings = {"sample_rate": 0.5, "max_grad_norm": 1.0, "noise_multiplier": 1e-3, "reference_size": 48}
    fixed = {"unit": "record", "steps_per_round": 1, "rounds": 1, "delta": 1e-5}
    return LocalTrainer(task, model, Mechanism(**{**settings, **fixed, **changed}), learning_rate=0.5), model


@torch.no_grad()
def mean_loss(model, inputs, labels):
    return float(F.cross_entropy(model(inputs), labels))


CLASSIFIERS = [family for family in FAMILIES if family != "autoencoder"]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_private_steps_make_the_loss_fall(family):
    shape = SHAPES[family][0]
    trainer, model = trainer_of(family, shape)
    inputs, labels = draw(24, *shape), torch.arange(24) % OUTPUTS
    inputs = inputs + 2.0 * draw(OUTPUTS, *shape, seed=7)[labels]  # each class around a point of its own
    batch, randomness = Records(inputs.numpy(), labels.numpy()), SeededGenerator(11)
    before = mean_loss(model, inputs, labels)
    for _ in range(60):
        trainer.step(batch, randomness)
    assert mean_loss(model, inputs, labels) < 0.8 * before


def test_an_autoencoder_learns_to_rebuild_what_it_sees():
    model, inputs = seeded("autoencoder", IMAGE, hidden=[32, 4]), draw(1, *IMAGE).expand(8, -1, -1, -1) * 0.5
    add, parameters = PerRecordSum(model, loss_of("autoencoder")), list(model.parameters())
    before = float(F.mse_loss(model(inputs), inputs).detach())
    for _ in range(30):
        with torch.no_grad():
            for parameter, step in zip(parameters, add.split(add(inputs, inputs, 1.0)), strict=True):
                parameter.sub_(0.02 * step)
    assert float(F.mse_loss(model(inputs), inputs).detach()) < 0.8 * before


@pytest.mark.soak
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_hardened_noise_which_needs_every_records_gradient_takes_every_family(family):
    shape = SHAPES[family][0]
    trainer, _ = trainer_of(family, shape, hardened=True)
    trainer.step(Records(draw(4, *shape).numpy(), np.arange(4)), SeededGenerator(11))


@every_family
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(family):
    shape = SHAPES[family][0]
    first, again, other = (weights(seeded(family, shape, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_family
def test_settings_that_a_recipe_always_gives_change_nothing_where_they_are_not_used(family):
    given = {"groups": 4, "norm": "group", "activation": None, "channels": None, "hidden": None, "width": None}
    shape = SHAPES[family][0]
    assert torch.equal(weights(seeded(family, shape)), weights(seeded(family, shape, **given)))
    build_family({"family": family, "groups": 2, "norm": "none", "activation": "tanh"}, shape=shape, outputs=2)


@every_family
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_used_by_every_family_that_takes_one(family, activation):
    model = seeded(family, SHAPES[family][0], **SMALL[family], activation=activation)
    used = {type(layer) for layer in model.modules()} & set(ACTIVATIONS.values())
    assert used == ({ACTIVATIONS[activation]} if "activation" in FAMILIES[family].parameters else set())


@pytest.mark.parametrize("family", NORMED)
def test_batch_norm_stands_where_group_norm_stood_and_is_refused_with_privacy(family):
    shape = SHAPES[family][0]
    counts = {}
    for norm in ("group", "batch", "none"):
        layers = list(seeded(family, shape, **SMALL[family], norm=norm).modules())
        counts[norm] = [
            sum(isinstance(layer, kind) for layer in layers) for kind in (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
        ]
    (groups, none), *others = counts["group"], counts["batch"], counts["none"]
    assert groups > 0
    assert (none, *others) == (0, [0, groups], [0, 0])
    model = seeded(family, shape, **SMALL[family], norm="batch")
    assert model.train()(draw(3, *shape)).shape == (3, OUTPUTS)
    with pytest.raises(PrivacyRefused, match="GroupNorm"):
        refuse_mixing_layers(model)


def test_the_digits_network_has_the_layers_that_other_code_relies_on():
    names = ["Conv2d", "GroupNorm", "ReLU", "Conv2d", "GroupNorm", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    model = build_family({}, shape=(1, 8, 8), outputs=10)
    assert [type(layer).__name__ for layer in model] == names
    assert sum(parameter.numel() for parameter in model.parameters()) == 10026


def test_resnet_8_and_ds_cnn_have_mlperf_tinys_parameters():
    """Its Keras models count 78,666 and 24,908, with two running statistics for each of 240 and 576 normed channels."""
    resnet = build_family({"family": "resnet-8"}, shape=(3, 32, 32), outputs=10)
    assert sum(parameter.numel() for parameter in resnet.parameters()) == 78_666 - 2 * 240
    ds_cnn = build_family({"family": "ds-cnn"}, shape=(1, 49, 10), outputs=12)
    first_kernel = (10 * 4 - 3 * 3) * 64  # the one difference
    assert sum(parameter.numel() for parameter in ds_cnn.parameters()) == 24_908 - 2 * 576 - first_kernel


def multiply_accumulates(model, shape):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def test_resnet_8_does_mlperf_tinys_work():
    """12.5 million multiply-accumulates: of convolutions by kernel, channels and positions, and of the last layer."""
    stacks = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]  # channels in and out, side after
    convolutions = sum(9 * (i * o + o * o) * s * s + (i != o) * i * o * s * s for i, o, s in stacks)
    wanted = 9 * 3 * 16 * 32 * 32 + convolutions + 64 * 10
    assert wanted == 12_501_632
    assert (
        multiply_accumulates(build_family({"family": "resnet-8"}, shape=(3, 32, 32), outputs=10), (3, 32, 32)) == wanted
    )


def test_a_mobilenet_has_the_parameters_of_its_plan():
    def convolution(kernel, channels, out):
        return kernel * kernel * channels * out + out + 2 * out  # weights, biases, and the norm's after it

    wanted, previous = convolution(3, 1, 16), 16
    for stage, out in enumerate((16, 24, 32, 64)):
        for _ in range(2):
            wide = 6 * previous if stage else previous
            wanted += (convolution(1, previous, wide) if stage else 0) + convolution(3, 1, wide)
            wanted += convolution(1, wide, out)
            previous = out
    model = build_family({"family": "mobilenet"}, shape=(1, 32, 32), outputs=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted + 64 * 10 + 10


@pytest.mark.parametrize("kind", [ResidualStack, partial(InvertedResidual, expansion=6)])
def test_a_residual_block_adds_what_came_in(kind):
    settings = {"stride": 1, "groups": 2, "norm": "group", "activation": "relu"}
    block, inputs = shaken(kind(4, 4, **settings)), draw(3, 4, 6, 5).abs()
    before = block.body(inputs)
    for parameter in block.body[-1].parameters():
        nn.init.zeros_(parameter)
    assert not near(before, torch.zeros_like(before))
    torch.testing.assert_close(block(inputs), inputs)
    wider = shaken(kind(4, 8, **settings))
    summed = isinstance(wider, ResidualStack)
    wanted = F.relu(wider.body(inputs) + wider.shortcut(inputs)) if summed else wider.body(inputs)
    torch.testing.assert_close(wider(inputs), wanted)


def test_an_autoencoder_goes_down_to_its_bottleneck_and_back():
    layers = seeded("autoencoder", (3, 4), hidden=[10, 7, 2])
    widths = [layer.in_features for layer in layers if isinstance(layer, nn.Linear)]
    assert widths == [12, 10, 7, 2, 7, 10]


@pytest.mark.parametrize(("kind", "torchs"), [(LstmLayer, nn.LSTM), (GruLayer, nn.GRU)])
def test_a_recurrent_layer_is_torchs(kind, torchs):
    ours, oracle = shaken(kind(3, 5)), torchs(3, 5, batch_first=True)
    with torch.no_grad():
        oracle.weight_ih_l0.copy_(ours.of_input.weight)
        oracle.weight_hh_l0.copy_(ours.of_state.weight)
        oracle.bias_ih_l0.copy_(ours.of_input.bias)
        oracle.bias_hh_l0.copy_(ours.of_state.bias)
    inputs, weight = draw(4, 11, 3), draw(4, 11, 5, seed=8)
    found, wanted = ours(inputs), oracle(inputs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    of_ours = torch.autograd.grad((found * weight).sum(), [ours.of_input.weight, ours.of_state.weight])
    of_oracle = torch.autograd.grad((wanted * weight).sum(), [oracle.weight_ih_l0, oracle.weight_hh_l0])
    torch.testing.assert_close(of_ours, of_oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "torchs"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_a_recurrent_family_is_torchs_layers_on_joined_steps_and_its_last_state(family, torchs):
    model = shaken(seeded(family, (3, 7), width=5, depth=2, patch=2))
    oracle, (first, second), last = torchs(6, 5, num_layers=2, batch_first=True), model[1:3], model[-1]
    with torch.no_grad():
        for index, layer in enumerate((first, second)):
            for kind, part in (("ih", layer.of_input), ("hh", layer.of_state)):
                getattr(oracle, f"weight_{kind}_l{index}").copy_(part.weight)
                getattr(oracle, f"bias_{kind}_l{index}").copy_(part.bias)
    inputs = draw(4, 3, 7)
    rows = F.pad(inputs, (0, 1)).transpose(1, 2)
    joined = torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=2)  # two time steps after one another
    torch.testing.assert_close(model(inputs), last(oracle(joined)[0][:, -1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_encoder_layer_is_torchs(activation):
    ours = shaken(EncoderLayer(12, 3, activation=activation))
    oracle = nn.TransformerEncoderLayer(
        12, 3, dim_feedforward=48, dropout=0.0, activation=activation, norm_first=True, batch_first=True
    )
    projections = (ours.query, ours.key, ours.value)
    pairs = [
        (oracle.self_attn.in_proj_weight, torch.cat([layer.weight for layer in projections])),
        (oracle.self_attn.in_proj_bias, torch.cat([layer.bias for layer in projections])),
    ]
    layers = [
        (oracle.self_attn.out_proj, ours.joined),
        (oracle.linear1, ours.up),
        (oracle.linear2, ours.down),
        (oracle.norm1, ours.before_attention),
        (oracle.norm2, ours.before_feedforward),
    ]
    pairs += [pair for theirs, layer in layers for pair in ((theirs.weight, layer.weight), (theirs.bias, layer.bias))]
    with torch.no_grad():
        for theirs, value in pairs:
            theirs.copy_(value)
    inputs = draw(4, 7, 12)
    torch.testing.assert_close(ours(inputs), oracle(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "axis"), [("transformer", 2), ("vit-tiny", 3)])
def test_positions_are_told_apart(family, axis):
    shape = (3, 8) if family == "transformer" else (3, 8, 8)
    model, inputs = shaken(seeded(family, shape, width=8, heads=2, patch=1)), draw(2, *shape)
    assert not near(model(inputs.flip(axis)), model(inputs))
    embedding = next(layer for layer in model.modules() if isinstance(layer, nn.Embedding))
    nn.init.zeros_(embedding.weight)
    assert near(model(inputs.flip(axis)), model(inputs))


@pytest.mark.parametrize("family", ["gru", "lstm", "transformer"])
def test_a_long_sequence_is_joined_to_64_steps_at_most(family):
    steps = [seeded(family, (1, time))[0](torch.zeros(1, 1, time)).shape[1] for time in (1, 64, 65, 128, 1000)]
    assert steps == [1, 64, 33, 64, 63]


REFUSED = [
    ({"family": "cmn"}, IMAGE, "did you mean 'cnn'"),
    ({"family": 3}, IMAGE, "family=3"),
    ({"family": "mlp", "channels": [8]}, FLAT, r"activation, hidden for family='mlp', got channels=\[8\]; remove"),
    ({"family": "mlp", "hiden": [8]}, FLAT, "hiden"),
    ({"family": "conv1d"}, IMAGE, r"\(channels, time\) for family='conv1d', got shape=\(2, 12, 11\)"),
    ({"family": "lstm"}, FLAT, r"\(channels, time\)"),
    ({"family": "gru"}, IMAGE, r"\(channels, time\)"),
    ({"family": "transformer"}, IMAGE, r"\(channels, time\)"),
    ({"family": "cnn"}, SEQUENCE, r"\(channels, height, width\)"),
    ({"family": "vit-tiny"}, SEQUENCE, r"\(channels, height, width\)"),
    ({"family": "mobilenet"}, FLAT, r"\(channels, height, width\)"),
    ({"family": "ds-cnn"}, FLAT, r"\(channels, height, width\)"),
    ({"family": "resnet-8"}, FLAT, r"\(channels, height, width\)"),
    ({"family": "cnn"}, (1, 8, 1), "height and width of at least 2"),
    ({"family": "cnn", "channels": [6]}, IMAGE, "groups=4 divides, got channels=6; change"),
    ({"family": "conv1d", "groups": 5}, SEQUENCE, "groups=5 divides"),
    ({"family": "resnet-8", "channels": [4, 8]}, IMAGE, "three widths"),
    ({"family": "transformer", "width": 9}, SEQUENCE, "heads=4 divides, got width=9; change"),
    ({"family": "vit-tiny", "heads": 3}, IMAGE, "heads=3 divides"),
    ({"family": "cnn", "channels": []}, IMAGE, "at least one width"),
    ({"family": "autoencoder", "hidden": []}, FLAT, "bottleneck"),
    ({"family": "cnn", "channels": [8, 0]}, IMAGE, "whole numbers of at least 1"),
    ({"family": "cnn", "channels": 8}, IMAGE, "a list of whole numbers"),
    ({"family": "gru", "width": 2.5}, SEQUENCE, "width=2.5"),
    ({"family": "gru", "depth": True}, SEQUENCE, "depth=True"),
    ({"family": "gru", "activation": "swish"}, SEQUENCE, "activation among relu"),
    ({"family": "mlp", "norm": "layer"}, FLAT, "norm among group"),
    ({"family": "mlp"}, (0,), "positive sizes"),
    ({"family": "mlp"}, (), "positive sizes"),
]


@pytest.mark.parametrize(("parameters", "shape", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(parameters, shape, message):
    with pytest.raises(ValueError, match=message):
        build_family(parameters, shape=shape, outputs=OUTPUTS)


OWN = """
import math
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, outputs, width=4):
        super().__init__()
        self.width = width
        self.norm = nn.BatchNorm1d(math.prod(shape))
        self.out = nn.Linear(math.prod(shape), outputs)

    def forward(self, x):
        return self.out(self.norm(x.flatten(1)))

def seven(*, depth):
    return nn.Linear(7, 4 * depth)

def anything(**given):
    net = nn.Linear(7, given["outputs"])
    net.given = given
    return net

def raises(shape):
    raise OSError("no weights here")

def nothing():
    return 3

def infinite():
    return nn.Sequential(nn.Linear(7, 4), nn.Threshold(math.inf, math.nan))

def narrow():
    return nn.Linear(6, 4)

def tuples():
    return nn.LSTM(7, 4)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, **given: build_family({"family": name, **given}, shape=FLAT, outputs=OUTPUTS)


def test_a_model_of_the_users_own_gets_what_its_signature_names(own):
    net = own("own_models:Net", width=9, groups=4, norm="group", heads=None)
    assert (net.width, net.out.out_features, net.training) == (9, OUTPUTS, True)
    assert int(net.norm.num_batches_tracked) == 0, "trying it must leave no trace"
    assert own("own_models:Net").width == 4
    assert own("own_models:seven", depth=1).out_features == 4
    given = own("own_models:anything", heads=2, norm="none").given
    assert given == {"shape": FLAT, "outputs": OUTPUTS, "heads": 2, "norm": "none"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_missing:Net", "importable, got ModuleNotFoundError.*PYTHONPATH"),
        ("own_models:Nut", "importable, got AttributeError"),
        ("own_broken:Net", "importable, got SyntaxError"),
        (":Net", "importable"),
        ("own_models:", "importable"),
        ("own_models:number", "an nn.Module class or a function that returns a model, got int"),
        ("own_models:raises", "build a model from shape, got OSError: no weights here"),
        ("own_models:seven", "got TypeError"),
        ("own_models:nothing", "return an nn.Module, got int"),
        ("own_models:infinite", "finite"),
        ("own_models:narrow", r"take an input of shape \(1, 7\), got RuntimeError"),
        ("own_models:tuples", r"a tensor of shape \(1, 4\), got tuple"),
    ],
)
def test_a_model_of_the_users_own_that_cannot_be_used_is_refused_in_words(own, name, message):
    with pytest.raises(ValueError, match=message):
        own(name)


def test_a_key_or_width_that_a_model_of_the_users_own_does_not_know_is_refused(own):
    with pytest.raises(ValueError, match=r"keys among width for .* got depth=2"):
        own("own_models:Net", depth=2)
    with pytest.raises(ValueError, match=r"shape \(1, 4\), got shape \(1, 8\)"):
        own("own_models:seven", depth=2)


@pytest.mark.soak
@pytest.mark.parametrize("form", ["onnx", "tflite"])
@every_family
def test_an_artifact_of_every_family_answers_as_its_model(family, form, tmp_path):
    shape = SHAPES[family][0]
    model, inputs, path = shaken(seeded(family, shape, **SMALL[family])).eval(), draw(3, *shape), tmp_path / f"m.{form}"
    found = (answers_of_onnx if form == "onnx" else answers_of_tflite)(model, inputs, path)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(inputs).numpy(), rtol=1e-4, atol=1e-5)


def answers_of_onnx(model, inputs, path):
    import onnxruntime

    from tacit.compression.export_onnx import export_onnx

    export_onnx(model, (inputs[:1],), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": inputs.numpy()})[0]


def answers_of_tflite(model, inputs, path):
    from ai_edge_litert.interpreter import Interpreter

    from tacit.compression.export_tflite import export_tflite
    from tacit.compression.silence import silenced

    export_tflite(model, (inputs[:1],), path)
    with silenced():  # LiteRT announces its delegate
        runner = Interpreter(str(path), num_threads=1).get_signature_runner("serving_default")
        # Channel last, one record at a time; an autoencoder's answer stays channel first.
        return np.concatenate([runner(input=np.moveaxis(x[None], 1, -1))["logits"] for x in inputs.numpy()])
