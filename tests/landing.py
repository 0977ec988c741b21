"""Record a new migration: `make schema` adds its digest to migrations/digests.txt."""

import hashlib
from pathlib import Path

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def add_digests() -> None:
    """Add the digest of each migration that has none; one that is there is never changed."""
    digests = MIGRATIONS / "digests.txt"
    known = digests.read_text(encoding="utf-8").splitlines()
    names = {line.split()[1] for line in known}
    added = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
        for path in (MIGRATIONS / "versions").glob("[0-9]*.py")
        if path.name not in names
    ]
    lines = sorted([*known, *added], key=lambda line: line.split()[1])
    digests.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    add_digests()
