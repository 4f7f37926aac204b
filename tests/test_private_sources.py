"""Private data and deployed owners: ledgers that outlive a run, data that must stay the same, an owner's own policy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from tacit.edge import composition, flower_app, pipeline
from tacit.edge.composition import build_model
from tacit.edge.recipe import Recipe, RecipeRefused, load_recipe
from tacit.federated.accounts import read_ledger
from tacit.federated.averaging import FederatedAveraging, to_record
from tacit.federated.datasets import find_task
from tacit.federated.fingerprint import DataChanged
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.home import declare_new_cohort
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.task import DataProblem, Records
from tacit.federated.train import write_arrays

CLINIC = """
from dataclasses import replace
import numpy as np
from tacit.federated.datasets import find_task
def scans():
    task = find_task("digits")
    def load():
        data = task.load()
        of_owner = lambda i: data.private.take(np.arange(i, 1347, 3))
        return replace(data, private=None, status="private", of_owner=of_owner)
    return replace(task, name="scans", load=load)
def pool():
    task = find_task("digits")
    return replace(task, name="pool", load=lambda: replace(task.load(), status="private"))
"""
SMALL = [
    "federated.owners=3", "federated.rounds=2", "model.channels=[4]",
    "privacy.noise_multiplier=1.0", "privacy.sample_rate=0.1", "compression.variants=[]", "devices.names=[]",
]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "home"))
    (tmp_path / "clinic.py").write_text(CLINIC)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "home"


def _recipe(*settings: str, task: str = "clinic:scans") -> Recipe:
    partition = "natural" if ":" in task else "iid"
    return load_recipe("digits", [f"task.name={task}", f"federated.partition={partition}", *SMALL, *settings])


def test_runs_over_private_data_add_up_and_the_second_is_refused_before_a_record_is_charged(home, tmp_path: Path):
    summary = pipeline.run(_recipe(), tmp_path / "first")
    card = summary["privacy"]
    assert isinstance(card, dict)
    assert card["data_status"] == "private"
    assert summary["accuracy_without_privacy"] is None
    before = (home / "ledgers" / "owner-00" / "scans.jsonl").read_bytes()
    with pytest.raises(PrivacyRefused, match="too little left"):
        pipeline.run(_recipe(), tmp_path / "second")
    assert (home / "ledgers" / "owner-00" / "scans.jsonl").read_bytes() == before


def test_a_larger_budget_pays_for_a_second_run_whose_card_states_both(home, tmp_path: Path):
    recipe = _recipe("privacy.budget=40")
    first, second = (pipeline.run(recipe, tmp_path / name)["privacy"] for name in ("first", "second"))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    accounts, _, _ = read_ledger(home / "ledgers" / "owner-00" / "scans.jsonl")
    assert accounts[0].reserved == 4
    assert second["epsilon"] > first["epsilon"]
    assert second["participations_charged"] == first["participations_charged"] == 2


def test_private_records_in_one_pool_are_not_dealt_out_under_a_guarantee(home, tmp_path: Path):
    recipe = _recipe("federated.partition=iid", task="clinic:pool")
    with pytest.raises(DataProblem, match=r"task\.owner_column"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_a_budget_below_the_plan_is_refused():
    with pytest.raises(RecipeRefused, match="at least"):
        load_recipe("digits", ["privacy.epsilon=4", "privacy.budget=3"])


def test_data_that_changed_during_a_run_are_refused(home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flower_app.train_in_process(_recipe(), tmp_path, run="run", report=lambda _: None)
    _edit(monkeypatch)
    with pytest.raises(DataChanged):
        flower_app.train_in_process(_recipe(), tmp_path, run="run", report=lambda _: None)


def test_other_data_inherit_the_spend_unless_a_new_cohort_is_declared(home, tmp_path: Path, monkeypatch):
    flower_app.train_in_process(_recipe(), tmp_path / "a", run="a", report=lambda _: None)
    _edit(monkeypatch)
    with pytest.raises(PrivacyRefused, match="too little left"):
        flower_app.train_in_process(_recipe(), tmp_path / "b", run="b", report=lambda _: None)
    for owner in ("owner-00", "owner-01", "owner-02"):
        declare_new_cohort(home, owner, "scans", "other patients")
    summary = pipeline.run(_recipe(), tmp_path / "c")
    card = summary["privacy"]
    assert isinstance(card, dict)
    assert "owner-00 declared other records, uncharged until then: other patients." in str(card["statement"])


def _edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of every record becomes another."""
    task = find_task("clinic:scans")
    data = task.load()
    of_owner = data.of_owner
    assert of_owner is not None

    def edited_records(index: int) -> Records:
        records = of_owner(index)
        inputs = records.inputs.copy()
        inputs[:, 0, 0, 0] += 1.0
        return Records(inputs, records.labels)

    edited = replace(data, of_owner=edited_records)
    monkeypatch.setattr(composition, "task_of", lambda _: replace(task, load=lambda: edited))


# A deployed owner.


def _ask(tmp_path: Path, recipe: Recipe, policy: str | None, home: Path) -> tuple[list[str], list[object]]:
    """Asks one deployed owner to train once; returns its errors and its replies."""
    quiet_flower()
    flower_app._composed.cache_clear()
    home.mkdir(mode=0o700)
    if policy is not None:
        (home / "owner.toml").write_text(policy)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    config = {"recipe": str(tmp_path / "recipe.toml"), "out": str(tmp_path / "run")}
    context = Context(1, 2, {"partition-id": 0, "owner": "anna"}, RecordDict(), config)
    grid = InProcessGrid(flower_app.client_app, {2: context}, None)
    arrays = to_record(write_arrays(build_model(recipe)))
    messages = FederatedAveraging(rounds=2).configure_train(1, arrays, ConfigRecord({"run": "r"}), grid)
    replies = list(grid.send_and_receive(messages))
    return [r.error.reason for r in replies if r.has_error()], [r for r in replies if r.has_content()]


def _policy(**changed: str) -> str:
    terms = {"unit": '"record"', "epsilon": "50.0", "delta": "1e-5", "recipes": '"any"', **changed}
    return '[owner]\nname = "anna"\n[policy]\n' + "".join(f"{key} = {value}\n" for key, value in terms.items())


def test_a_deployed_owner_obeys_what_its_policy_accepts_with_hardened_noise_and_its_own_ledger(home, tmp_path: Path):
    recipe = _recipe(task="digits")
    errors, replies = _ask(tmp_path, recipe, _policy(recipes=f'["{recipe.digest()}"]'), home)
    assert errors == []
    assert len(replies) == 1
    entries = [json.loads(line) for line in (home / "ledgers" / "anna" / "digits.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["reserve", "release"]
    assert entries[0]["mechanism"]["noise"] == "gaussian on a grid"
    assert entries[0]["owner"] == "anna"


@pytest.mark.parametrize(
    "changed",
    [
        {"unit": '"local"'},
        {"min_noise_multiplier": "1.5"},
        {"max_sample_rate": "0.05"},
        {"recipes": f'["{"0" * 64}"]'},
        {"max_steps": "0"},
        {"name": '"bob"'},
    ],
)
def test_a_message_weaker_than_the_policy_reads_nothing_and_is_refused_in_a_constant(home, tmp_path: Path, changed):
    policy = _policy(**{k: v for k, v in changed.items() if k != "name"})
    if "name" in changed:
        policy = policy.replace('"anna"', changed["name"])
    errors, replies = _ask(tmp_path, _recipe(task="digits"), policy, home)
    assert errors in (["refused"], ["unavailable"])
    assert replies == []
    ledger = home / "ledgers" / "anna" / "digits.jsonl"
    assert not ledger.is_file() or ledger.read_bytes() == b""


def test_at_client_level_too_the_policy_decides(home, tmp_path: Path):
    recipe = _recipe("privacy.unit=client", "privacy.sample_rate=0.5", task="digits")
    assert _ask(tmp_path, recipe, _policy(), home) == (["refused"], [])  # unit record does not accept client


def test_without_a_guarantee_a_deployed_owner_refuses(home, tmp_path: Path):
    recipe = load_recipe("digits", ["privacy.unit=none", "federated.owners=3", "compression.variants=[]"])
    assert _ask(tmp_path, recipe, _policy(), home) == (["refused"], [])


def test_a_deployed_owner_without_a_policy_does_nothing(home, tmp_path: Path):
    errors, replies = _ask(tmp_path, _recipe(task="digits"), None, home)
    assert errors in (["refused"], ["unavailable"])
    assert replies == []


def test_a_budget_of_the_owners_own_is_kept(home, tmp_path: Path):
    errors, replies = _ask(tmp_path, _recipe(task="digits"), _policy(epsilon="0.01"), home)
    assert (errors, replies) == (["exhausted"], [])


def test_client_level_charges_the_servers_ledger_at_home_and_notices_other_data(home, tmp_path: Path, monkeypatch):
    recipe = _recipe("privacy.unit=client", "privacy.sample_rate=0.5")
    flower_app.train_in_process(recipe, tmp_path, run="run", report=lambda _: None)
    accounts, _, _ = read_ledger(home / "ledgers" / "server" / "scans.jsonl")
    assert [(account.owner, account.unit, account.reserved) for account in accounts] == [("server", "client", 2)]
    _edit(monkeypatch)
    with pytest.raises(DataChanged):
        flower_app.train_in_process(recipe, tmp_path, run="run", report=lambda _: None)


def test_a_plan_above_the_budget_is_refused_before_anything_is_charged(home, tmp_path: Path):
    recipe = _recipe()
    tight = recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update={"budget": 0.5})})
    with pytest.raises(PrivacyRefused, match="plan within"):
        flower_app.train_in_process(tight, tmp_path, run="run", report=lambda _: None)
    assert not list(home.glob("ledgers/*/scans.jsonl")) or all(
        not ledger.read_bytes() for ledger in home.glob("ledgers/*/scans.jsonl")
    )
