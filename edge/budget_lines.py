"""What `tacit budget` prints."""

from __future__ import annotations

import math
import shutil
import textwrap
from typing import TYPE_CHECKING

from tacit.edge.wording import epsilon, plain
from tacit.federated.accounting import spend
from tacit.federated.accounts import ADVERSARY, Account, spend_of

if TYPE_CHECKING:
    from tacit.edge.budget_plan import BudgetPlan  # brings torch, which showing a ledger does not need

__all__ = ["account_lines", "account_rows", "guarantee_lines", "plan_lines", "wrapped"]

Row = dict[str, object]


def account_rows(accounts: list[Account], delta: float | None) -> list[Row]:
    """What each account comes to, for scripts and for the lines below.

    Args:
        accounts: of one or more ledgers.
        delta: at which ε is stated; each account's own, or 1e-5, when None.
    """
    rows: dict[int, Row] = {}
    deltas = [delta or account.delta or 1e-5 for account in accounts]
    for at in sorted(set(deltas)):
        chosen = [place for place, found in enumerate(deltas) if found == at]
        costs = spend_of([accounts[place] for place in chosen], at, with_prv=False)
        for place, cost in zip(chosen, costs, strict=True):
            rows[place] = _row(accounts[place], at) | {
                "epsilon": cost.epsilon,
                "epsilon_rdp": cost.epsilon_rdp,
                "accountant": cost.accountant,
            }
    return [rows[place] for place in range(len(accounts))]


def _row(account: Account, delta: float) -> Row:
    return {
        "owner": account.owner,
        "source": account.source,
        "status": account.status,
        "unit": account.unit,
        "relation": account.relation,
        "adversary": ADVERSARY[account.unit],
        "delta": delta,
        "budget": account.opening.epsilon if account.opening else None,
        "steps": sum(account.history.values()),
        "runs": len(account.runs),
        "reserved": account.reserved,
        "released": account.released,
        "failed": account.failed,
        "reopened": account.reopened,
        "extract_of": account.extract_of,
        "cohorts": [
            {
                "until": cohort.until,
                "reason": cohort.reason,
                "epsilon": spend(cohort.history, delta, with_prv=False).epsilon,
            }
            for cohort in account.cohorts
        ],
    }


def account_lines(rows: list[Row]) -> list[str]:
    """A table, or on a narrow terminal a paragraph for each account."""
    sources = {row["source"] for row in rows}
    names = [str(row["owner"]) if len(sources) < 2 else f"{row['owner']}/{row['source']}" for row in rows]
    wide = _width() >= 64
    column = max([12, *map(len, names)])
    lines = [f"{'owner':<{column}} {'ε':>7} {'steps':>6} {'released':>9} {'failed':>7} {'reopened':>9}"] if wide else []
    for name, row in zip(names, rows, strict=True):
        counts = [row[key] for key in ("steps", "released", "failed", "reopened")]
        if wide:
            steps, released, failed, reopened = counts
            lines.append(f"{name:<{column}} {row['epsilon']:>7.3f} {steps:>6} {released:>9} {failed:>7} {reopened:>9}")
        else:
            text = "{} steps, {} released, {} failed, {} reopened".format(*counts)
            lines.append(wrapped(f"{name}: ε {row['epsilon']:.3f}, {text}"))
    return lines


def guarantee_lines(rows: list[Row]) -> list[str]:
    """What every ε in the table depends on, and what was declared about the data."""
    if not rows:
        return ["nothing charged"]
    levels = {(row["unit"], row["relation"], row["delta"], row["adversary"], row["status"]): row for row in rows}
    lines = []
    for unit, relation, delta, adversary, status in sorted(levels, key=str):
        accountants = ", ".join(sorted({str(row["accountant"]) for row in rows}))
        lines.append(
            wrapped(
                f"{unit} level, {relation}, δ = {delta:g}, {accountants}; every reservation counts; "
                f"against {adversary}; {_STATUS.get(str(status), 'whether the data are private is not stated')}"
            )
        )
    lines += [wrapped(line) for row in rows for line in _history_lines(row)]
    return lines


_STATUS = {
    "private": "private data: all runs over them are added up",
    "public-benchmark": "public benchmark data: of this run only, ε describes the mechanism",
}


def _history_lines(row: Row) -> list[str]:
    name, cohorts, runs = f"{row['owner']}/{row['source']}", row["cohorts"], row["runs"]
    lines = []
    if isinstance(runs, int) and runs > 1:
        # Between a filter's start and its end no ε holds for runs that were chosen by what earlier ones gave.
        budget = f", ε = {row['budget']:g} when the account was opened" if row["budget"] else ""
        lines.append(
            f"{name}: {runs} runs; ε is of a plan fixed in advance; where a run was chosen by what earlier ones gave, "
            f"what holds is the budget{budget}"
        )
    for cohort in cohorts if isinstance(cohorts, list) else []:
        lines.append(
            f"{name}: new cohort declared {cohort['until']}: {cohort['reason']} (ε {cohort['epsilon']:.3f} before it)"
        )
    return lines


def plan_lines(plan: BudgetPlan) -> list[str]:
    """A plan as tables that fit 40 columns, and what every ε in them depends on."""
    recipe, accesses = plan.planned, "access" if plan.events_per_round == 1 else "accesses"
    lines = [
        wrapped(
            f"as the recipe is: ε = {epsilon(recipe.epsilon)} after {plain(recipe.rounds)} rounds of "
            f"{plan.events_per_round} {accesses}, with z = {_upwards(recipe.noise_multiplier)}, "
            f"q = {plain(plan.sample_rate)}, C = {plain(plan.max_grad_norm)}"
        ),
        "",
        f"{'round':>10} {'ε so far':>12}",
        *(f"{figure.rounds:>10,} {epsilon(figure.epsilon):>12}" for figure in plan.curve),
    ]
    if plan.noise_for_epsilon:
        lines += ["", f"{'ε':>10} {'noise z':>12}  for {plain(recipe.rounds)} rounds"]
        lines += [f"{epsilon(f.epsilon):>10} {_upwards(f.noise_multiplier):>12}" for f in plan.noise_for_epsilon]
    if plan.rounds_for_noise:
        lines += ["", f"{'noise z':>10} {'rounds':>12}  for ε = {epsilon(plan.budget)}"]
        lines += [f"{plain(f.noise_multiplier):>10} {f.rounds:>12,}" for f in plan.rounds_for_noise]
    figures = (recipe, *plan.curve, *plan.noise_for_epsilon, *plan.rounds_for_noise)
    accountants = ", ".join(sorted({figure.accountant for figure in figures}))
    guarantee = f"{plan.unit} level, {plan.relation}, δ = {plain(plan.delta)}, {accountants}; against {plan.adversary}"
    return [*lines, "", wrapped(guarantee), *(wrapped(f"note: {note}") for note in plan.notes)]


def _upwards(noise: float) -> str:
    """Three decimals, rounded up: what is typed into a recipe must be enough."""
    return f"{math.ceil(noise * 1000 - 1e-6) / 1000:.3f}"


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def wrapped(text: str) -> str:
    """A line as it fits the terminal."""
    return (
        "\n".join(
            textwrap.wrap(
                text, max(_width(), 20), subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
        )
        or text
    )
