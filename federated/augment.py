"""Random changes to the inputs of a batch, each record's from itself and its own draws.

Whether and how a record is changed is drawn anew in each step. Inside a step of differential privacy these draws belong
to the secret class like the noise does: who knows them knows more about a gradient than the analysis assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.noise import Randomness
from tacit.federated.readers import extra_of_data

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AUGMENTATIONS", "Augmentation", "augment", "check_augmentations"]

Floats = npt.NDArray[np.float32]

# What each is told and what it takes when it is not: name, default, least, most.
AUGMENTATIONS: Mapping[str, tuple[str, float, float, float]] = {
    "flip": ("probability", 0.5, 0.0, 1.0),
    "crop": ("padding", 2.0, 0.0, 1024.0),
    "rotate": ("degrees", 15.0, 0.0, 180.0),
    "noise": ("deviation", 0.1, 0.0, 1e6),
}
_MIXING = {"mixup", "cutmix", "manifold-mixup", "mosaic", "smote"}
_VIEWS = {"views", "repeats", "copies"}


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One random change.

    Attributes:
        name: "flip" mirrors left and right, with a `probability`; "crop" pads by `padding` pixels and cuts the old size
            out again, which shifts; "rotate" turns by up to `degrees` either way; "noise" adds a Gaussian of standard
            `deviation` to preprocessed inputs. What moves in from outside repeats the edge.
        parameters: by name; what is left out has a default.

    Raises:
        PrivacyRefused: it would mix records, or make several views of one.
        ValueError: no such change, parameter or range.

    >>> Augmentation(name="rotate", parameters={"degrees": 10}).strength
    10.0
    >>> Augmentation(name="mixup")
    Traceback (most recent call last):
        ...
    tacit.federated.mechanism.PrivacyRefused: expected an augmentation of each record by itself, got 'mixup', which \
mixes records: clipping one's gradient would no longer bound what one record does; use crop, flip, noise, rotate
    """

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join(sorted(AUGMENTATIONS))
        if self.name.lower() in _MIXING:
            raise PrivacyRefused(
                f"expected an augmentation of each record by itself, got {self.name!r}, which mixes records: clipping "
                f"one's gradient would no longer bound what one record does; use {known}"
            )
        if self.name not in AUGMENTATIONS:
            raise ValueError(f"expected an augmentation among {known}, got {self.name!r}; choose one")
        own, _, least, most = AUGMENTATIONS[self.name]
        for key in self.parameters:
            if key in _VIEWS:
                raise PrivacyRefused(
                    f"expected one view of each record, got {key!r} for {self.name!r}: views clipped one by one would "
                    "let a record count several times; leave it out"
                )
            if key != own:
                raise ValueError(f"expected the parameter {own!r} for {self.name!r}, got {key!r}; rename it")
        if not _is_number(self.parameters.get(own, least)) or not least <= self.strength <= most:
            raise ValueError(
                f"expected {own} from {least:g} to {most:g} for {self.name!r}, got {self.parameters[own]!r}; change it"
            )
        if self.name == "crop" and self.strength % 1:
            raise ValueError(f"expected whole pixels of padding for 'crop', got {self.strength:g}; round it")

    @property
    def strength(self) -> float:
        """The one parameter, given or by default.

        >>> Augmentation(name="flip").strength
        0.5
        """
        own, default, _, _ = AUGMENTATIONS[self.name]
        return float(self.parameters.get(own, default))


def check_augmentations(augmentations: Sequence[Augmentation], shape: tuple[int, ...]) -> None:
    """Refuses changes that records of a shape cannot take.

    Args:
        augmentations: in the order they are made.
        shape: of one record.

    Raises:
        ValueError: flip, crop or rotate of what is not (channels, height, width).

    >>> check_augmentations([Augmentation(name="noise")], (9, 128))
    """
    for one in augmentations:
        if one.name != "noise" and len(shape) != 3:
            raise ValueError(
                f"expected records of (channels, height, width) for {one.name!r}, got shape={shape}; use noise alone"
            )


def augment(inputs: Floats, augmentations: Sequence[Augmentation], randomness: Randomness) -> Floats:
    """Makes one changed view of each record.

    *Guarantees*: row i of the result depends on row i of the inputs and on draws of its own, all from `randomness`; how
    much is drawn depends on the number of records alone. So it is a random function of each record by itself, inside
    of what is clipped.

    Args:
        inputs: preprocessed, (records, *shape); not changed.
        augmentations: in the order they are made.
        randomness: secret for a guarantee.

    Returns:
        (records, *shape).

    Raises:
        ValueError: of `check_augmentations`.

    >>> from tacit.federated.noise import SeededGenerator
    >>> image = np.float32([[[[1, 2], [3, 4]]]])
    >>> augment(image, [Augmentation(name="flip", parameters={"probability": 1})], SeededGenerator(1)).tolist()
    [[[[2.0, 1.0], [4.0, 3.0]]]]
    """
    check_augmentations(augmentations, inputs.shape[1:])
    if not len(inputs) or not augmentations:
        return inputs
    changed = torch.from_numpy(np.ascontiguousarray(inputs))
    with torch.no_grad():
        for one in augmentations:
            changed = _CHANGES[one.name](changed, one.strength, randomness)
    ready: Floats = changed.contiguous().numpy()
    return ready


def _flip(images: Tensor, probability: float, randomness: Randomness) -> Tensor:
    with extra_of_data():
        from kornia.geometry.transform import hflip
    chosen = torch.from_numpy(randomness.bernoulli(len(images), probability)).reshape(-1, 1, 1, 1)
    return torch.where(chosen, hflip(images), images)


def _crop(images: Tensor, padding: float, randomness: Randomness) -> Tensor:
    with extra_of_data():
        from kornia.geometry.transform import translate
    steps = 2 * padding + 1  # -padding to padding, each as likely
    drawn = np.minimum(np.floor(_uniform(2 * len(images), randomness) * steps), steps - 1) - padding
    shifts = torch.from_numpy(drawn.reshape(-1, 2).astype(np.float32))  # x and y
    moved: Tensor = translate(images, shifts, mode="nearest", padding_mode="border")
    return moved


def _rotate(images: Tensor, degrees: float, randomness: Randomness) -> Tensor:
    with extra_of_data():
        from kornia.geometry.transform import rotate
    angles = torch.from_numpy((degrees * (2 * _uniform(len(images), randomness) - 1)).astype(np.float32))
    turned: Tensor = rotate(images, angles, padding_mode="border")
    return turned


def _noise(inputs: Tensor, deviation: float, randomness: Randomness) -> Tensor:
    drawn = randomness.gaussian(inputs.numel(), deviation).astype(np.float32)
    return inputs + torch.from_numpy(drawn).reshape(inputs.shape)


_CHANGES: Mapping[str, Callable[[Tensor, float, Randomness], Tensor]] = {
    "flip": _flip,
    "crop": _crop,
    "rotate": _rotate,
    "noise": _noise,
}


def _uniform(count: int, randomness: Randomness) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1], (count,): the distribution function of a Gaussian at its own draws."""
    drawn: npt.NDArray[np.float64] = torch.special.ndtr(torch.from_numpy(randomness.gaussian(count, 1.0))).numpy()
    return drawn


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
