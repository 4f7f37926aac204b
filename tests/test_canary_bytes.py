"""An owner's record holds a pattern, exceptions speak it aloud, and it is in nothing that a run leaves or prints.

This file is also the task of these runs: `task.name = "test_canary_bytes:task"`.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tacit.edge import pipeline
from tacit.edge.recipe import Recipe, load_recipe
from tacit.federated.datasets import find_task
from tacit.federated.task import Data, Records, Task

HERE = Path(__file__).resolve()
TACIT = Path(sys.executable).with_name("tacit")
PIXEL = struct.unpack("<f", bytes.fromhex("cafe423f"))[0]  # 0.76169...: a grey like any other
LABEL = 7_654_321  # no class: the loss would say so, with the number
SHORT_TEXT = str(PIXEL)[:7].encode()
# Raw in either order and width, as text of either width, in hexadecimal; and the label as text or as an integer.
PATTERNS = (
    struct.pack("<f", PIXEL),
    struct.pack(">f", PIXEL),
    struct.pack("<d", PIXEL),
    struct.pack(">d", PIXEL),
    SHORT_TEXT,
    b"cafe423f",
    str(LABEL).encode(),
    struct.pack("<q", LABEL),
)
SAYING_ALL, WRONG_LABEL = 1, 2  # an owner who fails aloud, and one with a record that would
RECIPE = """
[task]
name = "test_canary_bytes:task"
[model]
channels = [4]
[federated]
owners = 5
partition = "natural"
rounds = 2
quorum = 2
[privacy]
noise_multiplier = 1.0
sample_rate = 1.0
[report]
twin = false
[compression]
"""
NO_VARIANTS = "variants = []\n"
VARIANTS = """
[[compression.variants]]
name = "plain"
format = "onnx"
[[compression.variants]]
name = "small"
format = "onnx"
passes = [{ name = "prune", ratio = 0.5 }, { name = "distill" }, { name = "static_int8" }]
[[compression.variants]]
name = "lite"
format = "tflite"
passes = [{ name = "static_int8" }]
"""


def task() -> Task:
    """Digits of a few owners; everybody has the pattern, one cannot be read, and one has a record of no class."""
    digits = find_task("digits")

    def load() -> Data:
        data = digits.load()
        assert data.private is not None
        pool = data.private

        def of_owner(index: int) -> Records:
            held = pool.take(np.arange(40 * index, 40 * index + 40))
            held.inputs[0] = PIXEL
            if index == SAYING_ALL or os.environ.get("CANARY") == "everybody":
                raise ValueError(f"cannot read {held.inputs[0, 0, 0]!r}, {held.inputs[0].tobytes()!r} of class {LABEL}")
            if index == WRONG_LABEL:
                held.labels[0] = LABEL
            return held

        return replace(data, private=None, of_owner=of_owner)

    return replace(digits, name="canary", load=load)


def recipe_of(folder: Path, *settings: str, variants: str = NO_VARIANTS) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(RECIPE + variants)
    return load_recipe(path, settings)


def found_in(content: bytes) -> list[bytes]:
    return [pattern for pattern in PATTERNS if pattern in content]


def leaks(folder: Path, *printed: str) -> dict[str, list[bytes]]:
    """Where a pattern is; what stands for an owner's own disk, or for the trusted server's, is left out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {f"printed {number}": text.encode() for number, text in enumerate(printed)}
    return {name: found for name, content in files.items() if not is_an_owners(name) and (found := found_in(content))}


def is_an_owners(name: str) -> bool:
    return name.endswith("errors.log") or "/private/" in name


def spoken(folder: Path) -> bytes:
    """What the owners wrote on their own disks."""
    return b"".join(
        path.read_bytes() for path in folder.rglob("*.log") if is_an_owners(str(path.relative_to(folder.parent)))
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(HERE.parent))
    yield
    sys.modules.pop(HERE.stem, None)


@pytest.mark.parametrize(
    ("unit", "noise"), [("record", "fast"), ("record", "hardened"), ("local", "fast"), ("client", "hardened")]
)
def test_no_output_of_a_run_holds_what_a_record_holds(tmp_path, capfd, caplog, unit, noise):
    settings = [
        f"privacy.unit={unit}",
        f"privacy.noise={noise}",
        "privacy.sample_rate=1.0",
        "privacy.reference_size=40",
    ]
    recipe = recipe_of(tmp_path, *settings, "federated.batch_rate=1.0", "federated.evaluate_every=1")
    pipeline.run(recipe, tmp_path / "run")
    printed = capfd.readouterr()
    assert leaks(tmp_path / "run", printed.out, printed.err, caplog.text) == {}
    told = spoken(tmp_path / "run")
    assert {SHORT_TEXT, str(LABEL).encode()} <= set(found_in(told))  # the exceptions did speak
    assert b"out of bounds" not in told  # a record of no class is left out, and ends nothing
    rows = [json.loads(line) for line in (tmp_path / "run/train/rounds.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [None if unit == "client" else 4] * 2


def cli(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "FLWR_TELEMETRY_ENABLED", "ORT_DISABLE_TELEMETRY")}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    places = {"PYTHONPATH": str(HERE.parent), "HOME": str(folder), "TMPDIR": str(scratch)}
    return subprocess.run(
        [TACIT, *arguments],
        env={**kept, **places, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize("variants", [NO_VARIANTS, pytest.param(VARIANTS, marks=pytest.mark.soak)], ids=["none", "all"])
def test_the_whole_command_leaves_and_prints_nothing_of_a_record(tmp_path, variants):
    recipe_of(tmp_path, variants=variants)
    done = cli(tmp_path, "run", "recipe.toml", "--out", "run", "--format", "json", "--debug")
    assert done.returncode == 0, done.stderr
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    artifacts = {".onnx", ".tflite"} if variants == VARIANTS else set()
    assert {".jsonl", ".json", ".html", ".safetensors", ".out", *artifacts} <= kinds
    assert leaks(tmp_path, done.stdout, done.stderr) == {}
    assert found_in(spoken(tmp_path / "run"))


def test_a_run_that_fails_because_nobody_can_be_read_says_so_without_a_word_of_theirs(tmp_path):
    recipe_of(tmp_path)
    done = cli(tmp_path, "run", "recipe.toml", "--out", "run", "--debug", CANARY="everybody")
    assert done.returncode == 5
    assert "5 unavailable" in done.stderr
    assert leaks(tmp_path, done.stdout, done.stderr) == {}


@pytest.mark.parametrize(
    "place",
    ["log.jsonl", "ledger.jsonl", "train/outbox/000001-0.out", "train/rounds.jsonl", "variants/plain/model.onnx"],
)
def test_the_search_finds_a_pattern_wherever_it_is(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    for pattern in PATTERNS:
        path.write_bytes(b"\x00before " + pattern + b" after")
        assert list(leaks(tmp_path)) == [place]
    with pytest.raises(AssertionError):
        assert leaks(tmp_path) == {}


def test_an_exception_that_is_let_out_is_found(tmp_path, monkeypatch, capfd):
    """The mutation: a note of the error in the run's own log, as a helpful program would make it."""
    from tacit.federated import client_app

    noting = client_app.note_error

    def helpful(log: Path) -> None:
        noting(log)
        sys.stderr.write(f"{sys.exc_info()[1]}\n")

    monkeypatch.setattr(client_app, "note_error", helpful)
    recipe = recipe_of(tmp_path)
    pipeline.run(recipe, tmp_path / "run")
    assert set(leaks(tmp_path / "run", capfd.readouterr().err)) == {"printed 0"}
