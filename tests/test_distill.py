"""Distillation recovers a pruned model from public images alone, and is a function of its arguments."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tacit.compression.distill import distill, jitter
from tacit.compression.prune import prune


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> dict[str, torch.Tensor]:
    data = load_digits()
    images = torch.from_numpy((data.images / 16).astype(np.float32)[:, None])
    labels = torch.from_numpy(data.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return {
        "test": images[order[:360]],
        "answers": labels[order[:360]],
        "public": images[order[360:450]],
        "train": images[order[450:]],
        "labels": labels[order[450:]],
    }


@pytest.fixture(scope="module")
def teacher(digits: dict[str, torch.Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(12):
            for batch in torch.randperm(len(digits["train"])).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(digits["train"][batch]), digits["labels"][batch]).backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, digits: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return (model(digits["test"]).argmax(1) == digits["answers"]).double().mean().item()


def tiny(seed: int, *, dropout: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5 if dropout else 0.0), nn.Linear(9, 4))


def test_a_model_pruned_by_half_comes_within_two_points_of_its_teacher(digits, teacher):
    pruned, _, _ = prune(teacher, digits["public"][:1], ratio=0.5)
    recovered = distill(pruned, teacher, digits["public"], seed=0)
    assert accuracy(teacher, digits) > 0.95
    assert accuracy(pruned, digits) < accuracy(teacher, digits) - 0.02
    assert accuracy(recovered, digits) >= accuracy(teacher, digits) - 0.02


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    student, other, public = tiny(0, dropout=True), tiny(1), torch.rand(7, 1, 3, 3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = distill(student, other, public, seed=3, epochs=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = distill(student, other, public, seed=3, epochs=4).state_dict()
    another = distill(student, other, public, seed=4, epochs=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["2.weight"], another["2.weight"])


def test_student_and_teacher_are_left_as_they_are():
    student, other = tiny(0).eval(), tiny(1).train()
    before = copy.deepcopy((student.state_dict(), other.state_dict()))
    result = distill(student, other, torch.rand(7, 1, 3, 3), seed=0, epochs=2)
    for model, state in zip((student, other), before, strict=True):
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert (student.training, other.training, result.training) == (False, True, False)
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_linear_student_learns_a_linear_teachers_answers():
    student, other, public = tiny(0), tiny(1), torch.randn(64, 1, 3, 3)
    before = (student(public).softmax(1) - other(public).softmax(1)).abs().mean()
    after = (distill(student, other, public, seed=0)(public).softmax(1) - other(public).softmax(1)).abs().mean()
    assert after < before / 5


def test_a_student_learns_a_regressions_values_not_a_softmax_over_them():
    """Of one output every softmax is 1: by classes nothing would be learned."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, other = (nn.Sequential(nn.Flatten(), nn.Linear(9, 1)) for _ in range(2))
    public = torch.randn(64, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted = other(public).detach()

    def off(model: nn.Module) -> float:
        return float(((model(public) - wanted) ** 2).mean().detach() / wanted.var())

    assert off(distill(student, other, public, seed=0, answers="values")) < 0.01
    assert off(distill(student, other, public, seed=0)) > 0.5


def test_a_reconstruction_of_any_shape_can_be_imitated():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, other = (nn.Conv1d(3, 3, 3, padding=1) for _ in range(2))
    public = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))
    recovered = distill(student, other, public, seed=0, answers="values")
    assert float((recovered(public) - other(public)).detach().abs().max()) < 0.1


def test_jitter_makes_enough_finite_views_and_repeats_with_its_generator():
    public = torch.rand(90, 1, 8, 8)
    views = jitter(public, torch.Generator().manual_seed(0))
    assert views.shape == (180, 1, 8, 8)
    assert torch.isfinite(views).all()
    assert torch.equal(views, jitter(public, torch.Generator().manual_seed(0)))
    assert not torch.equal(views, jitter(public, torch.Generator().manual_seed(1)))
    assert jitter(torch.rand(500, 3), torch.Generator()).shape == (500, 3)


def test_jitter_shifts_by_at_most_one_pixel_and_mixes_two_images():
    # Two images, each one bright pixel: every view must lie near the mixes of two shifted ones.
    public = torch.zeros(2, 1, 7, 7)
    public[0, 0, 2, 2] = public[1, 0, 4, 4] = 1.0
    views = jitter(public, torch.Generator().manual_seed(0))
    bright = views > 0.2
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[1:4, 1:4] = near[3:6, 3:6] = True
    assert not bright[:, 0, ~near].any()
    assert bright[:, 0, near].any(0).sum() == near.sum()  # every shift occurs
    totals = views.sum((1, 2, 3))
    assert (totals - 1.0).abs().max() < 0.5  # a convex combination keeps the total, but for the noise


@pytest.mark.parametrize(
    "arguments", [{"epochs": 0}, {"learning_rate": 0.0}, {"temperature": 0.0}, {"public": torch.zeros(0, 1, 3, 3)}]
)
def test_arguments_out_of_range_are_refused(arguments):
    public = arguments.pop("public", torch.zeros(3, 1, 3, 3))
    with pytest.raises(ValueError, match="expected epochs >= 1"):
        distill(tiny(0), tiny(1), public, seed=0, **arguments)


def test_a_diverging_run_is_refused():
    with pytest.raises(ValueError, match="lower learning_rate"):
        distill(tiny(0), tiny(1), torch.full((3, 1, 3, 3), 1e30), seed=0, epochs=3, learning_rate=1e30)
