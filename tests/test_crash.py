"""kill -9 at every named place of training: the resumed run ends at the planned ε, and no reservation leaves twice."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tacit.federated.accounting import Event, merge, reported_epsilon

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path(__file__).with_name("crash_driver.py")
ROUNDS, OWNERS, STEPS, DELTA = 4, 3, 2, 1e-5
Row = dict[str, Any]

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
# Places that test_resume.py kills at; here the matrix does.
ELSEWHERE = {
    "checkpoint.before_removal",
    "durable.before_fsync",
    "durable.after_folder_fsync",
    "round.before_configure",
    "round.after_configure",
    "round.after_replies",
    "round.after_aggregate",
    "server.before_restore",
    "server.before_history",
    "server.after_weights",
    "store.before_write",
    "store.before_removal",
}
# Before a file has its name: the second checkpoint, and the last two files of a run.
CHECKPOINT, HISTORY, WEIGHTS = (f"durable.before_rename:{number}=kill" for number in (4, 9, 10))
FAILURES = ["chain.before_write:3=enospc", "durable.before_rename:3=eio", "client.before_records:5=interrupt"]
# The second round ends with an evaluation: its reserve is the fifth write, its first owner the seventh to read.
EVALUATION_KILLS = [
    "chain.after_fsync:5",
    "client.before_records:8",
    "client.after_training:8",
    "cohort.before_commit:3",
    "durable.after_rename:4",
    "ledger.after_outbox:3",
    "cohort.after_commit:3",
    "server.before_checkpoint:2",
]
# At client level the server keeps the ledger: the second round's charge, its noised model, and its evaluation.
CLIENT_KILLS = [
    "chain.after_fsync:3",
    "server.after_noise:2",
    "ledger.after_outbox:2",
    "chain.before_fsync:5",
    "server.after_noise:3",
    "server.before_checkpoint:2",
]
# Each reply leaves by itself: the second round's first release is the sixth write, its second owner the fifth to read.
BLOCK_KILLS = ["chain.before_fsync:6", "client.before_records:5", "ledger.after_outbox:4", "cohort.before_commit:2"]
LOCAL_KILLS = ["client.after_training:5", "ledger.after_outbox:2", "client.after_training:8"]
# Three processes die in the second round, each while its second owner is about to read.
THRICE = "client.before_records:5=kill,client.before_records:2=kill,client.before_records:2=kill"
THRICE_EVALUATING = THRICE.replace(":5", ":8")

RECORD, BLOCKS, EVALUATING, CLIENT, LOCAL = (
    "record",
    "record+blocks",
    "record+evaluate",
    "client+adaptive+evaluate",
    "local+evaluate",
)
THRIFTY = "record+thrifty"

# What the matrix goes through, by unit; a failpoint's seeds are dealt out among the setups.
SETUPS = {
    "record": ["record", "record+hardened+evaluate", "record+each+evaluate", "record+home+evaluate+blocks"],
    "client": ["client+evaluate", "client+adaptive+evaluate", "client+hardened", "client+home"],
    "local": ["local", "local+hardened+evaluate", "local+each+evaluate", "local+home+evaluate"],
}
SEEDS = 20


def kills(points: list[str]) -> list[str]:
    return [f"{point}=kill" for point in points]


QUICK = {
    RECORD: [*kills(KILLS), CHECKPOINT, HISTORY, WEIGHTS, *FAILURES, THRICE],
    BLOCKS: kills(BLOCK_KILLS),
    EVALUATING: [*kills(EVALUATION_KILLS), THRICE_EVALUATING],
    CLIENT: kills(CLIENT_KILLS),
    LOCAL: kills(LOCAL_KILLS),
    THRIFTY: [],
}


def run(folder: Path, setup: str, *scenarios: str) -> tuple[dict[str, int], dict[str, Row]]:
    """How often each failpoint is reached, and what came of each scenario."""
    command = [sys.executable, str(DRIVER), str(folder), setup, *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2900, check=False)
    assert done.returncode == 0, done.stderr
    reached, *rows = map(json.loads, done.stdout.splitlines())
    return reached, {row["points"]: row for row in rows}


@cache
def epsilon(history: frozenset[tuple[float, float, int]]) -> float:
    return reported_epsilon(merge((Event(sample_rate=q, noise_multiplier=z), n) for q, z, n in history), DELTA)


def history_of(events: list[list[float]]) -> frozenset[tuple[float, float, int]]:
    """Multipliers are rounded alike: one is stated, the other worked out from what was drawn."""
    return frozenset((rate, float(f"{multiplier:.6g}"), int(count)) for rate, multiplier, count in events)


def check_privacy(row: Row) -> None:
    """What holds however often and wherever processes died."""
    assert set(row["left"]) <= set(row["charged"]), row
    for owner, events in row["left"].items():
        assert epsilon(history_of(row["charged"][owner])) >= epsilon(history_of(events)) - 1e-9, row
    assert max(row["most_payloads_of_a_key"], row["most_results_of_a_key"]) == 1, row
    charges = sum(row["reserved"]) + sum(row["reopened"])
    assert row["made"] <= charges, row  # nothing is computed that was not charged, or reopened
    assert row["noise_draws"] <= STEPS * charges, row


def check_end(row: Row, participations: int) -> None:
    """A run that was taken up until it ended: charged what was planned, and what is missing was lost to deaths."""
    assert row["resumed"] == 0, row
    assert row["weights"] is True, row
    assert row["leftovers"] == [], row
    assert row["extract"] == [], row  # of ledgers at home: nothing newer there, and nothing else
    assert row["reserved"] == [participations] * len(row["reserved"]), row
    assert row["failed"] == [0] * len(row["reserved"]), row
    check_privacy(row)
    lost = sum(row["reserved"]) - sum(row["released"])
    if row["died"].count(-9) < 3:
        assert lost == 0, row
    if lost == 0:
        assert {owner: history_of(events) for owner, events in row["left"].items()} == {
            owner: history_of(events) for owner, events in row["charged"].items()
        }, row


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    """By setup and scenario; two warm processes at once."""
    folder = tmp_path_factory.mktemp("crash")
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda setup: run(folder / setup, setup, "", *QUICK[setup])[1], QUICK)
    return dict(zip(QUICK, found, strict=True))


def test_every_named_place_of_training_is_among_the_kills() -> None:
    sources = [*(ROOT / "federated").glob("*.py"), ROOT / "devices" / "durable.py"]
    named = {
        name for path in sources for name in re.findall(r'^ +reach\("([a-z_.]+)"\)', path.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    killed = {point.partition(":")[0] for point in [*KILLS, *EVALUATION_KILLS, *CLIENT_KILLS, *LOCAL_KILLS]}
    assert named == killed | ELSEWHERE


def test_undisturbed_the_ledger_says_exactly_what_was_drawn(
    rows: dict[str, dict[str, Row]],
) -> None:
    for setup in (RECORD, EVALUATING, CLIENT, LOCAL):
        row = rows[setup][""]
        assert row["died"] == [0]
        assert {o: history_of(e) for o, e in row["left"].items()} == {
            o: history_of(e) for o, e in row["charged"].items()
        }
        assert row["made"] == sum(row["reserved"])
        check_privacy(row)


def test_a_mechanism_that_saves_noise_is_caught_by_what_was_drawn(rows: dict[str, dict[str, Row]]) -> None:
    """The control: the ledger states twice the noise that there is."""
    row = rows[THRIFTY][""]
    assert row["resumed"] == 0
    with pytest.raises(AssertionError):
        check_privacy(row)


@pytest.mark.parametrize("point", [*kills(KILLS), *FAILURES])
def test_a_run_resumes_at_the_planned_epsilon(rows: dict[str, dict[str, Row]], point: str) -> None:
    row = rows[RECORD][point]
    assert row["died"] == [-9 if point.endswith("kill") else 1], row["error"]
    check_end(row, ROUNDS)


@pytest.mark.parametrize("point", [CHECKPOINT, HISTORY, WEIGHTS])
def test_a_death_before_a_file_has_its_name_leaves_nothing_behind(rows: dict[str, dict[str, Row]], point: str) -> None:
    row = rows[RECORD][point]
    check_end(row, ROUNDS)
    assert row["leftovers"] == []


@pytest.mark.parametrize("point", kills(EVALUATION_KILLS))
def test_an_interrupted_evaluation_is_charged_once(rows: dict[str, dict[str, Row]], point: str) -> None:
    row = rows[EVALUATING][point]
    assert row["died"] == [-9], row["error"]
    check_end(row, ROUNDS + 2)
    assert evaluated(row) == [2, 4]


@pytest.mark.parametrize("point", kills(CLIENT_KILLS))
def test_a_server_that_dies_charges_a_round_once(rows: dict[str, dict[str, Row]], point: str) -> None:
    row = rows[CLIENT][point]
    assert row["died"] == [-9], row["error"]
    check_end(row, ROUNDS + 2)


@pytest.mark.parametrize("point", kills(LOCAL_KILLS))
def test_an_owner_that_noises_its_whole_update_is_charged_once(rows: dict[str, dict[str, Row]], point: str) -> None:
    row = rows[LOCAL][point]
    assert row["died"] == [-9], row["error"]
    check_end(row, ROUNDS + 2)


def test_three_deaths_in_one_round_do_not_end_a_run(rows: dict[str, dict[str, Row]]) -> None:
    """Its reservations cannot be used again: the round is charged, left out, and the model is the one before."""
    row = rows[RECORD][THRICE]
    assert row["died"] == [-9] * 3, row["error"]
    check_end(row, ROUNDS)
    assert row["released"] == [ROUNDS - 1] * OWNERS
    assert row["reopened"] == [2] * OWNERS
    rounds = row["rounds"]
    assert [entry["clients"] for entry in rounds] == [OWNERS, 0, OWNERS, OWNERS]
    assert rounds[1]["refusals"] == {"unavailable": OWNERS}
    assert rounds[1]["accuracy"] == rounds[0]["accuracy"] != rounds[2]["accuracy"]


def test_three_deaths_in_one_evaluation_leave_it_out(rows: dict[str, dict[str, Row]]) -> None:
    row = rows[EVALUATING][THRICE_EVALUATING]
    assert row["died"] == [-9] * 3, row["error"]
    check_end(row, ROUNDS + 2)
    assert row["released"] == [ROUNDS + 1] * OWNERS
    assert evaluated(row) == [4]
    rounds = row["rounds"]
    assert rounds[1]["owners_accuracy"] == {"mean": None, "refusals": {"unavailable": OWNERS}}
    assert [entry["clients"] for entry in rounds] == [OWNERS] * ROUNDS


def evaluated(row: Mapping[str, Any]) -> list[int]:
    """Rounds in which every owner's counts arrived."""
    found = {entry["round"]: (entry["owners_accuracy"] or {}).get("by_owner", {}) for entry in row["rounds"]}
    return [number for number, owners in found.items() if len(owners) == OWNERS]


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("unit", SETUPS)
def test_a_kill_at_any_failpoint_and_again_while_resuming(tmp_path: Path, unit: str) -> None:
    """Every failpoint, 20 seeds, two or three deaths each; half of the setups at once with the other half."""
    setups = SETUPS[unit]
    share = SEEDS // len(setups)

    def matrix(number: int) -> tuple[dict[str, int], dict[str, Row]]:
        seeds = f"*@{number * share}-{number * share + share - 1}"
        return run(tmp_path / setups[number], setups[number], "", seeds)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(matrix, range(len(setups))))
    for setup, (reached, rows) in zip(setups, found, strict=True):
        participations = ROUNDS + 2 * ("evaluate" in setup)
        assert len(rows) > share * len(reached) // 2  # drawn alike, a few may be the same
        for row in rows.values():
            check_end(row, participations)
