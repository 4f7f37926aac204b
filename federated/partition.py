"""How a data set is dealt out to owners in a simulation. Public randomness: the recipe's seed decides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tacit.federated.noise import public_generator
from tacit.federated.task import DataProblem

__all__ = ["dirichlet", "iid", "owner_names"]

Shares = list[npt.NDArray[np.int64]]


def owner_names(owners: int) -> list[str]:
    """Names of simulated owners, in the order of their shares.

    >>> owner_names(2)
    ['owner-00', 'owner-01']
    """
    width = max(2, len(str(owners - 1)))
    return [f"owner-{i:0{width}d}" for i in range(owners)]


def iid(labels: npt.NDArray[np.int64], owners: int, *, seed: int) -> Shares:
    """Deals records out evenly at random.

    Raises:
        DataProblem: more owners than records.

    >>> [len(share) for share in iid(np.zeros(10, dtype=np.int64), 3, seed=1)]
    [4, 3, 3]
    """
    _check(len(labels), owners)
    order = public_generator(seed, "partition").permutation(len(labels))
    return [np.sort(share) for share in np.array_split(order, owners)]


def dirichlet(labels: npt.NDArray[np.int64], owners: int, *, alpha: float, seed: int) -> Shares:
    """Deals each class out in proportions drawn from a Dirichlet distribution (Hsu et al. 2019).

    Args:
        labels: (records,), integer classes.
        owners: how many shares.
        alpha: concentration; small is skewed, large is even.
        seed: the recipe's seed.

    Returns:
        One sorted array of positions per owner; together they hold each record once.

    Raises:
        DataProblem: more owners than records, or an owner left without a record.

    >>> shares = dirichlet(np.repeat([0, 1], 50), 2, alpha=10.0, seed=1)
    >>> len(shares), sorted(np.concatenate(shares)) == list(range(100))
    (2, True)
    """
    _check(len(labels), owners)
    generator = public_generator(seed, "partition")
    shares: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(owners)]
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        proportions = generator.dirichlet(np.full(owners, alpha))
        cuts = np.round(np.cumsum(proportions)[:-1] * len(positions)).astype(np.int64)
        for share, piece in zip(shares, np.split(positions, cuts), strict=True):
            share.append(piece)
    result = [np.sort(np.concatenate(share)) for share in shares]
    for name, positions in zip(owner_names(owners), result, strict=True):
        if len(positions) == 0:
            raise DataProblem(
                f"expected records for every owner, got none for {name} (dirichlet, alpha={alpha}, seed={seed}); "
                "raise alpha, change the seed or name fewer owners"
            )
    return result


def _check(records: int, owners: int) -> None:
    if owners > records:
        raise DataProblem(f"expected at most one owner per record, got owners={owners} for {records} records")
