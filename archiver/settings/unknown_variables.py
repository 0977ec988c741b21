"""Find environment variables that look like settings but are not."""

import os
import re
from difflib import get_close_matches

from archiver.settings.fields import Settings
from archiver.settings.sources import environment_name

# Variables that Kubernetes sets for a service named archiver or callhq.
_OF_A_SERVICE = re.compile(r"_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_\w+)?)$")
_OF_A_DATABASE = re.compile(r"(DATABASE|DB|PG|POSTGRES|POSTGRESQL)_(URL|URI|DSN)(_FILE)?")


def unknown_variables() -> list[tuple[str, str]]:
    """Return the unknown variables that look like settings, each with the most similar setting, or "".

    Names similar to `DATABASE_URL` count only if that is not set.
    """
    names = [environment_name(Settings, field_name) for field_name in Settings.model_fields]
    known = {*names, *(f"{name}_FILE" for name in names)}
    database = {"DATABASE_URL", "DATABASE_URL_FILE"}
    is_database_set = bool(database & os.environ.keys())
    result = []
    for name in sorted(os.environ.keys() - known):
        if name.startswith(("ARCHIVER_", "CALLHQ_")):
            bare = name.removeprefix("ARCHIVER_")
            if not _OF_A_SERVICE.search(name):
                result.append((name, bare if bare in known else _nearest(name, known)))
        elif not is_database_set:
            suggestion = "DATABASE_URL" if _OF_A_DATABASE.fullmatch(name) else _nearest(name, database)
            result += [(name, suggestion)] if suggestion else []
    return result


def _nearest(name: str, known: set[str]) -> str:
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.85)), "")
