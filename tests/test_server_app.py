"""Beginning again: which checkpoint, which ledger, and what that costs."""

import shutil
from pathlib import Path

import pytest

from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated.accounts import find_ledgers, read_ledger
from tacit.federated.checkpoint import load_checkpoint, read_weights
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.rounds import FederationFailed

ROUNDS, OWNERS = 3, 2
SETTINGS = [
    f"federated.rounds={ROUNDS}",
    f"federated.owners={OWNERS}",
    "federated.partition=iid",
    "model.channels=[4]",
    "privacy.sample_rate=0.05",
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
