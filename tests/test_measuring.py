"""Measuring a run on devices: several at once, only what is missing, one that is lost; a file alone; two results."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tacit.devices.answers import DeviceUnreachable
from tacit.devices.fit import ArtifactFacts, fit_table
from tacit.devices.profile import load_profile
from tacit.devices.sandbox import ArtifactRefused
from tacit.edge import cli_measure, flag_words, measure_lines, measured, measurement, measuring, pipeline, report
from tacit.edge.fleet import Access, Fleet, Work, check_device, file_of
from tacit.edge.history import History
from tacit.edge.measuring import measure_run
from tacit.edge.progress import Silent
from tacit.edge.recipe import RecipeInvalid

pytestmark = [
    # flwr brings typer, which imports names that click has deprecated.
    pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning"),
]

TACIT = Path(sys.executable).with_name("tacit")
GONE = "ssh:nobody@127.0.0.1:1"  # nothing listens on port 1
NOBODY = "nobody listens there"
SMALL = """
[model]
family = "mlp"
hidden = [16]

[federated]
owners = 3
rounds = 2

[privacy]
unit = "none"

[report]
twin = false

[[compression.variants]]
name = "onnx-float32"
format = "onnx"

[[compression.variants]]
name = "onnx-dynamic"
format = "onnx"
passes = [{ name = "dynamic_int8" }]

[[compression.variants]]
name = "micro-full"
format = "micro"
passes = [{ name = "full_int8" }]
"""
Tacit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with artifacts, of which none was measured; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("measuring") / "run"
    path.mkdir()
    (path / "recipe.toml").write_text(SMALL)
    pipeline.train(path)
    pipeline.compress(path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tacit(home: Path) -> Tacit:
    def call(*arguments: str | Path, columns: int = 100) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "TACIT_HOME": str(home), "COLUMNS": str(columns)}
        return subprocess.run([TACIT, *arguments], capture_output=True, text=True, timeout=170, env=env)

    return call


@pytest.fixture(scope="module")
def three(made: Path, tacit: Tacit) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run measured on this computer, as a microcontroller would answer, and on a device that is not there."""
    path = shutil.copytree(made, made.parent / "three")
    return path, tacit("measure", path, *devices("local", "micro", GONE), "--format", "json")


@pytest.fixture
def copied(three: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    return shutil.copytree(three[0], tmp_path / "run")


def devices(*names: str) -> list[str]:
    return [word for name in names for word in ("--device", name)]


def result(run: Path, device: str = "local") -> dict[str, Any]:
    return json.loads((run / "measure" / file_of(device)).read_text())


def rewritten(run: Path, device: str, **changed: Any) -> None:
    (run / "measure" / file_of(device)).write_text(json.dumps({**result(run, device), **changed}))


def the_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


# Through the command line.


def test_two_devices_are_measured_and_a_third_that_is_not_there_costs_neither_its_figures(three):
    run, done = three
    assert done.returncode == 8, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == "partial"
    found = told["data"]["devices"]
    assert list(found["local"]["artifacts"]) == ["onnx-float32", "onnx-dynamic"]
    assert list(found["micro"]["artifacts"]) == ["micro-full"]
    assert all(entry["p50_us"] > 0 for entry in found["local"]["artifacts"].values())
    assert set(told["data"]["failed"]) == {GONE}
    assert told["data"]["lost"] == [GONE]
    for name, content in found.items():
        assert result(run, name) == content


@pytest.mark.soak
def test_of_a_device_that_is_not_there_the_report_says_not_measured_and_never_zero(three, tacit):
    run, _ = three
    assert tacit("report", run).returncode == 8, "what failed is told"
    summary = json.loads((run / "summary.json").read_text())
    assert all(GONE not in variant["latency"] for variant in summary["variants"])
    assert NOBODY in summary["measured"][GONE]["lost"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"on {GONE}" in page
    assert NOBODY in page
    assert ">0\u00a0µs" not in page.partition('id="variants"')[2].partition("<table>")[2].partition("</table>")[0]
    assert "block_medians_us" not in (run / "summary.json").read_text()


def test_the_fit_asks_boards_about_what_they_run_and_computers_about_what_was_measured_here(three):
    rows = result(three[0], "micro")["fit"]
    by_kind = {kind: {row["artifact"] for row in rows if row["kind"] == kind} for kind in ("mcu", "sbc", "phone")}
    assert by_kind["mcu"] == {"micro-full"}
    assert by_kind["sbc"] == by_kind["phone"] == {"onnx-float32", "onnx-dynamic"}
    assert not [row for row in rows if "not measured" in row["why"]], "local was measured before what fits was asked"


def test_what_is_known_stays_as_it_is_and_only_what_is_missing_is_measured(copied, tacit):
    entries = result(copied)["artifacts"]
    marked = {**entries["onnx-float32"], "p50_us": 12345.0}
    rewritten(copied, "local", artifacts={"onnx-float32": marked})
    done = tacit("measure", copied, *devices("local"), columns=40)
    assert done.returncode == 0, done.stderr
    now = result(copied)["artifacts"]
    assert now["onnx-float32"] == marked
    assert now["onnx-dynamic"]["samples_us"] != entries["onnx-dynamic"]["samples_us"]
    assert now["onnx-dynamic"]["relative"]["to"] == "onnx-float32"
    assert "12345.0 µs" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 40
    again = tacit("measure", copied, *devices("local"))
    assert "measured already" in again.stderr
    assert result(copied)["artifacts"] == now


@pytest.mark.soak
def test_again_measures_anew_and_what_is_asked_besides_is_measured_where_it_is_missing(copied, tacit):
    before = result(copied)["artifacts"]
    done = tacit("measure", copied, *devices("local"), "--profile")
    assert done.returncode == 0, done.stderr
    profiled = result(copied)["artifacts"]
    assert all(entry["profile"]["by_type_us"] for entry in profiled.values())
    assert "operators: " in done.stdout
    assert tacit("measure", copied, *devices("local"), "--again").returncode == 0
    assert [entry["samples_us"] for entry in result(copied)["artifacts"].values()] not in (
        [entry["samples_us"] for entry in before.values()],
        [entry["samples_us"] for entry in profiled.values()],
    )


@pytest.mark.soak
def test_the_only_device_lost_with_nothing_to_show_is_one_line_and_code_7(made, tmp_path, tacit):
    run = shutil.copytree(made, tmp_path / "run")
    assert NOBODY in the_error(tacit("measure", run, *devices(GONE)), 7)
    assert result(run, GONE)["artifacts"] == {}


@pytest.mark.soak
def test_a_lost_device_keeps_its_earlier_figures_and_is_told_as_lost(copied, tacit):
    kept = {**result(copied), "device": GONE}
    (copied / "measure" / file_of(GONE)).write_text(json.dumps(kept))
    done = tacit("measure", copied, *devices(GONE), "--again", columns=60)
    assert done.returncode == 8, done.stderr
    assert "was not measured now" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 60
    now = result(copied, GONE)
    assert now["artifacts"] == kept["artifacts"]
    assert now["facts"] == kept["facts"]
    assert now["complete"] is False
    assert tacit("report", copied).returncode == 0
    assert "Not measured to the end" in (copied / "report.html").read_text(encoding="utf-8")


@pytest.mark.soak
def test_a_file_alone_is_measured_on_inputs_that_are_given(made, tmp_path, tacit):
    model = made / "variants" / "onnx-float32" / "model.onnx"
    np.save(tmp_path / "x.npy", np.zeros((8, 1, 8, 8), np.float32))
    done = tacit("measure", model, "--inputs", tmp_path / "x.npy", "--format", "json")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)["data"]["devices"]["local"]["artifacts"].values()
    assert entry["p50_us"] > 0


def test_a_file_without_inputs_or_with_others_is_code_2(made, tmp_path, tacit):
    model = made / "variants" / "onnx-float32" / "model.onnx"
    assert "expected inputs" in the_error(tacit("measure", model), 2)
    np.save(tmp_path / "float64.npy", np.zeros((8, 1, 8, 8)))
    line = the_error(tacit("measure", model, "--inputs", tmp_path / "float64.npy"), 2)
    assert "expected float32" in line
    assert "got float64 (8, 1, 8, 8)" in line


def test_inputs_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("1, 2, 3")
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 8, 8), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(8, np.float32))
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(RecipeInvalid, match=re.escape(path.name)):
            measuring._read_inputs(path)


@pytest.mark.soak
def test_two_results_are_compared_and_what_is_none_is_refused(copied, tmp_path, tacit):
    slow = result(copied)
    for entry in slow["artifacts"].values():
        entry["block_medians_us"] = [2 * median for median in entry["block_medians_us"]]
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    done = tacit("measure", "--compare", copied, tmp_path / "slow.json", "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["data"]["compared"]
    assert [one["verdict"] for one in told] == ["slower", "slower"]
    assert told[0]["ratio"]["estimate"] == pytest.approx(2.0, rel=1e-6)
    narrow = tacit("measure", "--compare", copied, tmp_path / "slow.json", columns=40)
    assert "same file: slower" in " ".join(narrow.stdout.split())
    assert max(map(len, narrow.stdout.splitlines())) <= 40


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "no JSON",
        '{"artifacts": {"a": 3}}',
        '{"artifacts": {}}',
        '{"artifacts": {"a": {"block_medians_us": [-1.0]}}}',
        '{"artifacts": {"a": {"block_medians_us": ["x"]}}}',
    ],
)
def test_what_is_no_result_is_not_compared(content, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"artifacts": {"a": {"sha256": "ab", "block_medians_us": [1.0, 1.0]}}}')
    bad.write_text(content)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(RecipeInvalid):
            cli_measure._compared(*pair)


def test_doubts_stand_beside_a_comparison(copied, tmp_path, tacit):
    slow = result(copied)
    for entry in slow["artifacts"].values():
        entry["flags"] = ["noisy", "averaged"]
    (tmp_path / "slow.json").write_text(json.dumps({**slow, "device": "ssh:a@b"}))
    done = tacit("measure", "--compare", copied, tmp_path / "slow.json", columns=200)
    assert "two devices: local and ssh:a@b" in done.stdout
    assert re.search(r"flagged .*noisy.*: sessions may differ", done.stdout)
    assert "averaged" not in done.stdout


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("nowhere", {}, "nowhere, which is not there"),
        ("RUN", {"inputs": "FILE"}, "expected no inputs for a run"),
        ("RUN", {"port": 70000}, "expected a port from 0 to 65535, got 70000"),
        ("RUN", {"port": -1}, "expected a port from 0 to 65535"),
        ("RUN", {"benchmark_model": "nofile"}, "expected a file, got nofile"),
        ("RUN", {"key": "nofile"}, "expected a file, got nofile"),
        ("FILE", {"inputs": "nofile.npy"}, "expected a file, got nofile.npy"),
        ("RUN", {"compare": ("FILE", "FILE")}, "expected two results alone"),
        (None, {"compare": ("FILE", "nowhere.json")}, "nowhere.json, which is not there"),
        ("RUN", {"forget": True}, "expected a run directory and devices to forget"),
        (None, {}, "expected a run directory or a model file, got none"),
    ],
)
def test_what_is_wrong_with_the_command_itself_is_said_before_anything_starts(target, options, words, made, tmp_path):
    (tmp_path / "good.json").write_text('{"artifacts": {"a": {"sha256": "ab", "block_medians_us": [1.0, 1.0]}}}')
    places = {"RUN": made, "FILE": tmp_path / "good.json"}

    def there(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(there(one) for one in given)
        return places.get(given, Path(given)) if isinstance(given, str) else given

    with pytest.raises(RecipeInvalid, match=re.escape(words)):
        cli_measure.measure(there(target), **{name: there(given) for name, given in options.items()})


def test_every_flag_has_words_in_the_terminal_and_in_the_report():
    assert set(flag_words.FLAGS) == set(report._FLAGS)


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_no_figure_is_lost_in_a_narrow_terminal_and_flags_have_words(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    ratio = {"to": "a", "estimate": 0.43, "low": 0.42, "high": 0.45}
    entry = {"p50_us": 12.3, "p90_us": 45.6, "relative": ratio, "peak_memory_bytes": 4_000_000, "flags": ["noisy"]}
    entry["accuracy"] = {"n": 500, "top1": {"estimate": 0.94, "low": 0.91, "high": 0.96}}
    entry["profile"] = {"by_type_us": {"Conv": 3.0, "Add": 1.0}, "share_of_p50": 10.7}
    entry["phone"] = "Tested Phone 7"
    lines = measure_lines.result_lines("ssh:pi", {"artifacts": {"onnx-float32": entry}, "failed": {}}, alone=True)
    assert max(len(line) for text in lines for line in text.splitlines()) <= columns
    text = " ".join(" ".join(lines).split())
    for shown in (
        "12.3 µs",
        "45.6 µs",
        "0.43 (0.42-0.45)",
        "4.0 MB",
        "94%",
        "(noisy: runs spread by more than 10 %)",
        "on Tested Phone 7",
    ):
        assert shown in text
    assert "on Tested Phone 7" in text
    assert "operators: Conv 75%, Add 25%; rough: with its profiler the model took 10.7 times its median" in text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_no_numbers_are_refused(bad, tmp_path):
    values = np.ones((4, 3), np.float32)
    values[2, 1] = bad
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(RecipeInvalid, match="expected finite numbers, got NaN or infinity"):
        measuring._read_inputs(tmp_path / "x.npy")


def test_a_device_may_be_forgotten(copied):
    (copied / "measure" / file_of("adb:nosuch")).write_text("{}")
    assert pipeline.forget(copied, ["adb:nosuch", "qemu:aarch64"]) == ["adb:nosuch"]
    assert pipeline.forget(copied, ["adb:nosuch"]) == []
    assert result(copied)["artifacts"]


def test_of_a_run_with_several_results_the_file_must_be_named(tmp_path):
    (tmp_path / "measure").mkdir()
    timed, answers = '{"artifacts": {"a": {"p50_us": 1.0}}}', '{"artifacts": {"a": {"max_abs": 0.0}}}'
    for name, content in (("local", timed), ("micro", answers)):
        (tmp_path / "measure" / f"{name}.json").write_text(content)
    assert cli_measure._result(tmp_path)["artifacts"] == {"a": {"p50_us": 1.0}}
    (tmp_path / "measure" / "adb.json").write_text(timed)
    with pytest.raises(RecipeInvalid, match=r"got adb\.json, local\.json; name the file"):
        cli_measure._result(tmp_path)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, math.nan, math.inf, 3601.0])
def test_seconds_of_load_that_are_none_are_refused(seconds, tmp_path):
    with pytest.raises(RecipeInvalid, match="expected 1 to 3600 seconds"):
        cli_measure.measure(tmp_path, sustained=seconds)


@pytest.mark.parametrize("name", ["phone", "ssh:", "local ", "adb\n", "ssh:a\x1b[2J", ""])
def test_what_is_no_device_is_refused_by_name(name):
    with pytest.raises(ValueError, match="expected a device"):
        check_device(name)


# Several devices at once.


def _work(**changed: Any) -> Work:
    artifact = SimpleNamespace(name="a", path=Path("a.onnx"), runtime=None)
    parts = {"artifacts": {}, "inputs": None, "evaluation": None, "outputs": 1, "mode": "quick", "known": {}}
    return Work(**{**parts, "artifacts": {name: [artifact] for name in ("ssh:a@b", "ssh:c@d")}} | changed)


def _quiet(*told: object) -> None:
    del told


class _Answers(Fleet):
    """A fleet whose devices answer what they are told to."""

    outcomes: dict[str, Any]

    def _measured(self, name: str) -> dict[str, Any]:
        outcome = self.outcomes[name]
        if isinstance(outcome, BaseException):
            raise outcome
        return {"device": name, "artifacts": outcome, "failed": {}}


@pytest.mark.parametrize(
    "why", [DeviceUnreachable("unplugged"), ArtifactRefused("no answer"), ModuleNotFoundError("x"), TimeoutError("t")]
)
def test_one_devices_trouble_is_not_the_others(why):
    kept: dict[str, Any] = {}
    fleet = _Answers(work=_work(), access=Access(), keep=kept.__setitem__, say=_quiet, tell=_quiet)
    fleet.outcomes = {"ssh:a@b": why, "ssh:c@d": {"a": {}}, "local": {}, "micro": why}
    found = fleet.measure(["ssh:a@b", "micro", "ssh:c@d", "local"])
    assert list(found) == ["ssh:a@b", "micro", "ssh:c@d", "local"]
    assert found["ssh:a@b"] is found["micro"] is why
    assert set(kept) == {"ssh:c@d", "local"}
    assert kept["ssh:c@d"]["complete"] is True


def test_a_bug_of_ours_is_not_told_as_a_lost_device():
    fleet = _Answers(work=_work(), access=Access(), keep=_quiet, say=_quiet, tell=_quiet)
    fleet.outcomes = {"ssh:a@b": KeyError("bug")}
    with pytest.raises(KeyError):
        fleet.measure(["ssh:a@b"])


def test_ctrl_c_ends_the_devices_that_are_measured_elsewhere_at_their_next_step():
    ended, begun = threading.Event(), threading.Event()

    class Busy(Fleet):
        def _measured(self, name: str) -> dict[str, Any]:
            if name == "local":
                begun.wait(30)
                raise KeyboardInterrupt
            try:
                while True:
                    self._said("a step")
                    begun.set()
            finally:
                ended.set()

    with pytest.raises(KeyboardInterrupt):
        Busy(work=_work(), access=Access(), keep=_quiet, say=_quiet, tell=_quiet).measure(["ssh:a@b", "local"])
    assert ended.is_set()


def test_ctrl_c_breaks_off_what_a_device_has_under_way():
    broken, begun = threading.Event(), threading.Event()

    class Hung(Fleet):
        def _measured(self, name: str) -> dict[str, Any]:
            if name == "local":
                begun.wait(30)
                raise KeyboardInterrupt
            self._under_way |= {"ssh:gone@b": lambda: 1 / 0, name: broken.set}
            begun.set()
            assert broken.wait(30)
            raise DeviceUnreachable("its end")

    with pytest.raises(KeyboardInterrupt):
        Hung(work=_work(), access=Access(), keep=_quiet, say=_quiet, tell=_quiet).measure(["ssh:a@b", "local"])
    assert broken.is_set()


def test_this_computer_is_measured_before_what_fits_is_asked():
    order: list[str] = []
    fleet = _Answers(
        work=_work(), access=Access(), keep=lambda name, found: order.append(name), say=_quiet, tell=_quiet
    )
    fleet.outcomes = {"local": {}, "micro": {}}
    fleet.measure(["micro", "local"])
    assert order == ["local", "micro"]


def test_files_of_devices_never_collide_nor_leave_the_folder():
    names = ["local", "ssh:a@b", "ssh:a_b", "ssh_a_b", "adb:../../x", "adb:" + "y" * 300, "ssh:.", "qemu:aarch64"]
    files = [file_of(name) for name in names]
    assert len(set(files)) == len(names)
    assert not [file for file in files if "/" in file or file.startswith(".") or len(file) > 80]


# What stands and what is kept.

ENTRY = {"key": "ab-litert-quick-1", "sha256": "ab", "profile": None, "sustained": None, "not_measured": {}}


@pytest.mark.parametrize(
    ("entry", "mode", "access", "stands"),
    [
        ({}, None, Access(), True),
        ({}, "quick", Access(), True),
        ({}, "full", Access(), False),
        ({}, None, Access(profile=True), False),
        ({"profile": {"us": 1.0}}, None, Access(profile=True), True),
        ({"not_measured": {"profile": "litert has none"}}, None, Access(profile=True), True),
        ({}, None, Access(sustained_s=3.0), False),
        ({"sustained": {}}, None, Access(sustained_s=3.0), True),
        ({"sustained": {"asked_s": 3.0}}, None, Access(sustained_s=3.0), True),
        ({"sustained": {"asked_s": 2.0}}, None, Access(sustained_s=3.0), False),
        ({"not_measured": {"sustained": "it has none"}}, None, Access(sustained_s=3.0), True),
        ({"key": None}, None, Access(), False),
    ],
)
def test_an_entry_stands_if_it_holds_all_that_is_asked_for(entry, mode, access, stands):
    held = {"mode": "quick", "artifacts": {"a": {**ENTRY, **entry}}}
    found = measured.standing(held, mode, access, [SimpleNamespace(name="a"), SimpleNamespace(name="b")])
    assert bool(found) is stands
    assert measured.standing(held, mode, access, [SimpleNamespace(name="b")]) == {}


def test_what_another_phone_showed_is_not_of_an_incomplete_result():
    held = {"facts": {"cores": 8}, "artifacts": {"a": {"phone": "x"}, "b": {"phone": "x"}}}
    lost = {"facts": {}, "artifacts": {"a": {"phone": "y"}}, "failed": {"b": "closed"}}
    found = measured.joined(held, lost)
    assert (found["artifacts"], found["failed"], found["facts"]) == ({"a": {"phone": "y"}}, {"b": "closed"}, {})
    same = measured.joined(held, {**lost, "artifacts": {"a": {"phone": "x", "n": 1}}})
    assert same["artifacts"] == {"a": {"phone": "x", "n": 1}, "b": {"phone": "x"}}
    assert same["failed"] == {}
    assert measured.joined(held, {**lost, "artifacts": {}})["artifacts"] == held["artifacts"]


def test_a_complete_result_keeps_figures_of_the_same_phone_alone():
    held = {"artifacts": {"lite": {"phone": "x"}, "onnx": {"phone": "x"}}, "conditions": {}}
    assert set(measured.beside(held, {"artifacts": {"onnx": {"phone": "x"}}}, ["onnx"])["artifacts"]) == {
        "lite",
        "onnx",
    }
    assert set(measured.beside(held, {"artifacts": {"onnx": {"phone": "y"}}}, ["onnx"])["artifacts"]) == {"onnx"}


def test_a_damaged_table_of_failures_is_no_result(tmp_path):
    folder = SimpleNamespace(read_json=lambda *parts: {"artifacts": {}, "failed": [1]})
    assert measured.held_result(folder, "local", []) == {}


def test_an_interrupted_session_is_in_the_history_and_its_figures_have_their_time(copied, monkeypatch, home, tmp_path):
    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "home"))
    entries = result(copied)["artifacts"]
    names = list(entries)
    for entry in entries.values():  # a machine that was too busy for an interval would leave no row
        entry["ci"]["p50_us"] = [0.99 * entry["p50_us"], 1.01 * entry["p50_us"]]
        entry.pop("taken", None)
    partial = {"device": "local", "mode": "quick", "failed": {}, "complete": False, "facts": {}}
    with pipeline._opened(copied) as folder:
        artifacts = {"local": [SimpleNamespace(name=name) for name in names]}
        work = SimpleNamespace(artifacts=artifacts, input_source="test")
        session = measurement.Measurement(folder, work, {"local": {}}, Silent())
        for count in (1, 2):
            session._keep("local", {**partial, "artifacts": {name: entries[name] for name in names[:count]}})
    kept = result(copied)["artifacts"]
    assert all(kept[name]["taken"] == session._began and kept[name]["input_source"] for name in names[:2])
    told = History(tmp_path / "home").changes({**result(copied), "facts": {}}, task="digits")
    assert {change.artifact: change.sessions for change in told} == dict.fromkeys(names[:2], 1)


def test_only_figures_of_the_same_bytes_are_held(tmp_path):
    (tmp_path / "a").write_bytes(b"model")
    known = {"a": {"sha256": "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"}, "b": {}, "c": 3}
    folder = SimpleNamespace(read_json=lambda *parts: {"artifacts": known, "failed": {}})
    artifacts = [SimpleNamespace(name=name, path=tmp_path / "a") for name in "abc"]
    assert set(measured.held_result(folder, "local", artifacts)["artifacts"]) == {"a"}
    (tmp_path / "a").write_bytes(b"another")
    assert measured.held_result(folder, "local", artifacts)["artifacts"] == {}


def test_a_fit_is_asked_again_once_the_memory_is_known():
    facts = ArtifactFacts(name="a", runtime="onnxruntime", bytes=1000)
    held = {"fit": fit_table([facts], [load_profile("pi-4b")])}
    assert measured.fit_is_old(held, {"a"})
    assert not measured.fit_is_old(held, {"b"})
    known = ArtifactFacts(name="a", runtime="onnxruntime", bytes=1000, peak_memory_bytes=10)
    assert not measured.fit_is_old({"fit": fit_table([known], [load_profile("pi-4b")])}, {"a"})
    assert not measured.fit_is_old({}, {"a"})


def test_a_change_is_kept_on_disk_and_what_was_not_measured_anew_is_no_new_session(copied, monkeypatch, home, tmp_path):
    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "home"))
    now = result(copied)
    for entry in now["artifacts"].values():  # a machine that was too busy for an interval would tell of no change
        entry["ci"]["p50_us"] = [0.99 * entry["p50_us"], 1.01 * entry["p50_us"]]
    fast = json.loads(json.dumps(now))
    for entry in fast["artifacts"].values():
        entry |= {"p50_us": entry["p50_us"] / 100, "ci": {"p50_us": [bound / 100 for bound in entry["ci"]["p50_us"]]}}
    History(tmp_path / "home").add(fast, task="digits")
    rewritten(
        copied, "local", artifacts={"onnx-float32": now["artifacts"]["onnx-float32"]}, changes=["onnx-float32: x"]
    )
    with pipeline._opened(copied) as folder:
        artifacts = {"local": [SimpleNamespace(name=name) for name in now["artifacts"]]}
        work = SimpleNamespace(artifacts=artifacts, input_source="test")
        session = measurement.Measurement(folder, work, {"local": result(copied)}, Silent())
        session._keep("local", {**now, "complete": True})
    first, second = result(copied)["changes"]
    assert first == "onnx-float32: x", "what was said of a figure stays with it"
    assert second.startswith("onnx-dynamic: ")
    assert "% slower than in 1 earlier measurement" in second
    told = History(tmp_path / "home").changes(now, task="digits")
    assert {change.artifact: change.sessions for change in told} == {"onnx-float32": 1, "onnx-dynamic": 2}


def test_a_device_that_can_hold_nothing_and_one_that_is_none_are_told(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    shutil.rmtree(run / "variants" / "micro-full")
    with pipeline._opened(run) as folder:
        assert measure_run(folder, ["micro"], Silent()) == {"micro": {"device": "micro", "artifacts": {}, "failed": {}}}
        with pytest.raises(RecipeInvalid, match="expected a device"):
            measure_run(folder, ["local", "phone"], Silent())


# What is printed.


def test_a_reason_is_told_once_and_no_figure_stands_without_its_flags(monkeypatch):
    entry = {"p50_us": 1.0, "p90_us": 2.0, "relative": None, "peak_memory_bytes": None, "flags": ["throttled"]}
    content = {"artifacts": {"some-long-name": entry}, "failed": {f"n{i}": "unplugged" for i in range(9)}}
    for columns in (30, 40, 60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = "\n".join(measure_lines.result_lines("adb", content, alone=False)).splitlines()
        assert max(map(len, lines)) <= columns
        text = " ".join(" ".join(lines).split())
        assert text.count("unplugged") == 1
        assert "n0, n1, n2, n3 and 5 more: not measured: unplugged" in text
        assert "throttled" in text


def test_accuracy_on_the_device_and_energy_and_heat_are_printed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    entry = {
        "p50_us": 1.0, "p90_us": 2.0, "relative": None, "peak_memory_bytes": None, "flags": [],
        "accuracy": {"n": 500, "top1": {"estimate": 0.94, "low": 0.91, "high": 0.96}},
        "energy": {"source": "RAPL", "j_per_inference": 1e-5, "low": 9e-6, "high": 1.1e-5},
        "sustained": {"start_s": [0.0, 9.0], "temperature_c": [40.0, 71.0], "change": 0.25,
                          "change_ci": [-0.01, 0.3], "asked_s": 10.0, "throttled": True, "waiting_share": 0.234},
    }  # fmt: skip
    text = "\n".join(measure_lines.result_lines("ssh:pi", {"artifacts": {"a": entry}, "failed": {}}, alone=True))
    assert "accuracy" in text
    assert "94%" in text
    load = "a: median at the end of 10 s under load: +25.0% (-1.0% to +30.0%), no clear change, 40 to 71 °C, "
    load += "throttled, while others had the processor for 23% of the time"
    assert load in " ".join(text.split())
    assert "a: energy of one inference 10 µJ (9 to 11), RAPL" in text


def test_an_artifact_that_a_device_computes_otherwise_is_flagged_and_failed(tmp_path):
    """As tflite-runtime 2.14 computes some dynamic-range int8: 9.7 % right, of 94.7 %, and no error."""
    folder = SimpleNamespace(read_json=lambda *parts: {"accuracy": 0.947} if parts[0] == "variants" else None)

    def entry(estimate, high):
        return {"flags": ["noisy"], "accuracy": {"top1": {"estimate": estimate, "low": 0.05, "high": high}}}

    artifacts = {"wrong": entry(0.097, 0.132), "right": entry(0.944, 0.964), "untold": {"flags": [], "accuracy": None}}
    found = measurement._judged(folder, {"artifacts": artifacts, "failed": {}})
    assert list(found["failed"]) == ["wrong"]
    assert "got 9.7 % there" in found["failed"]["wrong"]
    assert found["artifacts"]["wrong"]["flags"] == ["noisy", "departs"]
    assert found["artifacts"]["right"] == artifacts["right"]
    assert found["artifacts"]["untold"] == artifacts["untold"]
    lines = measure_lines.result_lines("adb", {**found, "mode": "quick"}, alone=True)
    assert "wrong: wrong on adb: expected about 94.7 %" in " ".join(" ".join(lines).split())
