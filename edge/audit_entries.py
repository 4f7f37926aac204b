"""The four tests of an audit, each from the run's own parts to entries of audit.json."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tacit.edge.audit_shadows import Asked, attack_models, scratch_ledger
from tacit.edge.composition import Composition, build_model
from tacit.edge.flower_app import server_plan
from tacit.edge.progress import Progress
from tacit.edge.run_folder import RunFolder
from tacit.federated.audit import audit_mechanism
from tacit.federated.canaries import audit_canaries
from tacit.federated.canary_run import CanaryRun
from tacit.federated.mechanism import Mechanism
from tacit.federated.membership import Attack, allowed_hit_rate
from tacit.federated.noise import public_generator
from tacit.federated.noise_audit import NOISE_ALARM, audit_noise
from tacit.federated.owner import Owner
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer

__all__ = ["Bench", "Entry", "canaries_entry", "mechanism_entry", "membership_entries", "noise_entry"]

_SYNTHETIC = 32
Entry = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the tests work on.

    Attributes:
        folder: the run.
        composition: what its recipe comes to, without evaluations; a scratch folder holds its logs.
        claim: the run's privacy card.
        progress: where to report to.
    """

    folder: RunFolder
    composition: Composition
    claim: Mapping[str, object]
    progress: Progress

    @property
    def mechanism(self) -> Mechanism:
        """The run's; where owners' sizes are public, that of the owner with the least noise."""
        made = (owner.mechanism for owner in self.composition.owners)
        return min(made, key=lambda mechanism: mechanism.noise_multiplier)


def mechanism_entry(bench: Bench, *, trials: int | None) -> Entry:
    """One step, q = 1, on the worst neighbouring inputs, against the closed form."""
    mechanism, progress = bench.mechanism, bench.progress

    def step(done: int, total: int, name: str) -> None:
        if done == 0:
            progress.begin("mechanism", total)
        progress.step(done, name)

    found = audit_mechanism(mechanism, bench.composition.draw("audit"), trials=trials, progress=step)
    progress.end(f"ε ≥ {found.epsilon:.2f} found in one step, {found.claim:.2f} allowed")
    return {
        "name": "mechanism",
        "method": "Clopper-Pearson bounds at 5 thresholds fixed in advance, each against the closed form of one "
        "Gaussian release (Balle and Wang 2018)",
        "n": found.trials,
        "statistic": found.epsilon,
        "interval": [found.epsilon, None],
        "confidence": 0.95,
        "claim": found.claim,
        "delta": mechanism.delta,
        "verdict": found.verdict,
        "reason": found.reason,
        "details": {
            "statistic_is": "lower bound of ε, one step with q = 1",
            "cases": list(found.cases),
            "epsilon_if_gaussian": [_finite(bound) for bound in found.estimate],
            "noticed_below": found.noticed,
            "failure_confidence": "1 - 5e-7 over all cases",
        },
    }


def noise_entry(bench: Bench) -> Entry:
    """What the mechanism releases of nothing, and whether it ever comes again."""
    bench.progress.begin("noise", 1)
    found = audit_noise(bench.mechanism, bench.composition.draw("audit"))
    smallest = min(found.p_values.values())
    bench.progress.end(f"{len(found.p_values)} checks of {found.draws:,} draws, smallest p {smallest:.2g}")
    return {
        "name": "noise",
        "method": "mean, size, shape (Kolmogorov and Smirnov) and tails against N(0, (zC)²); independence of releases "
        "and of forked processes at every lag",
        "n": found.draws,
        "statistic": smallest,
        "interval": None,
        "confidence": 1.0 - NOISE_ALARM,
        "claim": NOISE_ALARM / len(found.p_values),
        "delta": None,
        "verdict": found.verdict,
        "reason": found.reason,
        "details": {
            "statistic_is": "smallest p-value",
            "p_values": dict(found.p_values),
            "standard_deviation_over_claimed": found.measured,
        },
    }


def canaries_entry(bench: Bench, *, canaries: int) -> Entry:
    """Canaries through the run's own owners, strategy, ledger and round loop, in a scratch folder."""
    composition, progress = bench.composition, bench.progress
    federated, interface = composition.recipe.federated, composition.task.interface
    progress.begin("canaries", federated.rounds)
    with tempfile.TemporaryDirectory(prefix="tacit-canaries-") as scratch:
        target = Path(scratch, "train")
        target.mkdir()
        ledger = scratch_ledger(composition, Path(scratch))
        try:
            run = CanaryRun(
                owners=_company(bench),
                model=build_model(composition.recipe),
                shape=interface.shape,
                classes=len(interface.labels),
                trainer=partial(
                    LocalTrainer, mechanism=bench.mechanism, learning_rate=federated.learning_rate, batch_rate=1.0
                ),
                plan=server_plan(_uniform(composition), target, run="canaries", report=_ignored, ledger=ledger),
                ledger=ledger,
            )
            found = audit_canaries(
                run, canaries=canaries, progress=lambda done, total: progress.step(done, f"round {done} of {total}")
            )
        finally:
            ledger.close()
    progress.end(f"ε ≥ {found.epsilon:.2f} found in {found.rounds} rounds, {found.claim:.2f} claimed")
    if found.provable <= found.alarm_claim:
        progress.note(
            f"no alarm was possible: {found.alarm_rounds} rounds claim ε = {found.alarm_claim:.2f} at "
            f"δ = {found.alarm_delta:g}, and {canaries} canaries prove {found.provable:.2f} at best"
        )
    return {
        "name": "canaries",
        "method": "one training with canaries of random gradients and secret coins, numbers of guesses fixed in "
        "advance (Steinke, Nasr and Jagielski 2023)",
        "n": found.canaries,
        "statistic": found.epsilon,
        "interval": [found.epsilon, None],
        "confidence": 0.95,
        "claim": found.claim,
        "delta": bench.mechanism.delta,
        "verdict": found.verdict,
        "reason": found.reason,
        "details": {
            "statistic_is": "lower bound of ε after these rounds; a smoke alarm for errors of ten times",
            "rounds": found.rounds,
            "alarm": {
                "rounds": found.alarm_rounds,
                "delta": found.alarm_delta,
                "epsilon": found.alarm_epsilon,
                "claim": found.alarm_claim,
                "provable": found.provable,
            },
            "failure_confidence": "1 - 5e-7",
        },
    }


def _uniform(composition: Composition) -> Composition:
    """The same with equal weights: canaries declare no size."""
    federated = composition.recipe.federated.model_copy(update={"weights": "uniform", "weight_cap": None})
    return replace(composition, recipe=composition.recipe.model_copy(update={"federated": federated}))


def _ignored(row: Mapping[str, object]) -> None:
    """A round's row: the auditor has eyes of its own."""


def _company(bench: Bench) -> Sequence[Owner]:
    """The owners whose records keep canaries company; where those are private, noise takes their place."""
    composition = bench.composition
    owners = [replace(owner, mechanism=bench.mechanism, evaluation=None) for owner in composition.owners]
    if composition.data.status == "public-benchmark":
        return owners
    interface, generator = composition.task.interface, public_generator(0, "audit company")
    inputs = generator.standard_normal((_SYNTHETIC, *interface.shape)).astype(np.float32)
    records = Records(inputs, generator.integers(len(interface.labels), size=_SYNTHETIC))
    return [replace(owner, records=lambda: records) for owner in owners]


def membership_entries(bench: Bench, models: Sequence[Asked], *, shadows: int, key: str) -> list[Entry]:
    """The float model and every artifact, asked about members and others; informs, never fails."""
    progress = bench.progress
    progress.begin("membership", shadows + len(models))
    attacks = attack_models(bench.folder, bench.composition, models, shadows=shadows, key=key, progress=progress.step)
    first = attacks[models[0].name]
    progress.end(f"AUC {first.auc:.3f} of {models[0].name}, {len(models)} models asked")
    return [_membership_entry(bench, model, attacks[model.name], shadows) for model in models]


def _membership_entry(bench: Bench, model: Asked, attack: Attack, shadows: int) -> Entry:
    details = asdict(attack)
    for told in ("auc", "auc_interval"):
        details.pop(told)
    return {
        "name": "membership",
        "artifact": model.name,
        "sha256": model.sha256,
        "method": f"offline LiRA with {shadows} shadow models (Carlini et al. 2022)"
        if shadows
        else "one threshold of confidence for all records (Yeom et al. 2018)",
        "n": attack.members + attack.others,
        "statistic": attack.auc,
        "interval": list(attack.auc_interval),
        "confidence": 0.95,
        "claim": None,
        "delta": None,
        "verdict": "informs",
        "reason": "",
        "details": {
            "statistic_is": "area under the curve; 0.5 by chance",
            **details,
            "shadows": shadows,
            "allowed_hit_rate": _allowed(bench, attack.false_rate),
        },
    }


def _allowed(bench: Bench, false_rate: float) -> float | None:
    """What the run's (ε, δ) allows at a false positive rate, where the unit covers a single record's membership."""
    # At client level one record more or less replaces its client's update, which add/remove does not bound by ε.
    if bench.claim.get("unit") not in ("record", "local") or "VOID" in str(bench.claim.get("noise")):
        return None
    epsilon, delta = float(str(bench.claim["epsilon"])), float(str(bench.claim["delta"]))
    return allowed_hit_rate(false_rate, epsilon=epsilon, delta=delta)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
