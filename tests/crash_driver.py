"""Runs crash scenarios in forked children of one warm process; prints one JSON line a scenario. Used by test_crash.py.

Usage: python crash_driver.py FOLDER SETUP [SCENARIO...]. A setup is a unit and what else is on, with "+" between, as in
`record+evaluate`. A scenario is a list of failpoints, `name:nth=action`, with commas between: one process after another
dies, each at its own; "" lets the first one live. `name@seed` draws such a list for a failpoint, `*@from-to` for every
failpoint that the setup comes to and each of these seeds. The first line that is printed says how often each failpoint
was reached in a run that nothing disturbed.

What the ledger says is compared with what was really drawn. Generators are made to remember what they were asked for,
and the three places that add noise write it down when the noise is there, with a digest of what it went into. So is
what a server gets to see. A draw whose result nobody saw has told nobody anything.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tacit.devices import failpoint
from tacit.edge import composition, flower_app
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated import client_app, mechanism
from tacit.federated.accounts import read_ledger
from tacit.federated.averaging import from_record
from tacit.federated.client_app import OwnerGate
from tacit.federated.cohorts import ServerCharge
from tacit.federated.datasets import find_task
from tacit.federated.extract import check_extract
from tacit.federated.grid import InProcessGrid
from tacit.federated.noise import SecretGenerator
from tacit.federated.secure_noise import SecureGenerator
from tacit.federated.task import Data, Task

ROUNDS, OWNERS, CLIP = 4, 3, 0.5
SETTINGS = (
    f"federated.rounds={ROUNDS}",
    f"federated.owners={OWNERS}",
    "federated.partition=iid",
    "federated.local_steps=2",
    "model.channels=[4]",
    f"privacy.max_grad_norm={CLIP}",
    "report.twin=false",
)
OF_UNIT = {
    "record": ("privacy.sample_rate=0.1",),
    # Little noise: a learned clip wants cohorts that are large against it, and here is no accuracy to protect.
    "client": ("privacy.sample_rate=0.9", f"privacy.reference_size={OWNERS}", "privacy.noise_multiplier=0.3"),
    "local": (),
}
OPTIONS = {
    "evaluate": ("federated.evaluate_every=2",),
    "hardened": ("privacy.noise=hardened",),
    "adaptive": ("privacy.clip=adaptive",),
    "each": (),  # a ledger and a gate for each owner, as where owners are processes of their own
    "home": ("federated.partition=natural",),  # private data, whose ledgers are in $TACIT_HOME
    "blocks": (),  # each payload is too large to wait for the others
    "thrifty": (),  # half the noise that is charged: what the comparison is there to notice
}
COUNTS = 2  # numbers of an evaluation; no model has as few parameters


def main() -> None:
    torch.set_num_threads(1)
    folder, (unit, *options) = Path(sys.argv[1]), sys.argv[2].split("+")
    settings = [f"privacy.unit={unit}", *SETTINGS, *OF_UNIT[unit], *(s for option in options for s in OPTIONS[option])]
    run = Run(unit, frozenset(options), load_recipe("digits", settings))
    reached = run.undisturbed(folder / "warm")
    print(json.dumps(reached), flush=True)  # noqa: T201  # its answer
    for number, points in enumerate(chosen(sys.argv[3:], reached)):
        row = run.scenario(folder / str(number), points.split(","))
        print(json.dumps({"points": points, **row}), flush=True)  # noqa: T201  # its answer


def chosen(scenarios: Iterable[str], reached: Mapping[str, int]) -> Iterator[str]:
    """Scenarios as they are, or drawn."""
    for scenario in scenarios:
        name, at, seeds = scenario.partition("@")
        first, _, last = seeds.partition("-")
        numbers = range(int(first), int(last or first) + 1) if at else ()
        yield from [
            drawn(one, seed, reached) for one in (sorted(reached) if name == "*" else [name]) for seed in numbers
        ]
        if not at:
            yield scenario


def drawn(name: str, seed: int, reached: Mapping[str, int]) -> str:
    """Which time at a failpoint kills, where the process that takes the run up dies too, and sometimes a third one."""
    dice = random.Random(f"{name} {seed} {sorted(reached.items())}")
    points = [f"{name}:{dice.randint(1, reached[name])}"]
    if seed % 5 == 0:  # at the same place each time: the newest reservation has no life left
        points += [f"{name}:1", f"{name}:1"]
    else:
        others = dice.choices(sorted(reached), k=1 + (seed % 4 == 0))
        points += [f"{other}:{dice.randint(1, (reached[other] + 1) // 2)}" for other in others]
    return ",".join(f"{point}=kill" for point in points)


class Run:
    """One setup, from scenario to scenario."""

    def __init__(self, unit, options, recipe):
        self.unit, self.options, self.recipe = unit, options, recipe

    def undisturbed(self, folder: Path) -> dict[str, int]:
        """Imports and calibrates once for all forks; returns how often each failpoint was reached."""
        failpoint._armed.update(dict.fromkeys(failpoints(), (-1, "exit")))
        self.train(folder)
        counts = dict(failpoint._counts)
        failpoint._armed.clear()
        failpoint._counts.clear()
        return counts

    def train(self, folder: Path) -> None:
        os.environ["TACIT_HOME"] = str(folder / "home")
        if "blocks" in self.options:
            client_app.CohortGate.much_bytes = 1
        if "home" in self.options:
            composition.task_of = private_task
        if "each" not in self.options:
            flower_app.train_in_process(self.recipe, folder, run="crash", report=lambda row: None)
            return
        made = flower_app.compose(self.recipe, folder)

        def gate(name: str) -> OwnerGate:
            return OwnerGate(lambda: flower_app._simulated_ledger(made, folder / "owners" / name))

        owners = [replace(owner, gate=gate(owner.name)) for owner in made.owners]
        contexts = {owner.index + 2: flower_app._context(owner.index, len(owners)) for owner in owners}
        grid = InProcessGrid(client_app.make_client_app(flower_app._by_partition(owners)), contexts)
        plan = flower_app.server_plan(made, folder / "train", run="crash", report=lambda row: None, ledger=None)
        flower_app.make_server_app(lambda _: plan)(grid, flower_app._context(-1, len(owners)))

    def in_a_child(self, folder: Path, point: str) -> int:
        """Trains in a forked child; returns how it ended (negative: by that signal)."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 0
        try:
            if point:
                os.environ["TACIT_FAILPOINT"] = point
                failpoint.arm()
            if "thrifty" in self.options:
                save_noise()
            Witness(folder / "witness.jsonl", self.unit).watch()
            self.train(folder)
        except BaseException as error:  # noqa: BLE001  # reported to the test, whatever it was
            (folder / "error.txt").write_text(repr(error))
            code = 1
        finally:
            os._exit(code)

    def scenario(self, folder: Path, points: list[str]) -> dict[str, object]:
        folder.mkdir(parents=True)
        died = [self.in_a_child(folder, point) for point in points]
        resumed = self.in_a_child(folder, "")
        ledgers = sorted([*folder.glob("home/ledgers/*/*.jsonl"), *folder.glob("owners/*/ledger.jsonl")])
        ledgers = ledgers or [folder / "ledger.jsonl"]
        accounts = [account for ledger in ledgers for account in read_ledger(ledger)[0]]
        rounds = folder / "train" / "rounds.jsonl"
        return {
            "died": died,
            "resumed": resumed,
            "error": (folder / "error.txt").read_text() if (folder / "error.txt").is_file() else "",
            "charged": {
                account.owner: [[e.sample_rate, e.noise_multiplier, n] for e, n in account.history.items()]
                for account in accounts
            },
            **{
                name: [getattr(account, name) for account in accounts]
                for name in ("reserved", "released", "reopened", "failed")
            },
            "most_payloads_of_a_key": most_payloads(ledgers),
            **seen(folder / "witness.jsonl", self.unit),
            "weights": (folder / "train" / "weights.safetensors").is_file(),
            "rounds": [json.loads(line) for line in rounds.read_text().splitlines()] if rounds.is_file() else [],
            "leftovers": [path.relative_to(folder).as_posix() for path in folder.rglob(".*.tmp")],
            "extract": check_extract(folder / "ledger.jsonl", folder / "home") if "home" in self.options else [],
        }


class Witness:
    """Writes down what is drawn, what it goes into and what leaves; what a `kill -9` ends is on record until then."""

    def __init__(self, log: Path, unit: str) -> None:
        self._file, self._unit = log.open("ab", buffering=0), unit
        self._coins: list[float] = []
        self._gaussians: list[tuple[int, float]] = []
        self._bound = CLIP
        self._events: list[list[float]] = []

    def watch(self) -> None:
        """Puts itself between the product and its generators, its noise and its border."""
        for generator in (SecretGenerator, SecureGenerator):
            generator.bernoulli = self._remembering(generator.bernoulli, lambda _, q: self._coins.append(q))
            generator.gaussian = self._remembering(
                generator.gaussian, lambda count, sd: self._gaussians.append((count, sd))
            )
        for name in ("_add_noise", "_add_noise_to_arrays", "secure_noisy_sum"):
            setattr(mechanism, name, self._noting(getattr(mechanism, name)))
        average, release, charged = (
            mechanism.Mechanism.noisy_average,
            ServerCharge.release,
            client_app.under_charge,
        )
        send = InProcessGrid.send_and_receive

        def noisy_average(made, updates, like, randomness, **stated):
            # A learned clip is public: the round's own C is what the noise must follow.
            self._bound = CLIP if stated.get("clip_norm") is None else stated["clip_norm"]
            return average(made, updates, like, randomness, **stated)

        def under_charge(gate, request, compute):
            return charged(gate, request, self._making(request.owner, request.key, compute))

        def server_release(charge, round_number, compute):
            key = getattr(charge.turn, "key", "")
            released = release(charge, round_number, self._making("server", key, compute))
            if released is not None:
                self._write(left=digest(released))
            return released

        def noted(replies):
            for reply in replies:
                if self._unit != "client" and reply.has_content():  # there the server is the one who noises
                    self._write(left=digest(contents(reply)))
                yield reply

        def send_and_receive(grid, messages, **options):
            return noted(send(grid, messages, **options))

        mechanism.Mechanism.noisy_average = noisy_average
        ServerCharge.release = server_release
        client_app.under_charge = under_charge
        InProcessGrid.send_and_receive = send_and_receive

    def _remembering(self, draw, remember):
        def drawing(generator, count, parameter):
            remember(count, parameter)
            return draw(generator, count, parameter)

        return drawing

    def _noting(self, primitive):
        def noised(*arguments, **options):
            result = primitive(*arguments, **options)
            self._note()
            return result

        return noised

    def _note(self) -> None:
        """An event: the first coins since the last one say at what rate, the newest Gaussians how much noise."""
        if not self._gaussians:
            return  # nothing was drawn, so nothing was noised: no event, and the comparison will show it
        count, sd = self._gaussians[-1]
        bound = (math.sqrt(0.5) if self._unit == "local" else 1.0) if count == COUNTS else self._bound
        multiplier = sd / (bound * (2.0 if self._unit == "local" else 1.0))
        bits = [sd for size, sd in self._gaussians[:-1] if size == 1]  # of ±½ each, in the same event
        if bits:
            multiplier = (multiplier**-2 + (2.0 * bits[-1]) ** -2) ** -0.5
        rate = 1.0 if self._unit == "local" or not self._coins else self._coins[0]
        self._events.append([rate, multiplier])
        self._write(drawn=count)
        self._coins, self._gaussians = [], []

    def _making(self, owner: str, key: str, compute: Callable[[], Mapping[str, object]]):
        def making():
            self._events = []
            result = compute()
            self._write(made=digest(result), owner=owner, key=key, events=self._events)
            return result

        return making

    def _write(self, **fields: object) -> None:
        self._file.write(json.dumps(fields).encode() + b"\n")


def private_task(recipe: Recipe) -> Task:
    """The same data, but somebody's: their ledgers are at home, and outlive the run."""
    task, owners = find_task(recipe.task.name), recipe.federated.owners

    def load() -> Data:
        data = task.load()
        pool = data.private
        return replace(
            data, private=None, status="private", of_owner=lambda i: pool.take(np.arange(i, len(pool), owners))
        )

    return replace(task, load=load)


def save_noise() -> None:
    """A mechanism that adds half the noise that it states."""
    generous = mechanism._add_noise
    mechanism._add_noise = lambda total, sd, randomness: generous(total, sd / 2.0, randomness)


def contents(reply) -> dict[str, object]:
    """The numbers of a reply that may depend on records, as the owner made them."""
    if "arrays" in reply.content.array_records:
        return from_record(reply.content.array_records["arrays"])
    metrics = reply.content.metric_records["metrics"]
    return {"counts": torch.tensor([metrics["right"], metrics["wrong"]]).numpy()}


def digest(arrays: Mapping[str, object]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode() + arrays[name].astype("float32").tobytes())
    return found.hexdigest()


def seen(log: Path, unit: str) -> dict[str, object]:
    """What left, by owner, and how often noise was drawn in all."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    made = {line["made"]: line for line in lines if "made" in line}
    left = [made[found] for found in dict.fromkeys(line["left"] for line in lines if "left" in line)]
    events: dict[str, list[list[float]]] = {}
    for one in left:
        events.setdefault(one["owner"], []).extend(one["events"])
    keys = [one["key"] for one in left]
    return {
        "left": {owner: tallied(found) for owner, found in events.items()},
        "most_results_of_a_key": max(map(keys.count, keys), default=0),
        "made": len(made),
        "noise_draws": sum("drawn" in line for line in lines),
    }


def tallied(events: Iterable[list[float]]) -> list[list[float]]:
    """Each kind of event and how often; multipliers that differ by rounding are one."""
    counts: dict[tuple[float, float], int] = {}
    for rate, multiplier in events:
        kind = (rate, float(f"{multiplier:.6g}"))
        counts[kind] = counts.get(kind, 0) + 1
    return [[*kind, count] for kind, count in counts.items()]


def most_payloads(ledgers: Iterable[Path]) -> int:
    payloads: dict[str, set[str]] = {}
    for line in (line for ledger in ledgers for line in ledger.read_text().splitlines()):
        entry = json.loads(line)
        if entry["kind"] == "release":
            payloads.setdefault(entry["key"], set()).add(entry["payload"])
    return max(map(len, payloads.values()), default=0)


def failpoints() -> list[str]:
    """All named places that training may come to."""
    root = Path(__file__).resolve().parent.parent
    sources = [*(root / "federated").glob("*.py"), root / "devices" / "durable.py"]
    return sorted(
        {name for path in sources for name in re.findall(r'^ +reach\("([a-z_.]+)"\)', path.read_text(), re.M)}
    )


if __name__ == "__main__":
    main()
