"""Handwriting of any number of writers, drawn from strokes: the task for guarantees that need thousands of clients.

A character is a skeleton of strokes. A writer has a hand (slant, size, pen, habits) and each record is a fresh attempt,
independent of all others given its writer. Nothing is stored: a writer costs nothing until its records are asked for,
and is the same whatever else was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from tacit.devices.interface import Interface
from tacit.federated.noise import public_generator
from tacit.federated.task import Records

__all__ = ["CLASSES", "INTERFACE", "PIXELS", "public_inputs", "test_records", "writer_records", "writer_size"]

PIXELS = 16
Floats = npt.NDArray[np.float32]
Split = Literal["owners", "test", "public"]

# Habits of each character, from common to rare. "xy" is a point of a 10x10 grid, y downwards; points in a row are one
# smooth curve; "|" is a corner, at which the curve goes on from the last point; "/" lifts the pen. The same point twice
# is one point, so loops stay closed and joints stay joined when a record moves it.
_HABITS = {
    "0": ("50 22 15 28 59 78 85 72 50", "50 22 15 28 59 78 85 72 50/81 18", "61 40 22 15 28 59 78 85 72"),
    "1": ("50|59", "23|50|59", "23|50|59/29|79"),
    "2": ("12 30 60 82 64 37 19|89", "12 40 72 54 28 19|17 47 69 88", "10|70 83 65 19|89"),
    "3": ("11 40 71 63 44|74 87 59 18", "10|80|44|74 87 59 18", "11 50 72 44 55 77 59 18"),
    "4": ("60|15|85/60|69", "20|15|85/62|69", "70|26|86/63|69"),
    "5": ("80|20|14|43 74 77 49 18", "20|14|53 85 77 49 18/20|80", "80|30 14 54 76 69 28"),
    "6": ("70 33 16 28 59 87 65 35 16", "50 13 17 49 77 65 36 17", "80 41 15 28 69 76 45 16"),
    "7": ("10|80|49", "10|80|49/25|75", "12|10|80 64 39"),
    "8": ("72 50 21 33 65 87 59 27 35 63 72", "50 22 44 72 50/44 17 59 87 44", "81 40 12 54 87 59 17 54 81"),
    "9": ("82 50 22 25 55 82|79", "82 50 22 25 55 82 86 69 29", "71 31 13 45 72|48 39"),
    "a": ("74 43 16 29 58 74|78 99", "24 43 73 79/75 45 27 39 78", "75 53 25 28 59 75|79"),
    "b": ("20|29/25 54 76 59 28", "20 18 49 77 54 26", "30|19 69 77 54 26"),
    "d": ("70|79/75 44 17 39 78", "70|78 99/75 54 27 39 78", "80|69 29 16 44 75"),
    "e": ("16|76 73 43 16 28 59 88", "27|85 63 33 16 39 69 88", "73 43 35 56|36 17 39 79"),
    "h": ("20|29/26 54 75 79", "30|19|25 54 65 69 88", "20|29/25|75|79"),
    "r": ("23|29/26 44 73", "24|29|26 43 63 74", "13|33|29/26 54 84"),
}
CLASSES = tuple(_HABITS)
INTERFACE = Interface(shape=(1, PIXELS, PIXELS), scale=1 / 255, mean=(0.0,), std=(1.0,), labels=CLASSES)

_FEWEST, _MEDIAN, _MOST = 20, 36, 60  # records a writer
_HABIT_SHARES = (0.6, 0.85)  # of writers with the first habit of a character, and with the first or second
_LABEL_ALPHA = 1.0  # Dirichlet concentration of a writer's labels
_STEPS = 2  # segments between two points of a curve
_TURN = 0.2  # rotation of a record, at most, in radians
_SHIFT = 1.3  # of a record, at most, in pixels
_BROKEN = 0.15  # share of records in which the pen skips
_GAP = 2.5  # what it skips, at most, in pixels
_RECORDS_PER_UNSEEN_WRITER = 10  # test and public records come from many hands, a few of each


def writer_size(writer: int, *, seed: int = 0) -> int:
    """How many records a writer has, from 20 to 60; nothing is drawn for it.

    Raises:
        ValueError: a negative writer.

    >>> writer_size(99_999)
    37
    """
    _check(writer=writer)
    drawn = _MEDIAN * np.exp(0.3 * _stream(seed, "owners", writer, "size").standard_normal())
    return int(np.clip(round(drawn), _FEWEST, _MOST))


def writer_records(writer: int, *, seed: int = 0) -> Records:
    """The records of one writer, drawn when asked for.

    *Guarantees*: depend on the writer and the seed alone; no two writers share a stream; labels are skewed by writer
    (Dirichlet, concentration 1) and even over all writers.

    Args:
        writer: from 0, as high as one likes.
        seed: public; another seed is another population.

    Returns:
        inputs (records, 1, 16, 16) in [0, 1], ink on empty paper; labels (records,), positions in `CLASSES`.

    Raises:
        ValueError: a negative writer.

    >>> records = writer_records(99_999)
    >>> records.inputs.shape, records.inputs.dtype.name, len(records) == writer_size(99_999)
    ((37, 1, 16, 16), 'float32', True)
    """
    return _attempts("owners", writer, writer_size(writer, seed=seed), seed)


def test_records(count: int = 2000, *, seed: int = 0) -> Records:  # noqa: PT028  # a test split, not a test
    """Records by writers who are no client, ten of each, the first the same for every count.

    Import the module rather than this name into a test: pytest takes it for one.

    Raises:
        ValueError: a count below 1.

    >>> len(test_records(25))
    25
    """
    return _unseen("test", count, seed)


def public_inputs(count: int = 1000, *, seed: int = 0) -> Floats:
    """Unlabelled inputs by writers who are neither clients nor in the test split, (count, 1, 16, 16).

    Raises:
        ValueError: a count below 1.

    >>> public_inputs(25).shape
    (25, 1, 16, 16)
    """
    return _unseen("public", count, seed).inputs


def _check(*, writer: int = 0, count: int = 1) -> None:
    if writer < 0:
        raise ValueError(f"expected a writer of 0 or more, got writer={writer}; count clients from 0")
    if count < 1:
        raise ValueError(f"expected a count of 1 or more, got count={count}; ask for a record")


def _stream(seed: int, split: Split, writer: int, purpose: str) -> np.random.Generator:
    return public_generator(seed, "writers", split, purpose, writer)


def _unseen(split: Split, count: int, seed: int) -> Records:
    _check(count=count)
    writers = range(-(-count // _RECORDS_PER_UNSEEN_WRITER))
    parts = [_attempts(split, writer, _RECORDS_PER_UNSEEN_WRITER, seed) for writer in writers]
    inputs, labels = np.concatenate([p.inputs for p in parts]), np.concatenate([p.labels for p in parts])
    return Records(inputs[:count], labels[:count])


@dataclass(frozen=True, kw_only=True)
class _Skeletons:
    """Habits as linear maps from control points to the ends of segments; all classes and habits padded to one size.

    Attributes:
        controls: (classes, habits, controls, 2), in [-0.5, 0.5].
        straight: (classes, habits, segments, 2, controls), the ends of each segment when the pen cuts corners.
        bend: the same, what a roundness of 1 adds.
        progress: (classes, habits, segments), how far along its stroke, in (0, 1].
        segments: (classes, habits), how many are not padding.
    """

    controls: Floats
    straight: Floats
    bend: Floats
    progress: Floats
    segments: npt.NDArray[np.int64]


def _skeletons() -> _Skeletons:
    parsed = [[_segments(habit) for habit in habits] for habits in _HABITS.values()]
    flat = [habit for habits in parsed for habit in habits]
    most, points = max(len(rows) for _, rows in flat), max(len(controls) for controls, _ in flat)
    leading = (len(parsed), len(parsed[0]))
    controls, progress = np.zeros((*leading, points, 2)), np.ones((*leading, most))
    maps = np.zeros((2, *leading, most, 2, points))  # straight and bend
    for label, habits in enumerate(parsed):
        for index, (spots, rows) in enumerate(habits):
            controls[label, index, : len(spots)] = np.array(spots) / 9 - 0.5
            for row, (straight, bend, along) in enumerate(rows):
                maps[0, label, index, row, :, : len(spots)] = straight
                maps[1, label, index, row, :, : len(spots)] = bend
                progress[label, index, row] = along
    return _Skeletons(
        controls=controls.astype(np.float32),
        straight=maps[0].astype(np.float32),
        bend=maps[1].astype(np.float32),
        progress=progress.astype(np.float32),
        segments=np.array([[len(rows) for _, rows in habits] for habits in parsed]),
    )


_Row = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]  # straight and bend, (2, controls); progress


def _segments(habit: str) -> tuple[list[tuple[int, int]], list[_Row]]:
    """The control points of a habit, and its segments in writing order."""
    names = list(dict.fromkeys(habit.replace("|", " ").replace("/", " ").split()))
    rows: list[_Row] = []
    for stroke in habit.split("/"):
        curves = [[names.index(name) for name in piece.split()] for piece in stroke.split("|")]
        for before, curve in pairwise(curves):
            curve.insert(0, before[-1])
        ends = [row for curve in curves if len(curve) > 1 for row in _curve(curve, len(names))]
        rows += [(straight, bend, (i + 1) / len(ends)) for i, (straight, bend) in enumerate(ends)]
    return [(int(name[0]), int(name[1])) for name in names], rows


def _curve(points: list[int], count: int) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Segments of a cardinal spline: its polyline plus roundness times its tangents, both linear in the points."""
    one = np.eye(count)
    closed = points[0] == points[-1]
    padded = [points[-2] if closed else points[0], *points, points[1] if closed else points[-1]]
    steps = np.linspace(0, 1, 2 if len(points) == 2 else _STEPS + 1)[:, None]
    segments = []
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        straight = one[p1] + steps**2 * (3 - 2 * steps) * (one[p2] - one[p1])
        leaving, arriving = one[p2] - one[p0], one[p3] - one[p1]
        bend = steps * (steps - 1) ** 2 * leaving + steps**2 * (steps - 1) * arriving
        if len(points) == 2:
            bend = np.zeros_like(bend)
        segments += [(straight[i : i + 2], bend[i : i + 2]) for i in range(len(steps) - 1)]
    return segments


_SKELETONS = _skeletons()


@dataclass(frozen=True, kw_only=True)
class _Hand:
    """What stays the same in all that a writer writes; lengths in pixels unless they say otherwise.

    Attributes:
        labels: (classes,), how often the writer has which character to write.
        habits: (classes,), which skeleton.
        forms: (classes, controls, 2), how the writer bends it, in skeleton heights.
        height: of a character; `aspect` times it is the width.
        slant: shear, positive to the right.
        baseline: below the centre.
        half_width: of the pen.
        falloff: share of the width that is gone at a stroke's end.
        roundness: 0.5 is a Catmull-Rom spline.
        tremor: of a control point, in skeleton heights.
        ink: darkest value.
    """

    labels: Floats
    habits: npt.NDArray[np.int64]
    forms: Floats
    height: float
    aspect: float
    slant: float
    baseline: float
    half_width: float
    falloff: float
    roundness: float
    tremor: float
    ink: float


def _hand(generator: np.random.Generator) -> _Hand:
    classes, _, points, _ = _SKELETONS.controls.shape
    uniform = generator.uniform
    return _Hand(
        labels=generator.dirichlet(np.full(classes, _LABEL_ALPHA)).astype(np.float32),
        habits=np.digitize(generator.random((classes,)), _HABIT_SHARES),
        forms=uniform(-0.075, 0.075, (classes, points, 2)).astype(np.float32),
        height=uniform(8.0, 12.0),
        aspect=uniform(0.6, 1.0),
        slant=uniform(-0.3, 0.55),
        baseline=uniform(-0.7, 0.7),
        half_width=uniform(0.5, 1.15),
        falloff=uniform(0.0, 0.6),
        roundness=uniform(0.2, 0.6),
        tremor=uniform(0.04, 0.12),
        ink=uniform(0.6, 1.0),
    )


def _attempts(split: Split, writer: int, count: int, seed: int) -> Records:
    """The first records of a writer; a row of draws each, so that none depends on how many there are."""
    hand = _hand(_stream(seed, split, writer, "hand"))
    points = _SKELETONS.controls.shape[2]
    draws = _stream(seed, split, writer, "records").random((count, 8 + 2 * points + PIXELS**2), dtype=np.float32)
    own, jitter, paper = np.split(draws, [8, 8 + 2 * points], axis=1)
    labels = np.searchsorted(np.cumsum(hand.labels)[:-1], own[:, 0], side="right")
    segments = _SKELETONS.segments[labels, hand.habits[labels]]
    ends = _placed(hand, labels, own, jitter.reshape(count, points, 2))
    _lift(ends, segments, own)
    half_widths = hand.half_width * (0.85 + 0.3 * own[:, 5:6])
    half_widths = half_widths * (1 - hand.falloff * _SKELETONS.progress[labels, hand.habits[labels]])
    ink = hand.ink * _inked(ends, half_widths.astype(np.float32), segments)
    noisy = ink + 0.25 * (paper.reshape(ink.shape) - 0.5)
    # Whole grey levels, as from a scanner: the last bit of a platform's sine seldom reaches the data.
    grey = np.round(255 * np.clip(noisy, 0, 1))
    return Records(INTERFACE.preprocess(grey[:, None]), labels.astype(np.int64))


def _placed(hand: _Hand, labels: npt.NDArray[np.int64], own: Floats, jitter: Floats) -> Floats:
    """Ends of segments in pixels, (records, segments, 2, 2)."""
    habits, forms = hand.habits[labels], hand.forms[labels]
    controls = _SKELETONS.controls[labels, habits] + forms + 2 * hand.tremor * (jitter - 0.5)
    maps = _SKELETONS.straight[labels, habits] + np.float32(hand.roundness) * _SKELETONS.bend[labels, habits]
    records, segments = maps.shape[:2]
    drawn = maps.reshape(records, 2 * segments, -1) @ controls  # (records, 2 * segments, 2), x and y
    height = hand.height * (0.9 + 0.2 * own[:, 1:2])
    angle = _TURN * (2 * own[:, 2:3] - 1)
    x = height * hand.aspect * drawn[..., 0] - height * hand.slant * drawn[..., 1]
    y = height * drawn[..., 1]
    turned = [np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y]
    centre = (PIXELS - 1) / 2
    turned[0] += centre + _SHIFT * (2 * own[:, 3:4] - 1)
    turned[1] += centre + hand.baseline + _SHIFT * (2 * own[:, 4:5] - 1)
    return np.stack(turned, axis=-1).astype(np.float32).reshape(records, segments, 2, 2)


def _lift(ends: Floats, segments: npt.NDArray[np.int64], own: Floats) -> None:
    """Takes the pen off the paper before the end of one segment, in some of the records."""
    rows = np.flatnonzero(own[:, 7] < _BROKEN)
    which = (own[rows, 6] * segments[rows]).astype(np.int64)
    step = ends[rows, which, 1] - ends[rows, which, 0]  # (rows, 2)
    length = np.maximum(np.hypot(step[:, :1], step[:, 1:]), 1e-3)
    ends[rows, which, 1] = ends[rows, which, 0] + step * np.maximum(1 - _GAP / length, 0)


def _inked(ends: Floats, half_widths: Floats, segments: npt.NDArray[np.int64]) -> Floats:
    """Share of each pixel under ink, (records, height, width), by its distance to the nearest segment.

    The distance is in pen widths, so that a thick segment wins over a thin one as far away.
    """
    order = np.argsort(-segments, kind="stable")  # long ones first: padding is never drawn
    ends, half_widths = ends[order], half_widths[order]
    grid = np.arange(PIXELS, dtype=np.float32)
    start, step = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]  # (records, segments, 2)
    inverse = 1 / np.maximum((step**2).sum(-1), 1e-6)
    nearest = np.full((len(ends), PIXELS, PIXELS), np.inf, dtype=np.float32)  # squared, in pen widths
    for s in range(ends.shape[1]):
        rows = int((segments > s).sum())
        away = grid - start[:rows, s, :, None]  # (rows, 2, PIXELS), x and y
        along = away * (step[:rows, s] * inverse[:rows, s, None])[..., None]
        share = along[:, 1, :, None] + along[:, 0, None, :]  # (rows, y, x)
        foot = np.minimum(np.maximum(share, 0), 1)  # np.clip takes longer on small arrays
        # |away - foot * step|^2, expanded so that only three products are of the image's size
        squares = away**2
        length = (1 / inverse[:rows, s])[:, None, None]
        squared = foot * (foot - 2 * share) * length
        squared += squares[:, 1, :, None]
        squared += squares[:, 0, None, :]
        squared *= (1 / half_widths[:rows, s] ** 2)[:, None, None]
        np.minimum(nearest[:rows], squared, out=nearest[:rows])
    pen = half_widths.max(axis=1)[:, None, None]
    covered = np.clip(0.5 + pen * (1 - np.sqrt(np.maximum(nearest, 0))), 0, 1)
    unsorted: Floats = covered[np.argsort(order)]
    return unsorted
