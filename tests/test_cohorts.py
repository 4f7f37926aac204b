"""Client-level privacy at the server: what is charged, drawn, clipped, noised and kept."""

import math
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tacit.federated.averaging import ServerOptimizer, from_record, to_record
from tacit.federated.clipping import AdaptiveClip
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.rounds import FederationFailed, run_rounds

CLIENTS, RATE, CLIP, ROUNDS = 40, 0.5, 2.0, 3
ZERO = {"w": np.zeros(4, np.float32), "scale": np.zeros((), np.float32)}


def make_mechanism(noise: float = 1.0, **changes: object) -> Mechanism:
    fields = {
        "unit": "client",
        "sample_rate": RATE,
        "max_grad_norm": CLIP,
        "noise_multiplier": noise,
        "steps_per_round": 1,
        "rounds": ROUNDS,
        "reference_size": CLIENTS,
        "delta": 1e-5,
        "twin": noise == 0.0,
    }
    return Mechanism(**{**fields, **changes})


def make_strategy(mechanism: Mechanism, ledger: Ledger | None = None, **changes: object) -> PoissonCohorts:
    fields = {
        "mechanism": mechanism,
        "rounds": ROUNDS,
        "optimizer": ServerOptimizer(),
        "randomness": lambda server_round: SeededGenerator(1000 + server_round),
        "source": "test",
        "quorum": 1,
        "ledger": ledger,
    }
    return PoissonCohorts(**{**fields, **changes})


def make_grid(answer=None) -> InProcessGrid:
    """Clients that move the model by (index, 0, 0, 0), or as `answer(index)` says."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        arrays = from_record(message.content.array_records["arrays"])
        moved = {"w": arrays["w"] + np.float32([index, 0, 0, 0]), "scale": arrays["scale"]}
        moved = moved if answer is None else answer(index, moved)
        metrics = MetricRecord({"num-examples": 1, "owner": index, "unclipped": 1})
        return Message(RecordDict({"arrays": to_record(moved), "metrics": metrics}), reply_to=message)

    contexts = {
        i + 2: Context(1, i + 2, {"partition-id": i, "num-partitions": CLIENTS}, RecordDict(), {})
        for i in range(CLIENTS)
    }
    return InProcessGrid(app, contexts)


def open_ledger(folder: Path, mechanism: Mechanism) -> Ledger:
    return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=mechanism.planned_epsilon(), delta=1e-5)


def run(strategy: PoissonCohorts, grid: InProcessGrid, arrays: ArrayRecord, *, first: int = 1, last: int = ROUNDS):
    seen = []
    final = run_rounds(
        strategy,
        grid,
        arrays,
        rounds=last,
        first_round=first,
        quorum=0,
        config={"run": "r"},
        on_round=lambda report, record: seen.append(from_record(record)),
    )
    return from_record(final), seen


def test_a_round_is_the_clipped_sum_of_the_cohort_over_a_public_constant() -> None:
    """The oracle draws the same coins and adds up by hand; no noise, so it is exact."""
    strategy = make_strategy(make_mechanism(noise=0.0))
    final, _ = run(strategy, make_grid(), to_record(ZERO), last=1)
    coins = SeededGenerator(1001).bernoulli(CLIENTS, RATE)
    total = sum(min(float(index), CLIP * (1 - 1e-6)) for index in np.flatnonzero(coins))
    assert final["w"][0] == pytest.approx(total / (RATE * CLIENTS), rel=1e-6)
    assert (final["w"][1:] == 0.0).all()


def test_the_noise_has_the_scale_that_is_charged(tmp_path: Path) -> None:
    """z-test of the release of empty updates; the negative controls are 2/3 and 3/2 of the noise."""
    wide = {"w": np.zeros(200_000, np.float32), "scale": np.zeros((), np.float32)}
    mechanism = make_mechanism(noise=1.5)
    release = mechanism.noisy_average([], wide, SecretGenerator())
    scaled = release["w"].astype(np.float64) * mechanism.normaliser / CLIP

    def alarm(claimed: float) -> bool:
        z = (float((scaled**2).mean()) / claimed**2 - 1.0) / math.sqrt(2.0 / scaled.size)
        return abs(z) > 6.5

    assert not alarm(1.5)
    assert alarm(1.0)
    assert alarm(2.25)


def test_an_empty_cohort_releases_noise_and_is_charged(tmp_path: Path) -> None:
    mechanism = make_mechanism(sample_rate=1e-6, reference_size=1_000_000)
    ledger = open_ledger(tmp_path, mechanism)
    strategy = make_strategy(mechanism, ledger, randomness=lambda _: SecretGenerator())
    final, _ = run(strategy, make_grid(), to_record(ZERO), last=1)
    assert (final["w"] != 0.0).all()
    assert ledger.accounts["server", "test"].reserved == 1


def test_the_charge_is_on_disk_before_the_cohort_is_drawn(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    order = []

    def randomness(server_round: int) -> SeededGenerator:
        order.append((server_round, (tmp_path / "ledger.jsonl").read_text().count('"reserve"')))
        return SeededGenerator(server_round + 10)

    run(make_strategy(mechanism, ledger, randomness=randomness), make_grid(), to_record(ZERO), last=1)
    assert order[0] == (1, 1)


def test_a_server_that_died_after_the_release_repeats_the_same_bytes(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    strategy = make_strategy(mechanism, ledger, randomness=lambda _: SecretGenerator())
    first, _ = run(strategy, make_grid(), to_record(ZERO), last=1)
    ledger.close()
    ledger = open_ledger(tmp_path, mechanism)  # as after a kill: no checkpoint was written
    again, _ = run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO), last=1)
    assert all((first[name] == again[name]).all() for name in first)
    assert ledger.accounts["server", "test"].reserved == 1


def test_a_server_that_died_before_the_release_draws_afresh_for_the_same_charge(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    strategy = make_strategy(mechanism, ledger)
    list(strategy.configure_train(1, to_record(ZERO), ConfigRecord({"run": "r"}), make_grid()))
    ledger.close()
    ledger = open_ledger(tmp_path, mechanism)
    run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO), last=1)
    account = ledger.accounts["server", "test"]
    assert (account.reserved, account.released, account.reopened) == (1, 1, 1)


def test_more_rounds_than_planned_are_refused_and_nothing_is_drawn(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    _, seen = run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO))
    with pytest.raises(PrivacyRefused, match="exhausted"):
        run(make_strategy(mechanism, ledger), make_grid(), to_record(seen[-1]), first=4, last=4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda moved: {**moved, "w": np.float32([math.nan, 0, 0, 0])},
        lambda moved: {**moved, "w": moved["w"][:1]},
        lambda moved: {"w": moved["w"]},
        lambda moved: {**moved, "extra": np.zeros(1, np.float32)},
    ],
    ids=["nan", "shape", "missing", "extra"],
)
def test_a_reply_that_breaks_a_rule_contributes_zero(spoil) -> None:
    """And nobody else's contribution changes."""
    honest = make_grid(lambda index, moved: moved if index != 7 else {**moved, "w": moved["w"] * 0})
    hostile = make_grid(lambda index, moved: moved if index != 7 else spoil(moved))
    everyone = make_mechanism(noise=0.0, sample_rate=1.0)
    results = [run(make_strategy(everyone), grid, to_record(ZERO), last=1)[0] for grid in (honest, hostile)]
    assert results[0]["w"].tolist() == results[1]["w"].tolist()


def test_too_few_reachable_clients_stop_the_run_before_anything_is_charged(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    with pytest.raises(FederationFailed, match="reachable clients"):
        run(make_strategy(mechanism, ledger, quorum=CLIENTS + 1), make_grid(), to_record(ZERO))
    assert ledger.accounts == {}


def test_a_learned_clip_survives_a_checkpoint() -> None:
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=RATE * CLIENTS)
    mechanism = make_mechanism(noise=1.0)
    strategy = make_strategy(mechanism, clip=clip)
    run(strategy, make_grid(), to_record(ZERO), last=2)
    other = make_strategy(mechanism, clip=clip)
    other.restore(strategy.state())
    assert other.clip is not None
    assert strategy.clip is not None
    assert other.clip.clip_norm == pytest.approx(strategy.clip.clip_norm)
    assert other.velocity is not None


@pytest.mark.parametrize("unit", ["client", "local"])
def test_hardened_releases_lie_on_the_grid_and_equal_the_fast_ones_in_scale(unit: str) -> None:
    from tacit.federated.secure_noise import SecureGenerator, grid_step

    wide = {"w": np.zeros(100_000, np.float32), "scale": np.zeros((), np.float32)}
    rate = 1.0 if unit == "local" else RATE
    hard = make_mechanism(noise=1.5, unit=unit, sample_rate=rate, hardened=True)
    if unit == "client":
        release = hard.noisy_average([], wide, SecureGenerator())["w"].astype(np.float64) * hard.normaliser
    else:
        release = hard.release_locally(wide, SecureGenerator())["w"]
        steps = release / grid_step(CLIP)
        assert (steps == np.rint(steps)).all()
    expected = 1.5 * CLIP * (2.0 if unit == "local" else 1.0)
    z = (float((release**2).mean()) / expected**2 - 1.0) / math.sqrt(2.0 / release.size)
    assert abs(z) < 6.5


def test_a_reply_without_metrics_does_not_end_a_run_that_learns_its_clip() -> None:
    """A client that says nothing about its norm counts as clipped; nobody else notices."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=RATE * CLIENTS)
    grid = InProcessGrid(app, make_grid()._contexts)
    _, seen = run(make_strategy(make_mechanism(), clip=clip), grid, to_record(ZERO), last=1)
    assert len(seen) == 1
