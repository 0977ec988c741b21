"""The error tree: one base, and texts that do not depend on docstrings."""

import ast
import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from inspect import getmembers, isclass
from pathlib import Path

import archiver
from archiver.errors import ArchiverError
from archiver.http.answers import Refused
from archiver.inbound import QueueFullError
from archiver.inbound.signatures import SignatureError

PACKAGE = Path(archiver.__file__).parent


def public_errors() -> set[type[BaseException]]:
    errors = set()
    for module in pkgutil.walk_packages([str(PACKAGE)], "archiver."):
        if module.name != "archiver.__main__":
            for name, found in getmembers(import_module(module.name), isclass):
                if issubclass(found, BaseException) and found.__module__.startswith("archiver.") and name[0] != "_":
                    errors.add(found)
    return errors


def test_every_public_error_has_the_base_and_a_name_of_its_own() -> None:
    errors = public_errors()
    assert len(errors) > 40
    assert {error for error in errors if not issubclass(error, ArchiverError)} == {Refused}
    names = [error.__name__ for error in errors]
    assert sorted(names) == sorted(set(names))


def test_an_error_that_is_raised_without_a_text_has_one() -> None:
    errors = {error.__name__: error for error in public_errors()}
    checked = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id in errors:
                error = errors[node.exc.id]
                assert issubclass(error, ArchiverError)
                assert error.message, f"{file}:{node.lineno}"
                checked.append(error)
    assert QueueFullError in checked


def test_no_text_depends_on_a_docstring() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert "__doc__" not in file.read_text(), file
    program = """
import json, sys
from importlib import import_module
for name in json.loads(sys.argv[1]):
    import_module(name)
from archiver.errors import ArchiverError
from archiver.inbound.signatures import SignatureError

def texts(error):
    yield error.__name__, [error.__doc__, str(error.__new__(error))]
    for each in error.__subclasses__():
        yield from texts(each)

print(json.dumps([dict(texts(ArchiverError)), str(SignatureError("stale_timestamp", b"x-signature"))]))
"""
    errors = {error for error in public_errors() if issubclass(error, ArchiverError)}
    modules = sorted({error.__module__ for error in errors})
    printed = subprocess.run(
        [sys.executable, "-OO", "-c", program, json.dumps(modules)], capture_output=True, text=True, check=True
    ).stdout
    texts, rendered = json.loads(printed)
    assert texts == {error.__name__: [None, error.message] for error in errors}
    assert rendered == str(SignatureError("stale_timestamp", b"x-signature"))
    assert rendered.startswith(SignatureError.message)
