"""Owners' sizes: secret unless declared; declared, each owner has a rate, noise and weight of its own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tacit.edge.composition import compose
from tacit.edge.flower_app import train_in_process
from tacit.edge.planning import planned
from tacit.edge.recipe import Recipe, RecipeRefused, load_recipe
from tacit.federated.accounting import reported_epsilon
from tacit.federated.accounts import read_ledger
from tacit.federated.clipping import update_norm
from tacit.federated.folding import mean
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SeededGenerator
from tacit.federated.task import DataProblem
from tacit.federated.train import LocalTrainer, write_arrays

PUBLIC = ["federated.owners=4", "federated.rounds=2", "privacy.sizes=public", "model.channels=[4]"]


def _recipe(*settings: str) -> Recipe:
    return load_recipe("digits", [*PUBLIC, *settings])


@pytest.fixture(scope="module")
def data():
    from tacit.federated.datasets import find_task

    return find_task("digits").load()


def test_each_owner_keeps_the_same_budget_at_its_own_rate(data):
    plan = planned(_recipe("privacy.epsilon=6"), data)
    assert len(plan.own) == 4
    assert len({made.sample_rate for made in plan.own.values()}) == 4
    for made in plan.own.values():
        assert made.relation == "zero-out"
        assert made.normaliser == pytest.approx(0.4 * 128)
        assert 5.9 < reported_epsilon(made.plan, made.delta) <= 6.0


def test_an_owner_below_the_least_size_abstains_uncharged_and_is_listed(data, tmp_path: Path):
    sizes = sorted(made.reference_size for made in planned(_recipe("privacy.noise_multiplier=1.0"), data).own.values())
    recipe = _recipe("privacy.noise_multiplier=1.0", f"privacy.min_size={sizes[1]}", "federated.weights=size")
    plan = planned(recipe, data)
    assert len(plan.abstained) == 1
    composition = train_in_process(recipe, tmp_path, run="r", report=lambda _: None)
    accounts, _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert {account.owner for account in accounts} == set(plan.own)
    assert len(composition.owners) == 3
    rows = [json.loads(line) for line in (tmp_path / "train" / "rounds.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [3, 3]


def test_nobody_left_is_said_before_anything_is_charged(data):
    with pytest.raises(DataProblem, match="lower it"):
        planned(_recipe("privacy.min_size=100000"), data)


def test_a_mechanism_with_secret_sizes_takes_none():
    mechanism = Mechanism(
        unit="record", sample_rate=0.5, max_grad_norm=1.0, noise_multiplier=1.0, steps_per_round=1, rounds=1,
        reference_size=64, delta=1e-5,
    )  # fmt: skip
    with pytest.raises(PrivacyRefused):
        mechanism.of_size(10)
    with pytest.raises(PrivacyRefused):
        replace(mechanism, unit="client", sizes="public")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["privacy.sizes=public", "privacy.unit=client"], "its guarantee covers"),
        (["privacy.sizes=public", "privacy.unit=local"], "its guarantee covers"),
        (["privacy.min_size=10"], "who abstains tells"),
        (["federated.weights=size"], "public weights"),
        (["federated.weights=size", "privacy.unit=client"], "uniform or bounded weights"),
        (["federated.weights=bounded", "privacy.unit=client"], "weight_cap"),
        (["federated.weights=bounded", "federated.weight_cap=5"], "public weights"),
        (["federated.weights=bounded", "federated.weight_cap=5", "privacy.unit=none"], "'uniform' or 'size'"),
        (["federated.weight_cap=5"], "weight_cap"),
    ],
)
def test_what_would_tell_sizes_is_refused(settings, words):
    with pytest.raises(RecipeRefused, match=words):
        load_recipe("digits", settings)


def test_the_mean_follows_its_weights_whatever_their_scale():
    updates = [{"w": np.float32([1.0])}, {"w": np.float32([4.0])}]
    assert mean(updates, [2.0, 1.0])["w"].tolist() == mean(updates, [20.0, 10.0])["w"].tolist() == [2.0]


def test_without_a_guarantee_owners_may_weigh_by_size(data, tmp_path: Path):
    by_size = load_recipe("digits", ["privacy.unit=none", "federated.weights=size", "federated.owners=3"])
    composition = compose(by_size, tmp_path)
    assert sum(composition.sizes.values()) == len(data.private)
    assert planned(by_size, data).abstained == ()


def test_a_bounded_weight_is_inside_the_clip(tmp_path: Path):
    settings = [
        "privacy.unit=client",
        "federated.weights=bounded",
        "privacy.noise_multiplier=1.0",
        "federated.owners=4",
    ]
    recipe = load_recipe("digits", [*settings, "federated.weight_cap=100", "privacy.sample_rate=1.0"])
    composition = compose(recipe, tmp_path)
    arrays, records = write_arrays(composition.model), composition.owners[0].records()
    few, many = records.take(np.arange(25)), records.take(np.resize(np.arange(25), 400))

    def change(trainer: LocalTrainer, held, clip_norm: float) -> dict[str, np.ndarray]:
        after, _ = trainer.client_update(arrays, held, SeededGenerator(3), clip_norm=clip_norm)
        return {name: after[name] - arrays[name] for name in arrays}

    plain = LocalTrainer(composition.task, composition.model, composition.mechanism, learning_rate=0.25, batch_rate=1.0)
    bounded = LocalTrainer(
        composition.task, composition.model, composition.mechanism, learning_rate=0.25, batch_rate=1.0, weight_cap=100
    )
    ratio = update_norm(change(bounded, few, 1e9)) / update_norm(change(plain, few, 1e9))
    assert ratio == pytest.approx(0.25, rel=1e-3)  # 25 of 100
    assert update_norm(change(bounded, many, 1e9)) == pytest.approx(update_norm(change(plain, many, 1e9)), rel=1e-3)
    assert update_norm(change(bounded, many, 0.01)) <= 0.0101


def test_a_delta_that_would_allow_to_publish_a_record_is_warned_about():
    from tacit.edge.planning import delta_note, mechanism_of

    def note(delta: float) -> str | None:
        return delta_note(
            mechanism_of(load_recipe("digits", [f"privacy.delta={delta}", "privacy.noise_multiplier=1.0"]))
        )

    assert note(1e-5) is None
    assert "choose a smaller privacy.delta" in str(note(1 / 128))
