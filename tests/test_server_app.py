"""Beginning again: which checkpoint, which ledger, and what that costs; and what a run keeps of its owners' answers."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tacit.edge.composition import compose
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated.accounting import reported_epsilon
from tacit.federated.accounts import find_ledgers, read_ledger
from tacit.federated.checkpoint import load_checkpoint, read_weights
from tacit.federated.evaluation import Evaluator
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.rounds import FederationFailed
from tacit.federated.train import LocalTrainer

ROUNDS, OWNERS = 3, 2
SETTINGS = [
    f"federated.rounds={ROUNDS}",
    f"federated.owners={OWNERS}",
    "federated.partition=iid",
    "model.channels=[4]",
    "privacy.sample_rate=0.05",
    "privacy.noise_multiplier=2.0",
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", SETTINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    folder = tmp_path_factory.mktemp("server")
    train_in_process(recipe, folder, run="r", report=lambda row: None)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def _again(recipe: Recipe, folder: Path) -> list[str]:
    notes: list[str] = []
    train_in_process(recipe, folder, run="r", report=lambda row: notes.append(str(row.get("note", ""))))
    return [note for note in notes if note]


def _charged(folder: Path) -> list[tuple[int, int]]:
    accounts, _, _ = read_ledger(folder / "ledger.jsonl")
    return [(account.reserved, account.released) for account in accounts]


def test_a_damaged_checkpoint_is_named_and_its_round_is_answered_again_for_free(copy: Path, recipe: Recipe) -> None:
    before = read_weights(copy / "train" / "weights.safetensors")
    newest = sorted((copy / "train" / "checkpoint").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    notes = _again(recipe, copy)
    assert any(newest.name in note for note in notes)
    assert _charged(copy) == [(ROUNDS, ROUNDS)] * OWNERS
    after = read_weights(copy / "train" / "weights.safetensors")
    # The outbox still had the round's payloads, so the same bytes were averaged: the model is the same.
    assert all((before[name] == after[name]).all() for name in before)


def test_an_older_ledger_is_refused(copy: Path, recipe: Recipe) -> None:
    ledger = copy / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[: 2 * OWNERS]))
    with pytest.raises(PrivacyRefused, match="older"):
        _again(recipe, copy)


def test_without_any_checkpoint_the_budget_still_holds(copy: Path, recipe: Recipe) -> None:
    """The first round cannot be answered again and is left out; any other would be a new charge."""
    shutil.rmtree(copy / "train" / "checkpoint")
    with pytest.raises(FederationFailed, match="exhausted"):
        _again(recipe, copy)
    assert _charged(copy) == [(ROUNDS, ROUNDS)] * OWNERS


def test_another_recipes_checkpoint_is_refused(copy: Path) -> None:
    other = load_recipe("digits", [*SETTINGS, "federated.learning_rate=0.1"])
    with pytest.raises(ValueError, match="another's"):
        train_in_process(other, copy, run="r", report=lambda row: None)


def test_a_checkpoint_remembers_the_ledgers_head(trained: Path) -> None:
    checkpoint, notes = load_checkpoint(trained / "train" / "checkpoint")
    assert checkpoint is not None
    assert notes == []
    (path,) = find_ledgers(trained)
    _, head, _ = read_ledger(path)
    assert checkpoint.ledger_head == head


EVALUATING = [*SETTINGS, "federated.evaluate_every=2"]


def _rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "train" / "rounds.jsonl").read_text().splitlines()]


def test_what_the_owners_records_say_is_in_the_rows_and_survives_a_checkpoint(tmp_path: Path) -> None:
    """With the last checkpoint gone its round is done again: the same answers for the same charge."""
    recipe = load_recipe("digits", EVALUATING)
    train_in_process(recipe, tmp_path, run="r", report=lambda row: None)
    rows = _rows(tmp_path)
    stated = [row["owners_accuracy"] for row in rows]
    assert stated[0] is None
    for one in stated[1:]:
        assert isinstance(one, dict)
        assert set(one) == {"mean", "low", "high", "confidence", "noise_sd", "by_owner", "refusals"}
        assert list(one["by_owner"]) == ["owner-00", "owner-01"]
        assert (one["noise_sd"], one["refusals"]) == (10.0, {})
    sorted((tmp_path / "train" / "checkpoint").glob("*.safetensors"))[-1].unlink()
    _again(recipe, tmp_path)
    assert _rows(tmp_path) == rows
    assert _charged(tmp_path) == [(ROUNDS + 2, ROUNDS + 2)] * OWNERS


def test_a_run_whose_evaluations_are_paid_from_its_epsilon_keeps_it(tmp_path: Path) -> None:
    budget = [*SETTINGS[:-1], "privacy.sample_rate=1.0", "privacy.epsilon=6.0"]
    paying = ["federated.evaluate_every=2", "privacy.evaluation_noise_multiplier=3.0"]
    recipe = load_recipe("digits", [*budget, *paying])
    composition = train_in_process(recipe, tmp_path, run="r", report=lambda row: None)
    accounts, _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert [account.history for account in accounts] == composition.plans * OWNERS
    assert len(composition.plans[0]) == 2
    assert 5.9 < reported_epsilon(composition.plans[0], 1e-5) <= 6.0
    without = compose(load_recipe("digits", budget), tmp_path)
    assert composition.mechanism.noise_multiplier > without.mechanism.noise_multiplier


@pytest.mark.parametrize("unit", ["client", "local"])
def test_at_other_units_a_run_evaluates_too(tmp_path: Path, unit: str) -> None:
    settings = [f"federated.rounds={ROUNDS}", "federated.owners=6", "model.channels=[4]", "federated.evaluate_every=3"]
    recipe = load_recipe("digits", [*settings, f"privacy.unit={unit}", "privacy.noise_multiplier=2.0"])
    train_in_process(recipe, tmp_path, run="r", report=lambda row: None)
    last = _rows(tmp_path)[-1]["owners_accuracy"]
    assert isinstance(last, dict)
    assert len(last["by_owner"]) == (0 if unit == "client" else 6)  # nobody learns who took part
    assert _charged(tmp_path) == [(ROUNDS + 1, ROUNDS + 1)] * (1 if unit == "client" else 6)


def _fail(*_: object, **__: object) -> None:
    raise ValueError("SECRET")


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_failing_owners_text_is_where_only_its_keeper_reads_it(
    tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At client level not even the name of who failed is outside of the server's own folder."""
    for method in ("update", "client_update"):
        monkeypatch.setattr(LocalTrainer, method, _fail)
    monkeypatch.setattr(Evaluator, "release", _fail)
    settings = [*EVALUATING, f"privacy.unit={unit}"] + (["privacy.sample_rate=1.0"] if unit == "client" else [])
    recipe, notes = load_recipe("digits", settings), []
    try:
        train_in_process(recipe, tmp_path, run="r", report=notes.append)
    except FederationFailed as failed:
        notes.append({"error": str(failed)})
    private = tmp_path / "train" / "private"
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    assert len(holding) == OWNERS
    assert "SECRET" not in str(notes)
    if unit == "record":
        assert {path.parent.parent for path in holding} == {tmp_path / "owners"}
        return
    assert {path.parent for path in holding} == {private}
    assert (private.stat().st_mode & 0o777, holding[0].stat().st_mode & 0o777) == (0o700, 0o600)
    named = [p for p in tmp_path.rglob("*") if p.is_file() and b"owner-0" in p.read_bytes() + os.fsencode(p)]
    assert {path.parent for path in named} == {private}
