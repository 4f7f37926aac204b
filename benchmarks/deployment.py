"""Seconds that a round of a deployment takes when its app does nothing, Flower's way and Tacit's, and where they go.

Usage: python benchmarks/deployment.py [--rounds 8] [--quick] [--json FILE].

A SuperLink and two SuperNodes over TLS on loopback, and an app that answers at once. Flower's own: its grid looks for
answers every 3 s and its SuperExec for work every second. Tacit's: `DeployedGrid`, every quarter of a second, and the
setting of `supernode.sh`, every tenth. Rounds of both follow each other in blocks. `message` is the processor time of
one process of a deployed owner of `digits`, the first and a later one; it does not depend on Flower's waiting. No
figure is required: what is left is Flower's processes starting, and the 3 s for which an idle SuperNode sleeps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tacit.edge.deploy import deploy

BIN = Path(sys.executable).parent
OWNERS = ["anna", "ben"]
APP = """\
import time, json
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from tacit.edge.deployed_grid import DeployedGrid

client_app = ClientApp()
server_app = ServerApp()

@client_app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)

@server_app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    if context.run_config["tacit"]:
        grid = DeployedGrid(grid, [], None)
    seconds = []
    for number in range(context.run_config["rounds"] + 1):  # the first one unpacks the app
        started = time.monotonic()
        messages = [Message(RecordDict(), node, "train", group_id=str(number)) for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=120))
        assert all(reply.has_content() for reply in replies), replies
        seconds.append(time.monotonic() - started)
    with open(context.run_config["out"], "w") as file:
        json.dump(seconds[1:], file)
"""
CONFIG = '[tool.flwr.app.config]\nrounds = 1\ntacit = false\nout = ""\n'
MESSAGE = """\
import resource, sys
from flwr.app import Context, RecordDict
import flwr.supernode.cli.flwr_clientapp, flwr.supernode.runtime.run_clientapp
from tacit.edge import flower_app
from tacit.federated.personal import Asked
from tacit.federated.train import write_arrays
folder = sys.argv[1]
node = {"owner": "anna", "partition-id": 0, "num-partitions": 2, "recipe": folder + "/recipe.toml"}
owner = flower_app._find_owner(Context(1, 2, node, RecordDict(), {}))
ledger = owner.gate.open_ledger()
from tacit.federated.turns import Reservation
stated = owner.mechanism.describe()
ledger.reserve([Reservation(owner="anna", source="digits", run="r", round=1, body="", mechanism=stated)])
ledger.close()
asked = Asked(arrays=write_arrays(owner.trainer.model), server_round=1, correction=None, clip_norm=None)
owner.kept.train(owner.trainer, asked, owner.records(), owner.randomness(1))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = _write(Path(scratch), rounds)
        flower = _run(folder, rounds, tacit=False)
        tacit = _run(folder, rounds, tacit=True)
        first, later = (_message(folder / "owners" / "anna") for _ in range(2))
    for name, seconds in (("Flower's own", flower), ("Tacit's", tacit)):
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        sys.stdout.write(f"{name:<14} {statistics.median(seconds):5.1f} s a round, {spread}\n")
    sys.stdout.write(f"message        {first:5.1f} s of processor time the first time, {later:.1f} s later\n")
    if options.json:
        options.json.write_text(json.dumps(_record(flower, tacit, first, later), indent=1) + "\n")


def _write(scratch: Path, rounds: int) -> Path:
    folder = scratch / "d"
    settings = ["federated.rounds=4", "compression.variants=[]"]
    deploy(folder, recipe="digits", host=f"localhost:{_free_port()}", owners=OWNERS, overrides=settings)
    app = folder / "server" / "app"
    (app / "noop.py").write_text(APP)
    text = (app / "pyproject.toml").read_text().replace("tacit.edge.flower_app:", "noop:")
    (app / "pyproject.toml").write_text(text[: text.index("# Owners do not")] + CONFIG)
    for owner in OWNERS:  # the app of this benchmark is the server's, so Flower's own process has to run it
        (folder / "owners" / owner / "bin" / "flwr-clientapp").unlink()
    return folder


def _run(folder: Path, rounds: int, *, tacit: bool) -> list[float]:
    """Seconds of each round, in new processes."""
    server, out = folder / "server", folder / f"seconds-{tacit}.json"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_started(server / "superlink.sh", tacit=tacit))
        port = int((folder / "deployment.json").read_text().split('"port": ')[1].split(",")[0])
        _wait(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        subprocess.run([server / "register.sh"], env=_environment(tacit=tacit), check=True, capture_output=True)
        for index, owner in enumerate(OWNERS):
            script = folder / "owners" / owner / "supernode.sh"
            stack.enter_context(_started(script, tacit=tacit, RUNTIME_PORT=str(_free_port() + index)))
        settings = f'rounds={rounds} tacit={str(tacit).lower()} out="{out}"'
        command = [server / "flwr.sh", "run", server / "app", "tacit", "--run-config", settings]
        subprocess.run(command, env=_environment(tacit=tacit), check=True, capture_output=True)
        _wait(out.is_file, seconds=60.0 + 60.0 * rounds)
        time.sleep(1.0)
        return [float(second) for second in json.loads(out.read_text())]


@contextlib.contextmanager
def _started(script: Path, *, tacit: bool, **more: str) -> Iterator[None]:
    text = script.read_text()
    if not tacit:  # Flower's own second
        script.write_text(text.replace(" FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1", ""))
    process = subprocess.Popen(
        [script], env=_environment(tacit=tacit, **more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        script.write_text(text)


def _environment(*, tacit: bool, **more: str) -> dict[str, str]:
    return {**os.environ, "VENV": str(BIN.parent), "BIND": "127.0.0.1", "OMP_NUM_THREADS": "1", **more}


def _message(owner: Path) -> float:
    environment = {**os.environ, "TACIT_HOME": str(owner), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    command = [sys.executable, "-c", MESSAGE, str(owner)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _wait(fact: object, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not (callable(fact) and fact()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected the deployment to get on within {seconds:g} s")
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _record(flower: list[float], tacit: list[float], first: float, later: float) -> dict[str, object]:
    ours, theirs = statistics.median(tacit), statistics.median(flower)
    return {
        "benchmark": "deployment",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {name: version(name) for name in ("tacit", "flwr", "torch")},
        "cases": {
            "noop_round": {
                "tacit": ours,
                "peers": {"flower": theirs},
                "unit": "s",
                "ratio": {"flower": theirs / ours},
                "rounds": {"tacit": tacit, "flower": flower},
            },
            "message": {"tacit": later, "peers": {}, "unit": "s of processor time", "ratio": {}, "first": first},
        },
    }


if __name__ == "__main__":
    main()
