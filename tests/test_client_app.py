"""What an owner answers: the charge before the records, three constants for a refusal, nothing else about the data.

Training and evaluation are two questions behind the same door: what must hold for one is tried on both.
"""

import hashlib
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from safetensors.numpy import save
from torch import nn

from tacit.federated import client_app
from tacit.federated.accounts import read_ledger
from tacit.federated.averaging import LOSS, from_record, to_record
from tacit.federated.client_app import (
    REFUSAL,
    CohortGate,
    Owner,
    OwnerGate,
    describe_channels,
    make_client_app,
    reservation,
)
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import Evaluator, evaluation_mechanism
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Granted, Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

SECRET = "SECRET-pixel-42"  # noqa: S105  # stands for what a record holds
MECHANISM = Mechanism(
    unit="record",
    sample_rate=1.0,
    max_grad_norm=1.0,
    noise_multiplier=4.0,
    steps_per_round=1,
    rounds=3,
    reference_size=20,
    delta=1e-5,
)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
START = write_arrays(MODEL)
TRAINER = LocalTrainer(find_task("digits"), MODEL, MECHANISM, learning_rate=0.1)
COUNTING = evaluation_mechanism(MECHANISM, 4.0, 3)
EVALUATOR = Evaluator(mechanism=COUNTING, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
KINDS = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


def some_records(count=20):
    generator = np.random.default_rng(count)
    return Records(generator.normal(size=(count, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, count))


class Federation:
    """Owners of a run in one folder, each read logged, with one ledger or one each, asked one kind of question."""

    def __init__(self, folder, *, owners=1, one_each=False, kind="train", epsilon=None):
        self.folder, self.one_each, self.kind, self.events = folder, one_each, kind, []
        self.epsilon = epsilon or MECHANISM.planned_epsilon()
        self.read = dict.fromkeys(range(owners), some_records)
        self.owners = [self._owner(index) for index in range(owners)]
        self.ledger = None if one_each else self.open(folder)
        self.gate = None if one_each else CohortGate(self.ledger, lambda context: self.find(context))
        contexts = {n + 2: Context(1, n + 2, {"partition-id": n}, RecordDict(), {}) for n in range(owners)}
        self.grid = InProcessGrid(make_client_app(self.find), contexts, self.gate)

    def open(self, folder):
        return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=self.epsilon, delta=1e-5)

    def _owner(self, index):
        home = self.folder / f"owner-{index}"
        gate = OwnerGate(lambda: self.open(home)) if self.one_each else None

        def read():
            kinds = [json.loads(line)["kind"] for line in self.ledger_of(index).read_text().splitlines()]
            self.events.append((index, kinds))
            return self.read[index]()

        return Owner(
            name=f"owner-{index}",
            index=index,
            source="digits",
            mechanism=MECHANISM,
            trainer=TRAINER,
            records=read,
            randomness=lambda _: SecretGenerator(),
            gate=gate,
            log=home / "errors.log",
            evaluation=EVALUATOR,
        )

    def ledger_of(self, index):
        return (self.folder / f"owner-{index}" if self.one_each else self.folder) / "ledger.jsonl"

    def find(self, context):
        owner = self.owners[int(context.node_config["partition-id"])]
        return owner if self.one_each else replace(owner, gate=self.gate)

    def ask(self, round_number=1, *, nodes=None, arrays=START):
        messages = [self.message(node, round_number, arrays) for node in nodes or sorted(self.grid.get_node_ids())]
        return list(self.grid.send_and_receive(messages))

    def message(self, node, round_number, arrays):
        config = ConfigRecord({"run": "run", "server-round": round_number})
        return Message(RecordDict({"arrays": to_record(arrays), "config": config}), node, KINDS[self.kind])

    def close(self):
        if self.ledger is not None:
            self.ledger.close()


@pytest.fixture(params=[False, True], ids=["cohort", "one ledger each"])
def one_each(request):
    return request.param


@pytest.fixture(params=["train", "evaluate"])
def federation(request, tmp_path, one_each):
    made = Federation(tmp_path, owners=2, one_each=one_each, kind=request.param)
    yield made
    made.close()


@pytest.fixture
def training(tmp_path, one_each):
    made = Federation(tmp_path, owners=2, one_each=one_each)
    yield made
    made.close()


def reason(reply):
    assert reply.has_error()
    assert reply.error.code == REFUSAL
    return reply.error.reason


def everything_in(reply):
    return str(reply.error) if reply.has_error() else str(reply.content) + str(reply.content.metric_records)


def released(reply):
    """Everything in a reply, as bytes by name."""
    arrays, metrics = reply.content.array_records.values(), reply.content.metric_records.values()
    found = {name: array.tobytes() for record in arrays for name, array in from_record(record).items()}
    return found | {name: value for record in metrics for name, value in record.items()}


def leak():
    raise ValueError(f"bad value {SECRET}")


def test_the_charge_is_on_disk_when_records_are_read_and_the_release_before_a_reply_is_seen(federation):
    replies = federation.ask()
    assert len(replies) == 2
    assert [index for index, _ in federation.events] == [0, 1]
    for index, kinds in federation.events:
        assert kinds == (["reserve"] if federation.one_each else ["reserve", "reserve"])
        account, *_ = read_ledger(federation.ledger_of(index))[0]
        assert (account.reserved, account.released) == (1, 1)


def test_a_reply_carries_the_models_arrays_and_public_numbers_and_nothing_else(training):
    training.read[0] = lambda: some_records(7)
    training.read[1] = lambda: some_records(300)
    for index, reply in enumerate(training.ask()):
        assert set(reply.content) == {"arrays", "metrics"}
        metrics = dict(reply.content.metric_records["metrics"])
        assert metrics == {"num-examples": 1, "owner": index, "server-round": 1}
        arrays = from_record(reply.content.array_records["arrays"])
        assert {name: array.shape for name, array in arrays.items()} == {n: a.shape for n, a in START.items()}


def test_a_question_that_asks_for_a_loss_is_refused_under_a_guarantee_and_nothing_is_read(training):
    messages = [training.message(node, 1, START) for node in (2, 3)]
    for message in messages:
        message.content.config_records["config"][LOSS] = True
    assert [reason(reply) for reply in training.grid.send_and_receive(messages)] == ["refused", "refused"]
    assert training.events == []


def test_an_exceptions_text_stays_on_the_owners_disk_and_the_key_is_never_tried_again(federation):
    federation.read[0] = leak
    bad, good = federation.ask()
    assert reason(bad) == "unavailable"
    assert SECRET not in everything_in(bad)
    assert good.has_content()
    assert SECRET in federation.owners[0].log.read_text()
    account, *_ = read_ledger(federation.ledger_of(0))[0]
    assert (account.owner, account.reserved, account.failed, account.released) == ("owner-0", 1, 1, 0)
    federation.read[0] = some_records
    federation.events.clear()
    again, replay = federation.ask()
    assert reason(again) == "unavailable"
    assert replay.has_content()
    assert federation.events == []  # neither read nor computed again
    assert federation.ask(2)[0].has_content()  # the next round is a new charge


def test_a_record_that_cannot_be_trained_on_is_a_failure_and_the_other_owners_go_on(training):
    broken = some_records()
    training.read[0] = lambda: Records(broken.inputs, broken.labels.astype(np.float32))
    bad, good = training.ask()
    assert reason(bad) == "unavailable"
    assert good.has_content()


def test_an_update_that_is_not_finite_is_a_failure(training):
    poisoned = {name: np.full_like(array, math.nan) for name, array in START.items()}
    assert [reason(reply) for reply in training.ask(arrays=poisoned)] == ["unavailable"] * 2
    assert "finite" in training.owners[0].log.read_text()


def test_asking_twice_gives_the_same_bytes_without_reading_again(federation):
    first = federation.ask()
    federation.events.clear()
    second = federation.ask()
    assert [released(reply) for reply in first] == [released(reply) for reply in second]
    assert federation.events == []


def test_fresh_noise_for_another_model(training):
    first = training.ask()[0]
    other = training.ask(arrays={name: np.asarray(array + 1) for name, array in START.items()})[0]
    a, b = (from_record(reply.content.array_records["arrays"]) for reply in (first, other))
    assert len(training.events) == 4
    assert not np.allclose(a["1.weight"] - START["1.weight"], b["1.weight"] - START["1.weight"] - 1)


def test_an_owner_whose_budget_is_spent_says_so_and_no_more(federation):
    for round_number in (1, 2, 3):
        assert all(reply.has_content() for reply in federation.ask(round_number))
    federation.events.clear()
    assert [reason(reply) for reply in federation.ask(4)] == ["exhausted"] * 2
    assert federation.events == []


def test_a_message_that_is_not_understood_is_answered_with_a_constant(tmp_path):
    federation = Federation(tmp_path, one_each=True)
    message = Message(RecordDict({"arrays": to_record(START)}), 2, MessageType.TRAIN)
    (reply,) = federation.grid.send_and_receive([message])
    assert reason(reply) == "unavailable"
    wrong = {"0.weight": np.zeros(3, np.float32)}
    assert reason(federation.ask(arrays=wrong)[0]) == "unavailable"


def test_a_log_that_cannot_be_written_does_not_let_the_text_out(federation):
    federation.read[0] = leak
    blocked = federation.folder / "a file"
    blocked.write_text("")
    federation.owners[0] = replace(federation.owners[0], log=blocked / "errors.log")
    assert reason(federation.ask()[0]) == "unavailable"


def test_the_same_owner_twice_in_a_cohort_answers_at_most_once(tmp_path):
    federation = Federation(tmp_path)
    replies = federation.ask(nodes=[2, 2])
    assert sum(reply.has_content() for reply in replies) <= 1
    assert len(federation.events) <= 1
    assert federation.ledger.accounts["owner-0", "digits"].reserved == 1
    federation.close()


def test_two_rounds_of_one_owner_in_one_cohort_are_two_charges(tmp_path):
    federation = Federation(tmp_path)
    messages = [federation.message(2, number, START) for number in (1, 2)]
    assert all(reply.has_content() for reply in federation.grid.send_and_receive(messages))
    assert federation.ledger.accounts["owner-0", "digits"].reserved == 2
    federation.close()


def test_what_a_cohort_was_granted_and_did_not_use_is_a_failure(tmp_path):
    federation = Federation(tmp_path)
    message = federation.message(2, 1, START)
    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    federation.gate.begin([(message, context)])
    federation.gate.commit()
    account = federation.ledger.accounts["owner-0", "digits"]
    assert (account.reserved, account.failed) == (1, 1)
    federation.close()


def test_a_reply_that_is_too_large_to_wait_leaves_after_a_release_of_its_own(tmp_path):
    federation = Federation(tmp_path, owners=3)
    federation.gate.much_bytes = 1
    messages = [federation.message(node, 1, START) for node in (2, 3, 4)]
    for left, reply in enumerate(federation.grid.send_and_receive(messages), 1):
        lines = [json.loads(line) for line in federation.ledger_of(0).read_text().splitlines()]
        released = [line["payload"] for line in lines if line["kind"] == "release"]
        assert (len(released), len(federation.events)) == (left, left)
        assert hashlib.sha256(save(from_record(reply.content["arrays"]))).hexdigest() == released[-1]
    again = federation.grid.send_and_receive(messages)
    assert all(reply.has_content() for reply in again)
    assert len(federation.events) == 3  # replayed
    federation.close()


def test_no_reply_is_seen_when_the_commit_cannot_be_written(tmp_path, monkeypatch):
    federation = Federation(tmp_path)

    def read_then_fill_the_disk():
        monkeypatch.setattr(os, "fsync", _full)
        return some_records()

    federation.read[0] = read_then_fill_the_disk
    with pytest.raises(OSError, match="No space"):
        federation.ask()
    monkeypatch.undo()
    federation.close()
    account, *_ = read_ledger(tmp_path / "ledger.jsonl")[0]
    assert (account.reserved, account.released) == (1, 0)


def test_an_owner_whose_disk_was_full_is_not_locked_out(tmp_path, monkeypatch):
    federation = Federation(tmp_path, one_each=True)

    def read_then_fill_the_disk():
        monkeypatch.setattr(os, "fsync", _full)
        return some_records()

    federation.read[0] = read_then_fill_the_disk
    assert reason(federation.ask()[0]) == "unavailable"
    monkeypatch.undo()
    federation.read[0] = some_records
    assert federation.ask(2)[0].has_content()


def _full(descriptor):
    raise OSError(28, "No space left on device")


def test_without_a_guarantee_there_is_no_ledger_and_the_update_is_the_trainers(tmp_path):
    plain = replace(MECHANISM, unit="none", noise_multiplier=0.0, max_grad_norm=math.inf)
    trainer = LocalTrainer(
        find_task("digits"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), plain, learning_rate=0.1
    )
    federation = Federation(tmp_path)
    owner = replace(
        federation.owners[0], mechanism=plain, trainer=trainer, records=some_records, gate=None, evaluation=None
    )
    federation.find = lambda context: owner
    grid = InProcessGrid(make_client_app(lambda context: owner), {2: Context(1, 2, {}, RecordDict(), {})})
    (reply,) = grid.send_and_receive([federation.message(2, 1, START)])
    ours = from_record(reply.content.array_records["arrays"])
    expected = trainer.update(START, some_records(), SecretGenerator())  # a rate of 1 leaves nothing to chance
    assert all(np.array_equal(ours[name], expected[name]) for name in START)
    federation.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_owner_without_a_ledger_is_refused_and_not_read(tmp_path, kind):
    federation = Federation(tmp_path, kind=kind)
    owner = federation.owners[0]
    grid = InProcessGrid(make_client_app(lambda context: owner), {2: Context(1, 2, {}, RecordDict(), {})})
    (reply,) = grid.send_and_receive([federation.message(2, 1, START)])
    assert reason(reply) == "refused"
    assert federation.events == []
    federation.close()


class LateGate(OwnerGate):
    """A mutation: grants first, charges when the update is already there."""

    def reserve(self, request):
        return Granted(request.key)

    def release(self, request, payload):
        super().reserve(request)
        super().release(request, payload)


def test_a_gate_that_charges_after_reading_is_caught(tmp_path):
    federation = Federation(tmp_path, owners=2, one_each=True)
    for index, owner in enumerate(federation.owners):
        federation.open(tmp_path / owner.name).close()
        federation.owners[index] = replace(owner, gate=LateGate(owner.gate.open_ledger))
    with pytest.raises(AssertionError):
        test_the_charge_is_on_disk_when_records_are_read_and_the_release_before_a_reply_is_seen(federation)


@pytest.mark.parametrize("kind", KINDS)
def test_an_app_that_lets_an_exception_out_is_caught(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(client_app, "_from_owner", lambda message, owner, compute, reply: reply(compute()))
    federation = Federation(tmp_path, owners=2, kind=kind)
    with pytest.raises(AssertionError):
        test_an_exceptions_text_stays_on_the_owners_disk_and_the_key_is_never_tried_again(federation)
    federation.close()


def test_an_evaluation_that_nobody_planned_is_refused_and_neither_charged_nor_read(federation):
    federation.kind = "evaluate"
    federation.owners[0] = replace(federation.owners[0], evaluation=None)
    refused, answered = federation.ask()
    assert reason(refused) == "refused"
    assert answered.has_content()
    assert [index for index, _ in federation.events] == [1]
    path = federation.ledger_of(0)
    accounts = read_ledger(path)[0] if path.is_file() else []
    assert not [account for account in accounts if account.owner == "owner-0"]


def test_training_and_evaluating_the_same_model_are_two_charges_and_two_answers(tmp_path):
    """The same arrays, configuration and round: only the kind of question differs."""
    federation = Federation(tmp_path, epsilon=math.inf)
    (trained,) = federation.ask()
    federation.kind = "evaluate"
    (evaluated,) = federation.ask()
    assert set(trained.content) == {"arrays", "metrics"}
    assert set(evaluated.content) == {"metrics"}
    account = federation.ledger.accounts["owner-0", "digits"]
    assert account.reserved == account.released == 2
    federation.close()


def test_an_evaluation_under_another_guarantee_than_the_training_is_refused(tmp_path):
    federation = Federation(tmp_path)
    silent = replace(COUNTING, twin=True, noise_multiplier=0.0)
    with pytest.raises(PrivacyRefused, match="evaluation_mechanism"):
        replace(federation.owners[0], evaluation=replace(EVALUATOR, mechanism=silent))
    federation.close()


# Every field that may be in a reply, and whether it may depend on records.
CHANNELS = {
    "content/arrays/1.weight": True,
    "content/arrays/1.bias": True,
    "content/metrics/num-examples": False,
    "content/metrics/owner": False,
    "content/metrics/server-round": False,
    "content/metrics/unclipped": True,
    "content/metrics/right": True,
    "content/metrics/wrong": True,
    "error/code": False,
    "error/reason": False,
    **dict.fromkeys(
        (f"metadata/_{name}" for name in ("run_id", "src_node_id", "dst_node_id", "group_id", "message_type")), False
    ),
    # Drawn at random, or the time: Flower counts down what is left of a message's life.
    **dict.fromkeys((f"metadata/_{name}" for name in ("message_id", "reply_to_message_id", "created_at", "ttl")), None),
    **dict.fromkeys((f"metadata/_{name}" for name in ("delivered_at", "src_task_id", "dst_task_id")), False),
}
# Names as `describe_channels` states them: of what may depend on records.
STATED = {
    "content/arrays/1.weight": "model arrays",
    "content/arrays/1.bias": "model arrays",
    "content/metrics/unclipped": "unclipped bit",
    "content/metrics/right": "evaluation counts",
    "content/metrics/wrong": "evaluation counts",
}


def walk(reply):
    """Every field of a reply, whatever it is called."""
    fields = {f"metadata/{name}": value for name, value in vars(reply.metadata).items()}
    if reply.has_error():
        return fields | {f"error/{name.lstrip('_')}": value for name, value in vars(reply.error).items()}
    for record_name, record in reply.content.items():
        for name, value in record.items():
            kept = value.numpy().tobytes() if hasattr(value, "numpy") else value
            fields[f"content/{record_name}/{name}"] = kept
    return fields


def owner_of(unit, records, folder, gate=None):
    changes = {"noise_multiplier": 0.0, "max_grad_norm": math.inf} if unit == "none" else {}
    mechanism = replace(MECHANISM, unit=unit, **changes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Owner(
        name="owner-0",
        index=0,
        source="digits",
        mechanism=mechanism,
        trainer=LocalTrainer(find_task("digits"), model, mechanism, learning_rate=0.1),
        records=records,
        randomness=lambda number: SeededGenerator(abs(number)),
        gate=gate,
        log=folder / "errors.log",
        evaluation=Evaluator(mechanism=evaluation_mechanism(mechanism, 4.0, 3), model=nn.Sequential(*model)),
    )


def answers(unit, kind, records, folder):
    """A reply and what it left in the context, of an owner with a ledger where its unit asks for one."""
    ledger = gate = None
    owner = owner_of(unit, records, folder)
    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    if unit in ("record", "local"):
        ledger = Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=math.inf, delta=1e-5)
        gate = CohortGate(ledger, lambda found: owner)
    grid = InProcessGrid(make_client_app(lambda found: replace(owner, gate=gate)), {2: context}, gate)
    config = ConfigRecord({"run": "run", "server-round": 1, "clip_norm": 1.0})
    content = RecordDict({"arrays": to_record(START), "config": config})
    (reply,) = grid.send_and_receive([Message(content, 2, KINDS[kind])])
    if ledger is not None:
        ledger.close()
    return reply, context


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["record", "local", "client", "none"])
def test_no_field_of_a_reply_is_unknown_and_only_the_stated_ones_depend_on_records(tmp_path, unit, kind):
    """A field that somebody adds to a reply fails here until its protection is stated."""
    cases = [lambda: some_records(7), lambda: some_records(300)] + ([leak] if unit != "none" else [])
    walked = []
    for number, records in enumerate(cases):
        reply, context = answers(unit, kind, records, tmp_path / str(number))
        assert not context.state  # what an owner keeps there would lie with Flower
        walked.append(walk(reply))
        assert set(walked[-1]) <= set(CHANNELS), set(walked[-1]) - set(CHANNELS)
    stated = describe_channels(unit, evaluated=kind == "evaluate")
    assert "reply time" in stated
    for name in set(walked[0]) & set(walked[1]):
        if CHANNELS[name] is False:
            assert walked[0][name] == walked[1][name], name
        elif CHANNELS[name] is True:
            assert STATED[name] in stated


def test_an_unknown_field_is_caught(tmp_path, monkeypatch):
    """The mutation of the test above: a client that tells how many records it holds."""
    original = client_app._reply

    def telling(message, owner, sent, extra):
        return original(message, owner, sent, {**extra, "records": 7})

    monkeypatch.setattr(client_app, "_reply", telling)
    with pytest.raises(AssertionError):
        test_no_field_of_a_reply_is_unknown_and_only_the_stated_ones_depend_on_records(tmp_path, "record", "train")


def test_a_message_that_is_neither_training_nor_evaluation_reads_nothing(tmp_path):
    federation = Federation(tmp_path)
    content = federation.message(2, 1, START).content
    (reply,) = federation.grid.send_and_receive([Message(content, 2, MessageType.QUERY)])
    assert reply.has_error()
    assert federation.events == []
    federation.close()


def test_a_reservation_states_the_mechanism_of_its_own_kind(tmp_path):
    federation = Federation(tmp_path)
    stated = {}
    for kind in KINDS:
        federation.kind = kind
        stated[kind] = reservation(federation.message(2, 1, START), federation.owners[0]).mechanism
    assert stated["train"] == MECHANISM.describe()
    assert stated["evaluate"] == COUNTING.describe()
    federation.close()


def test_an_evaluation_never_draws_from_the_stream_of_a_round_of_training(tmp_path):
    """Where randomness has a seed: the noise of one would otherwise be the noise of the other."""
    drawn = {}
    for kind in KINDS:
        federation, numbers = Federation(tmp_path / kind, kind=kind, epsilon=math.inf), []
        drawing = replace(federation.owners[0], randomness=lambda n, seen=numbers: seen.append(n) or SecretGenerator())
        federation.owners[0] = drawing
        for number in (1, 2, 3):
            federation.ask(number)
        drawn[kind] = set(numbers)
        federation.close()
    assert len(drawn["train"]) == len(drawn["evaluate"]) == 3
    assert not drawn["train"] & drawn["evaluate"]


@pytest.mark.parametrize("unit", ["client", "none"])
def test_an_evaluation_that_nobody_planned_is_refused_where_owners_have_no_ledger_too(tmp_path, unit):
    owner = replace(owner_of(unit, leak, tmp_path), evaluation=None)
    grid = InProcessGrid(make_client_app(lambda found: owner), {2: Context(1, 2, {}, RecordDict(), {})})
    content = RecordDict({"arrays": to_record(START), "config": ConfigRecord({"run": "run", "server-round": 1})})
    (reply,) = grid.send_and_receive([Message(content, 2, MessageType.EVALUATE)])
    assert reason(reply) == "refused"
    assert not (tmp_path / "errors.log").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_of_a_cohort_whose_records_break_says_one_constant_and_keeps_the_text(tmp_path, kind):
    reply, _ = answers("client", kind, leak, tmp_path)
    assert reason(reply) == "unavailable"
    assert SECRET not in everything_in(reply)
    assert SECRET in (tmp_path / "errors.log").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_an_owner_that_cannot_be_found_is_a_constant_and_the_shared_log_holds_no_text(tmp_path, kind, caplog):
    federation = Federation(tmp_path, kind=kind)
    grid = InProcessGrid(make_client_app(lambda context: leak()), {2: Context(1, 2, {}, RecordDict(), {})})
    (reply,) = grid.send_and_receive([federation.message(2, 1, START)])
    federation.close()
    assert reason(reply) == "refused"
    assert "ValueError" in caplog.text
    assert SECRET not in everything_in(reply) + caplog.text
