"""A real SuperLink and three real SuperNodes over TLS on loopback: a DP run, a kill in the middle, a stranger."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tacit.edge.deploy import deploy
from tacit.edge.deploy_check import examine
from tacit.edge.deploy_keys import make_node_key
from tacit.federated.accounts import read_ledger
from tacit.federated.chain import Chain

BIN = Path(sys.executable).parent
OWNERS = ["anna", "ben", "carl"]
ROUNDS = 4
TASK = """\
[task]
name = "pets"
source = "csv"
path = "sample.csv"
owner_column = "vet"
label = "kind"
labels = ["cat", "dog"]
test = "test.csv"
[model]
family = "mlp"
hidden = [4]
[federated]
partition = "natural"
quorum = 2
[privacy]
epsilon = 8.0
reference_size = 20
sample_rate = 0.5
[compression]
variants = []
"""


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def rows(owner: int, count: int = 20) -> str:
    """Records that no other owner has, so that they would be found wherever they went."""
    lines = [f"{owner}.{i:04d}7717,{i % 7}.{owner}5,{'dog' if i % 2 else 'cat'}" for i in range(count)]
    return "height,weight,kind\n" + "\n".join(lines) + "\n"


@dataclass
class Machines:
    """The processes of one deployment, of which only those started here are ever ended."""

    folder: Path
    ports: list[int]
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("TACIT_HOME", "FLWR_HOME")}
        return {**kept, "VENV": str(BIN.parent), "OMP_NUM_THREADS": "1", "BIND": "127.0.0.1", **more}

    def start(self, name: str, script: Path, **more: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        self.started[name] = subprocess.Popen(
            [str(script)], env=self.environment(**more), stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        return self.started[name]

    def node(self, index: int) -> subprocess.Popen[bytes]:
        script = self.folder / "d" / "owners" / OWNERS[index] / "supernode.sh"
        return self.start(OWNERS[index], script, RUNTIME_PORT=str(self.ports[1 + index]))

    def end(self, name: str, number: int) -> None:
        """Ends a process with its children: all are of a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.started[name].pid, number)
        self.started[name].wait(30)
        for pipe in (self.started[name].stdout, self.started[name].stderr):
            if pipe is not None and number == signal.SIGKILL:
                pipe.close()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    ports = free_ports(6)
    for owner in range(3):
        (tmp_path / f"{OWNERS[owner]}.csv").write_text(rows(owner + 1))
    (tmp_path / "sample.csv").write_text("height,weight,kind,vet\n1,2,cat,a\n3,4,dog,b\n")
    (tmp_path / "test.csv").write_text(rows(9))
    (tmp_path / "pets.toml").write_text(TASK)
    deploy(
        tmp_path / "d",
        recipe=tmp_path / "pets.toml",
        host=f"localhost:{ports[0]}",
        owners=OWNERS,
        overrides=[f"federated.rounds={ROUNDS}"],
    )
    (tmp_path / "sample.csv").unlink()
    for owner in OWNERS:
        (tmp_path / "d" / "owners" / owner / "data").mkdir()
        (tmp_path / f"{owner}.csv").rename(tmp_path / "d" / "owners" / owner / "data" / "records.csv")
    made = Machines(tmp_path, ports)
    yield made
    for name in list(made.started):
        made.end(name, signal.SIGKILL)


def until(fact: Callable[[], bool], what: str, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.5)


def rounds_done(log: Path) -> int:
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return sum("accuracy" in row for row in found)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_three_owners_over_tls_finish_a_run_although_one_is_killed_and_a_stranger_knocks(machines: Machines) -> None:
    folder, server = machines.folder / "d", machines.folder / "d" / "server"
    machines.start("server", server / "superlink.sh")
    until(lambda: examine(folder)[-1].status == "ok" and examine(folder)[-1].name == "server", "the server")
    registered = subprocess.run(
        [str(server / "register.sh")], env=machines.environment(), capture_output=True, text=True, check=False
    )
    assert registered.returncode == 0, registered.stdout + registered.stderr

    # Somebody with the CA's certificate and a key of its own, which nobody registered.
    stranger = folder / "owners" / "stranger"
    shutil.copytree(folder / "owners" / "carl", stranger)
    for name in ("node.key", "node.key.pub"):
        (stranger / name).unlink()
    make_node_key(stranger / "node.key", comment="stranger")
    knocking = machines.start("stranger", stranger / "supernode.sh", RUNTIME_PORT=str(machines.ports[4]))

    for index in range(3):
        machines.node(index)
    command = [str(BIN / "tacit"), "deploy", "run", str(folder), "--format", "json"]
    home = machines.environment(TACIT_HOME=str(machines.folder / "server-home"))
    running = subprocess.Popen(
        command, env=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    machines.started["run"] = running  # type: ignore[assignment]  # of text
    until(lambda: rounds_done(server / "run" / "log.jsonl") >= 1, "the first round", 240)
    machines.end("ben", signal.SIGKILL)
    time.sleep(1)
    # Flower lets a node that was killed in again once its heartbeats are missed: the unit file tries every ten seconds.
    for _ in range(12):
        restarted = machines.node(1)
        try:
            restarted.wait(20)
        except subprocess.TimeoutExpired:
            break
    else:
        pytest.fail(machines.log("ben")[-3000:])
    printed, said = running.communicate(timeout=500)
    assert running.returncode == 0, printed + said
    assert knocking.wait(30) != 0

    summary = json.loads(printed)["data"]
    assert summary["privacy"]["scope"] == "deployed"
    assert summary["privacy"]["epsilon"] <= 8.0
    assert (server / "run" / "report.html").is_file()
    assert (server / "run" / "train" / "weights.safetensors").is_file()
    assert "train     4 rounds" in said

    # Each owner's ledger holds on its own disk, within its own budget; the one that was away was charged no more.
    charged = []
    for owner in OWNERS:
        ledger = folder / "owners" / owner / "ledgers" / owner / "pets.jsonl"
        Chain(ledger).close()
        (account,), _, _ = read_ledger(ledger)
        assert (account.owner, account.status) == (owner, "private")
        assert account.released <= account.reserved <= ROUNDS
        charged.append(account.reserved)
        assert json.loads(ledger.read_text().splitlines()[0])["mechanism"]["noise"] == "gaussian on a grid"
    assert charged[0] == charged[2] == ROUNDS
    assert charged[1] >= 1
    assert not (stranger / "ledgers").exists()

    # Nothing of an owner's records is anywhere but below its own folder.
    for path in [p for p in server.rglob("*") if p.is_file()] + [
        machines.folder / f"{n}.log" for n in ("server", *OWNERS)
    ]:
        content = path.read_bytes()
        for owner in (1, 2, 3):
            assert f"{owner}.00037717".encode() not in content, path
    assert not list(server.rglob("records.csv"))
