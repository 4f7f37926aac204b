"""The order in which the kernel is asked: charge on disk, records, payload on disk, release on disk, reply.

Seen twice: under strace, where that is allowed, and always by wrapping the calls in this process. Run as a script, this
file is the program that strace watches: `python test_system_calls.py FOLDER`.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import nn

from tacit.federated.averaging import to_record
from tacit.federated.client_app import CohortGate, OwnerGate, make_client_app
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import Evaluator, evaluation_mechanism
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Granted, Ledger
from tacit.federated.mechanism import Mechanism
from tacit.federated.noise import SecretGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.owner import Owner
from tacit.federated.owner_ledgers import OwnerLedgers
from tacit.federated.rounds import run_rounds
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer, write_arrays

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
KINDS = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
CHARGE = ["charge written", "charge synced"]
RELEASE = [
    "payload written",
    "payload synced",
    "payload named",
    "outbox synced",
    "release written",
    "release synced",
    "reply sent",
]
IN_ORDER = [*CHARGE, "records read", *RELEASE]
SHORT = ("record", "local")


class EarlyGate(OwnerGate):
    """A mutation: grants at once, charges when the records have been read."""

    def reserve(self, request):
        return Granted(request.key)

    def release(self, request, payload):
        super().reserve(request)
        super().release(request, payload)


class LateGate(OwnerGate):
    """A mutation: the reply goes first, outbox and release follow."""

    def release(self, request, payload):
        self.rest = partial(super().release, request, payload)


GATES = {"in order": OwnerGate, "records first": EarlyGate, "reply first": LateGate}


def open_ledger(folder: Path) -> Ledger:
    epsilon = float("inf")
    return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=epsilon, delta=MECHANISM.delta)


def make_owner(folder: Path, read: Callable[[], None], *, unit: str = "record", index: int = 0, gate=None) -> Owner:
    mechanism = Mechanism(**{**vars(MECHANISM), "unit": unit})
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def records() -> Records:
        read()
        generator = np.random.default_rng(0)
        return Records(generator.normal(size=(20, 1, 8, 8)).astype(np.float32), generator.integers(0, 10, 20))

    return Owner(
        name=f"owner-{index}",
        index=index,
        source="digits",
        mechanism=mechanism,
        trainer=LocalTrainer(find_task("digits"), model, mechanism, learning_rate=0.1),
        records=records,
        randomness=lambda _: SecretGenerator(),
        gate=gate,
        log=folder / "errors.log",
        evaluation=Evaluator(mechanism=evaluation_mechanism(mechanism, 4.0, 3), model=nn.Sequential(*model)),
    )


def start() -> dict[str, np.ndarray]:
    return write_arrays(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def message_to(node: int, kind: str) -> Message:
    config = ConfigRecord({"run": "run", "server-round": 1, "clip_norm": 1.0})
    return Message(RecordDict({"arrays": to_record(start()), "config": config}), node, KINDS[kind])


def contexts(owners: int) -> dict[int, Context]:
    return {n + 2: Context(1, n + 2, {"partition-id": n}, RecordDict(), {}) for n in range(owners)}


def participate(folder: Path, read: Callable[[], None], send: Callable[[], None], *, order: str, **what: str) -> None:
    """One participation of an owner in a process of its own: a message comes, the reply is sent."""
    kind = what.pop("kind", "train")
    gate = GATES[order](lambda: open_ledger(folder))
    owner = make_owner(folder, read, gate=gate, **what)
    grid = InProcessGrid(make_client_app(lambda _: owner), contexts(1))
    (reply,) = grid.send_and_receive([message_to(2, kind)])
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    send()
    if isinstance(gate, LateGate):
        gate.rest()


def step_of(call: str, path: str, data: str) -> str | None:
    """What a call means for a participation; None when it is none of its steps."""
    name = Path(path).name
    if name == "ledger.jsonl" or (name.endswith(".jsonl") and "/home/ledgers/" in path):
        entry = "release" if '"kind": "release"' in data or '"release"' in data else "charge"
        return {"write": f"{entry} written", "fsync": f"{entry} synced"}.get(call)
    if name.endswith(".tmp") and "outbox" in path:
        return {"write": "payload written", "fsync": "payload synced", "rename": "payload named"}.get(call)
    if name == "outbox" and call == "fsync":
        return "outbox synced"
    return {"records": "records read", "reply": "reply sent"}.get(name) if call == "mark" else None


def in_one_each(steps: list[str]) -> list[str]:
    """Steps of several owners that follow one another are one."""
    return [step for step, _ in groupby(steps)]


# In this process.


class Recorder:
    """Notes the calls of this process that make something durable, with the marks that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self._newest: dict[str, str] = {}
        write, fsync, replace = os.write, os.fsync, os.replace

        def recorded_write(descriptor, data):
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self._newest[path] = bytes(data).decode(errors="replace")
            self._note("write", path)
            return write(descriptor, data)

        def recorded_fsync(descriptor):
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if path.endswith(".tmp") and os.fstat(descriptor).st_size:
                self._note("write", path)  # by a Python file, whose own write cannot be wrapped
            if path in self._newest or not path.endswith(".jsonl"):
                self._note("fsync", path)
            return fsync(descriptor)

        def recorded_replace(source, target):
            self._note("rename", str(source))
            return replace(source, target)

        monkeypatch.setattr(os, "write", recorded_write)
        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "replace", recorded_replace)

    def mark(self, name: str) -> None:
        self._note("mark", name)

    def _note(self, call: str, path: str) -> None:
        step = step_of(call, path, self._newest.get(path, ""))
        if step:
            self.steps.append(step)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", SHORT)
def test_a_participation_is_charged_read_stored_released_and_sent_in_this_order(tmp_path, recorder, unit, kind):
    read, send = partial(recorder.mark, "records"), partial(recorder.mark, "reply")
    participate(tmp_path, read, send, order="in order", unit=unit, kind=kind)
    assert recorder.steps == IN_ORDER


@pytest.mark.parametrize("order", ["records first", "reply first"])
def test_another_order_is_noticed(tmp_path, recorder, order):
    read, send = partial(recorder.mark, "records"), partial(recorder.mark, "reply")
    participate(tmp_path, read, send, order=order)
    assert sorted(recorder.steps) == sorted(IN_ORDER)  # the same calls
    assert recorder.steps != IN_ORDER


@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_of_simulated_owners_keeps_the_order_with_one_write_for_all(tmp_path, recorder, kind):
    ledger = open_ledger(tmp_path)
    owners = [make_owner(tmp_path, partial(recorder.mark, "records"), index=index) for index in range(3)]

    def find(context: Context) -> Owner:
        return owners[int(context.node_config["partition-id"])]

    gate = CohortGate(ledger, find)
    owners = [Owner(**{**vars(owner), "gate": gate}) for owner in owners]
    grid = InProcessGrid(make_client_app(find), contexts(3), gate)
    replies = grid.send_and_receive([message_to(node, kind) for node in (2, 3, 4)])
    assert all(reply.has_content() for reply in replies)
    recorder.mark("reply")
    ledger.close()
    assert recorder.steps.count("records read") == 3
    assert in_one_each(recorder.steps) == IN_ORDER


def test_a_ledger_at_home_keeps_the_order_and_its_extract_is_no_part_of_it(tmp_path, recorder):
    (tmp_path / "home").mkdir(mode=0o700)
    book = OwnerLedgers(
        tmp_path / "home",
        "digits",
        {"owner-0": "f" * 64},
        run="run",
        extract=tmp_path / "extract.jsonl",
        outbox=Outbox(tmp_path / "outbox"),
        epsilon=float("inf"),
        delta=MECHANISM.delta,
    )
    owner = make_owner(tmp_path, partial(recorder.mark, "records"))
    gate = CohortGate(book, lambda _: owner)
    guarded = Owner(**{**vars(owner), "gate": gate})
    grid = InProcessGrid(make_client_app(lambda _: guarded), contexts(1), gate)
    (reply,) = grid.send_and_receive([message_to(2, "train")])
    assert reply.has_content()
    recorder.mark("reply")
    book.close()
    assert recorder.steps == IN_ORDER


def test_at_client_level_the_charge_comes_before_the_coins_and_the_release_before_the_model_is_seen(tmp_path, recorder):
    mechanism = Mechanism(**{**vars(MECHANISM), "unit": "client", "reference_size": 3})
    owners = [make_owner(tmp_path, lambda: None, unit="client", index=index) for index in range(3)]
    ledger = open_ledger(tmp_path)

    def randomness(server_round: int) -> SecretGenerator:
        if server_round > 0:
            recorder.mark("records")  # the cohort's coins; noise has the round's negative number
        return SecretGenerator()

    strategy = PoissonCohorts(
        mechanism=mechanism,
        rounds=1,
        optimizer=ServerOptimizer(),
        randomness=randomness,
        source="digits",
        quorum=1,
        ledger=ledger,
    )
    grid = InProcessGrid(make_client_app(lambda c: owners[int(c.node_config["partition-id"])]), contexts(3))
    run_rounds(
        strategy,
        grid,
        to_record(start()),
        rounds=1,
        first_round=1,
        quorum=0,
        config={"run": "run"},
        on_round=lambda report, arrays: recorder.mark("reply"),
    )
    ledger.close()
    assert recorder.steps == IN_ORDER


# Under strace.

CALLS = "write,fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg"
LINE = re.compile(r'^\d+ +(?P<call>\w+)\((?:\d+<(?P<file>[^>]*)>|"(?P<name>[^"]*)")(?P<rest>.*)')


def steps_in(trace: str, folder: Path) -> list[str]:
    """The steps that a trace shows in a folder."""
    steps, newest = [], {}
    for line in trace.splitlines():
        found = LINE.match(line)
        if not found:
            continue
        call = {"renameat": "rename", "renameat2": "rename", "fdatasync": "fsync"}.get(found["call"], found["call"])
        path = found["file"] or found["name"] or ""
        data = found["rest"].replace("\\", "")
        if call in ("sendto", "sendmsg") and f"reply of {folder.name}" in data:
            steps.append("reply sent")
        elif path == str(folder / "records"):
            steps.append("records read")
        elif path.startswith(str(folder)):
            if call == "write":
                newest[path] = data
            if call == "fsync" and path.endswith("ledger.jsonl") and path not in newest:
                continue
            steps.append(step_of(call, path, newest.get(path, "")))
    return [step for step in steps if step]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if shutil.which("strace") is None:
        pytest.skip("expected strace, which shows what the kernel is asked; the same order is checked without it above")
    folder = tmp_path_factory.mktemp("traced").resolve()
    command = ["strace", "-f", "-y", "-s", "300", "-e", f"trace={CALLS}", "-o", str(folder / "trace")]
    probe = subprocess.run([*command, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("expected a kernel that allows tracing; the same order is checked without it above")
    done = subprocess.run(
        [*command, sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, (folder / "trace").read_text(errors="replace")


def test_the_kernel_is_asked_in_this_order(trace: tuple[Path, str]) -> None:
    folder, text = trace
    assert in_one_each(steps_in(text, folder / "in order")) == IN_ORDER


@pytest.mark.parametrize("order", ["records first", "reply first"])
def test_a_trace_of_another_order_is_noticed(trace: tuple[Path, str], order: str) -> None:
    folder, text = trace
    found = in_one_each(steps_in(text, folder / order))
    assert sorted(found) == sorted(IN_ORDER)
    assert found != IN_ORDER


def main(folder: Path) -> None:
    """Takes part once in each order; strace looks on."""
    here, there = socket.socketpair()
    for order in GATES:
        place = folder / order
        place.mkdir()
        marker = os.open(place / "records", os.O_WRONLY | os.O_CREAT, 0o600)
        read = partial(os.write, marker, b"read")
        participate(place, read, partial(here.send, f"reply of {order}".encode()), order=order)
        there.recv(100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
