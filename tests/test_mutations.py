"""The deliberate bugs of mutations.py, each put into a copy of the repository: the quick suite must notice it there."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from mutations import BESIDES, BUGS, MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (
    ".venv*",
    ".git",
    "runs",
    "dist",
    "build",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
    ".peers",
)
CONTROL = "control"
# A change that raises one of these was written wrongly: it would be noticed by anything.
BROKEN = re.compile(r"\b(NameError|UnboundLocalError|ImportError|ModuleNotFoundError|SyntaxError|IndentationError)\b")


@dataclass(frozen=True)
class Outcome:
    """What the suite said of a copy.

    Attributes:
        code: pytest's: 0 for passed, 1 for failed; others are trouble.
        killer: the first test that failed, or "".
        text: the end of the output.
        wall_s: seconds.
    """

    code: int
    killer: str
    text: str
    wall_s: float


def name_of(mutation: Mutation) -> str:
    return f"{mutation.bug}: {mutation.path}"


def mutated(source: str, mutation: Mutation) -> str:
    """The file's text with the bug in it; an error where the text is no longer there, or twice."""
    places = source.count(mutation.old)
    if places != 1:
        raise ValueError(f"the mutation no longer applies: {name_of(mutation)}: {places} places in {mutation.file}")
    return source.replace(mutation.old, mutation.new)


def prepare(folder: Path, mutation: Mutation) -> None:
    """A copy of the repository with the bug in it."""
    path = make_copy(folder) / mutation.file
    path.write_text(mutated(path.read_text(encoding="utf-8"), mutation), encoding="utf-8")


def run_all(jobs: Sequence[Mapping[str, object]]) -> dict[str, Outcome]:
    """What the suite says in each copy, by the job's name."""
    command = [sys.executable, str(Path(__file__).with_name("mutation_driver.py"))]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    text = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=2900, check=False
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: outcome_of(row) for row in map(json.loads, done.stdout.splitlines())}


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    killer = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", row["text"], re.MULTILINE)
    return Outcome(row["code"], killer[1] if killer else "", row["text"][-3000:], row["wall_s"])


def make_copy(folder: Path) -> Path:
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


def all_tests() -> list[str]:
    """What the control runs: every file once, and single tests of files that nobody runs whole."""
    wanted = sorted(set(chain.from_iterable(mutation.tests for mutation in MUTATIONS)))
    return [test for test in wanted if "::" not in test or test.partition("::")[0] not in wanted]


def split_control() -> list[list[str]]:
    """In halves, so that two processes share it."""
    tests = all_tests()
    return [tests[::2], tests[1::2]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """By name of the mutation, and the controls."""
    folder = tmp_path_factory.mktemp("mutants")
    unchanged = make_copy(folder / CONTROL)
    jobs = [
        {"name": f"{CONTROL} {half}", "folder": str(unchanged), "tests": tests}
        for half, tests in enumerate(split_control())
    ]
    for number, mutation in enumerate(MUTATIONS):
        prepare(folder / str(number), mutation)
        jobs.append({"name": name_of(mutation), "folder": str(folder / str(number)), "tests": list(mutation.tests)})
    yield run_all(jobs)
    shutil.rmtree(folder)


def test_every_mutation_applies_to_one_place_of_the_source_as_it_is() -> None:
    for mutation in MUTATIONS:
        source = (ROOT / mutation.file).read_text(encoding="utf-8")
        compile(mutated(source, mutation), mutation.file, "exec")


def test_every_one_of_the_sixteen_bugs_is_there_and_no_path_twice() -> None:
    assert len(BUGS) == 16
    assert {mutation.bug for mutation in MUTATIONS} == {*BUGS, BESIDES}
    assert len({name_of(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_mutation_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(ValueError, match="no longer applies"):
        mutated("a\na\n", Mutation("no noise", "here", "file.py", "a\n", "b\n", ()))


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("half", [0, 1])
def test_the_unchanged_copy_passes_the_same_tests(outcomes: dict[str, Outcome], half: int) -> None:
    outcome = outcomes[f"{CONTROL} {half}"]
    assert outcome.code == 0, outcome.text


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=name_of)
def test_the_suite_notices(outcomes: dict[str, Outcome], mutation: Mutation) -> None:
    outcome = outcomes[name_of(mutation)]
    assert outcome.code == 1, outcome.text
    assert not BROKEN.search(outcome.text), outcome.text


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_the_table_of_what_noticed_what(outcomes: dict[str, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{'bug':34} {'path':48} {'file':30} noticed by")  # noqa: T201  # the table is the result
        for mutation in MUTATIONS:
            outcome = outcomes[name_of(mutation)]
            killer = outcome.killer if outcome.code == 1 else f"SURVIVED ({outcome.code})"
            print(f"{mutation.bug:34} {mutation.path:48} {mutation.file:30} {killer}")  # noqa: T201  # as above
    missed = {mutation.bug for mutation in MUTATIONS if outcomes[name_of(mutation)].code != 1}
    assert missed == set()
