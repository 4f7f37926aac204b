"""A recipe as Flower apps: the same ClientApp and ServerApp in one process, under `flwr run`, or deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, RecordDict

from tacit.edge.composition import Composition, build_model, compose
from tacit.edge.planning import Role
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated.accounting import reported_epsilon
from tacit.federated.averaging import FederatedAveraging, ServerOptimizer
from tacit.federated.client_app import CohortGate, Owner, OwnerGate, make_client_app
from tacit.federated.clipping import AdaptiveClip
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.evaluation import Evaluations
from tacit.federated.fingerprint import fingerprint
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.home import fingerprint_key, home_folder, home_ledger, owner_folder
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.outbox import Outbox
from tacit.federated.policy import load_policy
from tacit.federated.server_app import LedgerView, ServerPlan, make_server_app
from tacit.federated.task import accuracy
from tacit.federated.train import Arrays, read_arrays, write_arrays
from tacit.federated.turns import Book

__all__ = ["client_app", "server_app", "server_plan", "train_in_process"]

Report = Callable[[Mapping[str, object]], None]


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
        ledger = composition.open_book(folder, run)
        if composition.mechanism.unit != "client":
            gate = CohortGate(ledger, _by_partition(composition.owners))
        if ledger.repaired:
            report({"note": ledger.repaired})
    try:
        contexts = {owner.index + 2: _context(owner.index, len(composition.owners)) for owner in composition.owners}
        guarded = [replace(owner, gate=gate) for owner in composition.watched_owners()]
        grid = InProcessGrid(make_client_app(_by_partition(guarded)), contexts, gate)
        target = folder / "train" if role == "private" else folder / "train" / "twin"
        plan = server_plan(composition, target, run=run, report=report, ledger=ledger)
        make_server_app(lambda _: plan)(grid, _context(-1, len(composition.owners)))
    finally:
        if ledger is not None:
            ledger.close()
    return composition


def _by_partition(owners: Sequence[Owner]) -> Callable[[Context], Owner]:
    by_index = {owner.index: owner for owner in owners}

    def find(context: Context) -> Owner:
        index = int(context.node_config["partition-id"])
        if index not in by_index:
            raise ValueError(f"expected one of {len(owners)} owners, got partition {index}; start fewer nodes")
        return by_index[index]

    return find


def server_plan(composition: Composition, folder: Path, *, run: str, report: Report, ledger: Book | None) -> ServerPlan:
    """What the server of a composition does, with the ledger that it may look at."""
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
        resumed=any(run in account.runs for account in (ledger.accounts if ledger else {}).values())
        or (folder / "checkpoint").is_dir(),
        strategy=_strategy(composition, ledger if client_level else None),
        ledger=LedgerView(lambda: ledger.head, ledger.seen, ledger.discard_before) if ledger else None,
        evaluate=evaluate,
        progress=report,
        owner_names=[owner.name for owner in composition.owners],
    )


def _strategy(composition: Composition, ledger: Book | None) -> FederatedAveraging | PoissonCohorts:
    recipe, mechanism = composition.recipe, composition.mechanism
    federated = recipe.federated
    optimizer = ServerOptimizer(
        learning_rate=federated.server_learning_rate,
        momentum=federated.server_momentum if federated.strategy == "fedavgm" else 0.0,
        schedule=federated.schedule,
    )
    evaluations = None
    if composition.plan.evaluation is not None:
        evaluations = Evaluations(
            mechanism=composition.plan.evaluation, rounds=federated.rounds, every=federated.evaluate_every
        )
    if mechanism.unit != "client":
        weights = None
        if federated.weights == "size":
            weights = {owner.index: float(composition.sizes[owner.name]) for owner in composition.owners}
        return FederatedAveraging(
            rounds=federated.rounds, optimizer=optimizer, evaluations=evaluations, weights=weights
        )
    return PoissonCohorts(
        mechanism=mechanism,
        rounds=federated.rounds,
        optimizer=optimizer,
        randomness=lambda server_round: composition.draw("cohort", server_round),
        source=composition.task.name,
        quorum=federated.quorum or 1,
        ledger=ledger,
        clip=_adaptive_clip(recipe, mechanism),
        evaluations=evaluations,
    )


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
def _composed(recipe_source: str, out: str, deployed: bool) -> Composition:
    return compose(load_recipe(recipe_source), Path(out), deployed=deployed)


def _from_run_config(context: Context, *, deployed: bool) -> Composition:
    config = context.run_config
    return _composed(str(config["recipe"]), str(Path(str(config["out"])).expanduser().resolve()), deployed)


def _find_owner(context: Context) -> Owner:
    """The owner of a node: a simulated one, or whoever `owner` in the node's own configuration names.

    Raises:
        FileNotFoundError: a deployed owner without an owner.toml; nothing is done for anybody without one.
    """
    name = context.node_config.get("owner")
    composition = _from_run_config(context, deployed=name is not None)
    owner = _by_partition(composition.owners)(context)
    if name is not None:
        owner = replace(owner, name=str(name), log=owner_folder(home_folder(), str(name)) / "errors.log")
        _expect_terms(composition, owner)
    if not composition.mechanism.private or composition.mechanism.unit == "client":
        return owner
    if name is None and composition.data.status == "public-benchmark":
        own = Path(str(context.run_config["out"])).expanduser().resolve() / "owners" / owner.name
        return replace(owner, gate=OwnerGate(lambda: _simulated_ledger(composition, own)))
    return replace(owner, gate=OwnerGate(lambda: _ledger_at_home(composition, owner, deployed=name is not None)))


def _expect_terms(composition: Composition, owner: Owner) -> None:
    """Holds a recipe against the owner's policy before anything else; its ledger does so again with every charge.

    Raises:
        PrivacyRefused: the policy wants more, or is another owner's; the words stay on this machine.
        FileNotFoundError: there is no owner.toml.
    """
    policy = load_policy(home_folder() / "owner.toml")
    terms = policy.terms_of(owner.source)
    stated, recipe = composition.mechanism.describe(), composition.recipe.digest()
    weaker = terms.refusal(stated, recipe=recipe, participations=0)
    if composition.mechanism.unit == "client":  # the server keeps the ledger, so the whole plan has to be accepted
        epsilon = max(reported_epsilon(plan, terms.delta) for plan in composition.plans)
        weaker = weaker or (
            f"expected ε of at most {terms.epsilon:g}, got {epsilon:g}" if epsilon > terms.epsilon else None
        )
    if policy.owner != owner.name:
        weaker = f"expected owner {policy.owner!r}, got {owner.name!r}"
    if weaker is not None:
        raise PrivacyRefused(weaker)


def _simulated_ledger(composition: Composition, folder: Path) -> Ledger:
    outbox = Outbox(folder / "outbox")
    ledger = Ledger(folder / "ledger.jsonl", outbox, epsilon=composition.budget, delta=composition.mechanism.delta)
    composition.fix_plan(ledger)
    return ledger


def _ledger_at_home(composition: Composition, owner: Owner, *, deployed: bool) -> Ledger:
    """An owner's own ledger, and in deployment its own policy: both outlive the run, and no server changes them."""
    home, private = home_folder(), composition.data.status == "private"
    epsilon, delta = composition.budget, composition.mechanism.delta
    policy = load_policy(home / "owner.toml") if deployed else None
    if policy is not None:
        epsilon, delta = policy.terms_of(owner.source).budget(epsilon, delta)
    folder = owner_folder(home, owner.name)
    ledger = Ledger(
        home_ledger(home, owner.name, owner.source),
        Outbox(folder / f"{owner.source}.outbox"),
        epsilon=epsilon,
        delta=delta,
        status=composition.data.status,
        data={owner.name: fingerprint(owner.records(), fingerprint_key(home, owner.name))} if private else {},
        objection=policy.objection(composition.recipe.digest()) if policy else lambda *_: None,
    )
    ledger.plan(composition.plan.events_of(owner.name))
    return ledger


def _find_plan(context: Context) -> ServerPlan:
    from tacit.edge.run_folder import RunFolder

    composition = _from_run_config(context, deployed=bool(context.run_config.get("deployed", False)))
    folder = RunFolder(Path(str(context.run_config["out"])).expanduser().resolve(), composition.recipe)

    def report(row: Mapping[str, object]) -> None:
        folder.log("round", **row)

    ledger = None
    if composition.mechanism.private and composition.mechanism.unit == "client":
        ledger = composition.open_book(folder.path, folder.run)
    return server_plan(composition, folder.train, run=folder.run, report=report, ledger=ledger)


client_app = make_client_app(_find_owner)
server_app = make_server_app(_find_plan)
