"""What somebody would try who wants to get around the guarantee, or whose data happen to."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F

from tacit.edge import composition, flower_app
from tacit.edge.composition import build_model
from tacit.edge.recipe import load_recipe
from tacit.federated.averaging import from_record, to_record
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.datasets import find_task
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Ledger, Reservation
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.rounds import run_rounds
from tacit.federated.server_optimizer import ServerOptimizer
from tacit.federated.task import Data, DataProblem, Records
from tacit.federated.train import LocalTrainer, write_arrays

MECHANISM = Mechanism(
    unit="record",
    sample_rate=1.0,
    max_grad_norm=1.0,
    noise_multiplier=4.0,
    steps_per_round=1,
    rounds=3,
    reference_size=20,
    delta=1e-5,
)
TASK = find_task("digits")


# A client that answers with something else than a model.


def average_with(answer) -> np.ndarray:
    """One round without noise of five clients that move the model by 1; the last one's arrays are `answer` of them."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        moved = {"w": from_record(message.content.array_records["arrays"])["w"] + np.float32(1.0)}
        moved = answer(moved) if context.node_config["partition-id"] == 4 else moved
        return Message(RecordDict({"arrays": to_record(moved)}), reply_to=message)

    contexts = {n + 2: Context(1, n + 2, {"partition-id": n}, RecordDict(), {}) for n in range(5)}
    strategy = PoissonCohorts(
        mechanism=Mechanism(
            **{**vars(MECHANISM), "unit": "client", "noise_multiplier": 0.0, "twin": True, "reference_size": 5}
        ),
        rounds=1,
        optimizer=ServerOptimizer(),
        randomness=lambda number: SeededGenerator(100 + number),
        source="digits",
        quorum=1,
        ledger=None,
    )
    final = run_rounds(
        strategy,
        InProcessGrid(app, contexts),
        to_record({"w": np.zeros(1, np.float32)}),
        rounds=1,
        first_round=1,
        quorum=0,
        config={"run": "run"},
        on_round=lambda report, arrays: None,
    )
    return from_record(final)["w"]


@pytest.mark.parametrize(
    "values",
    [
        np.array(["a"]),
        np.array([1], "datetime64[s]"),
        np.array([1 + 1j], np.complex64),
        np.array([1e300]),
        np.array([math.nan], np.float32),
        np.array([[1.0]], np.float32),
    ],
    ids=["text", "dates", "complex", "a norm beyond float64", "nan", "shape"],
)
def test_a_reply_that_is_no_update_contributes_zero_and_ends_nothing(values: np.ndarray) -> None:
    """An error or a warning at the server would say who was in the cohort."""
    assert average_with(lambda moved: {"w": values})[0] == pytest.approx(0.8, rel=1e-5)


# A model whose randomness is not secret.


class Drops(nn.Module):
    """Dropout without a layer of that name."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.head, self.probability = nn.Linear(64, 10), probability

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(F.dropout(inputs.flatten(1), self.probability, self.training))


@pytest.mark.parametrize("probability", [0.5, 1e-7])
def test_a_model_that_draws_from_the_global_generator_is_refused(probability: float) -> None:
    """With a known seed one record more moves every other record's mask: the sum is not bounded by C."""
    with pytest.raises(PrivacyRefused):
        LocalTrainer(TASK, Drops(probability), MECHANISM, learning_rate=0.1)


# A record that decides whether an owner answers at all.


@pytest.mark.parametrize("build", [lambda: nn.Linear(64, 10), lambda: Drops(0.0)], ids=["sums", "hooks"])
def test_a_record_of_no_class_changes_an_update_by_no_more_than_any_other(build) -> None:
    """If it made the owner fail, one record would be told with certainty, whatever ε is."""
    model = nn.Sequential(nn.Flatten(), build())
    trainer = LocalTrainer(TASK, model, MECHANISM, learning_rate=0.1)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(20, 1, 8, 8)).astype(np.float32)
    labels = generator.integers(0, 10, 20)
    labels[7] = 10
    after = trainer.update(write_arrays(model), Records(inputs, labels), SeededGenerator(1))
    assert all(np.isfinite(array).all() for array in after.values())


# What a death leaves on disk.


def test_of_a_reservation_that_was_reopened_one_payload_is_on_disk(tmp_path: Path) -> None:
    """The first one was stored and never released; with the second one two draws for one charge would lie there."""

    def asked(owner: str) -> Reservation:
        return Reservation(owner=owner, source="x", run="r", round=1, body="b", mechanism=MECHANISM.describe())

    def opened() -> Ledger:
        return Ledger(tmp_path / "ledger.jsonl", Outbox(tmp_path / "outbox"), epsilon=math.inf, delta=1e-5)

    requests = [asked("anna"), asked("ben")]
    ledger = opened()
    ledger.reserve(requests)
    # A process that dies between outbox and release.
    Outbox(tmp_path / "outbox").put(1, {request.key: f"first of {request.owner}".encode() for request in requests})
    ledger.close()
    ledger = opened()
    ledger.reserve(requests)
    ledger.fail([requests[0].key])
    ledger.release(1, {requests[1].key: b"second of ben"})
    ledger.close()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "outbox").iterdir())
    assert b"second of ben" in stored
    assert b"first of" not in stored


# A server that asks a deployed owner for less than its policy allows.

POLICY = """
[owner]
name = "anna"
[policy]
unit = "record"
epsilon = 8.0
delta = 1e-5
recipes = "any"
"""


CLIENT_POLICY = POLICY.replace('unit = "record"', 'unit = "client"').replace("epsilon = 8.0", "epsilon = 1.0")


def asked_of_anna(folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str, privacy: str) -> Message:
    """What a deployed owner with a policy answers when it is asked to train under a recipe."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "owner.toml").write_text(policy)
    monkeypatch.setenv("TACIT_HOME", str(home))
    recipe = folder / "recipe.toml"
    recipe.write_text(f"[federated]\nowners = 3\nrounds = 1\n[privacy]\n{privacy}")
    context = Context(
        1,
        2,
        {"partition-id": 0, "num-partitions": 3, "owner": "anna"},
        RecordDict(),
        {"recipe": str(recipe), "out": str(folder / "run"), "deployed": True},
    )
    grid = InProcessGrid(flower_app.client_app, {2: context})
    arrays = write_arrays(build_model(load_recipe(recipe)))
    config = ConfigRecord({"run": "run", "server-round": 1, "clip_norm": 1.0})
    message = Message(RecordDict({"arrays": to_record(arrays), "config": config}), 2, MessageType.TRAIN)
    (reply,) = grid.send_and_receive([message])
    return reply


OF_CLIENTS = 'unit = "client"\nnoise_multiplier = {noise}\nsample_rate = 0.5\nreference_size = 3\n'


@pytest.mark.parametrize("privacy", ['unit = "none"\n', OF_CLIENTS.format(noise=1.0)], ids=["none", "client"])
def test_a_deployed_owner_refuses_a_recipe_with_a_weaker_unit_than_its_policy(tmp_path, monkeypatch, privacy) -> None:
    reply = asked_of_anna(tmp_path, monkeypatch, POLICY, privacy)
    assert reply.has_error(), reply.content.metric_records
    assert reply.error.reason == "refused"


@pytest.mark.parametrize(
    "noise",
    [
        50.0,
        0.3,
    ],
)
def test_a_deployed_client_refuses_a_recipe_that_plans_more_than_its_epsilon(tmp_path, monkeypatch, noise) -> None:
    """The server noises and keeps the ledger: what the recipe plans is all that an owner can hold against its terms."""
    reply = asked_of_anna(tmp_path, monkeypatch, CLIENT_POLICY, OF_CLIENTS.format(noise=noise))
    assert reply.has_error() is (noise < 1.0)


# Data that change while a run goes on.


def test_private_data_that_change_between_two_rounds_are_not_trained_on(tmp_path, monkeypatch) -> None:
    """The account is charged for the data that were fingerprinted when the run began, and not for any others."""
    reads: list[int] = []

    def load() -> Data:
        data = TASK.load()

        def of_owner(index: int) -> Records:
            reads.append(index)
            held = data.private.take(np.arange(40 * index, 40 * index + 40))
            if index == 1 and reads.count(1) > 2:  # after the fingerprint and the first round
                held.inputs[0] += 1.0
            return held

        return replace(data, private=None, of_owner=of_owner, status="private")

    monkeypatch.setenv("TACIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(composition, "task_of", lambda _: replace(TASK, load=load))
    settings = ["federated.owners=3", "federated.partition=natural", "federated.rounds=2", "federated.quorum=1"]
    recipe = load_recipe("digits", [*settings, "privacy.noise_multiplier=2.0", "report.twin=false"])
    with suppress(DataProblem):  # that ends the run, or leaves the owner out
        flower_app.train_in_process(recipe, tmp_path / "run", run="run", report=lambda row: None)
        rows = [json.loads(line) for line in (tmp_path / "run/train/rounds.jsonl").read_text().splitlines()]
        assert [row["clients"] for row in rows] == [3, 2]
