"""A checkpoint comes back bit for bit, or is passed over and named."""

import hashlib
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from tacit.devices.durable import FileDamaged
from tacit.federated.checkpoint import Checkpoint, load_checkpoint, read_weights, save_checkpoint, write_weights


def arrays(seed):
    generator = np.random.default_rng(seed)
    odd = np.array([0.0, -0.0, 1e-45, 3.4e38, -3.4e38], np.float32)
    made = {"z": generator.normal(size=(3, 4)).T, "a": generator.normal(), "empty": np.zeros((0, 2)), "odd": odd}
    return {name: np.asarray(array, dtype=np.float32) for name, array in made.items()}


def state(seed):
    """As strategies keep it: in their own order, numbers of any kind, and infinity may mean something."""
    return {
        "velocity.z": arrays(seed)["z"],
        "clock": np.array([0.1 + seed]),
        "best": np.array(np.inf),
        "node": np.array([2**64 - 1, seed], np.uint64),
        "an int": np.array([[-(2**63), seed]]),
        "seen": np.array([True, False]),
        "half": np.array([1.5, np.nan], np.float16),
        "other end": np.array([1.0, seed]).astype(">f8"),
    }


def checkpoint(number, **changed):
    made = {
        "round": number,
        "arrays": arrays(number),
        "strategy": state(number + 100),
        "run": "a run",
        "recipe": "r" * 64,
        "ledger_head": f"{number:064d}",
        "history": [{"round": n, "accuracy": None if n == 1 else 0.1 + n / 7} for n in range(1, number + 1)],
    }
    return Checkpoint(**{**made, **changed})


def bytes_of(named):
    """Names in order, shapes, dtypes and values; the order of bytes is the machine's."""
    return [(n, a.shape, a.dtype.newbyteorder("="), a.astype(a.dtype.newbyteorder("=")).tobytes()) for n, a in named]


def same(a, b):
    assert (a.round, a.run, a.recipe, a.ledger_head) == (b.round, b.run, b.recipe, b.ledger_head)
    assert list(a.history) == list(b.history)
    assert bytes_of(a.arrays.items()) == bytes_of(b.arrays.items())
    assert bytes_of(a.strategy.items()) == bytes_of(b.strategy.items())


def test_a_checkpoint_comes_back_bit_for_bit_in_its_own_order(tmp_path):
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


def test_rounds_are_in_order_beyond_a_million(tmp_path):
    for number in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, checkpoint(number, history=[]))
        assert load_checkpoint(tmp_path)[0].round == number
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_not_saved_and_the_one_before_stays(tmp_path, bad):
    save_checkpoint(tmp_path, checkpoint(1))
    with pytest.raises(ValueError, match="finite model after round 2, got NaN or infinity in w"):
        save_checkpoint(tmp_path, checkpoint(2, arrays={"w": np.float32([1.0, bad])}))
    assert load_checkpoint(tmp_path)[0].round == 1


@pytest.mark.parametrize("kept", [np.array(["text"]), np.array([object()]), np.array([1j]), np.zeros(1, np.longdouble)])
def test_a_state_that_is_not_numbers_is_refused_by_name(tmp_path, kept):
    with pytest.raises(ValueError, match=r"expected a strategy's state as integers or floats .*, got it="):
        save_checkpoint(tmp_path, checkpoint(1, strategy={"it": kept}))


MUTATIONS = ("flip", "truncate", "append", "change", "zeros", "block", "version", "swap", "rename", "other run")


def mutate(kind, whole, others, dice):
    """Other bytes and the name that they get: whole as (name, bytes), others of older rounds and of another run."""
    (name, data), (older, foreign) = whole, others
    changed, place = bytearray(data), dice.randrange(len(data))
    if kind == "flip":
        changed[place] ^= 1 << dice.randrange(8)
    elif kind == "truncate":
        del changed[place:]
    elif kind == "append":
        changed += dice.randbytes(dice.randrange(1, 9))
    elif kind == "change":
        changed[place] = (changed[place] + dice.randrange(1, 256)) % 256
    elif kind == "zeros":
        changed[place:] = bytes(len(data) - place)
    elif kind == "block":
        changed[place : place + 64] = dice.randbytes(len(changed[place : place + 64]))
    elif kind == "version":
        old = b'"tacit.checkpoint":"1"'
        changed = bytearray(data.replace(old, old[:-2] + dice.choice(b"023456789").to_bytes() + b'"'))
    elif kind == "swap":
        name, changed = dice.choice([name, name[:6] + older[0][6:]]), bytearray(older[1])
    elif kind == "rename":
        name = dice.choice(
            [f"{dice.randrange(3, 10**6):06d}{name[6:]}", name[:7] + dice.randbytes(16).hex() + name[39:]]
        )
    else:
        changed = bytearray(foreign[1])
    return name, bytes(changed)


def outcome_of(folder, name):
    """What a load says of a file: refused, or passed over for the round before; nothing else is right."""
    found, notes = load_checkpoint(folder)
    assert found.round == 1
    assert len(notes) == 1
    assert name in notes[0]
    assert "damaged checkpoint passed over" in notes[0]


def test_none_of_1100_mutations_is_accepted_and_the_older_one_is_used(tmp_path):
    dice = random.Random(5)
    older = save_checkpoint(tmp_path, checkpoint(1))
    newest = save_checkpoint(tmp_path, checkpoint(2))
    foreign = save_checkpoint(tmp_path / "other", checkpoint(2, run="another run", recipe="s" * 64))
    whole, others = (newest.name, newest.read_bytes()), [(p.name, p.read_bytes()) for p in (older, foreign)]
    newest.unlink()
    for kind in itertools.islice(itertools.cycle(MUTATIONS), 1100):
        name, data = mutate(kind, whole, others, dice)
        if (name, data) == whole:  # zeros upon zeros
            name, data = mutate("flip", whole, others, dice)
        (tmp_path / name).write_bytes(data)
        outcome_of(tmp_path, name)
        (tmp_path / name).unlink()
    newest.write_bytes(whole[1])
    same(load_checkpoint(tmp_path)[0], checkpoint(2))


def forge(folder, data, number=2):
    """A file whose name is right for whatever it holds: damage that somebody meant."""
    path = folder / f"{number:06d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
    path.write_bytes(data)
    return path


ABOUT = {"round": 2, "run": "", "recipe": "", "ledger_head": "", "order": ["w"], "state": [], "history": []}


def forged(about, tensors=None, version="1", **metadata):
    text = about if isinstance(about, str) else json.dumps(about)
    tensors = {"model.w": np.float32([1.0])} if tensors is None else tensors
    return save(tensors, metadata={"tacit.checkpoint": version, "about": text, **metadata})


def header_of(*parts):
    """A file of one float, with a header put together by hand."""
    text = "{" + ",".join(parts) + "}"
    return len(text).to_bytes(8, "little") + text.encode() + b"\0\0\x80?"


W = '"model.w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
META = '"__metadata__":' + json.dumps({"tacit.checkpoint": "1", "about": json.dumps(ABOUT)})
HOSTILE = {
    "nothing": b"",
    "a byte": b"\0",
    "an endless header": b"\xff" * 64,
    "no metadata": save({"model.w": np.float32([1.0])}),
    "no version": save({"model.w": np.float32([1.0])}, metadata={"about": json.dumps(ABOUT)}),
    "no about": save({"model.w": np.float32([1.0])}, metadata={"tacit.checkpoint": "1"}),
    "about no JSON": forged("{"),
    "about a list": forged([]),
    "about a number": forged("3"),
    "about too deep": forged("[" * 100_000),
    "a name twice in about": forged(json.dumps(ABOUT)[:-1] + ', "round": 2}'),
    "a field more": forged({**ABOUT, "more": 1}),
    "a field less": forged({key: value for key, value in ABOUT.items() if key != "run"}),
    **{
        f"{key} = {value!r}": forged({**ABOUT, key: value})
        for key, values in {
            "round": [1, 3, -2, True, 2.0, "2", None],
            "run": [None, 1, ["a"]],
            "recipe": [None, {}],
            "ledger_head": [None, 0],
            "order": [None, "w", {"w": 1}, [1], [None], [["w"]], [], ["w", "w"], ["w", "v"]],
            "state": [None, "", ["w"], [2]],
            "history": [None, {}, [1], [[]]],
        }.items()
        for value in values
    },
    "an array less": forged(ABOUT, {"other": np.float32([1.0])}),
    "an array more": forged(ABOUT, {"model.w": np.float32([1.0]), "strategy.v": np.float32([1.0])}),
    "a number named by a number": forged({**ABOUT, "order": [3]}, {"model.3": np.float32([1.0])}),
    "NaN": forged(ABOUT, {"model.w": np.float32([np.nan])}),
    "infinity": forged(ABOUT, {"model.w": np.float32([1.0, -np.inf])}),
    "a tensor twice": header_of(META, W, W),
    "metadata twice": header_of(META, META, W),
    "metadata of text": header_of('"__metadata__":"x"', W),
    "no such dtype": header_of(META, W.replace("F32", "F31")),
    "a dtype that NumPy has not": header_of(META, W.replace('F32","shape":[1]', 'BF16","shape":[2]')),
    "beyond the end": header_of(META, W.replace("[0,4]", "[0,8]")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_run_of_ours_wrote_is_passed_over_though_its_name_is_right(tmp_path, what):
    save_checkpoint(tmp_path, checkpoint(1))
    outcome_of(tmp_path, forge(tmp_path, HOSTILE[what]).name)


def test_a_round_that_is_true_is_not_round_one(tmp_path):
    path = forge(tmp_path, forged({**ABOUT, "round": True}), 1)
    with pytest.raises(FileDamaged, match=path.name):
        load_checkpoint(tmp_path)


def test_the_forger_of_these_can_write_a_good_one(tmp_path):
    """The control: each of the above is refused for what it says, and not for how it was made."""
    assert forge(tmp_path, header_of(META, W)).is_file()
    assert load_checkpoint(tmp_path)[0].arrays["w"].tolist() == [1.0]
    forge(tmp_path, forged({**ABOUT, "round": 3}), 3)
    assert load_checkpoint(tmp_path)[0].round == 3


@pytest.mark.parametrize("version", ["2", "0", "", "1.0", "x" * 100])
def test_another_format_is_refused_and_never_taken_for_damage(tmp_path, version):
    """An older checkpoint is not what such a run would go on from, and the newer one must not be removed."""
    save_checkpoint(tmp_path, checkpoint(1))
    path = forge(tmp_path, forged(ABOUT, version=version))
    with pytest.raises(FileDamaged, match=rf"of format 1, got format '{version[:20]}' in .*{path.name}; resume with"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["000002.safetensors", "2-x.safetensors", "backup.safetensors", "٠٠٠٠٠٢-" + "0" * 32])
def test_a_checkpoint_under_another_name_is_passed_over_and_never_removed(tmp_path, name):
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    save_checkpoint(tmp_path, checkpoint(2)).rename(tmp_path / name)
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "000009-00.safetensors").mkdir()
    found, notes = load_checkpoint(tmp_path)
    assert (found.round, notes) == (1, [])  # such names come last
    for number in (3, 4, 5):
        save_checkpoint(tmp_path, checkpoint(number))
    assert (tmp_path / name).is_file()


def test_a_folder_named_like_a_checkpoint_is_passed_over(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    folder = tmp_path / f"000002-{'0' * 32}.safetensors"
    folder.mkdir()
    outcome_of(tmp_path, folder.name)


def test_where_none_is_whole_that_is_an_error_which_names_them_all(tmp_path):
    """To begin at round 0 would throw work away, and under a guarantee spend again."""
    paths = [save_checkpoint(tmp_path, checkpoint(number)) for number in (1, 2)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(FileDamaged, match=r"got only damaged ones: .*restore one from a copy") as failed:
        load_checkpoint(tmp_path)
    assert all(path.name in str(failed.value) for path in paths)


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


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path):
    path = save_checkpoint(tmp_path, replace(checkpoint(3), strategy={}))
    assert sorted(load(path.read_bytes())) == ["model.a", "model.empty", "model.odd", "model.z"]
    assert path.name == f"000003-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.safetensors"


def test_weights_come_back_bit_for_bit_in_order(tmp_path):
    write_weights(tmp_path / "w", arrays(1))
    assert bytes_of(read_weights(tmp_path / "w").items()) == bytes_of(arrays(1).items())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    weights = arrays(1)
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
