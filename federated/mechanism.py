"""One object from which sampler, clip, noise and accounting of a run are all made, so that they cannot drift apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.accounting import Event, calibrate_noise, reported_epsilon
from tacit.federated.clipping import Arrays, clip_update, clipped_sum
from tacit.federated.noise import Randomness
from tacit.federated.secure_noise import secure_noisy_sum

__all__ = ["Mechanism", "PrivacyRefused"]

Unit = Literal["record", "client", "local", "none"]


class PrivacyRefused(ValueError):
    """What was asked for cannot keep the guarantee."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is sampled, clipped and noised, and what that costs, for each unit of privacy.

    - record: DP-SGD at one owner (Abadi et al. 2016, algorithm 1): a Poisson batch's clipped gradients, summed, plus
      N(0, (zC)²), over q·n_ref.
    - client: DP-FedAvg at the server (McMahan et al. 2018): a Poisson cohort's clipped updates, summed, plus
      N(0, (zC)²), over q·N_ref.
    - local: each owner noises its own update with N(0, (z·2C)²): replacing everything that it holds moves it by 2C.

    *Guarantees*: every field is a constant of the recipe, the same for every owner and fixed before a record is read,
    so two neighbouring data sets are treated by the same mechanism.

    Attributes:
        unit: whose contribution is hidden: a record's, a client's, a client's from the server too, or nobody's.
        sample_rate: q, the probability with which each record joins a batch, or each client a cohort; 1 for local.
        max_grad_norm: C, the L2 bound of one record's gradient, or of one client's update, over all parameters
            together; infinite for no clipping.
        noise_multiplier: z, the noise's standard deviation over the sensitivity.
        steps_per_round: local steps of one participation.
        rounds: planned participations, a cap that the ledger enforces.
        reference_size: n_ref records or N_ref clients; sums are divided by q times it, never by a real count.
        delta: the δ at which ε is stated.
        twin: the same without noise and without a guarantee, to show what privacy costs.
        hardened: sums and noise on an integer grid, from ChaCha20 (`secure_noise`), against floating-point attacks.
        sizes: whether how many records an owner holds is secret (the default), or declared: then neighbours differ in
            what one record holds, not in how many there are (zero-out).
        void: batches and noise come from a seed, for tests: whoever knows it sees through both, so nothing holds.

    >>> plan = {"steps_per_round": 1, "rounds": 10, "reference_size": 64, "delta": 1e-5}
    >>> mechanism = Mechanism(unit="record", sample_rate=0.5, max_grad_norm=1.0, noise_multiplier=2.0, **plan)
    >>> mechanism.normaliser, mechanism.event
    (32.0, Event(sample_rate=0.5, noise_multiplier=2.0))
    >>> from tacit.federated.noise import SeededGenerator
    >>> mechanism.draw_batch(8, SeededGenerator(1)).tolist()  # a real run draws from a SecretGenerator
    [0, 1, 4, 5, 6, 7]
    """

    unit: Unit
    sample_rate: float
    max_grad_norm: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    reference_size: int
    delta: float
    twin: bool = False
    hardened: bool = False
    void: bool = False
    sizes: Literal["secret", "public"] = "secret"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise PrivacyRefused(f"expected unit among {', '.join(get_args(Unit))}, got unit={self.unit!r}")
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"expected 0 < delta < 1, got delta={self.delta}")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ValueError(f"expected 0 < sample_rate <= 1, got sample_rate={self.sample_rate}")
        if min(self.steps_per_round, self.rounds, self.reference_size) < 1:
            raise ValueError("expected steps_per_round, rounds and reference_size of at least 1")
        if not self.max_grad_norm > 0.0:
            raise ValueError(f"expected max_grad_norm > 0, got max_grad_norm={self.max_grad_norm}")
        if self.private and not (math.isfinite(self.max_grad_norm) and 0.0 < self.noise_multiplier < math.inf):
            raise PrivacyRefused(
                f"expected a finite max_grad_norm and noise_multiplier > 0 for unit {self.unit!r}, "
                f"got max_grad_norm={self.max_grad_norm}, noise_multiplier={self.noise_multiplier}"
            )
        if not self.private and self.noise_multiplier != 0.0:
            raise ValueError(f"expected noise_multiplier=0 without a guarantee, got {self.noise_multiplier}")
        if self.hardened and not self.private and not self.twin:
            raise ValueError("expected a guarantee to harden, got unit='none'")
        if self.sizes == "public" and self.unit not in ("record", "none"):
            raise PrivacyRefused(f"expected secret sizes for unit {self.unit!r}, whose guarantee covers them")
        if self.unit == "local" and self.sample_rate != 1.0:
            raise ValueError(f"expected sample_rate=1 for unit 'local', got {self.sample_rate}")

    @property
    def private(self) -> bool:
        """Whether a guarantee is claimed."""
        return self.unit != "none" and not self.twin

    @property
    def per_record(self) -> bool:
        """Whether each record's gradient is clipped by itself."""
        return self.unit == "record" or (self.unit == "none" and math.isfinite(self.max_grad_norm))

    @property
    def relation(self) -> str:
        """What neighbouring data sets differ in."""
        if self.unit == "local":
            return "replace-one"
        return "zero-out" if self.sizes == "public" else "add/remove"

    @property
    def events_per_round(self) -> int:
        """Accesses of one participation: each local step at record level, one release otherwise."""
        return self.steps_per_round if self.unit == "record" else 1

    @property
    def event(self) -> Event:
        """What one access costs. The noise is in units of the sensitivity, so 2C of unit local is already in it."""
        return Event(sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier)

    @property
    def normaliser(self) -> float:
        """q·n_ref, the expected batch of an owner of the reference size."""
        return self.sample_rate * self.reference_size

    @property
    def plan(self) -> dict[Event, int]:
        """How often each kind of access is planned."""
        return {self.event: self.rounds * self.events_per_round}

    def planned_epsilon(self) -> float:
        """ε of all planned participations: PLD, or RDP where that exceeds 50."""
        return reported_epsilon(self.plan, self.delta)

    def describe(self) -> dict[str, str | float | int]:
        """The mechanism as a ledger entry states it."""
        return {
            "unit": self.unit,
            "relation": self.relation,
            "sampler": "none" if self.unit == "local" else "poisson",
            "noise": ("gaussian on a grid" if self.hardened else "gaussian") + self.void * ", guarantee void",
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "steps": self.events_per_round,
        }

    def draw_batch(self, size: int, randomness: Randomness) -> npt.NDArray[np.int64]:
        """A Poisson batch: each of `size` records independently with probability q; it may be empty."""
        return np.flatnonzero(randomness.bernoulli(size, self.sample_rate))

    def noisy_mean(
        self, chunks: Iterable[Sequence[torch.Tensor]], shapes: Sequence[torch.Size], randomness: Randomness
    ) -> list[torch.Tensor]:
        """The only thing that leaves a step: clipped sum, plus noise, over the public normaliser.

        Args:
            chunks: per-record gradients of one batch, in pieces; each piece holds, per parameter, (records, *shape). No
                piece at all is an empty batch, which releases noise.
            shapes: shape of each parameter.
            randomness: where the noise comes from.

        Returns:
            One tensor per parameter, float32.
        """
        if self.hardened and self.private:
            return self._hardened_mean(chunks, shapes, randomness)
        total = [torch.zeros(shape) for shape in shapes]
        for chunk in chunks:
            total = [a + b for a, b in zip(total, clipped_sum(chunk, self.max_grad_norm), strict=True)]
        return self.noised(total, randomness)

    def noised(self, total: list[torch.Tensor], randomness: Randomness) -> list[torch.Tensor]:
        """`noisy_mean` of a batch whose clipped gradients somebody else has summed, at the same C; float noise only.

        Raises:
            PrivacyRefused: hardened noise, which needs each record's gradient on the grid.
        """
        if self.hardened and self.private:
            raise PrivacyRefused("expected per-record gradients for hardened noise, got their sum; use noisy_mean")
        if self.noise_multiplier > 0.0:
            total = _add_noise(total, self.noise_multiplier * self.max_grad_norm, randomness)
        return [gradient / self.normaliser for gradient in total]

    def _hardened_mean(
        self, chunks: Iterable[Sequence[torch.Tensor]], shapes: Sequence[torch.Size], randomness: Randomness
    ) -> list[torch.Tensor]:
        flat = (torch.cat([g.reshape(g.shape[0], -1) for g in chunk], dim=1) for chunk in chunks)
        total = torch.from_numpy(self._hardened_sum(flat, sum(shape.numel() for shape in shapes), randomness))
        pieces = torch.split(total / self.normaliser, [shape.numel() for shape in shapes])
        return [piece.reshape(shape).float() for piece, shape in zip(pieces, shapes, strict=True)]

    def _hardened_sum(
        self,
        chunks: Iterable[torch.Tensor | npt.NDArray[np.float64]],
        size: int,
        randomness: Randomness,
        *,
        bound: float | None = None,
        multiplier: float | None = None,
    ) -> npt.NDArray[np.float64]:
        return secure_noisy_sum(
            chunks,
            size=size,
            clip_norm=self.max_grad_norm if bound is None else bound,
            noise_multiplier=self.noise_multiplier if multiplier is None else multiplier,
            generator=randomness,
        )

    def release_locally(self, update: Arrays, randomness: Randomness) -> dict[str, npt.NDArray[np.float64]]:
        """What an owner sends under unit local: its update clipped to C, plus N(0, (z·2C)²)."""
        if self.hardened and self.private:
            row, doubled = _row(update), 2.0 * self.noise_multiplier
            return _unrow(self._hardened_sum([row[None]], row.size, randomness, multiplier=doubled), update)
        clipped = clip_update(update, self.max_grad_norm)
        return _add_noise_to_arrays(clipped, 2.0 * self.noise_multiplier * self.max_grad_norm, randomness)

    def draw_cohort(self, clients: Sequence[int], randomness: Randomness) -> list[int]:
        """A Poisson cohort: each client independently with probability q; it may be empty."""
        coins = randomness.bernoulli(len(clients), self.sample_rate)
        return [client for client, coin in zip(clients, coins, strict=True) if coin]

    def noisy_average(
        self,
        updates: Iterable[Arrays],
        like: Arrays,
        randomness: Randomness,
        *,
        clip_norm: float | None = None,
        noise_multiplier: float | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """What a server releases under unit client: clipped updates summed, plus N(0, (zC)²), over q·N_ref.

        Args:
            updates: of the clients that answered; a client that did not contributes zero, which changes nothing.
            like: arrays of the names and shapes to return.
            randomness: secret for a guarantee.
            clip_norm: this round's C, when it is learned.
            noise_multiplier: z_Δ, when part of z pays for learning C.
        """
        bound = self.max_grad_norm if clip_norm is None else clip_norm
        multiplier = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        if self.hardened and self.private:
            rows = (_row(update)[None] for update in updates)
            row = self._hardened_sum(rows, _row(like).size, randomness, bound=bound, multiplier=multiplier)
            return {n: np.asarray(a / self.normaliser, dtype=np.float32) for n, a in _unrow(row, like).items()}
        total = {name: np.zeros(array.shape) for name, array in like.items()}
        for update in updates:
            for name, array in clip_update(update, bound).items():
                total[name] += array
        noised = _add_noise_to_arrays(total, multiplier * bound, randomness)
        return {name: np.asarray(array / self.normaliser, dtype=np.float32) for name, array in noised.items()}

    def noise_on_count(self, standard_deviation: float, randomness: Randomness) -> float:
        """Noise for a sum of halves; 0 without a guarantee.

        Hardened, it is a multiple of 2⁻²⁰, as halves are: so the sum is rounded as a whole, which is post-processing.
        """
        if not self.private:
            return 0.0
        noise = float(randomness.gaussian(1, standard_deviation)[0])
        return round(noise * 2**20) / 2**20 if self.hardened else noise

    def of_size(self, size: int) -> Mechanism:
        """The same for an owner that declared its size: the same expected batch B, drawn at its own rate B/size.

        Its noise has to be calibrated to that rate. Zero-out (dp-accounting's REPLACE_SPECIAL) costs what add/remove
        does.

        Raises:
            PrivacyRefused: sizes are secret.

        >>> made = Mechanism(unit="record", sample_rate=0.5, max_grad_norm=1.0, noise_multiplier=2.0, steps_per_round=1,
        ...                  rounds=10, reference_size=64, delta=1e-5, sizes="public")
        >>> made.of_size(320).sample_rate, made.of_size(320).normaliser, made.of_size(20).sample_rate
        (0.1, 32.0, 1.0)
        """
        if self.sizes != "public":
            raise PrivacyRefused("expected declared sizes for a rate of an owner's own, got sizes='secret'")
        return replace(self, sample_rate=min(1.0, self.normaliser / size), reference_size=size)

    def calibrated(self, epsilon: float, also: Mapping[Event, int] | None = None) -> Mechanism:
        """The same with the least noise, from above, whose ε over all planned participations is at most `epsilon`.

        Args:
            epsilon: the budget.
            also: other accesses planned for the same records, which share it.
        """
        steps = self.rounds * self.events_per_round
        noise = calibrate_noise(epsilon=epsilon, delta=self.delta, sample_rate=self.sample_rate, steps=steps, also=also)
        return replace(self, noise_multiplier=noise, twin=False)


def _add_noise(total: list[torch.Tensor], standard_deviation: float, randomness: Randomness) -> list[torch.Tensor]:
    noise = torch.from_numpy(randomness.gaussian(sum(t.numel() for t in total), standard_deviation))
    pieces = torch.split(noise, [t.numel() for t in total])
    return [(t.double() + n.reshape(t.shape)).float() for t, n in zip(total, pieces, strict=True)]


def _add_noise_to_arrays(
    arrays: Mapping[str, npt.NDArray[np.float64]], standard_deviation: float, randomness: Randomness
) -> dict[str, npt.NDArray[np.float64]]:
    if standard_deviation == 0.0:
        return dict(arrays)
    noise = randomness.gaussian(sum(array.size for array in arrays.values()), standard_deviation)
    pieces = _unrow(noise, arrays)
    return {name: np.asarray(array + pieces[name]) for name, array in arrays.items()}


def _row(arrays: Mapping[str, npt.NDArray[np.floating[Any]]]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in arrays.values()])


def _unrow(
    row: npt.NDArray[np.float64], like: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> dict[str, npt.NDArray[np.float64]]:
    pieces = np.split(row, np.cumsum([array.size for array in like.values()])[:-1])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}
