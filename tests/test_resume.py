"""kill -9 anywhere, then resume: model, rounds and what owners keep are the uninterrupted run's, bit for bit."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tacit.devices.durable import FileDamaged
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import load_recipe
from tacit.federated.personal import OwnerStore

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path(__file__).with_name("resume_driver.py")
Row = dict[str, Any]

# One death for each setup, each at another place; four owners, so the fifth round has its owners 17 to 20.
KILLS = [
    "fedavgm/round.after_aggregate:4",
    "fedadam/server.before_checkpoint:4",
    "scaffold/round.after_replies:5",
    "fedbuff/round.after_configure:5",
    "feedback/store.before_write:18",
    "ditto/store.before_removal:19",
    "fedbn/durable.before_fsync:22",
    "batch norm/durable.before_rename:4",
    "local head/durable.after_rename:22",
    "q-ffl/checkpoint.before_removal:4",
    "failures/round.before_configure:4",
    "cohort/server.after_checkpoint:4",
    "flower/server.before_history:1",
    "augment/server.before_weights:1",
    "replay/round.after_replies:4",
    "void/cohort.before_commit:4",
    "void feedback/client.after_training:18",
    "void client/server.after_noise:4",
    "void local/chain.before_fsync:8",
]
# Where the newest checkpoint is damaged besides: what a run needs of the round before must still be there.
DAMAGED = [
    f"{setup}/round.after_replies:5+damage"
    for setup in ("fedadam", "scaffold", "fedbuff", "feedback", "ditto", "void feedback", "void client")
]
SEEDS = 20


def run(folder: Path, *scenarios: str) -> list[Row]:
    command = [sys.executable, str(DRIVER), str(folder), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def at_once(folder: Path, *parts: list[str]) -> list[Row]:
    """What came of each part, in a process of its own."""
    with ThreadPoolExecutor(len(parts)) as threads:
        found = threads.map(lambda number: run(folder / str(number), *parts[number]), range(len(parts)))
    return [row for rows in found for row in rows]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    every = sorted([*KILLS, *DAMAGED])
    middle = len(every) // 2
    found = at_once(tmp_path_factory.mktemp("resume"), every[:middle], every[middle:])
    return {row["scenario"]: row for row in found}


def check(row: Row, undisturbed: Row) -> None:
    """A run that died and was taken up: the same in every byte, and no round that was over is done again."""
    assert row["died"] == -9, row
    assert row["resumed"] == 0, row
    assert row["left"] == undisturbed["left"], row
    assert row["leftovers"] == [], row
    assert row["again_from"] >= row["finished"] + (not row["scenario"].endswith("+damage")), row


@pytest.mark.parametrize("scenario", KILLS)
def test_a_killed_run_ends_with_the_same_bytes(rows: dict[str, Row], scenario: str) -> None:
    check(rows[scenario], rows[scenario.partition("/")[0] + "/"])


@pytest.mark.parametrize("scenario", DAMAGED)
def test_so_it_does_from_the_checkpoint_before_where_the_newest_is_damaged(rows: dict[str, Row], scenario: str) -> None:
    row = rows[scenario]
    check(row, rows[scenario.partition("/")[0] + "/"])
    assert row["again_from"] == row["finished"] == 4
    assert [note for note in row["notes"] if "000004-" in note and "damaged checkpoint passed over" in note]
    assert "resumed after round 3" in row["notes"]


def test_the_setups_are_not_the_same_run(rows: dict[str, Row]) -> None:
    """The control: bytes that could not differ would prove nothing. Ditto's shared model is plain averaging's."""
    weights = {name: row["left"]["train/weights.safetensors"] for name, row in rows.items() if name.endswith("/")}
    del weights["ditto/"]
    assert len(set(weights.values())) == len(weights) > 15
    for name in ("feedback/", "ditto/", "fedbn/", "local head/", "void feedback/"):
        assert len(set(rows[name]["left"].values())) == 2 + 4  # the model, the rounds, and four owners' own


def named_places() -> Iterator[str]:
    for path in [*(ROOT / "federated").glob("*.py"), ROOT / "devices" / "durable.py"]:
        yield from re.findall(r'^ +reach\("([a-z_.]+)"\)', path.read_text(), re.MULTILINE)


def test_every_named_place_of_training_is_reached_by_a_setup(rows: dict[str, Row]) -> None:
    reached = {name for row in rows.values() for name in row.get("reached", ())}
    assert reached == set(named_places())
    assert len(reached) >= 25


@pytest.mark.soak
@pytest.mark.timeout(3200)
def test_a_kill_at_any_failpoint_changes_no_byte(tmp_path: Path) -> None:
    """Every failpoint, 20 seeds: each draws a setup that comes to it, and which time kills."""
    half = SEEDS // 2
    found = at_once(tmp_path, [f"*@0-{half - 1}"], [f"*@{half}-{SEEDS - 1}"])
    undisturbed = {row["scenario"]: row for row in found if "reached" in row}
    killed = [row for row in found if "died" in row]
    assert len(killed) == SEEDS * len(set(named_places())) >= 500
    for row in killed:
        check(row, undisturbed[row["scenario"].partition("/")[0] + "/"])


def in_process(folder: Path, run: str) -> list[str]:
    """Notes of a short run, begun or taken up."""
    settings = ["federated.rounds=2", "federated.owners=2", "model.family=mlp", "model.hidden=[8]", "privacy.unit=none"]
    notes: list[str] = []
    recipe = load_recipe("digits", [*settings, "privacy.sample_rate=0.1"])
    train_in_process(recipe, folder, run=run, report=lambda row: notes.append(str(row.get("note", ""))))
    return [note for note in notes if note]


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    """Also one of the same recipe: a twin's has no noise."""
    in_process(tmp_path, "first")
    assert in_process(tmp_path, "first") == ["resumed after round 2"]
    with pytest.raises(FileDamaged, match=r"expected a checkpoint of this recipe and run in .*, got another's"):
        in_process(tmp_path, "second")


def test_with_all_checkpoints_damaged_a_run_stops_and_does_not_begin_anew(tmp_path: Path) -> None:
    in_process(tmp_path, "first")
    weights = (tmp_path / "train" / "weights.safetensors").read_bytes()
    paths = sorted((tmp_path / "train" / "checkpoint").iterdir())
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileDamaged, match="got only damaged ones") as failed:
        in_process(tmp_path, "first")
    assert [path.name in str(failed.value) for path in paths] == [True, True]
    assert (tmp_path / "train" / "weights.safetensors").read_bytes() == weights
    assert sorted((tmp_path / "train" / "checkpoint").iterdir()) == paths


def test_an_owners_store_keeps_what_a_fallback_by_one_checkpoint_needs(tmp_path: Path) -> None:
    store = OwnerStore(tmp_path / "owner" / "kept")
    for number in range(1, 6):
        store.write(number, {"own.w": np.float32([number])})
    # The server dies in round 5 and finds the checkpoint of round 4 damaged: round 4 begins with what round 3 left.
    assert store.before(4)["own.w"].tolist() == [3.0]
    store.write(4, {"own.w": np.float32([4.0])})
    assert store.before(5)["own.w"].tolist() == [4.0]
    assert [path.name for path in sorted(store.folder.iterdir())] == ["000003.safetensors", "000004.safetensors"]


def test_what_an_owner_kept_and_cannot_read_is_named(tmp_path: Path) -> None:
    store = OwnerStore(tmp_path / "owner" / "kept")
    store.write(1, {"own.w": np.float32([1.0])})
    path = store.folder / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileDamaged, match=r"expected what this owner kept, got .*000001\.safetensors"):
        store.before(2)
