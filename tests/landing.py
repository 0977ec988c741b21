"""Record a new migration, for `make schema`: its digest, and the catalogue of the schema that it gives."""

import hashlib
import tempfile
from pathlib import Path

from archiver import database
from archiver.database import catalogue, schema
from tests.support import servers

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


def write_catalogue() -> None:
    """Store the catalogue of a database that the migrations create on Postgres 18."""
    with tempfile.TemporaryDirectory() as folder, servers.running("18", Path(folder)) as url:
        engine = database.connect(database.database_url(url.format(database="postgres")))
        schema.upgrade(engine)
        with database.transaction(engine) as connection:
            result = catalogue.read(connection)
        engine.dispose()
    (MIGRATIONS / catalogue.FILE).write_bytes(catalogue.encode(result))


if __name__ == "__main__":
    add_digests()
    write_catalogue()
