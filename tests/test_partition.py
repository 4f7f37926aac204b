"""Every record goes to exactly one owner, and the seed decides which."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.noise import public_generator
from tacit.federated.partition import dirichlet, iid, natural, owner_names, pathological, quantity, shards
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


DEALS = {
    "iid": iid,
    "dirichlet": lambda labels, owners, *, seed: dirichlet(labels, owners, alpha=0.5, seed=seed),
    "shards": lambda labels, owners, *, seed: shards(labels, owners, shards_per_owner=2, seed=seed),
    "pathological": lambda labels, owners, *, seed: pathological(labels, owners, classes_per_owner=3, seed=seed),
    "quantity": lambda labels, owners, *, seed: quantity(len(labels), owners, alpha=0.5, seed=seed),
}


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
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
    for deal in DEALS.values():
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


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 40), st.integers(0, 20))
def test_shards_are_as_many_as_asked_for_and_leave_no_record_out(owners, per_owner, more, seed):
    labels = np.random.default_rng(seed).integers(0, 5, owners * per_owner + more)
    dealt = shards(labels, owners, shards_per_owner=per_owner, seed=seed)
    assert len(dealt) == owners
    assert held_once(dealt, len(labels))
    sizes = [len(share) for share in dealt]
    assert max(sizes) - min(sizes) <= per_owner


def test_an_owner_of_two_shards_has_few_classes():
    dealt = shards(np.sort(LABELS), 10, shards_per_owner=2, seed=0)
    assert max(len(np.unique(np.sort(LABELS)[share])) for share in dealt) <= 4


@given(st.integers(1, 12), st.integers(1, 10), st.integers(0, 20))
def test_pathological_owners_have_exactly_so_many_classes_and_no_class_is_left_out(owners, per_owner, seed):
    if owners * per_owner < 10:
        with pytest.raises(DataProblem, match="a place for each of them"):
            pathological(LABELS, owners, classes_per_owner=per_owner, seed=seed)
        return
    dealt = pathological(LABELS, owners, classes_per_owner=per_owner, seed=seed)
    assert len(dealt) == owners
    assert held_once(dealt, len(LABELS))
    assert {len(np.unique(LABELS[share])) for share in dealt} == {per_owner}
    holders = sum(np.isin(range(10), LABELS[share]).astype(int) for share in dealt)
    assert max(holders) - min(holders) <= 1


@given(st.integers(1, 40), st.integers(0, 60), st.sampled_from([1e-6, 0.1, 1.0, 1e6]), st.integers(0, 20))
def test_quantity_deals_each_record_once_and_at_least_one_to_each(owners, more, alpha, seed):
    dealt = quantity(owners + more, owners, alpha=alpha, seed=seed)
    assert len(dealt) == owners
    assert held_once(dealt, owners + more)
    assert min(map(len, dealt)) >= 1


def test_a_small_concentration_makes_large_owners_and_a_large_one_none():
    def largest(alpha):
        return np.mean([max(map(len, quantity(1000, 10, alpha=alpha, seed=seed))) for seed in range(20)])

    assert largest(1e4) < 110
    assert largest(0.1) > 500


def test_sizes_are_those_of_the_dirichlet_draw_to_a_record():
    drawn = public_generator(5, "partition").dirichlet(np.full(7, 0.8))
    sizes = [len(share) for share in quantity(5000, 7, alpha=0.8, seed=5)]
    np.testing.assert_allclose(sizes, 1 + drawn * (5000 - 7), atol=1.0)


@given(st.lists(st.sampled_from(["ann", "bob", "c", "d d"]), min_size=1, max_size=40))
def test_natural_owners_hold_what_names_them(ids):
    names, dealt = natural(ids)
    assert names == sorted(set(ids))
    assert held_once(dealt, len(ids))
    for name, share in zip(names, dealt, strict=True):
        assert share.tolist() == [n for n, one in enumerate(ids) if one == name]


def test_integers_are_owners_in_their_own_order_and_objects_that_are_texts_are_texts():
    assert natural([10, 9, 10])[0] == ["9", "10"]
    assert natural(np.array(["b", "a"], object))[0] == ["a", "b"]


@pytest.mark.parametrize(
    "ids", [[], [[1, 2]], [1.0, math.nan], np.array(["a", None], object), ["a", ""], ["a", "  "], [True], 3], ids=repr
)
def test_records_without_an_owner_are_refused(ids):
    with pytest.raises(DataProblem, match="expected an owner for each record"):
        natural(ids)


@pytest.mark.parametrize(
    ("message", "deal"),
    [
        ("owners=4 times shards_per_owner=400", lambda: shards(LABELS, 4, shards_per_owner=400, seed=0)),
        ("expected at least 1, got shards_per_owner=0", lambda: shards(LABELS, 4, shards_per_owner=0, seed=0)),
        ("expected at least 1, got classes_per_owner=0", lambda: pathological(LABELS, 4, classes_per_owner=0, seed=0)),
        ("expected at most 10 classes per owner", lambda: pathological(LABELS, 4, classes_per_owner=11, seed=0)),
        (
            "expected a record of class 1 for each of 3 owners, got 2",
            lambda: pathological(np.r_[np.zeros(9, int), 1, 1], 3, classes_per_owner=2, seed=0),
        ),
        ("got alpha=0.0", lambda: quantity(10, 2, alpha=0.0, seed=0)),
        ("got alpha=nan", lambda: quantity(10, 2, alpha=math.nan, seed=0)),
    ],
)
def test_what_the_data_cannot_give_is_refused(message, deal):
    with pytest.raises(DataProblem, match=message):
        deal()


@pytest.fixture(scope="module")
def flowers():
    """Flower's partitioners, where they are installed: three seconds to import."""
    pytest.importorskip("flwr_datasets")
    import datasets
    from flwr_datasets import partitioner

    data = datasets.Dataset.from_dict({"label": LABELS.tolist(), "at": list(range(len(LABELS)))})
    return data, partitioner


def positions(partitioner, data, owners):
    partitioner.dataset = data
    return [np.sort(partitioner.load_partition(n)["at"]) for n in range(owners)]


def same(one, other):
    assert [share.tolist() for share in one] == [share.tolist() for share in other]


@pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")  # datasets' call of pyarrow
def test_shards_are_flowers_where_records_divide_evenly(flowers):
    data, partitioner = flowers
    theirs = partitioner.ShardPartitioner(6, "label", num_shards_per_partition=5, shuffle=False)
    theirs._rng = public_generator(3, "partition")
    same(shards(LABELS, 6, shards_per_owner=5, seed=3), positions(theirs, data, 6))


def test_classes_are_divided_as_by_flower_once_they_are_chosen(flowers):
    data, partitioner = flowers
    ours = pathological(LABELS, 7, classes_per_owner=3, seed=3)

    class OfOurClasses(partitioner.PathologicalPartitioner):
        def _determine_partition_id_to_unique_labels(self):
            self._unique_labels = list(range(10))
            self._partition_id_to_unique_labels = {n: np.unique(LABELS[s]).tolist() for n, s in enumerate(ours)}

    theirs = positions(OfOurClasses(7, "label", 3, shuffle=False), data, 7)
    counts = [[np.bincount(LABELS[share], minlength=10).tolist() for share in dealt] for dealt in (ours, theirs)]
    assert counts[0] == counts[1]


def test_quantities_are_flowers_of_the_same_sizes_on_the_same_order(flowers):
    data, partitioner = flowers
    ours = quantity(len(LABELS), 5, alpha=0.5, seed=3)
    generator = public_generator(3, "partition")
    generator.dirichlet(np.full(5, 0.5))
    shuffled = data.select(generator.permutation(len(LABELS)))
    same(ours, positions(partitioner.SizePartitioner([len(share) for share in ours]), shuffled, 5))


def test_natural_owners_are_flowers(flowers, capsys):
    data, partitioner = flowers
    names, dealt = natural(LABELS)
    theirs = partitioner.NaturalIdPartitioner("label")
    same(dealt, positions(theirs, data, 10))
    assert names == [str(one) for one in theirs.partition_id_to_natural_id.values()]
