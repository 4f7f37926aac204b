"""Augmentation: one view of each record, from itself and its own draws, all from the randomness that is given."""

import numpy as np
import pytest
import torch

from tacit.federated.augment import Augmentation, augment, check_augmentations
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.noise import SecretGenerator, SeededGenerator

pytest.importorskip("kornia")

EVERY = [
    Augmentation(name="flip"),
    Augmentation(name="crop", parameters={"padding": 2}),
    Augmentation(name="rotate", parameters={"degrees": 30}),
    Augmentation(name="noise", parameters={"deviation": 0.2}),
]


def images(count=40, shape=(2, 7, 9)):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def one(name, **parameters):
    return [Augmentation(name=name, parameters=parameters)]


every_augmentation = pytest.mark.parametrize(
    "chosen", [*([each] for each in EVERY), EVERY], ids=lambda c: "+".join(a.name for a in c)
)


@every_augmentation
def test_an_augmentation_gives_the_same_bytes_for_the_same_seed_and_others_for_another(chosen):
    first, same, other = (augment(images(), chosen, SeededGenerator(seed)) for seed in (1, 1, 2))
    assert first.tobytes() == same.tobytes()
    assert first.tobytes() != other.tobytes()


@every_augmentation
def test_an_augmentation_draws_nothing_from_a_global_generator(chosen):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = augment(images(), chosen, SeededGenerator(3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    torch.manual_seed(2)
    assert first.tobytes() == augment(images(), chosen, SeededGenerator(3)).tobytes()


@every_augmentation
def test_an_augmentation_changes_a_record_by_itself_alone(chosen):
    inputs = images()
    changed = inputs.copy()
    changed[17] = 1e4
    first, second = (augment(batch, chosen, SeededGenerator(5)) for batch in (inputs, changed))
    others = np.arange(len(inputs)) != 17
    assert first[others].tobytes() == second[others].tobytes()
    assert first[17].tobytes() != second[17].tobytes()


@every_augmentation
def test_an_augmentation_lets_no_record_that_is_not_finite_reach_another(chosen):
    inputs = images()
    inputs[3] = np.nan
    assert np.isfinite(np.delete(augment(inputs, chosen, SeededGenerator(5)), 3, axis=0)).all()


@every_augmentation
def test_an_augmentation_keeps_shape_type_and_argument(chosen):
    inputs = images()
    kept = inputs.copy()
    found = augment(inputs, chosen, SecretGenerator())
    assert (found.shape, found.dtype) == (inputs.shape, np.float32)
    assert found.flags.c_contiguous
    assert np.array_equal(inputs, kept)
    assert augment(inputs[:0], chosen, SeededGenerator(1)).shape == (0, 2, 7, 9)


def test_flip_mirrors_some_records_and_leaves_the_others():
    inputs = images(200)
    found = augment(inputs, one("flip", probability=0.25), SeededGenerator(1))
    mirrored = np.array([np.array_equal(a, b[:, :, ::-1]) for a, b in zip(found, inputs, strict=True)])
    same = np.array([np.array_equal(a, b) for a, b in zip(found, inputs, strict=True)])
    assert (mirrored ^ same).all()
    assert 30 <= mirrored.sum() <= 72


def test_crop_is_the_old_size_out_of_a_padded_record_each_shift_as_likely():
    """Against a naive crop: every result is one of the 25, and all of them occur."""
    inputs = images(1000, (1, 5, 6))
    found = augment(inputs, one("crop", padding=2), SeededGenerator(1))
    padded = np.pad(inputs, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    windows = [(y, x) for y in range(5) for x in range(5)]
    same = np.stack([(padded[:, :, y : y + 5, x : x + 6] == found).all(axis=(1, 2, 3)) for y, x in windows])
    assert (same.sum(axis=0) == 1).all()
    counts = same.sum(axis=1)  # 1000 over 25 windows: 40 each, a deviation of 6.2
    assert counts.min() >= 8
    assert counts.max() <= 80


def test_rotate_by_nothing_is_nothing_and_by_a_half_turn_is_a_half_turn():
    inputs = images(8, (1, 6, 6))
    np.testing.assert_allclose(augment(inputs, one("rotate", degrees=0), SeededGenerator(1)), inputs, atol=1e-5)

    class Certain(SeededGenerator):
        def gaussian(self, count, standard_deviation):
            return np.full(count, 40.0)  # the end of the range

    half = augment(inputs, one("rotate", degrees=180), Certain(1))
    np.testing.assert_allclose(half, inputs[:, :, ::-1, ::-1], atol=1e-4)


def test_rotate_draws_angles_evenly_on_both_sides():
    """A line from the centre to the right: where its end is afterwards tells the angle."""
    inputs = np.zeros((400, 1, 41, 41), np.float32)
    inputs[:, 0, 20, 20:] = 1
    found = augment(inputs, one("rotate", degrees=45), SeededGenerator(1))[:, 0]
    rows, columns = np.mgrid[:41, :41] - 20
    angles = np.degrees(np.arctan2((found * rows).sum((1, 2)), (found * columns).sum((1, 2))))
    assert np.abs(angles).max() <= 46
    assert np.histogram(angles, bins=4, range=(-46, 46))[0].min() >= 50  # 100 expected, a deviation of 8.7


def test_noise_is_gaussian_of_the_deviation_that_is_asked_for():
    inputs = np.zeros((200, 50), np.float32)
    found = augment(inputs, one("noise", deviation=3.0), SeededGenerator(1))
    assert abs(found.std() - 3) < 0.13  # six deviations of its own
    assert abs(found.mean()) < 0.18


@pytest.mark.parametrize("name", ["mixup", "cutmix", "MixUp", "mosaic"])
def test_what_mixes_records_is_refused_by_name(name):
    with pytest.raises(PrivacyRefused, match="mixes records"):
        Augmentation(name=name)


@pytest.mark.parametrize("key", ["views", "repeats"])
def test_several_views_of_a_record_are_refused(key):
    with pytest.raises(PrivacyRefused, match="one view of each record"):
        Augmentation(name="flip", parameters={key: 2})


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("blur", {}, "among crop, flip, noise, rotate, got 'blur'"),
        ("flip", {"degrees": 3}, "expected the parameter 'probability' for 'flip', got 'degrees'"),
        ("flip", {"probability": 1.5}, "probability from 0 to 1"),
        ("noise", {"deviation": -1}, "deviation from 0"),
        ("noise", {"deviation": float("nan")}, "deviation from 0"),
        ("noise", {"deviation": "1"}, "deviation from 0"),
        ("crop", {"padding": 1.5}, "whole pixels"),
    ],
)
def test_a_wrong_augmentation_is_one_line(name, parameters, said):
    with pytest.raises(ValueError, match=said):
        Augmentation(name=name, parameters=parameters)


def test_what_is_no_image_takes_noise_alone():
    check_augmentations(one("noise"), (9, 128))
    with pytest.raises(ValueError, match="for 'flip', got shape="):
        augment(np.zeros((2, 9, 128), np.float32), one("flip"), SeededGenerator(1))
