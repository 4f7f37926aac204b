"""What a recipe plans to do to records: mechanisms calibrated to its budget, and who holds which records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tacit.edge.recipe import Recipe, RecipeRefused
from tacit.federated import partition
from tacit.federated.accounting import Event, merge, spend
from tacit.federated.cleaning import cleaning_refusal
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import count_evaluations, evaluation_mechanism
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.task import Data, DataProblem, Records, Task, area_under_roc

if TYPE_CHECKING:
    from tacit.federated.files import DataDescription

__all__ = [
    "Planned",
    "Role",
    "Shares",
    "check_plan",
    "data_of",
    "declared_sizes",
    "delta_note",
    "evaluation_of",
    "find_shares",
    "mechanism_of",
    "planned",
    "refuse_pool",
    "task_of",
]

Role = Literal["private", "twin"]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a recipe plans to do to records.

    Attributes:
        mechanism: of the recipe's constants.
        evaluation: what is asked of owners' records, if anything.
        own: the mechanism of each owner that declared its size, where sizes are public.
        abstained: owners of fewer records than the recipe's least.
    """

    mechanism: Mechanism
    evaluation: Mechanism | None = None
    own: Mapping[str, Mechanism] = field(default_factory=dict)
    abstained: tuple[str, ...] = ()

    def of(self, owner: str) -> Mechanism:
        """An owner's mechanism."""
        return self.own.get(owner, self.mechanism)

    def events_of(self, owner: str) -> dict[Event, int]:
        """An owner's planned accesses."""
        return _events(self.of(owner), self.evaluation)


def planned(
    recipe: Recipe, data: Data, *, role: Role = "private", void: bool = False, deployed: bool = False
) -> Planned:
    """What a recipe plans, noise calibrated: about a second, and another for each size where sizes are public.

    Raises:
        DataProblem: an owner without records, or nobody left to take part.
        PrivacyRefused: cleaning that tells of a record.
    """
    _refuse_cleaning(recipe)
    mechanism = mechanism_of(recipe, role, remembered=deployed)
    hardened = mechanism.hardened or (mechanism.private and deployed and recipe.privacy.noise == "auto")
    mechanism = replace(mechanism, void=void, hardened=hardened)
    if deployed and data.status == "private":
        _refuse_sizes(recipe)
    sizes = declared_sizes(recipe, data)
    own = _owner_mechanisms(recipe, mechanism, sizes)
    return Planned(
        mechanism=mechanism,
        evaluation=None if role == "twin" else evaluation_of(recipe, mechanism),
        own=own,
        abstained=tuple(name for name in sizes if name not in own),
    )


def _refuse_sizes(recipe: Recipe) -> None:
    if recipe.privacy.sizes == "public" or recipe.federated.weights == "size":
        raise PrivacyRefused(
            "expected privacy.sizes='secret' and no weights by size for deployed owners, got declared sizes; nothing "
            "carries a deployed owner's size to the server"
        )


def _refuse_cleaning(recipe: Recipe) -> None:
    task, privacy = recipe.task, recipe.privacy
    why = cleaning_refusal(
        duplicates=task.duplicates or "keep",
        missing=task.missing or "refuse",
        unit=privacy.unit,
        sizes=privacy.sizes,
    )
    if why is not None:
        raise PrivacyRefused(why)


def mechanism_of(recipe: Recipe, role: Role = "private", *, remembered: bool = False) -> Mechanism:
    """The mechanism that a recipe's constants come to; calibrating its noise takes about a second.

    Args:
        recipe: resolved.
        role: "twin" for no noise.
        remembered: whether what was calibrated before on this machine may be used again.

    Example:
        >>> from tacit.edge.recipe import load_recipe
        >>> mechanism_of(load_recipe("digits", ["privacy.noise_multiplier=1.5"])).noise_multiplier
        1.5
    """
    privacy, federated = recipe.privacy, recipe.federated
    silent = Mechanism(
        unit=privacy.unit,
        sample_rate=privacy.sample_rate or 1.0,
        max_grad_norm=math.inf if privacy.max_grad_norm is None else privacy.max_grad_norm,
        noise_multiplier=0.0,
        steps_per_round=federated.local_steps,
        rounds=federated.rounds,
        reference_size=privacy.reference_size or 1,
        delta=privacy.delta,
        twin=privacy.unit != "none",
        hardened=privacy.noise == "hardened",
        sizes=privacy.sizes,
    )
    if role == "twin" or privacy.unit == "none":
        return silent
    return _with_noise(recipe, silent, remembered=remembered)


def _with_noise(recipe: Recipe, silent: Mechanism, *, remembered: bool = False) -> Mechanism:
    if recipe.privacy.noise_multiplier is not None:
        return replace(silent, noise_multiplier=recipe.privacy.noise_multiplier, twin=False)
    # What evaluations cost does not depend on the training's noise, but comes out of the same budget.
    evaluation = evaluation_of(recipe, replace(silent, noise_multiplier=1.0, twin=False))
    also = evaluation.plan if evaluation else None
    epsilon = recipe.privacy.epsilon or 0.0
    if not remembered:
        return silent.calibrated(epsilon, also=also)
    from tacit.edge.calibrations import recall

    asked = {"epsilon": epsilon, "mechanism": repr(silent), "also": repr(sorted((also or {}).items(), key=repr))}
    noise = recall(asked, lambda: silent.calibrated(epsilon, also=also).noise_multiplier)
    return replace(silent, noise_multiplier=noise, twin=False)


def declared_sizes(recipe: Recipe, data: Data) -> dict[str, int]:
    """How many records each owner holds, where the recipe makes that public; in a simulation by counting them."""
    asked = recipe.federated.weights == "size" or recipe.privacy.min_size > 1
    if recipe.privacy.sizes == "secret" and not (recipe.privacy.unit == "none" and asked):
        return {}
    shares = find_shares(recipe, data)
    return {name: shares.size(index) for index, name in enumerate(shares.names)}


def _owner_mechanisms(recipe: Recipe, mechanism: Mechanism, sizes: Mapping[str, int]) -> dict[str, Mechanism]:
    """The mechanism of each owner whose size is public and at least the recipe's least; the others abstain.

    Raises:
        DataProblem: everybody would abstain.
    """
    present = {name: size for name, size in sizes.items() if size >= recipe.privacy.min_size}
    if sizes and not present:
        raise DataProblem(
            f"expected an owner of at least privacy.min_size={recipe.privacy.min_size} records, got at most "
            f"{max(sizes.values())}; lower it"
        )
    if mechanism.sizes != "public":
        return dict.fromkeys(present, mechanism)
    made = {}
    for name, size in present.items():
        own = mechanism.of_size(size)
        silent = replace(own, noise_multiplier=0.0, twin=True)
        made[name] = own if not mechanism.private else replace(_with_noise(recipe, silent), void=mechanism.void)
    return made


def evaluation_of(recipe: Recipe, mechanism: Mechanism) -> Mechanism | None:
    """What an evaluation on owners' records does, under the unit of the training; None where none is planned.

    Example:
        >>> from tacit.edge.recipe import load_recipe
        >>> recipe = load_recipe("digits", ["privacy.noise_multiplier=1.5", "federated.evaluate_every=40"])
        >>> evaluation_of(recipe, mechanism_of(recipe)).plan
        {Event(sample_rate=1.0, noise_multiplier=10.0): 2}
    """
    count = count_evaluations(recipe.federated.rounds, recipe.federated.evaluate_every)
    noise_multiplier = recipe.privacy.evaluation_noise_multiplier
    return evaluation_mechanism(mechanism, noise_multiplier, count) if count else None


def _events(mechanism: Mechanism, evaluation: Mechanism | None) -> dict[Event, int]:
    return merge([*mechanism.plan.items(), *(evaluation.plan if evaluation else {}).items()])


def check_plan(recipe: Recipe) -> Mechanism:
    """What would stop a run, or spoil its end, asked before its beginning; returns the mechanism.

    Raises:
        DataProblem: an owner without records, or records that cannot be scored.
        PrivacyRefused: a plan whose ε is not finite, or on which the accountants disagree.
    """
    task = task_of(recipe)
    data = task.load()
    _check_scoring(task, data)
    refuse_pool(recipe, data)
    find_shares(recipe, data)
    plan = planned(recipe, data)
    mechanism = plan.mechanism
    if not mechanism.private:
        return mechanism
    try:
        made = dict.fromkeys(plan.own.values()) or [mechanism]
        epsilon = max(spend(_events(one, plan.evaluation), mechanism.delta).epsilon for one in made)
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise PrivacyRefused(f"expected a plan that the accountants agree on, got: {error}") from None
    if not math.isfinite(epsilon):
        raise PrivacyRefused(f"expected a finite ε, got {epsilon} for noise_multiplier={mechanism.noise_multiplier}")
    return mechanism


def _check_scoring(task: Task, data: Data) -> None:
    """That records can be scored: found out after the first round, it would have been charged."""
    for records in (data.private, data.test):
        if records is not None and task.kind == "regression" and records.labels.shape[1:] != (task.outputs,):
            raise DataProblem(
                f"expected labels of shape (records, {task.outputs}) of task {task.name!r}, got "
                f"{records.labels.shape}; give one column a value"
            )
    if data.test is None:
        return
    if not len(data.test):
        raise DataProblem(f"expected records in the test split of task {task.name!r}, got none; leave it out")
    if task.kind == "anomaly" and task.score_fn is None:
        area_under_roc(np.zeros(len(data.test)), data.test.labels)


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe names or describes.

    Raises:
        ValueError: no such task, or a description that does not fit together.
        RecipeRefused: owners are to be asked how often a model of another kind is right.
        DataProblem: described files whose header cannot be read.

    Example:
        >>> from tacit.edge.recipe import load_recipe
        >>> task_of(load_recipe("digits")).metric
        'accuracy'
    """
    table, asked = recipe.task, recipe.federated.evaluate_every
    task = find_task(table.name, _described(recipe))
    if asked and task.kind != "classification":
        raise RecipeRefused(
            f"expected federated.evaluate_every=0 for a task of kind {task.kind!r}, got {asked}: owners count right "
            "and wrong answers, which only classes have; leave it out"
        )
    return task


def _described(recipe: Recipe) -> DataDescription | None:
    if recipe.task.source is None:
        return None
    from tacit.federated.files import DataDescription

    return DataDescription(**recipe.task.model_dump(exclude={"augment"}, exclude_none=True))


def data_of(recipe: Recipe, task: Task, own: Path | None) -> Data:
    """The data of a task; for a deployed owner those of its own file, all of which are its.

    Args:
        recipe: resolved.
        task: its task.
        own: the file or folder that the owner's policy names; None to load what the task itself finds.

    Raises:
        DataProblem: a file of one's own for a task that is not described in the recipe.
    """
    if own is None:
        return task.load()
    description = _described(recipe)
    if description is None:
        raise DataProblem(
            f"expected no [data] in owner.toml for task {task.name!r}, which finds its records itself; leave it out"
        )
    from tacit.federated.file_data import load_own

    return load_own(description, task.interface, own)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who holds which records."""

    names: list[str]
    read: Callable[[int], Records]
    size: Callable[[int], int]


def delta_note(mechanism: Mechanism) -> str | None:
    """A warning for a δ that would allow a mechanism to publish somebody's record as it is, or None."""
    counted = {"record": "records of an owner", "client": "clients"}.get(mechanism.unit)
    if not counted or not mechanism.private or mechanism.delta < 1.0 / mechanism.reference_size:
        return None
    return (
        f"δ = {mechanism.delta:g} is not below 1 over {mechanism.reference_size} {counted} (privacy.reference_size): "
        "publishing one of them as it is would satisfy it; choose a smaller privacy.delta"
    )


def find_shares(recipe: Recipe, data: Data) -> Shares:
    """Deals a task's data out to the recipe's owners.

    Raises:
        DataProblem: an owner without records, or a partition that the data do not come in.
    """
    federated = recipe.federated
    if federated.partition == "natural":
        if data.of_owner is None:
            raise DataProblem(
                f"expected data that come by owner for federated.partition='natural', got task {recipe.task.name!r}; "
                "use dirichlet or iid"
            )
        of_owner = data.of_owner
        if data.owners is not None and len(data.owners) != federated.owners:
            raise DataProblem(
                f"expected federated.owners={len(data.owners)}, as many as task {recipe.task.name!r} has, got "
                f"{federated.owners}; correct it"
            )
        names = list(data.owners) if data.owners is not None else partition.owner_names(federated.owners)
        return Shares(names=names, read=of_owner, size=lambda index: len(of_owner(index)))
    pool = _pooled(recipe, data)
    shares = _dealt(recipe, pool)
    names = partition.owner_names(len(shares))
    return Shares(names=names, read=lambda index: pool.take(shares[index]), size=lambda index: len(shares[index]))


def refuse_pool(recipe: Recipe, data: Data) -> None:
    """Private records in one pool, to be dealt out: who gets which depends on all of them.

    Raises:
        DataProblem: one record would change every owner's share, which no mechanism covers.
    """
    private = data.status == "private" and recipe.privacy.unit != "none"
    if private and data.private is not None and recipe.federated.partition != "natural":
        raise DataProblem(
            f"expected task.owner_column for private data under privacy.unit={recipe.privacy.unit!r}, got one pool of "
            "records: who is dealt which depends on all of them, so one record would change every owner's share"
        )


def _pooled(recipe: Recipe, data: Data) -> Records:
    """All records together, to be dealt out anew: in a simulation only."""
    if data.private is not None:
        return data.private
    if data.of_owner is None or data.status == "private":
        raise DataProblem(
            f"expected federated.partition='natural' for task {recipe.task.name!r}, whose data come by owner, "
            f"got {recipe.federated.partition!r}"
        )
    parts = [data.of_owner(index) for index in range(recipe.federated.owners)]
    return Records(np.concatenate([p.inputs for p in parts]), np.concatenate([p.labels for p in parts]))


def _dealt(recipe: Recipe, pool: Records) -> partition.Shares:
    federated, labels = recipe.federated, pool.labels
    owners, seed = federated.owners, federated.seed
    if federated.partition in ("iid", "quantity"):
        if federated.partition == "iid":
            return partition.iid(labels, owners, seed=seed)
        return partition.quantity(len(pool), owners, alpha=federated.alpha, seed=seed)
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise DataProblem(
            f"expected classes for federated.partition={federated.partition!r}, got values; use iid or quantity"
        )
    if federated.partition == "shards":
        return partition.shards(labels, owners, shards_per_owner=federated.shards_per_owner, seed=seed)
    if federated.partition == "pathological":
        return partition.pathological(labels, owners, classes_per_owner=federated.classes_per_owner, seed=seed)
    return partition.dirichlet(labels, owners, alpha=federated.alpha, seed=seed)
