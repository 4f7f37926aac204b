"""Tasks: data split as declared, models that only the public seed decides, a loss that is a sum over records."""

import numpy as np
import pytest
import torch
from torch import nn

from tacit.federated.datasets import find_task
from tacit.federated.task import Records, accuracy, initial_model
from tacit.federated.train import refuse_mixing_layers, write_arrays


@pytest.fixture(scope="module")
def task():
    return find_task("digits")


@pytest.fixture(scope="module")
def data(task):
    return task.load()


def test_digits_are_split_into_private_public_and_test_without_overlap(task, data):
    """1,797 images, some of which are equal by chance; only what the split itself repeats would add to that."""
    from sklearn.datasets import load_digits

    expected = task.interface.preprocess(load_digits().images[:, None])
    parts = [data.private.inputs, data.public, data.test.inputs]
    assert [len(part) for part in parts] == [1347, 90, 360]
    assert np.array_equal(rows(np.concatenate(parts)), rows(expected))
    assert data.status == "public-benchmark"
    assert data.private.inputs.dtype == np.float32
    assert 0.0 <= data.private.inputs.min() <= data.private.inputs.max() <= 1.0
    assert set(data.test.labels.tolist()) == set(range(10))


def rows(images):
    flat = images.reshape(len(images), -1)
    return flat[np.lexsort(flat.T)]


def test_the_split_is_the_same_every_time(task, data):
    again = task.load()
    assert np.array_equal(again.test.inputs, data.test.inputs)
    assert np.array_equal(again.private.labels, data.private.labels)


def test_an_unknown_task_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        find_task("digit")


def test_initial_weights_depend_on_the_public_seed_alone(task):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = write_arrays(initial_model(task, {}, 7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = write_arrays(initial_model(task, {}, 7)), write_arrays(initial_model(task, {}, 8))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["0.weight"], other["0.weight"])


def test_the_built_in_model_treats_each_record_alone(task, data):
    model = initial_model(task, {}, 7)
    refuse_mixing_layers(model)
    inputs = torch.from_numpy(data.test.inputs[:5])
    model.train()
    alone = torch.cat([model(inputs[[index]]) for index in range(5)])
    assert torch.allclose(model(inputs), alone, atol=1e-5)


def test_the_loss_is_a_sum_over_records(task):
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    single = [task.loss(logits[[index]], labels[[index]]) for index in range(6)]
    assert float(task.loss(logits, labels)) == pytest.approx(float(sum(single)), rel=1e-5)


def test_accuracy_counts_right_answers_whatever_the_chunk():
    class Echo(nn.Module):
        def forward(self, inputs):
            return inputs.reshape(len(inputs), -1)

    inputs = np.eye(4, dtype=np.float32)[np.array([0, 1, 2, 3, 0])]
    records = Records(inputs, np.array([0, 1, 2, 0, 1]))
    assert [accuracy(Echo(), records, chunk=chunk) for chunk in (1, 2, 100)] == [0.6] * 3


def test_a_task_of_the_users_own_is_found_by_module_and_name(monkeypatch, tmp_path):
    (tmp_path / "practice.py").write_text(
        "from dataclasses import replace\n"
        "from tacit.federated.datasets import find_task\n"
        "def scans():\n    return replace(find_task('digits'), name='scans')\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_task("practice:scans").name == "scans"
    with pytest.raises(ValueError, match="expected 'practice:number' to be a"):
        find_task("practice:number")


@pytest.mark.parametrize("name", ["no.such.module:task", "json:task", ":task"])
def test_a_task_that_cannot_be_imported_is_one_clear_line(name):
    with pytest.raises(ValueError, match="to be importable"):
        find_task(name)
