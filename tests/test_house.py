"""The house rules that would otherwise be checked by eye: who imports whom, what is where, what is named how."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "devices": {"devices"},
    "federated": {"federated", "devices"},
    "compression": {"compression", "devices"},
    "edge": {"edge", "federated", "compression", "devices"},
}
SOLE_USERS = {
    "opacus": {"federated/batch_gradients.py", "federated/accounting.py"},
    "torch.onnx": {"compression/export_onnx.py"},
    "litert_torch": {"compression/export_tflite.py"},
}
FORBIDDEN_WORDS = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
FORBIDDEN_ENDINGS = ("Manager", "Handler", "Helper", "Base")

MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
PARSED = {path: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for path in MODULES}


def here(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return f"tacit.{path.parent.name}.{path.stem}"


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Every module that an import statement may name: for `from a import b` both a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that importing a module runs; what is under TYPE_CHECKING and in functions is not."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for field in ("body", "orelse", "finalbody"):
                yield from run_at_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from run_at_import(handler.body)


def cycle_in(imports: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_rules_below_have_something_to_hold_for():
    assert {path.parent.name for path in MODULES} == set(MAY_IMPORT)
    assert len(MODULES) > 50


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_has_a_readme_and_no_init_and_keeps_its_modules_flat(room):
    assert (ROOT / room / "README.md").is_file()
    assert not list((ROOT / room).rglob("__init__.py"))
    assert not [here(path) for path in (ROOT / room).glob("*/**/*.py")]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_rooms_readme_names_every_file_of_the_room(room):
    named = re.findall(r"`([a-z0-9_*]+\.py)`", (ROOT / room / "README.md").read_text(encoding="utf-8"))
    files = [path.name for path in MODULES if path.parent.name == room]
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in named)] == []
    assert [pattern for pattern in named if not any(fnmatch(path.name, pattern) for path in MODULES + TESTS)] == []


@pytest.mark.parametrize("path", MODULES, ids=here)
def test_a_module_imports_only_from_rooms_that_its_room_may_import(path):
    rooms = {name.split(".")[1] for name in imported(ast.walk(PARSED[path])) if name.startswith("tacit.")}
    assert rooms <= MAY_IMPORT[path.parent.name]


@pytest.mark.parametrize("path", MODULES, ids=here)
def test_a_module_imports_absolutely_and_never_a_bare_room_name(path):
    relative = [node for node in ast.walk(PARSED[path]) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []
    assert {name.partition(".")[0] for name in imported(ast.walk(PARSED[path]))} & set(MAY_IMPORT) == set()


def test_no_module_imports_itself_in_a_circle():
    names = {module_name(path) for path in MODULES}
    imports = {module_name(p): set(imported(run_at_import(PARSED[p].body))) & names for p in MODULES}
    assert sum(map(len, imports.values())) > 50, "the reading of imports has gone blind"
    assert cycle_in(imports) == []


def test_the_search_for_circles_finds_one_also_behind_a_try():
    tree = ast.parse("try:\n    from tacit.edge import b\nexcept ImportError:\n    b = None\n")
    found = set(imported(run_at_import(tree.body)))
    assert "tacit.edge.b" in found
    assert cycle_in({"tacit.edge.a": found, "tacit.edge.b": {"tacit.edge.a"}})


@pytest.mark.parametrize("package", SOLE_USERS)
def test_a_heavy_library_is_imported_only_where_it_lives(package):
    users = {
        here(path)
        for path in MODULES
        if any(f"{name}.".startswith(f"{package}.") for name in imported(ast.walk(PARSED[path])))
    }
    attributes = {
        here(path)
        for path in MODULES
        for node in ast.walk(PARSED[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) == package
    }
    assert users | attributes
    assert users | attributes <= SOLE_USERS[package]


def test_the_agent_stands_alone_is_short_and_is_python_3_9():
    path = ROOT / "devices" / "agent.py"
    source = path.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 9))
    assert [name for name in imported(ast.walk(PARSED[path])) if name.startswith("tacit")] == []
    assert len(source.splitlines()) < 400


@pytest.mark.parametrize("path", MODULES, ids=here)
def test_product_code_does_not_assert(path):
    assert [f"{here(path)}:{node.lineno}" for node in ast.walk(PARSED[path]) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", MODULES, ids=here)
def test_names_say_what_a_thing_is(path):
    assert set(path.stem.split("_")) & FORBIDDEN_WORDS == set()
    classes = [node.name for node in ast.walk(PARSED[path]) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if name.endswith(FORBIDDEN_ENDINGS)] == []


@pytest.mark.parametrize("path", MODULES, ids=here)
def test_a_module_and_its_public_functions_and_classes_say_what_they_are_for(path):
    tree = PARSED[path]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_product_code_reads_no_setting_of_the_environment_that_changes_results():
    allowed = {"TACIT_FAILPOINT", "TACIT_HOME"}  # the second says where ledgers lie, not what is in them
    found = {
        node.value
        for tree in PARSED.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("TACIT_")
    }
    assert found <= allowed


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_rooms_import_name_is_a_relative_link_to_its_folder(room):
    link = ROOT / ".src" / "tacit" / room
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / room


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys, tacit.edge.cli\n"
        "heavy = {'torch', 'flwr', 'numpy', 'matplotlib', 'onnx', 'onnxruntime', 'jinja2', 'sklearn', 'scipy'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
