"""A recipe's strategy, front door and failures, as objects of the federated room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from flwr.app import Context
from flwr.serverapp import Grid

from tacit.edge.composition import Composition, build_model
from tacit.edge.recipe import Recipe, RecipeRefused
from tacit.federated.accelerator import best_accelerator, check_accelerator
from tacit.federated.admission import FrontDoor, schema
from tacit.federated.averaging import FederatedAveraging
from tacit.federated.buffered import BufferedAveraging
from tacit.federated.client_app import CohortGate, Owner
from tacit.federated.clipping import AdaptiveClip, Arrays
from tacit.federated.cohort import CohortSteps, cohort_refusal
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.doors import Doors
from tacit.federated.evaluation import Evaluations
from tacit.federated.failures import Failures, choose, over_select
from tacit.federated.faulty_grid import FaultyGrid
from tacit.federated.folding import Combine, by_rule, fairly, weighted
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.pass_workers import PassWorkers
from tacit.federated.plugged import find_strategy
from tacit.federated.roster import Roster
from tacit.federated.scaffold import ControlVariates
from tacit.federated.server_app import Resumable
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.together import AtOnce, Together
from tacit.federated.turns import Book
from tacit.federated.workers import Apart, Workers, cores

__all__ = ["doors_of", "failing", "failures_of", "strategy_of", "together"]


def strategy_of(composition: Composition, ledger: Book | None, indices: Mapping[int, int]) -> Resumable:
    """The strategy that a recipe names.

    Args:
        composition: of the recipe.
        ledger: the server's at client level, else None.
        indices: node id → owner index, as far as it is known.
    """
    recipe, federated = composition.recipe, composition.recipe.federated
    optimizer = ServerOptimizer(
        name=federated.server_optimizer if federated.server_optimizer != "auto" else "sgd",
        learning_rate=federated.server_learning_rate or 1.0,
        momentum=federated.server_momentum,
        second_momentum=federated.server_second_momentum,
        tau=federated.server_tau,
        schedule=federated.schedule,
    )
    evaluations = None
    if composition.plan.evaluation is not None:
        evaluations = Evaluations(
            mechanism=composition.plan.evaluation, rounds=federated.rounds, every=federated.evaluate_every
        )
    if composition.mechanism.unit == "client":
        return _cohorts(composition, optimizer, evaluations, ledger)
    if ":" in federated.strategy:
        return find_strategy(federated.strategy, seed=federated.seed)
    if federated.strategy == "fedbuff":
        return _buffered(composition, optimizer, evaluations, indices)
    return FederatedAveraging(
        rounds=federated.rounds,
        optimizer=optimizer,
        combine=_combine(composition),
        evaluations=evaluations,
        select=None if federated.cohort is None else _chooser(recipe),
        codec=composition.codec,
        variates=_variates(recipe),
        asks_loss=federated.strategy == "q-ffl",
    )


def _cohorts(
    composition: Composition, optimizer: ServerOptimizer, evaluations: Evaluations | None, ledger: Book | None
) -> PoissonCohorts:
    return PoissonCohorts(
        mechanism=composition.mechanism,
        rounds=composition.recipe.federated.rounds,
        optimizer=optimizer,
        randomness=lambda server_round: composition.draw("cohort", server_round),
        source=composition.task.name,
        quorum=composition.recipe.federated.quorum or 1,
        ledger=ledger,
        clip=_adaptive_clip(composition.recipe, composition.mechanism),
        codec=composition.codec,
        evaluations=evaluations,
    )


def _buffered(
    composition: Composition,
    optimizer: ServerOptimizer,
    evaluations: Evaluations | None,
    indices: Mapping[int, int],
) -> BufferedAveraging:
    recipe, failures = composition.recipe, failures_of(composition.recipe)
    return BufferedAveraging(
        rounds=recipe.federated.rounds,
        optimizer=optimizer,
        buffer=recipe.federated.buffer or 1,
        concurrency=recipe.federated.concurrency or 1,
        duration_s=lambda node, server_round: failures.duration(indices.get(node, node), server_round),
        seed=recipe.federated.seed,
        codec=composition.codec,
        evaluations=evaluations,
    )


def _combine(composition: Composition) -> Combine:
    federated = composition.recipe.federated
    if federated.strategy == "q-ffl":
        return fairly(federated.fairness, federated.learning_rate)
    if federated.aggregation != "mean":
        return by_rule(
            federated.aggregation, hostile=federated.hostile, trim=federated.trim, bound=federated.norm_bound
        )
    if federated.weights == "size":
        return weighted({owner.index: float(composition.sizes[owner.name]) for owner in composition.owners})
    return weighted()


def _chooser(recipe: Recipe) -> Callable[[Sequence[int], int], Sequence[int]]:
    federated = recipe.federated

    def select(nodes: Sequence[int], server_round: int) -> Sequence[int]:
        wanted = min(federated.cohort or len(nodes), len(nodes))
        asked = over_select(wanted, federated.over_selection, len(nodes))
        return choose(nodes, asked, seed=federated.seed, server_round=server_round)

    return select


def _variates(recipe: Recipe) -> ControlVariates | None:
    federated = recipe.federated
    if federated.strategy != "scaffold":
        return None
    return ControlVariates(owners=federated.owners, scale=federated.local_steps * federated.learning_rate)


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


def doors_of(composition: Composition, shared: Arrays, indices: Mapping[int, int] | None) -> Doors:
    """What replies must look like.

    Args:
        composition: of the recipe.
        shared: the model that travels.
        indices: node id → owner index; None where nodes say it themselves.
    """
    federated, unit = composition.recipe.federated, composition.mechanism.unit
    codec, owners = composition.codec, federated.owners
    training = FrontDoor.of_training(
        schema(shared) if codec is None else codec.wire_like(shared),
        owners=owners,
        unit=unit,
        loss=federated.strategy == "q-ffl",
        decode=None if codec is None else lambda sent: codec.decode(sent, shared),
    )
    roster = None if unit == "client" and indices is None else Roster(dict(indices or {}), closed=indices is not None)
    return Doors(training=training, evaluation=FrontDoor.of_evaluation(owners=owners), roster=roster)


def failures_of(recipe: Recipe) -> Failures:
    """What goes wrong, and how long owners take, as the recipe has it."""
    return Failures(**recipe.federated.failures.model_dump(), seed=recipe.federated.seed)


def failing(composition: Composition, grid: Grid, indices: Mapping[int, int]) -> FaultyGrid | None:
    """A grid with the recipe's failures before it; None when there are none."""
    failures = composition.recipe.federated.failures
    if not (failures.dropout or failures.corrupt_share or failures.deadline_s or failures.straggler_share):
        return None
    return FaultyGrid(grid, failures_of(composition.recipe), indices, composition.codec)


@contextmanager
def together(
    composition: Composition,
    find: Callable[[Context], Owner],
    gate: CohortGate | None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Together | None]:
    """What takes owners' steps for them, where the recipe's engine does; None where they go one by one.

    Args:
        composition: of the recipe.
        find: the owner of a context.
        gate: what was charged; None where nothing is.
        tell: told what the run's log should know.

    Raises:
        RecipeRefused: the engine has no way for owners of this recipe.
        AcceleratorAbsent: this machine has not the device that the recipe names.
    """
    federated = composition.recipe.federated
    why = _engine_refusal(composition)
    if why is not None:
        raise RecipeRefused(f"expected federated.engine='sequential', got {federated.engine!r}, which has no {why}")
    if federated.engine == "vectorised":
        with closing(PassWorkers(tell=tell)) as share:
            yield Together(AtOnce(_cohort_steps(composition, share)), find, gate)
    elif federated.engine == "workers" and cores() > 1:  # on one core alone there is nothing to gain, at the same bytes
        workers = Workers(composition.watched_owners(), tell=tell)
        try:
            yield Together(Apart(workers), find, gate)
        finally:
            workers.close()
    else:
        yield None


def _cohort_steps(composition: Composition, share: PassWorkers) -> CohortSteps:
    """Of all owners at once, where the recipe says.

    Raises:
        AcceleratorAbsent: this machine has no such device.
    """
    recipe, federated = composition.recipe, composition.recipe.federated
    device = best_accelerator() if federated.accelerator == "auto" else federated.accelerator
    check_accelerator(device)
    model, rate = build_model(recipe), federated.batch_rate
    return CohortSteps(composition.task, model, composition.rule, batch_rate=rate, device=device, share=share)


def _engine_refusal(composition: Composition) -> str | None:
    """Why an engine cannot take the steps of a recipe's owners, or None."""
    recipe, federated = composition.recipe, composition.recipe.federated
    if federated.engine == "vectorised":
        return cohort_refusal(composition.model, composition.mechanism, augmented=bool(recipe.task.augment))
    if federated.engine != "workers":
        return None
    if composition.mechanism.unit in ("client", "local"):
        return f"privacy.unit={composition.mechanism.unit!r}: what follows the steps draws from the same generator"
    kept = federated.personal != "none" or federated.codec != "none" or federated.strategy == "q-ffl"
    return "owners that keep or send more than a model" if kept else None
