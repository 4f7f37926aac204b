"""Pruning removes whole channels, keeps GroupNorm honest, and is replayed from data alone."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tacit.compression.plan import LayerPlan, Plan, compose, load, replay, save
from tacit.compression.prune import prune

EXAMPLE = torch.zeros(1, 1, 8, 8)


def digit_model(widths: tuple[int, int] = (16, 32), groups: tuple[int, int] = (4, 4)) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, widths[0], 3, padding=1),
        nn.GroupNorm(groups[0], widths[0]),
        nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], 3, padding=1),
        nn.GroupNorm(groups[1], widths[1]),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(widths[1] * 16, 10),
    )
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_half_of_the_channels_leave_and_the_original_stays():
    model = digit_model()
    before = copy.deepcopy(model)
    model.train()
    smaller, _, report = prune(model, EXAMPLE, ratio=0.5)
    assert (smaller[0].out_channels, smaller[3].out_channels) == (8, 16)
    assert (report.parameters_before, report.parameters_after) == (size(model), size(smaller)) == (10026, 3866)
    assert report.skipped == {}
    assert model.training
    assert same_weights(model, before)
    assert smaller(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_the_result_is_what_torch_prunings_own_surgery_makes_of_the_same_channels():
    model = digit_model()
    smaller, plan, _ = prune(model, EXAMPLE, ratio=0.5)
    expected = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(expected, EXAMPLE)
    for name in ("0", "3"):
        layer = expected.get_submodule(name)
        gone = sorted(set(range(layer.out_channels)) - set(plan.layers[name].outputs))
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, gone).prune()
    assert same_weights(smaller, expected)
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(smaller(images), expected(images))


def test_without_norms_pruned_channels_are_as_if_they_had_been_zero():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    ).eval()
    smaller, plan, _ = prune(model, EXAMPLE, ratio=0.5)
    masked = copy.deepcopy(model)
    for name in ("0", "2"):
        layer = masked.get_submodule(name)
        gone = sorted(set(range(layer.out_channels)) - set(plan.layers[name].outputs))
        layer.weight.data[gone], layer.bias.data[gone] = 0.0, 0.0
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(smaller(images), masked(images), atol=1e-6)


def test_whole_groups_leave_where_each_channel_is_a_group_and_the_others_answer_as_before():
    model = digit_model((8, 8), (8, 8))
    smaller, plan, _ = prune(model, EXAMPLE, ratio=0.5)
    assert (smaller[1].num_groups, smaller[1].num_channels) == (4, 4)
    masked = copy.deepcopy(model)
    for name in ("1", "4"):
        norm = masked.get_submodule(name)
        gone = sorted(set(range(norm.num_channels)) - set(plan.layers[name].outputs))
        norm.weight.data[gone], norm.bias.data[gone] = 0.0, 0.0
    images = torch.rand(5, 1, 8, 8)
    assert torch.allclose(smaller(images), masked(images), atol=1e-6)


def test_the_case_that_torch_pruning_leaves_untouched_without_a_word_is_pruned():
    # GroupNorm(32, C), what Opacus' ModuleValidator.fix gives, with the round_to=8 of torch-pruning's README.
    model = digit_model((32, 32), (32, 32))
    silent = copy.deepcopy(model)
    tp.pruner.BasePruner(
        silent,
        EXAMPLE,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        round_to=8,
        ignored_layers=[silent[8]],
    ).step()
    assert size(silent) == size(model)  # the peer's defect; if this fails it is mended, and the comment is too old
    smaller, _, _ = prune(model, EXAMPLE, ratio=0.5, round_to=8)
    assert (smaller[0].out_channels, smaller[1].num_groups) == (16, 16)


@settings(max_examples=15, deadline=None)
@given(
    per_group=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    groups=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ratio=st.floats(0.05, 0.95),
    round_to=st.sampled_from([1, 2, 4]),
)
def test_any_pruning_keeps_groups_equal_or_refuses(per_group, groups, ratio, round_to):
    widths = (per_group[0] * groups[0], per_group[1] * groups[1])
    model = digit_model(widths, groups)
    try:
        smaller, plan, report = prune(model, EXAMPLE, ratio=ratio, round_to=round_to)
    except ValueError as error:
        assert "none removed" in str(error)  # noqa: PT017 # both outcomes are right, for different draws
        return
    assert report.parameters_after == size(smaller) < size(model)
    assert smaller(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert same_weights(replay(model, plan), smaller)
    for conv, norm, width, channels in (("0", "1", widths[0], per_group[0]), ("3", "4", widths[1], per_group[1])):
        if conv in report.skipped:
            continue
        kept, after = plan.layers[norm].outputs, smaller.get_submodule(norm)
        assert kept == plan.layers[conv].outputs
        assert 0 < len(kept) < width
        assert len(kept) % round_to == 0
        share = len(kept) // after.num_groups
        old_groups = [kept[i] // channels for i in range(len(kept))]
        assert all(len(set(old_groups[i : i + share])) == 1 for i in range(0, len(kept), share))


def test_the_channels_with_the_smallest_weights_leave():
    model = digit_model((8, 8), (1, 1))
    weak = [1, 4, 6, 7]
    with torch.no_grad():
        model[0].weight[weak] *= 1e-3
        model[3].weight[:, weak] *= 1e-3
    _, plan, _ = prune(model, EXAMPLE, ratio=0.5)
    assert plan.layers["0"].outputs == (0, 2, 3, 5)


def test_two_prunings_compose_into_one_plan_of_the_original():
    model = digit_model()
    once, first, _ = prune(model, EXAMPLE, ratio=0.5)
    twice, second, _ = prune(once, EXAMPLE, ratio=0.5)
    assert twice[0].out_channels == 4
    assert same_weights(replay(model, compose(first, second)), twice)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.other_norm = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.stem(images)))
        features = features + self.other_norm(self.point(self.depthwise(features)))
        return self.head(features.mean((2, 3)))


def test_a_residual_with_depthwise_and_two_norms_prunes_coherently():
    torch.manual_seed(0)
    model = _Residual().eval()
    smaller, plan, _ = prune(model, EXAMPLE, ratio=0.5)
    assert smaller.depthwise.groups == smaller.stem.out_channels == 4
    assert (smaller.norm.num_groups, smaller.other_norm.num_groups) == (2, 4)
    assert plan.layers["stem"].outputs == plan.layers["depthwise"].outputs == plan.layers["head"].inputs
    assert smaller(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_nothing_removed_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=r"none removed of 10026 parameters \(.*0: no smaller count fits"):
        prune(digit_model(), EXAMPLE, ratio=0.5, round_to=1024)
    with_batch_norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ValueError, match="coupled to BatchNorm2d '1'"):
        prune(with_batch_norm, EXAMPLE, ratio=0.5)
    with pytest.raises(ValueError, match="no layer before the last"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), EXAMPLE, ratio=0.5)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match="expected 0 < ratio < 1"):
        prune(digit_model(), EXAMPLE, ratio=ratio)


def test_round_to_below_one_is_refused():
    with pytest.raises(ValueError, match="expected round_to >= 1"):
        prune(digit_model(), EXAMPLE, ratio=0.5, round_to=0)


def test_a_saved_plan_rebuilds_the_same_model_on_other_weights(tmp_path: Path):
    smaller, plan, _ = prune(digit_model(), EXAMPLE, ratio=0.5)
    save(tmp_path, smaller, plan)
    fresh = digit_model()
    nn.init.zeros_(fresh[0].weight)
    loaded, read = load(tmp_path, fresh)
    assert read == plan
    assert same_weights(loaded, smaller)


def test_an_empty_plan_is_the_model_itself(tmp_path: Path):
    model = digit_model()
    save(tmp_path, model, Plan())
    assert json.loads((tmp_path / "plan.json").read_text()) == {"schema_version": 1, "layers": {}}
    assert same_weights(load(tmp_path, digit_model())[0], model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "layers": {"0": {"outputs": [0]}, "0": {"outputs": [1]}}}', "each key once"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [0], "outputs": [1]}}}', "each key once"),
        ('{"schema_version": 2, "layers": {}}', "expected schema_version=1"),
        ('{"schema_version": true, "layers": {}}', "expected schema_version=1"),
        ('{"schema_version": 1, "layers": {}, "more": 1}', "expected the keys"),
        ('{"schema_version": 1, "layers": []}', "expected the keys"),
        ("[]", "expected the keys"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [true]}}}', "whole numbers"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [0.0]}}}', "whole numbers"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": "01"}}}', "whole numbers"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": []}}}', "increasing indices"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [1, 0]}}}', "increasing indices"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [0, 0]}}}', "increasing indices"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [-1]}}}', "increasing indices"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [16]}}}', "increasing indices"),
        ('{"schema_version": 1, "layers": {"0": {"rank": 1}}}', "expected outputs, inputs or num_groups"),
        ('{"schema_version": 1, "layers": {"0": {"num_groups": 2}}}', "on GroupNorm only"),
        ('{"schema_version": 1, "layers": {"9": {"outputs": [0]}}}', "named in the plan"),
        ('{"schema_version": 1, "layers": {"2": {"outputs": [0]}}}', "named in the plan"),
        ('{"schema_version": 1, "layers": {"1": {"outputs": [0, 1, 2]}}}', "whole groups"),
        ('{"schema_version": 1, "layers": {"1": {"num_groups": 0}}}', "whole groups"),
        ('{"schema_version": 1, "layers": {"1": {"num_groups": 1}}}', "whole groups"),
        ('{"schema_version": 1, "layers": {"1": {"num_groups": true}}}', "whole number of groups"),
        ('{"schema_version": 1, "layers": {"1": {"inputs": [0]}}}', "no inputs for a GroupNorm"),
        ('{"schema_version": 1, "layers": {"0": {"outputs": [0, 1]}}}', r"expected '0\.\w+' of \(2,"),
    ],
)
def test_a_plan_that_save_would_not_write_is_refused(tmp_path: Path, text, message):
    model = digit_model()
    save(tmp_path, model, Plan())
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.pop("0.bias"), "missing or surplus"),
        (lambda weights: weights.update(more=torch.zeros(1)), "missing or surplus"),
        (lambda weights: weights.update({"0.bias": torch.zeros(15)}), "expected '0.bias' of"),
        (lambda weights: weights.update({"0.bias": torch.zeros(16, dtype=torch.float64)}), "expected '0.bias' of"),
        (lambda weights: weights.update({"0.bias": torch.full((16,), torch.nan)}), "finite weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, spoil, message):
    model = digit_model()
    save(tmp_path, model, Plan())
    weights = load_file(tmp_path / "weights.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, model)


def test_a_damaged_weight_file_is_refused(tmp_path: Path):
    model = digit_model()
    save(tmp_path, model, Plan())
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load(tmp_path, model)


def test_a_grouped_convolution_is_not_cut():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="ungrouped or depthwise"):
        replay(model, Plan({"0": LayerPlan(outputs=(0, 1))}))
