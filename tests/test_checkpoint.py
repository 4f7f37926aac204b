"""A checkpoint comes back bit for bit, or is passed over and named."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import save

from tacit.federated.checkpoint import Checkpoint, load_checkpoint, read_weights, save_checkpoint, write_weights


def arrays(seed):
    generator = np.random.default_rng(seed)
    odd = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    made = {"z": generator.normal(size=(3, 4)).T, "a": generator.normal(), "empty": np.zeros((0, 2)), "odd": odd}
    return {name: np.asarray(array, dtype=np.float32) for name, array in made.items()}


def checkpoint(number, **changed):
    made = {
        "round": number,
        "arrays": arrays(number),
        "strategy": {"z": arrays(number + 100)["z"]},
        "recipe": "r" * 64,
        "ledger_head": f"{number:064d}",
        "history": [{"round": n, "accuracy": None if n == 1 else 0.1 + n / 7} for n in range(1, number + 1)],
    }
    return Checkpoint(**{**made, **changed})


def same(a, b):
    assert (a.round, a.recipe, a.ledger_head, list(a.history)) == (b.round, b.recipe, b.ledger_head, list(b.history))
    for one, other in ((a.arrays, b.arrays), (a.strategy, b.strategy)):
        assert [(n, x.shape, x.dtype, x.tobytes()) for n, x in one.items()] == [
            (n, x.shape, x.dtype, x.tobytes()) for n, x in other.items()
        ]


def test_a_checkpoint_comes_back_bit_for_bit_in_the_models_order(tmp_path):
    save_checkpoint(tmp_path / "new folder", checkpoint(3))
    found, notes = load_checkpoint(tmp_path / "new folder")
    same(found, checkpoint(3))
    assert notes == []


def test_a_strategy_without_state_stays_without(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1, strategy={}))
    assert load_checkpoint(tmp_path)[0].strategy == {}


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path / "gone") == (None, [])
    assert load_checkpoint(tmp_path) == (None, [])


def test_the_newest_is_found_and_only_two_are_kept(tmp_path):
    for number in range(1, 12):
        save_checkpoint(tmp_path, checkpoint(number))
        same(load_checkpoint(tmp_path)[0], checkpoint(number))
    assert [path.name[:6] for path in sorted(tmp_path.iterdir())] == ["000010", "000011"]


def mutate(data, generator):
    kind = generator.choice(["flip", "truncate", "append", "swap", "zeros"])
    changed = bytearray(data)
    place = generator.randrange(len(data))
    if kind == "flip":
        changed[place] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del changed[place:]
    elif kind == "append":
        changed += bytes(generator.randrange(1, 9))
    elif kind == "swap":
        changed[place] = (changed[place] + generator.randrange(1, 256)) % 256
    else:
        changed[place:] = bytes(len(data) - place)
    return bytes(changed)


def test_none_of_two_hundred_mutations_is_accepted_and_the_older_one_is_used(tmp_path):
    generator = random.Random(5)  # reproducible mutations
    save_checkpoint(tmp_path, checkpoint(1))
    newest = save_checkpoint(tmp_path, checkpoint(2))
    whole, tried = newest.read_bytes(), 0
    while tried < 200:
        changed = mutate(whole, generator)
        if changed == whole:
            continue
        tried += 1
        newest.write_bytes(changed)
        found, notes = load_checkpoint(tmp_path)
        assert found.round == 1
        assert notes == [f"{newest}: damaged checkpoint passed over"]
    newest.write_bytes(whole)
    assert load_checkpoint(tmp_path)[0].round == 2


def test_with_both_damaged_there_is_none_and_both_are_named(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, checkpoint(number)).write_bytes(b"")
    found, notes = load_checkpoint(tmp_path)
    assert found is None
    assert len(notes) == 2


def test_damaged_ones_do_not_push_out_those_that_a_resumed_run_writes(tmp_path):
    for number in (9, 10):
        save_checkpoint(tmp_path, checkpoint(number)).write_bytes(b"damaged")
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(number))
        found, notes = load_checkpoint(tmp_path)
        assert (found.round, notes) == (number, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_round_done_again_after_damage_keeps_the_whole_one_before_it(tmp_path):
    save_checkpoint(tmp_path, checkpoint(4))
    save_checkpoint(tmp_path, checkpoint(5)).write_bytes(b"damaged")
    newest = save_checkpoint(tmp_path, checkpoint(5, recipe="other"))
    newest.write_bytes(b"damaged too")
    assert load_checkpoint(tmp_path)[0].round == 4


def finite(seed):
    return {name: array for name, array in arrays(seed).items() if name != "odd"}


def test_weights_come_back_bit_for_bit_in_order(tmp_path):
    write_weights(tmp_path / "w", finite(1))
    read = read_weights(tmp_path / "w")
    assert [(n, a.shape, a.tobytes()) for n, a in read.items()] == [
        (n, a.shape, a.tobytes()) for n, a in finite(1).items()
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    weights = finite(1)
    weights["z"][1, 2] = bad
    write_weights(tmp_path / "w", weights)
    with pytest.raises(ValueError, match="NaN or infinity in z; restore it"):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors",
        save({"z": np.zeros(2, np.float32)}),
        save({"z": np.zeros(2, np.float32)}, metadata={"order": "{"}),
        save({"z": np.zeros(2, np.float32)}, metadata={"order": json.dumps(["z", "missing"])}),
        save({"z": np.zeros(2, np.float32)}, metadata={"order": "3"}),
    ],
)
def test_foreign_files_are_refused_as_weights(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(ValueError, match="expected weights written by tacit"):
        read_weights(tmp_path / "w")
