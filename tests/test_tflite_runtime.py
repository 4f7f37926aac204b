"""tflite-runtime 2.14 in an environment of its own: the same answers as LiteRT, or one line that says why not."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tacit.compression.export import export, outputs_of
from tacit.devices import tflite_runtime
from tacit.devices.runtime import installed_version, open_artifact


def build():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = [nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)]
        return nn.Sequential(*layers).eval()


@pytest.mark.soak
def test_tflite_runtime_answers_as_the_model_in_float32_and_static_int8(tmp_path):
    try:
        tflite_runtime.environment_python()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model, inputs = build(), np.random.default_rng(0).standard_normal((24, 2, 6, 6)).astype(np.float32)
    (wanted,) = outputs_of(model, [inputs])
    found = {}
    for form, most in (("float32", 1e-5), ("static_int8", 0.2)):
        path = tmp_path / f"{form}.tflite"
        export(model, (torch.zeros(1, 2, 6, 6),), path, form=form, calibration=(inputs,))
        runtime = open_artifact(path, input_layout="channel_last", runtime="tflite-runtime")
        assert (runtime.name, runtime.version) == ("tflite-runtime", "2.14.0")
        found[form] = runtime.predict(inputs)
        assert np.abs(found[form] - wanted).max() < most
    assert np.abs(found["static_int8"] - wanted).max() > 1e-4  # a control: the files differ


@pytest.mark.soak
def test_the_environment_is_made_once_and_has_the_numpy_that_works():
    try:
        python = tflite_runtime.environment_python()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    made = python.stat().st_ctime_ns
    assert tflite_runtime.environment_python() == python
    assert python.stat().st_ctime_ns == made
    asked = [str(python), "-c", "import numpy, tflite_runtime; print(numpy.__version__[0], tflite_runtime.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split() == ["1", "2.14.0"]


def test_without_a_package_index_there_is_one_line_and_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_RETRIES", "0"), ("PIP_TIMEOUT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(
        ModuleNotFoundError, match=r"expected an environment with tflite-runtime 2\.14\.0, got: .*"
    ) as seen:
        installed_version("tflite-runtime")
    assert "\n" not in str(seen.value)
    assert "Installing tflite-runtime 2.14.0" in capsys.readouterr().err
    assert list(Path(tmp_path, "tacit").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line_too(tmp_path, monkeypatch):
    (tmp_path / "tacit").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="expected an environment with tflite-runtime"):
        tflite_runtime.environment_python()
