"""`archiver followups tail`: the change feed as JSON lines, for a shell pipe."""

import select
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import click
import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from archiver import settings
from archiver.archive.outbox import TYPES
from archiver.cli import complain, connection
from archiver.cli.output import Whole
from archiver.database import identity, is_unreachable, sqlstate, transaction
from archiver.database.schema import SchemaError
from archiver.errors import ArchiverError
from archiver.outbound import feed

IDLE_SECONDS = 0.5
UNAVAILABLE_SECONDS = 1.0
PAGE = 1_000  # changes

_ENDED = ("57P01", "57P02", "57P03")  # the server is being stopped or started, or was killed
_NO_VIEW = ("42P01", "3F000")  # undefined table, undefined schema


class CursorError(ArchiverError):
    """The cursor belongs to a change that this database does not have; the message says what to do."""


class Position(msgspec.Struct, frozen=True):
    """A cursor and its epoch; `epoch` is None if it is unknown."""

    cursor: int
    epoch: str | None = None

    def __str__(self) -> str:
        return f"{self.epoch}:{self.cursor}" if self.epoch else f"{self.cursor}"


_CURSOR: click.ParamType[int] = Whole(0, 2**63 - 1)


class _CursorParameter(click.ParamType[Position]):
    name = "cursor"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Position:
        """Parse CURSOR or EPOCH:CURSOR."""
        if isinstance(value, Position):
            return value
        epoch, separator, cursor = str(value).rpartition(":")
        if separator and not epoch.strip():
            self.fail(f"{value!r} has no epoch before the colon", param, context)
        return Position(_CURSOR.convert(cursor, param, context), epoch.strip() or None)


@click.command()
@click.option(
    "--event",
    "types",
    multiple=True,
    type=click.Choice(TYPES),
    metavar="TYPE",
    help="Only changes of this type, such as session.settled; may be repeated.",
)
@click.option(
    "--from",
    "after",
    type=_CursorParameter(),
    metavar="[EPOCH:]CURSOR",
    help="Start after this cursor of this epoch; 0 starts at the oldest change.  [default: the end]",
)
@click.option("--follow/--no-follow", default=True, show_default=True, help="Wait for further changes.")
def tail(*, types: Collection[str], after: Position | None, follow: bool) -> None:
    """Print changes of the archive as JSON lines, each with the epoch and cursor to continue from.

    Exits 1 if the database was restored to a state before that cursor, and prints where to continue. The role
    archiver_reader is sufficient: the command reads analytics.changes and analytics.epochs. It ends on Ctrl-C or
    when stdout is closed, and waits while the database restarts.
    """
    if after is None and not follow:
        raise click.UsageError("--no-follow without --from prints nothing; add --from")
    configuration = settings.read()
    with (
        connection.supervised_database_url(configuration, create=False) as url,
        connection.engine_at(configuration, url) as engine,
    ):
        _warn_of_identity(configuration, engine)
        with suppress(KeyboardInterrupt):
            _Tail(engine, types, follow=follow).run(after)


def _warn_of_identity(configuration: settings.Settings, engine: Engine) -> None:
    """Warn if this machine knows that the database lost rows; a user who may read only `analytics` cannot check."""
    try:
        with transaction(engine) as opened:
            reason = connection.identity_fault(configuration, engine, opened)
    except SQLAlchemyError:
        return  # the first page reports the error
    if reason:
        complain(f"{reason}\n{identity.ADVICE}")


def check(at: Position, extent: feed.Extent, epochs: Sequence[feed.FeedEpoch]) -> None:
    """Raise `CursorError` if this database does not have the change at this cursor."""
    names = [each.epoch for each in epochs]
    if at.epoch is not None and at.epoch not in names:
        raise CursorError(
            f"cursor {at.cursor} belongs to epoch {at.epoch}, which this database does not have: DATABASE_URL"
            " names another database or a restored backup. Read the archive again, then start with --from 0."
        )
    for before, after in pairwise(epochs):
        is_of_before = before.epoch == at.epoch if at.epoch else at.cursor <= after.given
        if is_of_before and at.cursor > after.cursor:
            raise CursorError(
                f"cursor {at.cursor} belongs to epoch {before.epoch}, of which this database has changes only up to"
                f" {after.cursor}: it lost later changes, and epoch {after.epoch} began. Undo what you did for the"
                f" later changes, then continue with --from {after.epoch}:{after.cursor}."
            )
        if is_of_before:
            break
    if at.cursor > max(extent.newest, *(each.given for each in epochs), 0):
        raise CursorError(
            f"the feed ends at {extent.newest}, before {at.cursor}: the cursor belongs to another database, or this"
            " one is a restored backup. Read the archive again, then start with --from 0."
        )


class _Tail:
    def __init__(self, engine: Engine, types: Collection[str], *, follow: bool) -> None:
        self._engine, self._types, self._follow = engine, frozenset(types), follow
        self._epochs: Sequence[feed.FeedEpoch] = ()
        self._output = select.poll()
        self._output.register(sys.stdout.fileno(), 0)

    def run(self, after: Position | None) -> None:
        """Print changes to the end of the feed, or with --follow until stdout is closed. Raises `CursorError`."""
        last = self._begin(after)
        while True:
            page = self._page(last)
            self._print(page, last)
            last = Position(page[-1].cursor, page[-1].epoch) if page else last
            if len(page) < PAGE and (not self._follow or self._is_abandoned(IDLE_SECONDS)):
                return

    def _begin(self, after: Position | None) -> Position:
        try:
            with transaction(self._engine) as opened:
                extent = self._check(opened, after or Position(0))
        except DBAPIError as error:
            if sqlstate(error) in _NO_VIEW:
                raise SchemaError("this database has no change feed: run `archiver migrate`") from None
            raise
        return Position(extent.newest) if after is None else after

    def _check(self, opened: Connection, last: Position) -> feed.Extent:
        extent, self._epochs = feed.select_extent(opened), feed.select_epochs(opened)
        check(last, extent, self._epochs)
        return extent

    def _page(self, last: Position) -> list[feed.Entry]:
        """Return the next changes; none if stdout is closed. With --follow, wait until the database is available."""
        is_unavailable = False
        while True:
            try:
                with transaction(self._engine) as opened:
                    page = feed.select_changes(opened, last.cursor, PAGE)
                    if is_unavailable or not page or page[0].epoch != last.epoch:
                        self._check(opened, last)
            except SQLAlchemyError as error:
                if not self._follow or not _is_unavailable(error):
                    raise
                if not is_unavailable:
                    complain("database unavailable; waiting")
                is_unavailable = True
                if self._is_abandoned(UNAVAILABLE_SECONDS):
                    return []
                continue
            if is_unavailable:
                complain("database available again")
            return page

    def _print(self, page: list[feed.Entry], last: Position) -> None:
        if page and 0 < last.cursor < page[0].cursor - 1:
            self._report_gap(last.cursor, page[0])
        for entry in page:
            if not self._types or entry.type in self._types:
                sys.stdout.write(msgspec.json.encode(entry).decode() + "\n")
        sys.stdout.flush()

    def _report_gap(self, last: int, first: feed.Entry) -> None:
        begun = [each for each in self._epochs[1:] if last <= each.given < first.cursor]
        end = min([first.cursor - 1, *(each.cursor for each in begun)])
        if last < end:
            complain(
                f"changes {last + 1} to {end} were deleted (older than ARCHIVER_CHANGES_DAYS);"
                f" continuing with {first.cursor}"
            )
        for each in begun:
            complain(
                f"epoch {each.epoch} began after change {each.cursor}; later changes of the previous epoch are lost"
            )

    def _is_abandoned(self, seconds: float) -> bool:
        """Wait `seconds`; return True if stdout was closed."""
        return bool(self._output.poll(seconds * 1000))


def _is_unavailable(error: SQLAlchemyError) -> bool:
    if isinstance(error, PoolTimeoutError) or sqlstate(error) in _ENDED or is_unreachable(error):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated
