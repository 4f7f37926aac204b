"""Client-level privacy at the server: what is charged, drawn, clipped, noised and kept."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tacit.federated.averaging import from_record, to_record
from tacit.federated.clipping import AdaptiveClip
from tacit.federated.cohorts import PoissonCohorts
from tacit.federated.evaluation import Evaluations, count_evaluations, evaluation_mechanism, owners_accuracy
from tacit.federated.grid import InProcessGrid
from tacit.federated.ledger import Ledger
from tacit.federated.mechanism import Mechanism, PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator
from tacit.federated.outbox import Outbox
from tacit.federated.rounds import FederationFailed, run_rounds
from tacit.federated.server_optimizer import ServerOptimizer

CLIENTS, RATE, CLIP, ROUNDS = 40, 0.5, 2.0, 3
SEED = 5_000_000  # of the public coins: a round's number is added to it
planned_epsilon = functools.cache(Mechanism.planned_epsilon)
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
        "randomness": lambda number: SeededGenerator(SEED + number),
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
    return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=planned_epsilon(mechanism), delta=1e-5)


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
    coins = SeededGenerator(SEED + 1).bernoulli(CLIENTS, RATE)
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


def test_a_learned_clip_survives_a_checkpoint(tmp_path: Path) -> None:
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=RATE * CLIENTS)
    mechanism = make_mechanism(noise=1.0)
    momentum = ServerOptimizer(name="momentum")
    strategy = make_strategy(mechanism, open_ledger(tmp_path, mechanism), clip=clip, optimizer=momentum)
    run(strategy, make_grid(), to_record(ZERO), last=2)
    other = make_strategy(mechanism, clip=clip, optimizer=momentum)
    other.restore(strategy.state())
    assert other.clip is not None
    assert strategy.clip is not None
    assert other.clip.clip_norm == pytest.approx(strategy.clip.clip_norm)
    assert sorted(other.optimizer_state) == sorted(strategy.optimizer_state) == ["velocity.scale", "velocity.w"]


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


def test_a_reply_without_metrics_does_not_end_a_run_that_learns_its_clip(tmp_path: Path) -> None:
    """A client that says nothing about its norm counts as clipped; nobody else notices."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=RATE * CLIENTS)
    grid = InProcessGrid(app, make_grid()._contexts)
    mechanism = make_mechanism()
    strategy = make_strategy(mechanism, open_ledger(tmp_path, mechanism), clip=clip)
    _, seen = run(strategy, grid, to_record(ZERO), last=1)
    assert len(seen) == 1


def test_a_guarantee_without_a_ledger_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(PrivacyRefused, match="ledger"):
        run(make_strategy(make_mechanism()), make_grid(), to_record(ZERO))


def lost(folder: Path, mechanism: Mechanism) -> None:
    """A server that dies in round 1, after the charge and before the release."""
    ledger = open_ledger(folder, mechanism)
    list(make_strategy(mechanism, ledger).configure_train(1, to_record(ZERO), ConfigRecord({"run": "r"}), make_grid()))
    ledger.close()


def test_three_deaths_of_the_server_in_one_round_leave_it_out_and_the_run_goes_on(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    for _ in range(3):
        lost(tmp_path, mechanism)
    ledger = open_ledger(tmp_path, mechanism)
    _, seen = run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO))
    assert (seen[0]["w"] == 0.0).all()  # charged, left out, the model as before
    assert (seen[1]["w"] != 0.0).any()
    account = ledger.accounts["server", "test"]
    assert (account.reserved, account.released, account.reopened) == (ROUNDS, ROUNDS - 1, 2)


def test_a_server_whose_sum_raises_is_a_failure_that_is_not_tried_again(tmp_path: Path, monkeypatch) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)
    with monkeypatch.context() as broken:
        broken.setattr(Mechanism, "noisy_average", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO))
    ledger.close()
    ledger = open_ledger(tmp_path, mechanism)
    _, seen = run(make_strategy(mechanism, ledger), make_grid(), to_record(ZERO))
    assert (seen[0]["w"] == 0.0).all()
    account = ledger.accounts["server", "test"]
    assert (account.reserved, account.failed, account.released) == (ROUNDS, 1, ROUNDS - 1)


# Evaluations: a second cohort, whose shares of right answers are summed, noised and charged like updates.


def make_evaluations(mechanism: Mechanism, noise: float = 5.0) -> Evaluations:
    counting = evaluation_mechanism(mechanism, noise, count_evaluations(ROUNDS, 2))
    return Evaluations(mechanism=counting, rounds=ROUNDS, every=2)


def evaluated(strategy: PoissonCohorts, grid: InProcessGrid, *, first: int = 1, last: int = ROUNDS):
    """What each round's evaluation says, by round."""
    found = {}
    run_rounds(
        strategy,
        grid,
        to_record(ZERO),
        rounds=last,
        first_round=first,
        quorum=0,
        config={"run": "r"},
        on_round=lambda report, record: found.update({report.round: report.evaluation}),
    )
    return found


def evaluating_grid(answer=None) -> tuple[InProcessGrid, list[tuple[str, int]]]:
    """Clients that are right on a share of (index + 1) / CLIENTS of their records; and who was asked what."""
    app, asked = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked.append(("train", int(context.node_config["partition-id"])))
        metrics = MetricRecord({"num-examples": 1, "owner": 0, "unclipped": 1})
        content = {"arrays": message.content.array_records["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        asked.append(("evaluate", index))
        share = (index + 1) / CLIENTS
        metrics = {"num-examples": 1, "owner": index, "right": share, "wrong": 1.0 - share}
        if answer is not None:
            metrics = answer(index, metrics)
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return InProcessGrid(app, make_grid()._contexts), asked


def test_an_evaluation_is_the_mean_share_of_a_second_cohort() -> None:
    """Without noise, against the same public coins: the mean over the cohort, and not the cohort of the training."""
    twin = make_mechanism(noise=0.0)
    grid, asked = evaluating_grid()
    found = evaluated(make_strategy(twin, evaluations=make_evaluations(twin)), grid)
    assert [number for number in found if found[number] is not None] == [2, 3]
    cohort = np.flatnonzero(SeededGenerator(SEED + 1_000_000 + 3).bernoulli(CLIENTS, RATE))
    stated = owners_accuracy(found[3], [])
    assert stated["mean"] == pytest.approx(np.mean((cohort + 1) / CLIENTS), rel=1e-5)
    assert stated["by_owner"] == {}  # nobody learns who took part
    last = asked[-len(cohort) :]
    assert last == [("evaluate", index) for index in cohort]
    trained = {index for kind, index in asked[-2 * CLIENTS :] if kind == "train"}
    assert trained != set(cohort)


def test_one_client_moves_the_sum_of_an_evaluation_by_at_most_one() -> None:
    """Whatever it claims: added, removed, or lying."""
    evaluations = make_evaluations(make_mechanism(noise=0.0))
    honest = [MetricRecord({"owner": 0, "right": 0.25, "wrong": 0.75}) for _ in range(3)]
    base = evaluations.noised([RecordDict({"metrics": record}) for record in honest], SeededGenerator(1))["counts"]
    for right, wrong in ((1.0, 0.0), (0.5, 0.5), (1e9, -1e9), (math.nan, 1.0), (math.inf, 0.0)):
        claimed = MetricRecord({"owner": 1, "right": right, "wrong": wrong})
        contents = [RecordDict({"metrics": record}) for record in [*honest, claimed]]
        moved = evaluations.noised(contents, SeededGenerator(1))["counts"] - base
        assert np.linalg.norm(moved * RATE) <= 1.0  # the release is the sum over q


def test_without_a_clip_the_test_of_one_clients_part_fails(monkeypatch) -> None:
    monkeypatch.setattr("tacit.federated.mechanism.clip_update", lambda update, bound: update)
    with pytest.raises(AssertionError):
        test_one_client_moves_the_sum_of_an_evaluation_by_at_most_one()


def test_an_evaluations_noise_has_the_scale_that_is_charged() -> None:
    evaluations = make_evaluations(make_mechanism(), noise=3.0)
    randomness = SecretGenerator()
    draws = np.concatenate([evaluations.noised([], randomness)["counts"] for _ in range(4000)]).astype(np.float64)

    def alarm(claimed: float) -> bool:
        z = (float((draws**2).mean()) / claimed**2 - 1.0) / math.sqrt(2.0 / draws.size)
        return abs(z) > 6.5

    assert evaluations.noise_sd == pytest.approx(3.0 / RATE)
    assert not alarm(evaluations.noise_sd)
    assert alarm(evaluations.noise_sd * 2 / 3)
    assert alarm(evaluations.noise_sd * 3 / 2)


def open_both(folder: Path, mechanism: Mechanism) -> Ledger:
    """A ledger whose budget is not what is tested."""
    return Ledger(folder / "ledger.jsonl", Outbox(folder / "outbox"), epsilon=math.inf, delta=1e-5)


def test_an_evaluation_is_charged_before_its_cohort_is_drawn(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    evaluations = make_evaluations(mechanism)
    ledger, charged = open_both(tmp_path, mechanism), {}

    def randomness(number: int) -> SeededGenerator:
        charged.setdefault(number, dict(ledger.accounts["server", "test"].history))
        return SeededGenerator(abs(number))

    grid, _ = evaluating_grid()
    evaluated(make_strategy(mechanism, ledger, randomness=randomness, evaluations=evaluations), grid)
    assert charged[1_000_002] == {mechanism.event: 2, evaluations.mechanism.event: 1}
    assert charged[1_000_003] == {mechanism.event: 3, evaluations.mechanism.event: 2}


def test_an_evaluation_is_answered_again_with_the_same_bytes_and_for_free(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    rows = []
    for _ in range(2):  # the second time as after a kill: no checkpoint was written
        ledger = open_both(tmp_path, mechanism)
        strategy = make_strategy(
            mechanism, ledger, randomness=lambda _: SecretGenerator(), evaluations=make_evaluations(mechanism)
        )
        grid, asked = evaluating_grid()
        rows.append({number: dict(record) for number, record in evaluated(strategy, grid).items() if record})
        account = ledger.accounts["server", "test"]
        ledger.close()
    assert rows[0] == rows[1]
    assert asked == []
    assert (account.reserved, account.released, account.reopened) == (ROUNDS + 2, ROUNDS + 2, 0)


def test_a_server_that_died_within_an_evaluation_draws_afresh_for_the_same_charge(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_both(tmp_path, mechanism)

    def dying(index, metrics):
        raise KeyboardInterrupt

    grid, _ = evaluating_grid(dying)
    with pytest.raises(KeyboardInterrupt):
        evaluated(make_strategy(mechanism, ledger, evaluations=make_evaluations(mechanism)), grid)
    ledger.close()
    ledger = open_both(tmp_path, mechanism)
    grid, _ = evaluating_grid()
    found = evaluated(make_strategy(mechanism, ledger, evaluations=make_evaluations(mechanism)), grid)
    assert found[2] is not None
    account = ledger.accounts["server", "test"]
    assert (account.reserved, account.released, account.reopened) == (ROUNDS + 2, ROUNDS + 2, 1)


def test_an_evaluation_that_the_ledger_refuses_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    mechanism = make_mechanism()
    ledger = open_ledger(tmp_path, mechanism)  # its budget is the training's alone
    grid, asked = evaluating_grid()
    much = make_evaluations(mechanism, noise=0.3)
    found = evaluated(make_strategy(mechanism, ledger, evaluations=much), grid)
    assert found == {1: None, 2: None, 3: None}
    assert {kind for kind, _ in asked} == {"train"}
    assert ledger.accounts["server", "test"].history == {mechanism.event: ROUNDS}


def test_an_empty_cohort_is_evaluated_to_noise_that_says_nothing(tmp_path: Path) -> None:
    mechanism = make_mechanism(sample_rate=1e-6, reference_size=1_000_000)
    ledger = open_both(tmp_path, mechanism)
    grid, asked = evaluating_grid()
    strategy = make_strategy(
        mechanism, ledger, randomness=lambda _: SecretGenerator(), evaluations=make_evaluations(mechanism)
    )
    found = evaluated(strategy, grid)
    assert asked == []
    assert found[3] is not None
    assert ledger.accounts["server", "test"].history[make_evaluations(mechanism).mechanism.event] == 2


def both_move(index, moved):
    return {**moved, "scale": np.asarray(moved["scale"] + np.float32(index))}


@pytest.mark.parametrize("hardened", [False, True])
def test_a_round_that_learns_its_clip_is_one_gaussian_event_at_that_rounds_clip(tmp_path: Path, hardened: bool) -> None:
    """Two rounds by hand, from the same public coins: bits with σ_b, updates clipped to C_t and noised with z_Δ·C_t."""
    mechanism = make_mechanism(hardened=hardened)
    clip = AdaptiveClip.start(clip_norm=1.0, noise_multiplier=1.0, expected_cohort=RATE * CLIENTS)
    strategy = make_strategy(mechanism, open_ledger(tmp_path, mechanism), clip=clip)
    _, seen = run(strategy, make_grid(both_move), to_record(ZERO), last=2)
    c, by_hand, sigma = 1.0, np.zeros(5), 2.0  # σ_b = max(20/20, 2z)
    for server_round in (1, 2):
        cohort = np.flatnonzero(SeededGenerator(SEED + server_round).bernoulli(CLIENTS, RATE))
        generator = SeededGenerator(SEED - server_round)
        bits = generator.gaussian(1, sigma)[0]
        noise = generator.gaussian(5, c / math.sqrt(1.0 - (2.0 * sigma) ** -2))
        each = sum(min(float(index), c * (1 - 1e-6) / math.sqrt(2)) for index in cohort)  # in w[0] and in scale
        by_hand += (noise + np.array([each, 0, 0, 0, each])) / (RATE * CLIENTS)
        found = np.append(seen[server_round - 1]["w"], seen[server_round - 1]["scale"])
        np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-6)
        share = (len(cohort) / 2 + bits) / (RATE * CLIENTS) + 0.5  # every client says that it was not clipped
        c *= math.exp(-clip.learning_rate * (share - 0.5))
