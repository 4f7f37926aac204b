"""A sum over an owner's records: one bounded vector for each record, clipped one by one, added up and noised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.clipping import clipped_sum
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.task import Records

__all__ = ["Statistic", "client_mean", "noisy_sum", "sum_mechanism"]

# Of one record: its input (1, *shape) and its label (1,), to a vector of bounded L2 norm.
Statistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CHUNK = 256  # rows held at once


def sum_mechanism(mechanism: Mechanism, *, norm_bound: float, noise_multiplier: float, sums: int) -> Mechanism:
    """What is done to records that enter sums instead of training, under the unit of the training's mechanism.

    - record: every record takes part (q = 1), so the owner releases Σ clip(v) + N(0, (z·bound)²).
    - client: the server draws a Poisson cohort of its own at the training's q and releases
      (Σ clip(mean of a client's v) + N(0, (z·bound)²)) / q.
    - local: the owner releases its clip(mean of v) + N(0, (z·2·bound)²).
    - none, or the twin: the same sums without noise.

    *Guarantees*: the result is a constant of the recipe; one sum costs one `event`.

    Args:
        mechanism: the training's.
        norm_bound: of one record's vector (record), or of a client's mean (client, local), in L2.
        noise_multiplier: z; not used where there is no guarantee.
        sums: how many are planned.

    >>> training = Mechanism(unit="record", sample_rate=0.1, max_grad_norm=1.0, noise_multiplier=1.0,
    ...                      steps_per_round=5, rounds=10, reference_size=64, delta=1e-5)
    >>> summing = sum_mechanism(training, norm_bound=2.0, noise_multiplier=10.0, sums=3)
    >>> summing.plan, summing.normaliser
    ({Event(sample_rate=1.0, noise_multiplier=10.0): 3}, 1.0)
    """
    return replace(
        mechanism,
        sample_rate=mechanism.sample_rate if mechanism.unit == "client" else 1.0,
        max_grad_norm=math.inf if mechanism.unit == "none" else norm_bound,
        noise_multiplier=noise_multiplier if mechanism.private else 0.0,
        steps_per_round=1,
        rounds=sums,
        reference_size=1,
    )


def noisy_sum(
    records: Records, statistic: Statistic, shape: tuple[int, ...], mechanism: Mechanism, randomness: Randomness
) -> torch.Tensor:
    """What one owner releases of a sum over its records: noised under units record and local, exact under none.

    The statistic sees one record at a time: in a batch the rounding of one row may depend on how many others there are,
    and where a statistic jumps, as that of a class does, rounding is enough to change it.

    *Guarantees*: with a statistic that keeps nothing between calls, one record moves the sum before noise by at most
    C under unit record, and everything that the owner holds by at most 2C under unit local. A vector that is not finite
    contributes nothing; an owner without records releases noise.

    Args:
        records: the owner's; read after the charge.
        statistic: of one record.
        shape: of its result.
        mechanism: of `sum_mechanism`.
        randomness: secret for a guarantee.

    Returns:
        float32, of `shape`.

    Raises:
        PrivacyRefused: unit client, where the server adds the noise.
        ValueError: a result of another shape.

    >>> from tacit.federated.noise import SeededGenerator
    >>> exact = Mechanism(unit="none", sample_rate=1.0, max_grad_norm=math.inf, noise_multiplier=0.0,
    ...                   steps_per_round=1, rounds=1, reference_size=1, delta=1e-5)
    >>> records = Records(np.float32([[1.0], [2.0]]), np.int64([0, 1]))
    >>> noisy_sum(records, lambda inputs, labels: inputs[0], (1,), exact, SeededGenerator(1)).tolist()
    [3.0]
    """
    if mechanism.unit == "client":
        raise PrivacyRefused("expected unit record, local or none, got 'client'; its server adds the noise")
    if mechanism.unit == "local":
        mean = client_mean(records, statistic, shape, mechanism.max_grad_norm)
        released = mechanism.release_locally({"sum": mean}, randomness)["sum"]
        return torch.from_numpy(released.astype(np.float32))
    chunks = ([rows] for rows in _rows(records, statistic, shape))
    return mechanism.noisy_mean(chunks, [torch.Size(shape)], randomness)[0]


def client_mean(
    records: Records, statistic: Statistic, shape: tuple[int, ...], norm_bound: float
) -> npt.NDArray[np.float32]:
    """The mean of a client's clipped vectors, of L2 norm at most `norm_bound`; zeros for a client without records.

    A mean, not a sum: what bounds a client must not grow with how much it holds.

    >>> records = Records(np.float32([[3.0], [-1.0]]), np.int64([0, 1]))
    >>> client_mean(records, lambda inputs, labels: inputs[0], (1,), 10.0).tolist()
    [1.0]
    """
    total = torch.zeros(shape)
    for rows in _rows(records, statistic, shape):
        total += clipped_sum([rows], norm_bound)[0]
    mean: npt.NDArray[np.float32] = np.asarray(total.numpy() / np.float32(max(1, len(records))))
    return mean


def _rows(records: Records, statistic: Statistic, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The records' vectors in pieces, (records, *shape) each."""
    for start in range(0, len(records), _CHUNK):
        piece = records.take(np.arange(start, min(start + _CHUNK, len(records))))  # a copy: a statistic may write to it
        inputs, labels = torch.from_numpy(piece.inputs), torch.from_numpy(piece.labels)
        rows = [statistic(inputs[i : i + 1], labels[i : i + 1]).detach().to(torch.float32) for i in range(len(piece))]
        if any(row.shape != torch.Size(shape) for row in rows):
            raise ValueError(f"expected a statistic of shape {shape}, got another; state the right shape")
        yield torch.stack(rows)
