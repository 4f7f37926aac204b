"""Cleaning: each record from itself and declared constants alone, so that data that differ by one still do after it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.federated.cleaning import (
    class_positions,
    cleaning_refusal,
    fill_missing,
    refuse_imputation,
    without_duplicates,
)
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.task import DataProblem, Records

CELLS = st.sampled_from([0.0, 1.0, np.nan])
ROW = st.tuples(CELLS, CELLS, st.integers(0, 1))
RULES = st.sampled_from(["zero", "drop", {"a": 1.0, "b": 0.0}])


def cleaned(rows, rule):
    """What is left of rows (a, b, label), in order."""
    if not rows:
        return []
    a, b, labels = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    values, stays = fill_missing({"a": a, "b": b}, rule, str)
    kept = without_duplicates(Records(values[stays].astype(np.float32), labels[stays].astype(np.int64)))
    return [(*inputs.tolist(), int(label)) for inputs, label in zip(kept.inputs, kept.labels, strict=True)]


def distance(one, other):
    """Records to add and remove between two multisets."""
    first, second = Counter(one), Counter(other)
    return sum(((first - second) + (second - first)).values())


@given(st.lists(ROW, max_size=8), ROW, st.integers(0, 8), RULES)
def test_data_that_differ_by_one_record_differ_by_at_most_one_after_cleaning(rows, row, at, rule):
    """The neighbour relation of the guarantee, before and after: a stability of 1."""
    with_it = [*rows[:at], row, *rows[at:]]
    assert distance(cleaned(rows, rule), cleaned(with_it, rule)) <= 1


def test_the_property_above_fails_where_records_decide_about_others():
    """A negative control: imputation by the mean, and dropping by the input alone, are caught by the same distance."""

    def imputed(column):
        return np.where(np.isnan(column), np.nanmean(column), column).tolist()

    assert distance(imputed(np.array([0.0, np.nan, np.nan])), imputed(np.array([0.0, 9.0, np.nan, np.nan]))) > 1

    def first_of_each_input(rows):
        return list({a: (a, label) for a, label in reversed(rows)}.values())

    assert distance(first_of_each_input([(1, 0), (1, 1)]), first_of_each_input([(1, 1)])) > 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=12))
def test_duplicates_go_as_a_naive_search_would_have_it(rows):
    inputs = np.array([[a] for a, _ in rows], dtype=np.float32).reshape(-1, 1)
    kept = without_duplicates(Records(inputs, np.array([label for _, label in rows], dtype=np.int64)))
    found = [(int(a), int(label)) for (a,), label in zip(kept.inputs, kept.labels, strict=True)]
    assert found == list(dict.fromkeys(rows))


def test_duplicates_of_images_and_values_are_found():
    images = np.zeros((3, 1, 2, 2), np.float32)
    images[2, 0, 1, 1] = 1
    assert len(without_duplicates(Records(images, np.float32([[1.0], [1.0], [1.0]])))) == 2
    assert len(without_duplicates(Records(images, np.float32([[1.0], [1.5], [1.0]])))) == 3


@pytest.mark.parametrize("unit", ["record", "client", "local", "none"])
@pytest.mark.parametrize("sizes", ["secret", "public"])
@pytest.mark.parametrize(("duplicates", "missing"), [("drop", "zero"), ("keep", "drop"), ("keep", {"a": 1.0})])
def test_cleaning_that_changes_how_many_there_are_is_refused_where_that_is_public(unit, sizes, duplicates, missing):
    why = cleaning_refusal(duplicates=duplicates, missing=missing, unit=unit, sizes=sizes)
    changes_count = "drop" in (duplicates, missing)
    assert (why is not None) == (unit == "record" and sizes == "public" and changes_count)
    assert why is None or why.startswith("expected task.")


@pytest.mark.parametrize("rule", ["mean", "median", "most_frequent", "ffill", "knn"])
def test_imputation_from_other_records_is_refused_by_name(rule):
    with pytest.raises(PrivacyRefused, match=f"missing='{rule}', which other records decide"):
        refuse_imputation(rule)


@pytest.mark.parametrize("rule", [{"a": "1"}, {"a": True}, {"a": float("inf")}, None, 3, "zeros"])
def test_other_rules_for_what_is_missing_are_wrong(rule):
    with pytest.raises(ValueError, match="missing"):
        refuse_imputation(rule)


def test_a_gap_without_a_constant_is_named():
    columns = {"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0])}
    with pytest.raises(DataProblem, match="column 'b', got none at 0"):
        fill_missing(columns, {"a": 2.0}, str)
    values, stays = fill_missing(columns, "drop", str)
    assert stays.tolist() == [False, False]
    assert fill_missing(columns, "zero", str)[0].tolist() == [[1, 0], [0, 1]]
    assert values.shape == (2, 2)


@pytest.mark.parametrize(
    ("cells", "labels", "positions"),
    [
        (["b", " a "], ("a", "b"), [1, 0]),
        ([0, 1, 1.0, "1"], ("a", "b"), [0, 1, 1, 1]),
        ([True, False], ("false", "true"), [1, 0]),
        ([True, False], ("1", "0"), [0, 1]),
        ([5, "5", 5.0], ("4", "5"), [1, 1, 1]),
    ],
)
def test_a_cell_is_a_class_by_name_and_a_position_where_no_name_is_a_number(cells, labels, positions):
    assert class_positions(cells, labels, str).tolist() == positions


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        ([2], ("a", "b")),
        ([-1], ("a", "b")),
        ([0], ("1", "2")),
        ([0.5], ("a", "b")),
        ([True], ("a", "b")),
        (["A"], "ab"),
    ],
)
def test_a_cell_that_is_no_declared_class_is_refused(cells, labels):
    with pytest.raises(DataProblem, match="got another at 0"):
        class_positions(cells, tuple(labels), str)


def test_a_missing_class_is_dropped_or_refused():
    assert class_positions(["a", None], ("a", "b"), str, drop=True).tolist() == [0, -1]
    with pytest.raises(DataProblem, match="got none at 1"):
        class_positions(["a", None], ("a", "b"), str)
