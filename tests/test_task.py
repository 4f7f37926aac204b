"""Tasks: data split as declared, models that only the public seed decides, a loss that is a sum over records."""

import numpy as np
import pytest
import torch
from torch import nn

from tacit.devices.interface import Interface
from tacit.federated.datasets import find_task
from tacit.federated.mixing import refuse_mixing_layers, refuse_mixing_loss
from tacit.federated.task import Data, DataProblem, Records, Task, accuracy, area_under_roc, initial_model, r_squared
from tacit.federated.train import write_arrays


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


def make_task(kind, **changes):
    interfaces = {
        "classification": Interface(shape=(4,), labels=("a", "b", "c")),
        "regression": Interface(shape=(4,), labels=("x", "y"), output="values"),
        "anomaly": Interface(shape=(2, 2), labels=("normal", "anomalous"), output="reconstruction"),
    }
    fields = {"name": kind, "title": kind, "interface": interfaces[kind], "kind": kind}
    data = Data(private=None, public=None, test=None, status="public-benchmark")
    return Task(**fields | {"load": lambda: data, "build": lambda _: nn.Identity()} | changes)


KINDS = ("classification", "regression", "anomaly")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_kind_is_a_sum_over_records_of_its_textbook_formula(kind):
    task = make_task(kind)
    targets = task.trial_targets(5)
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    outputs = (
        outputs if kind == "classification" else torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    )
    naive = 0.0
    for output, target in zip(outputs.double(), targets, strict=True):
        if kind == "classification":
            naive += float(torch.log(torch.exp(output).sum()) - output[target])
        else:
            squares = [(float(a) - float(b)) ** 2 for a, b in zip(output.flatten(), target.flatten(), strict=True)]
            naive += sum(squares) / (4 if kind == "anomaly" else 1)
    assert float(task.loss(outputs, targets)) == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize(("kind", "shape"), [("classification", (3,)), ("regression", (2,)), ("anomaly", (2, 2))])
def test_the_loss_of_a_kind_passes_the_test_for_mixing(kind, shape):
    task = make_task(kind)
    refuse_mixing_loss(task.loss, task.trial_targets(4), shape=shape)


def test_outputs_that_would_be_broadcast_against_targets_are_refused():
    task = make_task("regression")
    with pytest.raises(ValueError, match=r"expected outputs of shape \(3, 2\), got \(3, 1\)"):
        task.loss(torch.zeros(3, 1), task.trial_targets(3))


@pytest.mark.parametrize(
    ("kind", "outputs", "metric"), [("classification", 3, "accuracy"), ("regression", 2, "R2"), ("anomaly", 4, "AUROC")]
)
def test_a_kind_says_how_wide_its_output_is_and_what_it_is_judged_by(kind, outputs, metric):
    task = make_task(kind)
    assert (task.outputs, task.metric) == (outputs, metric)
    shapes = {"classification": (7,), "regression": (7, 2), "anomaly": (7, 2, 2)}
    assert task.trial_targets(7).shape == shapes[kind]
    assert torch.equal(task.trial_targets(7), task.trial_targets(7))
    assert len(torch.unique(task.trial_targets(7))) > 1


def test_only_an_anomaly_task_has_its_inputs_as_targets():
    records = Records(np.zeros((2, 2, 2), np.float32), np.array([0, 1]))
    assert make_task("anomaly").targets(records) is records.inputs
    assert make_task("classification").targets(records) is records.labels


def test_r_squared_is_scikit_learns():
    from sklearn.metrics import r2_score

    generator = np.random.default_rng(0)
    labels = generator.normal(size=(50, 3)).astype(np.float32)
    labels[:, 2] = 1.0  # the same for all: met by the first, missed by the second
    for noise in (0.1, 3.0):
        outputs = labels + noise * generator.normal(size=labels.shape).astype(np.float32) * [1, 1, noise > 1]
        assert r_squared(outputs, labels) == pytest.approx(r2_score(labels, outputs))


def test_area_under_roc_is_scikit_learns_also_with_ties():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    for decimals in (0, 1, 8):
        labels = generator.integers(0, 2, 200)
        scores = np.round(generator.normal(size=200) + labels, decimals)
        assert area_under_roc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_area_under_roc_of_one_class_is_a_problem_of_the_data():
    with pytest.raises(DataProblem, match="got 3 and 0"):
        area_under_roc(np.zeros(3), np.zeros(3, np.int64))


def test_a_score_is_higher_for_the_better_model_in_every_kind():
    values = np.float32([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]])

    class Answer(nn.Module):
        def forward(self, inputs):
            return torch.from_numpy(values)

    task = make_task("regression")
    assert task.score(Answer(), Records(np.zeros((3, 4), np.float32), values)) == 1.0
    assert task.score(Answer(), Records(np.zeros((3, 4), np.float32), values[::-1].copy())) < 0

    class Clamp(nn.Module):
        def forward(self, inputs):
            return inputs.clamp(-1, 1)

    odd = np.float32([[[0, 1], [1, 0]], [[0, 5], [1, 0]]])
    assert make_task("anomaly").score(Clamp(), Records(odd, np.array([0, 1]))) == 1.0
    assert make_task("anomaly").score(Clamp(), Records(odd, np.array([1, 0]))) == 0.0
    logits = Records(np.eye(4, dtype=np.float32)[:3], np.array([0, 1, 1]))
    assert make_task("classification").score(nn.Identity(), logits) == accuracy(nn.Identity(), logits)
    with pytest.raises(DataProblem, match="got none"):
        make_task("classification").score(nn.Identity(), logits.take(np.array([], np.int64)))


def test_a_task_takes_a_loss_and_a_metric_of_ones_own():
    def worst(outputs, targets):
        return -float(np.abs(outputs - targets).max())

    task = make_task("regression", loss_fn=lambda o, t: (o - t).abs().sum(), score_fn=worst, score_name="-max error")
    assert float(task.loss(torch.ones(2, 2), torch.zeros(2, 2))) == 4.0
    values = np.float32([[1, 2, 3, 4]])
    assert task.score(nn.Identity(), Records(values, values - 2)) == -2.0
    assert task.metric == "-max error"


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "regression",
            {"interface": Interface(shape=(4,), labels=("a",))},
            "output='values' for kind='regression', got output='logits'",
        ),
        ("anomaly", {"score_name": "AP"}, "score_fn and score_name together"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(kind, change, said):
    with pytest.raises(ValueError, match=said):
        make_task(kind, **change)


def test_a_kind_that_there_is_not_is_refused():
    fields = vars(make_task("regression")) | {"kind": "ranking"}
    with pytest.raises(ValueError, match="kind among classification, regression, anomaly, got kind='ranking'"):
        Task(**fields)
