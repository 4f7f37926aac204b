"""How one owner learns: its steps of a round, everything private from the mechanism."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.batch_gradients import WRAPPED, BatchGradients
from tacit.federated.clipping import Arrays, clip_update, update_norm
from tacit.federated.local_steps import LocalRule, LocalSteps
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.model_arrays import channels_last, joined, read_arrays, write_arrays
from tacit.federated.noise import Randomness
from tacit.federated.task import Records, Task

__all__ = ["Arrays", "Augment", "LocalTrainer", "read_arrays", "write_arrays"]

Augment = Callable[[npt.NDArray[np.float32], Randomness], npt.NDArray[np.float32]]


class LocalTrainer:
    """Takes an owner's local steps; one per process, because preparing a model takes longer than a step."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        mechanism: Mechanism,
        *,
        learning_rate: float | None = None,
        rule: LocalRule | None = None,
        batch_rate: float = 1.0,
        weight_cap: int | None = None,
        augment: Augment | None = None,
        personal: bool = False,
        chunk: int = 256,
    ) -> None:
        """Prepares a model.

        Args:
            task: gives the loss.
            model: its weights are overwritten at each call.
            mechanism: sampler, clip and noise.
            learning_rate: of plain local SGD; or a rule.
            rule: what is done with a gradient.
            batch_rate: probability with which a record joins a local step's batch where records are not the unit.
            weight_cap: n_cap of a client's weight min(n, n_cap)/n_cap; every client weighs 1 when None.
            augment: makes a random view of each record of a batch, (records, *shape) to the same.
            personal: whether owners have models of their own besides (`personal_update`).
            chunk: records whose gradients are held at once; a larger batch is taken in pieces, never cut.

        Raises:
            PrivacyRefused: a layer, the model or the loss mixes records.
            ValueError: neither a learning rate nor a rule, or both.
        """
        if (learning_rate is None) == (rule is None):
            raise ValueError(f"expected learning_rate or rule, got learning_rate={learning_rate} and rule={rule}")
        self._task, self._model, self._mechanism = task, model, mechanism
        self._rule = rule or LocalRule(learning_rate=learning_rate or 0.0)
        self._augment = augment
        self._batch_rate, self._weight_cap = batch_rate, weight_cap
        if not mechanism.per_record:  # gradients by record are written for weights as they are
            channels_last(model, task.interface.shape)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._steps = LocalSteps(self._rule, self._parameters)
        self._bare = copy.deepcopy(model) if personal else None  # without the hooks that follow
        self._given: Arrays | None = None
        self._gradients = BatchGradients(task, model, mechanism, chunk=chunk)

    def under(self, mechanism: Mechanism) -> LocalTrainer:
        """The same trainer, with the same model, for an owner whose mechanism has a rate and noise of its own."""
        if mechanism is self._mechanism:
            return self
        other = copy.copy(self)
        other._mechanism = mechanism
        return other

    @property
    def model(self) -> torch.nn.Module:
        """The model whose weights are overwritten at each call."""
        return self._model

    def given(self, after: Arrays) -> LocalTrainer:
        """The same trainer for an owner whose steps were taken elsewhere (`cohort`), and ended here."""
        other = copy.copy(self)
        other._given = after
        return other

    def update(
        self,
        arrays: Arrays,
        records: Records,
        randomness: Randomness,
        *,
        own: Arrays | None = None,
        correction: Arrays | None = None,
    ) -> Arrays:
        """The model after this owner's steps: a function of noised gradients and public constants only.

        Args:
            arrays: the global model, by parameter name.
            records: the owner's.
            randomness: secret for a guarantee.
            own: parameters that stay with the owner. At record level they are part of the same steps, clipped and
                noised together with the others; at local level they are as computed, and must not leave.
            correction: added to every gradient (SCAFFOLD), by parameter name; it must be public or noised itself.

        Returns:
            Arrays of the same names and shapes, `own` among them.
        """
        after = self._walk(arrays, records, randomness, own=own, correction=correction)
        if self._mechanism.unit == "local":
            return {**after, **_moved(arrays, self._mechanism.release_locally(_change(arrays, after), randomness))}
        return after

    def _draw_batch(self, size: int, randomness: Randomness) -> npt.NDArray[np.int64]:
        if self._mechanism.unit in ("client", "local"):
            return np.flatnonzero(randomness.bernoulli(size, self._batch_rate))
        return self._mechanism.draw_batch(size, randomness)

    def client_update(
        self,
        arrays: Arrays,
        records: Records,
        randomness: Randomness,
        *,
        clip_norm: float,
        own: Arrays | None = None,
    ) -> tuple[Arrays, bool]:
        """The model after a client's steps, its whole update clipped; the server adds the noise.

        Args:
            arrays: the global model, by parameter name.
            records: the client's.
            randomness: secret for a guarantee.
            clip_norm: this round's C.
            own: parameters that stay with the client, and must not leave.

        Returns:
            The model, `own` included, and whether the update's norm was at most C before it was clipped.
        """
        after = self._walk(arrays, records, randomness, own=own)
        update = self._weighed(_change(arrays, after), len(records))
        changed = clip_update(update, clip_norm)
        return {**after, **_moved(arrays, changed)}, update_norm(update) <= clip_norm

    def mean_loss(self, arrays: Arrays, records: Records) -> float:
        """The model's loss on all of an owner's records, as a mean; it has no noise, so only where nothing is claimed.

        Raises:
            PrivacyRefused: a guarantee is claimed.
        """
        if self._mechanism.private:
            raise PrivacyRefused("expected no guarantee for a loss on records, got one; it has no noise")
        read_arrays(self._model, arrays)
        self._model.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(records), 1024):
                piece = records.take(np.arange(start, min(start + 1024, len(records))))
                inputs, targets = self._gradients.tensors(piece)
                total += float(self._task.loss(self._model(inputs), targets))
        return total / max(1, len(records))

    def personal_update(
        self, personal: Arrays, towards: Arrays, records: Records, randomness: Randomness, *, strength: float
    ) -> Arrays:
        """Ditto's other model after as many steps, pulled towards the global one (Li et al. 2021, algorithm 1).

        It has no noise: it must not leave its owner, and nothing that leaves may depend on it.

        Args:
            personal: where it is, by parameter name.
            towards: the global model.
            records: the owner's.
            randomness: for its batches.
            strength: λ of (λ/2)·‖v - w‖².
        """
        model = self._bare
        if model is None:
            raise RuntimeError("expected a trainer made with personal=True for a model of the owner's own")
        read_arrays(model, joined(model, {}, towards))
        places = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        read_arrays(model, joined(model, {}, personal))
        model.train()
        moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps = LocalSteps(replace(self._rule, proximal=strength), moved, towards=places)
        for _ in range(self._mechanism.steps_per_round):
            batch = self._ready(records.take(self._draw_batch(len(records), randomness)), randomness)
            steps.take(self._gradients.plain(batch, model))
        return write_arrays(model)

    def _weighed(self, update: Arrays, size: int) -> Arrays:
        """A client's weight is part of what is clipped, so a large client moves the sum by no more than C either."""
        if self._weight_cap is None:
            return update
        weight = np.float32(min(size, self._weight_cap) / self._weight_cap)
        return {name: array * weight for name, array in update.items()}

    def _walk(
        self,
        arrays: Arrays,
        records: Records,
        randomness: Randomness,
        *,
        own: Arrays | None = None,
        correction: Arrays | None = None,
    ) -> Arrays:
        """Takes the local steps; returns where the model is then."""
        if self._given is not None:
            return self._given
        read_arrays(self._model, joined(self._model, arrays, own or {}))
        self._model.train()
        self._gradients.forget()
        pull = None if correction is None else self._in_order(correction)
        self._steps = LocalSteps(self._rule, self._parameters, correction=pull)
        for _ in range(self._mechanism.steps_per_round):
            self.step(records.take(self._draw_batch(len(records), randomness)), randomness)
        return write_arrays(self._model)

    def step(self, batch: Records, randomness: Randomness) -> None:
        """Moves the model by one step on a batch; what it moves by is noised where records are the unit.

        Args:
            batch: drawn by the mechanism, for a guarantee; it may be empty.
            randomness: secret for a guarantee.
        """
        batch = self._ready(batch, randomness)
        gradients, mechanism = self._gradients, self._mechanism
        private = self._mechanism.per_record
        steps = gradients.private(batch, mechanism, randomness) if private else gradients.plain(batch)
        self._steps.take(steps)

    def _in_order(self, by_name: Arrays) -> list[torch.Tensor]:
        """Arrays by parameter name in the order of the trainable parameters; zero for one that is not named."""
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        zero = np.zeros((), np.float32)
        return [torch.from_numpy(np.asarray(by_name.get(n.removeprefix(WRAPPED), zero))) for n, _ in named]

    def _ready(self, batch: Records, randomness: Randomness) -> Records:
        """A batch as the model sees it: classified, and one random view of each record where there is augmentation."""
        batch = self._classified(batch)
        if self._augment is None or len(batch) == 0:
            return batch
        return Records(self._augment(batch.inputs, randomness), batch.labels)

    def _classified(self, batch: Records) -> Records:
        """Without records of no class: one would end the whole batch with an error, and tell that it is there."""
        if self._task.kind != "classification":
            return batch
        known = (batch.labels >= 0) & (batch.labels < len(self._task.interface.labels))
        return batch if known.all() else batch.take(np.flatnonzero(known))


def _change(before: Arrays, after: Arrays) -> Arrays:
    return {name: after[name] - before[name] for name in before}


def _moved(arrays: Arrays, change: Mapping[str, npt.NDArray[np.float64]]) -> Arrays:
    return {name: np.asarray(arrays[name] + change[name], dtype=np.float32) for name in arrays}
