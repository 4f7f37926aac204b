"""The privacy card of a deployed run, as its server can state it: each owner's charges stand on that owner's disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tacit.edge.card import privacy_card
from tacit.edge.planning import Planned
from tacit.edge.run_folder import RunFolder
from tacit.federated.accounting import spend
from tacit.federated.accounts import ADVERSARY
from tacit.federated.chain import ChainDamaged
from tacit.federated.client_app import describe_channels

__all__ = ["DEPLOYED", "deployed_card"]

DEPLOYED = "deployed.json"  # in a run directory: the owners were apart

_STATEMENT = {
    "upload": (
        "Deployed: each owner trained on its own machine, under its own policy and ledger. ε is that of all planned "
        "participations, which no owner's ledger was asked to exceed; what each was charged, over all runs, stands in "
        "the ledger on its own disk."
    ),
    "client": (
        "Deployed: each owner trained on its own machine, under its own policy. The server keeps the ledger; it sees "
        "updates that are clipped and not noised, and nothing is promised against it. Whether owners' data changed "
        "between runs is not known here, so all charges add up."
    ),
}
_BENCHMARK = "Public benchmark data: ε describes the mechanism, not protection of these records."
_RECORD = "One record is assumed to live at one owner."


def deployed_card(folder: RunFolder, plan: Planned, *, data_status: str, passes: Sequence[str]) -> dict[str, object]:
    """The privacy card of a finished training whose owners were apart.

    Args:
        folder: the server's run directory.
        plan: what the run planned to do to records.
        data_status: "private" or "public-benchmark".
        passes: "variant: pass (data use)" of every pass that will follow.

    Raises:
        ChainDamaged: at client level, a ledger that says less than was trained.
        ArithmeticError: accountants that disagree.
    """
    mechanism = plan.mechanism
    statement = [_STATEMENT["client" if mechanism.unit == "client" else "upload"]]
    statement += [_BENCHMARK] if data_status == "public-benchmark" else []
    statement += [_RECORD] if mechanism.unit == "record" else []
    stated = {"scope": "deployed", "engine": "flwr deployment", "statement": " ".join(statement)}
    if mechanism.unit == "client":
        return {**privacy_card(folder, plan, data_status=data_status, passes=passes, with_prv=False), **stated}
    return {**_of_plan(folder, plan, data_status=data_status, passes=passes), **stated}


def _of_plan(folder: RunFolder, plan: Planned, *, data_status: str, passes: Sequence[str]) -> dict[str, object]:
    mechanism = plan.mechanism
    rounds = len(folder.read_rounds())
    if rounds > mechanism.rounds:
        raise ChainDamaged(
            f"expected at most {mechanism.rounds} rounds, got {rounds} in train/rounds.jsonl; restore it"
        )
    cost = spend(plan.events_of(""), mechanism.delta, with_prv=False)
    evaluation: Mapping[str, object] = {}
    if plan.evaluation is not None:
        one = plan.evaluation
        planned = {"planned": one.rounds, "sample_rate": one.sample_rate, "noise_multiplier": one.noise_multiplier}
        evaluation = {"evaluation": planned}
    return {
        "unit": mechanism.unit,
        "relation": mechanism.relation,
        "adversary": ADVERSARY[mechanism.unit],
        "epsilon": cost.epsilon,
        "delta": cost.delta,
        "accountant": cost.accountant,
        "epsilon_rdp": cost.epsilon_rdp,
        "epsilon_prv": cost.epsilon_prv,
        "epsilon_by_owner": {},
        "noise_multiplier": mechanism.noise_multiplier,
        "max_grad_norm": mechanism.max_grad_norm,
        "sample_rate": mechanism.sample_rate,
        "reference_size": mechanism.reference_size,
        "steps_per_round": mechanism.steps_per_round,
        "participations_planned": mechanism.rounds,
        "participations_charged": rounds,
        **evaluation,
        "releases_failed": 0,
        "reopened": 0,
        "server_adversary": "enforced: owners run the app installed on their own machines",
        "guarantee": "holds",
        "noise": "hardened (grid); sampler not exact, not timing-hardened" if mechanism.hardened else "not hardened",
        "randomness": "secret, from each owner's operating system; no seed",
        "data_status": data_status,
        "code": "installed by each owner",
        "channels": [f"{n}: {how}" for n, how in describe_channels(mechanism.unit, evaluated=bool(evaluation)).items()],
        "later_passes": list(passes),
        "ledger_head": "on each owner's disk",
    }
