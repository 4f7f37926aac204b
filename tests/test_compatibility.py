"""The table of combinations, held against the specification's own words."""

import pytest

from tacit.edge.recipe import RecipeRefused, load_recipe
from tacit.federated.compatibility import FEATURES, needs, refusal

# (feature, record or local, client): "yes", "no", or the words that the condition must contain.
SPECIFIED = [
    *[(name, "public weights", "uniform or bounded") for name in ("fedavg", "fedprox")],
    *[(name, "yes", "after the noise") for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad")],
    ("scaffold", "option II from noised iterates", "one joint clip and noise"),
    ("local parameters", "in the same DP-SGD step, or frozen", "never travel"),
    ("ditto", "stays with its owner", "stays with its owner"),
    *[(name, "yes", "no") for name in ("median", "trimmed mean", "krum", "multi-krum", "bulyan", "geometric median")],
    ("norm-bounded mean", "yes", "the bound is C"),
    ("q-ffl", "noised, charged loss", "no"),
    ("fedbuff", "every upload charged", "no"),
    *[(name, "after the noise", "before the clip") for name in ("top-k", "8-bit", "error feedback")],
    *[(name, "charged even if unused", "contributes 0") for name in ("dropout", "deadline")],
    ("over-selection", "yes", "over-selected"),
    ("quorum", "yes", "before the draw"),
    ("admission", "yes", "per reply only"),
    ("adaptive clip", "no", "z < 2 sigma_b"),
    ("client metrics", "noised and charged", "inside the clipped vector"),
    # Beyond the specification's table: post-processing at record level, and no part of the client-level mechanism.
    ("own strategy", "noised replies only", "no"),
    ("owners of a round", "public randomness", "no"),
]
CELLS = [
    (feature, unit, words)
    for feature, record, client in SPECIFIED
    for unit, words in (("record", record), ("local", record), ("client", client))
]


def test_every_row_is_specified():
    assert sorted(FEATURES) == sorted(name for name, _, _ in SPECIFIED)


@pytest.mark.parametrize(("feature", "unit", "words"), CELLS)
def test_a_cell_of_the_table_is_what_is_specified(feature, unit, words):
    without = refusal(unit, {feature: ()})
    need = needs(feature, unit)
    if words == "yes":
        assert without is None
    elif words == "no":
        assert "expected no" in without
        assert refusal(unit, {feature: ["public weights", "before the draw", words]}) is not None
    else:
        assert words in without
        assert refusal(unit, {feature: need.conditions}) is None
        assert refusal(unit, {feature: need.conditions[1:]}) is not None


@pytest.mark.parametrize("feature", FEATURES)
def test_without_a_guarantee_everything_goes(feature):
    assert refusal("none", {feature: ()}) is None


def test_a_feature_that_nobody_has_thought_about_is_refused():
    assert "known" in refusal("record", {"swarm": ()})
    assert refusal("none", {"swarm": ()}) is None


@pytest.mark.parametrize("unit", ["record", "local"])
def test_a_recipe_that_the_table_forbids_is_refused(unit):
    with pytest.raises(RecipeRefused, match="adaptive clip"):
        load_recipe("digits", [f"privacy.unit={unit}", "privacy.clip=adaptive", "privacy.sample_rate=1.0"])
