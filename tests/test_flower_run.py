"""The apps under Flower's own runtime: a real SuperLink with Ray, on loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import load_recipe
from tacit.federated.accounts import read_ledger

ROUNDS, OWNERS = 3, 3
EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-flower"
BIN = Path(sys.executable).parent


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.soak
@pytest.mark.timeout(280)
def test_flwr_run_trains_under_each_owners_own_ledger(tmp_path: Path) -> None:
    out = _flwr_run(tmp_path, f"[federated]\nrounds = {ROUNDS}\nowners = {OWNERS}\nevaluate_every = 2\n")
    ledgers = sorted(out.glob("owners/*/ledger.jsonl"))
    assert len(ledgers) == OWNERS
    for ledger in ledgers:
        (account,), _, _ = read_ledger(ledger)
        assert (account.reserved, account.released) == (ROUNDS + 2, ROUNDS + 2)  # evaluated after rounds 2 and 3
    rows = [json.loads(line) for line in (out / "train" / "rounds.jsonl").read_text().splitlines()]
    assert [len((row["owners_accuracy"] or {}).get("by_owner", {})) for row in rows] == [0, OWNERS, OWNERS]


@pytest.mark.soak
@pytest.mark.timeout(280)
@pytest.mark.parametrize("engine", ["sequential", "workers"])
def test_ray_and_one_process_give_the_same_model(tmp_path: Path, engine: str) -> None:
    table = f'[federated]\nrounds = {ROUNDS}\nowners = {OWNERS}\nengine = "{engine}"\n[privacy]\nunit = "none"\n'
    out = _flwr_run(tmp_path, table)
    train_in_process(load_recipe(tmp_path / "recipe.toml"), tmp_path / "here", run="r", report=lambda row: None)
    theirs = load_file(out / "train" / "weights.safetensors")
    ours = load_file(tmp_path / "here" / "train" / "weights.safetensors")
    assert theirs.keys() == ours.keys()
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(np.abs(array).max() > 0.01 for array in ours.values())


def _flwr_run(tmp_path: Path, table: str) -> Path:
    """Runs the example under a SuperLink with Ray; returns the folder of the run."""
    pytest.importorskip("ray", reason="needs the extra: simulation")
    port = _free_port()
    (tmp_path / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(table)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    superlink = subprocess.Popen(
        [str(BIN / "flower-superlink"), "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        command = [str(BIN / "flwr"), "run", str(EXAMPLE), "here", "--stream"]
        command += ["--federation-config", f"num-supernodes={OWNERS} client-resources-num-cpus=1"]
        command += ["--run-config", f'out="{out}" recipe="{recipe}"']
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        deadline = time.monotonic() + 30
        while not (out / "train" / "weights.safetensors").is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        superlink.terminate()
        superlink.wait(30)
    assert (out / "train" / "weights.safetensors").is_file(), done.stdout + done.stderr
    return out


def _wait_for(port: int) -> None:
    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"expected a SuperLink on port {port}, got none within a minute")
