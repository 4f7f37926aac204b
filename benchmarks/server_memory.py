"""Memory of a server that averages: what 10, 100 and 1,000 replies of a 10 MB model add to its peak.

Usage: python benchmarks/server_memory.py [--quick] [--json FILE]. Linux.

A round as `tacit run` has it (front door, averaging, server's step), over an in-process grid whose clients send a copy
of what they got. What is added to the resident memory that there was before the round, model and questions not
counted, is told in models of 10 MB; Flower's FedAvg gets the same replies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPLIES, LAYERS, MODEL_MB = (10, 100, 1000), 8, 10.0
_SIZE = int(MODEL_MB * 1e6) // 4 // LAYERS


def measured(strategy: str, replies: int) -> float:
    """Models of 10 MB that a round adds to the peak."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    from tacit.federated.admission import FrontDoor, schema
    from tacit.federated.averaging import FederatedAveraging, to_record
    from tacit.federated.doors import Doors
    from tacit.federated.grid import InProcessGrid
    from tacit.federated.roster import Roster
    from tacit.federated.rounds import run_rounds

    generator = np.random.default_rng(0)
    model = {f"layer{n}": generator.standard_normal(_SIZE).astype(np.float32) for n in range(LAYERS)}
    record = to_record(model)
    sent = {name: bytearray(array.data) for name, array in record.items()}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {
            name: Array(dtype="float32", shape=(_SIZE,), stype="numpy.ndarray", data=bytes(data))
            for name, data in sent.items()
        }
        metrics = {"num-examples": 1, "owner": context.node_id - 2, "server-round": 1}
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    grid = InProcessGrid(app, {n + 2: Context(1, n + 2, {}, RecordDict(), {}) for n in range(replies)})
    doors = Doors(
        training=FrontDoor.of_training(schema(model), owners=replies, unit="none"),
        evaluation=FrontDoor.of_evaluation(owners=replies),
        roster=Roster(),
    )
    ours = FederatedAveraging(rounds=1)
    theirs = FedAvg(min_train_nodes=replies, min_available_nodes=replies, fraction_evaluate=0.0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run_rounds(
        ours if strategy == "tacit" else theirs,
        grid,
        record,
        rounds=1,
        first_round=1,
        quorum=replies,
        config={"run": "r", "server-round": "1"} if strategy != "tacit" else {"run": "r"},
        on_round=lambda report, arrays: None,
        doors=doors if strategy == "tacit" else None,
    )
    return (_status("VmHWM") - before) / (1e3 * MODEL_MB)


def _status(name: str) -> int:
    """Kilobytes, from the kernel."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{name}:")[1].split()[0])


def main() -> None:
    """Each number in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without 1,000 replies")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("FOUND", measured(options.inside[0], int(options.inside[1])))  # noqa: T201  # to the process that asked
        return
    cases = {}
    for replies in REPLIES[:2] if options.quick else REPLIES:
        ours = _apart("tacit", replies)
        theirs = _apart("flower", replies) if replies <= 100 else float("nan")
        name = f"replies-{replies}"
        print(f"{name}: Tacit {ours:.2f} models above base, Flower's FedAvg {theirs:.2f}")  # noqa: T201  # its purpose
        peers = {} if theirs != theirs else {"flower": theirs}
        ratio = {peer: value / ours for peer, value in peers.items()}
        cases[name] = {"tacit": ours, "peers": peers, "unit": "models of 10 MB above base", "ratio": ratio}
    if options.json:
        machine = {"processor": platform.processor(), "system": platform.platform(), "cores": os.cpu_count()}
        versions = {"python": sys.version, **{name: version(name) for name in ("flwr", "numpy")}}
        content = {"benchmark": "server_memory", "machine": machine, "versions": versions, "cases": cases}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _apart(strategy: str, replies: int) -> float:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--inside", strategy, str(replies)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise RuntimeError(f"expected a figure for {strategy} with {replies} replies, got: {done.stderr[-500:]}")
    return float(lines[-1].removeprefix("FOUND "))


if __name__ == "__main__":
    main()
