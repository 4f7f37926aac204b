"""What an owner accepts: obeyed only what is at least as private on every axis, and an owner.toml that says where."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tacit.federated.accounting import Event, epsilon_rdp
from tacit.federated.evaluation import evaluation_mechanism
from tacit.federated.ledger import Granted, Ledger, Refused, Reservation
from tacit.federated.mechanism import Mechanism
from tacit.federated.outbox import Outbox
from tacit.federated.policy import OwnerPolicy, PolicyInvalid, Terms, load_policy

RECIPE = "5" * 64
TERMS = Terms(
    unit="record",
    epsilon=8.0,
    delta=1e-5,
    recipes=frozenset({RECIPE}),
    min_noise_multiplier=0.7,
    max_sample_rate=0.5,
    max_steps=20,
    max_participations=100,
)


def mechanism(unit="record", **changed) -> Mechanism:
    given = {
        "unit": unit,
        "sample_rate": 1.0 if unit == "local" else 0.4,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.1,
        "steps_per_round": 5,
        "rounds": 80,
        "reference_size": 128,
        "delta": 1e-5,
    }
    return Mechanism(**{**given, **changed})


def refusal(terms=TERMS, *, recipe=RECIPE, participations=0, unit="record", **changed):
    described = {**mechanism(unit).describe(), **changed}
    return terms.refusal(described, recipe=recipe, participations=participations)


# A lattice of its own, not the table of policy.py: what each unit hides, and from whom.
HIDES = {
    "record": {("a record", "recipients"), ("a record", "server")},
    "client": {("a record", "recipients"), ("everything", "recipients")},
    "local": {
        ("a record", "recipients"),
        ("everything", "recipients"),
        ("a record", "server"),
        ("everything", "server"),
    },
}


@pytest.mark.parametrize("asked", HIDES)
@pytest.mark.parametrize("offered", HIDES)
def test_a_unit_stands_in_for_another_exactly_when_it_hides_all_that_the_other_hides(asked, offered):
    terms = Terms(unit=asked, epsilon=8.0, delta=1e-5, recipes=None)
    assert (refusal(terms, unit=offered) is None) == (HIDES[asked] <= HIDES[offered])


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("unit", HIDES)
def test_what_our_own_mechanisms_say_of_themselves_is_understood(unit, hardened):
    terms = Terms(unit=unit, epsilon=8.0, delta=1e-5, recipes=None)
    own = mechanism(unit, hardened=hardened)
    for described in (own.describe(), evaluation_mechanism(own, 10.0, 4).describe()):
        assert terms.refusal(described, recipe="", participations=0) is None


def test_a_run_without_a_guarantee_is_refused_by_everybody():
    for unit in HIDES:
        terms = Terms(unit=unit, epsilon=8.0, delta=1e-5, recipes=None)
        described = {**mechanism().describe(), "unit": "none"}
        assert "got 'none'" in str(terms.refusal(described, recipe="", participations=0))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"noise_multiplier": 0.69}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": "1.1"}, "noise_multiplier"),
        ({"noise_multiplier": True}, "noise_multiplier"),
        ({"noise_multiplier": None}, "noise_multiplier"),
        ({"sample_rate": 0.51}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"steps": 21}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": -1}, "steps"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"relation": "zero-out"}, "relation"),
        ({"sampler": "fixed"}, "sampler"),
        ({"sampler": "none"}, "sampler"),
        ({"noise": "laplace"}, "noise"),
        ({"unit": "client"}, "unit"),
        ({"unit": ["record"]}, "unit"),
        ({"unit": None}, "unit"),
    ],
)
def test_one_thing_that_is_worse_is_enough_and_is_named(changed, word):
    assert refusal() is None
    described = {**mechanism().describe(), **changed}
    found = TERMS.refusal(described, recipe=RECIPE, participations=0)
    assert found is not None
    assert word in found.split(", got")[0]
    for key in changed:
        described = {name: value for name, value in mechanism().describe().items() if name != key}
        assert TERMS.refusal(described, recipe=RECIPE, participations=0) is not None, "nor is what is not said"


def test_sizes_become_known_only_where_the_owner_says_so():
    described = mechanism(sizes="public").describe()
    assert described["relation"] == "zero-out"
    assert "relation" in str(TERMS.refusal(described, recipe=RECIPE, participations=0))
    assert dataclasses.replace(TERMS, public_sizes=True).refusal(described, recipe=RECIPE, participations=0) is None


def test_a_recipe_that_is_not_on_the_list_and_one_participation_too_many_are_refused():
    assert "recipes" in refusal(recipe="6" * 64)
    assert "recipes" in refusal(recipe="")
    assert refusal(dataclasses.replace(TERMS, recipes=None), recipe="6" * 64) is None
    assert refusal(participations=99) is None
    assert "participations" in refusal(participations=100)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0.01, 10.0)


@settings(max_examples=300)
@given(
    st.builds(
        Terms,
        unit=st.sampled_from(sorted(HIDES)),
        epsilon=st.just(8.0),
        delta=st.just(1e-5),
        recipes=st.none() | st.just(frozenset({RECIPE})),
        min_noise_multiplier=st.floats(0.0, 3.0),
        max_sample_rate=st.floats(0.05, 1.0),
        max_steps=st.none() | st.integers(1, 30),
        max_participations=st.none() | st.integers(1, 30),
        public_sizes=st.booleans(),
    ),
    st.fixed_dictionaries(
        {
            "unit": st.sampled_from([*sorted(HIDES), "none", "other"]),
            "relation": st.sampled_from(["add/remove", "replace-one", "zero-out"]),
            "sampler": st.sampled_from(["poisson", "none", "fixed"]),
            "noise": st.sampled_from(["gaussian", "gaussian on a grid", "none"]),
            "sample_rate": st.floats(0.01, 1.0) | numbers,
            "noise_multiplier": st.floats(0.5, 5.0) | numbers,
            "max_grad_norm": st.floats(0.01, 5.0) | numbers,
            "steps": st.integers(-2, 40),
        }
    ),
    st.sampled_from([RECIPE, "6" * 64]),
    st.integers(0, 40),
)
def test_whatever_is_obeyed_is_at_least_as_private_on_every_axis(terms, described, recipe, participations):
    if terms.refusal(described, recipe=recipe, participations=participations) is not None:
        return
    assert HIDES[terms.unit] <= HIDES[described["unit"]]
    expected = {"local": "replace-one"}.get(described["unit"], "add/remove")
    sizes_known = described["unit"] == "record" and described["relation"] == "zero-out"
    assert described["relation"] == expected or (sizes_known and terms.public_sizes)
    assert described["noise_multiplier"] >= terms.min_noise_multiplier
    assert described["sample_rate"] <= terms.max_sample_rate
    assert 1 <= described["steps"] <= (terms.max_steps or math.inf)
    assert participations < (terms.max_participations or math.inf)
    assert 0.0 < described["max_grad_norm"] < math.inf
    assert terms.recipes is None or recipe in terms.recipes
    if terms.max_steps and terms.min_noise_multiplier > 0.3:
        made = Event(sample_rate=described["sample_rate"], noise_multiplier=min(described["noise_multiplier"], 1e3))
        worst = Event(sample_rate=terms.max_sample_rate, noise_multiplier=terms.min_noise_multiplier)
        orders = (2.0, 8.0)
        spent = epsilon_rdp({made: described["steps"]}, 1e-5, orders=orders)
        assert spent <= epsilon_rdp({worst: terms.max_steps}, 1e-5, orders=orders) + 1e-9


@given(st.floats(0.1, 20.0), st.floats(1e-9, 0.1), st.floats(0.1, 20.0), st.floats(1e-9, 0.1))
def test_the_budget_is_no_looser_than_either_side_asks(own_epsilon, own_delta, epsilon, delta):
    terms = dataclasses.replace(TERMS, epsilon=own_epsilon, delta=own_delta)
    found_epsilon, found_delta = terms.budget(epsilon, delta)
    assert found_epsilon <= min(own_epsilon, epsilon)
    assert found_delta <= min(own_delta, delta)
    assert (found_epsilon, found_delta) in {(e, d) for e in (own_epsilon, epsilon) for d in (own_delta, delta)}


def test_a_ledger_asks_its_owners_policy_before_it_charges(tmp_path):
    policy = OwnerPolicy(owner="ann", terms=dataclasses.replace(TERMS, max_participations=2))

    def ask(number, owner="ann", **changed):
        asked = mechanism(**changed).describe()
        request = Reservation(owner=owner, source="scans", run="run", round=number, body="b", mechanism=asked)
        return ledger.reserve([request])[0]

    ledger = Ledger(
        tmp_path / "ledger.jsonl",
        Outbox(tmp_path / "outbox"),
        epsilon=math.inf,
        delta=1e-5,
        objection=policy.objection(RECIPE),
    )
    assert ask(1, noise_multiplier=0.5) == Refused("refused")
    assert ask(1, owner="bob") == Refused("refused")
    assert [type(ask(number)) for number in (1, 2, 3)] == [Granted, Granted, Refused]
    assert ledger.accounts["ann", "scans"].reserved == 2
    ledger.close()


# owner.toml

TOML = """
[owner]
name = "anna"

[policy]
unit = "record"
epsilon = 4
delta = 1e-6
recipes = ["5555555555555555555555555555555555555555555555555555555555555555"]
min_noise_multiplier = 0.8
max_sample_rate = 0.5
max_steps = 10
max_participations = 50

[sources.scans]
epsilon = 1.0
recipes = "any"
"""


def load(tmp_path, text):
    path = tmp_path / "owner.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_policy(path)


def test_a_policy_is_read_and_a_source_says_what_differs(tmp_path):
    policy = load(tmp_path, TOML)
    assert policy.owner == "anna"
    general = policy.terms_of("anything")
    assert (general.epsilon, general.delta, general.recipes) == (4.0, 1e-6, frozenset({RECIPE}))
    assert (general.max_steps, general.max_participations) == (10, 50)
    assert policy.terms_of("scans") == dataclasses.replace(general, epsilon=1.0, recipes=None)


@pytest.mark.parametrize(
    ("old", "new", "message", "where"),
    [
        ("epsilon = 4", "epsilom = 4", "did you mean 'epsilon'", "[policy]"),
        ("[policy]", "[polcy]", "did you mean 'policy'", "owner.toml"),
        ('name = "anna"', 'nam = "anna"', "did you mean 'name'", "[owner]"),
        ("epsilon = 1.0", "epsilon_ = 1.0", "did you mean 'epsilon'", "[sources.scans]"),
        ("epsilon = 4", "zzz = 4", "known: unit, epsilon", "[policy]"),
        ("delta = 1e-6\n", "", "expected the key 'delta'", "[policy]"),
        ('unit = "record"\n', "", "expected the key 'unit'", "[policy]"),
        ('name = "anna"', "", "expected text", "[owner] name"),
        ('name = "anna"', "name = 3", "expected text", "[owner] name"),
        ('unit = "record"', 'unit = "none"', "'record', 'client', 'local'", "[policy] unit"),
        ('unit = "record"', "unit = 1", "'record', 'client', 'local'", "[policy] unit"),
        ("epsilon = 4", "epsilon = 0", "0 < value < inf", "[policy] epsilon"),
        ("epsilon = 4", "epsilon = nan", "0 < value < inf", "[policy] epsilon"),
        ("epsilon = 4", "epsilon = inf", "0 < value < inf", "[policy] epsilon"),
        ("epsilon = 4", 'epsilon = "4"', "0 < value < inf", "[policy] epsilon"),
        ("epsilon = 4", "epsilon = true", "0 < value < inf", "[policy] epsilon"),
        ("epsilon = 1.0", "epsilon = -1", "0 < value < inf", "[sources.scans] epsilon"),
        ("delta = 1e-6", "delta = 1", "0 < value < 1", "[policy] delta"),
        ("max_sample_rate = 0.5", "max_sample_rate = 1.5", "0 < value <= 1", "[policy] max_sample_rate"),
        ("min_noise_multiplier = 0.8", "min_noise_multiplier = -1", "0 <= value", "[policy] min_noise_multiplier"),
        ("max_steps = 10", "max_steps = 0", "at least 1", "[policy] max_steps"),
        ("max_steps = 10", "max_steps = 1.5", "at least 1", "[policy] max_steps"),
        ("max_steps = 10", "public_sizes = 1", "true or false", "[policy] public_sizes"),
        ("max_participations = 50", "max_participations = true", "at least 1", "[policy] max_participations"),
        ('recipes = "any"', 'recipes = "all"', "SHA-256", "[sources.scans] recipes"),
        ("delta = 1e-6", "delta = = 3", "syntax", "owner.toml"),
        ('555"]', '55F"]', "SHA-256", "[policy] recipes"),
        ("[sources.scans]", "[sources]\nscans = 3\n[owner.x]", "expected a known key", "[owner]"),
        ('[sources.scans]\nepsilon = 1.0\nrecipes = "any"', "[sources]\nscans = 3", "expected the table", "owner.toml"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(tmp_path, old, new, message, where):
    assert old in TOML
    with pytest.raises(PolicyInvalid) as caught:
        load(tmp_path, TOML.replace(old, new))
    assert message in str(caught.value)
    assert where in caught.value.where
    assert str(tmp_path / "owner.toml") in caught.value.where


@pytest.mark.parametrize("text", [b"", b"[owner]\nname='a'\n", b"policy = 3\n[owner]\nname='a'\n", b"\xff\xfe", b"\0"])
def test_a_file_that_is_no_policy_is_refused(tmp_path, text):
    with pytest.raises(PolicyInvalid):
        load(tmp_path, text)


def test_a_policy_that_is_not_there_is_not_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "owner.toml")


def test_terms_are_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tmp_path, TOML).terms.epsilon = 100.0
