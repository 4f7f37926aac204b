"""What a run states about its privacy, from its ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tacit.edge.planning import Planned
from tacit.edge.run_folder import RunFolder
from tacit.federated.accounting import Event
from tacit.federated.accounts import ADVERSARY, Account, find_ledgers, has_head, read_ledger, spend_of
from tacit.federated.chain import ChainDamaged
from tacit.federated.checkpoint import load_checkpoint
from tacit.federated.client_app import describe_channels
from tacit.federated.mechanism import Mechanism

__all__ = ["no_privacy_card", "privacy_card"]

_SIMULATED = (
    "Simulated: one process held every owner's data. ε bounds what the shipped files{released} "
    "reveal to someone who sees only these; {server} {noise}"
)
_UPLOADS_TOO = {
    "released": ", the models of all rounds and the uploads",
    "server": "against the server it describes the recipe deployed, not this run.",
}
_WORDS = {
    "record": _UPLOADS_TOO,
    "local": _UPLOADS_TOO,
    "client": {
        "released": " and the models of all rounds",
        "server": "the server sees updates that are clipped and not noised, and nothing is promised against it.",
    },
}
_BENCHMARK = "Public benchmark data: ε describes the mechanism, not protection of these records."
_VOID = "GUARANTEE VOID: batches and noise came from --unsafe-seed, so that whoever knows the seed sees through them."
_RECORD = "One record is assumed to live at one owner."
_TWIN = "trained without noise and uncharged, on public benchmark data only; its curve is shown, its model deleted"
_ALL_RUNS = (
    "All runs over these records that this ledger knows are in ε, tuning included; ε is PLD, for runs planned in "
    "advance. For runs chosen by what earlier ones gave, the budget that the ledger kept is what holds."
)
_COHORT = "{owner} declared other records, uncharged until then: {reason}."
_THIS_RUN = "This run alone: other runs over the same records, tuning included, add up."


def privacy_card(
    folder: RunFolder, plan: Planned, *, data_status: str, passes: Sequence[str], with_prv: bool = True
) -> dict[str, object]:
    """The privacy card of a finished training, from its ledger.

    Args:
        folder: the run.
        plan: what the run planned to do to records.
        data_status: "private" or "public-benchmark".
        passes: "variant: pass (data use)" of every pass that will follow.
        with_prv: also ask Opacus' accountant, which takes seconds to import.

    Raises:
        ChainDamaged: a ledger that does not hold, is gone, or says less than was trained.
        ArithmeticError: accountants that disagree.
    """
    accounts, heads = _read_ledgers(folder.path)
    _check_ledger(folder, accounts, plan)
    costs = spend_of(accounts, plan.mechanism.delta, with_prv=with_prv)
    cost, worst = max(zip(costs, accounts, strict=True), key=lambda pair: pair[0].epsilon)
    mechanism = plan.of(worst.owner)
    noise = "Noise on an integer grid." if mechanism.hardened else "Noise not hardened."
    statement = [_VOID] if mechanism.void else []
    statement += [_SIMULATED.format(**_WORDS[mechanism.unit], noise=noise)]
    statement += [_BENCHMARK] if data_status == "public-benchmark" else []
    statement += [_RECORD] if mechanism.unit == "record" else []
    statement += [_THIS_RUN if data_status == "public-benchmark" else _ALL_RUNS]
    statement += [_COHORT.format(owner=a.owner, reason=c.reason) for a in accounts for c in a.cohorts]
    return {
        "unit": mechanism.unit,
        "relation": mechanism.relation,
        "adversary": ADVERSARY[mechanism.unit],
        "epsilon": cost.epsilon,
        "delta": cost.delta,
        "accountant": cost.accountant,
        "epsilon_rdp": cost.epsilon_rdp,
        "epsilon_prv": cost.epsilon_prv,
        # At client level the server keeps one ledger for all: every client has the same ε.
        "epsilon_by_owner": {a.owner: spent.epsilon for a, spent in zip(accounts, costs, strict=True)}
        if mechanism.unit != "client"
        else {},
        "noise_multiplier": mechanism.noise_multiplier,
        "max_grad_norm": mechanism.max_grad_norm,
        "sample_rate": mechanism.sample_rate,
        "reference_size": mechanism.reference_size,
        "steps_per_round": mechanism.steps_per_round,
        "participations_planned": mechanism.rounds,
        "participations_charged": max(_participations(account, plan.of(account.owner), folder) for account in accounts),
        **({"evaluation": _evaluation(plan.evaluation)} if plan.evaluation else {}),
        **({"mechanism_by_owner": {n: _rates(made) for n, made in plan.own.items()}} if plan.own else {}),
        **({"abstained": list(plan.abstained)} if plan.abstained else {}),
        "releases_failed": sum(account.failed for account in accounts),
        "reopened": sum(account.reopened for account in accounts),
        "scope": "simulated",
        "engine": _engine(folder),
        "server_adversary": "none" if mechanism.unit == "client" else "by design only",
        "guarantee": "VOID" if mechanism.void else "holds",
        "noise": _noise(mechanism),
        "randomness": "VOID: seeded" if mechanism.void else "secret, from the operating system; no seed",
        "data_status": data_status,
        "code": "not signed",
        "channels": [f"{name}: {how}" for name, how in _channels(plan).items()],
        **({"twin": _TWIN} if folder.recipe.report.twin and data_status == "public-benchmark" else {}),
        "later_passes": list(passes),
        "ledger_head": heads[0] if len(heads) == 1 else hashlib.sha256("".join(heads).encode()).hexdigest(),
        **({"ledger_heads": heads} if len(heads) > 1 else {}),
        "statement": " ".join(statement),
    }


def _of_run(account: Account, folder: RunFolder) -> Mapping[Event, int]:
    """What an account was charged by this run: private sources have others on it."""
    return account.history if account.status == "public-benchmark" else account.runs.get(folder.run, {})


def _participations(account: Account, mechanism: Mechanism, folder: RunFolder) -> int:
    return _of_run(account, folder).get(mechanism.event, 0) // mechanism.events_per_round


def _evaluation(evaluation: Mechanism) -> dict[str, object]:
    return {"planned": evaluation.rounds, **_rates(evaluation)}


def _rates(mechanism: Mechanism) -> dict[str, object]:
    return {"sample_rate": mechanism.sample_rate, "noise_multiplier": mechanism.noise_multiplier}


def _channels(plan: Planned) -> Mapping[str, str]:
    channels = dict(describe_channels(plan.mechanism.unit, evaluated=plan.evaluation is not None))
    return channels | ({"owner sizes": "declared public"} if plan.mechanism.sizes == "public" else {})


def _check_ledger(folder: RunFolder, accounts: Sequence[Account], plan: Planned) -> None:
    """A ledger that says less than the training did is not the training's.

    Raises:
        ChainDamaged: says in what.
    """
    foreign = [a.owner for a in accounts if set(_of_run(a, folder)) - set(plan.events_of(a.owner))]
    if foreign:
        raise ChainDamaged(f"expected charges of this recipe's mechanism, got others for {foreign[0]}; restore ledgers")
    # Every update that was used has been charged; no owner need have been there in all rounds. At client level the
    # server is charged once a round, and how many answered is kept from this process.
    used = [1 if row["clients"] is None else int(str(row["clients"])) for row in folder.read_rounds()]
    charged = sum(_participations(account, plan.of(account.owner), folder) for account in accounts)
    if charged < sum(used):
        raise ChainDamaged(f"expected at least {sum(used)} participations, got {charged}; restore the newest ledger")
    most = max((_participations(account, plan.of(account.owner), folder) for account in accounts), default=0)
    if _asks_everybody(folder) and most < len(used):
        raise ChainDamaged(f"expected at least {len(used)} participations, got {most}; restore the newest ledger")
    newest, _ = load_checkpoint(folder.train / "checkpoint")
    ledgers = find_ledgers(folder.path)
    if newest and newest.ledger_head and not any(has_head(path, newest.ledger_head) for path in ledgers):
        raise ChainDamaged(f"expected the ledger of round {newest.round}, got an older one; restore the newest ledger")


def _asks_everybody(folder: RunFolder) -> bool:
    """Whether each owner takes part in all rounds, or the server is charged for each."""
    federated = folder.recipe.federated
    return not (federated.cohort or federated.failures.dropout or federated.strategy == "fedbuff")


def _noise(mechanism: Mechanism) -> str:
    if mechanism.void:
        return "VOID"
    return "hardened (grid); sampler not exact, not timing-hardened" if mechanism.hardened else "not hardened"


def no_privacy_card(folder: RunFolder) -> dict[str, object]:
    """The card of a run that claims nothing."""
    return {
        "unit": "none",
        "engine": _engine(folder),
        "scope": "simulated",
        "statement": "No privacy guarantee: updates left their owners as computed.",
    }


def _engine(folder: RunFolder) -> str:
    by_flower = not (folder.path / "ledger.jsonl").is_file() and any(folder.path.glob("owners/*/ledger.jsonl"))
    return "flwr run" if by_flower else f"in-process {folder.recipe.federated.engine}"


def _read_ledgers(path: Path) -> tuple[list[Account], list[str]]:
    accounts: list[Account] = []
    heads: list[str] = []
    for ledger in find_ledgers(path):
        found, head, _ = read_ledger(ledger)
        accounts += found
        heads.append(head)
    if not accounts:
        raise ChainDamaged(f"expected a ledger with entries in {path}, got none; restore it")
    return accounts, heads
