"""`tacit budget` as a user's shell runs it: what a recipe will spend, what was spent, and what an owner declares."""

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from tacit.edge import cli
from tacit.edge.budget_plan import draw_plan, plan_budget
from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.federated.accounting import Event, epsilon_pld, reported_epsilon
from tacit.federated.ledger import Granted, Reservation
from tacit.federated.outbox import Outbox
from tacit.federated.owner_ledgers import OwnerLedgers

TACIT = Path(sys.executable).with_name("tacit")
EVENT = Event(sample_rate=1.0, noise_multiplier=4.0)
MECHANISM = {
    "unit": "record",
    "relation": "add/remove",
    "sampler": "poisson",
    "noise": "gaussian",
    "sample_rate": 1.0,
    "noise_multiplier": 4.0,
    "max_grad_norm": 1.0,
    "steps": 3,
}
# Without sampling, accounting takes milliseconds.
QUICK = ["privacy.sample_rate=1.0", "federated.rounds=10", "federated.local_steps=1"]


@dataclass(frozen=True)
class Done:
    """What a shell would have seen."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def words(self):
        """Whatever the width of the terminal."""
        return " ".join(self.stdout.split())


@pytest.fixture
def tacit(tmp_path, monkeypatch, capsys):
    """Runs the command's entry point in this process, which saves its imports, in a folder that is also its home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments, **environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tacit", *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                cli.main()
        found = capsys.readouterr()
        return Done(left.value.code or 0, found.out, found.err)

    yield run
    signal.signal(signal.SIGTERM, before)


def data_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["data"]


def the_error(done, code):
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def quick(*overrides):
    return load_recipe("digits", [*QUICK, *overrides])


# plan


def test_the_recipe_as_it_is_keeps_its_budget_and_the_curve_ends_there():
    plan = plan_budget(quick("privacy.epsilon=3.0"))
    assert (plan.unit, plan.relation, plan.delta, plan.budget) == ("record", "add/remove", 1e-5, 3.0)
    assert (plan.sample_rate, plan.max_grad_norm, plan.events_per_round) == (1.0, 1.0, 1)
    event = Event(sample_rate=1.0, noise_multiplier=plan.planned.noise_multiplier)
    assert plan.planned.epsilon == pytest.approx(epsilon_pld({event: 10}, 1e-5))
    assert plan.planned.epsilon <= 3.0
    assert plan.curve[-1] == plan.planned
    assert [figure.rounds for figure in plan.curve] == list(range(1, 11))
    for figure in plan.curve:
        exact = epsilon_pld({event: figure.rounds}, 1e-5)
        assert exact - 1e-9 <= figure.epsilon <= exact + 5e-3, "a coarser grid, never below"
    assert plan.notes == ()


@pytest.mark.parametrize("epsilon", [0.5, 6.0])
def test_the_noise_for_an_epsilon_is_enough_and_a_little_less_is_not(epsilon):
    (figure,) = plan_budget(quick("privacy.noise_multiplier=4"), epsilons=[epsilon]).noise_for_epsilon
    enough = Event(sample_rate=1.0, noise_multiplier=figure.noise_multiplier)
    less = Event(sample_rate=1.0, noise_multiplier=figure.noise_multiplier * 0.997)
    assert figure.epsilon <= epsilon + 1e-3
    assert reported_epsilon({enough: 10}, 1e-5) <= epsilon < reported_epsilon({less: 10}, 1e-5)


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_the_rounds_for_a_noise_fit_the_budget_and_one_more_does_not(noise):
    plan = plan_budget(quick("privacy.epsilon=4.0", "federated.local_steps=3"), noises=[noise])
    (figure,) = plan.rounds_for_noise
    event = Event(sample_rate=1.0, noise_multiplier=noise)
    assert plan.events_per_round == 3
    if figure.rounds:
        assert epsilon_pld({event: 3 * figure.rounds}, 1e-5) <= 4.0
    assert epsilon_pld({event: 3 * (figure.rounds + 1)}, 1e-5, discretisation=1e-3) > 4.0


def test_the_recipes_own_noise_allows_the_recipes_own_rounds():
    recipe = quick("privacy.epsilon=3.0")
    noise = plan_budget(recipe).planned.noise_multiplier
    assert plan_budget(recipe, noises=[noise]).rounds_for_noise[0].rounds >= 10


def test_evaluations_that_the_recipe_asks_for_are_part_of_every_figure():
    overrides = ["federated.evaluate_every=4", "privacy.evaluation_noise_multiplier=5.0"]
    plan = plan_budget(quick("privacy.noise_multiplier=4", *overrides), epsilons=[6.0], noises=[4.0])
    training, evaluation = EVENT, Event(sample_rate=1.0, noise_multiplier=5.0)
    whole = epsilon_pld({training: 10, evaluation: 3}, 1e-5)
    assert plan.planned.epsilon == pytest.approx(whole), "after rounds 4, 8 and 10"
    by_round = {figure.rounds: figure.epsilon for figure in plan.curve}
    assert by_round[3] == pytest.approx(epsilon_pld({training: 3}, 1e-5), abs=5e-3)
    assert by_round[9] == pytest.approx(epsilon_pld({training: 9, evaluation: 2}, 1e-5), abs=5e-3)
    assert plan.rounds_for_noise[0].rounds == 10
    (needed,) = plan.noise_for_epsilon
    found = Event(sample_rate=1.0, noise_multiplier=needed.noise_multiplier)
    assert epsilon_pld({found: 10, evaluation: 3}, 1e-5) <= 6.0
    assert any("evaluations" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("unit", "adversary", "relation"),
    [("client", "not the server", "add/remove"), ("local", "honest-but-curious server", "replace-one")],
)
def test_other_units_are_planned_for_and_say_against_whom(unit, adversary, relation):
    recipe = load_recipe("digits", [f"privacy.unit={unit}", *QUICK, "privacy.epsilon=3.0"])
    plan = plan_budget(recipe, epsilons=[2.0], noises=[5.0])
    assert (plan.unit, plan.relation) == (unit, relation)
    assert adversary in plan.adversary
    assert plan.planned.epsilon <= 3.0


def test_above_fifty_the_figure_is_rdps_and_says_so():
    plan = plan_budget(quick("privacy.noise_multiplier=0.3"))
    assert plan.planned.epsilon > 50.0
    assert plan.planned.accountant.startswith("RDP")
    assert plan.curve[-1].accountant.startswith("RDP")


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["privacy.delta=0.0078"], False),
        (["privacy.delta=0.0079"], True),
        (["privacy.unit=client", "privacy.sample_rate=1.0", "privacy.delta=0.2"], True),
        (["privacy.unit=client", "privacy.sample_rate=1.0", "privacy.delta=0.09"], False),
        (["privacy.unit=local", "privacy.delta=0.2"], False),
    ],
)
def test_a_delta_as_large_as_one_in_the_reference_size_is_warned_of(overrides, warned):
    plan = plan_budget(quick("privacy.noise_multiplier=4", *overrides))
    assert any("1 over" in note for note in plan.notes) == warned


def test_without_a_guarantee_there_is_nothing_to_plan():
    with pytest.raises(RecipeRefused, match="set it to record"):
        plan_budget(load_recipe("digits", ["privacy.unit=none"]))


def test_the_picture_says_what_every_epsilon_depends_on(tmp_path):
    plan = plan_budget(quick("privacy.epsilon=3.0"), epsilons=[1.0], picture=True)
    assert min(f.epsilon for f in plan.tradeoff) < 1.0 < 6.0 < max(f.epsilon for f in plan.tradeoff)
    for name in ("plan.svg", "plan.PNG"):
        draw_plan(plan, tmp_path / name)
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "plan.svg").read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")  # noqa: S314  # our own file
    drawn = " ".join(re.findall(r"<!-- (.*?) -->", first.decode()))  # what each group of outlines says
    for word in ("record level, add/remove, δ = 1e-5, PLD", "honest-but-curious server", "budget ε 3.00", "recipe: ε"):
        assert word in drawn
    draw_plan(plan, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


def test_the_command_answers_both_questions_in_text_and_json(tacit, tmp_path):
    asked = ["budget", "plan", "--epsilon=3", "--epsilon", "1", "--noise-multiplier=4.5", "--plot", "plan.svg"]
    changes = [f"--set={key}" for key in (*QUICK, "privacy.noise_multiplier=4")]
    data = data_of(tacit(*asked, *changes, "--format", "json"))
    assert [round(figure["epsilon"]) for figure in data["noise_for_epsilon"]] == [3, 1]
    assert data["rounds_for_noise"][0]["noise_multiplier"] == 4.5
    assert {"unit", "relation", "adversary", "delta", "budget", "planned", "curve", "notes"} <= set(data)
    assert all(figure["accountant"] for figure in data["curve"])
    assert (tmp_path / "plan.svg").is_file()
    done = tacit(*asked, *changes, COLUMNS="40")
    assert max(map(len, done.stdout.splitlines())) <= 40
    for word in ("record level", "add/remove", "δ = 1e-5", "PLD", "honest-but-curious", "drawn: plan.svg"):
        assert word in done.words


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--set", "privacy.unit=none"], 4, "set it to record"),
        (["--epsilon=0"], 2, "--epsilon"),
        (["--epsilon=nan"], 2, "--epsilon"),
        (["--noise-multiplier=inf"], 2, "--noise-multiplier"),
        (["--noise-multiplier=-1"], 2, "--noise-multiplier"),
        (["--plot=plan.pdf"], 2, ".svg or .png"),
        (["--set", "privacy.epsilom=3"], 2, "did you mean"),
        (
            ["--plot=nowhere/plan.svg", "--set=privacy.sample_rate=1.0", "--set=privacy.noise_multiplier=9"],
            7,
            "nowhere",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_a_code(tacit, arguments, code, word):
    assert word in the_error(tacit("budget", "plan", *arguments), code)


# show and verify, of home ledgers and extracts


def charge(home, folder, run, data, *, rounds=2, epsilon=20.0):
    """A run of two owners in which the second one fails."""
    folder.mkdir(exist_ok=True)
    book = OwnerLedgers(
        home,
        "scans",
        {"ann": data, "bob": data},
        run=run,
        extract=folder / "ledger.jsonl",
        outbox=Outbox(folder / "outbox"),
        epsilon=epsilon,
        delta=1e-6,
    )
    assert book.plan({EVENT: 12})
    for number in range(1, rounds + 1):
        asked = [
            Reservation(owner=owner, source="scans", run=run, round=number, body="b", mechanism=MECHANISM)
            for owner in ("ann", "bob")
        ]
        ann, bob = book.reserve(asked)
        assert isinstance(ann, Granted)
        book.fail([bob.key])
        book.release(number, {ann.key: b"noised"})
    book.close()


@pytest.fixture
def home(tmp_path):
    """Two runs over the same data."""
    home = tmp_path / ".tacit"
    charge(home, tmp_path / "one", "one", "a" * 64)
    charge(home, tmp_path / "two", "two", "a" * 64, rounds=1)
    return home


def test_show_without_an_argument_adds_up_all_runs_over_each_owners_source(tacit, home):
    data = data_of(tacit("budget", "show", "--format", "json"))
    ann, bob = data["accounts"]
    assert (ann["owner"], ann["source"], ann["status"]) == ("ann", "scans", "private")
    assert (ann["steps"], ann["runs"], ann["released"], bob["released"], bob["failed"]) == (9, 2, 3, 0, 3)
    assert ann["delta"] == 1e-6, "the account's own"
    assert ann["epsilon"] == pytest.approx(epsilon_pld({EVENT: 9}, 1e-6))
    assert ann["epsilon_rdp"] >= ann["epsilon"]
    assert ann["budget"] == 20.0
    assert ann["cohorts"] == []
    text = tacit("budget", "show").words
    for word in ("private data: all runs", "2 runs", "the budget, ε = 20 when", "δ = 1e-06", f"{ann['epsilon']:.3f}"):
        assert word in text, text
    for place in (home, home / "ledgers", home / "ledgers" / "ann", home / "ledgers" / "ann" / "scans.jsonl"):
        assert data_of(tacit("budget", "show", place, "--format", "json"))["accounts"][0] == ann
    assert data_of(tacit("budget", "show", "--format", "json", TACIT_HOME=str(home)))["accounts"] == [ann, bob]


def test_a_run_directory_shows_its_extract_and_says_that_it_is_one(tacit, home, tmp_path):
    head = json.loads((home / "ledgers" / "ann" / "scans.jsonl").read_text().splitlines()[-1])["hash"]
    data = data_of(tacit("budget", "show", tmp_path / "two", "--format", "json"))
    assert data["accounts"][0]["extract_of"] == head
    assert data["accounts"][0]["steps"] == 9, "with what was spent before the run"
    assert any("extract of home ledgers" in note and head in note for note in data["notes"])
    assert "extract of home ledgers" in tacit("budget", "show", tmp_path / "two").words
    assert data_of(tacit("budget", "show", tmp_path / "one", "--format", "json"))["accounts"][0]["steps"] == 6


def test_verify_holds_an_extract_against_the_home_ledgers(tacit, home, tmp_path):
    data = data_of(tacit("budget", "verify", tmp_path / "two", "--format", "json"))
    assert (data["entries"], data["accounts"]) == (2 + 4, 2)
    assert len(data["notes"]) == 1
    behind = data_of(tacit("budget", "verify", tmp_path / "one", "--format", "json"))
    assert sum("newer than the extract" in note for note in behind["notes"]) == 2
    away = data_of(tacit("budget", "verify", tmp_path / "two", "--format", "json", TACIT_HOME=str(tmp_path / "no")))
    assert sum("is not here" in note for note in away["notes"]) == 2
    assert data_of(tacit("budget", "verify", "--format", "json"))["entries"] == 12


def test_a_home_ledger_that_was_put_back_is_code_4_and_a_changed_one_code_6(tacit, home, tmp_path):
    ledger = home / "ledgers" / "ann" / "scans.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]))
    assert "older or another" in the_error(tacit("budget", "verify", tmp_path / "two"), 4)
    ledger.write_text("".join([*lines[:-1], lines[-1].replace("release", "reopen")]))
    assert "scans.jsonl:6" in the_error(tacit("budget", "verify", tmp_path / "two"), 6)
    assert "scans.jsonl:6" in the_error(tacit("budget", "show"), 6)


def test_a_last_line_cut_short_at_home_is_tolerated_and_named(tacit, home):
    ledger = home / "ledgers" / "ann" / "scans.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    for command in ("show", "verify"):
        done = tacit("budget", command)
        assert (done.returncode, done.stderr) == (0, "")
        assert "cut short" in done.words


def test_an_empty_home_is_code_2_and_says_where_it_looked(tacit, tmp_path):
    assert str(tmp_path / ".tacit") in the_error(tacit("budget", "show"), 2)


@pytest.mark.parametrize("columns", [40, 80])
def test_what_is_shown_fits_the_terminal(tacit, home, tmp_path, columns):
    assert tacit("budget", "new-cohort", "ann", "scans", "--reason", "other patients").returncode == 0
    for place in ([], [tmp_path / "two"]):
        lines = tacit("budget", "show", *place, COLUMNS=str(columns)).stdout.splitlines()
        assert [line for line in lines if len(line) > columns and len(line.split()) > 1] == []


# new-cohort


def test_a_new_cohort_is_declared_once_shown_ever_after_and_bound_to_other_data(tacit, home, tmp_path):
    said = "other patients since May"
    data = data_of(tacit("budget", "new-cohort", "ann", "scans", "--reason", said, "--format", "json"))
    assert (data["owner"], data["source"], data["reason"], data["steps_before"]) == ("ann", "scans", said, 9)
    ann = data_of(tacit("budget", "show", "--format", "json"))["accounts"][0]
    assert (ann["steps"], ann["epsilon"], ann["delta"]) == (0, 0.0, 1e-6)
    (cohort,) = ann["cohorts"]
    assert cohort["reason"] == said
    assert cohort["epsilon"] == pytest.approx(epsilon_pld({EVENT: 9}, 1e-6))
    assert said in tacit("budget", "show").words
    assert "since the last new cohort" in the_error(tacit("budget", "new-cohort", "ann", "scans", "--reason", "x"), 4)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["ann", "scans"], 2, "reason"),
        (["ann", "scans", "--reason="], 2, "one line"),
        (["ann", "scans", "--reason=two\nlines"], 2, "one line"),
        (["../ann", "scans", "--reason=x"], 2, "owner='../ann'"),
        (["ann", "other", "--reason=x"], 2, "found none"),
        (["eve", "scans", "--reason=x"], 2, "found none"),
    ],
)
def test_a_declaration_that_cannot_be_is_one_line_and_a_code(tacit, home, arguments, code, word):
    assert word in the_error(tacit("budget", "new-cohort", *arguments), code)


def test_showing_a_ledger_loads_nothing_that_training_needs(home):
    code = (
        "import pathlib, sys\nfrom tacit.edge.cli_budget import show\n"
        "print(len(show(pathlib.Path(sys.argv[1])).text))\n"
        "print(*sorted({'torch', 'flwr', 'opacus', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, home], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_a_shell_gets_the_same(tmp_path, home):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    done = subprocess.run([TACIT, "budget", "verify"], env=environment, capture_output=True, text=True, check=True)
    assert "12 entries of 2 accounts hold" in " ".join(done.stdout.split())
