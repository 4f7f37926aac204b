"""The whole pipeline on real data: one small run that tests share, and runs refused, interrupted or starved."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.compression.export_onnx import read_stamp_onnx
from tacit.devices.runtime import open_artifact
from tacit.edge import pipeline
from tacit.edge.recipe import RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderMismatch
from tacit.federated.accounting import epsilon_pld
from tacit.federated.accounts import read_ledger
from tacit.federated.datasets import find_task
from tacit.federated.task import DataProblem

pytestmark = [
    # flwr brings typer, which imports names that click has deprecated.
    pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning"),
]

TACIT = Path(sys.executable).with_name("tacit")
SMALL = """
[federated]
owners = 3
rounds = 3

[report]
twin = false

[[compression.variants]]
name = "onnx-float32"
format = "onnx"

[[compression.variants]]
name = "onnx-dynamic"
format = "onnx"
passes = [{ name = "dynamic_int8" }]
"""
# Noise given instead of ε needs no calibration, and no variants need no exporter: what is left is training.
TRAINING_ONLY = """
[federated]
owners = 3
rounds = 40

[privacy]
noise_multiplier = 4.0

[compression]
variants = []

[report]
twin = false
"""


def tacit(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TACIT, *arguments], capture_output=True, text=True, timeout=200, **options)


def the_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The single error line, after progress, of a command that ended with this code."""
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    return errors[0]


def content(path: Path) -> dict[str, bytes]:
    return {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run and the summary that it returned; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("runs") / "small"
    return path, pipeline.run(recipe_file, path)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "run")


# What a finished run holds.


def test_the_summary_has_every_promised_key(finished):
    _, summary = finished
    assert {"task", "accuracy", "accuracy_without_privacy", "privacy", "variants", "versions", "wall_s"} <= set(summary)
    assert {
        "unit", "relation", "adversary", "epsilon", "delta", "accountant", "epsilon_by_owner", "scope", "engine",
        "noise", "data_status", "ledger_head",
    } <= set(summary["privacy"])  # fmt: skip
    assert [variant["name"] for variant in summary["variants"]] == ["onnx-float32", "onnx-dynamic"]
    for variant in summary["variants"]:
        assert {"format", "label", "bytes", "accuracy", "pruned", "parity", "data_use", "latency"} <= set(variant)
        assert {"top1_agreement", "max_abs", "cosine"} <= set(variant["parity"])
        assert {"p50_us", "p90_us", "n", "ci", "peak_memory_bytes"} <= set(variant["latency"]["local"])
    assert {"train", "compress", "measure", "report"} <= set(summary["wall_s"])
    assert summary["accuracy_without_privacy"] is None


def test_the_summary_on_disk_is_the_one_that_was_returned(finished):
    path, summary = finished
    assert json.loads((path / "summary.json").read_text()) == summary
    assert "recipe" in summary
    assert (path / "recipe.toml").read_text() == summary["recipe"]


def test_the_report_is_one_page_with_the_runs_own_figures(finished):
    path, summary = finished
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "onnx-dynamic" in page
    assert summary["privacy"]["ledger_head"] in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page.partition("<body")[2])


def test_the_stated_epsilon_is_what_the_ledger_charges(finished):
    path, summary = finished
    accounts, head, note = read_ledger(path / "ledger.jsonl")
    stated = summary["privacy"]
    assert (len(accounts), note) == (3, None)
    assert stated["ledger_head"] == head
    for account in accounts:
        assert (account.reserved, account.released, account.failed, account.reopened) == (3, 3, 0, 0)
        own = epsilon_pld(account.history, stated["delta"])
        assert stated["epsilon_by_owner"][account.owner] == pytest.approx(own, rel=1e-12)
    assert stated["epsilon"] == max(stated["epsilon_by_owner"].values())
    assert 7.8 < stated["epsilon"] <= 8.0, "the recipe's budget is met and used"


def test_every_artifact_carries_the_digest_of_the_privacy_card(finished):
    path, _ = finished
    digest = hashlib.sha256((path / "privacy.json").read_bytes()).hexdigest()
    artifacts = sorted(path.glob("variants/*/model.onnx"))
    assert len(artifacts) == 2
    for artifact in artifacts:
        assert read_stamp_onnx(artifact)["tacit.privacy_sha256"] == digest


def test_sizes_and_accuracies_are_those_of_the_files_that_ship(finished):
    path, summary = finished
    test = find_task("digits").load().test
    for variant in summary["variants"]:
        artifact = path / "variants" / variant["name"] / "model.onnx"
        assert variant["bytes"] == artifact.stat().st_size
        predicted = open_artifact(artifact, input_layout="channel_first").predict(test.inputs).argmax(1)
        assert variant["accuracy"] == np.mean(predicted == test.labels)
    assert summary["variants"][0]["accuracy"] == pytest.approx(summary["accuracy"], abs=1.5 / len(test.labels))
    assert summary["test_examples"] == len(test.labels)


def test_the_log_tells_of_every_stage_and_round(finished):
    lines = [json.loads(line) for line in (finished[0] / "log.jsonl").read_text().splitlines()]
    stages = [(line["event"], line["stage"]) for line in lines if "stage" in line]
    expected = ["train", "compress", "measure", "report"]
    assert stages == [(event, stage) for stage in expected for event in ("begin", "end")]
    assert [line["round"] for line in lines if line["event"] == "round"] == [1, 2, 3]


# The same folder again.


def test_a_second_run_in_the_folder_needs_resume(copied, recipe_file):
    before = content(copied)
    assert "--resume" in the_error(tacit("run", recipe_file, "--out", copied), 2)
    with pytest.raises(FolderMismatch, match="--resume"):
        pipeline.run(recipe_file, copied)
    assert {name: data for name, data in content(copied).items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }


def test_resuming_a_finished_run_does_nothing_again(copied, recipe_file):
    before = content(copied)
    pipeline.run(recipe_file, copied, resume=True)
    after = content(copied)
    told = {"lock", "log.jsonl", "run.json", "summary.json", "report.html"}  # where times are added up
    assert {name for name in after if before.get(name) != after[name]} <= told
    assert set(after) == set(before)


def test_another_recipe_in_the_folder_is_refused_by_its_key(copied, recipe_file):
    for resume in ([], ["--resume"]):
        done = tacit("run", recipe_file, "--out", copied, "--set", "federated.seed=2", *resume)
        assert "federated.seed" in the_error(done, 2)


@pytest.mark.parametrize(("stage", "value"), [("report", 0.1), ("report", 8.1), ("measure", 0.1)])
def test_a_card_that_says_another_epsilon_than_the_ledger_is_refused(copied, stage, value):
    path = copied / "privacy.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "epsilon": value}))
    assert "epsilon" in the_error(tacit(stage, copied), 6)


def test_a_ledger_that_is_gone_is_refused(copied):
    (copied / "ledger.jsonl").unlink()
    assert "restore" in the_error(tacit("report", copied), 6)


def test_a_ledger_that_says_less_than_was_trained_is_refused(copied):
    """Also when the card that said more has been deleted."""
    (copied / "privacy.json").unlink()
    path = copied / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    assert "participations" in the_error(tacit("report", copied), 6)


def test_an_artifact_that_was_changed_is_not_measured_and_is_made_anew_on_resume(copied, recipe_file):
    path = copied / "variants" / "onnx-float32" / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "onnx-float32" in the_error(tacit("measure", copied), 6)
    pipeline.run(recipe_file, copied, resume=True)
    assert path.read_bytes() == whole


def test_weights_that_were_changed_are_not_shipped(copied):
    path = copied / "train" / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    assert "weights" in the_error(tacit("compress", copied), 6)


@pytest.mark.parametrize("name", ["variants/onnx-float32/variant.json", "measure/local.json"])
def test_a_file_of_ours_that_is_junk_is_not_a_bug(copied, name):
    (copied / name).write_text('{"artifacts": 3}')
    the_error(tacit("report", copied), 6)


def test_each_stage_runs_alone_on_a_folder_that_init_made(tmp_path):
    run = tmp_path / "my run"
    assert tacit("init", run).returncode == 0
    (run / "recipe.toml").write_text(
        SMALL.replace("rounds = 3", "rounds = 2").rpartition("[[compression")[0] + '[privacy]\nunit = "none"\n'
    )
    trained = tacit("train", run)
    assert trained.returncode == 0
    assert "no privacy guarantee" in trained.stdout
    assert not (run / "ledger.jsonl").exists()
    with pytest.raises(FolderMismatch, match="tacit compress"):
        pipeline.measure(run)
    assert tacit("compress", run).returncode == 0
    with pytest.raises(RecipeInvalid, match="expected a device"):
        pipeline.measure(run, devices=["phone"])
    measured = tacit("measure", run, "--format", "json")
    assert list(json.loads(measured.stdout)["data"]["devices"]["local"]["artifacts"]) == ["onnx-float32"]
    reported = tacit("report", run, env={**os.environ, "COLUMNS": "40"})
    assert reported.returncode == 0
    table = [line for line in reported.stdout.splitlines() if line.startswith(("variant", "onnx-"))]
    assert len(table) == 2
    assert 30 < max(map(len, table)) <= 40
    summary = json.loads((run / "summary.json").read_text())
    assert summary["privacy"]["unit"] == "none"
    assert "epsilon" not in summary["privacy"]
    assert summary["variants"][0]["latency"]["local"]["n"] >= 64
    assert "no privacy" in (run / "report.html").read_text(encoding="utf-8").lower()


# Runs that are refused.


def test_an_owner_without_records_is_code_3_by_name(tmp_path):
    (tmp_path / "recipe.toml").write_text(TRAINING_ONLY)
    sets = ["--set", "federated.owners=60", "--set", "federated.alpha=0.01"]
    done = tacit("run", tmp_path / "recipe.toml", "--out", tmp_path / "run", *sets)
    assert re.search(r"owner-\d+", the_error(done, 3))
    assert not (tmp_path / "run" / "ledger.jsonl").exists(), "nothing was charged"


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_more_owners_than_records_are_a_problem_of_the_data(tmp_path, kind):
    (tmp_path / "recipe.toml").write_text(TRAINING_ONLY)
    overrides = ["federated.owners=2000", f"federated.partition={kind}"]
    with pytest.raises(DataProblem, match="owner"):
        pipeline.run(tmp_path / "recipe.toml", tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run" / "ledger.jsonl").exists(), "nothing was charged"


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ("format = 'onnx'\npasses = [{ name = 'nonsense' }]", "nonsense"),
        ("format = 'onnx'\npasses = [{ name = 'prune', ratio = 1.5 }]", "ratio"),
        ("format = 'onnx'\npasses = [{ name = 'prune', ratio = nan }]", "ratio"),
        ("format = 'onnx'\nlabel = 'int8'", "label"),
    ],
)
def test_a_variant_that_cannot_be_made_is_refused_by_name_before_training(tmp_path, variant, named):
    text = TRAINING_ONLY.replace("[compression]\nvariants = []\n", "")
    (tmp_path / "recipe.toml").write_text(f"{text}\n[[compression.variants]]\nname = 'v1'\n{variant}\n")
    with pytest.raises(RecipeInvalid, match=f"'v1'.*{named}"):
        pipeline.run(tmp_path / "recipe.toml", tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()


def test_a_model_whose_groups_do_not_fit_is_refused_before_training(tmp_path):
    (tmp_path / "recipe.toml").write_text(TRAINING_ONLY)
    with pytest.raises(RecipeInvalid, match="groups"):
        pipeline.run(tmp_path / "recipe.toml", tmp_path / "run", overrides=["model.groups=3"])
    assert not (tmp_path / "run" / "train").exists()


# Interrupted, in use, starved.


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [TACIT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rounds_logged(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"event": "round", "round"') if log.is_file() else 0


def test_an_interrupted_run_goes_on_and_charges_each_owner_once_a_round(tmp_path):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "the run"
    recipe.write_text(TRAINING_ONLY)
    command = ["run", recipe, "--out", out]
    for number, code, after in ((signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 4)):
        with running(*command) as process:
            wait_for(lambda after=after: rounds_logged(out) >= after, process)
            process.send_signal(signal.SIGSTOP)
            if code == 130:
                assert "in use by process" in the_error(tacit(*command, "--resume"), 5)
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert f"continue with: tacit run {recipe} --out '{out}' --resume" in stderr
        assert "Traceback" not in stderr
        if "--resume" not in command:
            assert "--resume" in the_error(tacit(*command), 2)
            command.append("--resume")
    finished = tacit(*command)
    assert finished.returncode == 0, finished.stderr
    accounts, _, _ = read_ledger(out / "ledger.jsonl")
    assert [account.reserved for account in accounts] == [40, 40, 40]
    assert all(account.released + account.failed == 40 for account in accounts)
    rounds = [json.loads(line)["round"] for line in (out / "train" / "rounds.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 41))
    assert json.loads((out / "summary.json").read_text())["privacy"]["participations_charged"] == 40


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("mount") is None, reason="needs tmpfs")
def test_a_full_disk_is_code_7_and_a_larger_one_lets_the_run_go_on(tmp_path):
    recipe, disk = tmp_path / "recipe.toml", tmp_path / "disk"
    recipe.write_text(TRAINING_ONLY.replace("rounds = 40", "rounds = 4"))
    with small_disk(disk, "300k"):
        assert "no space left" in the_error(tacit("run", recipe, "--out", disk / "run"), 7)
        before = read_ledger(disk / "run" / "ledger.jsonl")
        assert load_recipe(disk / "run").federated.rounds == 4
        assert not (disk / "run" / "train" / "weights.safetensors").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        resumed = tacit("run", recipe, "--out", disk / "run", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        accounts, _, _ = read_ledger(disk / "run" / "ledger.jsonl")
        charged = {account.owner: account.reserved for account in accounts}
        assert set(charged.values()) == {4}
        assert all(charged[account.owner] >= account.reserved for account in before[0])
