"""summary.json: every number of the report, from the files of the run directory."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tacit.devices.durable import FileDamaged
from tacit.edge.planning import task_of
from tacit.edge.run_folder import RunFolder
from tacit.edge.wording import finite
from tacit.federated.accounting import Event, merge, reported_epsilon
from tacit.federated.checkpoint import read_weights
from tacit.federated.evaluation import count_evaluations

__all__ = ["summarise", "versions"]

_PACKAGES = (
    "tacit", "torch", "flwr", "opacus", "dp-accounting", "numpy", "onnx", "onnxscript", "onnxruntime",
    "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "torch-pruning", "scikit-learn",
)  # fmt: skip

# What `tacit measure --compare` needs and no page shows: it would be most of the summary.
_ONLY_ON_DISK = {"block_medians_us"}
_VARIANT_KEYS = {"name", "format", "label", "bytes", "sha256", "pruned", "parity", "accuracy", "data_use"}


def summarise(folder: RunFolder) -> dict[str, object]:
    """Every number of the report, from the files of the run directory."""
    privacy = folder.read_json(folder.named("privacy.json")) or {}
    task = task_of(folder.recipe)
    test = task.load().test
    rounds = folder.read_rounds()
    twin = folder.read_rounds("twin")
    curve = _epsilon_curve(privacy, len(rounds), folder.recipe.federated.evaluate_every)
    contents = [_measurement(folder, path) for path in _files(folder.path / "measure")]
    measured = {str(content["device"]): content for content in contents}
    return {
        "schema_version": 1,
        "task": folder.recipe.task.name,
        "title": task.title,
        "created": folder.created,
        "metric": task.metric,
        "accuracy": finite(rounds[-1]["accuracy"]) if rounds else None,
        "accuracy_without_privacy": finite(twin[-1]["accuracy"]) if twin else None,
        "test_examples": 0 if test is None else len(test),
        "privacy": privacy,
        "training": {
            "rounds": [{**_shown(r), "epsilon": curve.get(int(str(r["round"])))} for r in rounds],
            "owners_accuracy": next((r["owners_accuracy"] for r in reversed(rounds) if r.get("owners_accuracy")), None),
            "twin": [_shown(r) for r in twin],
            "refusals": _refusals(rounds),
            "set_aside": _set_aside(rounds),
            "owners": folder.recipe.federated.owners,
            "parameters": _parameters(folder),
            "model": folder.recipe.model.family,
        },
        "variants": _variants(folder, measured),
        "failed": _failures(folder, measured),
        "audit": folder.read_json(folder.named("audit.json")),
        "devices": {name: content.get("facts", {}) for name, content in measured.items()},
        "measured": {name: _about_device(content) for name, content in measured.items()},
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


def _variants(folder: RunFolder, measured: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    listed = []
    for entry in folder.recipe.compression.variants:
        variant = folder.read_json("variants", entry.name, "variant.json")
        if variant is None:
            continue
        if not set(variant) >= _VARIANT_KEYS:
            missing = ", ".join(sorted(_VARIANT_KEYS - set(variant)))
            raise FileDamaged(f"expected {missing} in variants/{entry.name}/variant.json; run tacit compress again")
        latency: dict[str, object] = {}
        answers: dict[str, object] = {}
        for device, content in measured.items():
            artifacts = content.get("artifacts")
            if isinstance(artifacts, dict) and entry.name in artifacts:
                kept = answers if content.get("mode") == "parity" else latency
                told = {key: value for key, value in artifacts[entry.name].items() if key not in _ONLY_ON_DISK}
                kept[device] = told
        listed.append({**variant, "latency": latency, "answers_on": answers})
    return listed


def _measurement(folder: RunFolder, path: Path) -> dict[str, object]:
    content = folder.read_json("measure", path.name) or {}
    tables = all(isinstance(content.get(key), dict) for key in ("artifacts", "failed"))
    if not tables or not isinstance(content.get("device"), str):
        raise FileDamaged(f"expected artifacts and failed as tables in {path}; run tacit measure again")
    return content


def _about_device(content: Mapping[str, object]) -> dict[str, object]:
    """What a result says beside its figures; `latency` is why a device without a clock has none."""
    told = ("mode", "latency", "complete", "lost", "failed", "changes", "fit")
    return {key: content[key] for key in told if content.get(key) is not None}


def _failures(folder: RunFolder, measured: Mapping[str, Mapping[str, object]]) -> list[dict[str, str]]:
    compress = folder.read_json("variants", ".failed.json") or {}
    failed = [{"stage": "compress", "name": name, "reason": str(reason)} for name, reason in compress.items()]
    for device, content in measured.items():
        reasons = content.get("failed")
        for name, reason in (reasons if isinstance(reasons, dict) else {}).items():
            failed.append({"stage": f"measure {device}", "name": name, "reason": str(reason)})
    return failed


def _epsilon_curve(
    privacy: Mapping[str, object], rounds: int, evaluate_every: int, points: int = 12
) -> dict[int, float]:
    """ε after some of the rounds, first and last included, for an owner that was there from the first one on."""
    if privacy.get("unit") in (None, "none"):
        return {}
    event = Event(
        sample_rate=float(str(privacy["sample_rate"])), noise_multiplier=float(str(privacy["noise_multiplier"]))
    )
    steps = int(str(privacy["steps_per_round"])) if privacy["unit"] == "record" else 1
    delta = float(str(privacy["delta"]))
    chosen = sorted({round(1 + (rounds - 1) * i / (points - 1)) for i in range(points)})
    asked = privacy.get("evaluation")
    planned = count_evaluations(rounds, evaluate_every)
    also: dict[Event, int] = {}
    if isinstance(asked, dict):
        also = {Event(sample_rate=asked["sample_rate"], noise_multiplier=asked["noise_multiplier"]): 1}

    def history(done: int) -> dict[Event, int]:
        asked_by_then = done // evaluate_every if evaluate_every and done < rounds else planned
        return merge([(event, done * steps), *((e, asked_by_then) for e in also)])

    stated = float(str(privacy["epsilon"]))  # less than the curve's where nobody was there in all rounds
    curve = {r: min(reported_epsilon(history(r), delta, discretisation=1e-3), stated) for r in chosen}
    return {**curve, rounds: stated}


def _shown(row: Mapping[str, object]) -> dict[str, object]:
    """A round as the report shows it; at client level there is neither traffic nor time."""
    known = {key: row[key] for key in ("bytes_down", "bytes_up", "simulated_s") if row.get(key) is not None}
    return {"round": row["round"], "accuracy": finite(row["accuracy"]), **known}


def _refusals(rounds: Sequence[Mapping[str, object]]) -> dict[str, int]:
    """How often owners that were asked gave no update, by reason."""
    counts: dict[str, int] = {}
    for row in rounds:
        refusals = row.get("refusals")
        for reason, count in (refusals if isinstance(refusals, dict) else {}).items():
            counts[reason] = counts.get(reason, 0) + int(count)
    return counts


def _set_aside(rounds: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Owners whose answers the front door set aside: in how many rounds, and why in the last of them."""
    counts: dict[str, int] = {}
    last: dict[str, str] = {}
    for row in rounds:
        aside = row.get("set_aside")
        for owner, reason in (aside if isinstance(aside, dict) else {}).items():
            counts[owner] = counts.get(owner, 0) + 1
            last[owner] = str(reason)
    return {owner: {"rounds": counts[owner], "reason": last[owner]} for owner in sorted(counts)}


def _parameters(folder: RunFolder) -> int:
    weights = folder.train / "weights.safetensors"
    return sum(array.size for array in read_weights(weights).values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []
