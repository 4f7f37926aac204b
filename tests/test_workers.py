"""Owners' steps in several processes: the same bytes as in one, and a killed worker costs its own errand at most."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.federated.accounts import read_ledger
from tacit.federated.checkpoint import read_weights
from tacit.federated.datasets import find_task
from tacit.federated.mechanism import Mechanism
from tacit.federated.model_arrays import channels_last, read_arrays, write_arrays
from tacit.federated.models import FAMILIES, build_family
from tacit.federated.noise import SeededGenerator
from tacit.federated.owner import Owner
from tacit.federated.task import Records
from tacit.federated.together import matrix_of
from tacit.federated.train import LocalTrainer
from tacit.federated.workers import Errand, WorkerDied, Workers

# JAX, which another test of the session may have loaded, warns at a fork.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

SMALL = ["federated.rounds=2", "federated.owners=4", "federated.local_steps=2", "compression.variants=[]"]
SMALL += ["federated.partition=iid", "federated.strategy=fedavg"]
MLP = ["model.family=mlp", "model.hidden=[8]"]
PLAIN = Mechanism(
    unit="none",
    sample_rate=0.5,
    max_grad_norm=math.inf,
    noise_multiplier=0.0,
    steps_per_round=3,
    rounds=4,
    reference_size=20,
    delta=1e-5,
)


def trained(folder: Path, engine: str, *settings: str, seed: int | None = None):
    recipe = load_recipe("digits", [*SMALL, f"federated.engine={engine}", *settings])
    rows: list[dict[str, object]] = []
    train_in_process(recipe, folder / f"{engine}.guarantee-void", run="r", report=rows.append, unsafe_seed=seed)
    return read_weights(folder / f"{engine}.guarantee-void" / "train" / "weights.safetensors"), rows


@pytest.fixture
def two_cores(monkeypatch):
    """Whatever the machine has."""
    from tacit.edge import strategies
    from tacit.federated import workers

    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(strategies, "cores", lambda: 2)


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        ([*MLP, "privacy.unit=none"], None),
        ([*MLP, "privacy.unit=none", "federated.strategy=scaffold"], None),
        ([*MLP, "privacy.unit=none", "federated.strategy=fedbuff"], None),
        ([*MLP, "privacy.noise_multiplier=1.0"], 3),
        (["model.family=cnn", "privacy.unit=none"], None),
        (["model.family=resnet-8", "privacy.unit=none", "federated.rounds=1"], None),
    ],
)
def test_workers_end_with_the_same_bytes_as_one_process(tmp_path: Path, two_cores, settings, seed):
    one, rows = trained(tmp_path, "sequential", *settings, seed=seed)
    other, other_rows = trained(tmp_path, "workers", *settings, seed=seed)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert rows == other_rows


def test_on_one_core_the_engine_is_the_process_itself(tmp_path: Path, monkeypatch):
    from tacit.edge import strategies

    monkeypatch.setattr(strategies, "cores", lambda: 1)
    monkeypatch.setattr(strategies, "Workers", None)
    alone, _ = trained(tmp_path, "workers", *MLP, "privacy.unit=none")
    one, _ = trained(tmp_path, "sequential", *MLP, "privacy.unit=none")
    assert all(one[name].tobytes() == alone[name].tobytes() for name in one)


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        (["privacy.unit=none", "federated.local_steps=5"], "workers"),
        (["privacy.unit=none", "federated.local_steps=4"], "sequential"),
        (["privacy.unit=none", "federated.local_steps=5", "federated.codec=top-k"], "sequential"),
        (["privacy.unit=none", "federated.local_steps=5", "model.family=mlp"], "vectorised"),
        (["federated.local_steps=5"], "sequential"),
    ],
)
def test_long_rounds_of_convolutions_without_a_guarantee_go_to_workers_by_the_recipe_alone(settings, engine):
    assert load_recipe("digits", ["federated.owners=10", *settings]).federated.engine == engine


class Steady:
    """An owner of which workers need no more than this."""

    def __init__(self, index, behave=lambda: None):
        self.index, self.behave, self.trainer = index, behave, self

    def records(self):
        return Records(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))

    def randomness(self, server_round):
        return SeededGenerator(server_round)

    def update(self, arrays, held, randomness, *, correction):
        self.behave()
        return {name: array + self.index for name, array in arrays.items()}


def die():
    os.kill(os.getpid(), 9)


def died_once(path: Path):
    if not path.exists():
        path.touch()
        die()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_answers_come_in_the_order_asked_whatever_the_number_of_workers(count):
    workers = Workers([Steady(n) for n in range(7)], count=count)
    arrays = {"w": np.zeros((1000, 200), np.float32), "b": np.ones((), np.float32)}
    for _ in range(2):
        answers = workers(arrays, [Errand(n, 1) for n in (3, 0, 6, 2, 5)])
        found = [(float(a.arrays["w"][999, 199]), float(a.arrays["b"]), a.arrays["w"].shape) for a in answers]
        assert found == [(float(n), n + 1.0, (1000, 200)) for n in (3, 0, 6, 2, 5)]
    workers.close()


def test_a_cohorts_rows_are_one_matrix_without_a_copy_and_in_the_order_asked():
    workers = Workers([Steady(n) for n in range(4)], count=2)
    answers = workers({"w": np.zeros(3, np.float32)}, [Errand(n, 1) for n in (3, 1, 0)])
    rows = [answer.row for answer in answers]
    assert matrix_of(rows) is rows[0].base
    assert matrix_of(rows)[:, 0].tolist() == [3.0, 1.0, 0.0]
    swapped = [rows[1], rows[0], rows[2]]
    assert matrix_of(swapped)[:, 0].tolist() == [1.0, 3.0, 0.0]
    assert matrix_of(rows[1:])[:, 0].tolist() == [1.0, 0.0]
    assert matrix_of([rows[0]] * 3)[:, 0].tolist() == [3.0] * 3
    workers.close()


def test_each_kind_of_float_comes_back_as_it_went():
    workers = Workers([Steady(1)], count=1)
    (answer,) = workers({"w": np.float64([1.0 / 3.0])}, [Errand(1, 1)])
    assert answer.arrays["w"].tolist() == [1.0 / 3.0 + 1.0]
    workers.close()


def test_a_model_of_other_shapes_is_refused():
    workers = Workers([Steady(1)], count=1)
    workers({"w": np.zeros(3, np.float32)}, [Errand(1, 1)])
    with pytest.raises(ValueError, match="one shape"):
        workers({"w": np.zeros((1, 3), np.float32)}, [Errand(1, 1)])
    workers.close()


def test_a_worker_that_is_killed_loses_the_errand_it_was_at_and_is_replaced():
    told: list[str] = []
    owners = [Steady(n, die if n == 1 else lambda: None) for n in range(6)]
    workers = Workers(owners, count=2, tell=told.append)
    arrays = {"w": np.zeros(2, np.float32)}
    answers = workers(arrays, [Errand(n, 7) for n in range(6)])
    assert [isinstance(answer, WorkerDied) for answer in answers] == [n == 1 for n in range(6)]
    assert told == ["round 7: a worker was killed (signal 9); the steps of one owner are lost, and are not taken again"]
    again = workers(arrays, [Errand(n, 8) for n in (0, 2, 3)])
    assert [float(answer.arrays["w"][0]) for answer in again] == [0.0, 2.0, 3.0]
    workers.close()


def test_what_claims_nothing_is_taken_again_and_no_more_often_than_it_may(tmp_path: Path):
    told: list[str] = []
    owners = [Steady(0, lambda: died_once(tmp_path / "0")), Steady(1, die), Steady(2)]
    workers = Workers(owners, count=2, tell=told.append)
    answers = workers({"w": np.zeros(1, np.float32)}, [Errand(n, 1, again=2) for n in range(3)])
    assert float(answers[0].arrays["w"][0]) == 0.0
    assert isinstance(answers[1], WorkerDied)
    assert float(answers[2].arrays["w"][0]) == 2.0
    assert len([line for line in told if line.endswith("are taken again")]) == 3
    assert len(told) == 4
    workers.close()


def test_an_exception_in_a_worker_is_that_owners_alone():
    workers = Workers([Steady(n, (lambda: 1 / 0) if n == 1 else lambda: None) for n in range(3)], count=2)
    answers = workers({"w": np.zeros(2, np.float32)}, [Errand(n, 1) for n in range(3)])
    assert ["ZeroDivisionError" in str(answer) for answer in answers] == [False, True, False]
    workers.close()


def killing(monkeypatch, name: str, kill):
    """From now on reading the records of one owner kills the worker that reads them."""
    whole, parent = Owner.__init__, os.getpid()

    def breaking(self, **fields):
        read = fields["records"]
        if fields["name"] == name:
            fields["records"] = lambda: (os.getpid() != parent and kill(), read())[1]
        whole(self, **fields)

    monkeypatch.setattr(Owner, "__init__", breaking)


def test_a_run_whose_worker_is_killed_goes_on_with_a_line_in_its_log_and_the_same_bytes(
    tmp_path: Path, monkeypatch, two_cores
):
    undisturbed, _ = trained(tmp_path / "a", "workers", *MLP, "privacy.unit=none")
    killing(monkeypatch, "owner-02", lambda: died_once(tmp_path / "died"))
    model, rows = trained(tmp_path / "b", "workers", *MLP, "privacy.unit=none")
    notes = [row["note"] for row in rows if "note" in row]
    assert notes == ["round 1: a worker was killed (signal 9); the steps of one owner are taken again"]
    assert [row["clients"] for row in rows if "round" in row] == [4, 4]
    assert all(model[name].tobytes() == undisturbed[name].tobytes() for name in model)


def test_under_a_guarantee_a_killed_workers_owner_is_charged_and_set_aside(tmp_path: Path, monkeypatch, two_cores):
    killing(monkeypatch, "owner-02", die)
    _, rows = trained(tmp_path, "workers", *MLP, "privacy.noise_multiplier=1.0", seed=3)
    rounds = [row for row in rows if "round" in row]
    assert [(row["clients"], row["refusals"]) for row in rounds] == [(3, {"unavailable": 1})] * 2
    notes = [str(row["note"]) for row in rows if "note" in row]
    assert len(notes) == 2
    assert all("one owner are lost, and are not taken again" in note for note in notes)
    accounts, _, _ = read_ledger(tmp_path / "workers.guarantee-void" / "ledger.jsonl")
    assert {a.owner: (a.reserved, a.released, a.failed, a.reopened) for a in accounts} == {
        **{f"owner-0{n}": (2, 2, 0, 0) for n in (0, 1, 3)},
        "owner-02": (2, 0, 2, 0),
    }


@pytest.mark.parametrize(
    "settings",
    [
        ["privacy.unit=client", "privacy.noise_multiplier=1.0"],
        ["privacy.unit=none", "federated.codec=top-k"],
    ],
)
def test_what_workers_cannot_do_is_refused(tmp_path: Path, settings):
    with pytest.raises(RecipeRefused, match="engine='sequential'"):
        trained(tmp_path, "workers", *MLP, *settings)


# The layout of convolutions, which is the trainer's whoever asks it.


def images(count):
    generator = np.random.default_rng(0)
    return Records(generator.random((count, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, count))


class Views(torch.nn.Module):
    """Flattens with `view`, which channels-last memory has none for."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, 10)

    def forward(self, inputs):
        return self.linear(self.convolution(inputs).view(len(inputs), -1))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("cnn", "ds-cnn", "resnet-8", "mobilenet")])
def test_channels_last_calculates_the_same_and_writes_the_same_arrays(family):
    torch.manual_seed(0)
    model = build_family({"family": family}, shape=(1, 16, 16), outputs=10)
    before, inputs = write_arrays(model), torch.rand(3, 1, 16, 16)
    wanted = model.train()(inputs)
    assert channels_last(model, (1, 16, 16))
    assert model.training
    torch.testing.assert_close(model(inputs), wanted, atol=1e-5, rtol=1e-4)
    after = write_arrays(model)
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    assert all(array.flags.c_contiguous for array in after.values())
    read_arrays(model, before)
    assert any(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_a_model_that_views_its_convolutions_stays_as_it_is_and_trains():
    torch.manual_seed(0)
    model = Views()
    assert not channels_last(model, (1, 8, 8))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    trainer = LocalTrainer(find_task("digits"), model, PLAIN, learning_rate=0.1)
    after = trainer.update(write_arrays(model), images(20), SeededGenerator(0))
    assert all(np.isfinite(array).all() for array in after.values())


def test_batch_statistics_and_the_global_generator_are_not_touched_by_the_trial():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert channels_last(model, (1, 8, 8))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_step_with_channels_last_is_the_plain_step_up_to_rounding():
    def model():
        torch.manual_seed(0)
        return build_family({"family": "cnn"}, shape=(1, 8, 8), outputs=10)

    ours, plain, held = model(), model(), images(20)
    one = replace(PLAIN, steps_per_round=1, sample_rate=1.0)
    after = LocalTrainer(find_task("digits"), ours, one, learning_rate=0.5).update(
        write_arrays(ours), held, SeededGenerator(0)
    )
    inputs, labels = torch.from_numpy(held.inputs), torch.from_numpy(held.labels)
    loss = torch.nn.functional.cross_entropy(plain(inputs), labels)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    for (name, parameter), gradient in zip(plain.named_parameters(), gradients, strict=True):
        np.testing.assert_allclose(after[name], (parameter - 0.5 * gradient).detach().numpy(), atol=1e-6)
