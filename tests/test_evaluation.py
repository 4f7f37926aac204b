"""Accuracy on owners' own records: what is counted, how much one record can change, and what leaves."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Context, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tacit.federated import noisy_sum
from tacit.federated.accounting import reported_epsilon
from tacit.federated.averaging import FederatedAveraging, to_record
from tacit.federated.client_app import CohortGate, Owner, make_client_app
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import (
    Evaluations,
    Evaluator,
    count_evaluations,
    evaluation_mechanism,
    owners_accuracy,
    reply_metrics,
    share_of_correct,
)
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.noisy_sum import client_mean
from tacit.federated.outbox import Outbox
from tacit.federated.rounds import run_rounds
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

FEATURES, CLASSES = 3, 4
TRAINING = Mechanism(
    unit="record",
    sample_rate=1.0,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    steps_per_round=1,
    rounds=5,
    reference_size=20,
    delta=1e-5,
)


def training_of(unit, *, twin=False, **changes):
    if twin or unit == "none":
        changes |= {"noise_multiplier": 0.0, "twin": unit != "none"}
    if unit == "none":
        changes |= {"max_grad_norm": math.inf}
    return replace(TRAINING, unit=unit, **changes)


def make_model(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


MODEL = make_model()
START = write_arrays(MODEL)


def some_records(count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, FEATURES)).astype(np.float32)
    return Records(inputs, generator.integers(0, CLASSES, count))


def right_by_hand(records):
    """Record by record, in NumPy."""
    layers = [array.astype(np.float64) for array in START.values()]
    right = []
    for inputs, label in zip(records.inputs.astype(np.float64), records.labels, strict=True):
        hidden = np.maximum(layers[0] @ inputs + layers[1], 0.0)
        right.append(int(np.argmax(layers[2] @ hidden + layers[3]) == label))
    return right


def release(unit, records, *, twin=True, noise=3.0):
    mechanism = evaluation_mechanism(training_of(unit, twin=twin), noise, 1)
    return Evaluator(mechanism=mechanism, model=make_model(9)).release(START, records, SecretGenerator())["counts"]


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("unit", ["record", "local", "client", "none"])
def test_without_noise_the_counts_are_those_of_a_loop_over_the_records(unit, count):
    records = some_records(count)
    right = sum(right_by_hand(records))
    expected = np.array([right, count - right]) / (1 if unit in ("record", "none") else count)
    np.testing.assert_allclose(release(unit, records), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_an_owner_without_records_counts_nothing(unit):
    assert release(unit, some_records(0)).tolist() == [0.0, 0.0]


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_adding_a_record_moves_the_counts_by_at_most_one_in_norm(count, seed):
    more = some_records(count + 1, seed)
    one_less = more.take(np.arange(count))
    moved = release("record", more) - release("record", one_less)
    assert 0.999 < np.linalg.norm(moved) <= 1.0  # exactly what is charged, and nothing to spare


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_replacing_all_that_an_owner_holds_moves_its_local_counts_by_at_most_twice_the_bound(one, other):
    bound = evaluation_mechanism(training_of("local"), 1.0, 1).max_grad_norm
    moved = release("local", some_records(3, one)) - release("local", some_records(5, other))
    assert np.linalg.norm(moved) <= 2.0 * bound


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_clients_shares_are_within_the_bound(count, seed):
    assert np.linalg.norm(release("client", some_records(count, seed))) <= 1.0


def test_a_bound_that_is_not_kept_is_caught(monkeypatch):
    """A mutation: rows are added up as they are, and a model that counts double."""
    monkeypatch.setattr(noisy_sum, "clipped_sum", lambda rows, bound: [rows[0].sum(0)])
    monkeypatch.setattr("tacit.federated.mechanism.clipped_sum", lambda rows, bound: [rows[0].sum(0)])
    original = Evaluator._right_or_wrong
    monkeypatch.setattr(Evaluator, "_right_or_wrong", lambda *given: 2.0 * original(*given))
    with pytest.raises(AssertionError):
        test_adding_a_record_moves_the_counts_by_at_most_one_in_norm.hypothesis.inner_test(3, 1)
    with pytest.raises(AssertionError):
        test_a_clients_shares_are_within_the_bound.hypothesis.inner_test(3, 1)


def test_a_record_is_never_seen_beside_another():
    """In a batch, rounding may depend on who else is there, and a class may flip with it."""
    seen = []
    evaluator = Evaluator(mechanism=evaluation_mechanism(TRAINING, 3.0, 1), model=make_model())
    evaluator.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    evaluator.release(START, some_records(300), SecretGenerator())
    assert seen == [1] * 300


def test_evaluating_changes_neither_the_model_that_trains_nor_the_records():
    records = some_records(5)
    before = records.inputs.copy()
    evaluator = Evaluator(mechanism=evaluation_mechanism(TRAINING, 3.0, 1), model=make_model(2))
    evaluator.release(START, records, SecretGenerator())
    assert (records.inputs == before).all()
    mutable = client_mean(records, lambda inputs, labels: inputs.mul_(0.0)[0, :1], (1,), 1.0)
    assert mutable.tolist() == [0.0]
    assert (records.inputs == before).all()


@pytest.mark.parametrize(("unit", "sd"), [("record", 3.0), ("local", 3.0 * math.sqrt(2.0))])
def test_the_noise_has_the_scale_that_is_charged(unit, sd):
    """z-test of counts over nothing; the negative controls are 2/3 and 3/2 of the noise."""
    mechanism = evaluation_mechanism(training_of(unit), 3.0, 1)
    evaluator, randomness, nobody = Evaluator(mechanism=mechanism, model=MODEL), SecretGenerator(), some_records(0)
    centre = 0.5 if unit == "local" else 0.0
    draws = np.concatenate([evaluator.release(START, nobody, randomness)["counts"] for _ in range(4000)]) - centre

    def alarm(claimed):
        z = (float((draws.astype(np.float64) ** 2).mean()) / claimed**2 - 1.0) / math.sqrt(2.0 / draws.size)
        return abs(z) > 6.5

    assert Evaluations(mechanism=mechanism, rounds=1, every=1).noise_sd == pytest.approx(sd)
    assert not alarm(sd)
    assert alarm(sd * 2 / 3)
    assert alarm(sd * 3 / 2)


def test_hardened_counts_are_noised_on_the_grid():
    from tacit.federated.secure_noise import SecureGenerator, grid_step

    mechanism = evaluation_mechanism(replace(TRAINING, hardened=True), 3.0, 1)
    counts = Evaluator(mechanism=mechanism, model=MODEL).release(START, some_records(9), SecureGenerator())["counts"]
    assert (counts.astype(np.float64) / grid_step(1.0) % 1.0 == 0.0).all()


def test_owners_do_not_noise_for_the_server():
    mechanism = evaluation_mechanism(training_of("client"), 3.0, 1)
    with pytest.raises(PrivacyRefused, match="server"):
        noisy_sum.noisy_sum(some_records(3), lambda i, _: i[0], (FEATURES,), mechanism, SecretGenerator())


@pytest.mark.parametrize(
    ("rounds", "every", "expected"),
    [(10, 4, [4, 8, 10]), (10, 5, [5, 10]), (3, 7, [3]), (4, 1, [1, 2, 3, 4]), (9, 0, [])],
)
def test_evaluations_come_every_so_many_rounds_and_after_the_last(rounds, every, expected):
    plan = Evaluations(mechanism=evaluation_mechanism(TRAINING, 3.0, 1), rounds=rounds, every=every)
    assert [number for number in range(1, rounds + 1) if plan.due(number)] == expected
    assert count_evaluations(rounds, every) == len(expected)


@pytest.mark.parametrize("unit", ["record", "local", "client"])
def test_a_plan_counts_one_event_for_each_evaluation_whatever_a_round_of_training_takes(unit):
    training = training_of(unit, steps_per_round=7)
    assert evaluation_mechanism(training, 6.0, 4).plan == {
        replace(training.event, sample_rate=1.0, noise_multiplier=6.0): 4
    }


def test_at_client_level_an_evaluation_is_sampled_as_a_round_is():
    training = training_of("client", sample_rate=0.25)
    assert evaluation_mechanism(training, 6.0, 4).event.sample_rate == 0.25


@pytest.mark.parametrize("unit", ["record", "local", "client"])
def test_a_twin_is_evaluated_without_noise_and_unit_none_exactly(unit):
    assert evaluation_mechanism(training_of(unit, twin=True), 6.0, 4).noise_multiplier == 0.0
    assert not math.isfinite(evaluation_mechanism(training_of("none"), 6.0, 4).max_grad_norm)


@pytest.mark.parametrize(
    ("count", "share", "sd", "total"),
    [(1000, 0.9, 10.0, None), (130, 0.6, 10.0, None), (20, 0.5, 10.0, None), (100, 1.0, 5.0, None), (1, 0.7, 0.3, 1.0)],
)
def test_an_interval_covers_the_share_at_least_95_times_in_100(count, share, sd, total):
    """Seeded; 4,000 draws at 95 % give 3,800 ± 83 at six standard deviations."""
    draws = SeededGenerator(7).gaussian(8000, sd).reshape(-1, 2)
    found = [share_of_correct(count * share + a, count * (1 - share) + b, sd, total=total) for a, b in draws]
    assert sum(one.low - 1e-12 <= share <= one.high + 1e-12 for one in found) > 3717
    assert all(0.0 <= one.low <= one.high <= 1.0 for one in found)
    assert all(one.low <= one.value <= one.high for one in found if not math.isnan(one.value))


def test_an_interval_is_not_wider_than_its_noise_and_half_the_noise_is_not_enough():
    """The negative control: with the noise stated at half its size, coverage falls far below."""
    draws = SeededGenerator(7).gaussian(8000, 10.0).reshape(-1, 2)
    honest = [share_of_correct(900 + a, 100 + b, 10.0) for a, b in draws]
    assert np.mean([one.high - one.low for one in honest]) == pytest.approx(
        2 * 1.96 * 10 * math.sqrt(0.82) / 1000, rel=0.05
    )
    assert sum(one.low <= 0.9 <= one.high for one in (share_of_correct(900 + a, 100 + b, 5.0) for a, b in draws)) < 3000


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0.0, 1e6), st.sampled_from([None, 1.0, 50.0]))
def test_any_counts_give_a_share_within_bounds_or_nothing(right, wrong, sd, total):
    found = share_of_correct(right, wrong, sd, total=total)
    assert 0.0 <= found.low <= found.high <= 1.0
    assert math.isnan(found.value) == ((found.low, found.high) == (0.0, 1.0)) or sd == 0.0 or found.low == found.high


def replies(*pairs):
    return [RecordDict({"metrics": reply_metrics(i, {"counts": np.float32(pair)})}) for i, pair in enumerate(pairs)]


def test_owners_together_are_the_sum_of_their_counts():
    plan = Evaluations(mechanism=evaluation_mechanism(TRAINING, 10.0, 1), rounds=1, every=1)
    stated = owners_accuracy(plan.of_owners(replies((90, 10), (300, 100))), ["anna", "ben"])
    together, ben = share_of_correct(390, 110, 10 * math.sqrt(2)), share_of_correct(300, 100, 10.0)
    assert (stated["mean"], stated["low"], stated["high"]) == (together.value, together.low, together.high)
    assert stated["by_owner"]["ben"] == {"accuracy": ben.value, "low": ben.low, "high": ben.high}
    assert stated["noise_sd"] == 10.0
    assert list(stated["by_owner"]) == ["anna", "ben"]


def test_of_local_owners_every_one_counts_the_same_and_how_many_there_are_is_known():
    plan = Evaluations(mechanism=evaluation_mechanism(training_of("local"), 0.1, 1), rounds=1, every=1)
    stated = owners_accuracy(plan.of_owners(replies((1.0, 0.2), (0.6, 0.6))), ["anna", "ben"])
    assert stated["mean"] == pytest.approx(0.5 + (1.6 - 0.8) / 4)
    assert stated["by_owner"]["anna"]["accuracy"] == pytest.approx(0.9)


def test_what_the_noise_left_nothing_of_is_null_in_json():
    plan = Evaluations(mechanism=evaluation_mechanism(TRAINING, 10.0, 1), rounds=1, every=1)
    stated = owners_accuracy(plan.of_owners(replies((-5, 2), (3, 4))), [])
    assert json.loads(json.dumps(stated, allow_nan=False))["by_owner"] == {
        "0": {"accuracy": None, "low": 0.0, "high": 1.0},
        "1": {"accuracy": None, "low": 0.0, "high": 1.0},
    }


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"right": 1.0, "wrong": 2.0},
        {"owner": 3, "right": [1.0], "wrong": 2.0},
        {"owner": 3, "right": math.nan, "wrong": 1.0},
    ],
)
def test_a_reply_without_two_finite_counts_and_an_owner_is_left_out(metrics):
    plan = Evaluations(mechanism=evaluation_mechanism(TRAINING, 10.0, 1), rounds=1, every=1)
    odd = RecordDict({"metrics": MetricRecord(metrics)})
    assert plan.of_owners([odd, RecordDict({})]) is None
    assert plan.of_owners([odd, *replies((90, 10))])["owner"] == [0]


def test_another_strategys_figures_are_stated_as_they_are():
    assert owners_accuracy(MetricRecord({"right": 3.0, "loss": math.nan}), []) == {"right": 3.0, "loss": None}


# Through the real loop: strategy, grid, gate and ledger.

TASK = find_task("digits")


def pixels():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def digits(index):
    pool = TASK.load().private
    return pool.take(np.arange(index * 40, index * 40 + 40))


class Run:
    """Three owners of a run over one ledger, evaluated every second round of five."""

    def __init__(self, folder, *, unit="record", records=digits):
        self.mechanism = training_of(unit)
        self.counting = evaluation_mechanism(self.mechanism, 4.0, 3)
        self.planned = Evaluations(mechanism=self.counting, rounds=5, every=2)
        self.records, self.read = records, []
        trainer = LocalTrainer(TASK, pixels(), self.mechanism, learning_rate=0.1)
        evaluator = Evaluator(mechanism=self.counting, model=pixels())
        self.ledger = self.gate = None
        if self.mechanism.private:
            self.ledger = Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=math.inf, delta=1e-5)
            self.gate = CohortGate(self.ledger, lambda context: self.find(context))
        self.owners = [
            Owner(
                name=f"owner-{index}",
                index=index,
                source="digits",
                mechanism=self.mechanism,
                trainer=trainer,
                records=lambda index=index: self._read(index),
                randomness=lambda _: SecretGenerator(),
                gate=self.gate,
                log=folder / "errors.log",
                evaluation=evaluator,
            )
            for index in range(3)
        ]
        contexts = {n + 2: Context(1, n + 2, {"partition-id": n}, RecordDict(), {}) for n in range(3)}
        self.grid = InProcessGrid(make_client_app(self.find), contexts, self.gate)

    def _read(self, index):
        self.read.append(index)
        return self.records(index)

    def find(self, context):
        return self.owners[int(context.node_config["partition-id"])]

    def go(self, strategy=None, *, rounds=5):
        reports = []
        run_rounds(
            strategy or FederatedAveraging(rounds=5, evaluations=self.planned),
            self.grid,
            to_record(write_arrays(pixels())),
            rounds=rounds,
            first_round=1,
            quorum=1,
            config={"run": "r"},
            on_round=lambda report, record: reports.append(report),
        )
        return reports

    def close(self):
        if self.ledger is not None:
            self.ledger.close()


def test_a_run_evaluates_when_due_and_charges_each_evaluation_once(tmp_path):
    run = Run(tmp_path)
    reports = run.go()
    assert [report.round for report in reports if report.evaluation is not None] == [2, 4, 5]
    assert all(
        account.history == {run.mechanism.event: 5, run.counting.event: 3} for account in run.ledger.accounts.values()
    )
    assert len(run.read) == 3 * 8
    run.close()


def test_without_a_guarantee_the_counts_are_exact(tmp_path):
    run = Run(tmp_path, unit="none")
    stated = owners_accuracy(run.go()[-1].evaluation, ["a", "b", "c"])
    assert stated["noise_sd"] == 0.0
    assert stated["mean"] == pytest.approx(np.mean([one["accuracy"] for one in stated["by_owner"].values()]))
    assert all(one["low"] == one["accuracy"] == one["high"] for one in stated["by_owner"].values())


def test_an_owner_that_refuses_evaluation_does_not_end_the_run(tmp_path):
    run = Run(tmp_path)
    run.owners[1] = replace(run.owners[1], evaluation=None)
    reports = run.go()
    assert [report.evaluation["owner"] for report in reports if report.evaluation] == [[0, 2]] * 3
    assert reports[1].evaluation_refusals == {"refused": 1}
    assert (reports[1].refusals, reports[1].clients) == ({}, 3)
    run.close()


def test_when_every_owner_refuses_the_run_goes_on_and_says_so(tmp_path):
    run = Run(tmp_path)
    run.owners = [replace(owner, evaluation=None) for owner in run.owners]
    reports = run.go()
    assert len(reports) == 5
    assert all(report.evaluation is None for report in reports)
    assert [report.evaluation_refusals for report in reports] == [
        {},
        {"refused": 3},
        {},
        {"refused": 3},
        {"refused": 3},
    ]
    run.close()


def test_an_owner_whose_records_break_while_evaluating_is_charged_and_left_out(tmp_path):
    run = Run(tmp_path)

    def breaking(index):
        if index == 1 and run.ledger.accounts["owner-1", "digits"].history.get(run.counting.event):
            raise ValueError("SECRET")
        return digits(index)

    run.records = breaking
    reports = run.go(rounds=2)
    assert reports[1].evaluation_refusals == {"unavailable": 1}
    account = run.ledger.accounts["owner-1", "digits"]
    assert (account.reserved, account.released, account.failed) == (3, 2, 1)
    assert "SECRET" in (tmp_path / "errors.log").read_text()
    run.close()


def test_flowers_own_strategy_may_ask_for_evaluations_and_gets_noised_counts(tmp_path):
    from flwr.serverapp.strategy import FedAvg

    run = Run(tmp_path)
    reports = run.go(FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3), rounds=2)
    assert set(reports[-1].evaluation) == {"owner", "right", "wrong"}
    assert run.ledger.accounts["owner-0", "digits"].history == {run.mechanism.event: 2, run.counting.event: 2}
    run.close()


def test_a_server_that_asks_more_often_than_planned_is_stopped_by_the_owners(tmp_path):
    """The owners' ledgers hold the plan, not the server's good will; what was planned besides goes on."""
    run = Run(tmp_path)
    planned = {run.mechanism.event: 5, run.counting.event: 3}
    run.ledger.epsilon = reported_epsilon(planned, 1e-5)
    assert run.ledger.plan(planned)
    reports = run.go(FederatedAveraging(rounds=5, evaluations=replace(run.planned, every=1)))
    assert [report.evaluation_refusals for report in reports] == [{}, {}, {}, {"exhausted": 3}, {"exhausted": 3}]
    assert [report.clients for report in reports] == [3] * 5
    assert all(account.history == planned for account in run.ledger.accounts.values())
    run.close()
