"""What a recipe's keys mean together: what depends on other keys is filled in, and what cannot hold is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tacit.edge.recipe_errors import RecipeRefused
from tacit.edge.recipe_tables import FederatedTable, PrivacyTable, Recipe
from tacit.federated.accelerator import best_accelerator
from tacit.federated.compatibility import refusal

__all__ = ["resolve"]

# The server's optimizer of the strategies that are named after it.
_OPTIMIZER_OF = {"fedavgm": "momentum", "fedadam": "adam", "fedyogi": "yogi", "fedadagrad": "adagrad"}
_ADAPTIVE = ("adam", "yogi", "adagrad", "rmsprop")
# Answers that a rule needs for each hostile one, besides three.
_ANSWERS = {"krum": 2, "multi-krum": 2, "bulyan": 4}


def resolve(recipe: Recipe, content: Mapping[str, Any]) -> Recipe:
    """Fills in what depends on other keys and refuses what cannot hold together.

    Args:
        recipe: valid key by key.
        content: what was written, to tell it from defaults.

    Raises:
        RecipeRefused: keys that exclude each other.
    """
    _refuse_task(recipe)
    recipe = recipe.model_copy(update={"federated": _resolve_federated(recipe)})
    _refuse_strategies(recipe)
    privacy = _resolve_privacy(recipe, content.get("privacy", {}))
    names = [variant.name for variant in recipe.compression.variants]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RecipeRefused(f"expected different names for variants, got {twice!r} twice; rename one")
    model = recipe.model
    if model.family == "cnn" and model.channels is None:
        model = model.model_copy(update={"channels": [16, 32]})
    return recipe.model_copy(update={"privacy": privacy, "model": model})


def _refuse_task(recipe: Recipe) -> None:
    described = recipe.task.model_dump(exclude={"name", "source", "augment"}, exclude_none=True)
    if recipe.task.source is None and described:
        raise RecipeRefused(
            f"expected task.source with task.{next(iter(described))}, got none; say what kind of files they are, or "
            "leave it out"
        )
    if recipe.task.source is not None and recipe.task.path is None:
        raise RecipeRefused(f"expected task.path with task.source={recipe.task.source!r}, got none; name the files")


def _resolve_federated(recipe: Recipe) -> FederatedTable:
    federated = recipe.federated
    optimizer = _OPTIMIZER_OF.get(federated.strategy, "sgd")
    if federated.server_optimizer not in ("auto", optimizer):
        if federated.strategy in _OPTIMIZER_OF:
            raise RecipeRefused(
                f"expected federated.server_optimizer={optimizer!r} with federated.strategy={federated.strategy!r}, "
                f'got {federated.server_optimizer!r}; leave it out, or set strategy = "fedavg"'
            )
        optimizer = federated.server_optimizer
    owners = federated.owners
    engine = _engine(recipe)
    filled: dict[str, Any] = {"engine": engine, "server_optimizer": optimizer}
    filled["accelerator"] = _accelerator(federated.accelerator, engine)
    # Steps that adapt are in units of weights, the others in units of updates.
    filled["server_learning_rate"] = federated.server_learning_rate or (0.01 if optimizer in _ADAPTIVE else 1.0)
    if federated.strategy == "fedbuff":
        filled["buffer"] = federated.buffer or max(1, owners // 4)
        filled["concurrency"] = federated.concurrency or max(filled["buffer"], owners // 2)
    asked = filled.get("buffer") or federated.cohort or owners
    filled["quorum"] = federated.quorum or (asked + 1) // 2
    if filled["quorum"] > asked:
        named = "owners" if asked == owners else "buffer" if federated.strategy == "fedbuff" else "cohort"
        raise RecipeRefused(
            f"expected federated.quorum of at most federated.{named}={asked}, got {filled['quorum']}; lower it"
        )
    return federated.model_copy(update=filled)


# Families whose layers are small products: many owners' at once are worth one by one's trouble.
_STACKED = ("mlp", "autoencoder", "gru", "lstm", "transformer")
# Families whose steps are long, and no faster for many owners at once: they go to all cores.
_LONG = ("cnn", "ds-cnn", "resnet-8", "mobilenet", "vit-tiny")
# Steps of all owners in a round from which on that pays on idle cores: to fork takes a run a tenth or two of a second,
# and a step of the smallest of these families takes a few milliseconds (measured; `benchmarks/simulation.py`).
_WORTH_FORKING = 50


def _engine(recipe: Recipe) -> str:
    """Which engine computes owners' steps; from the recipe alone, so that the same recipe gives the same bytes."""
    if recipe.federated.engine != "auto":
        return recipe.federated.engine
    plain = recipe.model.norm != "batch" and recipe.privacy.noise != "hardened" and not recipe.task.augment
    if plain and (recipe.model.family in _STACKED or recipe.federated.accelerator in ("cuda", "mps")):
        return "vectorised"
    return "workers" if _worth_forking(recipe) else "sequential"


def _accelerator(asked: str, engine: str) -> str:
    """Which device computes gradients: of all owners at once, what this machine has; the processor for one owner's.

    Raises:
        RecipeRefused: an engine that has no use for the one that was asked for.
    """
    if asked == "auto":
        return best_accelerator() if engine == "vectorised" else "cpu"
    if asked != "cpu" and engine != "vectorised":
        raise RecipeRefused(
            f"expected federated.accelerator='cpu' with engine={engine!r}, got {asked!r}; only 'vectorised' takes "
            "another, and it does not take every recipe"
        )
    return asked


def _worth_forking(recipe: Recipe) -> bool:
    """Whether processes of their own are faster; not by the number of cores: a recipe is the same everywhere."""
    federated = recipe.federated
    steps = (federated.cohort or federated.owners) * federated.local_steps
    whole = federated.personal == "none" and federated.codec == "none"
    whole = whole and federated.strategy not in ("q-ffl", "fedbuff")  # the second asks one owner at a time
    long = recipe.model.family in _LONG and steps >= _WORTH_FORKING
    return long and whole and recipe.privacy.unit == "none"


def _refuse_strategies(recipe: Recipe) -> None:
    """Strategies whose parts do not go together, whatever the unit."""
    federated, own = recipe.federated, ":" in recipe.federated.strategy
    asked = federated.cohort or federated.owners
    need = 3 + _ANSWERS.get(federated.aggregation, 0) * federated.hostile
    wrong = [
        (federated.cohort, federated.owners, "cohort"),
        (federated.buffer, federated.owners, "buffer"),
        (federated.concurrency, federated.owners, "concurrency"),
        (federated.buffer, federated.concurrency, "buffer"),
    ]
    for count, most, name in wrong:
        if count is not None and most is not None and count > most:
            raise RecipeRefused(f"expected federated.{name} of at most {most}, got {count}; lower it")
    if federated.aggregation in _ANSWERS and need > asked:
        raise RecipeRefused(
            f"expected at least {need} owners a round for federated.aggregation={federated.aggregation!r} with "
            f"hostile={federated.hostile}, got {asked}; lower federated.hostile or take another rule"
        )
    single = federated.strategy if federated.strategy in ("scaffold", "fedbuff", "q-ffl") or own else None
    clashes: list[tuple[bool, str, object, object]] = [
        (single is not None, "aggregation", federated.aggregation, "mean"),
        (single is not None, "weights", federated.weights, "uniform"),
        (single in ("fedbuff", "q-ffl") or own, "personal", federated.personal, "none"),
        (single == "scaffold", "personal", federated.personal, "none"),
        (single == "scaffold", "local_optimizer", federated.local_optimizer, "sgd"),
        (federated.strategy == "fedbuff" or own, "cohort", federated.cohort, None),
        (own, "codec", federated.codec, "none"),
        (own, "evaluate_every", federated.evaluate_every, 0),
        (own, "server_optimizer", federated.server_optimizer, "sgd"),
        (federated.aggregation != "mean", "weights", federated.weights, "uniform"),
        (federated.cohort is None, "over_selection", federated.over_selection, 1.0),
    ]
    for applies, key, got, wanted in clashes:
        if applies and got != wanted:
            because = "a cohort" if key == "over_selection" else f"strategy={federated.strategy!r}"
            if key == "weights" and single is None:
                because = f"aggregation={federated.aggregation!r}"
            raise RecipeRefused(
                f"expected federated.{key}={wanted!r} {'without' if key == 'over_selection' else 'with'} {because}, "
                f"got {got!r}; change one of them"
            )
    if federated.personal in ("fedbn", "local-head") and recipe.compression.variants:
        raise RecipeRefused(
            f"expected no compression.variants with federated.personal={federated.personal!r}, got "
            f"{len(recipe.compression.variants)}: every owner's model is another one, and a part of it never travels; "
            "set compression.variants = []"
        )


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
    # A quorum is counted before the draw; the server's optimizer comes after the noise.
    used: dict[str, tuple[str, ...]] = {"fedavg": weighed, "quorum": ("before the draw",)}
    used["admission"] = ("per reply only",)
    used["dropout"] = used["deadline"] = (
        "an upload made is charged even if unused",
        "a missing client contributes 0",
    )
    used |= _strategy_features(federated, weighed)
    if recipe.privacy.clip == "adaptive":
        used["adaptive clip"] = ("z < 2 sigma_b",)  # the smallest sigma_b is 2z
    if federated.evaluate_every:
        used["client metrics"] = ("noised and charged", "inside the clipped vector")
    return used


def _strategy_features(federated: FederatedTable, weighed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    met = {
        "fedprox": weighed,
        "scaffold": ("option II from noised iterates",),
        "fedbuff": ("every upload charged",),
        "q-ffl": (),
    }
    used: dict[str, tuple[str, ...]] = {}
    if ":" in federated.strategy:
        used["own strategy"] = ("it sees noised replies only",)
    elif federated.strategy in met:
        used[federated.strategy] = met[federated.strategy]
    if federated.server_optimizer != "sgd":
        used["fedadam" if federated.server_optimizer in _ADAPTIVE else "fedavgm"] = ("after the noise",)
    if federated.aggregation != "mean":
        rule = federated.aggregation
        named = {"norm-bounded": "norm-bounded mean"}.get(rule, rule if "krum" in rule else rule.replace("-", " "))
        used[named] = ()
    if federated.personal in ("fedbn", "local-head"):
        used["local parameters"] = ("in the same DP-SGD step, or frozen", "they never travel")
    if federated.personal == "ditto":
        used["ditto"] = ("the personal model stays with its owner",)
    if federated.codec != "none":
        coded = ("after the noise", "before the clip", "the server decodes, then clips")
        used[federated.codec] = coded
        if federated.error_feedback:
            used["error feedback"] = coded
    if federated.cohort is not None:
        used["owners of a round"] = ("chosen by public randomness",)
        if federated.over_selection > 1.0:
            used["over-selection"] = ()
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
        layers = ", ".join(f"normalisation {i + 1}" for i in range(len(recipe.model.channels or [16, 32])))
        raise RecipeRefused(
            f"expected layers that do not mix records, got BatchNorm ({layers} of model {recipe.model.family!r}) "
            f'under privacy.unit={privacy.unit!r}; set model.norm = "group"'
        )
    filled["max_grad_norm"] = privacy.max_grad_norm or 1.0
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        filled["epsilon"] = 8.0
    return privacy.model_copy(update=filled)
