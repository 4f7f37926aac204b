"""Kills and resumes runs in forked children of one warm process; prints one JSON line a scenario, for test_resume.py.

Usage: python resume_driver.py FOLDER SCENARIO... A scenario is `setup/name:nth`, a failpoint and which time kills
there; with `+damage` behind it the newest checkpoint is damaged before the run is taken up. `*@from-to` draws, for
every failpoint and each of these seeds, a setup that comes to it and the time that kills. A setup's first line is of
the undisturbed run that the others are compared with, `setup/`, and says how often each failpoint was reached.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch

from tacit.devices import failpoint
from tacit.edge import flower_app
from tacit.edge.recipe import load_recipe

ROUNDS = 6
COMMON = (
    f"federated.rounds={ROUNDS}",
    "federated.owners=4",
    "federated.partition=iid",
    "federated.local_steps=2",
    "federated.batch_rate=0.1",
    "federated.quorum=1",
    "model.family=mlp",
    "model.hidden=[8]",
    "report.twin=false",
    "compression.variants=[]",
)
NONE = ("privacy.unit=none", "privacy.sample_rate=0.1")
# So little noise that ε is far above 50, where a run does without the slower accountants; nothing is claimed here.
RECORD = ("privacy.noise_multiplier=0.2", "privacy.sample_rate=0.4", "federated.evaluate_every=3")
CLIENT = (
    "privacy.unit=client",
    "privacy.noise_multiplier=0.2",
    "privacy.sample_rate=0.7",
    "privacy.clip=adaptive",
    "federated.evaluate_every=3",
)
FEEDBACK = ("federated.strategy=fedavg", "federated.codec=top-k")
FAULTY = (
    "federated.strategy=fedavg",
    "federated.aggregation=median",
    "federated.failures.dropout=0.2",
    "federated.failures.straggler_share=0.3",
    "federated.failures.deadline_s=3.0",
    "federated.failures.corrupt_share=0.25",
)
SETUPS = {
    "fedavgm": (*NONE, "federated.strategy=fedavgm"),
    "fedadam": (*NONE, "federated.strategy=fedadam"),
    "scaffold": (*NONE, "federated.strategy=scaffold"),
    "fedbuff": (*NONE, "federated.strategy=fedbuff", "federated.concurrency=3", "federated.buffer=2"),
    "feedback": (*NONE, *FEEDBACK),
    "ditto": (*NONE, "federated.personal=ditto"),
    "fedbn": (*NONE, "federated.personal=fedbn", "model.family=cnn", "model.channels=[4]"),
    "batch norm": (*NONE, "model.family=cnn", "model.channels=[4]", "model.norm=batch"),
    "local head": (*NONE, "federated.personal=local-head"),
    "q-ffl": (*NONE, "federated.strategy=q-ffl"),
    "failures": (*NONE, *FAULTY, "federated.failures.corruption=random"),
    "replay": (*NONE, *FAULTY, "federated.failures.corruption=replay"),
    "cohort": (*NONE, "federated.cohort=2", "federated.over_selection=1.5"),
    "flower": (*NONE, "federated.strategy=flwr.serverapp.strategy:FedAvg"),
    "augment": (*NONE, 'task.augment=[{ name = "noise", deviation = 0.1 }]', "federated.local_optimizer=adam"),
    "void": RECORD,
    "void feedback": (*RECORD, *FEEDBACK),
    "void client": CLIENT,
    "void local": (*RECORD, "privacy.unit=local", "privacy.sample_rate=1.0"),
}
SHARED = ("model.family", "model.hidden")  # what a family of its own does not take


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for number, (setup, points) in enumerate(chosen(sys.argv[2:], folder)):
        undisturbed(setup, folder)
        say(f"{setup}/{points}", scenario(folder / str(number), setup, points))


def say(name: str, row: dict[str, object]) -> None:
    print(json.dumps({"scenario": name, **row}), flush=True)  # noqa: T201  # its answer


def chosen(scenarios: Iterable[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Setup and failpoint of each scenario, drawn where it says so."""
    for one in scenarios:
        if not one.startswith("*@"):
            yield one.partition("/")[0], one.partition("/")[2]
            continue
        first, _, last = one.removeprefix("*@").partition("-")
        reached = {setup: undisturbed(setup, folder) for setup in SETUPS}
        for name in failpoints():
            among = [setup for setup in SETUPS if reached[setup].get(name)]
            for seed in range(int(first), int(last) + 1):
                dice = random.Random(f"{name} {seed}")
                setup = dice.choice(among)
                yield setup, f"{name}:{dice.randint(1, reached[setup][name])}"


@cache
def recipe(setup: str):
    own = SETUPS[setup]
    other_family = any(setting.startswith("model.family") for setting in own)
    common = [s for s in COMMON if not (other_family and s.startswith(SHARED))]
    return load_recipe("digits", [*common, *own])


@cache
def undisturbed(setup: str, folder: Path) -> dict[str, int]:
    """Imports and calibrates for all forks to come; returns how often each failpoint was reached."""
    failpoint._armed.update(dict.fromkeys(failpoints(), (-1, "exit")))
    train(setup, folder / "undisturbed" / setup, lambda row: None)
    counts = dict(failpoint._counts)
    failpoint._armed.clear()
    failpoint._counts.clear()
    say(f"{setup}/", {"reached": counts, "left": outcome(folder / "undisturbed" / setup)})
    return counts


def train(setup: str, folder: Path, report) -> None:
    seed = 7 if setup.startswith("void") else None
    flower_app.train_in_process(recipe(setup), folder, run="resume", report=report, unsafe_seed=seed)


def in_a_child(setup: str, folder: Path, point: str) -> tuple[int, list[dict[str, object]]]:
    """Trains in a forked child; how it ended (negative: by that signal), and what it reported until then."""
    said = folder / "said.jsonl"
    said.write_bytes(b"")
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, [json.loads(line) for line in said.read_text().splitlines()]
    code = 0
    try:
        if point:
            os.environ["TACIT_FAILPOINT"] = f"{point}=kill"
            failpoint.arm()
        with said.open("ab", buffering=0) as file:
            train(setup, folder, lambda row: file.write(json.dumps(row).encode() + b"\n"))
    except BaseException as error:  # noqa: BLE001  # reported to the test, whatever it was
        (folder / "error.txt").write_text(repr(error))
        code = 1
    finally:
        os._exit(code)


def scenario(folder: Path, setup: str, points: str) -> dict[str, object]:
    folder.mkdir(parents=True)
    point, _, damage = points.partition("+")
    died, before = in_a_child(setup, folder, point)
    if damage:
        newest = max((folder / "train" / "checkpoint").glob("*.safetensors"))
        newest.write_bytes(newest.read_bytes()[:-1])
    resumed, after = in_a_child(setup, folder, "")
    error = folder / "error.txt"
    row = {
        "died": died,
        "resumed": resumed,
        "error": error.read_text() if error.is_file() else "",
        "finished": max((row["round"] for row in before if "round" in row), default=0),
        "again_from": min((row["round"] for row in after if "round" in row), default=ROUNDS + 1),
        "notes": [row["note"] for row in after if "note" in row],
        "left": outcome(folder),
        "leftovers": [path.name for path in folder.rglob(".*.tmp")],
    }
    shutil.rmtree(folder)
    return row


def outcome(folder: Path) -> dict[str, str]:
    """What a run leaves that must be the same: its model, its rounds, and what each owner keeps, by digest."""
    kept = [max(owner.glob("*.safetensors"), default=owner / "none") for owner in sorted(folder.rglob("*.kept"))]
    named = [folder / "train" / "weights.safetensors", folder / "train" / "rounds.jsonl"]
    return {path.relative_to(folder).as_posix(): digest(path) for path in [*named, *kept]}


def failpoints() -> list[str]:
    """All named places that training may come to."""
    root = Path(__file__).resolve().parent.parent
    sources = [*(root / "federated").glob("*.py"), root / "devices" / "durable.py"]
    return sorted(
        {name for path in sources for name in re.findall(r'^ +reach\("([a-z_.]+)"\)', path.read_text(), re.M)}
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"


if __name__ == "__main__":
    main()
