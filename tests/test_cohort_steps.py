"""Owners' steps taken at once are those taken one by one: every family, every optimizer, private and not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.federated.accounts import read_ledger
from tacit.federated.checkpoint import read_weights
from tacit.federated.clipping import clip_update
from tacit.federated.cohort import CohortSteps, Walk, cohort_refusal
from tacit.federated.datasets import find_task
from tacit.federated.local_steps import LocalRule
from tacit.federated.mechanism import Mechanism
from tacit.federated.model_arrays import write_arrays
from tacit.federated.models import FAMILIES, build_family
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.stacked_layers import unstackable_layers
from tacit.federated.stacked_model import StackedModel
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer

SHAPES = {"conv1d": (3, 16), "gru": (3, 8), "lstm": (3, 8), "transformer": (3, 16)}
TASK = find_task("digits")
MECHANISM = Mechanism(
    unit="record",
    sample_rate=0.5,
    max_grad_norm=0.5,
    noise_multiplier=1.0,
    steps_per_round=3,
    rounds=4,
    reference_size=20,
    delta=1e-5,
)
PLAIN = replace(MECHANISM, unit="none", noise_multiplier=0.0, max_grad_norm=math.inf)


def make_model(**parameters):
    torch.manual_seed(0)
    return build_family({"family": "mlp", "hidden": [8], **parameters}, shape=(1, 8, 8), outputs=10)


def records(count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.random((count, 1, 8, 8)).astype(np.float32)
    return Records(inputs, generator.integers(0, 10, count))


def loss(outputs, targets):
    if outputs.dim() != 2:
        return outputs.square().sum()
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_clients_sum_is_that_of_plain_autograd_with_its_own_weights(family):
    shape = SHAPES.get(family, (1, 12, 12))
    torch.manual_seed(0)
    agree_with_autograd(build_family({"family": family}, shape=shape, outputs=4).train(), shape)


def agree_with_autograd(model, shape):
    assert unstackable_layers(model) == []
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    weights = flat + 0.02 * torch.randn(3, len(flat))
    inputs, targets = torch.randn(3, 4, *shape), torch.randint(0, 4, (3, 4))
    there = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    stacked = StackedModel(model, loss)
    clipped = stacked.clipped_sum(weights, inputs, targets, there, 0.3)
    summed = stacked.weighted_sum(weights, inputs, targets, there.float())
    for client in range(3):
        torch.nn.utils.vector_to_parameters(weights[client], model.parameters())
        wanted, wanted_sum = torch.zeros(len(flat)), torch.zeros(len(flat))
        for place in range(int(there[client].sum())):
            one = loss(model(inputs[client, [place]]), targets[client, [place]])
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()))])
            wanted_sum += gradient
            wanted += gradient * min(1.0, 0.3 / float(gradient.norm()))
        torch.testing.assert_close(clipped[client], wanted, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(summed[client], wanted_sum, atol=2e-5, rtol=1e-3)


def in_place(*layers, outputs):
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(outputs, 4)), (1, 8, 8)


IN_PLACE = {
    "after a product": lambda: in_place(torch.nn.Linear(8, 6), torch.nn.ReLU(inplace=True), outputs=48),
    "after a convolution": lambda: in_place(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(inplace=True), outputs=288),
    "after a group's norm": lambda: in_place(
        torch.nn.Conv2d(1, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(inplace=True), outputs=288
    ),
    "after a layer's norm": lambda: in_place(
        torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.ReLU(inplace=True), outputs=48
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_activation_in_place_hides_no_layer_from_the_norm(name):
    torch.manual_seed(0)
    model, shape = IN_PLACE[name]()
    agree_with_autograd(model, shape)


@pytest.mark.parametrize("mechanism", [MECHANISM, PLAIN, replace(MECHANISM, unit="none", noise_multiplier=0.0)])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "rmsprop", "adagrad"])
def test_steps_at_once_are_those_one_by_one(mechanism, optimizer):
    model = make_model()
    rule = LocalRule(learning_rate=0.05, optimizer=optimizer, proximal=0.1)
    start = write_arrays(model)
    held = [records(count, seed) for seed, count in enumerate((30, 7, 1, 0))]
    together = CohortSteps(TASK, make_model(), rule, batch_rate=0.5)
    walks = [
        Walk(arrays=start, records=part, randomness=SeededGenerator(seed), mechanism=mechanism)
        for seed, part in enumerate(held)
    ]
    rows = together(walks).numpy()
    trainer = LocalTrainer(TASK, model, mechanism, rule=rule, batch_rate=0.5)
    for seed, part in enumerate(held):
        alone = trainer.update(start, part, SeededGenerator(seed))
        for name, array in together.arrays(rows[seed]).items():
            # A step that is divided by the gradient's size makes rounding of small gradients visible.
            close = 2e-6 if optimizer in ("sgd", "momentum") else 1e-4
            np.testing.assert_allclose(array, alone[name], atol=close, err_msg=f"{seed} {name}")


def test_a_cohort_larger_than_a_pass_is_taken_in_passes(monkeypatch):
    from tacit.federated import cohort_passes

    start, rule = write_arrays(make_model()), LocalRule(learning_rate=0.1)
    held = [records(9, seed) for seed in range(7)]

    def rows():
        walks = [
            Walk(arrays=start, records=part, randomness=SeededGenerator(seed), mechanism=MECHANISM)
            for seed, part in enumerate(held)
        ]
        return CohortSteps(TASK, make_model(), rule, batch_rate=0.5)(walks)

    whole = rows()
    monkeypatch.setattr(cohort_passes, "_PASS_BYTES", 1)
    torch.testing.assert_close(rows(), whole)


def one_position():
    """A convolution whose weighted sum takes another backward pass."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten(), torch.nn.Linear(4, 10))


@pytest.mark.parametrize("model", [make_model, one_position])
def test_a_record_that_is_not_finite_contributes_nothing_and_is_nobody_elses_trouble(model):
    start, rule = write_arrays(model()), LocalRule(learning_rate=1.0)
    quiet = replace(MECHANISM, noise_multiplier=1e-9, sample_rate=1.0, steps_per_round=1)
    bad = records(5, 1)
    bad.inputs[2] = np.nan
    clean = bad.take(np.array([0, 1, 3, 4]))

    def rows(first):
        pair = (first, records(5, 2))
        walks = [
            Walk(arrays=start, records=part, randomness=SeededGenerator(seed), mechanism=quiet)
            for seed, part in enumerate(pair)
        ]
        return CohortSteps(TASK, model(), rule, batch_rate=0.5)(walks)

    with_it, without = rows(bad), rows(clean)
    assert torch.isfinite(with_it).all()
    torch.testing.assert_close(with_it, without, atol=1e-6, rtol=0.0)
    assert float((with_it[0] - rows(records(0))[0]).abs().max()) > 1e-3


def test_one_record_moves_its_own_owners_sum_by_no_more_than_the_norm_and_nobody_elses():
    start, rule = write_arrays(make_model()), LocalRule(learning_rate=1.0)
    quiet = replace(MECHANISM, noise_multiplier=1e-9, sample_rate=1.0, steps_per_round=1)
    large = records(6, 1)
    large.inputs[0] *= 1e4

    def rows(first):
        walks = [
            Walk(arrays=start, records=part, randomness=SeededGenerator(seed), mechanism=quiet)
            for seed, part in enumerate((first, records(5, 2)))
        ]
        return CohortSteps(TASK, make_model(), rule, batch_rate=0.5)(walks)

    moved = (rows(large) - rows(large.take(np.arange(1, 6)))) * quiet.normaliser
    assert 0.49 < float(moved[0].norm()) <= 0.5 * (1 + 1e-4)
    assert float(moved[1].norm()) < 1e-4


def test_owners_of_one_secret_generator_get_noise_of_their_own():
    start, rule, secret = write_arrays(make_model()), LocalRule(learning_rate=1.0), SecretGenerator()
    one_step = replace(MECHANISM, steps_per_round=1)
    walks = [Walk(arrays=start, records=records(0), randomness=secret, mechanism=one_step) for _ in range(5)]
    rows = CohortSteps(TASK, make_model(), rule, batch_rate=0.5)(walks)
    begin = torch.cat([torch.from_numpy(array).flatten() for array in start.values()])
    noise = (rows - begin) * one_step.normaliser / (MECHANISM.noise_multiplier * MECHANISM.max_grad_norm)
    assert len(torch.unique(noise)) > 0.99 * noise.numel()
    spread = noise.std(dim=1)
    assert ((spread > 0.85) & (spread < 1.15)).all()
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.2


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LSTM(64, 10)), {}, "stacked form"),
        (lambda: torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)), {}, "form"),
        (make_model, {"hardened": True}, "grid"),
    ],
)
def test_what_cannot_be_taken_at_once_says_why(model, changes, words):
    assert words in cohort_refusal(model(), replace(MECHANISM, **changes), augmented=False)


SMALL = ["federated.rounds=2", "federated.owners=4", "federated.local_steps=2", "compression.variants=[]"]
MLP = ["model.family=mlp", "model.hidden=[8]", "federated.partition=iid"]


def trained(folder: Path, engine: str, *settings: str, seed: int | None = None):
    recipe = load_recipe("digits", [*SMALL, f"federated.engine={engine}", *settings])
    rows: list[dict[str, object]] = []
    train_in_process(recipe, folder / f"{engine}.guarantee-void", run="r", report=rows.append, unsafe_seed=seed)
    found = folder / f"{engine}.guarantee-void" / "train" / "weights.safetensors"
    return read_weights(found), [row for row in rows if "round" in row]


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        (["privacy.unit=none"], None),
        (["privacy.unit=none", "federated.strategy=scaffold"], None),
        (["privacy.unit=none", "federated.strategy=fedavg", "federated.aggregation=median"], None),
        (["privacy.unit=none", "federated.strategy=fedbuff"], None),
        (["privacy.unit=none", "federated.strategy=q-ffl"], None),
        (["privacy.unit=none", "federated.strategy=flwr.serverapp.strategy:FedAvg"], None),
        (["privacy.unit=none", "federated.strategy=fedavg", "federated.codec=top-k"], None),
        (["privacy.unit=none", "federated.strategy=fedavg", "federated.personal=local-head"], None),
        (["privacy.unit=none", "federated.failures.corrupt_share=0.25", "federated.failures.dropout=0.2"], None),
        (["privacy.noise_multiplier=1.0"], 3),
        (["privacy.noise_multiplier=1.0", "federated.strategy=fedavg", "federated.personal=ditto"], 3),
        (["privacy.noise_multiplier=1.0", "privacy.sizes=public"], 3),
        (["privacy.unit=client", "privacy.noise_multiplier=0.5", "privacy.sample_rate=0.9"], 3),
        (["privacy.unit=local", "privacy.noise_multiplier=0.5"], 3),
    ],
)
def test_a_run_of_either_engine_ends_with_the_same_model_and_the_same_rows(tmp_path: Path, settings, seed):
    one, rows = trained(tmp_path, "sequential", *MLP, *settings, seed=seed)
    other, other_rows = trained(tmp_path, "vectorised", *MLP, *settings, seed=seed)
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=3e-6, err_msg=name)
    ours = [{k: v for k, v in row.items() if k != "accuracy"} for row in other_rows]
    assert ours == [{k: v for k, v in row.items() if k != "accuracy"} for row in rows]


def test_the_same_recipe_and_seed_give_the_same_bytes(tmp_path: Path):
    first, _ = trained(tmp_path / "a", "vectorised", *MLP, "privacy.unit=none")
    second, _ = trained(tmp_path / "b", "vectorised", *MLP, "privacy.unit=none")
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_an_engine_that_cannot_do_it_is_refused_before_a_round(tmp_path: Path):
    with pytest.raises(RecipeRefused, match="engine='sequential'"):
        trained(tmp_path, "vectorised", "privacy.unit=none", "model.norm=batch")


def test_clipped_updates_of_clients_are_bounded_whichever_engine(tmp_path: Path):
    """The client's own clip is applied to what the engine found, as to what one owner finds alone."""
    trainer = LocalTrainer(
        TASK, make_model(), replace(PLAIN, unit="client", max_grad_norm=1.0, noise_multiplier=1.0), learning_rate=5.0
    )
    start = write_arrays(make_model())
    far = {name: array + 3.0 for name, array in start.items()}
    after, within = trainer.given(far).client_update(start, records(3), SeededGenerator(1), clip_norm=0.1)
    change = {name: after[name] - start[name] for name in start}
    assert not within
    assert all(np.allclose(change[name], clip_update(change, 0.1)[name], atol=1e-6) for name in change)


def private_run(folder: Path):
    recipe = load_recipe("digits", [*SMALL, *MLP, "federated.engine=vectorised", "privacy.noise_multiplier=1.0"])
    train_in_process(recipe, folder, run="r", report=lambda row: None)
    return recipe


def test_what_a_cohort_releases_is_charged_before_and_on_disk_for_each_owner(tmp_path: Path):
    private_run(tmp_path)
    accounts, _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert [(a.owner, a.reserved, a.released, a.failed) for a in accounts] == [
        (f"owner-0{n}", 2, 2, 0) for n in range(4)
    ]
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == (["reserve"] * 4 + ["release"] * 4) * 2
    assert len({line["payload"] for line in lines if line["kind"] == "release"}) == 8
    answered = [path for path in (tmp_path / "train" / "outbox").rglob("*") if path.is_file()]
    assert answered  # of the last round, until the next is settled


def test_an_owner_whose_records_cannot_be_read_fails_alone_and_is_charged(tmp_path: Path, monkeypatch):
    from tacit.federated.owner import Owner

    whole = Owner.__init__

    def breaking(self, **fields):
        read = fields["records"]
        if fields["name"] == "owner-02":
            read = lambda: 1 / 0  # noqa: E731
        whole(self, **{**fields, "records": read})

    monkeypatch.setattr(Owner, "__init__", breaking)
    rows: list[dict[str, object]] = []
    recipe = load_recipe("digits", [*SMALL, *MLP, "federated.engine=vectorised", "privacy.noise_multiplier=1.0"])
    train_in_process(recipe, tmp_path, run="r", report=rows.append)
    assert [row["refusals"] for row in rows if "round" in row] == [{"unavailable": 1}] * 2
    accounts, _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert {a.owner: (a.released, a.failed) for a in accounts} == {
        **{f"owner-0{n}": (2, 0) for n in (0, 1, 3)},
        "owner-02": (0, 2),
    }
