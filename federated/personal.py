"""What stays with one owner: parameters and a model of its own, and what its codec has not sent yet.

None of it travels. It lies on the owner's disk, one file a round, and the newest three are kept: an owner that is asked
a round again begins where it began the first time, also by a server that had to fall back by a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from tacit.devices.durable import FileDamaged, write_durably
from tacit.devices.failpoint import reach
from tacit.federated.clipping import Arrays
from tacit.federated.noise import Randomness
from tacit.federated.task import Records
from tacit.federated.train import LocalTrainer
from tacit.federated.update_codec import Codec

__all__ = ["Asked", "Kept", "OwnerStore", "own_names"]

Personal = Literal["none", "fedbn", "local-head", "ditto"]
_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)


def own_names(model: torch.nn.Module, personal: Personal) -> tuple[str, ...]:
    """Names of the float parameters and buffers that stay with an owner.

    FedBN keeps every normalisation layer (Li et al. 2021), a local head the last layer that has parameters (FedPer,
    Arivazhagan et al. 2019); Ditto's own model is another one, and all of the shared one travels.

    Raises:
        ValueError: nothing would stay, or nothing would travel.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 2))
    >>> own_names(model, "fedbn"), own_names(model, "local-head")
    (('1.weight', '1.bias'), ('2.weight', '2.bias'))
    """
    if personal in ("none", "ditto"):
        return ()
    layers = {name: layer for name, layer in model.named_modules() if any(True for _ in layer.parameters(False))}
    chosen = [name for name, layer in layers.items() if isinstance(layer, _NORMS)]
    if personal == "local-head":
        chosen = list(layers)[-1:]
    every = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    own = tuple(name for name in every if name.rpartition(".")[0] in chosen)
    if not own or len(own) == len(every):
        raise ValueError(
            f"expected a model of which a part stays with its owner, got {len(own)} of {len(every)} arrays for "
            f"personal={personal!r}; choose another model or personal='none'"
        )
    return own


@dataclass(frozen=True)
class OwnerStore:
    """An owner's state by round, in a folder of its own.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = OwnerStore(Path(folder))
    ...     store.write(1, {"own.w": np.float32([1.0])})
    ...     store.write(2, {"own.w": np.float32([2.0])})
    ...     store.before(2)["own.w"].tolist(), store.before(3)["own.w"].tolist(), store.before(1)
    ([1.0], [2.0], {})
    """

    folder: Path

    def before(self, server_round: int) -> Arrays:
        """What was kept in the newest round before this one; empty when there is none.

        Raises:
            FileDamaged: it cannot be read.
        """
        earlier = [path for path in self._files() if int(path.stem) < server_round]
        return _read(earlier[-1]) if earlier else {}

    def write(self, server_round: int, arrays: Arrays) -> None:
        """Keeps the state after a round, durably, and the two before it; older and later ones go."""
        for folder in (self.folder.parent, self.folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in self.folder.glob(".*.tmp"):  # of a process that died
            leftover.unlink()
        path = self.folder / f"{server_round:06d}.safetensors"
        reach("store.before_write")
        write_durably(path, save(dict(arrays)))
        reach("store.before_removal")
        files = self._files()
        place = files.index(path)
        for other in [*files[: max(0, place - 2)], *files[place + 1 :]]:
            other.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))


def _read(path: Path) -> Arrays:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise FileDamaged(f"expected what this owner kept, got {path}: {error}; restore the file") from None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a message asks of an owner.

    Attributes:
        arrays: the shared model, by name.
        server_round: from 1.
        correction: SCAFFOLD's, or None.
        clip_norm: of a client's whole update at client level, or None.
    """

    arrays: Arrays
    server_round: int
    correction: Arrays | None = None
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How an owner's own part takes part in a round.

    *Guarantees*: what is returned to be sent depends on nothing without noise but the received arrays and, where the
    mechanism clips and noises them together with the rest, parameters that stay. A codec works on what is noised
    already (units record and local), or before the server decodes, clips and noises (unit client).

    Attributes:
        store: on the owner's disk; None where nothing is kept.
        own: parameters that stay, as the untrained model has them.
        ditto: λ of an own model beside the shared one; None for none.
        codec: what updates are sent as; None for whole models.
        error_feedback: whether what a codec leaves out is added to the next update.
    """

    store: OwnerStore | None = None
    own: Arrays = field(default_factory=dict)
    ditto: float | None = None
    codec: Codec | None = None
    error_feedback: bool = False

    def train(
        self, trainer: LocalTrainer, asked: Asked, records: Records, randomness: Randomness
    ) -> tuple[Arrays, bool]:
        """One participation.

        Returns:
            What is sent, and, at client level, whether the update was within its norm before it was clipped.
        """
        before = self.store.before(asked.server_round) if self.store else {}
        own = _part(before, "own") or self.own
        within = True
        if asked.clip_norm is None:
            after = trainer.update(asked.arrays, records, randomness, own=own, correction=asked.correction)
        else:
            after, within = trainer.client_update(asked.arrays, records, randomness, clip_norm=asked.clip_norm, own=own)
        kept = {f"own.{name}": after[name] for name in own}
        if self.ditto is not None:
            personal = _part(before, "personal") or asked.arrays
            moved = trainer.personal_update(personal, asked.arrays, records, randomness, strength=self.ditto)
            kept |= {f"personal.{name}": array for name, array in moved.items()}
        sent, residual = self._coded(asked.arrays, after, _part(before, "residual"))
        kept |= {f"residual.{name}": array for name, array in residual.items()}
        if self.store is not None:
            self.store.write(asked.server_round, kept)
        return sent, within

    @property
    def bare(self) -> bool:
        """Whether an owner keeps nothing, and sends whole models."""
        return self.store is None and self.codec is None and not self.own and self.ditto is None

    def own_before(self, server_round: int) -> Arrays:
        """Parameters that stay, as a round finds them."""
        if not self.own:
            return {}
        return _part(self.store.before(server_round) if self.store else {}, "own") or self.own

    def model(self, arrays: Arrays, server_round: int, *, personal: bool = True) -> Arrays:
        """The model that this owner uses: its own where it has one, else the shared one with its own parameters.

        Args:
            arrays: the shared model, by name.
            server_round: from 1.
            personal: False for what may be known of single records: Ditto's model then stays out.
        """
        kept = self.store.before(server_round + 1) if self.store else {}
        own = _part(kept, "personal") if personal else {}
        return own or {**arrays, **(_part(kept, "own") or self.own)}

    def _coded(self, before: Arrays, after: Arrays, residual: Arrays) -> tuple[Arrays, Arrays]:
        """What is sent of a model, and what of its update is not."""
        if self.codec is None:
            return {name: after[name] for name in before}, {}
        update = {name: after[name] - before[name] for name in before}
        if not self.error_feedback:
            return self.codec.encode(update, None)[0], {}
        zeros = {name: array * 0 for name, array in update.items()}
        return self.codec.encode(update, residual or zeros)


def _part(kept: Arrays, what: str) -> Arrays:
    return {name.removeprefix(f"{what}."): array for name, array in kept.items() if name.startswith(f"{what}.")}
