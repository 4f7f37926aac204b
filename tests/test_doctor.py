import dataclasses
import doctest
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tacit.edge import doctor
from tacit.edge.doctor import Check, examine

ROOT = Path(__file__).parent.parent
TORCH = next(library for library in doctor._LIBRARIES if library.name == "torch")
NUMPY = next(library for library in doctor._LIBRARIES if library.name == "numpy")


def test_every_check_is_made_once_in_the_same_order() -> None:
    names = [check.name for check in examine()]
    assert len(names) == len(set(names))
    assert names == [check.name for check in examine()]
    assert {"python", "torch", "memory", "disk", "secret randomness", "network isolation", "Flower telemetry"} <= set(
        names
    )


def test_a_finding_that_is_not_ok_carries_a_command_and_one_that_is_does_not() -> None:
    for check in examine():
        assert check.status in ("ok", "warn", "fail")
        assert check.found
        assert bool(check.hint) is (check.status != "ok"), check


def test_this_environment_has_no_failure() -> None:
    assert [check for check in examine() if check.status == "fail"] == []


def test_a_check_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Check("x", "ok", "y").status = "fail"  # type: ignore[misc]  # the point of the test


def test_examining_loads_no_large_library() -> None:
    code = (
        "import sys\n"
        "from tacit.edge.doctor import examine\n"
        "examine()\n"
        "heavy = {'torch', 'flwr', 'opacus', 'onnx', 'onnxruntime', 'numpy', 'matplotlib', 'pydantic'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / ".src")})


def test_examining_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examine()
    assert list(tmp_path.iterdir()) == []


def test_a_working_folder_that_was_removed_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    code = (
        "import os, sys\n"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "from tacit.edge.doctor import examine\n"
        "print({check.name: check.status for check in examine()}['working folder'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.strip() == b"fail"
    assert not gone.exists()


def test_the_ranges_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for library in doctor._LIBRARIES:
        least, below = (".".join(map(str, release)) for release in (library.least, library.below))
        extras = project["optional-dependencies"]
        requirements = extras[library.extra] if library.extra else project["dependencies"]
        assert f"{library.name}>={least},<{below}" in requirements


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.9.1", "fail"),
        ("2.10.0rc1", "fail"),
        ("2.10.0.dev20260101", "fail"),
        ("2.10", "ok"),
        ("2.10.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.14.9.post1", "ok"),
        ("2.15.0", "warn"),
        ("10.0", "warn"),
        ("unknown", "warn"),
        (None, "warn"),
    ],
)
def test_a_torch_is_judged_by_the_tested_range(version: str | None, status: str) -> None:
    assert doctor._library(TORCH, version).status == status


def test_a_torch_with_a_known_hole_is_named_with_the_hole_and_its_cure() -> None:
    check = doctor._library(TORCH, "2.9.1")
    assert "CVE-2026-24747" in check.found
    assert check.hint == "pip install 'torch>=2.10,<2.15'"


def test_a_missing_optional_library_names_the_extra_and_a_missing_core_one_fails() -> None:
    assert doctor._library(TORCH, None) == Check("torch", "warn", "not installed", "pip install 'tacit[federated]'")
    assert doctor._library(NUMPY, None).status == "fail"
    assert doctor._micro(None) == Check("tflite-micro", "warn", "not installed", "pip install 'tacit[micro]'")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_versions_compare_as_their_numbers_do(one: list[int], other: list[int]) -> None:
    first, second = (doctor._release(".".join(map(str, numbers))) for numbers in (one, other))
    assert first is not None
    assert second is not None
    oracle = [numbers + [0] * (4 - len(numbers)) for numbers in (one, other)]
    assert (first < second) == (oracle[0] < oracle[1])


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warn")]
)
def test_python_is_judged_by_the_tested_versions(version: tuple[int, int, int], status: str) -> None:
    assert doctor._python(version).status == status


@pytest.mark.parametrize(
    ("flags", "machine", "status", "said"),
    [
        ({"sse2", "avx2", "avx512_vnni"}, "x86_64", "ok", "avx2, avx512_vnni"),
        ({"asimd", "fp"}, "aarch64", "ok", "neon"),
        ({"neon", "vfpv4"}, "armv7l", "ok", "neon"),
        (set(), "arm64", "ok", "neon"),
        ({"sse2"}, "x86_64", "warn", "no vector extension"),
        (set(), "riscv64", "warn", "no vector extension"),
    ],
)
def test_a_processor_is_judged_by_its_vector_extensions(flags: set[str], machine: str, status: str, said: str) -> None:
    check = doctor._processor(frozenset(flags), machine)
    assert check.status == status
    assert said in check.found


@pytest.mark.parametrize(("gigabytes", "status"), [(0.1, "fail"), (1.0, "warn"), (8.0, "ok")])
def test_memory_and_disk_are_judged_by_what_is_left(gigabytes: float, status: str) -> None:
    assert doctor._memory(int(gigabytes * 1e9)).status == status
    assert doctor._disk(int(gigabytes * 1e9)).status == status


def test_what_a_system_does_not_tell_is_a_warning() -> None:
    assert doctor._memory(None).status == "warn"
    assert doctor._disk(None).status == "warn"


def test_one_core_is_a_warning() -> None:
    assert (doctor._cores(1).status, doctor._cores(2).status) == ("warn", "ok")


@pytest.mark.parametrize(
    ("now_s", "resolution_s", "status"),
    [(0.0, 1e-9, "fail"), (1.8e9, 1e-9, "ok"), (1.8e9, 0.0156, "warn"), (9e9, 1e-9, "fail")],
)
def test_a_clock_is_judged_by_its_year_and_its_tick(now_s: float, resolution_s: float, status: str) -> None:
    assert doctor._clock(now_s, resolution_s).status == status


@pytest.mark.parametrize(("setting", "status"), [(None, "warn"), ("1", "warn"), ("0", "ok"), ("false", "ok")])
def test_telemetry_is_off_only_when_flower_reads_it_so(setting: str | None, status: str) -> None:
    assert doctor._telemetry(setting, installed=True).status == status
    assert doctor._telemetry(setting, installed=False).status == "ok"


def test_a_folder_that_is_not_there_or_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "missing", tmp_path / "file", None):
        assert doctor._writable("folder", folder, hint="mkdir x").status == "fail"
    assert doctor._writable("folder", Path(tempfile.gettempdir()), hint="mkdir x").status == "ok"


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(doctor).failed == 0
