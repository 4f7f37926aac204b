"""A Flower strategy of the user's own, in our round loop."""

import random
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from tacit.edge import pipeline
from tacit.edge.flower_app import train_in_process
from tacit.edge.recipe import RecipeInvalid, load_recipe
from tacit.federated.checkpoint import read_weights
from tacit.federated.plugged import PluggedStrategy, find_strategy

SMALL = [
    "privacy.unit=none",
    "compression.variants=[]",
    "federated.rounds=2",
    "federated.owners=4",
    "federated.partition=iid",
    "federated.schedule=constant",
    "model.family=mlp",
    "model.hidden=[8]",
]


class Remembering(FedAvg):
    """Counts its rounds."""

    def __init__(self):
        super().__init__()
        self.rounds = 0

    def aggregate_train(self, server_round, replies):
        self.rounds += 1
        return super().aggregate_train(server_round, replies)

    def state(self):
        return {"rounds": np.float32([self.rounds])}

    def restore(self, state):
        self.rounds = int(state["rounds"][0])


def run(folder: Path, strategy: str):
    rows = []
    recipe = load_recipe("digits", [*SMALL, f"federated.strategy={strategy}"])
    random.seed(len(str(folder)))  # whatever it is, it must not matter, and must not be lost
    before = random.getstate()
    train_in_process(recipe, folder, run="r", report=rows.append)
    assert random.getstate() == before
    return read_weights(folder / "train" / "weights.safetensors"), rows


def test_flowers_own_averaging_gives_what_ours_gives_and_the_same_each_time(tmp_path: Path):
    ours, _ = run(tmp_path / "ours", "fedavg")
    flowers, rows = run(tmp_path / "flowers", "flwr.serverapp.strategy:FedAvg")
    again, _ = run(tmp_path / "again-with-another-name", "flwr.serverapp.strategy:FedAvg")
    for name in ours:
        np.testing.assert_allclose(flowers[name], ours[name], atol=1e-5)
        assert flowers[name].tobytes() == again[name].tobytes()
    assert [row["clients"] for row in rows] == [4, 4]


def test_a_strategy_that_remembers_is_kept_in_the_checkpoint():
    first = PluggedStrategy(Remembering())
    first.strategy.rounds = 3
    second = PluggedStrategy(Remembering())
    second.restore(first.state())
    assert second.strategy.rounds == 3
    assert PluggedStrategy(FedAvg()).state() == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at.all:Strategy", "ModuleNotFoundError"),
        ("flwr.serverapp.strategy:FedAverage", "AttributeError"),
        ("collections:OrderedDict", "to be a flwr"),
        ("flwr.serverapp.strategy:Krum", None),
    ],
)
def test_what_is_no_strategy_is_refused_in_one_line(name, words):
    if words is None:
        assert find_strategy(name).state() == {}
        return
    with pytest.raises(ValueError, match="expected") as refused:
        find_strategy(name)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_with_a_strategy_that_is_not_there_ends_before_it_begins(tmp_path: Path):
    recipe = load_recipe("digits", [*SMALL, "federated.strategy=nowhere:Strategy"])
    with pytest.raises(RecipeInvalid, match="importable"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()
