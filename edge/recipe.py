"""The recipe: everything a run is, as frozen data, with errors that name the line."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["BUILT_IN", "Recipe", "RecipeInvalid", "RecipeRefused", "load_recipe", "recipe_schema"]

BUILT_IN = Path(__file__).resolve().parent / "templates"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
PassTable = dict[str, str | int | float | bool]


class RecipeInvalid(ValueError):
    """A recipe that cannot be read; `where` is file:line:column."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


class RecipeRefused(ValueError):
    """Keys that are each valid but cannot hold together."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TaskTable(_Table):
    """What is learned."""

    name: str = "digits"


class ModelTable(_Table):
    """The model's family and shape."""

    family: Literal["cnn"] = "cnn"
    channels: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=8)] = [16, 32]
    groups: Annotated[int, Field(ge=1, le=4096)] = 4
    norm: Literal["group", "batch", "none"] = "group"


class FederatedTable(_Table):
    """Who learns together, and how."""

    owners: Count = 10
    partition: Literal["dirichlet", "iid", "natural"] = "dirichlet"
    alpha: Positive = 0.5
    rounds: Count = 80
    local_steps: Count = 1
    batch_rate: Probability = 0.3
    learning_rate: Positive = 0.25
    strategy: Literal["fedavg", "fedavgm"] = "fedavgm"
    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.9
    schedule: Literal["constant", "cosine"] = "cosine"
    engine: Literal["auto", "sequential"] = "auto"
    quorum: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1


class PrivacyTable(_Table):
    """What is guaranteed."""

    unit: Literal["record", "client", "local", "none"] = "record"
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    max_grad_norm: Positive | None = None
    sample_rate: Probability | None = None
    reference_size: Count | None = None
    noise: Literal["fast", "hardened"] = "fast"
    clip: Literal["fixed", "adaptive"] = "fixed"
    target_quantile: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5


class VariantTable(_Table):
    """One artifact to make."""

    name: Name
    format: Literal["onnx", "tflite"]
    label: str | None = None
    passes: list[PassTable] = []


class CompressionTable(_Table):
    """What is made of the trained model."""

    variants: list[VariantTable] = []


class DevicesTable(_Table):
    """Where artifacts are measured."""

    names: list[Literal["local"]] = ["local"]
    mode: Literal["quick", "full"] = "quick"


class ReportTable(_Table):
    """What the report adds."""

    twin: bool = True


class Recipe(_Table):
    """A whole run."""

    task: TaskTable = TaskTable()
    model: ModelTable = ModelTable()
    federated: FederatedTable = FederatedTable()
    privacy: PrivacyTable = PrivacyTable()
    compression: CompressionTable = CompressionTable()
    devices: DevicesTable = DevicesTable()
    report: ReportTable = ReportTable()

    def to_toml(self) -> str:
        """The resolved recipe, every default written out; keys that are not set are left out.

        Example:
            >>> Recipe().to_toml().splitlines()[2:4]
            ['[task]', 'name = "digits"']
        """
        import tomli_w

        return "# Resolved by tacit: every default is written out.\n\n" + tomli_w.dumps(
            self.model_dump(exclude_none=True)
        )

    def digest(self) -> str:
        """SHA-256 of the resolved content; comments and order do not count.

        Example:
            >>> load_recipe("digits").digest() == load_recipe("digits", ["federated.seed=2"]).digest()
            False
        """
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, checks and resolves a recipe.

    Args:
        source: a TOML file, or the name of a built-in recipe ("digits").
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
        raise _syntax_error(path, str(error)) from None
    except UnicodeDecodeError:
        raise RecipeInvalid("expected UTF-8 text; save the file as UTF-8", str(path)) from None
    for override in overrides:
        _apply(content, override)
    _give_way(content, overrides)
    compression = content.setdefault("compression", {})
    if isinstance(compression, dict) and "variants" not in compression:
        built_in = tomllib.loads((BUILT_IN / "digits.toml").read_text(encoding="utf-8"))
        compression["variants"] = built_in["compression"]["variants"]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _first_error(error, text, path, overrides) from None
    return _resolve(recipe, content)


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
    raise RecipeInvalid("expected a recipe file or 'digits', found neither; `tacit init DIR` writes one", str(source))


def _resolve(recipe: Recipe, content: Mapping[str, Any]) -> Recipe:
    """Fills in what depends on other keys and refuses what cannot hold together."""
    privacy = _resolve_privacy(recipe, content.get("privacy", {}))
    owners = recipe.federated.owners
    quorum = recipe.federated.quorum or (owners + 1) // 2
    federated = recipe.federated.model_copy(update={"engine": "sequential", "quorum": quorum})
    if quorum > owners:
        raise RecipeRefused(f"expected federated.quorum of at most federated.owners={owners}, got {quorum}; lower it")
    names = [variant.name for variant in recipe.compression.variants]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeRefused(f"expected different names for variants, got {twice!r} twice; rename one")
    return recipe.model_copy(update={"privacy": privacy, "federated": federated})


# What each unit samples at when the recipe does not say; at client level it is the clients that are sampled.
_SAMPLE_RATES = {"record": 0.4, "none": 0.4, "client": 0.1, "local": 1.0}


def _resolve_privacy(recipe: Recipe, given: Mapping[str, Any]) -> PrivacyTable:
    privacy = recipe.privacy
    filled: dict[str, Any] = {"sample_rate": privacy.sample_rate or _SAMPLE_RATES[privacy.unit]}
    if privacy.reference_size is None:
        filled["reference_size"] = {"client": recipe.federated.owners, "local": 1}.get(privacy.unit, 128)
    if privacy.clip == "adaptive" and privacy.unit != "client":
        raise RecipeRefused(
            f"expected privacy.clip='fixed' with privacy.unit={privacy.unit!r}, got 'adaptive'; it needs unit client"
        )
    if privacy.noise == "hardened" and (privacy.clip == "adaptive" or privacy.unit == "none"):
        raise RecipeRefused(
            "expected privacy.noise='fast' with privacy.clip='adaptive' or privacy.unit='none', got 'hardened'; "
            "the noise on bits is not on the grid, and without a guarantee there is none"
        )
    if privacy.unit == "none":
        spare = [key for key in ("epsilon", "noise_multiplier") if given.get(key) is not None]
        if spare:
            raise RecipeRefused(f"expected no privacy.{spare[0]} with privacy.unit='none', got both; remove one")
        if recipe.model.norm == "batch" and privacy.max_grad_norm is not None:
            raise RecipeRefused(
                "expected no privacy.max_grad_norm with model.norm='batch', got both: records that mix have no "
                "gradient of their own to clip; remove one"
            )
        return privacy.model_copy(update=filled)
    if privacy.epsilon is not None and privacy.noise_multiplier is not None:
        raise RecipeRefused("expected privacy.epsilon or privacy.noise_multiplier, got both; remove one")
    if privacy.unit == "local" and filled["sample_rate"] != 1.0:
        raise RecipeRefused(
            f"expected privacy.sample_rate=1 with privacy.unit='local', got {filled['sample_rate']}; "
            "an owner that noises its own update is not hidden in a sample"
        )
    if recipe.model.norm == "batch":
        layers = ", ".join(f"normalisation {i + 1}" for i in range(len(recipe.model.channels)))
        raise RecipeRefused(
            f"expected layers that do not mix records, got BatchNorm ({layers} of model {recipe.model.family!r}) "
            f'under privacy.unit={privacy.unit!r}; set model.norm = "group"'
        )
    filled["max_grad_norm"] = privacy.max_grad_norm or 1.0
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        filled["epsilon"] = 8.0
    return privacy.model_copy(update=filled)


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
    content[last] = parsed["value"]


def _give_way(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """What is asked for on the command line replaces the file's keys that exclude it."""
    asked = {override.partition("=")[0].strip() for override in overrides}
    privacy = content.get("privacy")
    if not isinstance(privacy, dict):
        return
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


def _syntax_error(path: Path, message: str) -> RecipeInvalid:
    reason, _, place = message.partition(" (at ")
    numbers = [word.strip(",)") for word in place.split() if word.strip(",)").isdigit()]
    where = ":".join([str(path), *numbers]) if numbers else f"{path} ({place.strip(')')})"
    return RecipeInvalid(f"expected TOML, got a syntax error: {reason[:1].lower()}{reason[1:]}", where)


def _first_error(error: ValidationError, text: str, path: Path, overrides: Sequence[str]) -> RecipeInvalid:
    """One line for the first thing that is wrong; the others show once it is mended."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not (isinstance(part, str) and part in _UNION_TAGS)]
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    overridden = [o for o in overrides if _overlap(o.partition("=")[0].strip(), key)]
    where = f"--set {overridden[-1]}" if overridden else _place(text, location, path)
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(location[-1]), _known_keys(location[:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_known_keys(location[:-1]))}"
        return RecipeInvalid(f"expected a known key, got {key!r}{hint}", where)
    if first["type"] == "missing":
        return RecipeInvalid(f"expected the key {key!r}, got none", where)
    got = first["input"]
    shown = json.dumps(got) if isinstance(got, (str, int, bool, list, dict)) else str(got)
    asked = first["msg"][:1].lower() + first["msg"][1:]
    return RecipeInvalid(f"{key} = {shown}: {asked.replace('input should be', 'expected')}", where)


def _overlap(first: str, second: str) -> bool:
    """Whether one of two dotted keys is the other or holds it."""
    short, long = sorted((first, second), key=len)
    return long.startswith(short) and long[len(short) :][:1] in ("", ".", "[")


_UNION_TAGS = {"constrained-float", "float", "int", "str", "bool", "none"}


def _known_keys(location: Sequence[str | int]) -> list[str]:
    fields: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = fields.model_fields[part].annotation
        fields = VariantTable if part == "variants" else annotation
    return list(fields.model_fields)


def _place(text: str, location: Sequence[str | int], path: Path) -> str:
    """file:line:column of a key; tomllib keeps no positions, so the text is read once more, headers and keys only."""
    wanted = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), None)
    where, depth = str(path), 0
    for line, column, keys, entry in _keys(text):
        elsewhere = index is not None and entry is not None and entry != index
        if not elsewhere and keys == wanted[: len(keys)] and len(keys) > depth:
            where, depth = f"{path}:{line}:{column}", len(keys)
    return where


def _keys(text: str) -> Iterator[tuple[int, int, list[str], int | None]]:
    """Line, column, dotted path and array-of-tables index of each header and key."""
    table: list[str] = []
    entry: int | None = None
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        column = len(line) - len(line.lstrip()) + 1
        if stripped.startswith("["):
            header = stripped.partition("#")[0].strip()
            table = [part.strip().strip("\"'") for part in header.strip("[] ").split(".")]
            entry = None
            if header.startswith("[["):
                name = ".".join(table)
                entry = counts[name] = counts.get(name, -1) + 1
            yield number, column, table, entry
        elif "=" in stripped and not stripped.startswith("#"):
            key = stripped.partition("=")[0].strip()
            yield number, column, [*table, *(part.strip().strip("\"'") for part in key.split("."))], entry
