"""`tacit budget`: what a ledger says has been spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

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
    from tacit.edge.recipe import RecipeInvalid, load_recipe
    from tacit.federated.accounting import spend
    from tacit.federated.ledger import read_ledger

    path = _find(ledger)
    if delta is not None and not 0.0 < delta < 1.0:
        raise RecipeInvalid(f"expected 0 < delta < 1, got {delta}", "--delta")
    beside = path.parent / "recipe.toml"
    at = delta or (load_recipe(beside).privacy.delta if beside.is_file() else 1e-5)
    accounts, head, note = read_ledger(path)
    known = {frozenset(a.history.items()): a.history for a in accounts}
    costs = {key: spend(history, at) for key, history in known.items()}
    rows = []
    for account in accounts:
        cost = costs[frozenset(account.history.items())]
        rows.append(
            {
                "owner": account.owner,
                "source": account.source,
                "epsilon": cost.epsilon,
                "delta": at,
                "accountant": cost.accountant,
                "steps": sum(account.history.values()),
                "reserved": account.reserved,
                "released": account.released,
                "failed": account.failed,
                "reopened": account.reopened,
            }
        )
    lines = [f"{'owner':<12} {'ε':>7} {'steps':>6} {'released':>9} {'failed':>7} {'reopened':>9}"]
    lines += [
        f"{r['owner']:<12} {r['epsilon']:>7.3f} {r['steps']:>6} {r['released']:>9} {r['failed']:>7} {r['reopened']:>9}"
        for r in rows
    ]
    accountants = ", ".join(sorted({str(row["accountant"]) for row in rows})) or "nothing charged"
    lines.append(f"record level, add/remove, δ = {at:g}, {accountants}; every reservation counts")
    lines += [f"note: {note}"] if note else []
    return Outcome(text="\n".join(lines), data={"accounts": rows, "head": head, "note": note})


def verify(ledger: Path, /) -> Outcome:
    """Check that a ledger's chain holds.

    Args:
        ledger: A ledger.jsonl, or a run directory.
    """
    from tacit.federated.ledger import read_ledger

    path = _find(ledger)
    accounts, head, note = read_ledger(path)
    entries = sum(a.reserved + a.released + a.failed + a.reopened for a in accounts)
    text = f"{path}: {entries} entries of {len(accounts)} accounts hold; head {head}"
    return Outcome(
        text=text + (f"\nnote: {note}" if note else ""),
        data={"entries": entries, "accounts": len(accounts), "head": head, "note": note},
    )


def _find(path: Path) -> Path:
    from tacit.edge.recipe import RecipeInvalid

    found = path / "ledger.jsonl" if path.is_dir() else path
    if not found.is_file():
        raise RecipeInvalid("expected a ledger.jsonl or a run directory with one, got neither", str(path))
    return found
