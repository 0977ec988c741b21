"""Searches for words in files."""

from contextlib import suppress
from pathlib import Path


def in_files(words: list[str], *files: Path) -> set[str]:
    result: set[str] = set()
    for file in files:
        if file.is_file():
            with suppress(FileNotFoundError):  # such as a temporary file of Postgres
                whole = file.read_bytes()
                result |= {word for word in words if word.encode() in whole}
    return result
