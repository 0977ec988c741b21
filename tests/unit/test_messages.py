"""The form of error messages: a command prints them after its name, pages and checks show them as sentences."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import archiver
from archiver.errors import ArchiverError, sentence
from archiver.http import answers

PACKAGE = Path(archiver.__file__).parent
# Responses and pages show the messages of these; the platform that the simulator imitates has its own style.
SENTENCES = {kind.__name__ for kind in answers.ERRORS} | {
    "PageError",
    "reported",
    "_refused",
    "FilterError",
    "TooManyAttemptsError",
}
NAMES = {"CallHQ", "CallHQ's", "Parquet", "Postgres"}


def text_of(node: ast.AST) -> str:
    """The text that a literal begins with; empty if a value comes first, or if it is no literal."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def messages(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, class or function, and text of each message that is raised, printed or the default of an error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "message":
                    yield each.lineno, node.name, text_of(each.value)
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args:
            name = ast.unparse(call.func).rpartition(".")[2]
            if isinstance(node, ast.Raise) or name in {"fail", "complain"}:
                yield call.lineno, name, next(filter(None, map(text_of, call.args)), "")


def test_a_message_begins_with_a_small_letter_or_a_name() -> None:
    found = 0
    for file in PACKAGE.rglob("*.py"):
        if "simulator" not in file.parts:
            for line, name, text in messages(ast.parse(file.read_text())):
                if name not in SENTENCES and not hasattr(builtins, name):
                    word = text.split(" ", 1)[0]
                    assert not re.match("[A-Z][a-z]", word) or word in NAMES, f"{file}:{line}: {text}"
                    found += 1
    assert found > 200


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no session has this id", "No session has this id."),
        ("the spool is full: give it more space", "The spool is full: give it more space."),
        ("hold 3 is not in force; see `archiver hold list`", "Hold 3 is not in force; see `archiver hold list`."),
        ("pg_hba.conf rejects the user. Change it.", "pg_hba.conf rejects the user. Change it."),
        (ArchiverError("ARCHIVER_HOME: not a folder"), "ARCHIVER_HOME: not a folder."),
    ],
)
def test_a_message_becomes_a_sentence(message: object, shown: str) -> None:
    assert sentence(message) == shown
