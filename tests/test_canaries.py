"""Canaries through the real round loop: no false alarm on a correct one, and an alarm on one that is badly wrong."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tacit.federated import canary_run
from tacit.federated.averaging import FederatedAveraging
from tacit.federated.canaries import audit_canaries, guess
from tacit.federated.canary_model import CanaryModel, along, canary_records, canary_task, head_directions
from tacit.federated.canary_run import CanaryRun, affordable_rounds
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.owner import Owner
from tacit.federated.secure_noise import SecureGenerator
from tacit.federated.server_app import ServerPlan
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

pytestmark = pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning")

UNITS = ["record", "client", "local"]
ROUNDS = 2


@pytest.fixture(autouse=True)
def known_draws(monkeypatch):
    """The auditor's coins and directions, so that a test says the same each time."""
    seeds = itertools.count(3)

    def keyed(self):
        if "seeded" not in vars(self):
            self.seeded = SeededGenerator(next(seeds))
        return self.seeded

    monkeypatch.setattr(canary_run.SecretGenerator, "_keyed", keyed)
    monkeypatch.setattr(canary_run.secrets, "randbits", lambda bits: 4)


class Quiet(SecretGenerator):
    """Coins as they should be, and hardly any noise."""

    def gaussian(self, count, standard_deviation):
        return super().gaussian(count, standard_deviation * 1e-3)


def make(unit, **changed):
    settings = {
        "unit": unit,
        "sample_rate": 1.0 if unit == "local" else 0.5,
        "max_grad_norm": 2.5,
        "noise_multiplier": 3.0,
        "steps_per_round": 1,
        "rounds": ROUNDS,
        "reference_size": 20,
        "delta": 1e-5,
    }
    return Mechanism(**{**settings, **changed})


def records(seed):
    generator = np.random.default_rng(seed)
    return Records(generator.standard_normal((10, 2, 2)).astype(np.float32), generator.integers(3, size=10))


@pytest.fixture
def run(tmp_path):
    """Makes what canaries are put into: two owners, a linear model, the real strategy, ledger and server."""
    opened = []

    def build(mechanism, randomness):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        silent = Mechanism(
            unit="none",
            sample_rate=1.0,
            max_grad_norm=float("inf"),
            noise_multiplier=0.0,
            steps_per_round=1,
            rounds=1,
            reference_size=1,
            delta=1e-5,
        )
        idle = CanaryModel(None, shape=(), dimension=4)  # the run's own trainer is not used
        trainer = LocalTrainer(canary_task(idle, 2), idle, silent, learning_rate=0.1)
        owners = [
            Owner(
                name=f"owner-{index}",
                index=index,
                source="test",
                mechanism=mechanism,
                trainer=trainer,
                records=lambda index=index: records(index),
                randomness=lambda _: randomness,
                gate=None,
                log=tmp_path / "errors.log",
            )
            for index in range(2)
        ]
        folder = tmp_path / "train"
        folder.mkdir(exist_ok=True)
        ledger = Ledger(tmp_path / "ledger.jsonl", Outbox(tmp_path / "outbox"), epsilon=1e6, delta=1e-5)
        opened.append(ledger)
        optimizer = ServerOptimizer()
        strategy = FederatedAveraging(rounds=ROUNDS, optimizer=optimizer)
        if mechanism.unit == "client":
            strategy = PoissonCohorts(
                mechanism=mechanism,
                rounds=ROUNDS,
                optimizer=optimizer,
                randomness=lambda _: randomness,
                source="test",
                quorum=1,
                ledger=ledger,
            )
        plan = ServerPlan(
            folder=folder,
            recipe="recipe",
            initial=write_arrays(model),
            run="audit",
            rounds=ROUNDS,
            quorum=1,
            secret_cohorts=mechanism.unit == "client",
            resumed=False,
            strategy=strategy,
            ledger=None,
            evaluate=lambda number, arrays: None,
            progress=lambda row: None,
        )
        return CanaryRun(
            owners=owners,
            model=model,
            shape=(2, 2),
            classes=3,
            trainer=lambda task, built: LocalTrainer(task, built, mechanism, learning_rate=0.1),
            plan=plan,
            ledger=ledger,
        )

    yield build
    for ledger in opened:
        ledger.close()


@pytest.mark.parametrize("unit", UNITS)
def test_a_correct_round_loop_raises_no_alarm(unit, run):
    found = audit_canaries(run(make(unit), SecretGenerator()), canaries=200)
    assert found.verdict != "fail"
    assert found.epsilon < found.claim
    assert (found.canaries, found.rounds) == (200, ROUNDS)
    assert 1 <= found.alarm_rounds <= ROUNDS
    assert found.alarm_epsilon <= found.alarm_claim


@pytest.mark.parametrize("unit", UNITS)
def test_a_round_loop_with_hardly_any_noise_raises_an_alarm(unit, run):
    found = audit_canaries(run(make(unit, noise_multiplier=6.0), Quiet()), canaries=300)
    assert found.verdict == "fail"
    assert found.alarm_epsilon > found.alarm_claim
    assert "rounds: ε ≥" in found.reason


def test_hardened_noise_goes_through_the_same_loop(run):
    found = audit_canaries(run(make("record", hardened=True), SecureGenerator()), canaries=100)
    assert found.verdict != "fail"


def test_little_noise_is_seen_and_allowed_where_little_is_claimed(run):
    found = audit_canaries(run(make("record", noise_multiplier=0.3, sample_rate=1.0), SecretGenerator()), canaries=200)
    assert found.verdict == "pass"
    assert found.epsilon > 2.0


def test_an_owner_that_cannot_train_ends_the_audit_instead_of_finding_nothing(run):
    made = run(make("client"), SecretGenerator())

    class Broken(LocalTrainer):
        def client_update(self, *arguments, **named):
            raise ValueError("broken")

    broken = replace(made, trainer=lambda task, built: Broken(task, built, make("client"), learning_rate=0.1))
    with pytest.raises(RuntimeError, match="expected canaries that train"):
        audit_canaries(broken, canaries=100)


def test_what_claims_nothing_is_refused(run):
    nothing = run(make("none", noise_multiplier=0.0, max_grad_norm=float("inf")), SecretGenerator())
    with pytest.raises(PrivacyRefused, match="claims nothing"):
        audit_canaries(nothing)


def test_too_few_canaries_are_refused(run):
    with pytest.raises(ValueError, match="expected at least 40 canaries, got 39"):
        audit_canaries(run(make("record"), SecretGenerator()), canaries=39)


def test_scores_without_information_prove_nothing_at_high_confidence():
    generator = np.random.default_rng(5)
    bounds = [guess(generator.standard_normal(500), generator.random(500) < 0.5, 1e-5, 1e-6) for _ in range(20)]
    assert max(bounds) == 0.0


def test_equal_scores_prove_nothing():
    assert guess(np.zeros(400), np.arange(400) % 2 == 0, 0.0, 0.05) == 0.0


def test_rounds_are_cut_where_owners_are_many_and_never_below_one():
    assert affordable_rounds(make("record", rounds=500), 1000, 10) == 500
    assert affordable_rounds(make("local", rounds=500), 1000, 10) == 6
    assert affordable_rounds(make("local", rounds=500), 100_000, 10) == 1


@pytest.mark.parametrize("length", [1e3, 1e6])
def test_a_canarys_gradient_is_its_direction_and_as_long_in_each_head_as_in_the_others(length):
    directions = head_directions(3, 8, np.random.default_rng(1))
    model = CanaryModel(torch.nn.Linear(2, 3), shape=(2,), dimension=8)
    batch = canary_records(
        directions, width=2, scale=length, beside=Records(np.ones((1, 2), np.float32), np.int64([1]))
    )
    for row, direction in enumerate([*directions, np.zeros(8)]):
        model.zero_grad()
        one = batch.take(np.int64([row]))
        canary_task(model, 3).loss(model(torch.from_numpy(one.inputs)), torch.from_numpy(one.labels)).backward()
        gradients = {f"heads.{i}.weight": head.weight.grad.numpy() for i, head in enumerate(model.heads)}
        np.testing.assert_allclose(along(gradients), length * direction, rtol=1e-6)
        norms = [np.linalg.norm(gradient) for gradient in gradients.values()]
        np.testing.assert_allclose(norms, 0.5 * np.linalg.norm(length * direction), rtol=1e-5)
