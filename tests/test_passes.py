"""Passes say what they are and which data they use, and refuse what they cannot honestly do."""

import pytest
import torch
from torch import nn

from tacit.compression.material import Material
from tacit.compression.passes import (
    Pass,
    apply_passes,
    form_of,
    parse_passes,
    strongest_data_use,
)
from tacit.compression.plan import Plan, replay

EXAMPLE = torch.zeros(1, 1, 8, 8)
PRUNE, DISTILL = {"name": "prune", "ratio": 0.5}, {"name": "distill", "epochs": 3}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()


def material(public: torch.Tensor | None = None) -> Material:
    return Material(example_inputs=EXAMPLE, public=public)


def test_defaults_are_filled_in_and_data_use_is_declared():
    passes = parse_passes([PRUNE, {"name": "distill"}, {"name": "static_int8"}])
    assert [(step.name, dict(step.parameters), step.data_use) for step in passes] == [
        ("prune", {"ratio": 0.5, "round_to": 1}, "none"),
        ("distill", {"epochs": 400, "learning_rate": 0.02, "temperature": 2.0}, "public"),
        ("static_int8", {"calibration": "public"}, "public"),
    ]
    (synthetic,) = parse_passes([{"name": "static_int8", "calibration": "synthetic"}])
    assert synthetic.data_use == "none"  # made from the model alone


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "purne", "ratio": 0.5}, "did you mean 'prune'"),
        ({"name": "dynamic-int8"}, "did you mean 'dynamic_int8'"),
        ({"ratio": 0.5}, "expected name to be one of"),
        ({"name": 3}, "expected name to be one of"),
        ({"name": "prune", "ration": 0.5}, "did you mean 'ratio'"),
        ({"name": "static_int8", "bits": 4}, "expected parameters calibration"),
        ({"name": "static_int8", "calibration": "private"}, "expected calibration to be one of public, synthetic"),
        ({"name": "dynamic_int8", "bits": 4}, r"expected parameters \(none\)"),
        ({"name": "prune"}, "ratio=None"),
        ({"name": "prune", "ratio": 0}, "expected 0 < ratio < 1"),
        ({"name": "prune", "ratio": 1.0}, "expected 0 < ratio < 1"),
        ({"name": "prune", "ratio": float("nan")}, "expected a number"),
        ({"name": "prune", "ratio": True}, "expected a number"),
        ({"name": "prune", "ratio": "0.5"}, "expected a number"),
        ({"name": "prune", "ratio": 0.5, "round_to": 0}, "expected 1 <= round_to"),
        ({"name": "prune", "ratio": 0.5, "round_to": 1.5}, "expected a whole number"),
        ({"name": "distill", "epochs": 0}, "expected 1 <= epochs"),
        ({"name": "distill", "learning_rate": float("inf")}, "expected a number"),
        ({"name": "distill", "temperature": -1}, "expected 0 < temperature"),
    ],
)
def test_what_is_not_a_pass_is_refused_with_a_hint(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_passes([entry])


def test_quantisation_comes_last_and_once():
    for entries in (
        [{"name": "static_int8"}, PRUNE],
        [{"name": "dynamic_int8"}, {"name": "static_int8"}],
    ):
        with pytest.raises(ValueError, match="to be the last and only one"):
            parse_passes(entries)


def test_a_pass_cannot_understate_its_data_use():
    with pytest.raises(ValueError, match="expected data_use='public'"):
        Pass(name="static_int8", data_use="none")
    with pytest.raises(ValueError, match="expected name to be one of"):
        Pass(name="magic")


@pytest.mark.parametrize(
    ("names", "form", "use"),
    [
        ([], "float32", "none"),
        ([PRUNE], "float32", "none"),
        ([PRUNE, DISTILL], "float32", "public"),
        ([{"name": "dynamic_int8"}], "dynamic_int8", "none"),
        ([PRUNE, {"name": "static_int8"}], "static_int8", "public"),
    ],
)
def test_the_form_and_the_strongest_data_use_follow_from_the_passes(names, form, use):
    passes = parse_passes(names)
    assert (form_of(passes), strongest_data_use(passes)) == (form, use)


@pytest.mark.parametrize("entry", [DISTILL, {"name": "static_int8"}])
def test_a_pass_without_its_public_data_is_refused_by_name(entry):
    with pytest.raises(ValueError, match=rf"public inputs for the pass '{entry['name']}'.*declare a public split"):
        apply_passes(model(), parse_passes([entry]), material(), seed=0)


def test_pruning_and_distillation_run_in_order_and_the_plan_remembers_the_shape():
    original, public = model(), torch.rand(20, 1, 8, 8)
    steps = []
    passes = parse_passes([PRUNE, DISTILL, PRUNE])
    shaped = apply_passes(
        original,
        passes,
        material(public),
        seed=1,
        progress=lambda name, step, steps_: steps.append((name, step, steps_)),
    )
    assert steps == [("prune", 1, 1), ("distill", 1, 3), ("distill", 2, 3), ("distill", 3, 3), ("prune", 1, 1)]
    assert shaped.model[0].out_channels == 2
    assert shaped.pruned == pytest.approx(1 - shaped.parameters / sum(p.numel() for p in original.parameters()))
    rebuilt = replay(model(), shaped.plan)
    rebuilt.load_state_dict(shaped.model.state_dict())
    assert torch.equal(rebuilt(public), shaped.model(public))


def test_no_passes_leave_the_model_and_an_empty_plan():
    original = model()
    shaped = apply_passes(original, (), material(), seed=0)
    assert shaped.model is original
    assert (shaped.plan, shaped.pruned) == (Plan(), 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": torch.zeros(2, 1, 8, 8)}, "shape \\(1, \\*shape\\)"),
        ({"example_inputs": EXAMPLE.double()}, "dtype float32"),
        ({"example_inputs": EXAMPLE, "public": torch.zeros(3, 8, 8)}, "expected public of shape"),
        ({"example_inputs": EXAMPLE, "public": torch.zeros(0, 1, 8, 8)}, "expected public of shape"),
        ({"example_inputs": EXAMPLE, "public": torch.full((2, 1, 8, 8), torch.nan)}, "public to be finite"),
        ({"example_inputs": EXAMPLE, "public": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "dtype float32"),
    ],
)
def test_material_is_checked_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        Material(**arguments)
