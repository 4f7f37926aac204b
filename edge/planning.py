"""What a recipe plans to do to records: mechanisms calibrated to its budget, and who holds which records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tacit.edge.recipe import Recipe
from tacit.federated import partition
from tacit.federated.accounting import Event, merge, spend
from tacit.federated.datasets import find_task
from tacit.federated.evaluation import count_evaluations, evaluation_mechanism
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.task import Data, DataProblem, Records

__all__ = [
    "Planned",
    "Role",
    "Shares",
    "check_plan",
    "declared_sizes",
    "delta_note",
    "evaluation_of",
    "find_shares",
    "mechanism_of",
    "planned",
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
    """
    mechanism = mechanism_of(recipe, role)
    hardened = mechanism.hardened or (mechanism.private and deployed and recipe.privacy.noise == "auto")
    mechanism = replace(mechanism, void=void, hardened=hardened)
    sizes = declared_sizes(recipe, data)
    own = _owner_mechanisms(recipe, mechanism, sizes)
    return Planned(
        mechanism=mechanism,
        evaluation=None if role == "twin" else evaluation_of(recipe, mechanism),
        own=own,
        abstained=tuple(name for name in sizes if name not in own),
    )


def mechanism_of(recipe: Recipe, role: Role = "private") -> Mechanism:
    """The mechanism that a recipe's constants come to; calibrating its noise takes about a second.

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
    return _with_noise(recipe, silent)


def _with_noise(recipe: Recipe, silent: Mechanism) -> Mechanism:
    if recipe.privacy.noise_multiplier is not None:
        return replace(silent, noise_multiplier=recipe.privacy.noise_multiplier, twin=False)
    # What evaluations cost does not depend on the training's noise, but comes out of the same budget.
    evaluation = evaluation_of(recipe, replace(silent, noise_multiplier=1.0, twin=False))
    return silent.calibrated(recipe.privacy.epsilon or 0.0, also=evaluation.plan if evaluation else None)


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
        DataProblem: an owner without records.
        PrivacyRefused: a plan whose ε is not finite, or on which the accountants disagree.
    """
    data = find_task(recipe.task.name).load()
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
        names = partition.owner_names(federated.owners)
        return Shares(names=names, read=of_owner, size=lambda index: len(of_owner(index)))
    if data.private is None:
        raise DataProblem(
            f"expected federated.partition='natural' for task {recipe.task.name!r}, whose data come by owner, "
            f"got {federated.partition!r}"
        )
    pool, labels = data.private, data.private.labels
    if federated.partition == "iid":
        shares = partition.iid(labels, federated.owners, seed=federated.seed)
    else:
        shares = partition.dirichlet(labels, federated.owners, alpha=federated.alpha, seed=federated.seed)
    names = partition.owner_names(len(shares))
    return Shares(names=names, read=lambda index: pool.take(shares[index]), size=lambda index: len(shares[index]))
