"""kill -9 at every named place of training: the resumed run ends at the planned ε, and no reservation leaves twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("crash_driver.py")
ROUNDS, OWNERS = 4, 3

# The second round's first chain write is the third of a run: reserve, release, reserve.
KILLS = [
    "chain.before_write:3",
    "chain.before_fsync:3",
    "chain.after_fsync:3",
    "client.before_records:5",
    "client.after_training:5",
    "cohort.before_commit:2",
    "durable.before_rename:3",
    "durable.after_rename:3",
    "ledger.after_outbox:2",
    "chain.before_fsync:4",
    "cohort.after_commit:2",
    "server.before_checkpoint:2",
    "server.after_checkpoint:2",
    "server.before_weights:1",
]
FAILURES = ["chain.before_write:3=enospc", "durable.before_rename:3=eio", "client.before_records:5=interrupt"]


def _run(folder: Path, points: list[str]) -> dict[str, dict[str, object]]:
    command = [sys.executable, str(DRIVER), str(folder), *points]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return {row["point"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return _run(tmp_path_factory.mktemp("crash"), [*(f"{point}=kill" for point in KILLS), *FAILURES])


@pytest.mark.parametrize("point", [*(f"{point}=kill" for point in KILLS), *FAILURES])
def test_a_run_resumes_at_the_planned_epsilon(killed: dict[str, dict[str, object]], point: str) -> None:
    row = killed[point]
    assert row["first"] == (-9 if point.endswith("kill") else 1), row["error"]
    assert row["resumed"] == 0, row["error"]
    assert row["weights"] is True
    assert row["reserved"] == [ROUNDS] * OWNERS  # each owner charged exactly what was planned, never more or less
    assert row["released"] == [ROUNDS] * OWNERS
    assert row["failed"] == 0
    assert row["most_payloads_of_a_key"] == 1
    assert row["leftovers"] == []


@pytest.mark.parametrize("point", [*(f"{point}=kill" for point in KILLS), *FAILURES])
def test_noise_is_never_drawn_outside_a_charge(killed: dict[str, dict[str, object]], point: str) -> None:
    row = killed[point]
    reserved = row["reserved"]
    assert isinstance(reserved, list)
    assert isinstance(row["reopened"], int)
    assert isinstance(row["noise_draws"], int)
    assert sum(reserved) <= row["noise_draws"] <= sum(reserved) + row["reopened"]


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_any_occurrence_of_any_failpoint_may_kill(tmp_path: Path) -> None:
    """Every failpoint at its 1st to 8th time: 14 names, up to 112 kills."""
    names = sorted({point.partition(":")[0] for point in KILLS})
    for name in names:
        for row in _run(tmp_path / name, [f"{name}:{nth}=kill" for nth in range(1, 9)]).values():
            assert row["resumed"] == 0, row
            assert row["reserved"] == row["released"] == [ROUNDS] * OWNERS, row
            assert row["most_payloads_of_a_key"] == 1, row
