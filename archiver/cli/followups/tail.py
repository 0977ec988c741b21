"""`archiver followups tail`: the change feed as JSON lines, for a shell pipe."""

import select
import sys
from collections.abc import Collection

import click
import msgspec
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver import feed, settings
from archiver.cli import connection
from archiver.cli.output import Whole
from archiver.database import is_unreachable, sqlstate, transaction
from archiver.outbox import TYPES
from archiver.schema import SchemaError

IDLE_SECONDS = 0.5
AWAY_SECONDS = 1.0
PAGE = 1_000  # changes

_ENDED = ("57P01", "57P02", "57P03")  # the server is being stopped or started, or was killed
_NO_VIEW = ("42P01", "3F000")  # neither table nor schema


class CursorError(Exception):
    """The cursor is beyond the end of the feed."""


@click.command()
@click.option("--event", "types", multiple=True, type=click.Choice(TYPES), help="Only these types.")
@click.option(
    "--from",
    "after",
    type=Whole(0, 2**63 - 1),
    metavar="CURSOR",
    help="Begin after this one; 0: at the oldest.  [default: at the end]",
)
@click.option("--follow/--no-follow", default=True, show_default=True, help="Wait for more at the end.")
def tail(*, types: Collection[str], after: int | None, follow: bool) -> None:
    """Print changes of the archive as JSON lines, each with the cursor to go on from.

    Reads analytics.changes, for which the role archiver_reader is enough. Ends with Ctrl-C, or when nobody reads any
    more; a restart of the database is waited for.
    """
    if after is None and not follow:
        raise click.UsageError("Say --from: there is nothing after the end, and --no-follow waits for nothing.")
    configuration = settings.read()
    with (
        connection.lasting_database_url(configuration, create=False) as url,
        connection.engine_at(configuration, url) as engine,
    ):
        try:
            _Tail(engine, types, follow=follow).run(after)
        except CursorError as error:
            click.echo(f"archiver: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            return


class _Tail:
    def __init__(self, engine: Engine, types: Collection[str], *, follow: bool) -> None:
        self._engine, self._types, self._follow = engine, frozenset(types), follow
        self._output = select.poll()
        self._output.register(sys.stdout.fileno(), 0)

    def run(self, after: int | None) -> None:
        """Until the end, or until nobody reads any more. Raises `CursorError`."""
        last = self._begin(after)
        while True:
            page = self._page(last)
            self._print(page, last)
            last = page[-1].cursor if page else last
            if len(page) < PAGE and (not self._follow or self._has_nobody(IDLE_SECONDS)):
                return

    def _begin(self, after: int | None) -> int:
        try:
            with transaction(self._engine) as opened:
                extent = feed.select_extent(opened)
        except DBAPIError as error:
            if sqlstate(error) in _NO_VIEW:
                raise SchemaError("There is no change feed in this database: run `archiver migrate`.") from None
            raise
        self._check(after or 0, extent)
        return extent.newest if after is None else after

    def _check(self, last: int, extent: feed.Extent) -> None:
        if last > extent.newest:
            raise CursorError(
                f"The feed ends at {extent.newest}, before {last}: that cursor is of another database, or this one"
                " was restored from a backup. Begin with --from 0."
            )

    def _page(self, last: int) -> list[feed.Entry]:
        """The next changes. While the database is away it is waited for, unless the end is."""
        is_away = False
        while True:
            try:
                with transaction(self._engine) as opened:
                    if is_away:
                        self._check(last, feed.select_extent(opened))
                    page = feed.select_changes(opened, last, PAGE)
            except SQLAlchemyError as error:
                if not self._follow or not _is_away(error):
                    raise
                if not is_away:
                    click.echo("archiver: the database is away; waiting for it", err=True)
                is_away = True
                if self._has_nobody(AWAY_SECONDS):
                    return []
                continue
            if is_away:
                click.echo("archiver: the database is back", err=True)
            return page

    def _print(self, page: list[feed.Entry], last: int) -> None:
        if page and 0 < last < page[0].cursor - 1:
            click.echo(
                f"archiver: the changes {last + 1} to {page[0].cursor - 1} are gone: they were older than"
                f" ARCHIVER_CHANGES_DAYS; going on with {page[0].cursor}",
                err=True,
            )
        for entry in page:
            if not self._types or entry.type in self._types:
                sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
        sys.stdout.flush()

    def _has_nobody(self, seconds: float) -> bool:
        """Waits so long, or until nobody reads what is printed any more."""
        return bool(self._output.poll(seconds * 1000))


def _is_away(error: SQLAlchemyError) -> bool:
    if isinstance(error, PoolTimeoutError) or sqlstate(error) in _ENDED or is_unreachable(error):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated
