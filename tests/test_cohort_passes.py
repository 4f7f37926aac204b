"""Many owners' batches in passes: the sums of Opacus, whoever goes together, and what happens without memory."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.edge import cli
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.federated import cohort_passes
from tacit.federated.accelerator import AcceleratorAbsent, best_accelerator, check_accelerator
from tacit.federated.accounts import read_ledger
from tacit.federated.clipping import CLIP_SLACK
from tacit.federated.cohort import CohortSteps, Walk
from tacit.federated.cohort_passes import CohortPasses, CohortRecords
from tacit.federated.datasets import find_task
from tacit.federated.local_steps import LocalRule
from tacit.federated.mechanism import Mechanism
from tacit.federated.model_arrays import write_arrays
from tacit.federated.models import build_family
from tacit.federated.noise import SeededGenerator
from tacit.federated.owner import Owner
from tacit.federated.rounds import FederationFailed
from tacit.federated.stacked_layers import Order, max_pool
from tacit.federated.stacked_model import StackedModel
from tacit.federated.task import Records

TASK = find_task("digits")
CLIP = 0.3


def make_model(family):
    torch.manual_seed(0)
    model = build_family({"family": family}, shape=(1, 8, 8), outputs=10)
    with torch.no_grad():  # normalisations begin at ones and zeros, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def records(count, seed=0):
    generator = np.random.default_rng(seed)
    return Records(generator.random((count, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, count))


def rows_of(model, owners):
    """A model of each owner's own, (owners, parameters)."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return flat + 0.02 * torch.randn(owners, len(flat), generator=torch.Generator().manual_seed(1))


SIZES = (9, 0, 3, 17, 1, 6, 6)
HELD = [records(20, seed) for seed in range(len(SIZES))]
COINS = [np.sort(np.random.default_rng(n).permutation(20)[:size]) for n, size in enumerate(SIZES)]


def sums(family="cnn", *, bound=CLIP, task=TASK, coins=COINS, held=HELD):
    model = make_model(family)
    passes = CohortPasses(task, model, device="cpu")
    return passes(rows_of(model, len(held)), CohortRecords.of(held, task), coins, bound)


# Warned by Opacus 1.6 under PyTorch 2.13: it registers hooks of the old kind, and those of whole modules.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Using a non-full backward hook")
@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_each_owners_clipped_sum_is_that_of_opacus_gradients(family):
    from opacus.grad_sample import GradSampleModule

    found, model = sums(family), make_model(family)
    rows, hooked = rows_of(model, len(HELD)), GradSampleModule(model, loss_reduction="sum")
    for owner, (held, chosen) in enumerate(zip(HELD, COINS, strict=True)):
        torch.nn.utils.vector_to_parameters(rows[owner], model.parameters())
        wanted = torch.zeros(found.shape[1])
        if len(chosen):
            hooked.zero_grad()
            inputs, labels = torch.from_numpy(held.inputs[chosen]), torch.from_numpy(held.labels[chosen])
            torch.nn.functional.cross_entropy(hooked(inputs), labels, reduction="sum").backward()
            each = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)
            wanted = ((CLIP * CLIP_SLACK / each.norm(dim=1)).clamp(max=1.0)[:, None] * each).sum(0)
        torch.testing.assert_close(found[owner], wanted, atol=2e-6, rtol=2e-4)
    assert float(found.norm(dim=1).max()) > CLIP  # of several records that were clipped


@pytest.mark.parametrize("bound", [CLIP, None])
@pytest.mark.parametrize("pass_bytes", [1, 2**20, 2**30])
def test_how_many_go_together_does_not_matter(bound, pass_bytes, monkeypatch):
    whole = sums(bound=bound)
    monkeypatch.setattr(cohort_passes, "_PASS_BYTES_OF_CONVOLUTIONS", pass_bytes)
    torch.testing.assert_close(sums(bound=bound), whole, atol=1e-6, rtol=1e-4)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 2000))
@settings(deadline=None)
def test_passes_hold_every_owner_and_all_of_its_batch(lengths, at_once):
    passes = list(cohort_passes._passes(lengths, at_once))
    assert {int(owner) for some, _ in passes for owner in some} == set(range(len(lengths)))
    assert len({len(some) for some, _ in passes}) == 1
    assert all(width >= max(1, *(lengths[owner] for owner in some)) for some, width in passes)
    assert all(len(some) == 1 or len(some) * width <= at_once for some, width in passes)
    assert sum(len(some) for some, _ in passes) < len(lengths) + len(passes)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_client_keeps_its_records_in_either_order(mixed):
    order, values = Order(3, mixed), torch.arange(24).view(3, 4, 2)
    assert torch.equal(order.apart(order.joined(values)), values)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", ["mlp", "cnn", "transformer"])
def test_a_record_that_is_not_finite_is_nobody_elses_trouble_in_either_order(family, mixed, monkeypatch):
    monkeypatch.setattr(Order, "mixes", staticmethod(lambda model: mixed))
    torch.manual_seed(0)
    shape = (3, 16) if family == "transformer" else (1, 8, 8)
    model = build_family({"family": family}, shape=shape, outputs=4)
    stacked, weights = StackedModel(model, TASK.loss), rows_of(model, 2)
    inputs, targets = torch.randn(2, 3, *shape), torch.randint(0, 4, (2, 3))
    there = torch.tensor([[True, True, True], [True, True, False]])
    without = torch.tensor([[True, False, True], [True, True, False]])
    wanted = stacked.clipped_sum(weights, inputs, targets, without, CLIP)
    for bad in (math.nan, math.inf, 3e38):
        inputs[0, 1] = bad
        inputs[1, 2] = bad  # where a batch is only filled up
        torch.testing.assert_close(
            stacked.clipped_sum(weights, inputs, targets, there, CLIP), wanted, atol=1e-6, rtol=1e-4
        )


POOLS = [
    torch.nn.MaxPool2d(2),
    torch.nn.MaxPool2d(3, stride=2, padding=1),
    torch.nn.MaxPool2d((2, 3), stride=(1, 2), dilation=(2, 1), ceil_mode=True),
]


@pytest.mark.parametrize("pool", POOLS)
def test_the_largest_is_found_where_the_layer_finds_it_also_among_equals(pool):
    inputs = torch.randint(0, 3, (5, 6, 9, 11), generator=torch.Generator().manual_seed(2)).float().requires_grad_()
    wanted, found = pool(inputs), max_pool(pool, inputs)
    assert torch.equal(found, wanted)
    back = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(3))
    (mine,), (its,) = (torch.autograd.grad(out, inputs, back) for out in (found, wanted))
    torch.testing.assert_close(mine, its, atol=1e-6, rtol=0.0)


def short_of_memory(most):
    """A task whose loss asks torch for more than there is when it sees more records than `most`."""

    def loss(outputs, targets):
        if len(outputs) > most:
            torch.empty(2**50)
        return TASK.loss(outputs, targets)

    return replace(TASK, loss_fn=loss)


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tacit"]


@pytest.mark.parametrize("bound", [CLIP, None])
@pytest.mark.parametrize("most", [1, 5, 40])
def test_without_memory_for_all_fewer_go_together_and_the_sums_are_the_same(bound, most, caplog):
    with caplog.at_level(logging.WARNING, logger="tacit"):
        found = sums(bound=bound, task=short_of_memory(most))
    torch.testing.assert_close(found, sums(bound=bound), atol=1e-6, rtol=1e-4)
    (line,) = logged(caplog)
    assert not any(character.isdigit() for character in line)  # how many records were drawn is secret


def test_without_memory_for_one_record_it_is_one_clear_line():
    with pytest.raises(MemoryError, match=r"^expected memory to take one record .*; train a smaller model.*$"):
        sums(task=short_of_memory(0))


def test_an_error_that_is_not_for_memory_stays_what_it_is():
    def loss(outputs, targets):
        raise RuntimeError("expected something else")

    with pytest.raises(RuntimeError, match="something else"):
        sums(task=replace(TASK, loss_fn=loss))


def test_steps_with_too_little_memory_draw_no_more_than_with_enough():
    class Counting(SeededGenerator):
        def __init__(self, seed):
            super().__init__(seed)
            self.drawn = []

        def bernoulli(self, count, probability):
            self.drawn.append(("coins", count))
            return super().bernoulli(count, probability)

        def gaussian(self, count, standard_deviation):
            self.drawn.append(("noise", count))
            return super().gaussian(count, standard_deviation)

    mechanism = Mechanism(
        unit="record",
        sample_rate=0.5,
        max_grad_norm=CLIP,
        noise_multiplier=1.0,
        steps_per_round=2,
        rounds=4,
        reference_size=20,
        delta=1e-5,
    )

    def walked(task):
        start = write_arrays(make_model("cnn"))
        walks = [
            Walk(arrays=start, records=held, randomness=Counting(seed), mechanism=mechanism)
            for seed, held in enumerate(HELD)
        ]
        rows = CohortSteps(task, make_model("cnn"), LocalRule(learning_rate=0.1), batch_rate=0.5)(walks)
        return rows, [walk.randomness.drawn for walk in walks]

    (enough, drawn), (short, drawn_then) = walked(TASK), walked(short_of_memory(10))
    assert drawn == drawn_then
    torch.testing.assert_close(short, enough, atol=1e-6, rtol=1e-4)


# Where it is computed.


def resolved(*overrides):
    return load_recipe("digits", overrides).federated


def test_a_recipe_says_where_it_is_computed():
    assert (resolved().engine, resolved().accelerator) == ("sequential", "cpu")
    at_once = resolved("federated.engine=vectorised")
    assert at_once.accelerator == best_accelerator()
    asked = resolved("federated.accelerator=cuda")
    assert (asked.engine, asked.accelerator) == ("vectorised", "cuda")  # also where there is none: it is only read


@pytest.mark.parametrize("settings", [["federated.engine=workers"], ["privacy.noise=hardened"]])
def test_an_accelerator_for_an_engine_that_has_no_use_for_it_is_refused(settings):
    with pytest.raises(RecipeRefused, match=r"expected federated.accelerator='cpu' with engine=.*got 'cuda'"):
        resolved("federated.accelerator=cuda", *settings)


ABSENT = [
    pytest.param(name, marks=pytest.mark.skipif(there, reason="there is one here"))
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
]


@pytest.mark.parametrize("name", ABSENT)
def test_an_accelerator_that_is_not_there_is_one_line(name):
    with pytest.raises(AcceleratorAbsent, match=f"^expected an accelerator .* got federated.accelerator='{name}'; .*$"):
        check_accelerator(name)


@pytest.mark.parametrize("name", ABSENT)
def test_a_run_on_an_accelerator_that_is_not_there_leaves_with_7_before_a_record_is_charged(name, tmp_path, capsys):
    options = ["run", "--out", str(tmp_path / "r"), "--set", f"federated.accelerator={name}"]
    code = cli.app.meta(options, exit_on_error=False, print_error=False, result_action="return_value")
    assert code == 7
    assert f"got federated.accelerator='{name}'" in capsys.readouterr().err
    ledger = tmp_path / "r" / "ledger.jsonl"
    assert not ledger.exists() or ledger.read_text(encoding="utf-8") == ""


def test_a_recipe_that_was_trained_with_auto_names_what_it_was_in_its_folder():
    text = load_recipe("digits", ["model.family=mlp", "federated.engine=vectorised"]).to_toml()
    assert f'accelerator = "{best_accelerator()}"' in text


HUNGRY = """
from dataclasses import replace
import torch
from tacit.federated.datasets import find_task

seen, begun = [], []

def loss(outputs, targets):
    if begun:
        seen.append(len(outputs))
        torch.empty(2**50)
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")

task = replace(find_task("digits"), loss_fn=loss)
"""


def test_owners_without_memory_are_charged_fail_and_are_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(HUNGRY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import hungry

    whole = Owner.__init__
    monkeypatch.setattr(
        Owner,
        "__init__",
        lambda self, **fields: whole(
            self, **{**fields, "records": lambda: hungry.begun.append(0) or fields["records"]()}
        ),
    )
    overrides = ["task.name=hungry:task", "model.family=mlp", "federated.engine=vectorised", "compression.variants=[]"]
    recipe = load_recipe("digits", [*overrides, "federated.owners=4", "privacy.noise_multiplier=1.0"])
    with pytest.raises(FederationFailed):
        train_in_process(recipe, tmp_path / "r", run="r", report=lambda row: None)
    assert hungry.seen[-1] == 1  # nor in larger numbers after it
    accounts, _, _ = read_ledger(tmp_path / "r" / "ledger.jsonl")
    assert {(a.reserved, a.released, a.failed) for a in accounts} == {(1, 0, 1)}
