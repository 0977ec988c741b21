"""Words searched in files, and logs that are still being written."""

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


def whole_lines(path: Path) -> str:
    """The text of a log up to its last line end: a running process may be writing the next line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1]
