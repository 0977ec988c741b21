"""`archiver` without summaries and rollups, to measure what they cost: `python -m tests.bench.underived serve`.

Replaced at import, because the worker imports this module again in its own process.
"""

from collections.abc import Mapping

from sqlalchemy import Connection

from archiver.__main__ import main
from archiver.archive import derived_rows


def _skip(connection: Connection, cursors: Mapping[str, int]) -> None:
    """Store nothing."""


derived_rows.refresh = _skip

if __name__ == "__main__":
    main()
