"""A recipe as Flower apps: the same ClientApp and ServerApp in one process, under `flwr run`, or deployed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context, RecordDict

from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated import partition
from tacit.federated.accounting import spend
from tacit.federated.averaging import FederatedAveraging, ServerOptimizer
from tacit.federated.client_app import CohortGate, Owner, OwnerGate, make_client_app
from tacit.federated.clipping import AdaptiveClip
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.datasets import find_task
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness, SecretGenerator, SeededGenerator, public_seed
from tacit.federated.outbox import Outbox
from tacit.federated.secure_noise import SecureGenerator
from tacit.federated.server_app import LedgerView, ServerPlan, make_server_app
from tacit.federated.task import Data, DataProblem, Model, Records, Task, accuracy, initial_model
from tacit.federated.train import Arrays, LocalTrainer, read_arrays, write_arrays

__all__ = ["Composition", "check_plan", "client_app", "compose", "mechanism_of", "server_app", "train_in_process"]

Report = Callable[[Mapping[str, object]], None]
Draw = Callable[..., Randomness]  # by purpose
Role = Literal["private", "twin"]


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What a recipe comes to: task, data, model, mechanism and who holds which records."""

    recipe: Recipe
    task: Task
    data: Data
    model: Model
    mechanism: Mechanism
    owners: tuple[Owner, ...]
    draw: Draw

    @property
    def budget(self) -> float:
        """The ε that each owner's ledger holds to."""
        return self.recipe.privacy.epsilon or self.mechanism.planned_epsilon()

    def open_ledger(self, path: Path, outbox: Path) -> Ledger:
        """Opens a ledger with the recipe's budget, its plan evaluated once."""
        ledger = Ledger(path, Outbox(outbox), epsilon=self.budget, delta=self.mechanism.delta)
        ledger.plan(self.mechanism.event, self.mechanism.rounds * self.mechanism.events_per_round)
        return ledger


def compose(recipe: Recipe, folder: Path, *, role: Role = "private", unsafe_seed: int | None = None) -> Composition:
    """Builds what a recipe describes, checking everything before a record is trained on.

    Args:
        recipe: resolved.
        folder: the run directory; owners' logs go below it.
        role: "twin" for the same recipe with the noise left out and public randomness.
        unsafe_seed: makes the secret class of randomness reproducible, which voids the guarantee.

    Returns:
        Its owners have no gate yet.

    Raises:
        DataProblem: an owner without records.
        PrivacyRefused: a model whose layers mix records.
        ValueError: a task or model that cannot be built.
    """
    torch.set_num_threads(1)  # sums in the same order on every machine, and owners that do not fight over cores
    task = find_task(recipe.task.name)
    model = build_model(recipe)
    mechanism = replace(mechanism_of(recipe, role), void=unsafe_seed is not None)
    federated = recipe.federated
    trainer = LocalTrainer(
        task, model, mechanism, learning_rate=federated.learning_rate, batch_rate=federated.batch_rate
    )
    data = task.load()
    if mechanism.void and data.status != "public-benchmark":
        raise PrivacyRefused("expected public benchmark data for --unsafe-seed, got private data; nothing may be void")
    count, read = _reader(recipe, data)
    draw = _randomness(mechanism, federated.seed if unsafe_seed is None else unsafe_seed)

    def randomness(name: str) -> Callable[[int], Randomness]:
        return lambda server_round: draw("batch", name, server_round)

    owners = tuple(
        Owner(
            name=name,
            index=index,
            source=task.name,
            mechanism=mechanism,
            trainer=trainer,
            records=partial(read, index),
            randomness=randomness(name),
            gate=None,
            log=folder / "owners" / name / "errors.log",
        )
        for index, name in enumerate(partition.owner_names(count))
    )
    return Composition(recipe=recipe, task=task, data=data, model=model, mechanism=mechanism, owners=owners, draw=draw)


def build_model(recipe: Recipe) -> Model:
    """The recipe's untrained model.

    Raises:
        ValueError: parameters that do not fit together.

    Example:
        >>> sum(parameter.numel() for parameter in build_model(load_recipe("digits")).parameters())
        10026
    """
    task = find_task(recipe.task.name)
    parameters = recipe.model.model_dump(exclude={"family"})
    return initial_model(task, parameters, recipe.federated.seed)


def train_in_process(
    recipe: Recipe,
    folder: Path,
    *,
    run: str,
    report: Report,
    role: Role = "private",
    unsafe_seed: int | None = None,
) -> Composition:
    """Runs a recipe's federated training in this process, resuming from the last checkpoint.

    Args:
        recipe: resolved.
        folder: the run directory.
        run: the run's identity.
        report: told of each round.
        role: "private", or "twin" for the same without noise.
        unsafe_seed: voids the guarantee, as in `compose`.

    Returns:
        What was trained on.
    """
    quiet_flower()
    composition = compose(recipe, folder, role=role, unsafe_seed=unsafe_seed)
    ledger, gate = None, None
    if composition.mechanism.private:
        ledger = composition.open_ledger(folder / "ledger.jsonl", folder / "train" / "outbox")
        if composition.mechanism.unit != "client":
            gate = CohortGate(ledger, _by_partition(composition.owners))
        if ledger.repaired:
            report({"note": ledger.repaired})
    try:
        contexts = {index + 2: _context(index, len(composition.owners)) for index in range(len(composition.owners))}
        guarded = [replace(owner, gate=gate) for owner in composition.owners]
        grid = InProcessGrid(make_client_app(_by_partition(guarded)), contexts, gate)
        target = folder / "train" if role == "private" else folder / "train" / "twin"
        plan = _server_plan(composition, target, run=run, report=report, ledger=ledger)
        make_server_app(lambda _: plan)(grid, _context(-1, len(composition.owners)))
    finally:
        if ledger is not None:
            ledger.close()
    return composition


def _by_partition(owners: Sequence[Owner]) -> Callable[[Context], Owner]:
    def find(context: Context) -> Owner:
        index = int(context.node_config["partition-id"])
        if not 0 <= index < len(owners):
            raise ValueError(f"expected one of {len(owners)} owners, got partition {index}; start fewer nodes")
        return owners[index]

    return find


def _server_plan(
    composition: Composition, folder: Path, *, run: str, report: Report, ledger: Ledger | None
) -> ServerPlan:
    federated = composition.recipe.federated
    scratch, client_level = build_model(composition.recipe), composition.mechanism.unit == "client"
    test = composition.data.test

    def evaluate(_: int, arrays: Arrays) -> float | None:
        read_arrays(scratch, arrays)
        return None if test is None else accuracy(scratch, test)

    return ServerPlan(
        folder=folder,
        recipe=composition.recipe.digest(),
        initial=write_arrays(scratch),
        run=run,
        rounds=federated.rounds,
        # Who answers is secret at client level, so its quorum is counted before the draw.
        quorum=0 if client_level else federated.quorum or 1,
        secret_cohorts=client_level,
        resumed=bool(ledger and ledger.accounts) or (folder / "checkpoint").is_dir(),
        strategy=_strategy(composition, ledger if client_level else None),
        ledger=LedgerView(lambda: ledger.head, ledger.seen, ledger.discard_before) if ledger else None,
        evaluate=evaluate,
        progress=report,
    )


def mechanism_of(recipe: Recipe, role: Role = "private") -> Mechanism:
    """The mechanism that a recipe's constants come to; calibrating its noise takes about a second.

    Example:
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
    )
    if role == "twin" or privacy.unit == "none":
        return silent
    if privacy.noise_multiplier is not None:
        return replace(silent, noise_multiplier=privacy.noise_multiplier, twin=False)
    return silent.calibrated(privacy.epsilon or 0.0)


def check_plan(recipe: Recipe) -> None:
    """What would stop a run, or spoil its end, asked before its beginning.

    Raises:
        DataProblem: an owner without records.
        PrivacyRefused: a plan whose ε is not finite, or on which the accountants disagree.
    """
    _reader(recipe, find_task(recipe.task.name).load())
    mechanism = mechanism_of(recipe)
    if not mechanism.private:
        return
    try:
        epsilon = spend(mechanism.plan, mechanism.delta).epsilon
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise PrivacyRefused(f"expected a plan that the accountants agree on, got: {error}") from None
    if not math.isfinite(epsilon):
        raise PrivacyRefused(f"expected a finite ε, got {epsilon} for noise_multiplier={mechanism.noise_multiplier}")


def _reader(recipe: Recipe, data: Data) -> tuple[int, Callable[[int], Records]]:
    """How many owners there are, and what reads the records of each."""
    federated = recipe.federated
    if federated.partition == "natural":
        if data.of_owner is None:
            raise DataProblem(
                f"expected data that come by owner for federated.partition='natural', got task {recipe.task.name!r}; "
                "use dirichlet or iid"
            )
        return federated.owners, data.of_owner
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
    return len(shares), lambda index: pool.take(shares[index])


def _strategy(composition: Composition, ledger: Ledger | None) -> FederatedAveraging | PoissonCohorts:
    recipe, mechanism = composition.recipe, composition.mechanism
    federated = recipe.federated
    optimizer = ServerOptimizer(
        learning_rate=federated.server_learning_rate,
        momentum=federated.server_momentum if federated.strategy == "fedavgm" else 0.0,
        schedule=federated.schedule,
    )
    if mechanism.unit != "client":
        return FederatedAveraging(rounds=federated.rounds, optimizer=optimizer)
    return PoissonCohorts(
        mechanism=mechanism,
        rounds=federated.rounds,
        optimizer=optimizer,
        randomness=lambda server_round: composition.draw("cohort", server_round),
        source=composition.task.name,
        quorum=federated.quorum or 1,
        ledger=ledger,
        clip=_adaptive_clip(recipe, mechanism),
    )


def _randomness(mechanism: Mechanism, seed: int) -> Draw:
    """What batches, cohorts and noise are drawn from; only a run that claims nothing, or is void, has a seed for it."""
    if not mechanism.private or mechanism.void:
        return lambda *purpose: SeededGenerator(public_seed(seed, *purpose))
    secret = SecureGenerator() if mechanism.hardened else SecretGenerator()
    return lambda *_: secret


def _adaptive_clip(recipe: Recipe, mechanism: Mechanism) -> AdaptiveClip | None:
    if recipe.privacy.clip == "fixed":
        return None
    try:
        return AdaptiveClip.start(
            clip_norm=mechanism.max_grad_norm,
            noise_multiplier=mechanism.noise_multiplier,
            expected_cohort=mechanism.normaliser,
            target_quantile=recipe.privacy.target_quantile,
        )
    except ValueError as error:
        raise PrivacyRefused(str(error)) from None


def _context(index: int, owners: int) -> Context:
    node_config: dict[str, str | float | int | bool] = {"partition-id": index, "num-partitions": owners}
    return Context(1, index + 2, node_config, RecordDict(), {})


# Under `flwr run` every message may come to a fresh process: what is built is kept for as long as the process lives.


@lru_cache(maxsize=1)
def _deployed(recipe_source: str, out: str) -> Composition:
    folder = Path(out)
    recipe = load_recipe(recipe_source)

    composition = compose(recipe, folder)
    if not composition.mechanism.private or composition.mechanism.unit == "client":
        return composition

    def gate(name: str) -> OwnerGate:
        home = folder / "owners" / name
        return OwnerGate(lambda: composition.open_ledger(home / "ledger.jsonl", home / "outbox"))

    return replace(composition, owners=tuple(replace(owner, gate=gate(owner.name)) for owner in composition.owners))


def _from_run_config(context: Context) -> Composition:
    config = context.run_config
    return _deployed(str(config["recipe"]), str(Path(str(config["out"])).expanduser().resolve()))


def _find_owner(context: Context) -> Owner:
    return _by_partition(_from_run_config(context).owners)(context)


def _find_plan(context: Context) -> ServerPlan:
    from tacit.edge.run_folder import RunFolder

    composition = _from_run_config(context)
    folder = RunFolder(Path(str(context.run_config["out"])).expanduser().resolve(), composition.recipe)

    def report(row: Mapping[str, object]) -> None:
        folder.log("round", **row)

    ledger = None
    if composition.mechanism.private and composition.mechanism.unit == "client":
        ledger = composition.open_ledger(folder.path / "ledger.jsonl", folder.train / "outbox")
    return _server_plan(composition, folder.train, run=folder.run, report=report, ledger=ledger)


client_app = make_client_app(_find_owner)
server_app = make_server_app(_find_plan)
