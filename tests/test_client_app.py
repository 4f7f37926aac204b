"""What an owner answers: the charge before the records, three constants for a refusal, nothing else about the data."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import nn

from tacit.federated import client_app
from tacit.federated.accounts import read_ledger
from tacit.federated.averaging import from_record, to_record
from tacit.federated.client_app import REFUSAL, CohortGate, Owner, OwnerGate, make_client_app
from tacit.federated.datasets import find_task
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Granted, Ledger
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import SecretGenerator
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


def some_records(count=20):
    generator = np.random.default_rng(count)
    return Records(generator.normal(size=(count, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, count))


class Federation:
    """Owners of a run in one folder, each read logged, with one ledger or one each."""

    def __init__(self, folder, *, owners=1, one_each=False):
        self.folder, self.one_each, self.events = folder, one_each, []
        self.read = dict.fromkeys(range(owners), some_records)
        self.owners = [self._owner(index) for index in range(owners)]
        self.ledger = None if one_each else self.open(folder)
        self.gate = None if one_each else CohortGate(self.ledger, lambda context: self.find(context))
        contexts = {n + 2: Context(1, n + 2, {"partition-id": n}, RecordDict(), {}) for n in range(owners)}
        self.grid = InProcessGrid(make_client_app(self.find), contexts, self.gate)

    def open(self, folder):
        return Ledger(
            folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=MECHANISM.planned_epsilon(), delta=1e-5
        )

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
        return Message(RecordDict({"arrays": to_record(arrays), "config": config}), node, MessageType.TRAIN)

    def close(self):
        if self.ledger is not None:
            self.ledger.close()


@pytest.fixture(params=[False, True], ids=["cohort", "one ledger each"])
def federation(request, tmp_path):
    made = Federation(tmp_path, owners=2, one_each=request.param)
    yield made
    made.close()


def reason(reply):
    assert reply.has_error()
    assert reply.error.code == REFUSAL
    return reply.error.reason


def everything_in(reply):
    return str(reply.error) if reply.has_error() else str(reply.content) + str(reply.content.metric_records)


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


def test_a_reply_carries_the_models_arrays_and_two_constants_and_nothing_else(federation):
    federation.read[0] = lambda: some_records(7)
    federation.read[1] = lambda: some_records(300)
    for index, reply in enumerate(federation.ask()):
        assert set(reply.content) == {"arrays", "metrics"}
        assert dict(reply.content.metric_records["metrics"]) == {"num-examples": 1, "owner": index}
        arrays = from_record(reply.content.array_records["arrays"])
        assert {name: array.shape for name, array in arrays.items()} == {n: a.shape for n, a in START.items()}


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


def test_a_record_that_cannot_be_trained_on_is_a_failure_and_the_other_owners_go_on(federation):
    broken = some_records()
    federation.read[0] = lambda: Records(broken.inputs, np.full_like(broken.labels, 10))
    bad, good = federation.ask()
    assert reason(bad) == "unavailable"
    assert good.has_content()


def test_an_update_that_is_not_finite_is_a_failure(federation):
    poisoned = {name: np.full_like(array, math.nan) for name, array in START.items()}
    assert [reason(reply) for reply in federation.ask(arrays=poisoned)] == ["unavailable"] * 2
    assert "finite" in federation.owners[0].log.read_text()


def test_asking_twice_gives_the_same_bytes_without_reading_again(federation):
    first = federation.ask()
    federation.events.clear()
    second = federation.ask()
    for one, other in zip(first, second, strict=True):
        a, b = (from_record(reply.content.array_records["arrays"]) for reply in (one, other))
        assert all(a[name].tobytes() == b[name].tobytes() for name in START)
    assert federation.events == []


def test_fresh_noise_for_another_model(federation):
    first = federation.ask()[0]
    other = federation.ask(arrays={name: np.asarray(array + 1) for name, array in START.items()})[0]
    a, b = (from_record(reply.content.array_records["arrays"]) for reply in (first, other))
    assert len(federation.events) == 4
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
    owner = replace(federation.owners[0], mechanism=plain, trainer=trainer, records=some_records, gate=None)
    federation.find = lambda context: owner
    grid = InProcessGrid(make_client_app(lambda context: owner), {2: Context(1, 2, {}, RecordDict(), {})})
    (reply,) = grid.send_and_receive([federation.message(2, 1, START)])
    ours = from_record(reply.content.array_records["arrays"])
    expected = trainer.update(START, some_records(), SecretGenerator())  # a rate of 1 leaves nothing to chance
    assert all(np.array_equal(ours[name], expected[name]) for name in START)
    federation.close()


def test_a_private_owner_without_a_ledger_is_refused_and_not_read(tmp_path):
    federation = Federation(tmp_path)
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


def test_an_app_that_lets_an_exception_out_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(client_app, "_train_privately", lambda message, owner, gate: client_app._train(message, owner))
    federation = Federation(tmp_path, owners=2)
    with pytest.raises(AssertionError):
        test_an_exceptions_text_stays_on_the_owners_disk_and_the_key_is_never_tried_again(federation)
    federation.close()
