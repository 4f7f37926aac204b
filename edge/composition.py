"""What a recipe comes to: task, data, model, mechanisms and who holds which records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from tacit.edge.planning import Planned, Role, data_of, declared_sizes, find_shares, planned, task_of
from tacit.edge.recipe import Recipe
from tacit.federated.accounting import Event, reported_epsilon
from tacit.federated.client_app import Owner
from tacit.federated.clipping import Arrays
from tacit.federated.cohorts import SERVER
from tacit.federated.evaluation import Evaluator
from tacit.federated.fingerprint import fingerprint, fingerprint_of_all, unchanged
from tacit.federated.home import fingerprint_key, home_folder
from tacit.federated.ledger import Ledger
from tacit.federated.local_steps import LocalRule
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.model_arrays import write_arrays
from tacit.federated.noise import Randomness, SecretGenerator, SeededGenerator, public_seed
from tacit.federated.outbox import Outbox
from tacit.federated.owner_ledgers import OwnerLedgers
from tacit.federated.personal import Kept, OwnerStore, own_names
from tacit.federated.secure_noise import SecureGenerator
from tacit.federated.task import Data, Model, Task, initial_model
from tacit.federated.train import Augment, LocalTrainer
from tacit.federated.turns import Book
from tacit.federated.update_codec import Codec, codec_named

__all__ = ["Composition", "Draw", "build_model", "compose"]

Draw = Callable[..., Randomness]  # by purpose


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What a recipe comes to.

    Attributes:
        recipe: resolved.
        task: what is learned.
        data: by who may see it.
        model: untrained.
        mechanism: of the recipe's constants; an owner whose size is declared has one of its own.
        owners: who takes part.
        draw: the run's randomness, by purpose.
        plan: what is done to records.
        sizes: by owner, where they are public.
        codec: what updates are sent as; None for whole models.
        own: parameters that stay with each owner, as the untrained model has them.
        deployed: whether owners are apart, and their records nowhere but with them.
    """

    recipe: Recipe
    task: Task
    data: Data
    model: Model
    mechanism: Mechanism
    owners: tuple[Owner, ...]
    draw: Draw
    plan: Planned
    sizes: Mapping[str, int] = field(default_factory=dict)
    codec: Codec | None = None
    own: Arrays = field(default_factory=dict)
    deployed: bool = False

    @property
    def rule(self) -> LocalRule:
        """What an owner does with a gradient."""
        return _rule(self.recipe)

    @property
    def names(self) -> list[str]:
        """Of owners by index; one that abstained keeps its place."""
        by_index = {owner.index: owner.name for owner in self.owners}
        return [by_index.get(index, "") for index in range(max(by_index) + 1)]

    @cached_property
    def plans(self) -> list[dict[Event, int]]:
        """How often each kind of access is planned, training and evaluations together; one for all, or by owner."""
        names = {owner.mechanism: owner.name for owner in self.owners}
        return [self.plan.events_of(name) for name in names.values()]

    @cached_property
    def budget(self) -> float:
        """The ε that each owner's ledger holds to: of this run, or of all runs over private data."""
        if self.data.status == "private" and self.recipe.privacy.budget is not None:
            return self.recipe.privacy.budget
        return self.recipe.privacy.epsilon or max(reported_epsilon(p, self.mechanism.delta) for p in self.plans)

    def open_book(self, folder: Path, run: str) -> Book:
        """What a run in one process charges: a ledger in its folder for public benchmarks, else those at home.

        Args:
            folder: the run directory.
            run: the run's identity.

        Raises:
            DataChanged: private data that are not those this run has been charged for.
            PrivacyRefused: earlier runs left too little for this one.
        """
        extract, outbox, delta = folder / "ledger.jsonl", Outbox(folder / "train" / "outbox"), self.mechanism.delta
        if self.data.status == "public-benchmark":
            book: Book = Ledger(extract, outbox, epsilon=self.budget, delta=delta)
        else:
            book = OwnerLedgers(
                home_folder(),
                self.task.name,
                self._charged_data,
                run=run,
                extract=extract,
                outbox=outbox,
                epsilon=self.budget,
                delta=delta,
            )
        try:
            self.fix_plan(book)
            self._expect_budget(book, run)
        except BaseException:
            book.close()
            raise
        return book

    def fix_plan(self, book: Book) -> None:
        """Tells a ledger what is planned, once, so that each round compares counts.

        Raises:
            PrivacyRefused: more than the budget, for an owner that was never charged.
        """
        owners: list[str | None] = [*self.plan.own] or [None]
        over = [owner for owner in owners if not book.plan(self.plan.events_of(owner or ""), owner)]
        if over:
            raise PrivacyRefused(
                f"expected a plan within ε = {self.budget:g}, got more for {over[0] or 'everybody'}; plan less"
            )

    def _expect_budget(self, book: Book, run: str) -> None:
        owners: list[str | None] = [*self.plan.own] or [None]
        short = sorted({n for o in owners for n in book.short_of(self.plan.events_of(o or ""), run, o)})
        if short:
            raise PrivacyRefused(
                f"expected budget for the whole run, got too little left of ε = {self.budget:g} for "
                f"{', '.join(short[:3])}{' and others' if len(short) > 3 else ''}, after what was charged before; plan "
                "fewer rounds or more noise"
            )

    def watched_owners(self) -> list[Owner]:
        """The owners; private data that are no longer those the run began with are not trained on."""
        if self.data.status == "public-benchmark":
            return list(self.owners)
        found = self._fingerprints
        return [replace(o, records=unchanged(o.records, self._key(o.name), found[o.name])) for o in self.owners]

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Of what each owner holds when a run begins."""
        return {owner.name: fingerprint(owner.records(), self._key(owner.name)) for owner in self.owners}

    @property
    def _charged_data(self) -> dict[str, str | None]:
        """What each ledger's charges are about; the server's, at client level, is about everybody's data.

        A deployed server has none of them: whether they changed is not noticed there, and earlier charges always count.
        """
        if self.mechanism.unit != "client":
            return dict(self._fingerprints)
        if self.deployed:
            return {SERVER: None}
        return {SERVER: fingerprint_of_all(self._fingerprints, self._key(SERVER))}

    def _key(self, owner: str) -> bytes:
        return fingerprint_key(home_folder(), SERVER if self.mechanism.unit == "client" else owner)


def compose(
    recipe: Recipe,
    folder: Path,
    *,
    role: Role = "private",
    unsafe_seed: int | None = None,
    deployed: bool = False,
    own_data: Path | None = None,
) -> Composition:
    """Builds what a recipe describes, checking everything before a record is trained on.

    Args:
        recipe: resolved.
        folder: the run directory; owners' logs go below it.
        role: "twin" for the same recipe with the noise left out and public randomness.
        unsafe_seed: makes the secret class of randomness reproducible, which voids the guarantee.
        deployed: whether owners are really apart; then noise is hardened unless the recipe says otherwise.
        own_data: of a deployed owner with a file of its own: where it lies.

    Returns:
        Its owners have no gate yet.

    Raises:
        DataProblem: an owner without records.
        PrivacyRefused: a model whose layers mix records.
        ValueError: a task or model that cannot be built.
    """
    torch.set_num_threads(1)  # sums in the same order on every machine, and owners that do not fight over cores
    task = task_of(recipe)
    model = build_model(recipe)
    data = data_of(recipe, task, own_data)
    plan = planned(recipe, data, role=role, void=unsafe_seed is not None, deployed=deployed)
    mechanism, federated = plan.mechanism, recipe.federated
    trainer = LocalTrainer(
        task,
        model,
        mechanism,
        rule=_rule(recipe),
        batch_rate=federated.batch_rate,
        weight_cap=federated.weight_cap,
        augment=_augment(recipe, task),
        personal=federated.personal == "ditto",
    )
    codec = codec_named(federated.codec, federated.codec_fraction)
    initial = write_arrays(model)
    own = {name: initial[name] for name in own_names(model, federated.personal)}
    if mechanism.void and data.status != "public-benchmark":
        raise PrivacyRefused("expected public benchmark data for --unsafe-seed, got private data; nothing may be void")
    shares = find_shares(recipe, data)
    draw = _randomness(mechanism, federated.seed if unsafe_seed is None else unsafe_seed)

    def randomness(name: str) -> Callable[[int], Randomness]:
        return lambda server_round: draw("batch", name, server_round)

    evaluator = None if plan.evaluation is None else Evaluator(mechanism=plan.evaluation, model=build_model(recipe))
    owners = tuple(
        Owner(
            name=name,
            index=index,
            source=task.name,
            mechanism=plan.of(name),
            trainer=trainer.under(plan.of(name)),
            records=partial(shares.read, index),
            randomness=randomness(name),
            gate=None,
            log=_log(folder, mechanism, name),
            evaluation=evaluator,
            kept=_kept(recipe, codec, own, partial(_kept_folder, folder, mechanism, name, role)),
        )
        for index, name in enumerate(shares.names)
        if name not in plan.abstained
    )
    return Composition(
        recipe=recipe,
        task=task,
        data=data,
        model=model,
        mechanism=mechanism,
        owners=owners,
        draw=draw,
        plan=plan,
        sizes=declared_sizes(recipe, data),
        codec=codec,
        own=own,
        deployed=deployed,
    )


def _rule(recipe: Recipe) -> LocalRule:
    federated = recipe.federated
    return LocalRule(
        learning_rate=federated.learning_rate,
        optimizer=federated.local_optimizer,
        momentum=federated.local_momentum,
        proximal=federated.proximal if federated.strategy == "fedprox" else 0.0,
    )


def _log(folder: Path, mechanism: Mechanism, name: str) -> Path:
    """Where an owner's errors go. That it has any is what client level hides: there the folder is the server's own."""
    private = folder / f"train/private/{name}.log"
    return private if mechanism.unit == "client" else folder / f"owners/{name}/errors.log"


def _kept_folder(folder: Path, mechanism: Mechanism, name: str, role: Role) -> Path:
    """Where what stays with an owner lies; a twin's has no noise, and the private run must never go on from it."""
    apart = folder / "train" / "twin" / "kept" if role == "twin" else _log(folder, mechanism, name).parent
    return apart / f"{name}.kept"


def _kept(recipe: Recipe, codec: Codec | None, own: Arrays, folder: Callable[[], Path]) -> Kept:
    """What stays with an owner, on its own disk where there is anything to keep."""
    federated = recipe.federated
    feedback = codec is not None and federated.error_feedback
    keeps = federated.personal != "none" or feedback
    return Kept(
        store=OwnerStore(folder()) if keeps else None,
        own=own,
        ditto=federated.personal_strength if federated.personal == "ditto" else None,
        codec=codec,
        error_feedback=feedback,
    )


def _augment(recipe: Recipe, task: Task) -> Augment | None:
    """A random view of each record of a batch, as the recipe lists; None when it lists nothing.

    Raises:
        ValueError: an augmentation that is not known, or that such records cannot take.
    """
    if not recipe.task.augment:
        return None
    from tacit.federated.augment import Augmentation, augment, check_augmentations

    listed = []
    for table in recipe.task.augment:
        name, parameters = str(table.get("name", "")), {key: table[key] for key in table if key != "name"}
        listed.append(Augmentation(name=name, parameters=parameters))  # type: ignore[arg-type]  # it checks them
    check_augmentations(listed, task.interface.shape)
    return lambda inputs, randomness: augment(inputs, listed, randomness)


def build_model(recipe: Recipe) -> Model:
    """The recipe's untrained model.

    Raises:
        ValueError: parameters that do not fit together.

    Example:
        >>> from tacit.edge.recipe import load_recipe
        >>> sum(parameter.numel() for parameter in build_model(load_recipe("digits")).parameters())
        10026
    """
    return initial_model(task_of(recipe), recipe.model.model_dump(exclude_none=True), recipe.federated.seed)


def _randomness(mechanism: Mechanism, seed: int) -> Draw:
    """What batches, cohorts and noise are drawn from; only a run that claims nothing, or is void, has a seed for it."""
    if not mechanism.private or mechanism.void:
        return lambda *purpose: SeededGenerator(public_seed(seed, *purpose))
    secret = SecureGenerator() if mechanism.hardened else SecretGenerator()
    return lambda *_: secret
