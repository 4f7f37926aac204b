"""The only door to records: what comes through is planned, charged, bounded, noised, and the same after a crash."""

import inspect
import json
import math
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context
from torch import nn

from tacit.compression import material
from tacit.federated import federation as federation_module
from tacit.federated import mechanism as mechanism_module
from tacit.federated import noisy_sum as noisy_sum_module
from tacit.federated.averaging import FederatedAveraging
from tacit.federated.client_app import CohortGate, Owner
from tacit.federated.clipping import update_norm
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.datasets import find_task
from tacit.federated.federation import Federation
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.noisy_sum import sum_mechanism
from tacit.federated.outbox import Outbox
from tacit.federated.private_data import PrivateData, with_loss
from tacit.federated.rounds import FederationFailed
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

OWNERS, BOUND, NOISE = 4, 2.0, 5.0
TASK = find_task("digits")
EXAMPLE = torch.zeros(1, 1, 8, 8)
TRAINING = Mechanism(
    unit="record",
    sample_rate=0.5,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    steps_per_round=2,
    rounds=10,
    reference_size=20,
    delta=1e-5,
)


class Died(BaseException):
    """A process that dies: nothing of ours may catch it."""


def training_of(unit, *, twin=False):
    changes = {"sample_rate": 1.0} if unit == "local" else {}
    if twin or unit == "none":
        changes |= {"noise_multiplier": 0.0, "twin": unit != "none"}
    return replace(TRAINING, unit=unit, **changes)


def shares(count=OWNERS, each=30):
    pool = TASK.load().private
    return [pool.take(np.arange(index * each, index * each + each + index)) for index in range(count)]


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class World:
    """Owners with records, a ledger, and the door to them; `again()` is what a new process finds."""

    def __init__(self, folder, unit="record", *, twin=False, records=None, epsilon=math.inf, quorum=1):
        self.folder, self.mechanism, self.epsilon, self.quorum = folder, training_of(unit, twin=twin), epsilon, quorum
        self.records, self.read, self.ledger = records or shares(), [], None
        self.again()

    def again(self):
        if self.ledger is not None:
            self.ledger.close()
        self.gate = None
        if self.mechanism.private:
            path = self.folder / "ledger.jsonl"
            self.ledger = Ledger(path, Outbox(self.folder / "outbox"), epsilon=self.epsilon, delta=1e-5)
            if self.mechanism.unit != "client":
                self.gate = CohortGate(self.ledger, self.find)
        secret = SecretGenerator()

        def randomness(number):
            return secret if self.mechanism.private else SeededGenerator(10**7 + number)

        self.owners = [
            Owner(
                name=f"owner-{index}",
                index=index,
                source="digits",
                mechanism=self.mechanism,
                trainer=LocalTrainer(TASK, make_model(), self.mechanism, learning_rate=0.1),
                records=lambda index=index: self.open(index),
                randomness=randomness,
                gate=None,
                log=self.folder / "errors.log",
            )
            for index in range(len(self.records))
        ]
        self.federation = Federation(
            owners=self.owners,
            gate=self.gate,
            ledger=self.ledger,
            randomness=randomness,
            trainer=self.trainer,
            strategy=self.strategy,
            quorum=self.quorum,
            run="run",
            folder=self.folder / "private",
        )
        return self

    def find(self, context: Context):
        return self.owners[int(context.node_config["partition-id"])]

    def open(self, index):
        self.read.append(index)
        found = self.records[index]
        return found() if callable(found) else found

    def trainer(self, model, loss):
        return LocalTrainer(with_loss(TASK, loss), model, self.mechanism, learning_rate=0.1)

    def strategy(self, rounds):
        if self.mechanism.unit != "client":
            return FederatedAveraging(rounds=rounds)
        return PoissonCohorts(
            mechanism=self.mechanism,
            rounds=rounds,
            optimizer=ServerOptimizer(),
            randomness=self.federation.randomness,
            source="digits",
            quorum=1,
            ledger=self.ledger,
        )

    def door(self, *, sums=3, rounds=0, name="door"):
        planned = {}
        if self.mechanism.private:
            planned[self.mechanism.event] = rounds * self.mechanism.events_per_round
            planned[sum_mechanism(self.mechanism, norm_bound=1.0, noise_multiplier=NOISE, sums=1).event] = sums
        return PrivateData(self.federation, name=name, planned=planned, noise_multiplier=NOISE, example_inputs=EXAMPLE)

    def kinds(self):
        path = self.folder / "ledger.jsonl"
        return [json.loads(line)["kind"] for line in path.read_text().splitlines()] if path.is_file() else []


def pixels(inputs):
    """The first row of an image and a constant: from 0 to more than the bound in norm."""
    return torch.cat([inputs[0, 0, 0], torch.ones(1)])


def clipped(row, bound=BOUND):
    return row * min(1.0, bound * (1 - 1e-6) / max(1e-30, float(np.linalg.norm(row))))


def rows_of(records):
    return [np.append(image[0, 0], 1.0).astype(np.float64) for image in records.inputs]


def sum_by_hand(owners, unit):
    """Record by record in NumPy; clients and local owners give their mean."""
    if unit == "none":
        return sum(sum(rows_of(records)) for records in owners)
    sums = [sum(map(clipped, rows_of(records))) for records in owners]
    return sum(sums) if unit == "record" else sum(total / len(o) for total, o in zip(sums, owners, strict=True))


ALL_UNITS = ["record", "local", "client", "none"]
PRIVATE = ["record", "local", "client"]


@pytest.mark.parametrize("unit", ["record", "local", "none"])
def test_without_noise_a_sum_is_that_of_a_loop_over_all_records(tmp_path, unit):
    world = World(tmp_path, unit, twin=unit != "none")
    found = world.door().noisy_sum(pixels, BOUND, (9,))
    np.testing.assert_allclose(found.numpy(), sum_by_hand(world.records, unit), rtol=1e-5)


def test_at_client_level_a_sum_is_a_cohorts_over_q(tmp_path):
    world = World(tmp_path, "client", twin=True)
    found = world.door().noisy_sum(pixels, BOUND, (9,))
    coins = SeededGenerator(10**7 + 1_000_002).bernoulli(OWNERS, world.mechanism.sample_rate)
    cohort = [records for records, coin in zip(world.records, coins, strict=True) if coin]
    assert 0 < len(cohort) < OWNERS
    np.testing.assert_allclose(found.numpy() * 0.5, sum_by_hand(cohort, "client"), rtol=1e-5)


def spread_of(unit):
    """Standard deviation of one coordinate of a sum, from the specification and not from the code."""
    return {"record": NOISE * BOUND * math.sqrt(OWNERS), "local": 2 * NOISE * BOUND * math.sqrt(OWNERS)}.get(
        unit, NOISE * BOUND / 0.5
    )


@pytest.mark.parametrize("unit", PRIVATE)
def test_the_noise_of_a_sum_has_the_scale_that_is_charged(tmp_path, unit):
    """z-test of sums of zeros; the negative controls are 2/3 and 3/2 of the noise."""
    world = World(tmp_path, unit)
    found = world.door().noisy_sum(lambda inputs: torch.zeros(20_000), BOUND, (20_000,)).numpy().astype(np.float64)

    def alarm(claimed):
        z = (float((found**2).mean()) / claimed**2 - 1.0) / math.sqrt(2.0 / found.size)
        return abs(z) > 6.5

    sd = spread_of(unit)
    assert not alarm(sd)
    assert alarm(sd * 2 / 3)
    assert alarm(sd * 3 / 2)


def neighbours(seed):
    """An owner's records, and the same with one more: ordinary, huge, not finite or zero."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(6, 1, 8, 8)).astype(np.float32)
    inputs[5] *= [1.0, 1e6, math.nan, 0.0, 1e38][seed % 5]
    more = Records(inputs, np.zeros(6, np.int64))
    return more.take(np.arange(5)), more


@pytest.mark.parametrize("seed", range(10))
def test_a_record_moves_a_sum_by_at_most_the_bound(tmp_path, seed):
    sums = []
    for number, records in enumerate(neighbours(seed)):
        world = World(tmp_path / str(number), twin=True, records=[records])
        sums.append(world.door().noisy_sum(pixels, BOUND, (9,)).numpy())
    assert np.isfinite(sums).all()
    assert np.linalg.norm(sums[1] - sums[0]) <= BOUND * (1 + 1e-6)  # float32 rounding of two sums


@pytest.mark.parametrize("unit", ["local", "client"])
@pytest.mark.parametrize("seed", range(5))
def test_a_clients_part_of_a_sum_is_at_most_the_bound(tmp_path, unit, seed):
    """Whatever and however much it holds."""
    empty = Records(np.zeros((0, 1, 8, 8), np.float32), np.zeros(0, np.int64))
    for number, records in enumerate([*neighbours(seed), empty]):
        world = World(tmp_path / str(number), unit, twin=True, records=[records])
        world.mechanism = replace(world.mechanism, sample_rate=1.0)
        world.again()
        assert update_norm({"sum": world.door().noisy_sum(pixels, BOUND, (9,)).numpy()}) <= BOUND


def test_a_sum_that_is_not_clipped_is_caught(tmp_path, monkeypatch):
    """The mutation of the two tests above."""
    for module in (mechanism_module, noisy_sum_module):
        monkeypatch.setattr(module, "clipped_sum", lambda rows, bound: [torch.nan_to_num(rows[0]).sum(0)])
    monkeypatch.setattr(mechanism_module, "clip_update", lambda update, bound: update)
    with pytest.raises(AssertionError):
        test_a_record_moves_a_sum_by_at_most_the_bound(tmp_path, 1)
    with pytest.raises(AssertionError):
        test_a_clients_part_of_a_sum_is_at_most_the_bound(tmp_path / "more", "client", 1)


def charged_when_read(world):
    """What the ledger's file held at each reading of records."""
    seen = []

    def reading(records):
        def read():
            seen.append(world.kinds())
            return records

        return read

    world.records = [reading(records) for records in shares()]
    return seen


@pytest.mark.parametrize("unit", PRIVATE)
def test_the_charge_is_on_disk_before_a_record_is_read_and_the_release_before_a_sum_is_returned(tmp_path, unit):
    world = World(tmp_path, unit)
    seen = charged_when_read(world)
    world.door().noisy_sum(pixels, BOUND, (9,))
    charges = 1 if unit == "client" else OWNERS
    assert all(kinds == ["reserve"] * charges for kinds in seen)
    assert unit == "client" or len(seen) == OWNERS
    assert world.kinds() == ["reserve"] * charges + ["release"] * charges


def test_a_charge_after_the_reading_is_caught(tmp_path, monkeypatch):
    """The mutation of the test above: compute first, ask later."""
    original = federation_module.under_charge

    def late(gate, request, compute):
        result = compute()
        return original(gate, request, lambda: result)

    monkeypatch.setattr(federation_module, "under_charge", late)
    monkeypatch.setattr(CohortGate, "begin_requests", lambda self, requests: setattr(self, "_late", requests))
    with pytest.raises((AssertionError, FederationFailed)):
        test_the_charge_is_on_disk_before_a_record_is_read_and_the_release_before_a_sum_is_returned(tmp_path, "record")


@pytest.mark.parametrize("unit", PRIVATE)
def test_what_was_not_planned_is_refused_before_anything_is_charged_or_read(tmp_path, unit):
    world = World(tmp_path, unit)
    with pytest.raises(PrivacyRefused, match="plan"):
        world.door(sums=0).noisy_sum(pixels, BOUND, (9,))
    with pytest.raises(PrivacyRefused, match="plan"):
        world.door(rounds=1).train(make_model(), 2, TASK.loss)
    assert (world.read, world.kinds()) == ([], [])


@pytest.mark.parametrize("unit", PRIVATE)
def test_each_sum_takes_one_of_those_that_were_planned(tmp_path, unit):
    world = World(tmp_path, unit)
    door = world.door(sums=2)
    first, second = (door.noisy_sum(pixels, BOUND, (9,)) for _ in range(2))
    assert not torch.equal(first, second)  # another access, other noise
    with pytest.raises(PrivacyRefused, match="at most 0"):
        door.noisy_sum(pixels, BOUND, (9,))


@pytest.mark.parametrize("unit", PRIVATE)
def test_a_spent_budget_computes_nothing(tmp_path, unit):
    """The ledger is asked too: a plan that was forgotten in the budget does not get through."""
    world = World(tmp_path, unit, epsilon=0.01)
    with pytest.raises(PrivacyRefused, match="budget"):
        world.door().noisy_sum(pixels, BOUND, (9,))
    assert (world.read, world.kinds()) == ([], [])


@pytest.mark.parametrize("unit", PRIVATE)
def test_the_same_calls_after_a_crash_give_the_same_bytes_and_cost_nothing(tmp_path, unit):
    world = World(tmp_path, unit)
    door = world.door()
    before = [door.noisy_sum(pixels, BOUND, (9,)) for _ in range(2)]
    kinds = world.kinds()
    world.read.clear()
    door = world.again().door()
    after = [door.noisy_sum(pixels, BOUND, (9,)) for _ in range(2)]
    assert all(map(torch.equal, before, after))
    assert (world.read, world.kinds()) == ([], kinds)
    other = world.again().door(name="another").noisy_sum(pixels, BOUND, (9,))
    assert not torch.equal(other, before[0])


@pytest.mark.parametrize("unit", PRIVATE)
def test_a_death_within_a_sum_reopens_its_charge(tmp_path, unit):
    def die():
        raise Died

    world = World(tmp_path, unit, records=[*shares(3), die])
    world.mechanism = replace(world.mechanism, sample_rate=1.0 if unit != "record" else 0.5)
    with pytest.raises(Died):
        world.again().door().noisy_sum(pixels, BOUND, (9,))
    world.records = shares()
    world.again().door().noisy_sum(pixels, BOUND, (9,))
    charges = 1 if unit == "client" else OWNERS
    assert sorted(world.kinds()) == sorted(["reserve", "reopen", "release"] * charges)


def test_settling_rounds_of_training_keeps_what_sums_released(tmp_path):
    world = World(tmp_path)
    before = world.door().noisy_sum(pixels, BOUND, (9,))
    world.ledger.discard_before(1_000_000)
    assert torch.equal(world.again().door().noisy_sum(pixels, BOUND, (9,)), before)


def leak():
    raise ValueError("SECRET-pixel-42")


@pytest.mark.parametrize("unit", PRIVATE)
def test_an_owner_that_fails_is_missing_in_the_sum_and_its_text_stays_with_it(tmp_path, unit):
    world = World(tmp_path, unit, records=[leak, *shares(3)])
    world.mechanism = replace(world.mechanism, sample_rate=1.0 if unit != "record" else 0.5)
    world.again().door().noisy_sum(pixels, BOUND, (9,))
    assert "SECRET" in (tmp_path / "errors.log").read_text()
    assert (tmp_path / "errors.log").stat().st_mode & 0o777 == 0o600


def test_fewer_owners_than_the_quorum_end_a_sum_without_a_word_of_theirs(tmp_path):
    world = World(tmp_path, records=[leak, leak, *shares(2)], quorum=3)
    with pytest.raises(FederationFailed, match=r"3 owners for a sum, got 2 \(2 unavailable\)") as caught:
        world.door().noisy_sum(pixels, BOUND, (9,))
    assert "SECRET" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("unit", ALL_UNITS)
def test_a_statistic_that_remembers_is_refused_before_anything_is_charged(tmp_path, unit):
    world = World(tmp_path, unit)
    torch.manual_seed(1)
    seen = []

    def remembering(inputs):
        seen.append(inputs)
        return torch.full((1,), float(len(seen)))

    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    for statistic in (remembering, lambda inputs: torch.rand(1), lambda inputs: dropping(inputs).sum().reshape(1)):
        with pytest.raises(PrivacyRefused, match="remembers"):
            world.door().noisy_sum(statistic, BOUND, (1,))
    assert (world.read, world.kinds()) == ([], [])


@pytest.mark.parametrize(
    ("bound", "shape", "says"),
    [(0.0, (9,), "norm_bound"), (math.inf, (9,), "norm_bound"), (math.nan, (9,), "norm_bound"), (1.0, (8,), "shape")],
)
def test_a_bound_or_shape_that_cannot_be_is_refused_at_the_door(tmp_path, bound, shape, says):
    world = World(tmp_path)
    with pytest.raises(ValueError, match=says):
        world.door().noisy_sum(pixels, bound, shape)
    with pytest.raises(ValueError, match="name"):
        world.door(name="../elsewhere")
    assert (world.read, world.kinds()) == ([], [])


def test_owners_without_a_ledger_are_refused_where_a_guarantee_is_claimed(tmp_path):
    for unit in PRIVATE:
        world = World(tmp_path / unit, unit)
        world.federation = replace(world.federation, gate=None, ledger=None)
        with pytest.raises(PrivacyRefused, match="ledger"):
            world.door().noisy_sum(pixels, BOUND, (9,))
        assert world.read == []


def test_it_is_what_compression_asks_for():
    """By shape: neither room imports the other."""
    for name in ("noisy_sum", "train"):
        wanted, found = (inspect.signature(getattr(owner, name)) for owner in (material.PrivateData, PrivateData))
        assert list(wanted.parameters) == list(found.parameters)
    hints = typing.get_type_hints(PrivateData.noisy_sum)
    assert hints["return"] is torch.Tensor


# Further training: the run's own loop with another model.


@pytest.mark.parametrize("unit", ALL_UNITS)
def test_further_training_moves_a_copy_and_charges_the_trainings_own_events(tmp_path, unit):
    world = World(tmp_path, unit)
    model = make_model()
    before = write_arrays(model)
    trained = world.door(sums=0, rounds=2).train(model, 2, TASK.loss)
    after, kept = write_arrays(trained), write_arrays(model)
    assert all((before[name] == kept[name]).all() for name in before)
    assert any((before[name] != after[name]).any() for name in before)
    if unit != "none":
        accounts = list(world.ledger.accounts.values())
        assert len(accounts) == (1 if unit == "client" else OWNERS)
        events = world.mechanism.events_per_round * 2
        assert all(account.history == {world.mechanism.event: events} for account in accounts)


def test_further_training_without_noise_is_the_loop_by_hand(tmp_path):
    """Every record in every step (rate 1): two rounds of averaged full-batch steps, in a few lines."""
    world = World(tmp_path, "none")
    world.mechanism = replace(world.mechanism, sample_rate=1.0, max_grad_norm=math.inf)
    trained = world.again().door().train(make_model(), 2, TASK.loss)
    arrays = [parameter.detach().clone() for parameter in make_model().parameters()]
    for _ in range(2):
        ends = []
        for records in world.records:
            weights = [array.clone().requires_grad_() for array in arrays]
            for _ in range(world.mechanism.steps_per_round):
                logits = torch.from_numpy(records.inputs).flatten(1) @ weights[0].T + weights[1]
                loss = TASK.loss(logits, torch.from_numpy(records.labels)) / len(records)
                steps = torch.autograd.grad(loss, weights)
                weights = [(w - 0.1 * step).detach().requires_grad_() for w, step in zip(weights, steps, strict=True)]
            ends.append([w.detach() for w in weights])
        arrays = [torch.stack(column).mean(0) for column in zip(*ends, strict=True)]
    for ours, expected in zip(trained.parameters(), arrays, strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_that_is_given_is_the_one_that_is_trained(tmp_path):
    world = World(tmp_path, "none")
    still = world.door().train(make_model(), 1, lambda logits, labels: 0.0 * logits.sum())
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), make_model().parameters(), strict=True))


@pytest.mark.parametrize("unit", PRIVATE)
def test_further_training_that_was_finished_is_given_again_for_free(tmp_path, unit):
    world = World(tmp_path, unit)
    first = write_arrays(world.door(rounds=2).train(make_model(), 2, TASK.loss))
    kinds = world.kinds()
    world.read.clear()
    second = write_arrays(world.again().door(rounds=2).train(make_model(), 2, TASK.loss))
    assert all((first[name] == second[name]).all() for name in first)
    assert (world.read, world.kinds()) == ([], kinds)


@pytest.mark.parametrize("unit", PRIVATE)
@pytest.mark.parametrize("deaths", [1, 3])
def test_further_training_that_was_interrupted_ends_at_what_was_planned(tmp_path, unit, deaths):
    world = World(tmp_path, unit)
    left = [OWNERS + 1] + [1] * (deaths - 1)  # reads until it dies: in the second round, and again

    def dying(records):
        def read():
            left[0] -= 1
            if left[0] == 0:
                raise Died
            return records

        return read

    if unit == "client":
        world.mechanism = replace(world.mechanism, sample_rate=1.0)
    world.records = [dying(records) for records in shares()]
    for _ in range(deaths):
        with pytest.raises(Died):
            world.again().door(rounds=3).train(make_model(), 3, TASK.loss)
        left.pop(0)
        left.append(10**6)
    world.again().door(rounds=3).train(make_model(), 3, TASK.loss)
    charges = 1 if unit == "client" else OWNERS
    accounts = list(world.ledger.accounts.values())
    assert [account.reserved for account in accounts] == [3] * charges
    # Interrupted three times, the second round cannot be answered any more: charged, and left out.
    assert [account.released for account in accounts] == [3 if deaths < 3 else 2] * charges


def test_another_model_in_the_place_of_a_finished_training_is_refused(tmp_path):
    world = World(tmp_path)
    world.door(rounds=1).train(make_model(), 1, TASK.loss)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="another's"):
        world.again().door(rounds=1).train(other, 1, TASK.loss)


def test_a_model_in_which_records_mix_is_refused_before_anything_is_charged(tmp_path):
    world = World(tmp_path)
    mixing = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(PrivacyRefused, match="mix"):
        world.door(rounds=1).train(mixing, 1, TASK.loss)
    with pytest.raises(ValueError, match="rounds"):
        world.door(rounds=1).train(make_model(), 0, TASK.loss)
    assert (world.read, world.kinds()) == ([], [])


def test_sums_and_training_through_one_door_share_one_account(tmp_path):
    world = World(tmp_path)
    door = world.door(sums=1, rounds=1)
    door.noisy_sum(pixels, BOUND, (9,))
    door.train(make_model(), 1, TASK.loss)
    counting = sum_mechanism(world.mechanism, norm_bound=BOUND, noise_multiplier=NOISE, sums=1)
    expected = {counting.event: 1, world.mechanism.event: 2}
    assert all(account.history == expected for account in world.ledger.accounts.values())


def test_further_training_of_the_same_model_is_another_charge_of_the_same_run(tmp_path):
    """Twice from the same beginning: the rounds and arrays are the same, what they are for is not."""
    world = World(tmp_path)
    door = world.door(sums=0, rounds=2)
    first, second = (door.train(make_model(), 1, TASK.loss) for _ in range(2))
    assert not torch.equal(first[1].weight, second[1].weight)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines if line["kind"] == "reserve"} == {"run"}
    assert [account.reserved for account in world.ledger.accounts.values()] == [2] * OWNERS
