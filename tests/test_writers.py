"""Writers are lazy, reproducible, unlike each other, and hard enough to tell a small network from a linear model."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tacit.federated import writers
from tacit.federated.models_image import cnn
from tacit.federated.task import Records, accuracy


def gathered(indices, seed=0):
    parts = [writers.writer_records(index, seed=seed) for index in indices]
    inputs, labels = np.concatenate([p.inputs for p in parts]), np.concatenate([p.labels for p in parts])
    return Records(inputs, labels), np.repeat(indices, [len(p) for p in parts])


@pytest.fixture(scope="module")
def population():
    return gathered(range(200))


@settings(max_examples=25, deadline=None)
@given(writer=st.integers(0, 10**9), seed=st.integers(0, 2**63 - 1))
def test_a_writer_is_a_function_of_its_index_and_the_seed(writer, seed):
    first = writers.writer_records(writer, seed=seed)
    writers.writer_records(writer + 1, seed=seed)
    again = writers.writer_records(writer, seed=seed)
    assert np.array_equal(first.inputs, again.inputs)
    assert np.array_equal(first.labels, again.labels)
    assert len(first) == writers.writer_size(writer, seed=seed)
    assert first.inputs.shape == (len(first), *writers.INTERFACE.shape)
    assert (first.inputs.dtype, first.labels.dtype) == (np.float32, np.int64)
    assert first.inputs.min() >= 0
    assert first.inputs.max() <= 1
    assert set(first.labels) <= set(range(len(writers.CLASSES)))


def test_a_record_does_not_depend_on_how_many_are_drawn_with_it():
    whole = writers._attempts("owners", 5, 60, 0)
    for count in (1, 7, 59):
        some = writers._attempts("owners", 5, count, 0)
        assert np.array_equal(some.inputs, whole.inputs[:count])
        assert np.array_equal(some.labels, whole.labels[:count])
    assert np.array_equal(writers.test_records(13).inputs, writers.test_records(200).inputs[:13])


def test_a_writer_is_golden():
    """A change of these numbers changes the data of every recipe; only the mean may differ by a platform's rounding."""
    records = writers.writer_records(99_999)
    assert [writers.writer_size(writer) for writer in (0, 1, 99_999)] == [27, 38, 37]
    assert records.labels[:12].tolist() == [6, 12, 10, 11, 12, 7, 2, 13, 13, 12, 14, 11]
    assert float(records.inputs.mean()) == pytest.approx(0.10813874, abs=1e-4)


def test_client_99_999_of_100_000_is_drawn_without_the_others():
    writers.writer_records(0)  # what the first call alone needs is not counted
    tracemalloc.start()
    try:
        writers.writer_records(99_999)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2_000_000  # one client's arrays; 100,000 clients would be 4 GB


def test_no_image_is_drawn_twice_by_anybody(population):
    records, _ = population
    everything = [records.inputs, writers.test_records(500).inputs, writers.public_inputs(500)]
    everything.append(gathered(range(20), seed=1)[0].inputs)
    images = [image.tobytes() for split in everything for image in split]
    assert len(set(images)) == len(images) > 5000


def test_records_are_independent_given_their_writer_and_not_without(population):
    """How high a record sits tells of the next one only by the writer's habit."""
    records, writer = population
    *_, height = _moments(records.inputs[:, 0])
    counts = np.bincount(writer)
    means = np.bincount(writer, weights=height) / counts
    neighbours = np.flatnonzero(writer[1:] == writer[:-1])
    # Taking off a mean of n leaves a correlation of -1/(n-1) between its terms.
    expected, error = -1 / (counts.mean() - 1), 1 / np.sqrt(len(neighbours))

    def correlation(values):
        return float(np.corrcoef(values[neighbours], values[neighbours + 1])[0, 1])

    assert abs(correlation(height - means[writer]) - expected) < 4 * error
    assert correlation(height) - expected > 8 * error


def test_sizes_vary_within_their_bounds():
    sizes = np.array([writers.writer_size(writer) for writer in range(3000)])
    assert sizes.min() == 20
    assert sizes.max() == 60
    assert 34 <= np.median(sizes) <= 38
    assert len(set(sizes.tolist())) == 41


def test_labels_are_even_over_all_writers_and_skewed_in_each(population):
    records, writer = population
    shares = np.bincount(records.labels, minlength=16) / len(records)
    assert shares.min() > 0.75 / 16
    assert shares.max() < 1.25 / 16
    largest = [np.bincount(records.labels[writer == w]).max() / (writer == w).sum() for w in range(200)]
    assert 0.15 < np.median(largest) < 0.35  # 1/16 is even


def test_a_character_looks_like_its_writer(population):
    """Nearest centroid tells twenty writers apart in their own records, after training on the other half of them."""
    records, writer = population
    records, writer = records.take(np.flatnonzero(writer < 20)), writer[writer < 20]
    features = (
        np.log1p(records.inputs.reshape(len(records), -1)).sum(1),
        records.inputs.reshape(len(records), -1).max(1),
    )
    described = stats.zscore(np.stack([*features, *_moments(records.inputs[:, 0])], axis=1))
    half = np.arange(len(records)) % 2 == 0

    def told_apart(names):
        centroids = np.stack([described[half & (names == name)].mean(0) for name in range(20)])
        nearest = ((described[~half, None] - centroids) ** 2).sum(-1).argmin(1)
        return (nearest == names[~half]).mean()

    assert told_apart(writer) > 0.3  # chance is 0.05
    assert told_apart(np.random.default_rng(0).permutation(writer)) < 0.1


def _moments(images):
    """Spread, slant and place of the ink."""
    grid = np.arange(images.shape[-1]) - 7.5
    dark = np.where(images > 0.3, images, 0)
    mass = dark.sum((1, 2)) + 1e-6
    x, y = (dark * grid).sum((1, 2)) / mass, (dark * grid[:, None]).sum((1, 2)) / mass
    xx, yy = (dark * grid**2).sum((1, 2)) / mass - x**2, (dark * grid[:, None] ** 2).sum((1, 2)) / mass - y**2
    xy = (dark * grid * grid[:, None]).sum((1, 2)) / mass - x * y
    return xx, yy, xy / (yy + 1e-6), y


def test_ink_is_the_share_of_a_pixel_by_its_distance_to_the_polyline():
    """Against a plain loop over pixels and segments."""
    generator = np.random.default_rng(3)
    ends = generator.uniform(0, 15, (6, 4, 2, 2)).astype(np.float32)
    half_widths = generator.uniform(0.5, 2.0, (6, 4)).astype(np.float32)
    segments = np.array([4, 1, 3, 2, 4, 1])
    fast = writers._inked(ends, half_widths, segments)
    for record in range(6):
        for y, x in generator.integers(0, 16, (40, 2)):
            distances = []
            for (a, b), width in list(zip(ends[record], half_widths[record], strict=True))[: segments[record]]:
                foot = np.clip(np.dot([x, y] - a, b - a) / np.dot(b - a, b - a), 0, 1)
                distances.append(np.linalg.norm([x, y] - a - foot * (b - a)) / width)
            expected = np.clip(0.5 + half_widths[record].max() * (1 - min(distances)), 0, 1)
            assert fast[record, y, x] == pytest.approx(expected, abs=2e-3)


def test_the_splines_pass_through_their_control_points_and_loops_close():
    spots, rows = writers._segments("50 22 15 28 59 78 85 72 50/71|28")
    controls = np.array(spots, dtype=float)
    drawn = np.array([(straight + 0.5 * bend) @ controls for straight, bend, _ in rows])  # (segments, 2, 2)
    assert len(spots) == 9  # the loop ends where it begins, and the stroke on the loop
    assert np.allclose(drawn[:15, 1], drawn[1:16, 0])
    assert np.allclose(drawn[0, 0], drawn[15, 1])
    assert np.allclose(drawn[[0, 2, 4], 0], [[5, 0], [2, 2], [1, 5]])
    assert np.allclose(drawn[-1], [[7, 1], [2, 8]])
    assert [row[2] for row in rows][-1] == 1.0


@pytest.mark.parametrize("call", [lambda: writers.writer_records(-1), lambda: writers.writer_size(-1)])
def test_a_writer_before_the_first_is_refused(call):
    with pytest.raises(ValueError, match="expected a writer of 0 or more, got writer=-1"):
        call()


@pytest.mark.parametrize("draw", [writers.test_records, writers.public_inputs])
def test_an_empty_split_is_refused_and_a_count_is_kept(draw):
    with pytest.raises(ValueError, match="expected a count of 1 or more, got count=0"):
        draw(0)
    assert len(draw(21)) == 21


def fitted_accuracy(model, records, *, epochs, test):
    """Central training, without privacy."""
    inputs, labels = torch.from_numpy(records.inputs), torch.from_numpy(records.labels)
    steps = epochs * (len(labels) // 128)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    order = torch.cat([torch.randperm(len(labels))[: steps // epochs * 128] for _ in range(epochs)])
    for batch in order.split(128):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, test)


@pytest.fixture
def one_thread():
    """Layers this small lose more to waiting for each other's threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_small_network_reads_unseen_writers_and_a_linear_model_does_not():
    records, _ = gathered(range(300))
    test = writers.test_records(1500)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 16))
        network = cnn(shape=(1, 16, 16), classes=16, channels=(16, 32))
        assert 0.5 < fitted_accuracy(linear, records, epochs=10, test=test) <= 0.85
        assert fitted_accuracy(network, records, epochs=3, test=test) >= 0.92
