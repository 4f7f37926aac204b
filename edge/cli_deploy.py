"""`tacit deploy`: writes a deployment, checks it, runs it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

__all__ = ["register"]

_FEDERATION, _RESOURCE = 5, 7


def register(app: App) -> None:
    """Adds the commands."""
    deployment = App(name="deploy", help="Write, check and run a deployment: owners on their own machines, one server.")
    deployment.default(_deploy)
    for command in (check, run):
        deployment.command(command)
    app.command(deployment)


def _deploy(
    folder: Path | None = None,
    /,
    *,
    recipe: str = "digits",
    host: str = "localhost",
    owner: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    days: int = 365,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
) -> Outcome | None:
    """Write certificates, keys, policies and start scripts for a server and its owners; again with others adds owners.

    Args:
        folder: The directory to make; README.md in it says what to do, in order.
        recipe: A TOML file, a folder with a recipe.toml, or a built-in recipe: digits, writers.
        host: The server as nodes call it: NAME or NAME:PORT.
        owner: The name of an owner; once for each.
        days: For how long certificates are valid.
        overrides: table.key=value on top of the recipe; may be repeated.
    """
    if folder is None:
        from tacit.edge.cli import app

        app.help_print(["deploy"])
        return None
    from tacit.edge.deploy import deploy

    made = deploy(folder, recipe=recipe, host=host, owners=owner, overrides=overrides, days=days)
    page, place = folder / "README.md", shlex.quote(str(folder))
    text = (
        f"{len(made.owners)} owners and the server {made.host}:{made.port} written to {folder}\n"
        f"recipe    {made.recipe}\nnext      read {page}; then: tacit deploy check {place}"
    )
    return Outcome(text=text, data={**vars(made), "owners": list(made.owners), "folder": str(folder)})


def check(folder: Path, /, *, owner: str | None = None) -> Outcome:
    """Say what is wrong with a deployment on this machine, and what mends it.

    Args:
        folder: The deployment, or the part of it that is on this machine.
        owner: Look at this owner's node instead of the server.
    """
    from tacit.edge.deploy_check import examine

    findings = examine(folder, owner)
    lines = []
    for one in findings:
        lines.append(f"{one.status:<5} {one.name}: {one.found}")
        lines += [f"      {one.name}: {one.hint}"] if one.hint else []
    failed = [one for one in findings if one.status == "fail"]
    code = 0 if not failed else _RESOURCE if all(one.resource for one in failed) else _FEDERATION
    return Outcome(text="\n".join(lines), data={"findings": [vars(one) for one in findings]}, code=code)


def run(folder: Path, /, *, out: Path | None = None) -> Outcome:
    """Train with the deployed owners, from the server, and write the report; goes on where it stopped.

    Args:
        folder: The deployment, or the server's part of it.
        out: The run directory; server/run when left out.
    """
    from tacit.edge.cli_stages import summary_outcome
    from tacit.edge.deploy_run import find_server, run_deployed
    from tacit.edge.progress import Console

    console = Console()
    try:
        summary = run_deployed(folder, out=out, progress=console)
    finally:
        console.stop()
    return summary_outcome(summary, out or find_server(folder) / "run")
