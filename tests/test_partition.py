"""Every record goes to exactly one owner, and the seed decides which."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.partition import dirichlet, iid, owner_names
from tacit.federated.task import DataProblem

LABELS = np.random.default_rng(0).integers(0, 10, 1200)


def held_once(shares, records):
    together = np.concatenate(shares)
    return sorted(together.tolist()) == list(range(records)) and all((np.diff(s) > 0).all() for s in shares)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 5))
def test_iid_deals_each_record_once_and_evenly(owners, more, seed):
    labels = np.zeros(owners + more, np.int64)
    shares = iid(labels, owners, seed=seed)
    assert len(shares) == owners
    assert held_once(shares, len(labels))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 8), st.sampled_from([0.5, 1.0, 100.0]), st.integers(0, 20))
def test_dirichlet_deals_each_record_once(owners, alpha, seed):
    shares = dirichlet(LABELS, owners, alpha=alpha, seed=seed)
    assert len(shares) == owners
    assert held_once(shares, len(LABELS))


@pytest.mark.parametrize("deal", [iid, lambda *a, **k: dirichlet(*a, alpha=0.5, **k)])
def test_a_seed_gives_the_same_shares_and_another_gives_others(deal):
    one, same, other = (deal(LABELS, 5, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not():
    def largest_share(alpha):
        shares = dirichlet(LABELS, 5, alpha=alpha, seed=3)
        counts = np.array([np.bincount(LABELS[share], minlength=10) for share in shares])
        return (counts / counts.sum(0)).max(0).mean()

    assert largest_share(1000.0) < 0.25
    assert largest_share(0.3) > 0.5


def test_more_owners_than_records_is_refused():
    for deal in (iid, lambda *a, **k: dirichlet(*a, alpha=1.0, **k)):
        with pytest.raises(DataProblem, match="owners=4 for 3 records"):
            deal(np.zeros(3, np.int64), 4, seed=0)


def test_an_owner_left_without_records_is_named():
    with pytest.raises(DataProblem, match=r"none for owner-\d\d \(dirichlet, alpha=0.01, seed=0\); raise alpha"):
        dirichlet(LABELS[:30], 20, alpha=0.01, seed=0)


def test_names_sort_in_the_order_of_the_shares():
    for owners in (1, 99, 101, 1001):
        names = owner_names(owners)
        assert names == sorted(names)
        assert len(set(names)) == owners
    assert owner_names(101)[100] == "owner-100"
