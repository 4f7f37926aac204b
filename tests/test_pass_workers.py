"""A cohort's passes in several processes: the same bytes as in one, and what goes wrong there is never hidden."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tacit.edge import strategies
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import load_recipe
from tacit.federated import cohort_passes
from tacit.federated.accounts import read_ledger
from tacit.federated.checkpoint import read_weights
from tacit.federated.cohort import CohortSteps, Walk
from tacit.federated.cohort_passes import CohortPasses, CohortRecords
from tacit.federated.datasets import find_task
from tacit.federated.local_steps import LocalRule
from tacit.federated.mechanism import Mechanism
from tacit.federated.model_arrays import write_arrays
from tacit.federated.models import build_family
from tacit.federated.noise import SeededGenerator
from tacit.federated.pass_workers import PassWorkers
from tacit.federated.rounds import FederationFailed
from tacit.federated.task import Records
from tacit.federated.workers import WorkerDied

# JAX, which another test of the session may have loaded, warns at a fork.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

TASK = find_task("digits")
CLIP = 0.3
SIZES = (9, 0, 3, 17, 1, 6, 6, 12, 8)
COINS = [np.sort(np.random.default_rng(n).permutation(20)[:size]) for n, size in enumerate(SIZES)]


def records(seed, count=20):
    generator = np.random.default_rng(seed)
    return Records(generator.random((count, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, count))


HELD = [records(seed) for seed in range(len(SIZES))]


@pytest.fixture(autouse=True)
def one_thread_and_short_passes(monkeypatch):
    """As in a run; three passes of three of the owners above."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(cohort_passes, "_PASS_BYTES_OF_CONVOLUTIONS", 2**22)
    yield
    torch.set_num_threads(before)
    assert multiprocessing.active_children() == []


def make_model(family="cnn"):
    torch.manual_seed(0)
    return build_family({"family": family}, shape=(1, 8, 8), outputs=10)


def passes_of(share, *, task=TASK, model=None):
    """What gives owners' sums of batches, by a clip or without, with the same workers each time."""
    model = model or make_model()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rows = flat + 0.02 * torch.randn(len(HELD), len(flat), generator=torch.Generator().manual_seed(1))
    passes, held = CohortPasses(task, model, device="cpu", share=share), CohortRecords.of(HELD, task)
    return lambda coins=COINS, bound=CLIP: passes(rows, held, coins, bound)


def sums(share, *, task=TASK, model=None, coins=COINS, bound=CLIP):
    return passes_of(share, task=task, model=model)(coins, bound)


@pytest.fixture
def share():
    made = PassWorkers(count=1)
    yield made
    made.close()


def watched(folder: Path, act=lambda: None):
    """A task whose loss notes who calls it and does something in the first pass of a worker.

    This process does not take a pass of its own before that, so that there is one left for the worker.
    """
    here, flag = os.getpid(), folder / "begun"

    def loss(outputs, targets):
        (folder / f"pid-{os.getpid()}").touch()
        if os.getpid() != here and not flag.exists():
            flag.touch()
            act()
        late = time.monotonic() + 20.0
        while os.getpid() == here and multiprocessing.active_children() and not flag.exists():
            time.sleep(0.002)
            assert time.monotonic() < late, "no worker took a pass"
        return TASK.loss(outputs, targets)

    return replace(TASK, loss_fn=loss)


def who(folder: Path) -> set[int]:
    """The processes that took passes, but this one."""
    return {int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")} - {os.getpid()}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("bound", [CLIP, None])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_bytes_are_those_of_one_process_whatever_their_number(tmp_path: Path, bound, count):
    alone, workers = sums(None, bound=bound), PassWorkers(count=count)
    passes = passes_of(workers, task=watched(tmp_path))
    assert all(passes(bound=bound).numpy().tobytes() == alone.numpy().tobytes() for _ in range(3))
    assert bool(who(tmp_path)) == (count > 0)
    assert len(multiprocessing.active_children()) == count
    workers.close()


def test_there_are_no_more_workers_than_passes_for_them():
    workers = PassWorkers(count=20)
    sums(workers)
    assert 1 <= len(multiprocessing.active_children()) < len(SIZES)
    workers.close()


def test_a_longer_pass_and_another_model_get_workers_that_suit(share, monkeypatch):
    monkeypatch.setattr(cohort_passes, "_PASS_BYTES_OF_CONVOLUTIONS", 2**18)
    few, all_of_them = [chosen[:1] for chosen in COINS], [np.arange(20) for _ in COINS]
    for model in (make_model(), drops().eval(), make_model()):
        passes, alone = passes_of(share, model=model), passes_of(None, model=model)
        for coins in (all_of_them, few, COINS):
            assert torch.equal(passes(coins), alone(coins))
    assert len(multiprocessing.active_children()) == 1


def drops():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )


@pytest.mark.parametrize(("model", "threads"), [(lambda: make_model("mlp"), 1), (drops, 1), (make_model, 2)])
def test_passes_that_cost_little_that_draw_or_that_have_threads_stay_here(share, model, threads, monkeypatch):
    for name in ("_PASS_BYTES", "_PASS_BYTES_OF_CONVOLUTIONS"):
        monkeypatch.setattr(cohort_passes, name, 2**16)
    torch.set_num_threads(threads)
    sums(share, model=model())
    assert multiprocessing.active_children() == []


def test_a_fork_that_cannot_calculate_gradients_is_not_used(share, monkeypatch):
    here, whole = os.getpid(), torch.autograd.grad

    def refused(*args, **kwargs):
        if os.getpid() != here:
            raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")
        return whole(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", refused)
    passes = passes_of(share)
    assert all(torch.equal(passes(), sums(None)) for _ in range(2))
    assert multiprocessing.active_children() == []


def test_a_killed_worker_fails_the_call_and_the_next_has_another(tmp_path: Path):
    told: list[str] = []
    workers = PassWorkers(count=1, tell=told.append)
    passes = passes_of(workers, task=watched(tmp_path, die))
    with pytest.raises(WorkerDied, match="signal 9"):
        passes()
    assert told == ["a worker was killed (signal 9); the owners' steps are lost with it"]
    assert all(torch.equal(passes(), sums(None)) for _ in range(5))
    workers.close()
    assert len(who(tmp_path)) == 2
    assert all(gone(pid) for pid in who(tmp_path))


def test_a_worker_that_is_killed_between_calls_had_nothing_to_lose(share):
    passes, found = passes_of(share), []
    for _ in range(2):
        found.append(passes())
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError, RuntimeError, KeyError])
def test_an_error_in_a_worker_is_of_its_kind_and_quotes_no_record(tmp_path: Path, share, kind):
    def act():
        raise kind("the record was 0.25")

    task = watched(tmp_path, act)
    nearest = {ZeroDivisionError: ArithmeticError, KeyError: LookupError}.get(kind, kind)
    passes = passes_of(share, task=task)
    with pytest.raises(nearest, match=kind.__name__) as caught:
        passes()
    assert not any(character.isdigit() for character in str(caught.value))
    assert caught.value.__cause__ is None
    (worker,) = multiprocessing.active_children()
    assert torch.equal(passes(), sums(None))
    assert multiprocessing.active_children() == [worker]  # it stays


def test_an_error_here_waits_for_the_worker_and_is_raised_as_it_is(tmp_path: Path, share):
    here, task = os.getpid(), watched(tmp_path, lambda: time.sleep(0.2))
    failing = []

    def loss(outputs, targets):
        found = task.loss(outputs, targets)
        if failing and os.getpid() == here:
            raise ValueError("expected something else")
        return found

    passes = passes_of(share, task=replace(TASK, loss_fn=loss))
    failing.append(True)
    with pytest.raises(ValueError, match="something else"):
        passes()
    (worker,) = multiprocessing.active_children()
    failing.clear()
    assert torch.equal(passes(), sums(None))
    assert multiprocessing.active_children() == [worker]  # it had been waited for


def hungry():
    torch.empty(2**50)


def test_want_of_memory_in_a_worker_takes_fewer_of_the_same_batches(tmp_path: Path, share, caplog):
    with caplog.at_level(logging.WARNING, logger="tacit"):
        found = sums(share, task=watched(tmp_path, hungry))
    torch.testing.assert_close(found, sums(None), atol=1e-6, rtol=1e-4)
    lines = [record.getMessage() for record in caplog.records if record.name == "tacit"]
    assert lines == ["memory is short: fewer owners' records go through the model at once from here on"]


def test_without_memory_for_one_record_anywhere_it_is_one_clear_line(share):
    with pytest.raises(MemoryError, match=r"^expected memory to take one record .*; train a smaller model.*$"):
        sums(share, task=replace(TASK, loss_fn=lambda outputs, targets: torch.empty(2**50)))


def test_a_kill_is_not_tried_again_for_want_of_memory_beside_it(tmp_path: Path):
    here, task = os.getpid(), watched(tmp_path, lambda: (time.sleep(0.3), die()))

    def loss(outputs, targets):
        found = task.loss(outputs, targets)
        return found if os.getpid() != here else hungry()  # this process first

    workers = PassWorkers(count=1)
    with pytest.raises(WorkerDied):
        sums(workers, task=replace(TASK, loss_fn=loss))
    workers.close()


def test_steps_draw_the_same_with_want_of_memory_in_a_worker(tmp_path: Path, share):
    mechanism = Mechanism(
        unit="record",
        sample_rate=0.5,
        max_grad_norm=CLIP,
        noise_multiplier=1.0,
        steps_per_round=2,
        rounds=4,
        reference_size=20,
        delta=1e-5,
    )

    def walked(task, share):
        start = write_arrays(make_model())
        walks = [
            Walk(arrays=start, records=held, randomness=SeededGenerator(seed), mechanism=mechanism)
            for seed, held in enumerate(HELD)
        ]
        steps = CohortSteps(task, make_model(), LocalRule(learning_rate=0.1), batch_rate=0.5, share=share)
        return steps(walks), [walk.randomness.gaussian(3, 1.0).tolist() for walk in walks]

    (short, drawn), (enough, drawn_then) = walked(watched(tmp_path, hungry), share), walked(TASK, None)
    assert drawn == drawn_then
    torch.testing.assert_close(short, enough, atol=1e-6, rtol=1e-4)


ORPHANS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_pass_workers as t
t.torch.set_num_threads(1)
t.cohort_passes._PASS_BYTES_OF_CONVOLUTIONS = 2**22
here, folder = os.getpid(), Path({folder!r})
def loss(outputs, targets):
    if os.getpid() == here:
        while len(t.who(folder)) < 2:
            time.sleep(0.01)
        os.kill(here, 9)
    (folder / f"pid-{{os.getpid()}}").touch()
    time.sleep(0.3)
    return t.TASK.loss(outputs, targets)
t.sums(t.PassWorkers(count=2), task=t.replace(t.TASK, loss_fn=loss))
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path):
    code = ORPHANS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers, end = who(tmp_path), time.monotonic() + 20.0
    while not all(gone(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    outlived = [pid for pid in workers if not gone(pid)]
    for pid in outlived:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2
    assert outlived == []


# Whole runs.

SMALL = ["federated.rounds=3", "federated.owners=4", "federated.local_steps=2", "compression.variants=[]"]
SMALL += ["federated.partition=iid", "federated.strategy=fedavg", "model.family=cnn", "task.name=watched_task:task"]
PRIVATE, CLIENT = ["privacy.noise_multiplier=1.0"], ["privacy.unit=client", "privacy.noise_multiplier=0.5"]
PLAIN = ["privacy.unit=none"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    """Trains a recipe with so many workers; returns its model, rounds and notes."""

    def trained(name, engine, *settings, count=1, task=TASK, seed=None):
        monkeypatch.setattr(strategies, "PassWorkers", lambda tell: PassWorkers(count=count, tell=tell))
        monkeypatch.setitem(sys.modules, "watched_task", types.SimpleNamespace(task=task))
        recipe = load_recipe("digits", [*SMALL, f"federated.engine={engine}", *settings])
        rows, folder = [], tmp_path / (name if seed is None else f"{name}.guarantee-void")
        train_in_process(recipe, folder, run="r", report=rows.append, unsafe_seed=seed)
        assert multiprocessing.active_children() == []
        return read_weights(folder / "train" / "weights.safetensors"), rows

    return trained


@pytest.mark.parametrize(("settings", "seed"), [(PLAIN, None), (PRIVATE, 3), ([*CLIENT, "privacy.sample_rate=0.9"], 3)])
def test_a_run_ends_with_the_same_bytes_whatever_the_number_and_with_the_sequential_model(run, settings, seed):
    settings = [*settings, "federated.rounds=2"]
    one, rows = run("0", "vectorised", *settings, count=0, seed=seed)
    other, other_rows = run("2", "vectorised", *settings, count=2, seed=seed)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert rows == other_rows
    sequential, _ = run("sequential", "sequential", *settings, seed=seed)
    for name in one:
        np.testing.assert_allclose(one[name], sequential[name], atol=2e-5, err_msg=name)


def lost(rows):
    return [row["note"] for row in rows if "are lost" in row.get("note", "")]


def test_without_a_guarantee_a_killed_workers_owners_are_taken_one_by_one(run, tmp_path: Path):
    model, rows = run("killed", "vectorised", *PLAIN, task=watched(tmp_path, die))
    assert [row["clients"] for row in rows if "round" in row] == [4, 4, 4]
    assert len(lost(rows)) == 1
    sequential, _ = run("sequential", "sequential", *PLAIN)
    for name in model:
        np.testing.assert_allclose(model[name], sequential[name], atol=2e-5, err_msg=name)
    assert len(who(tmp_path)) == 2  # the next round had another


def test_under_a_guarantee_a_killed_worker_costs_the_whole_cohort_its_round(run, tmp_path: Path):
    task = watched(tmp_path, die)
    with pytest.raises(FederationFailed, match="unavailable"):
        run("r", "vectorised", *PRIVATE, task=task)
    assert multiprocessing.active_children() == []

    def accounts():
        return {(a.reserved, a.released, a.failed, a.reopened) for a in read_ledger(tmp_path / "r" / "ledger.jsonl")[0]}

    assert accounts() == {(1, 0, 1, 0)}
    _, rows = run("r", "vectorised", *PRIVATE, task=task)  # resumed: the round stays charged and is not taken again
    assert [row["clients"] for row in rows if "round" in row] == [0, 4, 4]
    assert accounts() == {(3, 2, 1, 0)}
    assert all(gone(pid) for pid in who(tmp_path))


def test_a_secret_cohort_that_is_lost_counts_as_nothing_and_the_run_goes_on(run, tmp_path: Path):
    settings = [*CLIENT, "privacy.sample_rate=1.0"]
    _, rows = run("r", "vectorised", *settings, task=watched(tmp_path, die))
    assert len([row for row in rows if "round" in row]) == 3
    assert len(lost(rows)) == 1
    assert len(who(tmp_path)) == 2
