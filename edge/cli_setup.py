"""`tacit init`, `tacit doctor` and `tacit config`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from tacit.edge.cli_output import Outcome

__all__ = ["register"]


def register(app: App) -> None:
    """Adds the commands."""
    app.command(init)
    app.command(doctor)
    config = App(name="config", help="Show a recipe as it resolves, or the schema of recipes.")
    config.command(show)
    config.command(schema)
    app.command(config)


def init(folder: Path, /, *, recipe: Literal["digits", "writers"] = "digits") -> Outcome:
    """Write a commented recipe into a new run directory.

    Args:
        folder: The directory to make.
        recipe: Which built-in recipe to begin with.
    """
    from tacit.devices.durable import write_durably
    from tacit.edge.recipe import BUILT_IN
    from tacit.edge.run_folder import FolderMismatch

    path = folder / "recipe.toml"
    if path.exists():
        raise FolderMismatch(f"expected a new folder, got {path}; edit it or name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FolderMismatch(f"expected a new or empty folder, got other files in {folder}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(path, (BUILT_IN / f"{recipe}.toml").read_bytes())
    command = f"tacit run {shlex.quote(str(path))} --out={shlex.quote(str(folder))}"
    return Outcome(text=f"{path} written; edit it, then: {command}", data={"recipe": str(path), "next": command})


def doctor() -> Outcome:
    """Check this machine: packages, disk, memory, clock, sandbox."""
    from tacit.edge.doctor import examine

    checks = examine()
    lines = [f"{check.status:<5} {check.name}: {check.found}" for check in checks]
    lines += [f"      {check.name}: {check.hint}" for check in checks if check.hint]
    failed = [check.name for check in checks if check.status == "fail"]
    data = {"checks": [vars(check) for check in checks]}
    return Outcome(text="\n".join(lines), data=data, code=7 if failed else 0)


def show(
    recipe: str = "digits",
    /,
    *,
    overrides: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
) -> Outcome:
    """Show a recipe with every default written out.

    Args:
        recipe: A TOML file, a folder with a recipe.toml, or a built-in recipe: digits, writers.
        overrides: table.key=value on top of the recipe; may be repeated.
    """
    from tacit.edge.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    return Outcome(text=resolved.to_toml(), data=resolved.model_dump())


def schema() -> Outcome:
    """Print the JSON schema of recipes, for editors."""
    from tacit.edge.recipe import recipe_schema

    content = recipe_schema()
    return Outcome(text=json.dumps(content, indent=1), data=content)
