"""Files from outside: names of files elsewhere, damage of every kind, and what the product never does to open them."""

import ast
import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from tacit.devices import runtime
from tacit.devices.formats import recognise
from tacit.devices.local import LocalDevice
from tacit.devices.protocol import Artifact, measure
from tacit.devices.runtime import open_artifact
from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused, Limits, run_limited
from tacit.edge import cli

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
import hostile_files as hostile

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("edge", "federated", "compression", "devices")
DRIVER = Path(__file__).with_name("untrusted_driver.py")
SECRET = np.full_like(hostile.WEIGHTS, 7.0)
INPUTS = np.random.default_rng(0).normal(size=(3, *hostile.SHAPE[1:])).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder for models, with every way to a canary outside it: its values would be seen in the outputs."""
    canary = tmp_path / "outside" / "canary.bin"
    canary.parent.mkdir()
    canary.write_bytes(SECRET.tobytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.bin").symlink_to(canary)
    os.link(canary, inside / "hard.bin")
    (inside / "there").symlink_to(canary.parent)
    (inside / "folder.bin").mkdir()
    os.mkfifo(inside / "fifo.bin")
    (inside / "beside.bin").write_bytes(SECRET.tobytes())
    return inside


def driven(form: str, files: list[Path], folder: Path) -> list[str]:
    """What became of each file in the sandbox; the driver itself must live."""
    np.save(folder / "inputs.npy", INPUTS[:1])
    order = {
        "source": str(ROOT / ".src"),
        "format": form,
        "files": [str(file) for file in files],
        "inputs": str(folder / "inputs.npy"),
    }
    # Importing torch tries out where temporary files may be; nothing else has a file to write, not even bytecode (-B),
    # which the limit would cut short.
    limits = Limits(wall_s=1800, cpu_s=1800, file_size_bytes=4096)
    done = run_limited([sys.executable, "-B", str(DRIVER)], stdin=json.dumps(order).encode(), limits=limits, cwd=folder)
    words = done.stdout.decode().split()
    assert (done.returncode, len(words)) == (0, len(files)), done.stderr[-500:]
    return words


# Names of files elsewhere. {canary} is the canary's absolute path.
LOCATIONS = {
    "beside": "beside.bin",
    "absolute": "{canary}",
    "parent": "../outside/canary.bin",
    "nested parents": "a/../../outside/canary.bin",
    "through a folder that is there": "folder.bin/../../outside/canary.bin",
    "dots and slashes": ".//.././/outside//canary.bin",
    "symlink": "link.bin",
    "hard link": "hard.bin",
    "through a linked folder": "there/canary.bin",
    "process root": "/proc/self/root{canary}",
    "process folder": "/proc/self/cwd/../outside/canary.bin",
    "open file": "/proc/self/fd/0",
    "own environment": "/proc/self/environ",
    "device": "/dev/zero",
    "standard input": "/dev/stdin",
    "percent": "..%2foutside%2fcanary.bin",
    "long UTF-8": "..\u2215outside\u2215canary.bin",
    "full-width": "\uff0e\uff0e/outside/canary.bin",
    "NUL": "hard.bin\0.txt",
    "backslash": "..\\outside\\canary.bin",
    "leading space": " hard.bin",
    "line break": "hard.bin\nexpected: nothing\x1b[2J",
    "very long": "./" * 20_000 + "hard.bin",
    "empty": "",
    "folder": "folder.bin",
    "dot": ".",
    "FIFO": "fifo.bin",
    "file URL": "file://{canary}",
    "Windows drive": "C:\\canary.bin",
    "Windows share": "\\\\localhost\\c$\\canary.bin",
    "home": "~/canary.bin",
    "variable": "$HOME/canary.bin",
    "memory address": "*/_ORT_MEM_ADDR_/*",
}
# What stands beside the location, or in its stead.
ENTRIES = {
    "negative offset": [("location", "hard.bin"), ("offset", "-4")],
    "offset past the end": [("location", "hard.bin"), ("offset", "18446744073709551612")],
    "offset and length that overflow": [("location", "hard.bin"), ("offset", "9223372036854775807"), ("length", "9")],
    "negative length": [("location", "hard.bin"), ("length", "-1")],
    "length past the end": [("location", "hard.bin"), ("length", "999999999999")],
    "a number that is none": [("location", "hard.bin"), ("offset", "0x10")],
    "location twice": [("location", "harmless.bin"), ("location", "hard.bin")],
    "location in capitals": [("LOCATION", "hard.bin")],
    "no location": [("offset", "0")],
    "no entry": [],
    "address of memory": [("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "576")],
}


def variants(canary: Path) -> dict[str, ModelProto]:
    """Every location in a plain weight, every entry, and the hard link in every place where a tensor can stand."""
    named = {name: [("location", text.format(canary=canary))] for name, text in LOCATIONS.items()} | ENTRIES
    models = {name: hostile.in_initializer(hostile.external(*entries)) for name, entries in named.items()}
    hard = hostile.external(("location", "hard.bin"))
    return models | {place.__name__: place(hard) for place in hostile.PLACES}


def test_no_variant_of_external_data_is_opened(folder):
    models = variants(folder.parent / "outside" / "canary.bin")
    assert len(models) >= 24
    for name, model in models.items():
        path = folder / "m.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactRefused, match=r"expected one file that holds all weights") as caught:
            open_artifact(path)
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 400, name


def test_the_device_would_find_none_of_these_files_though_nobody_had_looked(folder):
    """The second fence: a private folder, and the runtime's own checks. Opened in place, some would be read."""
    models = variants(folder.parent / "outside" / "canary.bin")
    path, inside, private = folder / "m.onnx", {}, {}
    with LocalDevice() as device:
        for number, (name, model) in enumerate(models.items()):
            path.write_bytes(model.SerializeToString())
            private[name] = device._local(device.put(path))
            inside[name] = folder / f"{number}.onnx"
            inside[name].write_bytes(path.read_bytes())
        # As ORT files, which the driver opens without reading their structure.
        found = dict(zip(models, driven("ort", list(private.values()), device._folder), strict=True))
        in_place = dict(zip(models, driven("ort", list(inside.values()), folder), strict=True))
    # Where only unused parts name the file there is nothing to find.
    unused = {name for name, word in found.items() if word == "ran"}
    assert unused <= {place.__name__ for place in hostile.PLACES} - {"in_initializer", "in_constant"}
    assert set(found.values()) <= {"ran", "runtime"}
    # The negative control: ONNX Runtime 1.32 looks for symbolic links, but not for hard ones, and stops at a NUL.
    read = {name for name, word in in_place.items() if word == "ran"} - unused
    assert {"beside", "hard link", "NUL", "in_initializer", "in_constant"} <= read


def test_what_a_hard_link_hides_would_reach_the_outputs(folder):
    """The negative control of the canary itself, on our own file and without the sandbox."""
    from onnxruntime import InferenceSession, SessionOptions

    (folder / "m.onnx").write_bytes(
        hostile.in_initializer(hostile.external(("location", "hard.bin"))).SerializeToString()
    )
    options = SessionOptions()
    options.log_severity_level = 4
    (outputs,) = InferenceSession(str(folder / "m.onnx"), options).run(None, {"x": INPUTS})
    np.testing.assert_allclose(outputs, INPUTS.reshape(3, -1) @ SECRET, rtol=1e-4)


def test_a_model_that_keeps_its_weights_is_opened(folder):
    """The other control: the same places, with the weights in the file."""
    weights = numpy_helper.from_array(hostile.WEIGHTS, "w")
    expected = INPUTS.reshape(3, -1) @ hostile.WEIGHTS
    for place in (hostile.in_initializer, hostile.in_constant, hostile.in_branch, hostile.in_nested_branch):
        (folder / "m.onnx").write_bytes(place(weights).SerializeToString())
        np.testing.assert_allclose(open_artifact(folder / "m.onnx").predict(INPUTS), expected, rtol=1e-4, atol=1e-4)


# Damage.

FORMS = [
    "onnx",
    "ort",
    "tflite",
    pytest.param("pte", marks=pytest.mark.skipif(find_spec("executorch") is None, reason="an extra")),
    "safetensors",
]


@pytest.fixture(scope="module")
def seeds() -> dict[str, list[bytes]]:
    models = [make() for make in (hostile.onnx_linear, hostile.onnx_branching, hostile.onnx_quantised)]
    return {
        "onnx": [model.SerializeToString() for model in models],
        "ort": [hostile.as_ort(model) for model in models],
        "tflite": [hostile.TFLITE],
        "pte": hostile.PTE,
        "safetensors": [hostile.safetensors(), hostile.safetensors({"w": hostile.WEIGHTS, "on": np.array([True])})],
    }


def tree(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def outcomes(form: str, seeds: list[bytes], count: int, folder: Path) -> Counter[str]:
    """What became of so many damaged files; nothing beside them may change, and the honest ones must run."""
    private, outside = folder / "private", folder / "outside"
    private.mkdir()
    outside.mkdir()
    (outside / "canary").write_bytes(b"untouched")
    found: Counter[str] = Counter()
    paths = []
    for number, content in enumerate([*seeds, *hostile.mutations(seeds, count)]):
        path = private / f"{number}.{form}"
        path.write_bytes(content)
        with contextlib.suppress(ArtifactRefused):
            recognise(path)  # in this process: it must not do more than refuse
            paths.append(path)
    found["unrecognised"] = len(seeds) + count - len(paths)
    np.save(private / "inputs.npy", INPUTS[:1])
    before = tree(folder)
    words = driven(form, paths, private)
    assert tree(folder) == before
    assert words[: len(seeds)] == ["ran"] * len(seeds)
    return found + Counter(words[len(seeds) :])


CRASHES = {"SIGSEGV", "SIGABRT", "SIGFPE", "SIGBUS", "SIGILL", "SIGALRM", "SIGKILL", "SIGXCPU"}


@pytest.mark.parametrize("form", FORMS)
def test_300_damaged_files_harm_nobody_but_their_child(form, seeds, tmp_path):
    found = outcomes(form, seeds[form], 300, tmp_path)
    assert found.total() == 300
    assert set(found) <= {"unrecognised", "structure", "runtime", "ran"} | CRASHES
    assert found["ran"] > 0, "damage that nothing survives tries the doors only"
    if form == "safetensors":
        assert not CRASHES & set(found)  # nothing but Python reads it


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("form", FORMS)
def test_10000_damaged_files_harm_nobody_but_their_child(form, seeds, tmp_path):
    found = outcomes(form, seeds[form], 10_000, tmp_path)
    sys.stderr.write(f"{form}: {dict(found)}\n")
    assert found.total() == 10_000
    assert set(found) <= {"unrecognised", "structure", "runtime", "ran"} | CRASHES


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_damaged_files_that_the_product_itself_opens_answer_or_are_refused(form, seeds, tmp_path):
    """The driver does as the product does; here is the product, on a few."""
    path = tmp_path / f"m.{form}"
    layout = "channel_last" if form == "tflite" else "channel_first"
    said = []
    for content in hostile.mutations(seeds[form], 10, seed=1):
        path.write_bytes(content)
        try:
            open_artifact(path, input_layout=layout).run([INPUTS])
        except ArtifactRefused as error:
            said.append(str(error))
    assert said
    assert all(message.isprintable() for message in said)


def test_a_file_that_crashes_its_runtime_is_a_crash_of_the_child_only(tmp_path):
    (tmp_path / "m.tflite").write_bytes(hostile.CRASHING_TFLITE)
    opened = open_artifact(tmp_path / "m.tflite", input_layout="channel_last")
    with pytest.raises(ArtifactCrashed, match="SIGSEGV"):
        opened.predict(INPUTS)


def test_a_measurement_refuses_what_opening_would(folder):
    (folder / "m.onnx").write_bytes(
        hostile.in_initializer(hostile.external(("location", "hard.bin"))).SerializeToString()
    )
    with LocalDevice() as device:
        result = measure(device, [Artifact(name="m", path=folder / "m.onnx", runtime="onnxruntime")], INPUTS)
    assert "holds all weights" in result["failed"]["m"]


# What the product never does.


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_the_product_never_loads_a_pickle():
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        names = {
            alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {str(node.module) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "shelve",
        }
        for name, call in calls(path):
            assert name not in {"torch.load", "torch.jit.load", "torch.package.PackageImporter"}, path
            if name in {"np.load", "numpy.load"}:
                allowed = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert allowed.get("allow_pickle") == "False", path


def test_runtimes_are_started_by_the_agent_alone():
    """Files of our own making are also calibrated and stamped in this process; nothing else opens a model."""
    starters = {"InferenceSession", "Interpreter", "CompiledModel"}
    found = {
        f"{path.parent.name}/{path.name}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for name, _ in calls(path)
        if name.split(".")[-1] in starters
    }
    run_by_the_agent = {"devices/agent.py", *(f"devices/{name}" for name in runtime._ADAPTERS.values())}
    assert "devices/agent.py" in found  # or the search would find nothing at all
    assert {name for name in found if not name.startswith("compression/")} <= run_by_the_agent


def test_a_refusal_ends_the_command_with_code_6(capsys):
    for error in (ArtifactRefused("expected a model"), ArtifactCrashed("the model file crashed")):
        assert cli._explain(error, "text") == 6
        assert capsys.readouterr().err.count("\n") <= 2
