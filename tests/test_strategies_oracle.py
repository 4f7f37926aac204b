"""Each strategy, from recipe to model, is what its paper says: held against a few lines of NumPy in double precision.

Batches hold every record, so that gradients are deterministic. An oracle is a function of the `World`, of nothing else:
models are flat vectors (parameters,), and it knows no more of ours than the partition, the first weights and, where it
is public randomness that decides, who was drawn.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tacit.edge.composition import build_model
from tacit.edge.flower_app import train_in_process
from tacit.edge.planning import find_shares, task_of
from tacit.edge.recipe import load_recipe
from tacit.federated.failures import Failures, choose
from tacit.federated.noise import public_generator
from tacit.federated.scaffold import ControlVariates

OWNERS, ROUNDS, STEPS, RATE = 5, 4, 3, 0.3
SMALL = {
    "compression.variants": "[]",
    "privacy.unit": "none",
    "privacy.sample_rate": 1.0,
    "federated.owners": OWNERS,
    "federated.rounds": ROUNDS,
    "federated.local_steps": STEPS,
    "federated.learning_rate": RATE,
    "federated.schedule": "constant",
    "federated.alpha": 0.5,
    "federated.evaluate_every": 0,
    "federated.seed": 3,
}
# Both are smooth: rounding grows at no kink. Some of attention's gradients are 0, where Adam follows rounding alone.
MLP = {"model.family": "mlp", "model.hidden": "[8]", "model.activation": "tanh"}
ATTENTION = {"model.family": "vit-tiny", "model.width": 8, "model.depth": 1, "model.heads": 2, "model.patch": 4}
TOLERANCE = 1e-5  # of any weight; weights are about 1, and move by more than a hundredth


def recipe_of(changes):
    named = {key if "." in key else f"federated.{key}": value for key, value in changes.items()}
    model = {} if "model.family" in named else MLP
    return load_recipe("digits", [f"{key}={value}" for key, value in {**SMALL, **model, **named}.items()])


@functools.cache
def world(family="mlp"):
    return World.of(recipe_of({"strategy": "fedavg", **(ATTENTION if family == "vit-tiny" else {})}))


@dataclass(frozen=True)
class World:
    """Who holds what, and the model that everything begins with."""

    model: torch.nn.Module
    start: np.ndarray
    records: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, recipe):
        data = task_of(recipe).load()
        shares = find_shares(recipe, data)
        held = [shares.read(i) for i in range(OWNERS)]
        model = build_model(recipe).double()
        start = parameters_to_vector(model.parameters()).detach().numpy().copy()
        return cls(model, start, [(torch.from_numpy(r.inputs).double(), torch.from_numpy(r.labels)) for r in held])

    def loss(self, weights, owner):
        vector_to_parameters(torch.from_numpy(weights), self.model.parameters())
        inputs, labels = self.records[owner]
        return torch.nn.functional.cross_entropy(self.model(inputs), labels)

    def gradient(self, weights, owner):
        found = torch.autograd.grad(self.loss(weights, owner), list(self.model.parameters()))
        return parameters_to_vector(found).numpy()

    def walk(self, weights, owner, pull=0.0, towards=None, add=0.0):
        """Plain SGD on F + pull/2·|w - towards|², with `add` to every gradient; towards its beginning unless given."""
        towards = weights if towards is None else towards
        for _ in range(STEPS):
            weights = weights - RATE * (self.gradient(weights, owner) + pull * (weights - towards) + add)
        return weights

    def places(self, chosen):
        """Which entries of a vector belong to the parameters of these names."""
        return np.concatenate([np.full(p.numel(), chosen(name)) for name, p in self.model.named_parameters()])


def rounds_of(step, weights=None):
    """The model after all rounds, where `step` makes a round's model of the one before it and the round's number."""
    weights = world().start if weights is None else weights
    for number in range(1, ROUNDS + 1):
        weights = step(weights, number)
    return weights


def averaged(weights, owners=range(OWNERS), walk=None):
    return np.mean([(walk or world().walk)(weights, owner) for owner in owners], axis=0)


@functools.cache
def fedavg():
    return rounds_of(lambda w, _: averaged(w))


def fedprox(mu):
    return rounds_of(lambda w, _: averaged(w, walk=functools.partial(world().walk, pull=mu)))


def by_size():
    sizes = [len(labels) for _, labels in world().records]
    return rounds_of(lambda w, _: np.average([world().walk(w, i) for i in range(OWNERS)], axis=0, weights=sizes))


def of_cohorts(asked):
    return rounds_of(lambda w, t: averaged(w, choose(range(OWNERS), asked, seed=3, server_round=t)))


def fedavgm(rate, beta):
    velocity = 0.0

    def step(weights, _):
        nonlocal velocity
        velocity = beta * velocity + (weights - averaged(weights))
        return weights - rate * velocity

    return rounds_of(step)


def adaptive(second_moment, rate, beta_1, tau):
    """Reddi et al. 2021, algorithm 2."""
    m, v = 0.0, tau**2

    def step(weights, _):
        nonlocal m, v
        delta = averaged(weights) - weights
        m = beta_1 * m + (1 - beta_1) * delta
        v = second_moment(v, delta**2)
        return weights + rate * m / (np.sqrt(v) + tau)

    return rounds_of(step)


def scaffold(cohort=OWNERS):
    """Karimireddy et al. 2020, algorithm 1, option II: each client holds its own c_i and sends Δy and Δc."""
    c, held = 0.0, [0.0] * OWNERS

    def step(x, number):
        nonlocal c
        moves, changes = [], []
        for i in choose(range(OWNERS), cohort, seed=3, server_round=number):
            y = world().walk(x, i, add=-held[i] + c)
            new = held[i] - c + (x - y) / (STEPS * RATE)
            moves.append(y - x)
            changes.append(new - held[i])
            held[i] = new
        c = c + len(changes) / OWNERS * np.mean(changes, axis=0)
        return x + np.mean(moves, axis=0)

    return rounds_of(step)


def q_ffl(q):
    """Li et al. 2020, algorithm 2, with L = 1 / learning rate."""

    def step(w, _):
        deltas, scales = [], []
        for i in range(OWNERS):
            f, moved = float(world().loss(w, i).detach()), (w - world().walk(w, i)) / RATE
            deltas.append(f**q * moved)
            scales.append(q * f ** (q - 1) * moved @ moved + f**q / RATE)
        return w - np.sum(deltas, axis=0) / np.sum(scales)

    return rounds_of(step)


def fedbuff(buffer, concurrency):
    """Nguyen et al. 2022, algorithm 1, on a list of (finish, owner, round of the model it began with)."""
    pace = Failures(straggler_share=0.4, slowdown=4.0, seed=3)
    clock, working, models = 0.0, [], {}

    def step(weights, number):
        nonlocal clock
        models[number - 1] = weights
        draw, came = public_generator(3, "buffer", number), []
        while True:
            busy = {owner for _, owner, _ in working} | {owner for _, owner, _ in came}
            idle = [owner for owner in range(OWNERS) if owner not in busy]
            free = min(concurrency - len(working), len(idle))
            for owner in draw.choice(idle, free, replace=False) if idle else []:
                working.append((clock + pace.duration(int(owner), number), int(owner), number - 1))
            if len(came) == buffer:
                break
            working.sort()
            came.append(working.pop(0))
            clock = came[-1][0]
        moves = [(world().walk(models[v], i) - models[v]) / np.sqrt(1 + (number - 1 - v)) for _, i, v in came]
        return weights + np.mean(moves, axis=0)

    return rounds_of(step)


def with_optimizer(kind, **settings):
    """Owners use torch's own optimizer, new in each round."""

    def walk(weights, owner):
        moving = torch.from_numpy(weights.copy()).requires_grad_()
        optimizer = kind([moving], lr=0.01, **settings)
        for _ in range(STEPS):
            moving.grad = torch.from_numpy(world().gradient(moving.detach().numpy().copy(), owner))
            optimizer.step()
        return moving.detach().numpy()

    return rounds_of(lambda w, _: averaged(w, walk=walk))


def partly_own(here, is_own):
    """Parameters for which `is_own` holds stay where they are made; the others are averaged."""
    mine = here.places(is_own)
    held = [here.start] * OWNERS

    def step(weights, _):
        held[:] = [here.walk(np.where(mine, held[i], weights), i) for i in range(OWNERS)]
        return np.where(mine, np.nan, np.mean(held, axis=0))

    return rounds_of(step, here.start), [np.where(mine, own, np.nan) for own in held]


def ditto(strength):
    """Li et al. 2021, algorithm 1: v_k is pulled towards the model that its owner received."""
    held = [world().start] * OWNERS

    def step(weights, _):
        held[:] = [world().walk(held[i], i, pull=strength, towards=weights) for i in range(OWNERS)]
        return averaged(weights)

    return rounds_of(step), held


def top_k(share, feedback):
    left = [np.zeros_like(world().start)] * OWNERS

    def send(weights, i):
        update = world().walk(weights, i) - weights + feedback * left[i]
        smallest = np.argsort(np.abs(update))[: len(update) - int(np.ceil(share * len(update)))]
        sent = update.copy()
        sent[smallest] = 0.0
        left[i] = update - sent
        return weights + sent

    return rounds_of(lambda w, _: averaged(w, walk=send))


def by_rule(rule):
    return rounds_of(lambda w, _: w + rule(np.stack([world().walk(w, i) - w for i in range(OWNERS)])))


def norm_bounded(moves, bound=None):
    norms = np.linalg.norm(moves, axis=1)
    return np.mean(moves * np.minimum(1.0, (bound or np.median(norms)) / norms)[:, None], axis=0)


def krum(moves):
    """Blanchard et al. 2017 for one liar: the least sum of squared distances to n - 3 others."""
    squares = ((moves[:, None] - moves) ** 2).sum(axis=2)
    return moves[np.argmin(np.sort(squares, axis=1)[:, 1 : len(moves) - 2].sum(axis=1))]


Oracle = Callable[[], np.ndarray]
SERVER = {"server_learning_rate": 0.05, "server_momentum": 0.8, "server_second_momentum": 0.95, "server_tau": 0.01}
LOCAL = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
ORACLES: dict[str, tuple[dict[str, object], Oracle]] = {
    "fedprox": ({"strategy": "fedprox", "proximal": 0.7}, lambda: fedprox(0.7)),
    "sizes as weights": ({"strategy": "fedavg", "weights": "size"}, by_size),
    "cohort": ({"strategy": "fedavg", "cohort": 2}, lambda: of_cohorts(2)),
    "over-selected cohort": ({"strategy": "fedavg", "cohort": 2, "over_selection": 1.5}, lambda: of_cohorts(3)),
    "fedavgm": (
        {"strategy": "fedavgm", "server_learning_rate": 0.7, "server_momentum": 0.8},
        lambda: fedavgm(0.7, 0.8),
    ),
    "fedadam": (
        {"strategy": "fedadam", **SERVER},
        lambda: adaptive(lambda v, square: 0.95 * v + 0.05 * square, 0.05, 0.8, 0.01),
    ),
    "fedyogi": (
        {"strategy": "fedyogi", **SERVER},
        lambda: adaptive(lambda v, square: v - 0.05 * square * np.sign(v - square), 0.05, 0.8, 0.01),
    ),
    "fedadagrad": (
        {"strategy": "fedadagrad", **SERVER},
        lambda: adaptive(lambda v, square: v + square, 0.05, 0.0, 0.01),
    ),
    "scaffold": ({"strategy": "scaffold"}, scaffold),
    "scaffold of cohorts": ({"strategy": "scaffold", "cohort": 2}, lambda: scaffold(2)),
    "q-ffl": ({"strategy": "q-ffl", "fairness": 0.6}, lambda: q_ffl(0.6)),
    "local momentum": (
        {"strategy": "fedavg", "local_optimizer": "momentum", "local_momentum": 0.8, "learning_rate": 0.01},
        lambda: with_optimizer(torch.optim.SGD, momentum=0.8),
    ),
    **{
        f"local {name}": (
            {"strategy": "fedavg", "local_optimizer": name, "learning_rate": 0.01},
            functools.partial(with_optimizer, kind),
        )
        for name, kind in LOCAL.items()
    },
    "top-k": (
        {"strategy": "fedavg", "codec": "top-k", "codec_fraction": 0.1, "error_feedback": "false"},
        lambda: top_k(0.1, 0.0),
    ),
    "top-k with feedback": (
        {"strategy": "fedavg", "codec": "top-k", "codec_fraction": 0.1},
        lambda: top_k(0.1, 1.0),
    ),
    "norm-bounded": ({"strategy": "fedavg", "aggregation": "norm-bounded"}, lambda: by_rule(norm_bounded)),
    "norm-bounded by a constant": (
        {"strategy": "fedavg", "aggregation": "norm-bounded", "norm_bound": 0.2},
        lambda: by_rule(functools.partial(norm_bounded, bound=0.2)),
    ),
    "median": ({"strategy": "fedavg", "aggregation": "median"}, lambda: by_rule(lambda m: np.median(m, axis=0))),
    "trimmed mean": (
        {"strategy": "fedavg", "aggregation": "trimmed-mean", "trim": 0.2},
        lambda: by_rule(lambda m: np.sort(m, axis=0)[1:-1].mean(axis=0)),
    ),
    "krum": ({"strategy": "fedavg", "aggregation": "krum", "hostile": 1}, lambda: by_rule(krum)),
    **{
        f"fedbuff of {buffer}, {concurrency} at work": (
            {
                "strategy": "fedbuff",
                "buffer": buffer,
                "concurrency": concurrency,
                "federated.failures.straggler_share": 0.4,
            },
            functools.partial(fedbuff, buffer, concurrency),
        )
        for buffer, concurrency in ((2, OWNERS), (2, 3), (1, 4))
    },
}


def trained(folder, changes, here=None):
    """What a recipe's run leaves, as one vector."""
    train_in_process(recipe_of(changes), folder, run="oracle", report=lambda _: None)
    return vector(load_file(folder / "train" / "weights.safetensors"), here)


def vector(arrays, here=None):
    """Arrays by name in the order of the model; NaN where they lack a parameter."""
    named = (here or world()).model.named_parameters()
    return np.concatenate([np.ravel(arrays.get(name, np.full(tuple(p.shape), np.nan))) for name, p in named])


def distance(found, wanted):
    assert (np.isnan(found) == np.isnan(wanted)).all()
    return float(np.nanmax(np.abs(found - wanted)))


def test_fedavg_is_its_paper_s(tmp_path):
    assert distance(trained(tmp_path, {"strategy": "fedavg"}), fedavg()) < TOLERANCE


@pytest.mark.parametrize("name", ORACLES)
def test_a_strategy_is_its_paper_s_and_no_plain_average(name, tmp_path):
    changes, oracle = ORACLES[name]
    wanted = oracle()
    assert distance(trained(tmp_path, changes), wanted) < TOLERANCE
    assert distance(fedavg(), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("personal", "model", "is_own"),
    [
        ("fedbn", ATTENTION, lambda name: "norm." in name or "before_" in name),
        ("local-head", ATTENTION, lambda name: name.startswith("2.")),
        ("local-head", MLP, lambda name: name.startswith("3.")),
    ],
    ids=["fedbn", "local head", "local head of an mlp"],
)
def test_an_owner_s_own_part_stays_and_the_rest_is_averaged(personal, model, is_own, tmp_path):
    here = world(model["model.family"])
    found = trained(tmp_path, {"strategy": "fedavg", "personal": personal, **model}, here)
    shared, held = partly_own(here, is_own)
    assert distance(found, shared) < TOLERANCE
    for index, own in enumerate(held):
        assert distance(vector(kept(tmp_path, index, "own"), here), own) < TOLERANCE


def test_ditto_s_own_models_are_pulled_towards_what_their_owners_received(tmp_path):
    found = trained(tmp_path, {"strategy": "fedavg", "personal": "ditto", "personal_strength": 0.7})
    shared, held = ditto(0.7)
    assert distance(found, shared) < TOLERANCE
    assert distance(found, fedavg()) < TOLERANCE
    for index, own in enumerate(held):
        assert distance(vector(kept(tmp_path, index, "personal")), own) < TOLERANCE
        assert distance(own, shared) > 100 * TOLERANCE


def kept(folder, index, what):
    """What an owner's newest file holds under this heading."""
    name = f"owner-{index:02d}"
    newest = sorted((folder / "owners" / name / f"{name}.kept").glob("*.safetensors"))[-1]
    return {key.removeprefix(f"{what}."): a for key, a in load_file(newest).items() if key.startswith(f"{what}.")}


@pytest.mark.parametrize("bug", ["sign of the correction", "c_i forgotten", "c of the cohort alone"])
def test_the_oracle_notices_a_wrong_scaffold(bug, monkeypatch, tmp_path):
    correction, begin = ControlVariates.correction, ControlVariates.begin

    def flipped(self, owner, like):
        return {name: np.negative(array) for name, array in correction(self, owner, like).items()}

    def forgetful(self, owner, like):
        return correction(self, None, like)

    def of_cohort(self, before):
        self.owners = 3
        return begin(self, before)

    wrong = {"sign of the correction": ("correction", flipped), "c_i forgotten": ("correction", forgetful)}
    monkeypatch.setattr(ControlVariates, *wrong.get(bug, ("begin", of_cohort)))
    assert distance(trained(tmp_path, {"strategy": "scaffold", "cohort": 3}), scaffold(3)) > 100 * TOLERANCE
