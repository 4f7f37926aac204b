"""A recipe as Flower apps: the same ClientApp and ServerApp in one process, under `flwr run`, or deployed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from tacit.edge.composition import Composition, build_model, compose
from tacit.edge.planning import Role, refuse_pool
from tacit.edge.recipe import Recipe, load_recipe
from tacit.edge.strategies import doors_of, failing, strategy_of, together
from tacit.federated.accounting import reported_epsilon
from tacit.federated.buffered import BufferedAveraging
from tacit.federated.client_app import CohortGate, Owner, OwnerGate, make_client_app
from tacit.federated.faulty_grid import FaultyGrid
from tacit.federated.fingerprint import fingerprint
from tacit.federated.grid import InProcessGrid, quiet_flower
from tacit.federated.home import fingerprint_key, home_folder, home_ledger, owner_folder
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.outbox import Outbox
from tacit.federated.policy import load_policy
from tacit.federated.rounds import FederationFailed
from tacit.federated.server_app import LedgerView, ServerPlan, make_server_app
from tacit.federated.train import Arrays, read_arrays, write_arrays
from tacit.federated.turns import Book

if TYPE_CHECKING:
    from tacit.edge.run_folder import RunFolder

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
    composition = _whole(compose(recipe, folder, role=role, unsafe_seed=unsafe_seed))
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
        find = _by_partition(guarded)
        target = folder / "train" if role == "private" else folder / "train" / "twin"
        indices = {owner.index + 2: owner.index for owner in composition.owners}
        plan = server_plan(composition, target, run=run, report=report, ledger=ledger, indices=indices)
        with together(composition, find, gate, lambda line: report({"note": line})) as joint:
            grid = InProcessGrid(make_client_app(find if joint is None else joint.find), contexts, gate, joint)
            faulty = failing(composition, grid, indices)
            whole = replace(plan, clock_s=_clock(plan, faulty), beside=faulty)
            make_server_app(lambda _: whole)(faulty or grid, _context(-1, len(composition.owners)))
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


def _clock(plan: ServerPlan, faulty: FaultyGrid | None) -> Callable[[], float | None]:
    """Simulated seconds of a round: by an asynchronous strategy's own clock, or by that of the failures."""
    if isinstance(plan.strategy, BufferedAveraging):
        buffered = plan.strategy
        return lambda: buffered.last_round_s
    return lambda: None if faulty is None else faulty.last_round_s


def server_plan(
    composition: Composition,
    folder: Path,
    *,
    run: str,
    report: Report,
    ledger: Book | None,
    indices: Mapping[int, int] | None = None,
) -> ServerPlan:
    """What the server of a composition does, with the ledger that it may look at.

    Args:
        composition: of a recipe.
        folder: where the server keeps its files.
        run: the run's identity.
        report: told of each round.
        ledger: that it may look at, or None.
        indices: node id → owner index; None where nodes are known only once they answer.
    """
    federated, task = composition.recipe.federated, composition.task
    scratch, client_level = build_model(composition.recipe), composition.mechanism.unit == "client"
    test, quorum = composition.data.test, federated.quorum or 1
    shared = {name: array for name, array in write_arrays(scratch).items() if name not in composition.own}

    def evaluate(_: int, arrays: Arrays) -> float | None:
        if test is None or composition.own:  # without its owners' parts it is nobody's model
            return None
        read_arrays(scratch, arrays)
        return task.score(scratch, test)

    return ServerPlan(
        folder=folder,
        recipe=composition.recipe.digest(),
        initial=shared,
        run=run,
        rounds=federated.rounds,
        # Who answers is secret at client level, so its quorum is counted before the draw.
        quorum=0 if client_level else quorum,
        secret_cohorts=client_level,
        resumed=any(run in account.runs for account in (ledger.accounts if ledger else {}).values())
        or (folder / "checkpoint").is_dir(),
        strategy=strategy_of(composition, ledger if client_level else None, indices or {}),
        ledger=LedgerView(lambda: ledger.head, ledger.seen, ledger.discard_before) if ledger else None,
        evaluate=evaluate,
        progress=report,
        owner_names=composition.names,
        doors=doors_of(composition, shared, indices),
        # Where owners are apart they forget earlier payloads, so that no round can be asked for again.
        checkpoint_s=0.0 if indices is None else federated.checkpoint_s,
        wait_s=federated.wait_s if indices is None else 0.0,
        reachable=quorum,
    )


def _context(index: int, owners: int) -> Context:
    node_config: dict[str, str | float | int | bool] = {"partition-id": index, "num-partitions": owners}
    return Context(1, index + 2, node_config, RecordDict(), {})


# Under `flwr run` every message may come to a fresh process: what is built is kept for as long as the process lives.


@lru_cache(maxsize=1)
def _composed(recipe_source: str, out: str, deployed: bool, own_data: Path | None = None) -> Composition:
    return _whole(compose(load_recipe(recipe_source), Path(out), deployed=deployed, own_data=own_data))


def _whole(composition: Composition) -> Composition:
    """Refused where shares of private records would depend on each other."""
    refuse_pool(composition.recipe, composition.data)
    return composition


def _from_run_config(context: Context, *, deployed: bool) -> Composition:
    config = context.run_config
    return _composed(str(config["recipe"]), str(Path(str(config["out"])).expanduser().resolve()), deployed)


def _from_node(context: Context, name: str) -> Composition:
    """What a deployed owner takes part in: its own copy of the recipe, and places on its own disk only.

    The server's configuration names a recipe where the node's own does not; which recipes are obeyed, the policy says.
    """
    source = str(context.node_config.get("recipe") or context.run_config["recipe"])
    state = home_folder() / "state" / owner_folder(home_folder(), name).name / load_recipe(source).digest()[:16]
    return _composed(source, str(state.resolve()), True, load_policy(home_folder() / "owner.toml").data)


def _find_owner(context: Context) -> Owner:
    """The owner of a node: a simulated one, or whoever `owner` in the node's own configuration names.

    Raises:
        FileNotFoundError: a deployed owner without an owner.toml; nothing is done for anybody without one.
    """
    name = context.node_config.get("owner")
    composition = _from_run_config(context, deployed=False) if name is None else _from_node(context, str(name))
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
    return _given_back_if_it_fails(ledger, lambda: composition.fix_plan(ledger))


def _given_back_if_it_fails(ledger: Ledger, tell: Callable[[], object]) -> Ledger:
    """A ledger that could not be told its plan is closed: kept, its lock would shut this owner out."""
    try:
        tell()
    except BaseException:
        ledger.close()
        raise
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
    account = ledger.accounts.get((owner.name, owner.source))
    if account is not None and account.reserved:
        return ledger  # its first charge fixed the plan; computing its ε again for each message takes a second
    # A plan beyond the budget is no error here: the ledger then decides charge by charge, by its stricter rule.
    return _given_back_if_it_fails(ledger, lambda: ledger.plan(composition.plan.events_of(owner.name)))


def _find_plan(composition: Composition, folder: RunFolder) -> ServerPlan:
    def report(row: Mapping[str, object]) -> None:
        folder.log("round", **row)

    ledger = None
    if composition.mechanism.private and composition.mechanism.unit == "client":
        ledger = composition.open_book(folder.path, folder.run)
    return server_plan(composition, folder.train, run=folder.run, report=report, ledger=ledger)


def _deployed_owners(context: Context) -> list[str]:
    """Names by index of owners that are apart, as their nodes are registered; none in a simulation."""
    return [name for name in str(context.run_config.get("owners", "")).split(",") if name]


def _with_names(composition: Composition, names: list[str]) -> Composition:
    if not names:
        return composition
    if len(names) != composition.recipe.federated.owners:
        raise FederationFailed(
            f"expected {composition.recipe.federated.owners} names of owners, as the recipe has, got {len(names)}"
        )
    return replace(composition, owners=tuple(replace(owner, name=names[owner.index]) for owner in composition.owners))


def _serve(grid: Grid, context: Context) -> None:
    from tacit.edge.run_folder import RunFolder

    deployed = bool(context.run_config.get("deployed", False))
    composition = _with_names(_from_run_config(context, deployed=deployed), _deployed_owners(context))
    folder = RunFolder(Path(str(context.run_config["out"])).expanduser().resolve(), composition.recipe)
    try:
        plan = _find_plan(composition, folder)
        if not deployed:
            make_server_app(lambda _: plan)(grid, context)
            return
        _serve_deployed(grid, context, folder, plan)
    finally:
        folder.close()


def _serve_deployed(grid: Grid, context: Context, folder: RunFolder, plan: ServerPlan) -> None:
    """As in a simulation, but asked for by name; what ends the run is in its log, for whoever watches it there."""
    from tacit.edge.deployed_card import DEPLOYED
    from tacit.edge.deployed_grid import DeployedGrid

    names, started = _deployed_owners(context), time.monotonic()
    folder.bind()
    folder.write_json({"owners": names}, DEPLOYED)
    roster = None if plan.doors is None else plan.doors.roster
    try:
        # Owners keep what they sent in the newest round only: a server that resumes must not ask for an older one.
        every_round = replace(plan, checkpoint_s=0.0)
        make_server_app(lambda _: every_round)(DeployedGrid(grid, names, roster), context)
    except Exception as error:
        folder.log("failed", kind=type(error).__name__, failure=str(error))
        raise
    finally:
        folder.add_wall_time("train", started)


client_app = make_client_app(_find_owner)
server_app = ServerApp()
server_app.main()(_serve)
