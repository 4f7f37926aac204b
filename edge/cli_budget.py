"""`tacit budget`: what a recipe will spend, what ledgers say has been spent, and what an owner declares."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

if TYPE_CHECKING:
    from tacit.federated.accounts import Account

__all__ = ["register"]

_PICTURES = (".svg", ".png")


def register(app: App) -> None:
    """Adds the commands."""
    budget = App(name="budget", help="What owners' data will be, and have been, charged.")
    for command in (plan, show, verify, new_cohort):
        budget.command(command)
    app.command(budget)


def plan(
    recipe: str = "digits",
    /,
    *,
    epsilon: Annotated[tuple[float, ...], Parameter(negative="")] = (),
    noise_multiplier: Annotated[tuple[float, ...], Parameter(negative="")] = (),
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    plot: Path | None = None,
) -> Outcome:
    """Show what a recipe will spend: which noise an ε needs, and how many rounds a noise allows.

    Args:
        recipe: A TOML file, a folder with a recipe.toml, or a built-in recipe: digits, writers.
        epsilon: What noise does this ε need? May be repeated.
        noise_multiplier: How many rounds does this noise allow? May be repeated.
        overrides: table.key=value on top of the recipe; may be repeated.
        plot: Also draw both curves into this .svg or .png file.
    """
    from tacit.edge.recipe import RecipeInvalid, load_recipe

    for option, values in (("--epsilon", epsilon), ("--noise-multiplier", noise_multiplier)):
        for value in values:
            if not 0.0 < value < float("inf"):
                raise RecipeInvalid(f"expected a finite number above 0, got {value}", option)
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise RecipeInvalid(f"expected a file that ends in {' or '.join(_PICTURES)}, got {plot}", "--plot")
    resolved = load_recipe(recipe, overrides)

    from tacit.edge.budget_lines import plan_lines
    from tacit.edge.budget_plan import draw_plan, plan_budget

    found = plan_budget(resolved, epsilons=epsilon, noises=noise_multiplier, picture=plot is not None)
    if plot is not None:
        draw_plan(found, plot)
    drawn = [f"drawn: {plot}"] if plot else []
    data = {"recipe": recipe, **asdict(found), "plot": str(plot) if plot else None}
    return Outcome(text="\n".join([*plan_lines(found), *drawn]), data=data)


def show(
    ledger: Path | None = None, /, *, delta: Annotated[float | None, Parameter(help="The δ of ε.")] = None
) -> Outcome:
    """Show what each owner's data have been charged.

    Args:
        ledger: A ledger, a run directory, or a home of ledgers; $TACIT_HOME or ~/.tacit when left out.
        delta: At which ε is stated; the run's own, or the account's, or 1e-5.
    """
    from tacit.edge.budget_lines import account_lines, account_rows, guarantee_lines, wrapped
    from tacit.edge.recipe import RecipeInvalid

    if delta is not None and not 0.0 < delta < 1.0:
        raise RecipeInvalid(f"expected 0 < delta < 1, got {delta}", "--delta")
    place = _place(ledger)
    read = _read(place)
    accounts = [account for found, _, _ in read for account in found]
    rows = account_rows(accounts, delta or _planned_delta(place))
    notes = [note for _, _, note in read if note] + _extract_notes(accounts)
    lines = [*account_lines(rows), *guarantee_lines(rows), *(wrapped(f"note: {note}") for note in notes)]
    data = {"accounts": rows, "heads": [head for _, head, _ in read], "notes": notes}
    return Outcome(text="\n".join(lines), data=data)


def verify(ledger: Path | None = None, /) -> Outcome:
    """Check that a ledger's chain holds, and an extract against the home ledgers.

    Args:
        ledger: A ledger, a run directory, or a home of ledgers; $TACIT_HOME or ~/.tacit when left out.
    """
    from tacit.edge.budget_lines import wrapped
    from tacit.federated.accounts import find_ledgers
    from tacit.federated.chain import parse_chain
    from tacit.federated.extract import check_extract
    from tacit.federated.home import home_folder

    place = _place(ledger)
    read = _read(place)
    accounts = [account for found, _, _ in read for account in found]
    notes = [note for _, _, note in read if note] + _extract_notes(accounts)
    entries = 0
    for (found, _, _), path in zip(read, find_ledgers(place), strict=True):
        entries += len(parse_chain(path.read_bytes(), path)[0])
        if any(account.extract_of for account in found):
            notes += check_extract(path, home_folder())
    heads = [head for _, head, _ in read]
    lines = [wrapped(f"{place}: {entries} entries of {len(accounts)} accounts hold; head {' '.join(heads)}")]
    lines += [wrapped(f"note: {note}") for note in notes]
    data = {"entries": entries, "accounts": len(accounts), "heads": heads, "notes": notes}
    return Outcome(text="\n".join(lines), data=data)


def new_cohort(owner: str, source: str, /, *, reason: str) -> Outcome:
    """Declare that an owner's source holds other records from now on.

    Its account starts from nothing. What was charged stays in the ledger, and the reason on every card to come; data
    that were charged before are refused from then on.

    Args:
        owner: Whose data.
        source: Which data set.
        reason: One line for whoever reads the card.
    """
    from tacit.edge.budget_lines import wrapped
    from tacit.edge.recipe import RecipeInvalid
    from tacit.federated.home import check_reason, declare_new_cohort, home_folder, home_ledger

    home = home_folder()
    try:
        path = home_ledger(home, owner, source)
        check_reason(reason)
    except ValueError as error:
        raise RecipeInvalid(str(error), "budget new-cohort") from None
    if not path.is_file():
        raise RecipeInvalid("expected the ledger of this owner's source, found none", str(path))
    account = declare_new_cohort(home, owner, source, reason)
    steps = sum(account.history.values())
    text = f"{owner}/{source} begins anew; {steps} steps charged before stay in {path}; data charged before are refused"
    data = {"owner": owner, "source": source, "reason": reason, "steps_before": steps, "ledger": str(path)}
    return Outcome(text=wrapped(text), data=data)


def _place(ledger: Path | None) -> Path:
    from tacit.federated.home import home_folder

    return home_folder() if ledger is None else ledger.expanduser()


def _read(path: Path) -> list[tuple[list[Account], str, str | None]]:
    from tacit.edge.recipe import RecipeInvalid
    from tacit.federated.accounts import find_ledgers, read_ledger

    found = find_ledgers(path)
    if not found:
        raise RecipeInvalid("expected a ledger.jsonl, a run directory or a home with ledgers, got none", str(path))
    return [read_ledger(ledger) for ledger in found]


def _planned_delta(ledger: Path) -> float | None:
    from tacit.edge.recipe import load_recipe

    beside = (ledger if ledger.is_dir() else ledger.parent) / "recipe.toml"
    return load_recipe(beside).privacy.delta if beside.is_file() else None


def _extract_notes(accounts: list[Account]) -> list[str]:
    taken = [f"{a.owner}/{a.source} at {a.extract_of}" for a in accounts if a.extract_of]
    if not taken:
        return []
    more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
    return [f"an extract of home ledgers: {', '.join(taken[:3])}{more}"]
