"""A user's own files: by owner or together, read as they are declared, refused in one line where they are bad."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tacit.federated.datasets import find_task
from tacit.federated.files import DataDescription, describe_task
from tacit.federated.hub import fetch_splits
from tacit.federated.mechanism import PrivacyRefused
from tacit.federated.task import DataProblem, initial_model

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

ROWS = "who,x,y,kind\nben,3,4,dog\nanna,1,2,cat\nanna,5,6,dog\n"


def described(path, **changes):
    fields = {"name": "pets", "source": "csv", "label": "kind", "labels": ["cat", "dog"]} | changes
    return DataDescription(path=str(path), **fields)


def csv_file(folder, text, name="pets.csv"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problem(path, **changes):
    with pytest.raises(DataProblem) as caught:
        describe_task(described(path, **changes)).load()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("expected")
    return message


def write_images(folder, names, *, size=(6, 4), mode="RGB"):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, tuple([index + 1] * len(mode)) if len(mode) > 1 else index + 1).save(folder / name)
    return folder


def test_a_column_says_whose_records_they_are(tmp_path):
    data = find_task("pets", described(csv_file(tmp_path, ROWS), owner_column="who")).load()
    assert (data.private, data.public, data.test, data.status) == (None, None, None, "private")
    assert data.owners == ("anna", "ben")
    assert data.of_owner(0).inputs.tolist() == [[1, 2], [5, 6]]
    assert data.of_owner(0).labels.tolist() == [0, 1]
    assert data.of_owner(1).inputs.dtype == np.float32
    with pytest.raises(DataProblem, match="set federated"):
        data.of_owner(2)


def test_without_such_a_column_all_records_are_together_and_splits_come_from_files_of_their_own(tmp_path):
    path, test = csv_file(tmp_path, ROWS), csv_file(tmp_path, "kind,y,x\ncat,2,1\n", "test.csv")
    public = csv_file(tmp_path, "x,y\n7,8\n", "public.csv")
    features = {"features": ["x", "y"], "test": str(test), "public": str(public), "status": "public-benchmark"}
    data = describe_task(described(path, **features)).load()
    assert data.private.inputs.tolist() == [[3, 4], [1, 2], [5, 6]]
    assert data.test.inputs.tolist() == [[1, 2]]
    assert data.public.tolist() == [[7, 8]]
    assert (data.of_owner, data.owners, data.status) == (None, None, "public-benchmark")


def test_declared_constants_are_what_records_are_scaled_by(tmp_path):
    path = csv_file(tmp_path, "a;b;price\n1;10;500\n2;20;700\n")
    description = described(
        path, kind="regression", label="price", labels=[], delimiter=";", mean=[1.0, 10.0], std=[1.0, 5.0],
        target_mean=[500.0], target_std=[100.0],
    )  # fmt: skip
    task = describe_task(description)
    records = task.load().private
    assert records.inputs.tolist() == [[0, 0], [1, 2]]
    assert records.labels.tolist() == [[0], [2]]
    assert records.labels.dtype == np.float32
    assert task.interface.labels == ("price",)
    assert task.interface.values(records.labels).tolist() == [[500], [700]]


def test_parquet_is_read_like_text(tmp_path):
    table = pa.table({"who": [2, 1, 1], "x": [3.0, 1.0, 5.0], "y": [4, 2, 6], "kind": [1, 0, 1]})
    pq.write_table(table, tmp_path / "pets.parquet")
    data = describe_task(described(tmp_path / "pets.parquet", source="parquet", owner_column="who")).load()
    assert data.owners == ("1", "2")
    assert data.of_owner(0).inputs.tolist() == [[1, 2], [5, 6]]
    assert data.of_owner(0).labels.tolist() == [0, 1]


def test_columns_fill_a_declared_shape(tmp_path):
    path = csv_file(tmp_path, "a,b,c,d,kind\n1,2,3,4,cat\n5,6,7,8,dog\n")
    task = describe_task(described(path, shape=[2, 2], features=["a", "b", "c", "d"]))
    assert task.load().private.inputs[0].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"as many task.features as task.shape=\[2, 3\]"):
        describe_task(described(path, shape=[2, 3]))


def test_folders_are_owners_and_classes_of_images(tmp_path):
    names = ["anna/cat/1.png", "anna/dog/1.png", "ben/dog/1.png", "ben/dog/.hidden"]
    write_images(tmp_path, names[:3])
    (tmp_path / names[3]).write_text("no image")
    task = describe_task(described(tmp_path, source="images", label=None, owner_column="folder", shape=[3, 2, 3]))
    data = task.load()
    assert data.owners == ("anna", "ben")
    assert data.of_owner(0).labels.tolist() == [0, 1]
    assert data.of_owner(0).inputs.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(data.of_owner(1).inputs, 3 / 255, rtol=1e-6)


def test_an_image_is_upright_and_channels_come_first(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "dog" else 1  # 6: to be turned by a quarter, clockwise
        image.save(tmp_path / kind / "1.tiff", exif=exif)
    cat = describe_task(described(tmp_path, source="images", shape=[3, 1, 2])).load().private.inputs[0]
    dog = describe_task(described(tmp_path, source="images", shape=[3, 2, 1])).load().private.inputs[1]
    assert cat.tolist() == [[[1, 0]], [[0, 0]], [[0, 1]]]
    assert dog.tolist() == [[[1], [0]], [[0], [0]], [[0], [1]]]


def test_an_anomaly_task_learns_from_unlabelled_records_and_is_judged_on_labelled_ones(tmp_path):
    path = csv_file(tmp_path, "a,b\n1,2\n3,4\n")
    test = csv_file(tmp_path, "a,b,bad\n1,2,0\n9,9,1\n", "test.csv")
    fields = {"kind": "anomaly", "labels": [], "label": "bad", "features": ["a", "b"], "threshold": 2.5}
    with pytest.raises(DataProblem, match="'bad'"):
        describe_task(described(path, **fields)).load()
    task = describe_task(described(path, **fields | {"label": None}))
    assert task.load().private.labels.tolist() == [0, 0]
    assert task.interface.labels == ("normal", "anomalous")
    assert "no task.label" in problem(path, **fields | {"label": None, "test": str(test)})
    assert "AUROC" in problem(test, **fields, test=str(csv_file(tmp_path, "a,b,bad\n1,2,0\n", "t.csv")))


@pytest.mark.parametrize("kind", ["classification", "regression", "anomaly"])
def test_a_described_task_has_a_model_that_fits_it(tmp_path, kind):
    path = csv_file(tmp_path, "a,b,y\n1,2,0\n3,4,1\n")
    labels = ["no", "yes"] if kind == "classification" else []
    task = describe_task(described(path, kind=kind, label="y", labels=labels))
    records = task.load().private
    loss = task.loss(
        initial_model(task, {}, 1)(torch.from_numpy(records.inputs)), torch.from_numpy(task.targets(records))
    )
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got an empty file"),
        ("who,x,kind\n", "got none below the header"),
        ("who;x;kind\nanna;1;cat\n", "set task.delimiter to ';'"),
        ("x,x,kind\n1,2,cat\n", "'x' twice"),
        ("x,y,kind\n1,2,cat\n1,dog\n", "got 2 in line 3 of"),
        ("x,y,kind\n1,2,cat\n1,SECRET,dog\n", "expected a number in column 'y', got text in line 3 of"),
        ("x,y,kind\n1,2,cat\n1,,dog\n", "got none at line 3 of"),
        ("x,y,kind\n1,2,cat\n1,nan,dog\n", "expected a number in column 'y', got none at line 3"),
        ("x,y,kind\n1,2,cat\n1,inf,dog\n", "expected a finite number in column 'y', got another at line 3"),
        ("x,y,kind\n1,2,cat\n1,1e39,dog\n", "expected a finite number in column 'y', got another at line 3"),
        ("x,y,kind\n1,2,cat\n1,2,SECRET\n", "expected a class among cat, dog, got another at line 3"),
        ("x,y,kind\n1,2,0\n1,2,2\n", "expected a class among cat, dog, got another at line 3"),
        ("x,y,kind\n1,2,cat\n1,2,\n", "expected a class among cat, dog, got none at line 3"),
        ("x,y,kind\n1,2,cat\n1,3,cat\n", "got one class"),
        ("x,y,kind\n1,2,cat\n", "expected two or more records"),
        ("x,y,kid\n1,2,cat\n1,2,dog\n", "did you mean 'kid'?"),
        ("kind,b\ncat,\xe9\n".encode("latin-1"), "save the file as UTF-8"),
        ('x,y,kind\n1,2,"cat\n', "repair it"),
    ],
)
def test_a_bad_table_is_one_line_that_says_where_and_quotes_no_record(tmp_path, text, said):
    message = problem(csv_file(tmp_path, text))
    assert said in message
    assert "pets.csv" in message
    assert "SECRET" not in message


def test_a_message_counts_lines_as_an_editor_does(tmp_path):
    assert "line 5 of" in problem(csv_file(tmp_path, 'x,note,kind\n\n1,"two\nlines",cat\n2,b,cow\n'), features=["x"])


@pytest.mark.parametrize(
    ("owner", "said"),
    [("", "got none at line 2"), ("../anna", "got another at line 2"), ("server", "got another at line 2")],
)
def test_an_owner_needs_a_name_that_is_no_path(tmp_path, owner, said):
    path = csv_file(tmp_path, f"who,x,kind\n{owner},1,cat\nben,2,dog\n")
    assert said in problem(path, owner_column="who")


def test_a_path_that_is_not_there_or_no_file_is_named(tmp_path):
    assert "no such path" in problem(tmp_path / "none.csv")
    assert "got a folder" in problem(tmp_path)


def test_bad_parquet_is_one_line(tmp_path):
    path = tmp_path / "pets.parquet"
    path.write_bytes(b"PAR1 SECRET")
    assert "expected a Parquet file" in problem(path, source="parquet")
    pq.write_table(pa.table({"x": ["a", "b"], "kind": ["cat", "dog"]}), path)
    assert "expected numbers in column 'x'" in problem(path, source="parquet")
    pq.write_table(pa.table({"x": [1, None], "kind": ["cat", "dog"]}), path)
    assert "got none at row 2 of" in problem(path, source="parquet")


@pytest.mark.parametrize("source", ["png", "jpg", "gif", "webp"])
def test_a_truncated_image_is_named_whatever_its_format(tmp_path, source):
    write_images(tmp_path, [f"cat/1.{source}", f"dog/2.{source}"], size=(64, 64))
    broken = tmp_path / "dog" / f"2.{source}"
    for share in (0, 0.3, 0.8):
        whole = broken.read_bytes()
        broken.write_bytes(whole[: int(len(whole) * share)])
        message = problem(tmp_path, source="images", shape=[3, 64, 64])
        assert f"2.{source}" in message
        broken.write_bytes(whole)


def test_images_of_other_channels_or_in_other_places_are_named(tmp_path):
    images = {"source": "images", "shape": [3, 4, 6]}
    assert "got none" in problem(tmp_path / "none", **images)
    write_images(tmp_path, ["cat/1.png", "dog/1.png"])
    write_images(tmp_path, ["dog/2.png"], mode="L")
    assert re.search(r"expected an image of 3 channels, got mode L at .*2\.png", problem(tmp_path, **images))
    (tmp_path / "dog" / "2.png").rename(tmp_path / "2.png")
    assert "<label>/<image>" in problem(tmp_path, **images)
    (tmp_path / "2.png").rename(tmp_path / "dog" / "2.txt")
    assert "expected images alone" in problem(tmp_path, **images)
    (tmp_path / "dog" / "2.txt").unlink()
    (tmp_path / "dog").rename(tmp_path / "cow")
    assert "expected a class among cat, dog, got another" in problem(tmp_path, **images)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": []}, "two or more classes in task.labels"),
        ({"labels": ["cat"]}, "two or more classes"),
        ({"name": "a/b"}, "got task.name='a/b'"),
        ({"source": "excel"}, "task.source among csv, parquet, images, hub"),
        ({"kind": "ranking"}, "task.kind among"),
        ({"label": None}, "expected task.label"),
        ({"features": ["x", "kind"]}, "without label and owner"),
        ({"source": "images"}, "task.shape = "),
        ({"source": "images", "shape": [3, 2, 2], "owner_column": "who"}, "owner_column='folder'"),
        ({"source": "images", "shape": [3, 2, 2], "kind": "regression"}, "got 'regression'"),
        ({"delimiter": "::"}, "task.delimiter='::'"),
        ({"missing": "guess"}, "expected missing to be"),
        ({"missing": {"x": float("nan")}}, "missing in column 'x'"),
        ({"status": "open"}, "task.status among"),
    ],
)
def test_a_description_that_cannot_hold_together_is_refused(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        described("pets.csv", **change)


def test_what_is_missing_is_not_taken_from_other_records():
    with pytest.raises(PrivacyRefused, match="missing='mean'"):
        described("pets.csv", missing="mean")


def test_records_are_read_once_until_the_file_changes(tmp_path):
    text = "x,kind\n1,cat\n,dog\n"
    path = csv_file(tmp_path, text)
    first = describe_task(described(path, missing={"x": 4.0})).load()
    assert first.private.inputs.tolist() == [[1], [4]]
    assert describe_task(described(path, missing={"x": 4.0})).load() is first
    csv_file(tmp_path, text + "2,cat\n")
    assert len(describe_task(described(path, missing={"x": 4.0})).load().private) == 3


def test_a_constant_for_a_column_that_is_no_feature_is_refused(tmp_path):
    path = csv_file(tmp_path, "age,kind\n1,cat\n,dog\n")
    with pytest.raises(ValueError, match="got 'agee'; did you mean 'age'"):
        describe_task(described(path, missing={"agee": 4.0}))


def test_an_owners_repetitions_go_and_another_owners_stay(tmp_path):
    path = csv_file(tmp_path, "who,x,kind\na,1,cat\na,1,cat\na,1,dog\nb,1,cat\nb,2,dog\n")
    data = describe_task(described(path, owner_column="who", duplicates="drop")).load()
    assert [len(data.of_owner(index)) for index in (0, 1)] == [2, 2]


def test_an_owner_is_listed_whose_records_are_all_dropped(tmp_path):
    path = csv_file(tmp_path, "who,x,kind\na,1,cat\na,,cat\nb,2,\nc,2,dog\n")
    data = describe_task(described(path, owner_column="who", missing="drop")).load()
    assert data.owners == ("a", "b", "c")
    assert [len(data.of_owner(index)) for index in range(3)] == [1, 0, 1]
    assert data.of_owner(1).inputs.shape == (0, 1)


def test_a_record_is_read_the_same_whatever_the_others_hold(tmp_path):
    """A reader that guesses types would make 01 a number here and a text there."""
    tables = ["x,kind\n7,01\n7,1\n", "x,kind\n7,01\n7.5,b\n9999999999999999999999,1\n"]
    read = [
        describe_task(described(csv_file(tmp_path, text), labels=["01", "1", "b"])).load().private for text in tables
    ]
    assert [r.labels[0] for r in read] == [0, 0]
    assert [r.inputs[0, 0] for r in read] == [7, 7]


def hub_folder(folder):
    for name, rows in (("train", ROWS), ("test", "who,x,y,kind\nx,1,2,cat\nx,3,4,dog\n")):
        csv_file(folder, rows, f"{name}.csv")
    return folder


def test_a_folder_in_the_hubs_layout_is_read_by_owner_and_leaves_no_copy(tmp_path, monkeypatch):
    home, data = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    data.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = (
        "import sys; from tacit.federated.files import *\n"
        "d = DataDescription(name='pets', source='hub', path=sys.argv[1], label='kind', labels=['cat', 'dog'],\n"
        "                    features=['x', 'y'], owner_column='who', test='test')\n"
        "data = describe_task(d).load()\n"
        "print(data.owners, data.of_owner(0).inputs.tolist(), data.test.labels.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(hub_folder(data))], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "('anna', 'ben') [[1.0, 2.0], [5.0, 6.0]] [0, 1]"
    left = [path for path in tmp_path.rglob("*") if path.is_file() and data not in path.parents]
    assert not [path for path in left if b"anna" in path.read_bytes() or path.suffix in (".arrow", ".parquet")]
    assert not list(tmp_path.glob("tacit-hub-*"))


def test_a_hub_that_is_offline_or_takes_too_long_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for limit_s, said in ((60.0, "check task.path, splits and the connection"), (0.01, "within 0.01 s")):
        with pytest.raises(DataProblem, match=said) as caught:
            fetch_splits("nobody/nothing", ["train"], tmp_path, private=True, limit_s=limit_s)
        assert "\n" not in str(caught.value)


def test_images_in_cells_are_read_with_the_names_of_their_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_images(tmp_path, ["cat/1.png", "dog/1.png"])
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(tmp_path.rglob("*.png"))]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])})
    made = datasets.Dataset.from_dict({"image": cells, "kind": [1, 0]}, features=features)
    made.to_parquet(os.fspath(tmp_path / "pets.parquet"))
    fields = {"source": "parquet", "shape": [3, 4, 6], "features": ["image"]}
    records = describe_task(described(tmp_path / "pets.parquet", **fields)).load().private
    assert records.labels.tolist() == [0, 1]
    np.testing.assert_allclose(records.inputs[:, 0, 0, 0], [1 / 255, 2 / 255], rtol=1e-6)
