"""Membership inference on a run: shadow models trained as the run was, then the float model and every artifact asked.

Shadow models read records without a charge, which is allowed on public benchmark data only. Each is kept in DIR/audit
as what it says of the pool, so that an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tacit.devices.durable import write_durably
from tacit.edge.composition import Composition, build_model
from tacit.edge.flower_app import server_plan
from tacit.edge.run_folder import RunFolder
from tacit.edge.variants import built_artifacts, predictor_of
from tacit.federated.checkpoint import read_weights
from tacit.federated.client_app import CohortGate
from tacit.federated.federation import run_plan
from tacit.federated.ledger import Ledger
from tacit.federated.membership import Attack, confidences, judge_attack, lira_scores, shadow_halves
from tacit.federated.noise import public_generator
from tacit.federated.outbox import Outbox
from tacit.federated.owner import Owner
from tacit.federated.task import DataProblem, Records
from tacit.federated.train import Arrays, read_arrays

__all__ = ["Asked", "ask_models", "attack_models", "scratch_ledger"]

_UNBOUNDED_EPSILON = 1e9
_MOST_ASKED = 2000  # members, and as many others: enough for narrow intervals, and few enough for any runtime

Confidences = npt.NDArray[np.float64]
Predict = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model of the run and how it is asked.

    Attributes:
        name: of the variant, or "float model".
        sha256: of its file.
        predict: preprocessed inputs (records, *shape) to logits (records, classes).
    """

    name: str
    sha256: str
    predict: Predict


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """What owners hold, and the test split dealt out to them as if they held it too.

    Attributes:
        by_owner: each owner's records, the dealt ones last.
        asked: positions in all of it that models are asked about.
        member: (asked,), whether the run was trained on it.
    """

    by_owner: Sequence[Records]
    asked: npt.NDArray[np.int64]
    member: npt.NDArray[np.bool_]

    @property
    def size(self) -> int:
        return sum(len(records) for records in self.by_owner)

    def questions(self) -> Records:
        inputs = np.concatenate([records.inputs for records in self.by_owner])
        labels = np.concatenate([records.labels for records in self.by_owner])
        return Records(inputs, labels).take(self.asked)

    def halves(self, seen: npt.NDArray[np.bool_]) -> Iterator[Records]:
        """What each owner holds of the half that one shadow is trained on."""
        start = 0
        for records in self.by_owner:
            yield records.take(np.flatnonzero(seen[start : start + len(records)]))
            start += len(records)


def ask_models(folder: RunFolder) -> list[Asked]:
    """The float model and every artifact, each through its own runtime, artifacts in the sandbox.

    Raises:
        FileDamaged: an artifact is not the file that was judged.
    """
    weights = folder.train / "weights.safetensors"
    asked = [_asked("float model", weights, _in_torch(folder, read_weights(weights)))]
    for artifact in built_artifacts(folder):
        asked.append(_asked(artifact.name, artifact.path, predictor_of(folder, artifact)))
    return asked


def attack_models(
    folder: RunFolder,
    composition: Composition,
    models: Sequence[Asked],
    *,
    shadows: int,
    key: str,
    progress: Callable[[int, str], None],
) -> dict[str, Attack]:
    """Attacks each model of a run with the same shadow models.

    Args:
        folder: the run.
        composition: what its recipe comes to.
        models: of `ask_models`.
        shadows: how many to train; 0 for an attack without.
        key: digest of everything that a shadow depends on; others that are kept are made anew.
        progress: told of steps done, one for each shadow and each model, and of the last one.

    Returns:
        By the model's name.

    Raises:
        DataProblem: no test split to take records from that the run has not seen.
    """
    pool = _pool(composition)
    seen = shadow_halves(pool.size, shadows, seed=composition.recipe.federated.seed)
    questions = pool.questions()
    said = []
    for index in range(shadows):
        said.append(_shadow(folder, composition, pool, seen[index], index=index, key=key))
        progress(index + 1, f"shadow {index + 1} of {shadows}")
    baseline = np.array(said).reshape(shadows, len(questions))
    attacks = {}
    for done, model in enumerate(models, shadows + 1):
        target = confidences(model.predict(questions.inputs), questions.labels)
        attacks[model.name] = judge_attack(lira_scores(target, baseline, seen[:, pool.asked]), pool.member)
        progress(done, model.name)
    return attacks


def _asked(name: str, path: Path, predict: Predict) -> Asked:
    return Asked(name=name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), predict=predict)


def _in_torch(folder: RunFolder, arrays: Arrays) -> Predict:
    model = build_model(folder.recipe)
    read_arrays(model, arrays)
    model.eval()

    def predict(inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            pieces = [model(torch.from_numpy(inputs[i : i + 1024])).numpy() for i in range(0, len(inputs), 1024)]
        return np.concatenate(pieces)

    return predict


def _pool(composition: Composition) -> _Pool:
    test = composition.data.test
    if test is None:
        raise DataProblem("expected a test split to compare members with, got none; skip membership")
    owned = [owner.records() for owner in composition.owners]
    dealt = [test.take(np.arange(index, len(test), len(owned))) for index in range(len(owned))]
    member = np.concatenate([np.arange(len(o) + len(d)) < len(o) for o, d in zip(owned, dealt, strict=True)])
    generator = public_generator(composition.recipe.federated.seed, "membership")
    chosen = [generator.permutation(np.flatnonzero(member == kind))[:_MOST_ASKED] for kind in (True, False)]
    asked = np.sort(np.concatenate(chosen))
    both = [
        Records(np.concatenate([o.inputs, d.inputs]), np.concatenate([o.labels, d.labels]))
        for o, d in zip(owned, dealt, strict=True)
    ]
    return _Pool(by_owner=both, asked=asked, member=member[asked])


def _shadow(
    folder: RunFolder, composition: Composition, pool: _Pool, seen: npt.NDArray[np.bool_], *, index: int, key: str
) -> Confidences:
    """What a shadow says of the pool: as it was kept, or of a new one."""
    path = folder.path / "audit" / f"shadow-{index:02d}.bin"
    kept = _kept(path, key, len(pool.asked))
    if kept is not None:
        return kept
    questions = pool.questions()
    arrays = _train_shadow(composition, list(pool.halves(seen)))
    found = confidences(_in_torch(folder, arrays)(questions.inputs), questions.labels)
    write_durably(path, key.encode() + found.tobytes())
    return found


def _kept(path: Path, key: str, asked: int) -> Confidences | None:
    """A shadow's file is its key, then float64 values; one of another key or length is not of this audit."""
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(key.encode()) or len(content) != len(key) + 8 * asked:
        return None
    return np.frombuffer(content[len(key) :], dtype=np.float64)


def scratch_ledger(composition: Composition, folder: Path) -> Ledger:
    """A ledger that charges nobody and never runs out: for synthetic and for public benchmark data only."""
    mechanism = composition.mechanism
    ledger = Ledger(
        folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=_UNBOUNDED_EPSILON, delta=mechanism.delta
    )
    ledger.plan(mechanism.plan)
    return ledger


def _holding(owner: Owner, records: Records) -> Owner:
    return replace(owner, records=lambda: records, evaluation=None)


def _train_shadow(composition: Composition, halves: Sequence[Records]) -> Arrays:
    """The run's training on other records: its owners, strategy, rounds and noise, with a ledger of its own."""
    owners = [_holding(owner, half) for owner, half in zip(composition.owners, halves, strict=True)]
    with tempfile.TemporaryDirectory(prefix="tacit-shadow-") as scratch:
        target = Path(scratch, "train")
        target.mkdir()
        ledger = None
        if composition.mechanism.private:
            ledger = scratch_ledger(composition, Path(scratch))
        try:
            plan = server_plan(composition, target, run="shadow", report=lambda row: None, ledger=ledger)
            gate = None
            if ledger is not None and composition.mechanism.unit != "client":
                gate = CohortGate(ledger, lambda context: owners[int(context.node_config["partition-id"])])
            run_plan(replace(plan, evaluate=lambda number, arrays: None, doors=None, wait_s=0.0), owners, gate)
        finally:
            if ledger is not None:
                ledger.close()
        return read_weights(target / "weights.safetensors")
