"""Modules nobody planned for reach ONNX Runtime in every form and agree there, or are refused by name."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

from tacit.compression import export_ort, quantize_onnx
from tacit.compression.export_onnx import SCALES, export_onnx, pool_before_relu, read_stamp_onnx, stamp_onnx
from tacit.compression.export_ort import convert_to_ort, read_stamp_ort, stamp_ort
from tacit.compression.export_ort import export_ort as write_ort_file
from tacit.compression.forms import FORMS, FormRefused, Source
from tacit.compression.norms import respell_norms
from tacit.compression.ort_file import read_ort, write_ort
from tacit.compression.parity import compare
from tacit.compression.targets import TARGETS, check_form
from tacit.compression.weights_onnx import shrink_weights
from tacit.devices.runtime import open_artifact

STAMP = {"privacy_sha256": "ab" * 32, "note": "é"}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.second, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16 * 16, 5)

    def forward(self, images):
        inner = F.relu(self.norm(self.first(images)))
        return self.last(F.max_pool2d(F.relu(inner + self.second(inner)), 2).flatten(1))


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Conv2d(1, 8, 3), nn.Linear(6, 8)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, image, row):
        joined = F.relu(self.image(image)).mean((2, 3)) + self.row(row)
        return self.left(joined), torch.softmax(self.right(joined), 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.heads, self.last = (
            nn.LayerNorm(16),
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.Linear(16, 4),
        )

    def forward(self, rows):
        normed = self.norm(rows)
        return self.last((rows + self.heads(normed, normed, normed, need_weights=False)[0]).mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, words):
        return self.last(self.table(words).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.steps = kind(8, 16, batch_first=True, **options)
        self.last = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, rows):
        return self.last(self.steps(rows)[0][:, -1])


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, rows):
        return torch.einsum("bti,hio->bho", rows, self.weight)


class OwnGroupNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.weight = nn.Conv2d(2, 6, 3), nn.Parameter(torch.rand(6))

    def forward(self, images):
        return F.group_norm(self.convolution(images), 3, self.weight).flatten(1)


class Fork(nn.Module):
    def forward(self, rows):
        return rows * 2 if rows.sum() > 0 else -rows


class OneExample(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 4)

    def forward(self, rows):
        return self.last(rows.view(1, 12))


class Chosen(nn.Module):
    def forward(self, rows):
        return rows[rows > 0]


class Singular(nn.Module):
    def forward(self, rows):
        return torch.linalg.svdvals(rows)


Chain = nn.Sequential

# Name -> module, shapes of its inputs; a shape that begins with "words" is of whole numbers.
QUICK = {
    "residual": (Residual, [(3, 8, 8)]),
    "two inputs and outputs": (TwoWays, [(1, 6, 6), (6,)]),
    "attention": (Attention, [(6, 16)]),
    "embedding": (Words, [("words", 9)]),
    "lstm": (lambda: Recurrent(nn.LSTM), [(5, 8)]),
    "grouped and dilated": (
        lambda: Chain(nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8),
              nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)), [(4, 9, 9)],
    ),
    "odd shape": (
        lambda: Chain(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.GroupNorm(3, 6), nn.ReLU(),
              nn.MaxPool2d(2, ceil_mode=True),
              nn.Flatten(), nn.Linear(24, 3)), [(1, 7, 5)],
    ),
}  # fmt: skip
SLOW = {
    "gru": (lambda: Recurrent(nn.GRU), [(5, 8)]),
    "plain recurrent": (lambda: Recurrent(nn.RNN), [(5, 8)]),
    "lstm of two layers, both ways": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), [(5, 8)]),
    "encoder layer": (
        lambda: Chain(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu"), nn.Flatten()),
        [(6, 16)],
    ),
    "layer norm and gelu": (
        lambda: Chain(nn.Linear(7, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8), nn.GELU(approximate="tanh")),
        [(7,)],
    ),
    "transposed convolution": (
        lambda: Chain(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1)),
        [(2, 8, 8)],
    ),
    "batch norm": (
        lambda: Chain(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
              nn.BatchNorm1d(4)),
        [(2, 6, 6)],
    ),
    "instance norm": (
        lambda: Chain(nn.Conv2d(2, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten()), [(2, 6, 6)],
    ),
    "adaptive pooling to an odd size": (
        lambda: Chain(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten()), [(3, 9, 9)],
    ),
    "adaptive greatest pooling": (
        lambda: Chain(nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), [(3, 9, 9)],
    ),
    "convolution over time": (
        lambda: Chain(nn.Conv1d(3, 8, 5, padding=2), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten()),
        [(3, 13)],
    ),
    "convolution over space": (
        lambda: Chain(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.ReLU(), nn.Flatten()), [(1, 4, 4, 4)],
    ),
    "group norm of rows": (lambda: Chain(nn.Linear(5, 24), nn.GroupNorm(3, 24), nn.Linear(24, 2)), [(5,)]),
    "group norm of a function": (OwnGroupNorm, [(2, 5, 5)]),
    "einsum": (Einsum, [(7, 6)]),
    "enlarging": (lambda: Chain(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 8, 3)), [(2, 5, 5)]),
    "many activations": (
        lambda: Chain(nn.Conv2d(3, 8, 3, padding="same"), nn.PReLU(8), nn.AvgPool2d(3, 2, 1), nn.LeakyReLU(), nn.ELU(),
              nn.Softplus(), nn.Hardswish(), nn.SiLU(), nn.Flatten()), [(3, 7, 7)],
    ),
}  # fmt: skip
MODULES = QUICK | SLOW


@dataclass(frozen=True)
class Made:
    """A module, exported, and what it answers."""

    source: Source
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[np.ndarray, ...]


def make(name: str, folder: Path) -> Made:
    build, shapes = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        inputs = tuple(
            torch.randint(0, 50, (24, *shape[1:])) if shape[0] == "words" else torch.randn(24, *shape)
            for shape in shapes
        )
    examples = tuple(torch.zeros_like(values[:1]) for values in inputs)
    export_onnx(model, examples, folder / "float.onnx")
    calibration = tuple(values.numpy() for values in inputs)
    source = Source(model=model, examples=examples, exported=folder / "float.onnx", calibration=calibration)
    with torch.no_grad():
        answers = model(*inputs)
    answers = answers if isinstance(answers, tuple) else (answers,)
    return Made(source, inputs, tuple(answer.numpy() for answer in answers))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> module, exported once."""
    found: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in found:
            found[name] = make(name, tmp_path_factory.mktemp("onnx"))
        return found[name]

    return get


def session_of(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Outputs in the artifact's own runtime, one example at a time, whole numbers given and read by their scales."""
    session = session_of(path)
    scales = json.loads(session.get_modelmeta().custom_metadata_map.get(SCALES, "{}"))

    def encoded(name: str, values: np.ndarray) -> np.ndarray:
        if name not in scales:
            return values
        scale, zero = scales[name]
        return np.clip(np.rint(values / np.float32(scale)) + zero, 0, 255).astype(np.uint8)

    def decoded(name: str, values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32) - scales[name][1]) * np.float32(scales[name][0]) if name in scales else values

    names, ends = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    rows = zip(*(values.numpy() for values in inputs), strict=True)
    answers = [session.run(ends, {n: encoded(n, v[None]) for n, v in zip(names, row, strict=True)}) for row in rows]
    return [decoded(end, np.concatenate(column)) for end, column in zip(ends, zip(*answers, strict=True), strict=True)]


def agrees(wanted: tuple[np.ndarray, ...], found: list[np.ndarray], label: str) -> bool:
    return len(wanted) == len(found) and all(
        compare(w.astype(np.float32), f.astype(np.float32), answers="values").passes(label)
        for w, f in zip(wanted, found, strict=True)
    )


def check_every_form(module: Made, folder: Path) -> set[str]:
    """Each form agrees, is the same bytes twice, and names nothing of this machine; returns those that are refused."""
    assert agrees(module.outputs, run(module.source.exported, module.inputs), "float32")
    refused = set()
    for form, write in quantize_onnx.FORMS.items():
        path = folder / f"{form}.onnx"
        try:
            write(module.source, path)
        except FormRefused:
            assert not path.exists()
            refused.add(form)
            continue
        found = run(path, module.inputs)
        if form == "weight_int4":  # of untrained weights, whose answers hardly differ: near in size is all to ask
            assert all(
                np.abs(w - f).max() <= 0.25 * np.abs(w).max() for w, f in zip(module.outputs, found, strict=True)
            )
        else:
            assert agrees(module.outputs, found, FORMS[form].label), form
        content = path.read_bytes()
        write(module.source, path)
        assert content == path.read_bytes()
        assert b"/home" not in content
        assert b".py" not in content
        onnx.checker.check_model(path)
    return refused


@pytest.mark.parametrize("name", QUICK)
def test_a_module_agrees_in_every_form(name, made, tmp_path):
    assert check_every_form(made(name), tmp_path) == set()


@pytest.mark.soak
@pytest.mark.parametrize("name", SLOW)
def test_a_rarer_module_agrees_or_is_refused(name, made, tmp_path):
    refused = check_every_form(made(name), tmp_path)
    assert refused <= {"dynamic_int8", "weight_int8", "weight_int4", "static_int8", "full_int8", "static_int16"}
    operators = {node.op_type for node in onnx.load(made(name).source.exported).graph.node}
    assert ("static_int8" in refused) == (not operators & {"Conv", "Gemm", "MatMul"})


def test_the_comparison_tells_a_damaged_artifact(made, tmp_path):
    """The negative control of the tests above: weights a quarter too large, or outputs in the wrong order, fail."""
    residual, two_ways = made("residual"), made("two inputs and outputs")
    model = onnx.load(residual.source.exported)
    for tensor in model.graph.initializer:
        if tensor.dims == [16, 16, 3, 3]:
            tensor.CopyFrom(numpy_helper.from_array(1.25 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    assert not agrees(residual.outputs, run(tmp_path / "damaged.onnx", residual.inputs), "weight-only int8")
    first, second = run(two_ways.source.exported, two_ways.inputs)
    with pytest.raises(ValueError, match="two arrays of one shape"):
        agrees(two_ways.outputs, [second, first], "float32")


def test_the_batch_is_free_in_attention_and_recurrent_layers_or_one_by_choice(made, tmp_path):
    for name in ("attention", "lstm", "two inputs and outputs"):
        module = made(name)
        session = session_of(module.source.exported)
        assert {node.shape[0] for node in (*session.get_inputs(), *session.get_outputs())} == {"batch"}
        feeds = {n.name: v.numpy() for n, v in zip(session.get_inputs(), module.inputs, strict=True)}
        for wanted, found in zip(module.outputs, session.run(None, feeds), strict=True):
            assert np.allclose(wanted, found, atol=1e-5)
    model = OneExample().eval()
    with pytest.raises(FormRefused, match=r"^the model \(OneExample\) cannot be exported: .*export with batch='one'$"):
        export_onnx(model, (torch.zeros(1, 12),), tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx").exists()
    export_onnx(model, (torch.zeros(1, 12),), tmp_path / "one.onnx", batch="one")
    rows = torch.randn(5, 12)
    with torch.no_grad():
        wanted = np.concatenate([model(row[None]).numpy() for row in rows])
    assert np.allclose(run(tmp_path / "one.onnx", (rows,))[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), Fork()), (4,), r"^layer '1' \(Fork\) cannot be exported: what it does depends"),
        (nn.Sequential(nn.ReLU(), Singular()), (3, 4), r"^layer '1' \(Singular\) .*no operator for aten._linalg_svd"),
        (Chosen(), (4,), r"^expected logits to have a batch axis and else fixed sizes"),
    ],
)
def test_what_onnx_cannot_hold_is_refused_in_a_line_with_the_layer(model, shape, message, tmp_path, capfd):
    with pytest.raises(FormRefused, match=message) as caught:
        export_onnx(model, (torch.ones(1, *shape),), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert "batch='one'" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_opset_and_batch_are_checked_and_an_opset_is_what_was_asked_for(tmp_path):
    model, example = nn.Linear(3, 2), (torch.zeros(1, 3),)
    for wrong in ({"opset": 17}, {"opset": 99}, {"batch": "two"}):
        with pytest.raises(ValueError, match="opset from 18 to 23"):
            export_onnx(model, example, tmp_path / "model.onnx", **wrong)
    export_onnx(model, example, tmp_path / "model.onnx", opset=21)
    assert [entry.version for entry in onnx.load(tmp_path / "model.onnx").opset_import] == [21]


def test_a_model_past_two_gigabytes_is_refused(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(2**15, 2**14)
    with pytest.raises(FormRefused, match="less than 2 GB"):
        export_onnx(model, (torch.zeros(1, 2**15),), tmp_path / "model.onnx")


# Norms and pools.


def group_norms() -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.GroupNorm(12, 12, eps=0.1), nn.GroupNorm(1, 12),
        nn.GroupNorm(4, 12, affine=False),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn_like(parameter))  # scales of both signs
        layers[0].bias.add_(100.0)  # far from 0, where a variance by squares alone would lose its digits
    return layers.eval()


@pytest.mark.parametrize("spelling", ["exporter", "layer", "instance", "batch"])
def test_every_spelling_of_group_norm_is_the_same_norm(spelling, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, images = group_norms(), torch.randn(6, 2, 7, 5)
    wanted = model(images).detach().numpy()
    respelled = respell_norms(model, spelling)
    assert np.allclose(respelled(images).detach().numpy(), wanted, atol=2e-3)
    export_onnx(model, (images[:1],), tmp_path / "model.onnx", norms=spelling)
    assert np.allclose(run(tmp_path / "model.onnx", (images,))[0], wanted, atol=2e-3)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert ("BatchNormalization" in operators) == (spelling == "batch")
    assert ("LayerNormalization" in operators) == (spelling == "layer")
    if spelling != "exporter":
        assert "Shape" not in operators
    assert type(model[1]) is nn.GroupNorm


def test_a_norm_that_is_a_user_s_own_is_left_alone_and_an_unknown_spelling_refused():
    class Own(nn.GroupNorm):
        pass

    hooked = nn.GroupNorm(2, 4)
    hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    respelled = respell_norms(nn.Sequential(Own(2, 4), hooked))
    assert type(respelled[0]) is Own
    assert type(respelled[1]) is nn.GroupNorm
    with pytest.raises(ValueError, match="expected spelling"):
        respell_norms(nn.ReLU(), "fast")


def test_relu_moves_behind_a_pool_unless_it_belongs_to_a_convolution_or_is_used_elsewhere():
    def swapped(*nodes, outputs=("y",)):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 6, 6])
        weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(2, 2, 1, 1)).astype(np.float32), "w")
        model = helper.make_model(
            helper.make_graph(nodes, "graph", [start], ends, [weight]), opset_imports=[helper.make_opsetid("", 18)]
        )
        images = {"x": np.random.default_rng(1).normal(size=(1, 2, 6, 6)).astype(np.float32)}
        before = ReferenceEvaluator(model).run(None, images)
        pool_before_relu(model)
        for old, new in zip(before, ReferenceEvaluator(model).run(None, images), strict=True):
            assert np.array_equal(old, new)
        return [node.op_type for node in model.graph.node]

    node, pool = helper.make_node, {"kernel_shape": [2, 2], "strides": [2, 2]}
    relu, pooled = node("Relu", ["n"], ["r"]), node("MaxPool", ["r"], ["y"], **pool)
    negated = node("Neg", ["x"], ["n"])
    assert swapped(negated, relu, pooled) == ["Neg", "MaxPool", "Relu"]
    assert swapped(negated, relu, pooled, outputs=("y", "r")) == ["Neg", "Relu", "MaxPool"]
    assert swapped(node("Conv", ["x", "w"], ["n"]), relu, pooled) == ["Conv", "Relu", "MaxPool"]
    twice = node("MaxPool", ["y"], ["z"], **pool)
    assert swapped(negated, relu, pooled, twice, outputs=("z",)) == ["Neg", "MaxPool", "MaxPool", "Relu"]


# Weights in fewer bits.


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("operator", "place", "shape", "kept", "attributes"),
    [
        ("Conv", 1, (8, 4, 3, 3), (0,), {}),
        ("Conv", 1, (8, 64, 1, 1), (0,), {}),
        ("ConvTranspose", 1, (8, 4, 3, 3), (1,), {}),
        ("Gemm", 1, (8, 64), (0,), {"transB": 1}),
        ("Gemm", 1, (64, 8), (1,), {}),
        ("MatMul", 1, (64, 8), (1,), {}),
        ("MatMul", 0, (8, 64), (0,), {}),
        ("Gather", 0, (20, 64), (0,), {}),
        ("LSTM", 1, (2, 16, 64), (0, 1), {}),
        ("GRU", 2, (1, 24, 8), (0, 1), {}),
    ],
)
def test_each_channel_keeps_its_own_precision(operator, place, shape, kept, attributes, bits):
    """The naive oracle: no weight is off by more than half a step of its own channel; they are a thousandfold apart."""
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.uniform(-2, 1, [n if axis in kept else 1 for axis, n in enumerate(shape)])
    values = (random.uniform(-1, 1, shape) * sizes).astype(np.float32)
    names = ["x", "x", "x"]
    names[place] = "w"
    node = helper.make_node(operator, names[: max(2, place + 1)], ["y"], **attributes)
    end = helper.make_tensor_value_info("w", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph([node], "graph", [], [end], [numpy_helper.from_array(values, "w")]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    shrink_weights(model, bits=bits)
    del model.graph.node[-1]
    (restored,) = ReferenceEvaluator(model).run(None, {})
    summed = tuple(axis for axis in range(len(shape)) if axis not in kept)
    widest = np.abs(values).max(axis=summed, keepdims=True)
    # Four bits clip down to 0.6 of the greatest value, where that leaves less error over all.
    bound = {16: 2.0**-10, 8: 0.501 / 127, 4: 0.401}[bits]
    assert (np.abs(restored - values) <= bound * widest).all()
    error = np.square(restored - values).sum(axis=summed) / np.square(values).sum(axis=summed)
    assert (error <= {16: 1e-6, 8: 1e-4, 4: 2e-2}[bits]).all()
    stored = {16: TensorProto.FLOAT16, 8: TensorProto.INT8, 4: TensorProto.INT4}[bits]
    assert stored in {tensor.data_type for tensor in model.graph.initializer}


def test_onnxruntime_restores_stored_weights_once_when_it_loads(made, tmp_path):
    """With DequantizeLinear, the usual spelling, it does so in each call: the negative control."""
    source = made("residual").source
    for form in ("float16", "weight_int8", "weight_int4"):
        quantize_onnx.FORMS[form](source, tmp_path / "stored.onnx")
        session_of(tmp_path / "stored.onnx", tmp_path / "optimized.onnx")
        left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert not left & {"Cast", "DequantizeLinear"}, form
    model = onnx.load(source.exported)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.dims == [16, 16, 3, 3])
    name = weight.name
    weight.CopyFrom(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.int8), "whole"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "step"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["whole", "step"], [name]))
    onnx.save(model, tmp_path / "usual.onnx")
    session_of(tmp_path / "usual.onnx", tmp_path / "optimized.onnx")
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


def test_fewer_bits_are_fewer_bytes(tmp_path):
    model, example = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 257)), (torch.zeros(1, 256),)
    export_onnx(model, example, tmp_path / "float.onnx")
    source = Source(model=model, examples=example, exported=tmp_path / "float.onnx")
    whole = source.exported.stat().st_size
    for form, share in (("float16", 0.51), ("weight_int8", 0.27), ("dynamic_int8", 0.27), ("weight_int4", 0.17)):
        quantize_onnx.FORMS[form](source, tmp_path / "form.onnx")
        assert (tmp_path / "form.onnx").stat().st_size <= share * whole, form


@pytest.mark.parametrize(("value", "bits", "message"), [(1e6, 16, "within float16"), (np.nan, 8, "finite weights")])
def test_weights_that_fewer_bits_cannot_hold_are_refused_by_name(value, bits, message):
    weight = numpy_helper.from_array(np.full((16, 16), value, np.float32), "last.weight")
    node = helper.make_node("MatMul", ["x", "last.weight"], ["y"])
    model = helper.make_model(helper.make_graph([node], "graph", [], [], [weight]))
    with pytest.raises(FormRefused, match=f"{message}.*'last.weight'"):
        shrink_weights(model, bits=bits)


def test_a_form_without_anything_to_do_is_refused_and_leaves_nothing(tmp_path):
    model, example = nn.Sequential(nn.ReLU(), nn.Softmax(1)), (torch.zeros(1, 4),)
    export_onnx(model, example, tmp_path / "float.onnx")
    calibration = (np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),)
    source = Source(model=model, examples=example, exported=tmp_path / "float.onnx", calibration=calibration)
    for form, write in quantize_onnx.FORMS.items():
        with pytest.raises(FormRefused, match="got none; "):
            write(source, tmp_path / f"{form}.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]


# Integers.


def quantized(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_an_activation_after_a_product_is_part_of_it_and_others_stay_float(made, tmp_path):
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    export_onnx(mlp, (torch.zeros(1, 8),), tmp_path / "float.onnx")
    calibration = (np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),)
    source = Source(model=mlp, examples=(torch.zeros(1, 8),), exported=tmp_path / "float.onnx", calibration=calibration)
    quantize_onnx.static_int8(source, tmp_path / "static.onnx")
    assert "Relu" not in quantized(tmp_path / "static.onnx")
    session_of(tmp_path / "static.onnx", tmp_path / "optimized.onnx")
    assert quantized(tmp_path / "optimized.onnx") == ["QuantizeLinear", "QGemm", "QGemm", "DequantizeLinear"]
    quantize_onnx.static_int8(made("odd shape").source, tmp_path / "normed.onnx")
    nodes = onnx.load(tmp_path / "normed.onnx").graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    # After a norm, which stays float, and a pool.
    assert [makers[node.input[0]] for node in nodes if node.op_type == "Relu"] == ["MaxPool"]


def test_a_matrix_has_a_scale_for_each_column_unless_they_are_about_as_great(tmp_path):
    for shrunk, scales in ((1.0, 1), (0.1, 4)):
        model = nn.Linear(8, 4)
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.weight[2] *= shrunk
        export_onnx(model, (torch.zeros(1, 8),), tmp_path / "float.onnx")
        calibration = (np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),)
        source = Source(
            model=model, examples=(torch.zeros(1, 8),), exported=tmp_path / "float.onnx", calibration=calibration
        )
        quantize_onnx.static_int8(source, tmp_path / "static.onnx")
        tensors = onnx.load(tmp_path / "static.onnx").graph.initializer
        found = [math.prod(tensor.dims) for tensor in tensors if tensor.name.endswith("weight_scale")]
        assert found == [scales]


@pytest.mark.parametrize("form", ["full_int8", "static_int16"])
def test_the_order_of_the_calibration_inputs_does_not_matter(form, made, tmp_path):
    source = made("two inputs and outputs").source
    turned = Source(
        model=source.model, examples=source.examples, exported=source.exported,
        calibration=tuple(values[::-1].copy() for values in source.ranges_from()),
    )  # fmt: skip
    quantize_onnx.FORMS[form](source, tmp_path / "a.onnx")
    quantize_onnx.FORMS[form](turned, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("suffix", ["onnx", "ort"])
def test_full_integer_files_take_and_give_whole_numbers_whose_scales_outlive_a_stamp(suffix, made, tmp_path):
    module, path = made("two inputs and outputs"), tmp_path / f"whole.{suffix}"
    TARGETS[suffix].forms["full_int8"](module.source, path)
    session = session_of(path)
    ends = [*session.get_inputs(), *session.get_outputs()]
    assert [end.type for end in ends] == ["tensor(uint8)"] * 4
    TARGETS[suffix].stamp(path, STAMP)
    assert TARGETS[suffix].read_stamp(path) == STAMP
    scales = json.loads(session_of(path).get_modelmeta().custom_metadata_map[SCALES])
    assert list(scales) == ["input_0", "input_1", "output_0", "output_1"]
    inputs = [values.numpy() for values in module.inputs]
    found = open_artifact(path).run(inputs, outputs=2)
    assert agrees(module.outputs, found, "static int8 (integer I/O)")
    assert not agrees(module.outputs, [2 * values for values in found], "static int8 (integer I/O)")
    for number, values in enumerate(found):
        scale, zero = scales[f"output_{number}"]
        whole = values / np.float32(scale) + zero
        assert np.allclose(whole, np.rint(whole), atol=1e-3)


def test_an_input_that_is_not_rounded_first_gets_a_scale_and_words_stay_words(made, tmp_path):
    quantize_onnx.full_int8(made("embedding").source, tmp_path / "words.onnx")
    session = session_of(tmp_path / "words.onnx")
    assert [end.type for end in (*session.get_inputs(), *session.get_outputs())] == ["tensor(int64)", "tensor(uint8)"]
    quantize_onnx.full_int8(made("attention").source, tmp_path / "rows.onnx")
    assert quantized(tmp_path / "rows.onnx")[0] == "DequantizeLinear"
    assert session_of(tmp_path / "rows.onnx").get_inputs()[0].type == "tensor(uint8)"


# The ORT format.


def test_files_of_the_ort_format_agree_are_stamped_and_are_the_same_bytes_again(made, tmp_path):
    module, path = made("residual"), tmp_path / "model.ort"
    write_ort_file(module.source.model, module.source.examples, path)
    content = path.read_bytes()
    assert content[4:8] == b"ORTM"
    assert b"/home" not in content
    assert b"/tmp" not in content
    convert_to_ort(module.source.exported, tmp_path / "again.ort")
    assert content == (tmp_path / "again.ort").read_bytes()
    assert agrees(module.outputs, run(path, module.inputs), "float32")
    assert read_stamp_ort(path) == {}
    stamp_ort(path, {"other": "x" * 300})
    stamp_ort(path, STAMP)
    assert read_stamp_ort(path) == STAMP == session_of(path).get_modelmeta().custom_metadata_map
    assert agrees(module.outputs, open_artifact(path).run([values.numpy() for values in module.inputs]), "float32")
    stamp_ort(path, {})
    assert path.read_bytes() == content


def test_four_bits_are_refused_where_the_runtime_cannot_read_them_back():
    with pytest.raises(FormRefused, match="expected a form that ort holds"):
        check_form("ort", "weight_int4")


@pytest.mark.soak
@pytest.mark.parametrize("name", QUICK)
def test_every_form_of_the_ort_format_agrees(name, made, tmp_path):
    module = made(name)
    for form, write in export_ort.FORMS.items():
        write(module.source, tmp_path / "form.ort")
        assert agrees(module.outputs, run(tmp_path / "form.ort", module.inputs), FORMS[form].label), form


def test_stored_weights_are_not_unfolded_into_the_ort_file(tmp_path):
    model, example = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), (torch.zeros(1, 128),)
    export_onnx(model, example, tmp_path / "float.onnx")
    source = Source(model=model, examples=example, exported=tmp_path / "float.onnx")
    rows = torch.randn(8, 128)
    for form, share in (("float16", 0.6), ("weight_int8", 0.35), ("dynamic_int8", 0.35)):
        TARGETS["ort"].forms[form](source, tmp_path / "form.ort")
        assert (tmp_path / "form.ort").stat().st_size < share * source.exported.stat().st_size, form
        assert agrees((model(rows).detach().numpy(),), run(tmp_path / "form.ort", (rows,)), FORMS[form].label), form


def test_what_the_ort_reader_does_not_know_is_refused_and_what_it_knows_is_kept(made, tmp_path):
    convert_to_ort(made("lstm").source.exported, tmp_path / "model.ort")
    content = (tmp_path / "model.ort").read_bytes()
    session = read_ort(content)
    assert write_ort(session) == content
    with pytest.raises(FormRefused, match="ORT format"):
        read_ort(content[:4] + b"TFL3" + content[8:])
    # A field of the root that no schema has: its table of fields made longer by one.
    root = int.from_bytes(content[:4], "little")
    table = root - int.from_bytes(content[root : root + 4], "little", signed=True)
    longer = bytearray(content)
    longer[table : table + 2] = (int.from_bytes(content[table : table + 2], "little") + 2).to_bytes(2, "little")
    with pytest.raises(FormRefused, match="expected no field 12 of InferenceSession"):
        read_ort(bytes(longer))


def test_onnx_stamps_keep_scales_and_do_not_show_them(made, tmp_path):
    path = tmp_path / "whole.onnx"
    quantize_onnx.full_int8(made("odd shape").source, path)
    before = path.read_bytes()
    stamp_onnx(path, STAMP)
    assert read_stamp_onnx(path) == STAMP
    stamp_onnx(path, {})
    assert read_stamp_onnx(path) == {}
    assert path.read_bytes() == before
