"""Regression, anomaly detection, a user's own files and code, with and without public splits: the whole pipeline."""

import csv
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tacit.devices.interface import Interface
from tacit.devices.runtime import open_artifact
from tacit.edge import cli_stages, pipeline
from tacit.edge.planning import check_plan, task_of
from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.edge.sample_inputs import sample_inputs
from tacit.federated.task import Data, DataProblem, Records, Task

pytestmark = [
    # flwr brings typer, which imports names that click has deprecated.
    pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning"),
]

ONNX = '\n[[compression.variants]]\nname = "float"\nformat = "onnx"\n'
SMALL = """
[[compression.variants]]
name = "small"
format = "onnx"
passes = [{ name = "prune", ratio = 0.5 }, { name = "distill", epochs = 100 }, { name = "static_int8" }]
"""
COMMON = """
[report]
twin = false
"""
PRIVATE = """
[privacy]
noise_multiplier = 1.0
reference_size = 40
"""
REPEATABLE = """
[privacy]
unit = "none"
"""
NOT_MEASURED = """
[devices]
names = []
"""
OWN = """
import numpy as np
import torch
from tacit.devices.interface import Interface
from tacit.federated.models import build_family
from tacit.federated.task import Data, Records, Task

INTERFACE = Interface(shape=(5,), labels=("low", "high"))


def load():
    x = np.random.default_rng(1).normal(size=(160, 5)).astype("f4")
    records = Records(x, (x[:, 0] > 0).astype("i8"))
    split = records.take(np.arange(100)), records.take(np.arange(100, 160))
    return Data(private=split[0], public=None, test=split[1], status="public-benchmark")


def hits(outputs, labels):
    return float((outputs.argmax(1) == labels).mean())


def task():
    return Task(name="blobs", title="Blobs", interface=INTERFACE, load=load, score_fn=hits, score_name="hits",
                build=lambda parameters: build_family(parameters, shape=(5,), outputs=2))


class Net(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 8), torch.nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))
"""


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return f'"{path}"'


def toml(task: str, model: str, *, owners: int = 2, rounds: int = 3, partition: str = "natural") -> str:
    federated = f'owners = {owners}\nrounds = {rounds}\npartition = "{partition}"\nlearning_rate = 0.1'
    return f"[task]\n{task}\n[model]\n{model}\n[federated]\n{federated}\n{COMMON}"


def regression(folder: Path) -> str:
    random = np.random.default_rng(0)

    def rows(count: int) -> list[list[object]]:
        x = random.normal(size=(count, 4))
        return [[f"o{i % 2}", *map(float, r), float(500 + 100 * r.sum())] for i, r in enumerate(x)]

    names = ["who", "a", "b", "c", "d", "rent"]
    private = table(folder / "rent.csv", names, rows(80))
    test, public = (table(folder / f"{n}.csv", names[1:], [r[1:] for r in rows(50)]) for n in ("test", "public"))
    task = f'name = "rent"\nsource = "csv"\npath = {private}\nowner_column = "who"\nlabel = "rent"\nkind = "regression"'
    task += f"\ntarget_mean = [500]\ntarget_std = [200]\ntest = {test}\npublic = {public}"
    return toml(task, 'family = "mlp"\nhidden = [8]', rounds=12)  # without a [privacy] table


def anomaly(folder: Path, *, test: bool) -> str:
    random = np.random.default_rng(0)
    names = [f"s{i}" for i in range(6)]
    normal = random.normal(size=(80, 2)) @ random.normal(size=(2, 6))
    private = table(
        folder / "pumps.csv", ["who", *names], [[f"o{i % 2}", *map(float, r)] for i, r in enumerate(normal)]
    )
    task = f'name = "pumps"\nsource = "csv"\npath = {private}\nowner_column = "who"\nkind = "anomaly"\nshape = [2, 3]'
    if test:
        odd = [[*map(float, r), "ok"] for r in normal[:30]] + [[*map(float, 9 * r), "bad"] for r in normal[:10]]
        labelled = table(folder / "labelled.csv", ["who", *names, "state"], [["o0", *r] for r in odd])
        rows = [[f"o{i % 2}", *map(float, r), "ok"] for i, r in enumerate(normal)]
        private = table(folder / "pumps.csv", ["who", *names, "state"], rows)
        task += f'\nlabel = "state"\nlabels = ["ok", "bad"]\ntest = {labelled}'
    return toml(task, 'family = "autoencoder"\nhidden = [8, 2]') + PRIVATE


def pets(folder: Path) -> str:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for place, count in (("private/anna", 12), ("private/ben", 12), ("test", 6)):
        for name, middle in (("cat", 60), ("dog", 180)):
            (folder / place / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(random.normal(middle, 30, size=(32, 32, 3)), 0, 255).astype(np.uint8)
                image.fromarray(pixels).save(folder / place / name / f"{i}.png")
    task = f'name = "pets"\nsource = "images"\npath = "{folder}/private"\nowner_column = "folder"\nshape = [3, 32, 32]'
    task += f'\nlabels = ["cat", "dog"]\ntest = "{folder}/test"'
    return toml(task, 'family = "cnn"\nchannels = [4, 8]', rounds=2) + PRIVATE


def sequences(folder: Path, family: str) -> str:
    random = np.random.default_rng(0)
    rows = [
        [f"o{i // 2 % 2}", *map(float, random.normal(i % 2, 1, 48)), "fast" if i % 2 else "slow"] for i in range(60)
    ]
    private = table(folder / "pace.csv", ["who", *(f"t{i}" for i in range(48)), "pace"], rows)
    task = f'name = "pace"\nsource = "csv"\npath = {private}\nowner_column = "who"\nlabel = "pace"\nshape = [3, 16]'
    return toml(f'{task}\nlabels = ["slow", "fast"]', f'family = "{family}"', rounds=2) + PRIVATE


def finish(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TACIT_HOME", str(folder / "home"))
    (folder / "recipe.toml").write_text(text)
    return pipeline.run(folder / "recipe.toml", folder / "run")


def page_of(folder: Path) -> str:
    return (folder / "run" / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")


def test_a_regression_is_told_by_its_r_squared_down_to_the_pruned_and_distilled_artifact(tmp_path, monkeypatch):
    summary = finish(regression(tmp_path) + REPEATABLE + NOT_MEASURED + ONNX + SMALL, tmp_path, monkeypatch)
    assert (summary["metric"], summary["failed"]) == ("R2", [])
    test = task_of(load_recipe(tmp_path / "recipe.toml")).load().test
    for variant in summary["variants"]:
        outputs = open_artifact(tmp_path / "run" / "variants" / variant["name"] / "model.onnx").predict(test.inputs)
        explained = 1 - ((test.labels - outputs) ** 2).sum() / ((test.labels - test.labels.mean()) ** 2).sum()
        assert variant["accuracy"] == pytest.approx(explained, rel=1e-4)
        assert variant["parity"]["top1_agreement"] is None
        assert variant["parity"]["input_source"] == "test"
    exact, small = summary["variants"]
    assert exact["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-5)
    assert exact["parity"]["max_abs"] < 1e-4 < exact["parity"]["spread"]
    assert small["parity"]["cosine"] > 0.98
    assert small["accuracy"] > summary["accuracy"] - 0.2, "distilled towards values, not towards a softmax over them"
    page = page_of(tmp_path)
    assert "and reaches an R² of " in page
    assert not re.search("accuracy|same answer", re.sub("<[^>]*>", " ", page.partition("<body")[2]), re.IGNORECASE)


@pytest.mark.parametrize("test", [True, False])
def test_anomalies_are_found_in_examples_of_any_shape(tmp_path, monkeypatch, test):
    summary = finish(anomaly(tmp_path, test=test) + NOT_MEASURED * test + ONNX + SMALL, tmp_path, monkeypatch)
    assert summary["metric"] == "AUROC"
    assert [variant["name"] for variant in summary["variants"]] == ["float"], "the others come out"
    assert [(f["stage"], f["name"]) for f in summary["failed"]] == [("compress", "small")]
    assert "'distill'" in summary["failed"][0]["reason"]
    parity = summary["variants"][0]["parity"]
    assert (parity["top1_agreement"], parity["input_source"]) == (None, "test" if test else "synthetic")
    assert parity["cosine"] == pytest.approx(1.0, abs=1e-6)
    if test:
        assert summary["variants"][0]["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-3)
        assert "an AUROC of " in page_of(tmp_path)
    else:
        assert summary["accuracy"] is None
        assert summary["variants"][0]["accuracy"] is None
        assert summary["variants"][0]["latency"]["local"]["input_source"] == "synthetic"
        assert "Its AUROC is not measured." in page_of(tmp_path)
        assert "taken on synthetic inputs" in page_of(tmp_path)


def test_a_folder_of_images_becomes_an_artifact(tmp_path, monkeypatch):
    summary = finish(pets(tmp_path) + NOT_MEASURED + ONNX, tmp_path, monkeypatch)
    assert (summary["metric"], summary["failed"]) == ("accuracy", [])
    assert summary["variants"][0]["accuracy"] == summary["accuracy"]
    assert summary["variants"][0]["parity"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("family", ["conv1d", pytest.param("gru", marks=pytest.mark.soak)])
def test_sequences_without_any_public_split_become_artifacts(tmp_path, monkeypatch, family):
    summary = finish(sequences(tmp_path, family) + NOT_MEASURED + ONNX, tmp_path, monkeypatch)
    assert summary["accuracy"] is None
    parity = summary["variants"][0]["parity"]
    assert (parity["top1_agreement"], parity["input_source"]) == (1.0, "synthetic")
    assert "Its accuracy is not measured." in page_of(tmp_path)


def test_a_users_own_task_model_and_metric_go_all_the_way(tmp_path, monkeypatch):
    """Every variant but the last needs public inputs, of which there are none."""
    (tmp_path / "own_blobs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    text = toml('name = "own_blobs:task"', 'family = "own_blobs:Net"', partition="iid")
    summary = finish(text + PRIVATE + NOT_MEASURED + SMALL + ONNX, tmp_path, monkeypatch)
    assert (summary["metric"], summary["title"]) == ("hits", "Blobs")
    assert summary["variants"][0]["accuracy"] == summary["accuracy"]
    told = cli_stages.summary_outcome(summary, tmp_path / "run")
    assert told.code == 8
    assert told.text.startswith(f"hits      {summary['accuracy']:.3f}\n")
    assert "small: expected public inputs for the pass 'distill'" in told.text
    assert f"and reaches {summary['accuracy']:.3g} by hits" in page_of(tmp_path)


def test_of_an_artifact_that_cannot_be_judged_nothing_is_left(tmp_path, monkeypatch):
    """A model that is finite but for a few rare inputs is exported, and then its outputs cannot be compared."""
    rarely = "torch.where(x > 2.2, 3e38 * x * x, 0 * x).sum(1, True)"
    broken = OWN.replace("torch.relu(self.first(x)))", f"torch.relu(self.first(x))) + {rarely}")
    (tmp_path / "own_broken.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    text = toml('name = "own_broken:task"', 'family = "own_broken:Net"', partition="iid", rounds=1)
    summary = finish(text + PRIVATE + ONNX, tmp_path, monkeypatch)
    assert (summary["variants"], [f["name"] for f in summary["failed"]]) == ([], ["float"])
    assert "the model itself is broken" in summary["failed"][0]["reason"]
    assert not (tmp_path / "run" / "variants" / "float").exists()


def test_a_run_whose_variants_all_fail_still_ends_in_a_report(tmp_path, monkeypatch):
    summary = finish(sequences(tmp_path, "conv1d") + SMALL, tmp_path, monkeypatch)
    assert summary["variants"] == []
    assert [f["name"] for f in summary["failed"]] == ["small"]
    assert not (tmp_path / "run" / "measure").exists()
    assert "No artifacts were made in this run." in page_of(tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["regression", "anomaly", "images", "conv1d", "gru"])
def test_every_kind_becomes_a_tflite_artifact_too(tmp_path, monkeypatch, kind):
    made = {"regression": regression, "anomaly": lambda folder: anomaly(folder, test=True), "images": pets}
    text = made[kind](tmp_path) if kind in made else sequences(tmp_path, kind)
    text += PRIVATE if kind == "regression" else ""
    summary = finish(text + (ONNX + SMALL).replace('"onnx"', '"tflite"'), tmp_path, monkeypatch)
    exact = summary["variants"][0]
    assert exact["format"] == "tflite"
    assert exact["parity"]["max_abs"] < 1e-3
    assert exact["parity"]["cosine"] > 0.9999
    if summary["accuracy"] is not None:
        assert exact["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-3)
    assert len(summary["variants"]) == (2 if kind == "regression" else 1)


# What is refused before anything is charged.


@pytest.mark.parametrize("make", [regression, lambda folder: anomaly(folder, test=False)])
def test_owners_are_not_asked_how_often_values_are_right(tmp_path, make):
    (tmp_path / "recipe.toml").write_text(make(tmp_path))
    with pytest.raises(RecipeRefused, match=r"evaluate_every=0 for a task of kind '(regression|anomaly)', got 2"):
        check_plan(load_recipe(tmp_path / "recipe.toml", ["federated.evaluate_every=2"]))


def own_task(monkeypatch: pytest.MonkeyPatch, data: Data, kind: str) -> Any:
    """A recipe whose task is of this process."""
    output, labels = {"anomaly": ("reconstruction", ("ok", "bad")), "regression": ("values", ("y",))}[kind]
    interface = Interface(shape=(2,), labels=labels, output=output)
    task = Task(
        name="own", title="Own", interface=interface, kind=kind, load=lambda: data, build=lambda _: torch.nn.Identity()
    )
    monkeypatch.setattr(sys.modules[__name__], "the_task", task, raising=False)
    sys.modules.setdefault("tacit_test_kinds", sys.modules[__name__])
    return load_recipe(
        "digits", ['task.name="tacit_test_kinds:the_task"', 'federated.partition="iid"', "federated.owners=2"]
    )


def data_of(private: Records, test: Records | None) -> Data:
    return Data(private=private, public=None, test=test, status="public-benchmark")


def test_labels_that_would_be_compared_with_everybodys_outputs_are_refused(monkeypatch):
    x = np.zeros((4, 2), np.float32)
    flat = Records(x, np.zeros(4, np.float32))
    with pytest.raises(DataProblem, match=r"labels of shape \(records, 1\) of task 'own', got \(4,\)"):
        check_plan(own_task(monkeypatch, data_of(flat, None), "regression"))


@pytest.mark.parametrize(
    ("labels", "said"), [([0, 0, 0], "normal and anomalous"), ([], "expected records in the test split")]
)
def test_a_test_split_that_cannot_be_scored_is_refused_before_the_first_round(monkeypatch, labels, said):
    split = Records(np.zeros((len(labels), 2), np.float32), np.array(labels, np.int64))
    private = Records(np.zeros((6, 2), np.float32), np.zeros(6, np.int64))
    with pytest.raises(DataProblem, match=said):
        check_plan(own_task(monkeypatch, data_of(private, split), "anomaly"))


# What artifacts are compared and timed on.


def test_made_up_inputs_are_the_same_each_time_and_of_the_interfaces_shape(monkeypatch):
    private = Records(np.full((6, 2), 1e6, np.float32), np.zeros((6, 1), np.float32))
    task = task_of(own_task(monkeypatch, data_of(private, None), "regression"))
    made, again = (sample_inputs(task, data_of(private, None)) for _ in range(2))
    assert (made.source, made.values.shape, made.values.dtype) == ("synthetic", (256, 2), np.float32)
    assert np.array_equal(made.values, again.values)
    assert abs(made.values.mean()) < 0.2, "no record is read"
    public = np.ones((3, 2), np.float32)
    assert sample_inputs(task, Data(private=private, public=public, test=None, status="private")).source == "public"
