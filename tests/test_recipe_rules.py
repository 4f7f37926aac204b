"""Which parts of a strategy go together, and what the rest resolves to."""

import tomllib

import pytest
from pydantic import ValidationError

from tacit.edge.recipe import RecipeInvalid, RecipeRefused, load_recipe
from tacit.edge.recipe_tables import Families, FederatedTable
from tacit.federated.models import FAMILIES
from tacit.federated.robust import RULES
from tacit.federated.server_optimizer import OPTIMIZERS

NONE = ("privacy.unit=none", "compression.variants=[]")


def load(*settings):
    return load_recipe("digits", [*NONE, *(f"federated.{setting}" for setting in settings)]).federated


def test_the_names_of_a_recipe_are_those_that_the_federated_room_knows():
    assert set(Families.__args__) == set(FAMILIES)
    assert set(FederatedTable.model_fields["aggregation"].annotation.__args__) == RULES
    assert set(FederatedTable.model_fields["server_optimizer"].annotation.__args__) == {"auto", *OPTIMIZERS}


@pytest.mark.parametrize(
    ("strategy", "optimizer", "rate"),
    [
        ("fedavg", "sgd", 1.0),
        ("fedprox", "sgd", 1.0),
        ("fedavgm", "momentum", 1.0),
        ("fedadam", "adam", 0.01),
        ("fedyogi", "yogi", 0.01),
        ("fedadagrad", "adagrad", 0.01),
        ("scaffold", "sgd", 1.0),
    ],
)
def test_a_strategys_optimizer_and_its_rate_are_filled_in(strategy, optimizer, rate):
    text = f'[federated]\nstrategy = "{strategy}"\n[privacy]\nunit = "none"\n[compression]\nvariants = []\n'
    resolved = load_recipe_text(text)
    assert (resolved.server_optimizer, resolved.server_learning_rate) == (optimizer, rate)


def load_recipe_text(text):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "r.toml")
        path.write_text(text)
        assert tomllib.loads(text)
        return load_recipe(path).federated


def test_an_asynchronous_round_has_a_buffer_and_owners_at_work():
    resolved = load("strategy=fedbuff", "owners=20")
    assert (resolved.buffer, resolved.concurrency, resolved.quorum) == (5, 10, 3)


def test_a_quorum_is_half_of_those_asked():
    assert load("strategy=fedavg", "cohort=4").quorum == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategy=fedadam", "server_optimizer=yogi"], "server_optimizer='adam'"),
        (["strategy=scaffold", "aggregation=median"], "aggregation='mean'"),
        (["strategy=scaffold", "local_optimizer=adam"], "local_optimizer='sgd'"),
        (["strategy=scaffold", "personal=ditto"], "personal='none'"),
        (["strategy=fedbuff", "cohort=3"], "cohort=None"),
        (["strategy=fedbuff", "buffer=4", "concurrency=2"], "buffer of at most 2"),
        (["strategy=fedbuff", "buffer=40"], "buffer of at most 10"),
        (["strategy=fedavg", "cohort=40"], "cohort of at most 10"),
        (["strategy=q-ffl", "personal=ditto"], "personal='none'"),
        (["strategy=flwr.serverapp.strategy:FedAvg", "codec=8-bit"], "codec='none'"),
        (["strategy=flwr.serverapp.strategy:FedAvg", "evaluate_every=2"], "evaluate_every=0"),
        (["strategy=fedavg", "over_selection=1.5"], "over_selection=1.0"),
        (["strategy=fedavg", "aggregation=krum", "hostile=4"], "at least 11"),
        (["strategy=fedavg", "aggregation=bulyan", "hostile=2"], "at least 11"),
        (["strategy=fedavg", "aggregation=median", "weights=size"], "weights='uniform'"),
        (["strategy=fedavg", "cohort=4", "quorum=5"], "cohort=4"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(settings, words):
    with pytest.raises(RecipeRefused) as refused:
        load(*settings)
    assert words in str(refused.value)


@pytest.mark.parametrize("personal", ["fedbn", "local-head"])
def test_models_of_which_a_part_never_travels_are_not_shipped_as_one(personal):
    with pytest.raises(RecipeRefused, match=r"compression\.variants = \[\]"):
        load_recipe("digits", ["privacy.unit=none", f"federated.personal={personal}"])


@pytest.mark.parametrize(
    ("unit", "settings", "words"),
    [
        ("record", ["strategy=q-ffl"], "noised, charged loss"),
        ("client", ["strategy=scaffold"], "one joint clip"),
        ("client", ["strategy=fedbuff"], "fedbuff"),
        ("client", ["aggregation=krum", "hostile=1"], "krum"),
        ("client", ["aggregation=norm-bounded"], "the bound is C"),
        ("client", ["cohort=4"], "owners of a round"),
        ("client", ["strategy=flwr.serverapp.strategy:FedAvg"], "own strategy"),
        ("local", ["strategy=q-ffl"], "noised, charged loss"),
    ],
)
def test_what_would_break_the_guarantee_is_refused(unit, settings, words):
    changed = [f"privacy.unit={unit}", "federated.strategy=fedavg", *(f"federated.{setting}" for setting in settings)]
    with pytest.raises(RecipeRefused) as refused:
        load_recipe("digits", changed)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("unit", "settings"),
    [
        ("record", ["strategy=scaffold"]),
        ("record", ["strategy=fedbuff"]),
        ("record", ["aggregation=bulyan", "hostile=1"]),
        ("record", ["codec=top-k"]),
        ("record", ["strategy=flwr.serverapp.strategy:FedMedian"]),
        ("client", ["codec=8-bit"]),
        ("client", ["personal=ditto"]),
        ("client", ["strategy=fedprox"]),
        ("local", ["strategy=scaffold"]),
    ],
)
def test_what_keeps_the_guarantee_is_accepted(unit, settings):
    changed = [f"privacy.unit={unit}", "federated.strategy=fedavg", *(f"federated.{setting}" for setting in settings)]
    assert load_recipe("digits", changed).privacy.unit == unit


def test_a_task_described_by_halves_is_refused():
    with pytest.raises(RecipeRefused, match=r"task\.source"):
        load_recipe("digits", ["task.label=kind"])
    with pytest.raises(RecipeRefused, match=r"task\.path"):
        load_recipe("digits", ["task.source=csv"])


def test_files_are_named_from_where_the_recipe_lies(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "r.toml").write_text('[task]\nname = "a"\nsource = "csv"\npath = "data/a.csv"\n')
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "r.toml").task.path == str(tmp_path / "data" / "a.csv")


def test_another_family_on_the_command_line_drops_the_files_shape_of_the_first():
    model = load_recipe("digits", ["model.family=mlp", "model.hidden=[8]"]).model
    assert (model.channels, model.hidden) == (None, [8])


@pytest.mark.parametrize("value", ["cn", "a.b", "a:b:c", "os.system('x'):y"])
def test_a_family_that_is_neither_known_nor_importable_is_refused_in_one_line(value):
    with pytest.raises(RecipeInvalid) as refused:
        load_recipe("digits", [f"model.family={value}"])
    assert "model.family" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError):
        FederatedTable(strategy="fedavgg")
