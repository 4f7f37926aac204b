"""How a data set is dealt out to owners in a simulation. Public randomness: the recipe's seed decides.

`flwr_datasets` has partitioners of most of these names. They are not used: its `ShardPartitioner` leaves out what does
not fill a shard, its `PathologicalPartitioner` leaves out classes that it happens not to draw, its sizes are lines,
squares and exponentials or are given, and importing it takes seconds. Where both deal out the same, tests hold ours
against theirs, draw for draw.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tacit.federated.noise import public_generator
from tacit.federated.task import DataProblem

__all__ = ["dirichlet", "iid", "natural", "owner_names", "pathological", "quantity", "shards"]

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


def shards(labels: npt.NDArray[np.int64], owners: int, *, shards_per_owner: int, seed: int) -> Shares:
    """Sorts records by class, cuts them into equal shards and deals these out (McMahan et al. 2017, section 3).

    Of `flwr_datasets.partitioner.ShardPartitioner` it differs where records do not divide evenly: shards then differ in
    size by one, and no record is left out.

    Args:
        labels: (records,), integer classes.
        owners: how many shares.
        shards_per_owner: an owner has about as many classes.
        seed: the recipe's seed.

    Returns:
        One sorted array of positions per owner; together they hold each record once.

    Raises:
        DataProblem: more shards than records.

    >>> labels = np.repeat([0, 1, 2, 3], 10)
    >>> [np.unique(labels[share]).tolist() for share in shards(labels, 2, shards_per_owner=2, seed=1)]
    [[1, 2], [0, 3]]
    """
    _check(len(labels), owners)
    _check_least("shards_per_owner", shards_per_owner)
    count = owners * shards_per_owner
    if count > len(labels):
        raise DataProblem(
            f"expected at most one shard per record, got owners={owners} times shards_per_owner={shards_per_owner} "
            f"for {len(labels)} records; lower one of them"
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), count)
    order = public_generator(seed, "partition").permutation(count)
    return [np.sort(np.concatenate([pieces[n] for n in dealt])) for dealt in np.split(order, owners)]


def pathological(labels: npt.NDArray[np.int64], owners: int, *, classes_per_owner: int, seed: int) -> Shares:
    """Gives each owner records of exactly so many classes; a class is dealt out evenly to the owners that have it.

    Owners choose one after another, at random among the classes that were chosen least so far. So all classes are used,
    each about as often, which `flwr_datasets.partitioner.PathologicalPartitioner` does not ensure.

    Args:
        labels: (records,), integer classes.
        owners: how many shares.
        classes_per_owner: from 1 to the number of classes.
        seed: the recipe's seed.

    Returns:
        One sorted array of positions per owner; together they hold each record once.

    Raises:
        DataProblem: more classes per owner than there are, more classes than owners may have together, or a class of
            fewer records than owners that have it.

    >>> labels = np.repeat([0, 1, 2], 10)
    >>> [np.unique(labels[share]).tolist() for share in pathological(labels, 3, classes_per_owner=2, seed=1)]
    [[0, 1], [1, 2], [0, 2]]
    """
    _check(len(labels), owners)
    _check_least("classes_per_owner", classes_per_owner)
    classes, counts = np.unique(labels, return_counts=True)
    if not classes_per_owner <= len(classes) <= owners * classes_per_owner:
        raise DataProblem(
            f"expected at most {len(classes)} classes per owner and a place for each of them, got "
            f"classes_per_owner={classes_per_owner} for {owners} owners; change one of them"
        )
    generator = public_generator(seed, "partition")
    held = _choose_classes(len(classes), owners, classes_per_owner, generator)  # (owners, classes)
    if (held.sum(axis=0) > counts).any():
        short = int(np.argmax(held.sum(axis=0) > counts))
        raise DataProblem(
            f"expected a record of class {classes[short]} for each of {held[:, short].sum()} owners, got "
            f"{counts[short]}; name fewer owners or lower classes_per_owner"
        )
    parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(owners)]
    for number, label in enumerate(classes):
        holders = np.flatnonzero(held[:, number])
        positions = generator.permutation(np.flatnonzero(labels == label))
        for owner, piece in zip(holders, np.array_split(positions, len(holders)), strict=True):
            parts[owner].append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _choose_classes(
    classes: int, owners: int, classes_per_owner: int, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    held = np.zeros((owners, classes), np.bool_)
    for owner in range(owners):
        order = np.lexsort((generator.random(classes), held.sum(axis=0)))  # least chosen first, ties at random
        held[owner, order[:classes_per_owner]] = True
    return held


def quantity(records: int, owners: int, *, alpha: float, seed: int) -> Shares:
    """Deals records out at random in sizes drawn from a Dirichlet distribution; each owner has at least one.

    Args:
        records: how many there are.
        owners: how many shares.
        alpha: concentration; small makes few large owners, large makes all alike.
        seed: the recipe's seed.

    Returns:
        One sorted array of positions per owner; together they hold each record once.

    Raises:
        DataProblem: more owners than records, or a concentration that is not above 0.

    >>> [len(share) for share in quantity(100, 4, alpha=0.5, seed=1)]
    [3, 8, 76, 13]
    """
    _check(records, owners)
    if not (math.isfinite(alpha) and alpha > 0.0):
        raise DataProblem(f"expected a finite concentration above 0, got alpha={alpha}")
    generator = public_generator(seed, "partition")
    shares = np.cumsum(generator.dirichlet(np.full(owners, alpha)))[:-1]
    # One record for each owner, and the rest by their shares.
    cuts = np.round(shares * (records - owners)).astype(np.int64) + np.arange(1, owners)
    return [np.sort(share) for share in np.split(generator.permutation(records), cuts)]


def natural(owner_ids: npt.ArrayLike) -> tuple[list[str], Shares]:
    """Who holds which records where the data say so themselves.

    The shares are those of `flwr_datasets.partitioner.NaturalIdPartitioner`, without its loop over records in Python.

    Args:
        owner_ids: (records,), texts or integers; an owner is all records of one of them.

    Returns:
        The owners' names, in the order of their texts or integers, and one sorted array of positions per owner.

    Raises:
        DataProblem: no records, a record without an owner, or ids that are neither texts nor integers.

    >>> names, shares = natural(["b", "a", "b"])
    >>> names, [share.tolist() for share in shares]
    (['a', 'b'], [[1], [0, 2]])
    """
    ids = np.asarray(owner_ids)
    if ids.dtype == object and all(isinstance(one, str) for one in ids):
        ids = ids.astype(np.str_)
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "Uiu":
        raise DataProblem(f"expected an owner for each record, as text or integer, got {ids.dtype} of {ids.shape}")
    found, owner_of = np.unique(ids, return_inverse=True)
    names = [str(one) for one in found]
    if not all(name.strip() for name in names):
        raise DataProblem("expected an owner for each record, got an empty name")
    order, ends = np.argsort(owner_of, kind="stable"), np.cumsum(np.bincount(owner_of))[:-1]
    return names, np.split(order, ends)


def _check_least(name: str, value: int) -> None:
    if value < 1:
        raise DataProblem(f"expected at least 1, got {name}={value}")


def _check(records: int, owners: int) -> None:
    if owners > records:
        raise DataProblem(f"expected at most one owner per record, got owners={owners} for {records} records")
