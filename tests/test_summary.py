"""What summary.json tells of the rounds, and that a run whose owners come and go is not taken for a damaged one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tacit.devices.durable import FileDamaged
from tacit.edge import pipeline, summary
from tacit.federated.accounts import read_ledger
from tacit.federated.chain import ChainDamaged

pytestmark = [
    # flwr brings typer, which imports names that click has deprecated.
    pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning"),
]

AWAY = """
[federated]
owners = 6
rounds = 8
quorum = 1
partition = "iid"

[federated.failures]
dropout = 0.4
corrupt_share = 0.3

[privacy]
noise_multiplier = 4.0

[compression]
variants = []

[report]
twin = false
"""


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("away")
    (folder / "recipe.toml").write_text(AWAY)
    return folder / "run", pipeline.run(folder / "recipe.toml", folder / "run")


def test_owners_that_come_and_go_are_charged_for_what_they_sent_and_the_run_ends_well(away):
    folder, told = away
    accounts, _, _ = read_ledger(folder / "ledger.jsonl")
    charged = [account.reserved for account in accounts]
    assert 0 < max(charged) < 8, "nobody was there in all rounds, or this shows nothing"
    assert told["privacy"]["participations_charged"] == max(charged)
    curve = [row["epsilon"] for row in told["training"]["rounds"] if row["epsilon"] is not None]
    assert curve == sorted(curve), "what is spent never falls"
    assert curve[-1] == told["privacy"]["epsilon"]


def test_a_ledger_that_misses_an_update_which_was_used_is_refused(away):
    folder, _ = away
    path = folder / "ledger.jsonl"
    whole, card = path.read_bytes(), (folder / "privacy.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    try:
        (folder / "privacy.json").unlink()
        path.write_bytes(b"".join(lines[: len(lines) // 2]))
        with pytest.raises(ChainDamaged, match="participations"):
            pipeline.report(folder)
    finally:
        path.write_bytes(whole)
        (folder / "privacy.json").write_bytes(card)


def test_refusals_and_those_set_aside_are_counted_over_all_rounds(away):
    _, told = away
    training = told["training"]
    assert training["refusals"]["dropped"] > 0
    assert all(about["rounds"] > 0 and "NaN" in about["reason"] for about in training["set_aside"].values())
    assert training["set_aside"]
    assert all(row["bytes_down"] > 0 for row in training["rounds"])
    assert all(row["simulated_s"] > 0 for row in training["rounds"])


def test_of_an_owner_that_was_set_aside_more_than_once_the_last_reason_is_told():
    rows = [{"set_aside": {"ben": "old"}}, {"set_aside": {}}, {"set_aside": {"ben": "new", "anna": "odd"}}, {}]
    assert summary._set_aside(rows) == {
        "anna": {"rounds": 1, "reason": "odd"},
        "ben": {"rounds": 2, "reason": "new"},
    }
    assert summary._refusals([{"refusals": {"late": 2}}, {"refusals": {"late": 1, "dropped": 4}}, {}]) == {
        "late": 3,
        "dropped": 4,
    }


def test_what_a_client_level_round_keeps_secret_does_not_appear_as_null():
    row = {"round": 3, "accuracy": float("nan"), "bytes_up": None, "bytes_down": None, "simulated_s": None}
    assert summary._shown(row) == {"round": 3, "accuracy": None}


def _measured(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    path = folder / "measure" / "x.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    try:
        return pipeline.report(folder)
    finally:
        path.unlink()


def test_a_device_that_was_lost_stands_in_the_summary_with_its_reason_and_what_it_kept(away):
    folder, _ = away
    lost = {"device": "ssh:a@b", "mode": "quick", "artifacts": {}, "failed": {"a": "unplugged"}, "facts": {}}
    told = _measured(folder, {**lost, "complete": False, "lost": "unplugged", "changes": ["a: slower"], "fit": None})
    assert told["measured"] == {
        "ssh:a@b": {
            "mode": "quick",
            "complete": False,
            "lost": "unplugged",
            "failed": {"a": "unplugged"},
            "changes": ["a: slower"],
        }
    }
    assert told["failed"] == [{"stage": "measure ssh:a@b", "name": "a", "reason": "unplugged"}]


@pytest.mark.parametrize(
    "content", [{}, {"device": 3, "artifacts": {}, "failed": {}}, {"device": "x", "artifacts": []}]
)
def test_a_measurement_that_is_damaged_is_refused_and_not_shown_as_none(away, content):
    with pytest.raises(FileDamaged, match="run tacit measure again"):
        _measured(away[0], content)


@pytest.mark.parametrize(
    ("mode", "kept", "other"), [("quick", "latency", "answers_on"), ("parity", "answers_on", "latency")]
)
def test_answers_of_a_device_without_a_clock_are_no_latency(mode, kept, other):
    entry = {"p50_us": 1.0, "block_medians_us": [1.0] * 512, "input_source": "test"}
    content = {"mode": mode, "artifacts": {"a": entry}}
    variant = dict.fromkeys(summary._VARIANT_KEYS) | {"name": "a"}
    recipe = SimpleNamespace(compression=SimpleNamespace(variants=[SimpleNamespace(name="a")]))
    folder = SimpleNamespace(recipe=recipe, read_json=lambda *parts: variant)
    (told,) = summary._variants(folder, {"x": content})
    assert told[kept] == {"x": {"p50_us": 1.0, "input_source": "test"}}, "without what only a comparison needs"
    assert told[other] == {}
