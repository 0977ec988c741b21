"""Variables of the environment that look like a setting and are none."""

import os
import re
from difflib import get_close_matches

from archiver.settings.fields import Settings
from archiver.settings.sources import environment_name

# What Kubernetes sets for a service called archiver or callhq.
_OF_A_SERVICE = re.compile(r"_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_\w+)?)$")
_OF_A_DATABASE = re.compile(r"(DATABASE|DB|PG|POSTGRES|POSTGRESQL)_(URL|URI|DSN)(_FILE)?")


def strangers() -> list[tuple[str, str]]:
    """Variables of the environment that look like a setting and are none, each with the one that may be meant, or "".

    Those that look like `DATABASE_URL` count while that is not set.
    """
    names = [environment_name(Settings, field_name) for field_name in Settings.model_fields]
    known = {*names, *(f"{name}_FILE" for name in names)}
    database = {"DATABASE_URL", "DATABASE_URL_FILE"}
    is_database_told = bool(database & os.environ.keys())
    found = []
    for name in sorted(os.environ.keys() - known):
        if name.startswith(("ARCHIVER_", "CALLHQ_")):
            bare = name.removeprefix("ARCHIVER_")
            if not _OF_A_SERVICE.search(name):
                found.append((name, bare if bare in known else _nearest(name, known)))
        elif not is_database_told:
            meant = "DATABASE_URL" if _OF_A_DATABASE.fullmatch(name) else _nearest(name, database)
            found += [(name, meant)] if meant else []
    return found


def _nearest(name: str, known: set[str]) -> str:
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.85)), "")
