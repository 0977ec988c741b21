"""What the tests of the embedded Postgres share: a program that uses it, and a question to it."""

import subprocess
import sys
from pathlib import Path
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


def user_process(home: Path, **settings: Any) -> subprocess.Popen[str]:
    """Another process that uses the server of a home."""
    program = [settings.pop("python", sys.executable), "-c", USER_PROGRAM, str(home)]
    return subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def server_pid(process: subprocess.Popen[str]) -> int:
    """What a user process says once it has the server."""
    assert process.stdout
    assert process.stderr
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return int(line)
