"""The audit of a run: what runs on a run directory, and DIR/audit.json.

Four tests: one step against its formula, the noise, canaries through the round loop, and membership inference on every
file that ships. What is done, and whose inputs did not change, is not done again; a failure is kept like any result,
because trying again until it passes would make the confidence a lie.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from tacit.edge.progress import Progress, Silent
from tacit.edge.recipe import RecipeInvalid
from tacit.edge.run_folder import FolderMismatch, RunFolder

__all__ = ["TESTS", "AuditFailed", "AuditOptions", "audit", "check_passed"]

TESTS = ("mechanism", "noise", "canaries", "membership")
_SCHEMA = 1
_ROOM = Path(__file__).resolve().parent.parent / "federated"
_STATEMENT = "An audit can show a violation; it never proves privacy."

Entry = dict[str, object]


class AuditFailed(RuntimeError):
    """A run that leaks more than it claims, or whose noise is not what its ledger says."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """How much to try.

    Attributes:
        shadows: shadow models of the membership attack; 0 for the attack without.
        canaries: of the round loop.
        trials: releases on each of two inputs; None for as many as the noise asks for.
        skip: tests to leave out.
    """

    shadows: int = 8
    canaries: int = 2000
    trials: int | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.shadows < 0 or self.shadows == 1:
            raise RecipeInvalid(f"expected 0 or at least 2, got {self.shadows}", "--shadows")
        if not 40 <= self.canaries <= 100_000:
            raise RecipeInvalid(f"expected 40 to 100000, got {self.canaries}", "--canaries")
        if self.trials is not None and not 100 <= self.trials <= 10_000_000:
            raise RecipeInvalid(f"expected 100 to 10000000, got {self.trials}", "--trials")
        unknown = [name for name in self.skip if name not in TESTS]
        if unknown:
            raise RecipeInvalid(f"expected tests among {', '.join(TESTS)}, got {unknown[0]!r}", "--skip")


def audit(
    out: str | Path, *, options: AuditOptions | None = None, progress: Progress | None = None
) -> dict[str, object]:
    """Audits a trained run and writes DIR/audit.json.

    Args:
        out: the run directory, trained.
        options: how much to try; the defaults when None.
        progress: where to report to; nobody when None.

    Returns:
        The content of audit.json; `check_passed` turns a failure into an error.

    Raises:
        FolderMismatch: the run is not trained.
        PrivacyRefused: membership inference on private data, which would read records without a charge.
        DataProblem: no test split for membership inference.
    """
    folder = RunFolder(Path(out))
    try:
        card = folder.read_json(folder.named("privacy.json"))
        if not folder.trained or card is None:
            raise FolderMismatch(
                f"expected a trained run in {folder.path}, got none; `tacit train {folder.path}` first"
            )
        started = time.monotonic()
        chosen = options or AuditOptions()
        content = _content(card, chosen, _run(folder, card, chosen, progress or Silent()))
        folder.write_json(content, folder.named("audit.json"))
        folder.add_wall_time("audit", started)
        folder.log("audit", verdict=content["verdict"])
        return content
    finally:
        folder.close()


def check_passed(content: Mapping[str, object], where: Path) -> None:
    """Turns an audit's failure into one line.

    Raises:
        AuditFailed: says which test failed and on what.

    Example:
        >>> check_passed({"verdict": "warn", "tests": []}, Path())
        >>> broken = {"name": "mechanism", "verdict": "fail", "reason": "ε ≥ 3.1"}
        >>> check_passed({"verdict": "fail", "tests": [broken]}, Path())
        Traceback (most recent call last):
            ...
        tacit.edge.audit.AuditFailed: expected what was claimed, got mechanism: ε ≥ 3.1; do not release, see audit.json
    """
    tests = content["tests"]
    failed = [t for t in tests if t["verdict"] == "fail"] if isinstance(tests, list) else []
    if failed:
        reasons = ", and ".join(f"{test['name']}: {test['reason']}" for test in failed)
        raise AuditFailed(f"expected what was claimed, got {reasons}; do not release, see {where / 'audit.json'}")


def _run(folder: RunFolder, card: Mapping[str, object], options: AuditOptions, progress: Progress) -> list[Entry]:
    """Every test that was not left out and that there is a claim for."""
    from tacit.edge.audit_entries import Bench, canaries_entry, mechanism_entry, membership_entries, noise_entry
    from tacit.edge.audit_shadows import ask_models
    from tacit.edge.composition import compose
    from tacit.federated.grid import quiet_flower

    quiet_flower()
    recipe = folder.recipe
    # Canaries and their company are fewer than the recipe's owners, or more: the quorum is not theirs.
    lenient = recipe.model_copy(update={"federated": recipe.federated.model_copy(update={"quorum": 1})})
    with tempfile.TemporaryDirectory(prefix="tacit-audit-") as scratch:
        composition = compose(lenient, Path(scratch))
        composition = replace(composition, plan=replace(composition.plan, evaluation=None))
        bench = Bench(folder=folder, composition=composition, claim=card, progress=progress)
        wanted = [name for name in TESTS if name not in options.skip and (name == "membership" or not _unclaimed(card))]
        models = ask_models(folder) if "membership" in wanted else []
        if models:
            _refuse_private(composition.data.status)
        files = [[model.name, model.sha256] for model in models]
        key = _digest(recipe.digest(), "shadow", options.shadows)
        tests: dict[str, tuple[object, Callable[[], list[Entry]]]] = {
            "mechanism": (options.trials, lambda: [mechanism_entry(bench, trials=options.trials)]),
            "noise": (None, lambda: [noise_entry(bench)]),
            "canaries": (options.canaries, lambda: [canaries_entry(bench, canaries=options.canaries)]),
            "membership": (
                [files, options.shadows, card.get("epsilon")],
                lambda: membership_entries(bench, models, shadows=options.shadows, key=key),
            ),
        }
        kept = (_kept(folder, name, _digest(recipe.digest(), name, tests[name][0]), tests[name][1]) for name in wanted)
        return [entry for entries in kept for entry in entries]


def _unclaimed(card: Mapping[str, object]) -> str:
    """Why there is nothing that a step, its noise or canaries could violate; empty where something is claimed."""
    if card.get("unit") == "none":
        return "nothing is claimed"
    return "the guarantee is void" if "VOID" in str(card.get("noise")) else ""


def _refuse_private(status: str) -> None:
    from tacit.federated.mechanism import PrivacyRefused

    if status != "public-benchmark":
        raise PrivacyRefused(
            "expected public benchmark data for membership inference, got private data: shadow models and the attack "
            "would read records without a charge; add --skip membership"
        )


def _digest(*parts: object) -> str:
    """SHA-256 of a test's inputs: what it was asked, this code, and the packages that it rests on."""
    from tacit.edge.summary import versions

    return hashlib.sha256(json.dumps([*parts, versions(), _code()], sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """SHA-256 of the room that is audited: a mechanism that was changed since is another one."""
    digest = hashlib.sha256()
    for path in sorted(_ROOM.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(folder: RunFolder, name: str, inputs: str, run: Callable[[], list[Entry]]) -> list[Entry]:
    """A test's entries as they were kept, or of a new run where its inputs have changed."""
    kept = folder.read_json("audit", f"{name}.json")
    done = kept.get("tests") if kept is not None and kept.get("inputs") == inputs else None
    if isinstance(done, list):
        return [dict(entry) for entry in done]
    started = time.monotonic()
    entries = run()
    seconds = round(time.monotonic() - started, 2)
    # As they will be read back: what is kept and what is new must not differ in their types.
    timed: list[Entry] = json.loads(json.dumps([{**entry, "seconds": seconds} for entry in entries]))
    folder.write_json({"inputs": inputs, "tests": timed}, "audit", f"{name}.json")
    return timed


def _content(card: Mapping[str, object], options: AuditOptions, tests: list[Entry]) -> dict[str, object]:
    verdicts = {str(test["verdict"]) for test in tests}
    nothing = _unclaimed(card)
    skipped = {name: "left out" for name in TESTS if name in options.skip}
    skipped |= {name: nothing for name in TESTS if nothing and name not in skipped and name != "membership"}
    return {
        "schema_version": _SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": next((verdict for verdict in ("fail", "warn", "pass") if verdict in verdicts), "informs"),
        "statement": _STATEMENT,
        "claim": {key: card.get(key) for key in ("unit", "relation", "epsilon", "delta")},
        "tests": tests,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
    }
