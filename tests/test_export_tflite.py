"""Every form of a TFLite file answers as its model in LiteRT, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn
from torch.nn import functional as F

from tacit.compression import quantize_tflite
from tacit.compression.export_tflite import export_tflite, read_stamp_tflite, stamp_tflite, strip_tflite
from tacit.compression.forms import FORMS, FormRefused, Source
from tacit.compression.norms_tflite import respell_for_tflite
from tacit.compression.parity import compare
from tacit.compression.silence import silenced
from tacit.compression.targets import TARGETS
from tacit.compression.tflite_graph import operators, read_model, simplify, write_model
from tacit.devices.runtime import open_artifact

FEW, CALIBRATED = 24, 64


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(4, 8), nn.Linear(8 * 7 * 5, 5)

    def forward(self, image):
        entered = self.enter(image)
        return self.head((entered + F.relu(self.norm(self.body(entered)))).flatten(1))


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.look, self.read = nn.Conv2d(3, 4, 3), nn.Linear(6, 4)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 7)

    def forward(self, image, row):
        both = self.look(image).mean((2, 3)) + self.read(row)
        return self.first(both), self.second(both)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.attend, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

    def forward(self, steps):
        entered = self.enter(steps)
        attended = self.norm(entered + self.attend(entered, entered, entered, need_weights=False)[0])
        return self.head(F.gelu(attended).mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.words(ids).flatten(1, -2).mean(1))


class Steps(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.steps = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options else 8, 4)

    def forward(self, steps):
        return self.head(self.steps(steps)[0][:, -1])


class Apply(nn.Module):
    """A model whose second layer applies a function."""

    def __init__(self, function):
        super().__init__()
        self.enter, self.odd = nn.Linear(8, 8), _Inner(function)

    def forward(self, row):
        return self.odd(self.enter(row))


class _Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, row):
        return self.function(row)


def in_a_row(*layers):
    return lambda: nn.Sequential(*(layer() if isinstance(layer, type) else layer for layer in layers))


# Name -> model, examples' shapes; ids where there is one shape of whole numbers.
QUICK = {
    "residual, GroupNorm, odd shape": (Residual, (1, 3, 7, 5)),
    "grouped, dilated": (
        in_a_row(
            nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2, padding=2), nn.Flatten(),
            nn.Linear(8 * 30, 5),
        ),
        (1, 4, 6, 5),
    ),
    "two in, two out": (TwoInTwoOut, (1, 3, 7, 5), (1, 6)),
    "attention, LayerNorm, GELU": (Attention, (1, 7, 6)),
    "embedding": (Words, "ids", (1, 3, 4)),
    "LSTM": (lambda: Steps(nn.LSTM), (1, 5, 6)),
}  # fmt: skip
SLOW = {
    "GRU": (lambda: Steps(nn.GRU), (1, 5, 6)),
    "RNN": (lambda: Steps(nn.RNN), (1, 5, 6)),
    "LSTM in both directions": (lambda: Steps(nn.LSTM, bidirectional=True), (1, 5, 6)),
    "ConvTranspose": (
        in_a_row(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 99, 5)),
        (1, 3, 4, 5),
    ),
    "BatchNorm": (
        in_a_row(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)),
        (1, 3, 8, 8),
    ),
    "depthwise": (
        in_a_row(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)),
        (1, 3, 8, 8),
    ),
    "adaptive pooling": (
        in_a_row(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((4, 3)), nn.Flatten(), nn.Linear(96, 5)),
        (1, 3, 9, 7),
    ),
    "Conv1d, GroupNorm, MaxPool1d": (
        in_a_row(
            nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
            nn.Linear(8 * 6, 5),
        ),
        (1, 3, 12),
    ),
    "Conv3d": (
        in_a_row(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24, 5)),
        (1, 2, 4, 5, 6),
    ),
    "LayerNorm": (in_a_row(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5)), (1, 6)),
    "image out": (in_a_row(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), (1, 3, 6, 5)),
}  # fmt: skip
REFUSED = {
    ("embedding", "full_int8"): "layer 'words' has no integer form: EMBEDDING_LOOKUP",
    ("Conv3d", "full_int8"): "layer '0' has no integer form: CONV_3D",
    ("LSTM in both directions", "full_int8"): "layer 'steps' has no integer form: REVERSE_V2",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(examples, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((count, *e.shape[1:]), generator=generator).numpy()
        if e.is_floating_point()
        else torch.randint(0, 20, (count, *e.shape[1:]), generator=generator).numpy()
        for e in examples
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a module by name: what its forms are made of, converted once."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def source(name):
        if name not in made:
            build, *shapes = (QUICK | SLOW)[name]
            ids = shapes[0] == "ids"
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = build().eval()
            examples = tuple(torch.zeros(s, dtype=torch.int64 if ids else torch.float32) for s in shapes[ids:])
            path = folder / f"{len(made)}.tflite"
            export_tflite(model, examples, path)
            made[name] = Source(
                model=model, examples=examples, exported=path, calibration=given(examples, CALIBRATED, 0)
            )
        return made[name]

    return source


def answers(model, inputs):
    with torch.no_grad():
        answer = model(*map(torch.from_numpy, inputs))
    return [one.numpy() for one in (answer if isinstance(answer, tuple) else (answer,))]


def parity(source, path):
    inputs = given(source.examples, FEW, 1)
    wanted = answers(source.model, inputs)
    found = open_artifact(path, input_layout="channel_last").run(inputs, outputs=len(wanted))
    return [compare(w, f, answers="values") for w, f in zip(wanted, found, strict=True)]


def check_all_forms(source, name, folder):
    assert all(one.passes("float32") for one in parity(source, source.exported))
    for form, make in quantize_tflite.FORMS.items():
        path = folder / f"{form}.tflite"
        if (name, form) in REFUSED:
            with pytest.raises(FormRefused, match=REFUSED[name, form]):
                make(source, path)
            continue
        make(source, path)
        assert all(one.passes(FORMS[form].label) for one in parity(source, path)), (form, parity(source, path))
    assert {path.stem for path in folder.iterdir()} == {f for f in quantize_tflite.FORMS if (name, f) not in REFUSED}


@pytest.mark.parametrize("name", QUICK)
def test_every_form_agrees_with_its_model_or_is_refused_by_name(name, exported, tmp_path):
    check_all_forms(exported(name), name, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", SLOW)
def test_every_form_of_more_modules_agrees_or_is_refused_by_name(name, exported, tmp_path):
    check_all_forms(exported(name), name, tmp_path)


def test_a_weight_that_is_wrong_is_noticed(exported, tmp_path):
    source = exported("residual, GroupNorm, odd shape")
    model = read_model(source.exported)
    tensor = next(t for t in model.subgraphs[0].tensors if list(t.shape) == [8, 3, 3, 8])
    model.buffers[tensor.buffer].data = np.roll(model.buffers[tensor.buffer].data, 4)
    write_model(model, tmp_path / "wrong.tflite")
    assert not parity(source, tmp_path / "wrong.tflite")[0].passes("dynamic-range int8")


def branch(row):
    return row if row.sum() > 0 else -row


REFUSALS = {
    "a branch on values": (branch, "layer 'odd' .*depends on the values of its input"),
    "no lowering": (torch.erfinv, "layer 'odd' .*aten.erfinv"),
    "no kernel": (lambda row: row.sort(-1)[0] * 2, "cannot be exported: LiteRT has nothing that runs STABLEHLO_SORT"),
    "chance": (lambda row: row + torch.rand_like(row), "answer the same twice"),
    "complex numbers": (lambda row: torch.fft.fft(row).real, "cannot be exported: .*complex"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_tflite_cannot_hold_is_refused_in_one_line(name, tmp_path):
    function, reason = REFUSALS[name]
    with pytest.raises(FormRefused, match=reason) as caught:
        export_tflite(Apply(function), (torch.zeros(1, 8),), tmp_path / "m.tflite")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_double_precision_is_refused(tmp_path):
    with pytest.raises(FormRefused, match=r"got example 0 of torch\.float64; call \.float"):
        export_tflite(nn.Linear(2, 2).double(), (torch.zeros(1, 2).double(),), tmp_path / "m.tflite")


def test_a_model_without_weights_is_not_called_quantised(tmp_path):
    export_tflite(nn.Softmax(1), (torch.zeros(1, 4),), tmp_path / "m.tflite")
    source = Source(
        model=nn.Softmax(1), examples=(torch.zeros(1, 4),), exported=tmp_path / "m.tflite",
        calibration=(np.eye(4, dtype=np.float32),),
    )  # fmt: skip
    for form in ("dynamic_int8", "weight_int4", "float16", "static_int8", "static_int16"):
        with pytest.raises(FormRefused, match="expected a layer with weights"):
            quantize_tflite.FORMS[form](source, tmp_path / "q.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]


def types(path):
    with silenced():
        interpreter = Interpreter(str(path))
    return [
        [(node["name"], node["dtype"]) for node in side]
        for side in (interpreter.get_input_details(), interpreter.get_output_details())
    ]


def test_only_full_integer_files_have_integers_at_their_ends_in_the_order_of_the_model(exported, tmp_path):
    source = exported("two in, two out")
    for form, make in quantize_tflite.FORMS.items():
        make(source, tmp_path / form)
        kind = np.int8 if form == "full_int8" else np.float32
        inputs, outputs = types(tmp_path / form)
        assert inputs == [("input_0", kind), ("input_1", kind)]
        assert outputs == [("output_0", kind), ("output_1", kind)]


def test_a_full_integer_file_holds_no_float_tensor(exported, tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    source = exported("residual, GroupNorm, odd shape")
    quantize_tflite.full_int8(source, tmp_path / "q")
    model = read_model(tmp_path / "q")
    used = {n for one in operators(model) for n in (*one.inputs, *one.outputs)} - {-1}
    assert TensorType.FLOAT32 not in {model.subgraphs[0].tensors[n].type for n in used}
    assert TensorType.INT16 in {model.subgraphs[0].tensors[n].type for n in used}  # its norm
    quantize_tflite.static_int8(source, tmp_path / "s")
    assert TensorType.FLOAT32 in {tensor.type for tensor in read_model(tmp_path / "s").subgraphs[0].tensors}


def test_weights_have_a_scale_for_each_output_channel(exported, tmp_path):
    source = exported("residual, GroupNorm, odd shape")
    for form in ("weight_int8", "weight_int4", "dynamic_int8", "static_int8", "full_int8", "static_int16"):
        quantize_tflite.FORMS[form](source, tmp_path / form)
        tensors = read_model(tmp_path / form).subgraphs[0].tensors
        (weights,) = [t for t in tensors if list(t.shape) == [8, 3, 3, 8] and t.quantization is not None][:1]
        assert len(weights.quantization.scale) == 8, form


def test_a_file_is_a_function_of_the_set_of_its_calibration_inputs(exported, tmp_path):
    source = exported("two in, two out")
    flipped = tuple(values[::-1].copy() for values in source.calibration)
    fewer = tuple(values[: CALIBRATED // 4] for values in source.calibration)
    for form in ("static_int8", "full_int8", "static_int16"):
        for name, calibration in (("a", source.calibration), ("b", flipped), ("c", fewer)):
            again = Source(
                model=source.model, examples=source.examples, exported=source.exported, calibration=calibration
            )
            quantize_tflite.FORMS[form](again, tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_range_reaches_to_the_extremes_and_sixteen_bits_beyond(exported, tmp_path):
    """The quantiser's own moving average would forget the one large value in the middle."""
    source = exported("two in, two out")
    image, row = (values.copy() for values in source.calibration)
    row[CALIBRATED // 2, 0] = 100.0
    given = Source(model=source.model, examples=source.examples, exported=source.exported, calibration=(image, row))
    reach = {}
    for form in ("static_int8", "static_int16"):
        quantize_tflite.FORMS[form](given, tmp_path / form)
        model = read_model(tmp_path / form)
        (first,) = [
            one for one in operators(model) if one.kind == "QUANTIZE" and one.inputs[0] == model.subgraphs[0].inputs[1]
        ]
        quantisation = model.subgraphs[0].tensors[first.outputs[0]].quantization
        reach[form] = float(quantisation.scale[0]) * (
            {"static_int8": 127, "static_int16": 32767}[form] - quantisation.zeroPoint[0]
        )
    assert reach["static_int8"] == pytest.approx(100.0, rel=0.01)
    assert reach["static_int16"] >= 100.0 * 2


def test_a_stamp_survives_quantisation_and_being_written_anew(exported, tmp_path):
    source = exported("two in, two out")
    stamped = tmp_path / "stamped.tflite"
    stamped.write_bytes(source.exported.read_bytes())
    stamp_tflite(stamped, {"tacit.task": "digits"})
    strip_tflite(stamped)
    assert read_stamp_tflite(stamped) == {"tacit.task": "digits"}
    made_of = Source(model=source.model, examples=source.examples, exported=stamped, calibration=source.calibration)
    for form, make in quantize_tflite.FORMS.items():
        make(made_of, tmp_path / form)
        assert read_stamp_tflite(tmp_path / form) == {"tacit.task": "digits"}, form


def test_a_file_names_layers_and_nothing_of_this_machine(exported):
    source = exported("residual, GroupNorm, odd shape")
    layers = {operator.layer for operator in operators(read_model(source.exported))}
    assert {"enter", "body", "norm"} <= layers
    content = source.exported.read_bytes()
    assert b"/home" not in content
    assert b".py" not in content
    assert b"torch" not in content


def norms(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(*layers)
        for norm in (layer for layer in layers if isinstance(layer, nn.GroupNorm)):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("size", [(1, 8, 6, 4), (3, 8, 5, 7), (2, 8, 6), (2, 8)])
def test_a_respelled_norm_answers_as_it_did(size):
    model = norms(nn.GroupNorm(4, 8))
    inputs = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 3 + 50  # far from 0, where squares cancel
    respelled = respell_for_tflite(model, (inputs[:1],))
    assert type(respelled[0]) is not nn.GroupNorm
    assert torch.allclose(respelled(inputs), model(inputs), atol=2e-4)
    assert type(model[0]) is nn.GroupNorm


def test_pooling_comes_first_only_where_every_scale_is_positive():
    model = norms(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    inputs = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    respelled = respell_for_tflite(model, (inputs[:1],))
    assert isinstance(respelled[2], nn.Identity)
    assert torch.allclose(respelled(inputs), model(inputs), atol=1e-5)
    with torch.no_grad():
        model[0].weight[1] = -1.0
    respelled = respell_for_tflite(model, (inputs[:1],))
    assert isinstance(respelled[2], nn.MaxPool2d)
    assert torch.allclose(respelled(inputs), model(inputs), atol=1e-5)


def test_a_model_that_calls_parts_of_a_row_is_left_as_it_is():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = norms(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))

        def forward(self, image):
            return self.row(image).flatten(1), self.row[0](image).flatten(1)

    respelled = respell_for_tflite(Parts().eval(), (torch.zeros(1, 4, 6, 6),))
    assert type(respelled.row[0]) is nn.GroupNorm


def test_transpositions_that_undo_each_other_are_left_out(tmp_path):
    model = norms(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    export_tflite(model, (torch.zeros(1, 1, 8, 8),), tmp_path / "m.tflite")
    graph = read_model(tmp_path / "m.tflite")
    kinds = [operator.kind for operator in operators(graph)]
    pool = operators(graph)[kinds.index("MAX_POOL_2D")]
    makers = {number: operator.kind for operator in operators(graph) for number in operator.outputs}
    assert makers[pool.inputs[0]] == "CONV_2D" or makers[pool.inputs[0]] == "DEPTHWISE_CONV_2D"
    used = {n for one in operators(graph) for n in (*one.inputs, *one.outputs)} - {-1}
    assert used == set(range(len(graph.subgraphs[0].tensors)))
    before = [(one.kind, one.inputs) for one in operators(graph)]
    simplify(graph)
    assert [(one.kind, one.inputs) for one in operators(graph)] == before


def test_the_target_holds_every_form():
    assert set(TARGETS["tflite"].forms) == set(FORMS) - {"float32"}
    assert Path(quantize_tflite.__file__).is_file()
