"""What a run states about itself: the privacy card and the summary."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tacit.devices.durable import FileDamaged
from tacit.edge.run_folder import RunFolder
from tacit.federated.accounting import Event, reported_epsilon
from tacit.federated.accounts import ADVERSARY, Account, find_ledgers, has_head, read_ledger, spend_of
from tacit.federated.chain import ChainDamaged
from tacit.federated.checkpoint import load_checkpoint, read_weights
from tacit.federated.client_app import describe_channels
from tacit.federated.datasets import find_task
from tacit.federated.mechanism import Mechanism

__all__ = ["no_privacy_card", "privacy_card", "summarise", "versions"]

_PACKAGES = (
    "tacit", "torch", "flwr", "opacus", "dp-accounting", "numpy", "onnx", "onnxscript", "onnxruntime",
    "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "torch-pruning", "scikit-learn",
)  # fmt: skip

_VARIANT_KEYS = {"name", "format", "label", "bytes", "sha256", "pruned", "parity", "accuracy", "data_use"}
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
_THIS_RUN = "This run alone: other runs over the same records, tuning included, add up."


def privacy_card(
    folder: RunFolder, mechanism: Mechanism, *, data_status: str, passes: Sequence[str], with_prv: bool = True
) -> dict[str, object]:
    """The privacy card of a finished training, from its ledger.

    Args:
        folder: the run.
        mechanism: what the run planned.
        data_status: "private" or "public-benchmark".
        passes: "variant: pass (data use)" of every pass that will follow.
        with_prv: also ask Opacus' accountant, which takes seconds to import.

    Raises:
        ChainDamaged: a ledger that does not hold, is gone, or says less than was trained.
        ArithmeticError: accountants that disagree.
    """
    accounts, heads = _read_ledgers(folder.path)
    _check_ledger(folder, accounts, mechanism)
    costs = spend_of(accounts, mechanism.delta, with_prv=with_prv)
    cost = max(costs, key=lambda spent: spent.epsilon)
    noise = "Noise on an integer grid." if mechanism.hardened else "Noise not hardened."
    statement = [_VOID] if mechanism.void else []
    statement += [_SIMULATED.format(**_WORDS[mechanism.unit], noise=noise)]
    statement += [_BENCHMARK] if data_status == "public-benchmark" else []
    statement += [_RECORD] if mechanism.unit == "record" else []
    statement += [_THIS_RUN]
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
        "participations_charged": max(account.reserved for account in accounts),
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
        "channels": [f"{name}: {how}" for name, how in describe_channels(mechanism.unit).items()],
        **({"twin": _TWIN} if folder.recipe.report.twin and data_status == "public-benchmark" else {}),
        "later_passes": list(passes),
        "ledger_head": heads[0] if len(heads) == 1 else hashlib.sha256("".join(heads).encode()).hexdigest(),
        **({"ledger_heads": heads} if len(heads) > 1 else {}),
        "statement": " ".join(statement),
    }


def _check_ledger(folder: RunFolder, accounts: Sequence[Account], mechanism: Mechanism) -> None:
    """A ledger that says less than the training did is not the training's.

    Raises:
        ChainDamaged: says in what.
    """
    foreign = [a.owner for a in accounts if set(a.history) - {mechanism.event}]
    if foreign:
        raise ChainDamaged(f"expected charges of this recipe's mechanism, got others for {foreign[0]}; restore ledgers")
    rounds, charged = len(_rounds(folder.train / "rounds.jsonl")), max(account.reserved for account in accounts)
    if charged < rounds:
        raise ChainDamaged(f"expected at least {rounds} participations, got {charged}; restore the newest ledger")
    newest, _ = load_checkpoint(folder.train / "checkpoint")
    ledgers = find_ledgers(folder.path)
    if newest and newest.ledger_head and not any(has_head(path, newest.ledger_head) for path in ledgers):
        raise ChainDamaged(f"expected the ledger of round {newest.round}, got an older one; restore the newest ledger")


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


def summarise(folder: RunFolder) -> dict[str, object]:
    """Every number of the report, from the files of the run directory."""
    privacy = folder.read_json(folder.named("privacy.json")) or {}
    task = find_task(folder.recipe.task.name)
    test = task.load().test
    rounds = _rounds(folder.train / "rounds.jsonl")
    twin = _rounds(folder.train / "twin" / "rounds.jsonl")
    curve = _epsilon_curve(privacy, len(rounds))
    measured = {path.stem: _measurement(folder, path) for path in _files(folder.path / "measure")}
    return {
        "schema_version": 1,
        "task": folder.recipe.task.name,
        "title": task.title,
        "created": folder.created,
        "accuracy": rounds[-1]["accuracy"] if rounds else None,
        "accuracy_without_privacy": twin[-1]["accuracy"] if twin else None,
        "test_examples": 0 if test is None else len(test),
        "privacy": privacy,
        "training": {
            "rounds": [
                {"round": r["round"], "accuracy": r["accuracy"], "epsilon": curve.get(int(str(r["round"])))}
                for r in rounds
            ],
            "twin": [_shown(r) for r in twin],
            "owners": folder.recipe.federated.owners,
            "parameters": _parameters(folder),
            "model": folder.recipe.model.family,
        },
        "variants": _variants(folder, measured),
        "failed": _failures(folder, measured),
        "devices": {name: content.get("facts", {}) for name, content in measured.items()},
        "versions": versions(),
        "wall_s": folder.wall_s(),
        "recipe": (folder.path / "recipe.toml").read_text(encoding="utf-8"),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of every installed package that a run rests on.

    Example:
        >>> versions()["python"] == platform.python_version()
        True
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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


def _variants(folder: RunFolder, measured: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    listed = []
    for entry in folder.recipe.compression.variants:
        variant = folder.read_json("variants", entry.name, "variant.json")
        if variant is None:
            continue
        if not set(variant) >= _VARIANT_KEYS:
            missing = ", ".join(sorted(_VARIANT_KEYS - set(variant)))
            raise FileDamaged(f"expected {missing} in variants/{entry.name}/variant.json; run tacit compress again")
        latency = {}
        for device, content in measured.items():
            artifacts = content.get("artifacts")
            if isinstance(artifacts, dict) and entry.name in artifacts:
                latency[device] = artifacts[entry.name]
        listed.append({**variant, "latency": latency})
    return listed


def _measurement(folder: RunFolder, path: Path) -> dict[str, object]:
    content = folder.read_json("measure", path.name) or {}
    if not isinstance(content.get("artifacts"), dict) or not isinstance(content.get("failed"), dict):
        raise FileDamaged(f"expected artifacts and failed as tables in {path}; run tacit measure again")
    return content


def _failures(folder: RunFolder, measured: Mapping[str, Mapping[str, object]]) -> list[dict[str, str]]:
    compress = folder.read_json("variants", ".failed.json") or {}
    failed = [{"stage": "compress", "name": name, "reason": str(reason)} for name, reason in compress.items()]
    for device, content in measured.items():
        reasons = content.get("failed")
        for name, reason in (reasons if isinstance(reasons, dict) else {}).items():
            failed.append({"stage": f"measure {device}", "name": name, "reason": str(reason)})
    return failed


def _epsilon_curve(privacy: Mapping[str, object], rounds: int, points: int = 12) -> dict[int, float]:
    """ε after some of the rounds, first and last included."""
    if privacy.get("unit") in (None, "none"):
        return {}
    event = Event(
        sample_rate=float(str(privacy["sample_rate"])), noise_multiplier=float(str(privacy["noise_multiplier"]))
    )
    steps = int(str(privacy["steps_per_round"])) if privacy["unit"] == "record" else 1
    delta = float(str(privacy["delta"]))
    chosen = sorted({round(1 + (rounds - 1) * i / (points - 1)) for i in range(points)})
    curve = {r: reported_epsilon({event: r * steps}, delta, discretisation=1e-3) for r in chosen}
    return {**curve, rounds: float(str(privacy["epsilon"]))}


def _shown(row: Mapping[str, object]) -> dict[str, object]:
    return {"round": row["round"], "accuracy": row["accuracy"]}


def _parameters(folder: RunFolder) -> int:
    weights = folder.train / "weights.safetensors"
    return sum(array.size for array in read_weights(weights).values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _rounds(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
