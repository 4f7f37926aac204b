"""What a recipe's noise costs and what its budget buys: the numbers and the picture of `tacit budget plan`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tacit.devices.durable import write_durably
from tacit.edge.planning import delta_note, evaluation_of, mechanism_of
from tacit.edge.recipe import Recipe, RecipeRefused
from tacit.edge.wording import plain
from tacit.federated.accounting import Event, merge, reported_epsilon, spend
from tacit.federated.accounts import ADVERSARY
from tacit.federated.mechanism import Mechanism

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BudgetPlan", "Figure", "draw_plan", "plan_budget"]

_GRID, _GRID_ERROR = 1e-3, 0.02  # of the PLD: coarser than a report's, and never below it
_MOST_ROUNDS = 1_000_000  # as many as a recipe may have
_CURVE_POINTS = 14
_INK, _LINES, _SERIES, _BUDGET = "#1b1f24", "#d9dde2", "#2f5fd0", "#b4540a"  # as in the report's charts


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One ε, with everything it depends on that the plan does not share.

    Attributes:
        epsilon: rounded up by its grid, never down.
        noise_multiplier: z.
        rounds: participations.
        accountant: which gave it.
    """

    epsilon: float
    noise_multiplier: float
    rounds: int
    accountant: str


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What a recipe spends, and what else its budget could be spent on.

    Attributes:
        unit: of privacy; also `relation`, `adversary` and `delta`, for every ε here.
        sample_rate: q.
        max_grad_norm: C; where it is learned, its beginning.
        reference_size: records of an owner, or clients, that sums are divided by.
        events_per_round: accesses of one participation.
        budget: ε of the recipe, or what its noise comes to.
        planned: the recipe as it is.
        curve: after some of its rounds, the first and the last included.
        noise_for_epsilon: the noise that an ε needs over the recipe's rounds.
        rounds_for_noise: the most rounds that the budget allows with a noise; 0 where it allows none.
        tradeoff: ε of the recipe's rounds with less and more noise, for the picture.
        notes: what a reader should know.
    """

    unit: str
    relation: str
    adversary: str
    delta: float
    sample_rate: float
    max_grad_norm: float
    reference_size: int
    events_per_round: int
    budget: float
    planned: Figure
    curve: tuple[Figure, ...]
    noise_for_epsilon: tuple[Figure, ...]
    rounds_for_noise: tuple[Figure, ...]
    tradeoff: tuple[Figure, ...]
    notes: tuple[str, ...]


def plan_budget(
    recipe: Recipe, *, epsilons: Sequence[float] = (), noises: Sequence[float] = (), picture: bool = False
) -> BudgetPlan:
    """Plans a recipe's budget; evaluations that the recipe asks for are part of every figure.

    Args:
        recipe: resolved.
        epsilons: what noise does each need?
        noises: how many rounds does each noise multiplier allow?
        picture: also compute what only the picture shows.

    Raises:
        RecipeRefused: nothing is guaranteed, so there is nothing to plan.
        ValueError: an ε that no noise reaches.
    """
    if recipe.privacy.unit == "none":
        raise RecipeRefused(
            "expected a recipe with a guarantee, got privacy.unit='none'; set it to record, client or local"
        )
    mechanism = mechanism_of(recipe)
    planned = _exact(recipe, mechanism)
    budget = recipe.privacy.epsilon or planned.epsilon
    rounds, noise = mechanism.rounds, mechanism.noise_multiplier
    chosen = sorted({round(1 + (rounds - 1) * i / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)} - {rounds})
    return BudgetPlan(
        unit=mechanism.unit,
        relation=mechanism.relation,
        adversary=ADVERSARY[mechanism.unit],
        delta=mechanism.delta,
        sample_rate=mechanism.sample_rate,
        max_grad_norm=mechanism.max_grad_norm,
        reference_size=mechanism.reference_size,
        events_per_round=mechanism.events_per_round,
        budget=budget,
        planned=planned,
        curve=(*(_figure(recipe, mechanism, noise, until, of=rounds) for until in chosen), planned),
        noise_for_epsilon=tuple(_noise_for(recipe, mechanism, epsilon) for epsilon in epsilons),
        rounds_for_noise=tuple(_rounds_for(recipe, mechanism, noise, budget) for noise in noises),
        tradeoff=_tradeoff(recipe, mechanism, planned) if picture else (),
        notes=tuple(_notes(recipe, mechanism)),
    )


def _history(recipe: Recipe, mechanism: Mechanism, noise: float, rounds: int, of: int) -> dict[Event, int]:
    """The first rounds of a run of so many, its evaluations included."""
    training = Event(sample_rate=mechanism.sample_rate, noise_multiplier=noise)
    every = recipe.federated.evaluate_every
    of_run = recipe.model_copy(update={"federated": recipe.federated.model_copy(update={"rounds": of})})
    evaluation = evaluation_of(of_run, replace(mechanism, noise_multiplier=noise))
    charged = {} if evaluation is None else evaluation.plan
    if charged and rounds < of:
        charged = dict.fromkeys(charged, rounds // every)
    return merge([(training, rounds * mechanism.events_per_round), *charged.items()])


def _figure(
    recipe: Recipe, mechanism: Mechanism, noise: float, rounds: int, *, of: int | None = None, grid: float = _GRID
) -> Figure:
    history = _history(recipe, mechanism, noise, rounds, of or rounds)
    epsilon = reported_epsilon(history, mechanism.delta, discretisation=grid)
    return Figure(epsilon=epsilon, noise_multiplier=noise, rounds=rounds, accountant=_accountant(epsilon))


def _exact(recipe: Recipe, mechanism: Mechanism) -> Figure:
    noise, rounds = mechanism.noise_multiplier, mechanism.rounds
    found = spend(_history(recipe, mechanism, noise, rounds, rounds), mechanism.delta, with_prv=False)
    return Figure(epsilon=found.epsilon, noise_multiplier=noise, rounds=rounds, accountant=found.accountant)


def _accountant(epsilon: float) -> str:
    """The one that a report would name: RDP above 50."""
    pld = spend({}, 1e-5, with_prv=False).accountant
    return pld.replace("PLD", "RDP") if epsilon > 50.0 else pld


def _noise_for(recipe: Recipe, mechanism: Mechanism, epsilon: float) -> Figure:
    evaluation = evaluation_of(recipe, mechanism)
    calibrated = mechanism.calibrated(epsilon, also=evaluation.plan if evaluation else None)
    return _figure(recipe, mechanism, calibrated.noise_multiplier, mechanism.rounds)


def _rounds_for(recipe: Recipe, mechanism: Mechanism, noise: float, budget: float) -> Figure:
    figures = {0: Figure(epsilon=0.0, noise_multiplier=noise, rounds=0, accountant=_accountant(0.0))}

    def within(rounds: int) -> bool:
        figures[rounds] = _figure(recipe, mechanism, noise, rounds)
        if 0.0 < figures[rounds].epsilon - budget < _GRID_ERROR:
            figures[rounds] = _figure(recipe, mechanism, noise, rounds, grid=_GRID / 10.0)
        return figures[rounds].epsilon <= budget

    low, high = 0, mechanism.rounds
    while high <= _MOST_ROUNDS and within(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return figures[low]


def _tradeoff(recipe: Recipe, mechanism: Mechanism, planned: Figure) -> tuple[Figure, ...]:
    """Around the recipe's own, as far as a reader may want to go: ε from about 25 down to 0.2."""
    figures, least = [planned], min(0.2, planned.epsilon / 5.0)
    for step in (-1, 1):
        for factor in (1.5 ** (step * power) for power in range(1, 11)):
            found = _figure(recipe, mechanism, planned.noise_multiplier * factor, mechanism.rounds)
            if not least <= found.epsilon <= max(25.0, 2.0 * planned.epsilon):
                break
            figures.append(found)
    return tuple(sorted(figures, key=lambda figure: figure.epsilon))


def _notes(recipe: Recipe, mechanism: Mechanism) -> list[str]:
    loose = delta_note(mechanism)
    notes = [loose] if loose else []
    if recipe.privacy.clip == "adaptive":
        notes.append("C is where the learned clipping norm begins; what it becomes does not change ε")
    if recipe.federated.evaluate_every:
        notes.append("evaluations on owners' records are part of every ε")
    return notes


# The picture.


def draw_plan(plan: BudgetPlan, path: Path) -> None:
    """Draws noise against ε, and ε against rounds.

    Args:
        plan: of `plan_budget`, with `picture`.
        path: a .svg or .png file.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    target = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "tacit", "font.size": 11, "text.color": _INK, "axes.labelcolor": _INK})
        figure = Canvas(figsize=(10.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_noise(left, plan)
        _draw_rounds(right, plan)
        accountants = ", ".join(sorted({found.accountant for found in (*plan.curve, *plan.tradeoff)}))
        figure.supxlabel(
            f"{plan.unit} level, {plan.relation}, δ = {plain(plan.delta)}, {accountants}\nagainst {plan.adversary}",
            fontsize=9.5,
        )
        metadata = {"Date": None, "Creator": None} if path.suffix.lower() == ".svg" else {"Software": None}
        figure.savefig(target, format=path.suffix[1:].lower(), dpi=150, facecolor="white", metadata=metadata)
    write_durably(path, target.getvalue())


def _draw_noise(axes: Axes, plan: BudgetPlan) -> None:
    _frame(axes, f"Noise for an ε, over {plan.planned.rounds:,} rounds", "ε", "noise multiplier z")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([f.epsilon for f in plan.tradeoff], [f.noise_multiplier for f in plan.tradeoff], color=_SERIES, lw=2)
    for found in (plan.planned, *plan.noise_for_epsilon):
        place, own = (found.epsilon, found.noise_multiplier), found is plan.planned
        text = f"{'recipe: ' if own else ''}ε {_up(found.epsilon, 2)}, z {_up(found.noise_multiplier, 2)}"
        axes.plot(*([value] for value in place), marker="o", ms=7, color=_SERIES)
        # The curve falls from left to right, so that above right and below left are free.
        offset, side = ((-9, -12), "right") if own else ((8, 7), "left")
        axes.annotate(text, place, offset, textcoords="offset points", fontsize=10, color=_INK, ha=side)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: plain(float(value)))
        axis.set_minor_formatter(lambda value, _: plain(float(value)) if _leads(value) in (2, 5) else "")


def _draw_rounds(axes: Axes, plan: BudgetPlan) -> None:
    _frame(axes, f"ε over the rounds, with z = {_up(plan.planned.noise_multiplier, 2)}", "round", "ε spent")
    axes.plot([f.rounds for f in plan.curve], [f.epsilon for f in plan.curve], color=_SERIES, lw=2, marker="o", ms=4)
    axes.axhline(plan.budget, color=_BUDGET, lw=1.5, ls="--")
    first = (plan.curve[0].rounds, plan.budget)
    axes.annotate(f"budget ε {_up(plan.budget, 2)}", first, (0, 6), textcoords="offset points", color=_BUDGET)
    axes.set_ylim(0, plan.budget * 1.15)


def _frame(axes: Axes, title: str, x: str, y: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINES)
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    axes.grid(color=_LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11.5, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _leads(value: float) -> int:
    """The first digit of a number."""
    return int(f"{value:e}"[0])


def _up(value: float, digits: int) -> str:
    """Rounded up: neither an ε nor the noise that it needs is made to look smaller."""
    scale = 10.0**digits
    return f"{math.ceil(value * scale - 1e-7) / scale:.{digits}f}"
