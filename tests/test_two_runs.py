"""Two runs at once over the same data stay within one budget, and a ledger that was put back is not believed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tacit.edge import pipeline
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import Recipe, load_recipe
from tacit.edge.run_folder import FolderHeld, FolderMismatch
from tacit.federated.accounting import Event, epsilon_pld
from tacit.federated.accounts import read_ledger, spend_of
from tacit.federated.chain import ChainHeld
from tacit.federated.client_app import OwnerGate
from tacit.federated.ledger import Granted, Ledger, Refused, Reservation
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.outbox import Outbox
from tacit.federated.rounds import FederationFailed

TACIT = Path(sys.executable).with_name("tacit")
TOLD = {FolderHeld: 5, FolderMismatch: 2, ChainHeld: 6}
ROUNDS, OWNERS, DELTA = 3, 3, 1e-5
PLANNED = {Event(sample_rate=0.4, noise_multiplier=2.0): ROUNDS}
EPSILON = epsilon_pld(PLANNED, DELTA) + 1e-9
RECIPE = f"""
[model]
channels = [4]
[federated]
owners = {OWNERS}
partition = "iid"
rounds = {ROUNDS}
[privacy]
sample_rate = 0.4
noise_multiplier = 2.0
[compression]
variants = []
[report]
twin = false
"""
# JAX, which another test of the session may have loaded, warns at a fork; the child needs none of it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return load_recipe(path)


def command(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "FLWR_TELEMETRY_ENABLED") if name in os.environ}
    return subprocess.Popen(
        [TACIT, *arguments],
        env={**kept, "HOME": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_budget(ledger: Path, reserved: int = ROUNDS) -> None:
    """Everybody was charged as often as stated, and within the budget."""
    accounts, _, note = read_ledger(ledger)
    assert note is None
    assert [account.reserved for account in accounts] == [reserved] * OWNERS
    assert max(spend.epsilon for spend in spend_of(accounts, DELTA, with_prv=False)) <= EPSILON


def at_once(*jobs: Callable[[], object]) -> list[int]:
    """Runs jobs in children that begin together; 0 for each that ends well, a code for what it was told, or 99."""
    gate_read, gate_write = os.pipe()
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.close(gate_write)
                os.read(gate_read, 1)  # until the parent closes its end
                job()
                code = 0
            except tuple(TOLD) as refusal:
                code = TOLD[type(refusal)]
            finally:
                os._exit(code)
        children.append(child)
    os.close(gate_write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(gate_read)
    return codes


def test_of_two_runs_in_one_folder_one_runs_and_the_other_is_told(tmp_path: Path, recipe: Recipe) -> None:
    codes = at_once(*[lambda: pipeline.run(recipe, tmp_path / "run")] * 2)
    # The one that comes later finds the folder in use, or, where it was late, a run that has begun.
    assert sorted(codes) in ([0, TOLD[FolderHeld]], [0, TOLD[FolderMismatch]])
    check_budget(tmp_path / "run" / "ledger.jsonl")


def test_of_two_trainings_on_one_ledger_only_one_is_given_its_lock(tmp_path: Path, recipe: Recipe) -> None:
    """Past the folder's own lock, as a script of a user's may go."""

    def train(run: str) -> Callable[[], object]:
        return lambda: train_in_process(recipe, tmp_path / "run", run=run, report=lambda row: None)

    codes = at_once(train("first"), train("second"))
    # Held off, or so late that it finds the other's checkpoint and has nothing left to do.
    assert sorted(codes) in ([0, TOLD[ChainHeld]], [0, 0])
    check_budget(tmp_path / "run" / "ledger.jsonl")


EVENT = Event(sample_rate=1.0, noise_multiplier=4.0)
BUDGET = epsilon_pld({EVENT: 5}, DELTA) + 1e-9
DESCRIBED = {
    "unit": "record",
    "relation": "add/remove",
    "sampler": "poisson",
    "noise": "gaussian",
    "sample_rate": 1.0,
    "noise_multiplier": 4.0,
    "max_grad_norm": 1.0,
    "steps": 1,
}


def test_processes_of_one_owner_that_serve_two_runs_at_once_share_its_budget(tmp_path: Path) -> None:
    """As under Flower: a message comes to a process of its own. Budget for 5 participations, 8 are asked for."""

    def serve(run: str) -> None:
        gate = OwnerGate(lambda: Ledger(tmp_path / "ledger.jsonl", Outbox(tmp_path / run), epsilon=BUDGET, delta=DELTA))
        for number in range(1, 5):
            request = Reservation(owner="anna", source="x", run=run, round=number, body="b", mechanism=DESCRIBED)
            turn = None
            while turn is None:
                try:
                    turn = gate.reserve(request)
                except ChainHeld:
                    continue
            if isinstance(turn, Granted):
                gate.release(request, run.encode())
            elif turn != Refused("exhausted"):
                raise ValueError(turn)

    assert at_once(lambda: serve("first"), lambda: serve("second")) == [0, 0]
    (account,), _, _ = read_ledger(tmp_path / "ledger.jsonl")
    assert (account.reserved, account.released, account.failed, account.reopened) == (5, 5, 0, 0)
    assert set(account.runs) <= {"first", "second"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A run whose weights were lost: it is taken up from its last checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pipeline.run(recipe, folder)
    (folder / "train" / "weights.safetensors").unlink()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def cut(ledger: Path, lines: int) -> bytes:
    """Leaves the first lines, a chain that holds; returns them."""
    kept = b"".join(ledger.read_bytes().splitlines(keepends=True)[:lines])
    ledger.write_bytes(kept)
    return kept


def test_the_command_refuses_an_older_ledger_with_its_line_and_charges_nothing(copy: Path) -> None:
    older = cut(copy / "ledger.jsonl", 2 * OWNERS)
    run = command(copy.parent, "train", "run", "--format", "json")
    out, err = run.communicate(timeout=250)
    assert run.returncode == 4, err
    error = json.loads(out)["error"]
    assert error["id"] == "PrivacyRefused"
    assert "got an older one" in error["message"]
    assert "spent budget cannot be taken back" in error["hint"]
    assert err.splitlines()[-1].startswith("error: expected a ledger that goes at least as far as round 3")
    assert (copy / "ledger.jsonl").read_bytes() == older
    assert not (copy / "train" / "weights.safetensors").exists()


@pytest.mark.parametrize("lines", [0, 1, 2 * OWNERS, -1])
def test_any_older_ledger_is_refused_by_whoever_remembers_its_head(copy: Path, lines: int) -> None:
    """None, one entry, the first round, or all but the newest entry."""
    older = cut(copy / "ledger.jsonl", lines)
    with pytest.raises(PrivacyRefused, match="got an older one"):
        pipeline.train(copy)
    assert (copy / "ledger.jsonl").read_bytes() == older


def test_the_newest_ledger_is_believed_and_nothing_is_charged_again(copy: Path) -> None:
    """The control: with it the same call gives the model of the last checkpoint."""
    before = (copy / "ledger.jsonl").read_bytes()
    pipeline.train(copy)
    assert (copy / "ledger.jsonl").read_bytes() == before
    assert (copy / "train" / "weights.safetensors").is_file()


def test_without_any_checkpoint_what_a_ledger_says_still_counts(copy: Path) -> None:
    """Nobody remembers a head then; the budget holds all the same, and what was released cannot be had again."""
    shutil.rmtree(copy / "train")
    with pytest.raises((PrivacyRefused, FederationFailed)):
        pipeline.train(copy)
    check_budget(copy / "ledger.jsonl")
