"""What stays with an owner stays there: noised with the rest under privacy, or unknown to all that leaves."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from tacit.federated.averaging import to_record
from tacit.federated.client_app import CohortGate, make_client_app
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import Evaluator, evaluation_mechanism
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.model_arrays import write_arrays
from tacit.federated.noise import SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.owner import Owner
from tacit.federated.personal import Asked, Kept, OwnerStore, own_names
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer
from tacit.federated.update_codec import TopK

TASK = find_task("digits")
MECHANISM = Mechanism(
    unit="record",
    sample_rate=0.5,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    steps_per_round=3,
    rounds=4,
    reference_size=20,
    delta=1e-5,
)
PLAIN = replace(MECHANISM, unit="none", noise_multiplier=0.0, max_grad_norm=math.inf)


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 10))


def records(count=40, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.random((count, 1, 8, 8)).astype(np.float32)
    return Records(inputs, generator.integers(0, 10, count))


def start(model):
    return {
        name: np.random.default_rng(3).normal(size=a.shape).astype(np.float32)
        for name, a in write_arrays(model).items()
    }


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("personal", ["fedbn", "local-head"])
def test_what_stays_is_never_among_what_is_sent(tmp_path: Path, model, personal):
    names = own_names(model, personal)
    arrays = start(model)
    own = {name: arrays.pop(name) for name in names}
    kept = Kept(store=OwnerStore(tmp_path), own=own)
    trainer = LocalTrainer(TASK, model, MECHANISM, learning_rate=0.1)
    for server_round in (1, 2):
        asked = Asked(arrays=arrays, server_round=server_round)
        sent, _ = kept.train(trainer, asked, records(), SeededGenerator(server_round))
        assert list(sent) == list(arrays)
    stored = OwnerStore(tmp_path).before(3)
    assert {name.removeprefix("own.") for name in stored} == set(names)
    assert all(not np.array_equal(stored[f"own.{name}"], own[name]) for name in names)


def test_parameters_that_stay_have_the_noise_of_the_same_step_at_record_level(tmp_path: Path, model):
    """Without records a step is noise alone: it must be there for every array, the ones that stay included."""
    arrays = start(model)
    own = {name: arrays.pop(name) for name in own_names(model, "local-head")}
    kept = Kept(store=OwnerStore(tmp_path), own=own)
    one_step = replace(MECHANISM, steps_per_round=1)
    trainer = LocalTrainer(TASK, model, one_step, learning_rate=1.0)
    sent, _ = kept.train(trainer, Asked(arrays=arrays, server_round=1), records(0), SeededGenerator(5))
    moved = {name: sent[name] - arrays[name] for name in sent}
    moved |= {name: OwnerStore(tmp_path).before(2)[f"own.{name}"] - own[name] for name in own}
    everything = np.concatenate([moved[name].ravel() for name in write_arrays(model)])
    # z·C over q·n_ref, drawn as one row in the model's order.
    wanted = SeededGenerator(5)
    wanted.bernoulli(0, 0.5)
    np.testing.assert_allclose(everything, -wanted.gaussian(everything.size, 1.0) / 10.0, atol=1e-5)


@pytest.mark.parametrize("unit", ["local", "client"])
def test_what_is_sent_has_the_same_bound_whatever_stays(tmp_path: Path, model, unit):
    mechanism = replace(MECHANISM, unit=unit, sample_rate=1.0, noise_multiplier=1e-6)
    arrays = start(model)
    own = {name: arrays.pop(name) for name in own_names(model, "local-head")}
    trainer = LocalTrainer(TASK, model, mechanism, learning_rate=5.0)
    asked = Asked(arrays=arrays, server_round=1, clip_norm=0.01 if unit == "client" else None)
    bound = 0.01 if unit == "client" else 1.0
    sent, within = Kept(store=OwnerStore(tmp_path), own=own).train(trainer, asked, records(), SeededGenerator(1))
    assert list(sent) == list(arrays)
    norm = math.sqrt(sum(float(((sent[n] - arrays[n]).astype(np.float64) ** 2).sum()) for n in sent))
    assert norm <= bound * 1.001
    assert within is (unit != "client")


def test_dittos_model_has_no_influence_on_what_is_sent(tmp_path: Path, model):
    arrays = start(model)
    sent = []
    for strength, folder in ((None, "a"), (0.5, "b")):
        trainer = LocalTrainer(TASK, make_model(), MECHANISM, learning_rate=0.1, personal=True)
        kept = Kept(store=OwnerStore(tmp_path / folder), ditto=strength)
        sent.append(kept.train(trainer, Asked(arrays=arrays, server_round=1), records(), SeededGenerator(2))[0])
    assert all(np.array_equal(sent[0][name], sent[1][name]) for name in sent[0])
    stored = OwnerStore(tmp_path / "b").before(2)
    assert {name.removeprefix("personal.") for name in stored} == set(arrays)
    personal = Kept(store=OwnerStore(tmp_path / "b"), ditto=0.5).model(arrays, 1)
    assert not np.array_equal(personal["1.weight"], sent[1]["1.weight"])


def test_at_record_level_dittos_model_is_not_what_records_are_counted_with(tmp_path: Path, model):
    arrays = start(model)
    trainer = LocalTrainer(TASK, make_model(), MECHANISM, learning_rate=0.1, personal=True)
    kept = Kept(store=OwnerStore(tmp_path), ditto=0.5)
    kept.train(trainer, Asked(arrays=arrays, server_round=1), records(), SeededGenerator(2))
    asked = []
    for unit in ("record", "local"):
        mechanism = replace(MECHANISM, unit=unit, sample_rate=1.0)
        evaluator = Evaluator(mechanism=evaluation_mechanism(mechanism, 4.0, 1), model=make_model())
        found = _counted_with(evaluator, mechanism, kept, arrays, tmp_path)
        asked.append(np.array_equal(found["1.weight"], arrays["1.weight"]))
    assert asked == [True, False]


def _counted_with(evaluator, mechanism, kept, arrays, folder):
    """The model that an owner's evaluation was given."""
    seen = {}

    class Watching:
        def __init__(self):
            self.mechanism = evaluator.mechanism

        def release(self, model, held, randomness):
            seen.update(model)
            return evaluator.release(model, held, randomness)

    owner = Owner(
        name="anna",
        index=0,
        source="digits",
        mechanism=mechanism,
        trainer=LocalTrainer(TASK, make_model(), mechanism, learning_rate=0.1),
        records=records,
        randomness=lambda n: SeededGenerator(abs(n)),
        gate=None,
        log=folder / "errors.log",
        evaluation=Watching(),
        kept=kept,
    )
    ledger = Ledger(folder / f"{mechanism.unit}.jsonl", Outbox(folder / "outbox"), epsilon=math.inf, delta=1e-5)
    gate = CohortGate(ledger, lambda context: owner)
    app = make_client_app(lambda context: replace(owner, gate=gate))
    grid = InProcessGrid(app, {2: Context(1, 2, {}, RecordDict(), {})}, gate)
    config = ConfigRecord({"run": "r", "server-round": 1})
    content = RecordDict({"arrays": to_record(arrays), "config": config})
    (reply,) = grid.send_and_receive([Message(content, 2, "evaluate")])
    ledger.close()
    assert reply.has_content()
    return seen


def test_error_feedback_keeps_what_was_not_sent_of_the_noised_update(tmp_path: Path, model):
    arrays = start(model)
    trainer = LocalTrainer(TASK, make_model(), MECHANISM, learning_rate=0.1)
    whole, _ = Kept().train(trainer, Asked(arrays=arrays, server_round=1), records(), SeededGenerator(2))
    store = OwnerStore(tmp_path)
    kept = Kept(store=store, codec=TopK(0.1), error_feedback=True)
    wire, _ = kept.train(trainer, Asked(arrays=arrays, server_round=1), records(), SeededGenerator(2))
    decoded = TopK(0.1).decode(wire, arrays)
    for name in arrays:
        left = store.before(2)[f"residual.{name}"]
        np.testing.assert_allclose(decoded[name] + left, whole[name] - arrays[name], atol=1e-6)


def test_a_round_that_is_asked_again_begins_where_it_began(tmp_path: Path, model):
    arrays = start(model)
    own = {name: arrays.pop(name) for name in own_names(model, "fedbn")}
    kept = Kept(store=OwnerStore(tmp_path), own=own)
    trainer = LocalTrainer(TASK, model, PLAIN, learning_rate=0.1)
    answers = [
        kept.train(trainer, Asked(arrays=arrays, server_round=n), records(), SeededGenerator(n))[0] for n in (1, 2, 2)
    ]
    assert all(np.array_equal(answers[1][name], answers[2][name]) for name in answers[1])
    assert any(not np.array_equal(answers[0][name], answers[1][name]) for name in answers[1])


def test_the_store_keeps_two_earlier_rounds_and_forgets_those_after_the_one_written(tmp_path: Path):
    store = OwnerStore(tmp_path)
    for server_round in (1, 2, 3, 4):
        store.write(server_round, {"own.w": np.float32([server_round])})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"00000{n}.safetensors" for n in (2, 3, 4)]
    store.write(3, {"own.w": np.float32([30.0])})
    assert store.before(9)["own.w"].tolist() == [30.0]
    assert store.before(3)["own.w"].tolist() == [2.0]


@pytest.mark.parametrize("personal", ["fedbn", "local-head"])
def test_a_model_of_which_nothing_or_everything_would_stay_is_refused(personal):
    with pytest.raises(ValueError, match="a part stays"):
        own_names(nn.Linear(2, 2), personal)


def test_a_loss_is_never_told_under_a_guarantee(model):
    trainer = LocalTrainer(TASK, model, MECHANISM, learning_rate=0.1)
    with pytest.raises(PrivacyRefused, match="no noise"):
        trainer.mean_loss(write_arrays(model), records())
    plain = LocalTrainer(TASK, make_model(), PLAIN, learning_rate=0.1)
    assert plain.mean_loss(write_arrays(model), records()) > 0.0
