"""The recipe: everything a run is, as frozen data, with errors that name the line."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tacit.edge.recipe_errors import RecipeInvalid, RecipeRefused, first_error, syntax_error
from tacit.edge.recipe_rules import resolve
from tacit.edge.recipe_tables import Recipe

__all__ = ["BUILT_IN", "Recipe", "RecipeInvalid", "RecipeRefused", "load_recipe", "recipe_schema"]

BUILT_IN = Path(__file__).resolve().parent / "templates"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, checks and resolves a recipe.

    Args:
        source: a TOML file, or the name of a built-in recipe ("digits", "writers").
        overrides: `table.key=value`, the value as TOML; a bare word is a string.

    Raises:
        RecipeInvalid: syntax, unknown key, type or range; says where.
        RecipeRefused: keys that exclude each other.

    Example:
        >>> load_recipe("digits", ["federated.rounds=5"]).federated.rounds
        5
    """
    path = _find(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16 without its mark is valid UTF-8
            raise RecipeInvalid("expected UTF-8 text, got a NUL character; save the file as UTF-8", str(path))
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise syntax_error(path, str(error)) from None
    except UnicodeDecodeError:
        raise RecipeInvalid("expected UTF-8 text; save the file as UTF-8", str(path)) from None
    for override in overrides:
        _apply(content, override)
    _give_way(content, overrides)
    _place_files(content, path.parent)
    compression = content.setdefault("compression", {})
    if isinstance(compression, dict) and "variants" not in compression:
        built_in = tomllib.loads((BUILT_IN / "digits.toml").read_text(encoding="utf-8"))
        parts = content.get("federated", {})
        stays = isinstance(parts, dict) and parts.get("personal") in ("fedbn", "local-head")  # nothing whole to ship
        compression["variants"] = [] if stays else built_in["compression"]["variants"]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise first_error(error, text, path, overrides, Recipe) from None
    return resolve(recipe, content)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors.

    Example:
        >>> "privacy" in recipe_schema()["properties"]
        True
    """
    return Recipe.model_json_schema()


def _find(source: str | Path) -> Path:
    path = Path(source)
    built_in = BUILT_IN / f"{source}.toml"
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    if built_in.parent == BUILT_IN and built_in.is_file():
        return built_in
    raise RecipeInvalid(
        "expected a recipe file, 'digits' or 'writers', found none; `tacit init DIR` writes one", str(source)
    )


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeInvalid("expected table.key=value", f"--set {override}")
    *tables, last = key.strip().split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise RecipeInvalid(f"expected a table, got the value {table!r}", f"--set {override}")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": value}
    if len(parsed) > 1:
        raise RecipeInvalid("expected one value, got several lines", f"--set {override!r}")
    found = parsed["value"]
    word = isinstance(found, float) and math.isnan(found) and last == "corruption"  # there "nan" is a name
    content[last] = value.strip() if word else found


def _give_way(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """What is asked for on the command line replaces the file's keys that exclude it."""
    asked = {override.partition("=")[0].strip() for override in overrides}
    privacy = content.get("privacy")
    privacy = privacy if isinstance(privacy, dict) else {}
    model = content.get("model")
    if isinstance(model, dict) and "model.family" in asked:  # the file's keys were for another family
        for key in ("channels", "hidden", "width", "depth", "heads", "patch"):
            if f"model.{key}" not in asked:
                model.pop(key, None)
    rivals = {"privacy.epsilon": ["noise_multiplier"], "privacy.noise_multiplier": ["epsilon"]}
    if privacy.get("unit") == "none":
        rivals["privacy.unit"] = ["epsilon", "noise_multiplier", "max_grad_norm"]
    elif privacy.get("unit") in ("client", "local"):
        rivals["privacy.unit"] = ["sample_rate", "reference_size"]  # the file's were for another unit
    for key, others in rivals.items():
        if key in asked:
            for other in others:
                if f"privacy.{other}" not in asked:
                    privacy.pop(other, None)


def _place_files(content: dict[str, Any], folder: Path) -> None:
    """A task's own files are named from where the recipe lies; the resolved recipe lies elsewhere."""
    task = content.get("task")
    if not isinstance(task, dict) or "source" not in task:
        return
    for key in ("path", "test", "public"):
        found = folder / str(task.get(key, ""))
        if isinstance(task.get(key), str) and found.exists():
            task[key] = str(found.resolve())
