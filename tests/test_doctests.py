"""Every example in a docstring of the product runs. Files are globbed: pkgutil does not see rooms without __init__."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("edge", "federated", "compression", "devices")
MODULES = sorted(f"tacit.{path.parent.name}.{path.stem}" for room in ROOMS for path in (ROOT / room).glob("*.py"))
# flwr brings typer, which imports names that click has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils.* is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_there_are_examples_in_every_room():
    tried = dict.fromkeys(ROOMS, 0)
    for name in MODULES:
        found = doctest.DocTestFinder().find(importlib.import_module(name))
        tried[name.split(".")[1]] += sum(bool(test.examples) for test in found)
    assert all(tried.values()), tried
