"""`tacit audit` on a real run: what it writes, what it does again, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.edge import cli, cli_audit, pipeline
from tacit.edge.audit import TESTS, AuditFailed, AuditOptions, audit, check_passed
from tacit.edge.recipe import RecipeInvalid, load_recipe
from tacit.edge.run_folder import FolderMismatch
from tacit.federated import datasets
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.noise import SecretGenerator

pytestmark = pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning")

TACIT = Path(sys.executable).with_name("tacit")
SMALL = [
    "federated.owners=3",
    "federated.rounds=2",
    "model.channels=[4]",
    "privacy.noise_multiplier=1.0",
    "report.twin=false",
    'compression.variants=[{name="onnx-float32", format="onnx"}]',
]
QUICK = AuditOptions(shadows=2, canaries=40, trials=100)
KEYS = {"name", "method", "n", "statistic", "interval", "confidence", "claim", "delta", "verdict", "reason", "seconds"}


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, audited once."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    pipeline.run(load_recipe("digits", SMALL), folder)
    audit(folder, options=QUICK)
    pipeline.report(folder)
    return folder


@pytest.fixture
def folder(audited: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(audited, tmp_path / "run")


def tacit(*arguments: str | Path, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "OMP_NUM_THREADS": "1"}
    return subprocess.run([TACIT, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    return content


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "audit").iterdir()}


# What is written.


def test_every_test_says_what_it_did_and_what_it_found(audited: Path) -> None:
    content = content_of(audited)
    assert content["schema_version"] == 1
    assert content["skipped"] == []
    assert content["verdict"] in {"pass", "warn"}  # at 95 % a correct run warns now and then
    assert [test["name"] for test in content["tests"]] == ["mechanism", "noise", "canaries", "membership", "membership"]
    for test in content["tests"]:
        assert set(test) >= KEYS
        assert "statistic_is" in test["details"]
    assert "never proves privacy" in content["statement"]


def test_bounds_are_below_their_claims_and_stated_at_the_runs_delta(audited: Path) -> None:
    tests = {test["name"]: test for test in content_of(audited)["tests"]}
    for name in ("mechanism", "canaries"):
        assert tests[name]["statistic"] == tests[name]["interval"][0] <= tests[name]["claim"]
        assert tests[name]["delta"] == 1e-5
    assert tests["mechanism"]["claim"] == pytest.approx(4.3772, abs=1e-3)  # z = 1
    privacy = json.loads((audited / "privacy.json").read_text())
    assert tests["canaries"]["claim"] == pytest.approx(privacy["epsilon"], abs=0.02)


def test_the_float_model_and_every_artifact_are_asked_about_the_same_records(audited: Path) -> None:
    model, artifact = [test for test in content_of(audited)["tests"] if test["name"] == "membership"]
    assert (model["artifact"], artifact["artifact"]) == ("float model", "onnx-float32")
    assert artifact["sha256"] == json.loads((audited / "variants/onnx-float32/variant.json").read_text())["sha256"]
    for test in (model, artifact):
        assert test["verdict"] == "informs"
        assert test["details"]["members"] == 1347
        assert test["details"]["others"] == 360
        assert test["details"]["false_rate"] == pytest.approx(10 / 360)
        assert len(test["details"]["curve"]) <= 64
    assert artifact["statistic"] == pytest.approx(model["statistic"], abs=1e-3)  # the same weights in another runtime


def test_the_report_and_the_summary_have_the_audit(audited: Path) -> None:
    summary = json.loads((audited / "summary.json").read_text())
    assert summary["audit"] == content_of(audited)
    page = (audited / "report.html").read_text(encoding="utf-8")
    assert 'id="audit"' in page
    assert "How well an attack finds members" in page
    assert "audit" in summary["wall_s"]


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_the_text_fits_the_terminal(audited: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli_audit._lines(content_of(audited), Path("run"))
    assert max(map(len, lines)) <= columns
    text = " ".join(" ".join(lines).split())
    for words in ("audit pass", "mechanism", "noise", "canaries", "onnx-float32", "never proves privacy"):
        assert words in text or words == "audit pass"


# Doing it again.


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    before, first = written(folder), content_of(folder)
    assert audit(folder, options=QUICK)["tests"] == first["tests"]
    assert written(folder) == before


def test_another_option_repeats_its_own_test_only(folder: Path) -> None:
    before = written(folder)
    audit(folder, options=replace(QUICK, trials=101, skip=("canaries",)))
    changed = {name for name, at in written(folder).items() if before.get(name) != at}
    assert changed == {"mechanism.json"}
    content = content_of(folder)
    assert content["skipped"] == [{"name": "canaries", "reason": "left out"}]
    assert "canaries" not in {test["name"] for test in content["tests"]}


def test_an_interrupted_attack_keeps_the_shadows_that_were_trained(folder: Path) -> None:
    (folder / "audit" / "membership.json").unlink()
    (folder / "audit" / "shadow-01.bin").unlink()
    before = written(folder)
    audit(folder, options=replace(QUICK, skip=("mechanism", "noise", "canaries")))
    after = written(folder)
    assert after["shadow-00.bin"] == before["shadow-00.bin"]
    assert set(after) - set(before) == {"membership.json", "shadow-01.bin"}


def test_a_damaged_shadow_is_trained_again(folder: Path) -> None:
    path = folder / "audit" / "shadow-00.bin"
    path.write_bytes(path.read_bytes()[:-8])
    (folder / "audit" / "membership.json").unlink()
    audit(folder, options=replace(QUICK, skip=("mechanism", "noise", "canaries")))
    assert len(path.read_bytes()) == 64 + 8 * (1347 + 360)


def test_an_attack_without_shadows_needs_no_training(folder: Path) -> None:
    content = audit(folder, options=replace(QUICK, shadows=0, skip=("mechanism", "noise", "canaries")))
    assert all("one threshold" in test["method"] for test in content["tests"])  # type: ignore[attr-defined]


# Failing.


@pytest.fixture
def short_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every secret generator gives a third of the noise that it is asked for."""
    whole = SecretGenerator.gaussian
    monkeypatch.setattr(SecretGenerator, "gaussian", lambda self, count, deviation: whole(self, count, deviation / 3.0))


def launched(*arguments: str) -> int:
    code: int = cli.app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code


def test_too_little_noise_ends_with_code_4_in_one_line_and_shows_in_the_report(
    folder: Path, short_noise: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "audit")
    assert launched("audit", str(folder), "--trials", "600", "--skip", "canaries", "--skip", "membership") == 4
    said = capsys.readouterr()
    assert said.out == ""
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: expected what was claimed, got mechanism: .* ε ≥ .*, and noise: size: p = .*", error)
    assert "; do not release, see" in error
    assert "Audit failed" in (folder / "report.html").read_text(encoding="utf-8")
    with pytest.raises(AuditFailed):
        check_passed(content_of(folder), folder)


def test_the_envelope_holds_what_audit_json_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skips = [word for name in ("mechanism", "canaries", "membership") for word in ("--skip", name)]
    assert launched("audit", str(folder), *skips, "--format", "json") == 0
    envelope = json.loads(capsys.readouterr().out)
    assert (envelope["status"], envelope["code"], envelope["error"]) == ("ok", 0, None)
    assert envelope["data"] == content_of(folder)


def test_noise_that_has_failed_is_not_tried_until_it_passes(folder: Path, short_noise: None) -> None:
    options = AuditOptions(skip=("mechanism", "canaries", "membership"))
    shutil.rmtree(folder / "audit")
    first = audit(folder, options=options)
    assert first["verdict"] == "fail"
    assert audit(folder, options=options)["tests"] == first["tests"]


# Refusing.


def test_a_run_that_claims_nothing_is_only_asked_about_its_members(tmp_path: Path) -> None:
    sets = [s for s in SMALL if "noise_multiplier" not in s] + ["privacy.unit=none"]
    folder = tmp_path / "run"
    pipeline.run(load_recipe("digits", [*sets[:-2], "compression.variants=[]", sets[-1]]), folder)
    content = audit(folder, options=replace(QUICK, shadows=0))
    assert content["verdict"] == "informs"
    assert content["skipped"] == [
        {"name": name, "reason": "nothing is claimed"} for name in ("mechanism", "noise", "canaries")
    ]
    (test,) = content["tests"]  # type: ignore[misc]
    assert test["details"]["allowed_hit_rate"] is None


def test_a_void_run_is_not_held_to_a_claim(tmp_path: Path) -> None:
    folder = tmp_path / "guarantee-void"
    pipeline.run(load_recipe("digits", [*SMALL[:-1], "compression.variants=[]"]), folder, unsafe_seed=1)
    content = audit(folder, options=replace(QUICK, shadows=0))
    assert content["verdict"] == "informs"
    assert {entry["reason"] for entry in content["skipped"]} == {"the guarantee is void"}  # type: ignore[attr-defined]
    assert [path.name for path in folder.glob("audit*.json")] == ["audit.guarantee-void.json"]
    assert pipeline.report(folder)["audit"] == content


@pytest.fixture
def private_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits, declared private."""
    public = datasets._digits()

    def private() -> Any:
        return replace(public, load=lambda: replace(public.load(), status="private"))

    monkeypatch.setattr(datasets, "_digits", private)


def test_membership_inference_on_private_data_is_refused(folder: Path, private_digits: None) -> None:
    before = content_of(folder)
    with pytest.raises(PrivacyRefused, match=r"would read records without a charge; add --skip membership"):
        audit(folder, options=QUICK)
    assert content_of(folder) == before


def test_canaries_on_private_data_keep_company_with_noise(folder: Path, private_digits: None, monkeypatch: Any) -> None:
    read = []
    take = datasets.Records.take

    def watched(self: Any, indices: Any) -> Any:
        read.append(self.inputs.shape)
        return take(self, indices)

    shutil.rmtree(folder / "audit")
    monkeypatch.setattr(datasets.Records, "take", watched)
    content = audit(folder, options=replace(QUICK, skip=("mechanism", "noise", "membership")))
    assert [test["name"] for test in content["tests"]] == ["canaries"]  # type: ignore[attr-defined]
    # Made when the task is loaded, and public ones that a model is tried on; no owner's share is among them.
    splits = {(1797, 1, 8, 8), (3, 1, 8, 8)}
    assert {shape for shape in read if shape[1:] == (1, 8, 8)} <= splits | {(32, 1, 8, 8)}


def test_a_folder_without_a_trained_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(FolderMismatch, match="expected a trained run"):
        audit(tmp_path)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"shadows": 1}, "--shadows"),
        ({"shadows": -2}, "--shadows"),
        ({"canaries": 39}, "--canaries"),
        ({"trials": 99}, "--trials"),
        ({"skip": ("everything",)}, "--skip"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeInvalid, match="expected") as refused:
        AuditOptions(**options)
    assert refused.value.where == where


def test_the_command_line_refuses_what_the_options_refuse(audited: Path) -> None:
    done = tacit("audit", audited, "--shadows", "1")
    assert done.returncode == 2
    assert done.stderr == "error: --shadows: expected 0 or at least 2, got 1\n"
    assert TESTS == ("mechanism", "noise", "canaries", "membership")
    assert np.isfinite(content_of(audited)["tests"][0]["claim"])
