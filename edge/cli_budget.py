"""`tacit budget`: what a ledger says has been spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

if TYPE_CHECKING:
    from tacit.federated.accounts import Account

__all__ = ["register"]


def register(app: App) -> None:
    """Adds the commands."""
    budget = App(name="budget", help="What owners' data have been charged.")
    budget.command(show)
    budget.command(verify)
    app.command(budget)


def show(ledger: Path, /, *, delta: Annotated[float | None, Parameter(help="The δ of ε.")] = None) -> Outcome:
    """Show what each owner's data have been charged.

    Args:
        ledger: A ledger.jsonl, or a run directory.
        delta: At which ε is stated; the run's own, or 1e-5.
    """
    from tacit.edge.recipe import RecipeInvalid
    from tacit.federated.accounts import ADVERSARY

    if delta is not None and not 0.0 < delta < 1.0:
        raise RecipeInvalid(f"expected 0 < delta < 1, got {delta}", "--delta")
    at = delta or _planned_delta(ledger)
    read = _read(ledger)
    rows = _rows([account for accounts, _, _ in read for account in accounts], at)
    notes = [note for _, _, note in read if note]
    lines = [f"{'owner':<12} {'ε':>7} {'steps':>6} {'released':>9} {'failed':>7} {'reopened':>9}"]
    lines += [
        f"{r['owner']:<12} {r['epsilon']:>7.3f} {r['steps']:>6} {r['released']:>9} {r['failed']:>7} {r['reopened']:>9}"
        for r in rows
    ]
    accountants = ", ".join(sorted({str(row["accountant"]) for row in rows}))
    levels = sorted({(str(row["unit"]), str(row["relation"])) for row in rows})
    lines += [
        f"{unit} level, {relation}, δ = {at:g}, {accountants}; every reservation counts;\nagainst {ADVERSARY[unit]}"
        for unit, relation in levels
    ] or ["nothing charged"]
    lines += [f"note: {note}" for note in notes]
    data = {"accounts": rows, "heads": [head for _, head, _ in read], "notes": notes}
    return Outcome(text="\n".join(lines), data=data)


def verify(ledger: Path, /) -> Outcome:
    """Check that a ledger's chain holds.

    Args:
        ledger: A ledger.jsonl, or a run directory.
    """
    read = _read(ledger)
    entries = sum(a.reserved + a.released + a.failed + a.reopened for accounts, _, _ in read for a in accounts)
    owners = sum(len(accounts) for accounts, _, _ in read)
    heads, notes = [head for _, head, _ in read], [note for _, _, note in read if note]
    lines = [f"{ledger}: {entries} entries of {owners} accounts hold; head {' '.join(heads)}"]
    lines += [f"note: {note}" for note in notes]
    data = {"entries": entries, "accounts": owners, "heads": heads, "notes": notes}
    return Outcome(text="\n".join(lines), data=data)


def _read(path: Path) -> list[tuple[list[Account], str, str | None]]:
    from tacit.edge.recipe import RecipeInvalid
    from tacit.federated.accounts import find_ledgers, read_ledger

    found = find_ledgers(path)
    if not found:
        raise RecipeInvalid("expected a ledger.jsonl or a run directory with one, got neither", str(path))
    return [read_ledger(ledger) for ledger in found]


def _planned_delta(ledger: Path) -> float:
    from tacit.edge.recipe import load_recipe

    beside = (ledger if ledger.is_dir() else ledger.parent) / "recipe.toml"
    return load_recipe(beside).privacy.delta if beside.is_file() else 1e-5


def _rows(accounts: list[Account], delta: float) -> list[dict[str, object]]:
    from tacit.federated.accounts import ADVERSARY, spend_of

    costs = spend_of(accounts, delta, with_prv=False)
    return [
        {
            "owner": account.owner,
            "source": account.source,
            "unit": account.unit,
            "relation": account.relation,
            "adversary": ADVERSARY[account.unit],
            "epsilon": cost.epsilon,
            "delta": delta,
            "accountant": cost.accountant,
            "steps": sum(account.history.values()),
            "reserved": account.reserved,
            "released": account.released,
            "failed": account.failed,
            "reopened": account.reopened,
        }
        for account, cost in zip(accounts, costs, strict=True)
    ]
