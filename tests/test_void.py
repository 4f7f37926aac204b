"""`--unsafe-seed`: the secret class made reproducible for tests, and nobody can mistake it for a guarantee."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tacit.edge import composition, flower_app, pipeline
from tacit.edge.recipe import Recipe, load_recipe
from tacit.edge.run_folder import FolderMismatch, RunFolder
from tacit.federated.checkpoint import read_weights
from tacit.federated.datasets import find_task
from tacit.federated.mechanism import PrivacyRefused

SMALL = """
[federated]
owners = 3
rounds = 2
[privacy]
noise_multiplier = 1.0
[compression]
[[compression.variants]]
name = "plain"
format = "onnx"
[report]
twin = false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL)
    return load_recipe(path)


@pytest.fixture(scope="module")
def void(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    path = tmp_path_factory.mktemp("runs") / "x.guarantee-void"
    pipeline.run(recipe, path, unsafe_seed=7)
    return path


def test_every_file_that_may_be_handed_on_says_so_in_its_name(void: Path):
    handed = [p for p in void.rglob("*") if p.suffix in (".html", ".onnx") or p.name.startswith(("privacy", "summary"))]
    assert len(handed) == 4
    assert all("guarantee-void" in path.name for path in handed)


def test_every_output_says_so(void: Path):
    card = json.loads((void / "privacy.guarantee-void.json").read_text())
    summary = json.loads((void / "summary.guarantee-void.json").read_text())
    entry = json.loads((void / "ledger.jsonl").read_text().splitlines()[0])
    assert (card["guarantee"], card["noise"]) == ("VOID", "VOID")
    assert card["statement"].startswith("GUARANTEE VOID")
    assert summary["privacy"] == card
    assert pipeline.privacy_line(card).startswith("GUARANTEE VOID")
    assert "guarantee void" in entry["mechanism"]["noise"]
    assert "GUARANTEE VOID" in (void / "report.guarantee-void.html").read_text()


@pytest.mark.parametrize("unit", ["record", "client", "local"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(recipe, tmp_path: Path, unit: str):
    rate = 1.0 if unit == "local" else 0.4
    privacy = recipe.privacy.model_copy(update={"unit": unit, "sample_rate": rate, "reference_size": 3})
    recipe = recipe.model_copy(update={"privacy": privacy})

    def train(name: str, seed: int) -> dict[str, np.ndarray]:
        flower_app.train_in_process(recipe, tmp_path / name, run="r", report=lambda _: None, unsafe_seed=seed)
        return read_weights(tmp_path / name / "train" / "weights.safetensors")

    first, again, other = train("a", 7), train("b", 7), train("c", 8)
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_without_the_option_two_runs_differ(recipe, tmp_path: Path):
    def train(name: str) -> dict[str, np.ndarray]:
        flower_app.train_in_process(recipe, tmp_path / name, run="r", report=lambda _: None)
        return read_weights(tmp_path / name / "train" / "weights.safetensors")

    first, second = train("a"), train("b")
    assert any((first[name] != second[name]).any() for name in first)


def test_a_folder_whose_name_does_not_say_so_is_refused(recipe, tmp_path: Path):
    with pytest.raises(FolderMismatch, match=r"name it .*plain\.guarantee-void"):
        RunFolder(tmp_path / "plain", recipe, unsafe_seed=7)
    assert not (tmp_path / "plain").exists()


def test_a_run_keeps_its_seed_or_its_lack_of_one(void: Path, recipe, tmp_path: Path):
    with pytest.raises(FolderMismatch, match="as at the run's beginning"):
        RunFolder(void, recipe, unsafe_seed=8)
    folder = RunFolder(void, recipe)
    assert folder.unsafe_seed == 7
    folder.close()
    kept = RunFolder(tmp_path / "y.guarantee-void", recipe)
    kept.train.mkdir()
    kept.close()
    with pytest.raises(FolderMismatch, match="as at the run's beginning"):
        RunFolder(tmp_path / "y.guarantee-void", recipe, unsafe_seed=7)


def test_private_data_are_never_trained_on_with_a_seed(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = find_task("digits")
    data = replace(task.load(), status="private")
    monkeypatch.setattr(composition, "task_of", lambda _: replace(task, load=lambda: data))
    with pytest.raises(PrivacyRefused, match="nothing may be void"):
        composition.compose(recipe, tmp_path, unsafe_seed=7)
