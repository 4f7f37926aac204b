"""Secret randomness cannot be replayed, copied or shared; public randomness always can."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from tacit.federated.noise import SecretGenerator, SeededGenerator, public_generator, public_seed


def draw(generator, count=8):
    return generator.gaussian(count, 1.0).tolist()


def drawn_in_a_child(generator):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps(draw(generator)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return json.load(pipe)


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_fork_does_not_repeat_its_parents_noise_nor_its_siblings():
    generator = SecretGenerator()
    draw(generator)  # keyed before the fork: the state is inherited
    children = [drawn_in_a_child(generator) for _ in range(3)]
    streams = [*children, draw(generator)]
    values = [value for stream in streams for value in stream]
    assert len(set(values)) == len(values) == 32


def test_noise_that_is_drawn_ahead_is_never_given_twice_and_has_its_distribution():
    generator, much = SecretGenerator(), 2**16
    drawn = [generator.gaussian(much, 2.5) for _ in range(5)]
    drawn += [generator.gaussian(count, 2.5) for count in (much + 1, much, much, 7, much)]
    values = np.concatenate(drawn)
    assert len(np.unique(values)) == len(values)
    assert [len(part) for part in drawn[5:]] == [much + 1, much, much, 7, much]
    for part in (*drawn[:5], drawn[-1]):
        assert stats.kstest(part / 2.5, "norm").pvalue > 1e-9
    assert stats.kstest(values / 2.4, "norm").pvalue < 1e-9


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_fork_does_not_take_along_what_its_parent_has_drawn_ahead():
    generator, much = SecretGenerator(), 2**16
    for _ in range(3):
        generator.gaussian(much, 1.0)
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, generator.gaussian(much, 1.0)[:8].tobytes())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        theirs = np.frombuffer(pipe.read(), np.float64)
    os.wait()
    ours = generator.gaussian(much, 1.0)
    assert len(theirs) == 8
    assert not np.isin(theirs, ours).any()


# JAX, which another test of the session may have loaded, warns at a fork; the child only draws numbers.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_the_control_a_seeded_generator_does_repeat_over_a_fork():
    generator = SeededGenerator(1)
    assert drawn_in_a_child(generator) == draw(generator)


def test_instances_share_nothing():
    values = [value for _ in range(50) for value in draw(SecretGenerator())]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_secret_generator_cannot_be_copied(take, keyed):
    generator = SecretGenerator()
    if keyed:
        draw(generator)
    with pytest.raises(TypeError, match="stays in its process"):
        take(generator)


SEEDED_PROCESS = """
import random, numpy, torch
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
from tacit.federated.noise import SecretGenerator
print(SecretGenerator().gaussian(4, 1.0).tolist(), SecretGenerator().bernoulli(64, 0.5).tolist())
"""


def test_global_seeds_do_not_reach_it_not_even_with_a_fixed_hash_seed():
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    runs = {subprocess.check_output([sys.executable, "-c", SEEDED_PROCESS], env=environment) for _ in range(2)}
    assert len(runs) == 2


def test_drawing_leaves_the_global_generators_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # the very one

    before = states()
    draw(SecretGenerator())
    draw(SeededGenerator(3))
    public_generator(3, "x").random()
    assert states() == before


def test_seeded_generators_repeat_by_seed_only():
    assert draw(SeededGenerator(5)) == draw(SeededGenerator(5)) != draw(SeededGenerator(6))
    coins = SeededGenerator(5).bernoulli(100, 0.3)
    assert coins.dtype == bool
    assert coins.tolist() == SeededGenerator(5).bernoulli(100, 0.3).tolist()


@pytest.mark.parametrize("make", [SecretGenerator, lambda: SeededGenerator(11)])
def test_gaussians_and_coins_have_their_distributions(make):
    generator = make()
    noise = generator.gaussian(200_000, 2.5)
    assert stats.kstest(noise / 2.5, "norm").pvalue > 1e-9
    assert stats.kstest(noise / 2.4, "norm").pvalue < 1e-9
    ones = int(generator.bernoulli(200_000, 0.1).sum())
    assert stats.binomtest(ones, 200_000, 0.1).pvalue > 1e-9
    assert generator.bernoulli(1000, 1.0).all()
    assert not generator.bernoulli(1000, 0.0).any()


def test_purposes_of_one_seed_are_independent_and_golden():
    """A change of this number would change every partition and every initial weight of every recipe."""
    assert public_seed(7, "partition") == int.from_bytes(bytes.fromhex("61348d3aef345d6a"), "big")
    assert len({public_seed(7, "a"), public_seed(7, "b"), public_seed(8, "a"), public_seed(7, "a", 1)}) == 4
    assert public_generator(7, "a").random(3).tolist() == public_generator(7, "a").random(3).tolist()
