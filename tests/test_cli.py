"""The installed command, as a user's shell runs it."""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cyclopts
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.edge import cli, cli_output
from tacit.federated.accounting import Event, epsilon_pld
from tacit.federated.ledger import Granted, Ledger, Reservation
from tacit.federated.outbox import Outbox

ROOT = Path(__file__).resolve().parent.parent
TACIT = Path(sys.executable).with_name("tacit")
ANSI = re.compile(r"\x1b\[")


def commands_of(app: cyclopts.App, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command as the words that a user types."""
    for name in app:
        if not name.startswith("-"):
            yield (*path, name)
            yield from commands_of(app[name], *path, name)


COMMANDS = sorted(commands_of(cli.app))
GROUPS = {words[:-1] for words in COMMANDS if len(words) > 1}


@pytest.fixture
def tacit(tmp_path: Path):
    """Runs the command in an empty folder that is also its home."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}
        return subprocess.run(
            [TACIT, *arguments],
            env={**kept, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def envelope(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout, with the code that the process had."""
    content: dict[str, Any] = json.loads(done.stdout)
    assert set(content) == {"schema_version", "status", "code", "data", "error"}
    assert content["schema_version"] == 1
    assert content["code"] == done.returncode
    assert content["status"] == {0: "ok", 8: "partial"}.get(done.returncode, "error")
    assert (content["error"] is None) == (done.returncode in {0, 8})
    return content


def the_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The single line of an error without traceback, its code checked."""
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


# Help.


def test_the_top_help_names_every_command(tacit):
    done = tacit("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert {words[0] for words in COMMANDS} <= set(re.findall(r"^\W*([a-z]+)  ", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_commands_help_says_what_it_does_and_ends_well(tacit, words):
    done = tacit(*words, "--help", COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: tacit " + " ".join(words)[:25])
    assert len(done.stdout.split("\n\n")[1]) > 20
    assert max(map(len, done.stdout.splitlines())) <= 40


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_readme_shows_every_command(words):
    pages = [path for path in (ROOT / "README.md", ROOT / "edge" / "README.md") if path.is_file()]
    assert re.search(rf"\btacit {' '.join(words)}\b", "\n".join(page.read_text(encoding="utf-8") for page in pages))


@pytest.mark.parametrize("words", sorted(GROUPS), ids=" ".join)
def test_a_group_without_a_command_shows_its_help(tacit, words):
    done = tacit(*words)
    assert done.returncode == 0
    assert {found[-1] for found in COMMANDS if found[:-1] == words} <= set(re.findall(r"[a-z-]+", done.stdout))


def test_the_version_is_the_packages(tacit):
    from importlib.metadata import version

    assert tacit("--version").stdout.strip() == version("tacit")


# Errors.


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["rnu"], 'Did you mean "run"?'),
        (["config", "shw"], 'Did you mean "show"?'),
        (["budget", "verfy", "x"], 'Did you mean "verify"?'),
        (["run", "--ou", "x"], "Did you mean --out?"),
        (["run", "--reusme"], "Did you mean --resume?"),
    ],
)
def test_a_mistyped_word_is_refused_with_one_suggestion(tacit, arguments, suggestion):
    error = the_error(tacit(*arguments), 2)
    assert suggestion in error
    assert error.count("Did you mean") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run", "--nonsense"],
        ["config", "show", "digits", "extra"],
        ["run", "--set"],
        ["measure"],
        ["--format", "xml", "config", "show"],
        ["budget", "show", "x", "--delta", "many"],
    ],
)
def test_wrong_usage_is_code_2(tacit, arguments):
    the_error(tacit(*arguments), 2)


def test_the_json_envelope_of_wrong_usage_has_its_code(tacit):
    assert envelope(tacit("--format", "json", "rnu"))["error"]["id"] == "UnknownCommandError"
    assert envelope(tacit("--format=json", "run", "--nonsense"))["code"] == 2


@pytest.fixture
def failing(tmp_path: Path) -> dict[int, list[str | Path]]:
    """A command for each code that needs no training."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "damaged.jsonl").write_text("{}\n")
    return {
        2: ["config", "show", "nothing.toml"],
        4: ["config", "show", "--set", "federated.quorum=11"],
        6: ["budget", "verify", "damaged.jsonl"],
        7: ["init", "file/run"],
    }


@pytest.mark.parametrize("code", [2, 4, 6, 7])
def test_an_error_is_one_line_and_the_envelope_says_the_same(tacit, failing, code):
    line = the_error(tacit(*failing[code]), code)
    done = tacit(*failing[code], "--format", "json")
    assert the_error(done, code) == line
    error = envelope(done)["error"]
    assert set(error) == {"id", "message", "where", "hint"}
    assert all(part in line for part in (error["message"], error["where"], error["hint"]))
    assert error["hint"]


@pytest.mark.parametrize("code", [2, 4, 6, 7])
def test_only_debug_shows_a_traceback(tacit, failing, code):
    assert "Traceback" not in tacit(*failing[code]).stderr
    shown = tacit(*failing[code], "--debug")
    assert shown.returncode == code
    assert "Traceback (most recent call last)" in shown.stderr
    assert shown.stdout == ""


def test_a_recipes_error_names_file_line_and_column(tacit, tmp_path):
    (tmp_path / "my recipe.toml").write_text("[privacy]\nepsilon = nan\n")
    assert "my recipe.toml:2:1: privacy.epsilon = nan" in the_error(tacit("config", "show", "my recipe.toml"), 2)
    error = envelope(tacit("config", "show", "my recipe.toml", "--format", "json"))["error"]
    assert error["where"] == "my recipe.toml:2:1"


def test_every_exception_in_the_table_of_codes_exists_and_every_exception_of_ours_has_a_code():
    defined = {
        node.name: {ast.unparse(parent) for parent in node.bases}
        for room in ("edge", "federated", "compression", "devices")
        for path in (ROOT / room).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    ours = {
        name
        for name, parents in defined.items()
        if parents & ({"ValueError", "RuntimeError", "Exception"} | set(cli._CODES) & set(defined))
    }
    known = set(dir(builtins)) | set(defined) | {"CycloptsError"}
    assert set(cli._CODES) - known == set()
    uncovered = {name for name in ours if not ({name} | defined[name]) & set(cli._CODES)}
    assert uncovered == set()


def test_a_bug_of_ours_is_code_1_with_a_log(capsys):
    assert cli._explain(ZeroDivisionError("by zero\nsecond line"), "text") == 4, "an arithmetic error releases nothing"
    assert cli._explain(KeyError("missing"), "json") == 1
    shown = capsys.readouterr()
    log = Path(re.search(r"\S+/tacit-\S+\.log", shown.err)[0])
    assert "KeyError" in log.read_text()
    log.unlink()
    assert json.loads(shown.out)["code"] == 1
    assert len(shown.err.splitlines()) == 2


# Streams.


@pytest.mark.parametrize("arguments", [["config", "schema"], ["--help"], ["run", "--help"], ["config", "show"]])
def test_a_reader_that_has_gone_is_no_error(tacit, tmp_path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([TACIT, *arguments], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["config", "schema"], ["--help"]])
def test_a_full_disk_behind_stdout_is_code_7(tmp_path, arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([TACIT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert "no space left" in the_error(done, 7)


def test_a_closed_stdout_is_no_error(tmp_path):
    done = subprocess.run(["sh", "-c", f"'{TACIT}' config show >&-"], stderr=subprocess.PIPE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [["--help"], ["config", "show"], ["doctor"], ["config", "show", "nothing"]])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "xterm-256color"}])
def test_piped_output_has_no_colour(tacit, arguments, environment):
    done = tacit(*arguments, **environment)
    assert not ANSI.search(done.stdout + done.stderr)


@pytest.mark.parametrize("arguments", [["budget", "show", "--help"], ["config", "show"], ["doctor"]])
def test_a_terminal_without_greek_still_gets_its_output(tacit, arguments):
    done = tacit(*arguments, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def test_an_error_about_a_name_that_the_terminal_cannot_show_is_still_one_line(tacit):
    assert "?" in the_error(tacit("config", "show", "größe.toml", PYTHONIOENCODING="ascii"), 2)


@given(
    st.lists(st.lists(st.text("abcé", max_size=30), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 90)
)
def test_a_table_drops_columns_from_the_right_and_never_breaks_a_line(rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        lines = cli_output.table(rows, words_from=3)
    name_width = max(len(row[0]) for row in rows)
    assert max(map(len, lines)) <= max(columns, name_width)
    assert [line.startswith(row[0].rstrip()) for line, row in zip(lines, rows, strict=True)] == [True] * len(rows)
    whole = sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 6
    assert (columns < whole) or all(row[3] in line for line, row in zip(lines, rows, strict=True))


# config, init, doctor.


def test_config_show_writes_a_recipe_that_resolves_to_itself(tacit, tmp_path):
    shown = tacit("config", "show", "--set", "federated.rounds=7", "digits").stdout
    (tmp_path / "resolved.toml").write_text(shown)
    assert tacit("config", "show", "resolved.toml").stdout == shown
    assert "rounds = 7" in shown
    data = envelope(tacit("config", "show", "resolved.toml", "--format", "json"))["data"]
    assert data["federated"]["rounds"] == 7


def test_config_schema_is_json_in_both_formats(tacit):
    schema = json.loads(tacit("config", "schema").stdout)
    assert envelope(tacit("config", "schema", "--format", "json"))["data"] == schema
    assert "federated" in schema["properties"]


def test_init_writes_a_commented_recipe_that_means_the_default(tacit, tmp_path):
    done = tacit("init", "a new run")
    assert done.returncode == 0
    recipe = tmp_path / "a new run" / "recipe.toml"
    assert recipe.read_text().startswith("# ")
    assert tacit("config", "show", "a new run").stdout == tacit("config", "show").stdout


def test_init_does_not_overwrite(tacit, tmp_path):
    tacit("init", "run")
    (tmp_path / "run" / "recipe.toml").write_text("# mine\n")
    assert "recipe.toml" in the_error(tacit("init", "run"), 2)
    assert (tmp_path / "run" / "recipe.toml").read_text() == "# mine\n"


def test_doctor_finds_this_machine_fit(tacit):
    done = tacit("doctor")
    assert done.returncode == 0
    assert "torch" in done.stdout
    checks = envelope(tacit("doctor", "--format", "json"))["data"]["checks"]
    assert {check["status"] for check in checks} <= {"ok", "warn", "info"}
    assert {"torch", "flwr", "disk"} <= {check["name"] for check in checks}


@pytest.mark.parametrize("command", ["train", "compress", "measure", "report"])
def test_a_stage_without_a_run_folder_says_what_makes_one(tacit, command):
    assert "tacit init nothing" in the_error(tacit(command, "nothing"), 2)


@pytest.mark.parametrize("command", ["compress", "measure", "report"])
def test_a_stage_before_training_says_to_train(tacit, command):
    tacit("init", "run")
    assert "tacit train run" in the_error(tacit(command, "run"), 2)


# budget.

EVENT = Event(sample_rate=0.5, noise_multiplier=2.0)
MECHANISM = {"unit": "record", "sample_rate": 0.5, "noise_multiplier": 2.0, "steps": 3}


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Owner a: two rounds, one released, one failed. Owner b: one round that nothing came of."""
    path = tmp_path / "ledger.jsonl"
    opened = Ledger(path, Outbox(tmp_path / "outbox"), epsilon=50.0, delta=1e-5)
    for number in (1, 2):
        names = ["a", "b"][: 3 - number]
        requests = [
            Reservation(owner=n, source="s", run="r", round=number, body="0" * 64, mechanism=MECHANISM) for n in names
        ]
        turns = opened.reserve(requests)
        assert all(isinstance(turn, Granted) for turn in turns)
        if number == 1:
            opened.release(1, {turns[0].key: b"update"})
        else:
            opened.fail([turns[0].key])
    opened.close()
    return path


def test_budget_show_states_what_every_owner_was_charged(tacit, ledger):
    data = envelope(tacit("budget", "show", ledger, "--delta", "1e-6", "--format", "json"))["data"]
    a, b = data["accounts"]
    assert (a["owner"], a["steps"], a["reserved"], a["released"], a["failed"]) == ("a", 6, 2, 1, 1)
    assert (b["owner"], b["steps"], b["reserved"], b["released"], b["failed"]) == ("b", 3, 1, 0, 0)
    assert a["epsilon"] == pytest.approx(epsilon_pld({EVENT: 6}, 1e-6))
    assert b["epsilon"] == pytest.approx(epsilon_pld({EVENT: 3}, 1e-6))
    assert data["notes"] == []


@pytest.mark.parametrize("delta", ["0", "1", "-1", "nan", "inf"])
def test_budget_show_refuses_a_delta_that_is_none(tacit, ledger, delta):
    assert "--delta" in the_error(tacit("budget", "show", ledger, f"--delta={delta}"), 2)


def test_budget_verify_accepts_an_untouched_ledger(tacit, ledger):
    data = envelope(tacit("budget", "verify", ledger, "--format", "json"))["data"]
    last = json.loads(ledger.read_text().splitlines()[-1])
    assert data == {"entries": 5, "accounts": 2, "heads": [last["hash"]], "notes": []}


def test_a_last_line_cut_short_is_a_note_and_what_was_charged_stays_charged(tacit, ledger):
    ledger.write_bytes(ledger.read_bytes()[:-20])
    for command in ("show", "verify"):
        done = tacit("budget", command, ledger.parent)
        assert (done.returncode, done.stderr) == (0, "")
        assert "note: " in done.stdout
        assert "cut short" in done.stdout
        if command == "show":
            assert f"{epsilon_pld({EVENT: 6}, 1e-5):.3f}" in done.stdout
            assert "record level, add/remove, δ = 1e-05" in done.stdout


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_changed_entry_is_code_6_and_names_the_line(tacit, ledger, command):
    lines = ledger.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"owner": "a"', '"owner": "b"')
    ledger.write_text("".join(lines))
    assert "ledger.jsonl:3" in the_error(tacit("budget", command, ledger), 6)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[]\n", b"null\n", b"\n", b"{" * 5000 + b"\n", b"\0\n"])
def test_a_ledger_that_is_something_else_is_code_6(tacit, ledger, content):
    ledger.write_bytes(content)
    the_error(tacit("budget", "verify", ledger), 6)


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_missing_ledger_is_code_2(tacit, tmp_path, command):
    assert "ledger.jsonl" in the_error(tacit("budget", command, "nothing.jsonl"), 2)
    assert "ledger.jsonl" in the_error(tacit("budget", command, tmp_path), 2)
