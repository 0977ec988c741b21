"""Relevant parts of the server's log."""

from pathlib import Path


def since_start(path: Path) -> str:
    """What the latest server said: what is older would mislead. Empty where there is no log."""
    text = path.read_text(errors="replace") if path.exists() else ""
    before, start, since = text.rpartition("LOG:  starting PostgreSQL")
    return before.rpartition("\n")[2] + start + since


def tail(text: str) -> str:
    """Its last lines."""
    return "\n".join(text.strip().splitlines()[-15:])
