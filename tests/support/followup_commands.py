"""`archiver followups` as a process."""

import json
import subprocess
from typing import Any

from tests.support.receivers import archiver
from tests.support.servers import as_writer

PRIVATE = {"ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": "true", "COLUMNS": "300"}


def followups(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return archiver("followups", *arguments, database_url=as_writer(url), **PRIVATE, **environment)


def listed(url: str, *arguments: str) -> Any:
    process = followups(url, *arguments, "--json")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
