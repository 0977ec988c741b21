"""Where tests are: the folder says what a test costs, and no test module imports another."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
MODULES = sorted(TESTS.glob("*/test_*.py"))
DATABASES = {"cluster", "database_url", "empty_database_url", "engine"}


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_every_test_is_in_a_folder() -> None:
    assert {module.parent.name for module in TESTS.rglob("test_*.py")} == {
        "unit",
        "database",
        "process",
        "faults",
        "browser",
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: f"{module.parent.name}/{module.stem}")
def test_no_test_module_imports_another(module: Path) -> None:
    own = {name for name in imported(module) if name.startswith("tests.")}
    assert all(name == "tests.conftest" or name.startswith("tests.support") for name in own), own


@pytest.mark.parametrize("module", sorted(TESTS.glob("unit/test_*.py")), ids=lambda module: module.stem)
def test_a_unit_test_needs_no_database_and_no_process(module: Path) -> None:
    functions = (node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef))
    assert not {argument.arg for node in functions for argument in node.args.args} & DATABASES
    assert not {"tests.support.processes", "tests.support.receivers"} & {*imported(module)}
