"""What privacy costs: accuracy at ε = 1, 3 and 8 against the same training without noise.

Usage: python benchmarks/accuracy.py [--tasks digits writers] [--runs 3] [--quick] [--json FILE] [--plot FILE.svg].
`digits` is record level (10 owners), `writers` client level (2,000 clients, 200 expected in a round). The peer, `twin`,
is Tacit's own training with the noise left out. --quick: digits alone, once, in 20 rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tacit.edge.flower_app import train_in_process
from tacit.edge.planning import Role, mechanism_of
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated.mechanism import Mechanism

EPSILONS = (1.0, 3.0, 8.0)
# More noise wants smaller steps; chosen on the public benchmark, where choosing costs nothing.
SETTINGS = {("digits", 1.0): ["federated.learning_rate=0.05"], ("digits", 3.0): ["federated.learning_rate=0.1"]}


def main() -> None:
    """Trains every case, prints a table, draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["digits", "writers"])
    parser.add_argument("--runs", type=int, default=3, help="of digits; writers is trained once for each ε")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    tasks = ["digits"] if options.quick else options.tasks
    extra = ["federated.rounds=20"] if options.quick else []
    cases: list[Case] = []
    for task in tasks:
        runs = 1 if options.quick or task == "writers" else options.runs
        cases += _cases(task, runs, extra)
    _print(cases)
    if options.json:
        packages = {name: version(name) for name in ("torch", "flwr", "dp-accounting")}
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
        versions = {"python": sys.version, **packages}
        named = {f"{case.task} ε={case.epsilon:g}": case.to_json() for case in cases}
        content = {"benchmark": "accuracy", "machine": machine, "versions": versions, "cases": named}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        _draw(cases, options.plot)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one task reached at one ε, in %."""

    task: str
    epsilon: float
    reached: tuple[float, ...]
    without: float
    mechanism: Mechanism

    @property
    def mean(self) -> float:
        """Over the runs."""
        return statistics.fmean(self.reached)

    def to_json(self) -> dict[str, object]:
        """As every benchmark writes a case."""
        made = self.mechanism
        return {
            "tacit": self.mean,
            "lowest": min(self.reached),
            "highest": max(self.reached),
            "peers": {"twin": self.without},
            "ratio": {"twin": self.mean / self.without},
            "unit": "% of test records",
            "privacy": {**made.describe(), "epsilon": made.planned_epsilon(), "delta": made.delta, "accountant": "PLD"},
        }


def _cases(task: str, runs: int, extra: Sequence[str]) -> list[Case]:
    seeds = [f"federated.seed={seed}" for seed in range(1, runs + 1)]
    without = statistics.fmean(_accuracy(load_recipe(task, [*extra, seed]), "twin") for seed in seeds)
    cases = []
    for epsilon in EPSILONS:
        settings = [*extra, *SETTINGS.get((task, epsilon), []), f"privacy.epsilon={epsilon}"]
        recipes = [load_recipe(task, [*settings, seed]) for seed in seeds]
        reached = tuple(_accuracy(recipe, "private") for recipe in recipes)
        made = mechanism_of(recipes[0])
        cases.append(Case(task=task, epsilon=epsilon, reached=reached, without=without, mechanism=made))
    return cases


def _accuracy(recipe: Recipe, role: Role) -> float:
    rows: list[float] = []

    def report(row: object) -> None:
        if isinstance(row, dict) and isinstance(row.get("accuracy"), float):
            rows.append(row["accuracy"])
            sys.stderr.write(f"\r{recipe.task.name} {role} round {row['round']}: {row['accuracy']:.1%}   ")

    with tempfile.TemporaryDirectory() as scratch:
        train_in_process(recipe, Path(scratch), run="benchmark", report=report, role=role)
    sys.stderr.write("\n")
    return 100 * rows[-1]


def _print(cases: Sequence[Case]) -> None:
    print("| task | unit | ε | z | accuracy | lowest-highest | without noise |\n|---|---|---|---|---|---|---|")  # noqa: T201  # its purpose
    for case in cases:
        made, low, high = case.mechanism, min(case.reached), max(case.reached)
        print(  # noqa: T201  # its purpose
            f"| {case.task} | {made.unit} | {case.epsilon:g} | {made.noise_multiplier:.3f} | {case.mean:.1f} % | "
            f"{low:.1f}-{high:.1f} | {case.without:.1f} % |"
        )


def _draw(cases: Sequence[Case], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for task, colour, above in (("digits", "#2f6fb0", 8), ("writers", "#c2571a", -16)):
        chosen = [case for case in cases if case.task == task]
        if not chosen:
            continue
        values = [case.mean for case in chosen]
        axes.plot(EPSILONS, values, "o-", color=colour, label=f"{task}, {chosen[0].mechanism.unit} level")
        for epsilon, value in zip(EPSILONS, values, strict=True):
            place = {"xytext": (0, above), "textcoords": "offset points", "ha": "center", "color": colour}
            axes.annotate(f"{value:.1f}", (epsilon, value), **place)
        axes.axhline(chosen[0].without, color=colour, linestyle=":", linewidth=1.2, label=f"{task}, no noise")
    axes.set(xscale="log", xlabel="ε at δ = 1e-5, add/remove, PLD", ylabel="accuracy (%)", ylim=(0, 105))
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
