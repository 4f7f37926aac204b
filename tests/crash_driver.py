"""Runs crash scenarios in forked children of one warm process; prints one JSON line a scenario. Used by test_crash.py.

Usage: python crash_driver.py FOLDER FAILPOINT...; each FAILPOINT is name:nth=action.
"""

import json
import os
import sys
from pathlib import Path

import torch

from tacit.devices import failpoint
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import load_recipe
from tacit.federated import mechanism
from tacit.federated.accounts import read_ledger

ROUNDS, OWNERS = 4, 3
_SETTINGS = [
    f"federated.rounds={ROUNDS}",
    f"federated.owners={OWNERS}",
    "federated.partition=iid",
    "model.channels=[4]",
    "privacy.sample_rate=0.1",
    "report.twin=false",
]


def _train(folder: Path, point: str | None) -> int:
    """Trains in a forked child; returns how it ended (negative: by that signal)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 0
    try:
        if point:
            os.environ["TACIT_FAILPOINT"] = point
            failpoint.arm()
        _count_noise(folder / "noise.log")
        train_in_process(_RECIPE, folder, run="crash", report=lambda row: None)
    except BaseException as error:  # noqa: BLE001  # reported to the test, whatever it was
        (folder / "error.txt").write_text(repr(error))
        code = 1
    finally:
        os._exit(code)


def _count_noise(log: Path) -> None:
    """Logs, from inside the noise primitive, every draw that was completed: independent of the ledger."""
    original = mechanism._add_noise

    def counted(total, standard_deviation, randomness):
        noised = original(total, standard_deviation, randomness)
        with log.open("ab", buffering=0) as file:
            file.write(b"noised\n")
        return noised

    mechanism._add_noise = counted


def _scenario(folder: Path, point: str) -> dict[str, object]:
    folder.mkdir(parents=True)
    first = _train(folder, point)
    payloads: dict[str, set[str]] = {}
    resumed = _train(folder, None)
    accounts, _, _ = read_ledger(folder / "ledger.jsonl")
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "release":
            payloads.setdefault(entry["key"], set()).add(entry["payload"])
    return {
        "point": point,
        "first": first,
        "resumed": resumed,
        "reserved": [account.reserved for account in accounts],
        "released": [account.released for account in accounts],
        "reopened": sum(account.reopened for account in accounts),
        "failed": sum(account.failed for account in accounts),
        "most_payloads_of_a_key": max(map(len, payloads.values())),
        "noise_draws": (folder / "noise.log").read_text().count("noised"),
        "weights": (folder / "train" / "weights.safetensors").is_file(),
        "leftovers": [str(path) for path in folder.rglob(".*.tmp")],
        "error": (folder / "error.txt").read_text() if (folder / "error.txt").is_file() else "",
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    _RECIPE = load_recipe("digits", _SETTINGS)
    _warm = Path(sys.argv[1]) / "warm"
    train_in_process(_RECIPE, _warm, run="warm", report=lambda row: None)  # imports and calibration, once for all forks
    for number, name in enumerate(sys.argv[2:]):
        print(json.dumps(_scenario(Path(sys.argv[1]) / str(number), name)), flush=True)  # noqa: T201  # its answer
