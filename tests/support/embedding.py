"""What the tests of the embedded Postgres share: a program that uses it, and a question to it."""

from typing import Any

import psycopg

from archiver import embedded

USER_PROGRAM = """
import sys
from pathlib import Path
from archiver import embedded
try:
    postgres = embedded.start(Path(sys.argv[1]))
except embedded.EmbeddedError as error:
    sys.exit(f"EmbeddedError: {error}")
print(postgres.pid, flush=True)
sys.stdin.read()
postgres.stop()
"""


def query(postgres: embedded.Postgres, statement: str) -> Any:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone() if cursor.description else None
