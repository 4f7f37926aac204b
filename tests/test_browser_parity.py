"""A model file in headless Chromium: the same answers as here, and a page that is not believed."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tacit.compression.export import export, outputs_of
from tacit.devices import browser_parity
from tacit.devices.browser_parity import BrowserRuntime
from tacit.devices.sandbox import ArtifactRefused, ArtifactTimeout

WEB = Path(browser_parity.__file__).with_name("web")


class Two(nn.Module):
    """Two inputs that tell layouts apart, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.table, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, image, table):
        pooled = torch.relu(self.norm(self.conv(image))).mean((2, 3)) + self.table(table)
        return self.head(pooled), pooled


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Two().eval()


@pytest.fixture(scope="module")
def inputs():
    drawn = np.random.default_rng(0)
    return [drawn.standard_normal((7, *shape)).astype(np.float32) for shape in ((3, 6, 5), (5,))]


def job(inputs, path=Path(__file__)):
    return browser_parity._job("onnx", path, inputs, ["channel_last"])


def ask(address, data=None, host=None):
    headers = {"Host": host} if host else {}
    return urllib.request.urlopen(urllib.request.Request(address, data=data, headers=headers), timeout=5)  # noqa: S310


def refused(*args, **named):
    with pytest.raises(urllib.error.HTTPError) as seen:
        ask(*args, **named)
    seen.value.close()
    return seen.value.code


@pytest.mark.soak
@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize(("form", "most"), [("float32", 1e-4), ("dynamic_int8", 0.2), ("static_int8", 0.3)])
def test_a_browser_answers_as_the_model(model, inputs, tmp_path, suffix, form, most):
    if not any(map(shutil.which, browser_parity._CHROMIUM)):
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    if not browser_parity._VERSIONS.is_file():
        pytest.skip("devices/web/vendor is missing: make web")
    examples = tuple(torch.from_numpy(values[:1]) for values in inputs)
    path = tmp_path / f"m.{suffix}"
    export(model, examples, path, form=form, calibration=tuple(inputs))
    layout = "channel_last" if suffix == "tflite" else "channel_first"
    runtime = BrowserRuntime(path=path, layouts=[layout])
    found = runtime.run(inputs, outputs=2)
    assert runtime.name == {"onnx": "onnxruntime-web", "tflite": "LiteRT.js"}[suffix]
    for right, given in zip(outputs_of(model, inputs), found, strict=True):
        assert right.shape == given.shape
        assert np.abs(right - given).max() < most
    swapped = runtime.run([inputs[0][::-1], inputs[1]], outputs=2)  # a control: other inputs, other answers
    assert np.abs(swapped[0] - found[0]).max() > most / 10


@pytest.mark.soak
def test_whole_number_inputs_and_outputs_are_refused_by_name(model, inputs, tmp_path):
    if not any(map(shutil.which, browser_parity._CHROMIUM)) or not browser_parity._VERSIONS.is_file():
        pytest.skip("needs Chromium and make web")
    examples = tuple(torch.from_numpy(values[:1]) for values in inputs)
    path = tmp_path / "m.tflite"
    export(model, examples, path, form="full_int8", calibration=tuple(inputs))
    with pytest.raises(ArtifactRefused, match=r"LiteRT\.js 2\.5\.3: .*INT8.*float inputs and outputs"):
        BrowserRuntime(path=path, layouts=["channel_last"]).run(inputs, outputs=2)


def test_only_who_knows_the_token_gets_anything_and_only_what_is_the_pages(inputs):
    made = job(inputs)
    with browser_parity._served(made) as address:
        with ask(address) as response:
            assert b"parity.js" in response.read()
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        base = address.rsplit("/", 1)[0]
        with ask(f"{base}/job") as response:
            told = json.loads(response.read())
        assert told["inputs"] == [{"type": "float32", "shape": [6, 5, 3]}, {"type": "float32", "shape": [5]}]
        with ask(f"{base}/input/0") as response:
            sent = np.frombuffer(response.read(), "<f4").reshape(7, 6, 5, 3)
        np.testing.assert_array_equal(sent, np.moveaxis(inputs[0], 1, -1))
        root = base.rsplit("/", 1)[0]
        for wrong in (f"{root}/job", f"{root}/{'A' * 32}/job", f"{base}/../agent.py", f"{base}/input/9", f"{base}/"):
            assert refused(wrong) == 404
        assert refused(f"{base}/job", host="evil.example:80") == 404
        assert not made.answered.is_set()


def test_one_answer_is_taken_and_it_is_bounded(inputs, monkeypatch):
    monkeypatch.setattr(browser_parity, "_MOST_BYTES", 1000)
    made = job(inputs)
    with browser_parity._served(made) as address:
        base = address.rsplit("/", 1)[0]
        assert refused(f"{base}/answer", data=b"x" * 1001) == 413
        assert refused(f"{base}/other", data=b"x") == 404
        ask(f"{base}/error", data=b"first").close()
        assert refused(f"{base}/answer", data=b"second") == 404
    assert (made.error, made.answer) == ("first", b"")


def answer(*described, body):
    return json.dumps(list(described)).encode() + b"\n" + body


def test_an_answer_is_read_as_it_was_sent():
    first, second = np.arange(6, dtype="<f4").reshape(3, 2), np.arange(3, dtype="<i8").reshape(3, 1)
    sent = answer(
        {"type": "float32", "shape": [1, 2]},
        {"type": "int64", "shape": [1, 1]},
        body=first.tobytes() + second.tobytes(),
    )
    found = browser_parity._read_answer(sent, count=3, outputs=2)
    np.testing.assert_array_equal(found[0], first)
    np.testing.assert_array_equal(found[1], second)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"[]\n",
        b"[" * 5000 + b"\n",
        b"x" * 9000,
        answer({"type": "float32", "shape": [1, 2]}, body=b"1234"),
        answer({"type": "float32", "shape": [2, 1]}, body=b"12345678" * 3),
        answer({"type": "float32", "shape": [1, -2]}, body=b""),
        answer({"type": "float32", "shape": [1, True]}, body=b"1234" * 3),
        answer({"type": "float32", "shape": [1, 1e9]}, body=b"1234" * 3),
        answer({"type": "float32", "shape": [1, 1 << 25, 1 << 25]}, body=b"1234" * 3),
        answer({"type": "object", "shape": [1, 1]}, body=b"1234" * 3),
        answer({"type": ["float32"], "shape": [1, 1]}, body=b"1234" * 3),
        answer({"type": "float32", "shape": 1}, body=b"1234" * 3),
        answer({"type": "float32", "shape": [1, 1]}, {"type": "float32", "shape": [1, 1]}, body=b"1234" * 6),
        b'{"type": "float32"}\n' + b"1234" * 3,
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(content):
    with pytest.raises(ArtifactRefused, match="expected 1 outputs"):
        browser_parity._read_answer(content, count=3, outputs=1)


def test_a_browser_that_never_answers_is_ended(tmp_path, monkeypatch, inputs):
    sleeper = tmp_path / "bin" / "chromium"
    sleeper.parent.mkdir()
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sleeper.parent}:/usr/bin:/bin")
    monkeypatch.setattr(browser_parity, "_VERSIONS", tmp_path / "versions.json")
    (tmp_path / "versions.json").write_text('{"onnxruntime-web": "1.30.0"}')
    path = tmp_path / "m.onnx"
    export(nn.ReLU(), (torch.zeros(1, 3, 6, 5),), path)
    before = threading.active_count()
    with pytest.raises(ArtifactTimeout, match=r"kept onnxruntime-web 1\.30\.0 busy for more than 0\.3 s"):
        BrowserRuntime(path=path, limit_s=0.3).run(inputs[:1])
    assert threading.active_count() == before
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="expected Chromium, got none"):
        BrowserRuntime(path=path).run(inputs[:1])
    (tmp_path / "versions.json").unlink()
    with pytest.raises(ModuleNotFoundError, match="make web"):
        assert BrowserRuntime(path=path).version


def test_files_that_no_browser_runs_are_refused(tmp_path):
    path = tmp_path / "m.pte"
    path.write_bytes(b"....ET12")
    with pytest.raises(ArtifactRefused, match=r"expected an \.onnx or \.tflite file for a browser"):
        BrowserRuntime(path=path).run([np.zeros((1, 2), np.float32)])


def test_the_page_has_no_script_of_its_own_text_and_asks_for_nothing_from_elsewhere():
    page = (WEB / "parity.html").read_text(encoding="utf-8")
    script = (WEB / "parity.js").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("src=") == 1
    assert re.search(r"\son\w+=", page) is None
    assert "http" not in page + script
    assert "eval" not in script
