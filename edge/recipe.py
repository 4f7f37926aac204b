"""The recipe: everything a run is, as frozen data, with errors that name the line."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tacit.edge.recipe_errors import RecipeInvalid, RecipeRefused, first_error, syntax_error
from tacit.federated.compatibility import refusal

__all__ = ["BUILT_IN", "Recipe", "RecipeInvalid", "RecipeRefused", "load_recipe", "recipe_schema"]

BUILT_IN = Path(__file__).resolve().parent / "templates"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
PassTable = dict[str, str | int | float | bool]


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
    weights: Literal["uniform", "size", "bounded"] = "uniform"
    weight_cap: Count | None = None
    evaluate_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1


class PrivacyTable(_Table):
    """What is guaranteed."""

    unit: Literal["record", "client", "local", "none"] = "record"
    epsilon: Positive | None = None
    budget: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    max_grad_norm: Positive | None = None
    sample_rate: Probability | None = None
    reference_size: Count | None = None
    sizes: Literal["secret", "public"] = "secret"
    min_size: Count = 1
    noise: Literal["auto", "fast", "hardened"] = "auto"
    clip: Literal["fixed", "adaptive"] = "fixed"
    target_quantile: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    evaluation_noise_multiplier: Positive = 10.0


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
    compression = content.setdefault("compression", {})
    if isinstance(compression, dict) and "variants" not in compression:
        built_in = tomllib.loads((BUILT_IN / "digits.toml").read_text(encoding="utf-8"))
        compression["variants"] = built_in["compression"]["variants"]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise first_error(error, text, path, overrides, Recipe) from None
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
    raise RecipeInvalid(
        "expected a recipe file, 'digits' or 'writers', found none; `tacit init DIR` writes one", str(source)
    )


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


def _refuse_sizes(recipe: Recipe) -> None:
    """What asks for owners' sizes where they are secret, or for a cap that nothing uses."""
    privacy, federated = recipe.privacy, recipe.federated
    if privacy.sizes == "public" and privacy.unit not in ("record", "none"):
        raise RecipeRefused(
            f"expected privacy.sizes='secret' with privacy.unit={privacy.unit!r}, got 'public'; its guarantee covers "
            "how much an owner holds"
        )
    if privacy.min_size > 1 and privacy.sizes == "secret" and privacy.unit != "none":
        raise RecipeRefused(
            f"expected privacy.sizes='public' with privacy.min_size={privacy.min_size}, got 'secret'; "
            "who abstains tells how much an owner holds"
        )
    if (federated.weight_cap is None) == (federated.weights == "bounded"):
        raise RecipeRefused(
            f"expected federated.weight_cap with federated.weights='bounded' and only there, got weight_cap="
            f"{federated.weight_cap} with {federated.weights!r}"
        )
    if federated.weights == "bounded" and privacy.unit != "client":
        raise RecipeRefused(
            f"expected federated.weights='uniform' or 'size' with privacy.unit={privacy.unit!r}, got 'bounded'"
        )


def _features(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What shapes a run's releases, with the conditions that our code meets."""
    federated = recipe.federated
    weighed = {
        "uniform": ("public weights", "uniform or bounded weights"),
        "bounded": ("uniform or bounded weights",),
        "size": ("public weights",) if recipe.privacy.sizes == "public" else (),
    }[federated.weights]
    # A quorum is counted before the draw; momentum comes after the noise.
    used: dict[str, tuple[str, ...]] = {federated.strategy: ("after the noise",), "fedavg": weighed}
    used["quorum"] = ("before the draw",)
    used["dropout"] = ("an upload made is charged even if unused", "a missing client contributes 0")
    if recipe.privacy.clip == "adaptive":
        used["adaptive clip"] = ("z < 2 sigma_b",)  # the smallest sigma_b is 2z
    if federated.evaluate_every:
        used["client metrics"] = ("noised and charged", "inside the clipped vector")
    return used


# What each unit samples at when the recipe does not say; at client level it is the clients that are sampled.
_SAMPLE_RATES = {"record": 0.4, "none": 0.4, "client": 0.1, "local": 1.0}


def _resolve_privacy(recipe: Recipe, given: Mapping[str, Any]) -> PrivacyTable:
    privacy = recipe.privacy
    filled: dict[str, Any] = {"sample_rate": privacy.sample_rate or _SAMPLE_RATES[privacy.unit]}
    if privacy.reference_size is None:
        filled["reference_size"] = {"client": recipe.federated.owners, "local": 1}.get(privacy.unit, 128)
    if (why := refusal(privacy.unit, _features(recipe))) is not None:
        raise RecipeRefused(why)
    _refuse_sizes(recipe)
    if privacy.clip == "adaptive" and privacy.unit == "none":
        raise RecipeRefused(
            "expected privacy.clip='fixed' with privacy.unit='none', got 'adaptive'; nothing is clipped"
        )
    if privacy.noise == "hardened" and privacy.unit == "none":
        raise RecipeRefused("expected privacy.noise='auto' with privacy.unit='none', got 'hardened'; there is no noise")
    if privacy.unit == "none":
        spare = [key for key in ("epsilon", "noise_multiplier", "budget") if given.get(key) is not None]
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
    if privacy.budget is not None and privacy.budget < (privacy.epsilon or 0.0):
        raise RecipeRefused(
            f"expected privacy.budget of at least privacy.epsilon={privacy.epsilon:g}, got {privacy.budget:g}; raise it"
        )
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
