"""Migrate the schema, check its revision, and grant the roles their privileges."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, MigrationStep
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver.database import (
    connect,
    is_lock_timeout,
    lock_waits,
    roles,
    sqlstate,
    tables,
    transaction,
    variable_columns,
)
from archiver.database.lock_waits import INSUFFICIENT_PRIVILEGE
from archiver.errors import ArchiverError
from archiver.settings.variables import Variable

VERSION_TABLE = "schema_version"
SCHEMAS = (tables.SCHEMA, "archiver_search", "analytics", "archiver_jobs")  # all that the migrations create

_LOCK_SECONDS = 2.0
PAUSE_SECONDS = 2.0  # pause between two attempts to get a lock, in which waiting sessions proceed
LOCK_WAIT_SECONDS = 45.0  # in total for locks
RACES = 1  # retries if another migration has created the same objects
STATEMENT_SECONDS = 600
# Limits of the creation of one index in an archive that is in use, and of its wait for older transactions, which
# delays no other session.
INDEX_SECONDS, INDEX_LOCK_SECONDS = 3_600, 60
_REPAIR = "0006"  # repairs databases that earlier versions of the migrations before it created
_REPAIRED_FROM = "0005"


class SchemaError(ArchiverError):
    """The schema is not the one that this version needs; the message says what to do.

    `reason`: the same without the name of the database, for the public response of `/readyz`.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


@cache
def head() -> str:
    """Return the schema revision of this version."""
    revision = _migrations().get_current_head()
    if revision is None:
        raise SchemaError("this installation has no migrations: reinstall callhq-archiver")
    return revision


def current(connection: Connection) -> str | None:
    """Return the revision of the database; None if it was never migrated."""
    options = {"version_table": VERSION_TABLE, "version_table_schema": tables.SCHEMA}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def check(connection: Connection) -> None:
    """Raise `SchemaError` unless the database is at head."""
    is_at = current(connection)
    if is_at == head():
        return
    if is_at is None:
        raise SchemaError(
            f"the database {where(connection)} has no archiver schema: run `archiver migrate`",
            "the database has no archiver schema: run `archiver migrate`",
        )
    if is_at in _known():
        raise SchemaError(
            f"the schema is at {is_at}, older than this version needs ({head()}): run `archiver migrate`"
        )
    raise SchemaError(f"the schema is at {is_at}, newer than this version supports: upgrade callhq-archiver")


def where(connection: Connection) -> str:
    """Describe the connected database and user, without password."""
    driver: Any = connection.connection.driver_connection
    info = driver.info
    port = "" if info.host.startswith("/") else f":{info.port}"
    return f"{info.dbname} at {info.host}{port} as {info.user}"


def grant_missing(connection: Connection) -> str | None:
    """Return the SQL that allows this user to create missing schemas; None if it is not needed."""
    query = (
        "SELECT format('GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user)"
        " WHERE NOT has_database_privilege(current_database(), 'CREATE')"
        " AND EXISTS (SELECT FROM unnest(CAST(:schemas AS text[])) AS s WHERE to_regnamespace(s) IS NULL)"
    )
    answer: str | None = connection.scalar(text(query), {"schemas": list(SCHEMAS)})
    return answer


def upgrade(engine: Engine, revision: str = "head", variables: Sequence[Variable] | None = None) -> None:
    """Migrate the schema to `revision`, and grant each role its privileges. Safe to run concurrently.

    A new database is migrated in one transaction. In an existing one, each migration has its own, so that locks are
    short, and an interrupted upgrade continues after the last one that was committed. The indexes that a migration
    lists in `CONCURRENTLY` are created before it, outside of a transaction, so that receivers can write to the
    tables.

    `variables`: those that become columns of `analytics.sessions` at head; None leaves its columns as they are.

    Raises `SchemaError` if the schema is newer than this version supports, if the user lacks a privilege, or if
    other sessions lock the tables for too long.
    """
    try:
        for each, indexes in _pending(engine, revision):
            if indexes:
                create = partial(_create, engine=engine, indexes=indexes)
                _patiently(engine, create, lock_seconds=INDEX_LOCK_SECONDS)
            _patiently(engine, partial(_upgrade, revision=each, variables=None))
        _patiently(engine, lambda connection: _upgrade(connection, revision, variables))
    except DBAPIError as error:
        if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
            raise
        with transaction(engine) as connection:
            raise SchemaError(_explain_refusal(connection, str(error.orig).splitlines()[0])) from None


def _explain_refusal(connection: Connection, refusal: str) -> str:
    if (grant := grant_missing(connection)) is not None:
        return (
            f"The database {where(connection)} does not let this user create schemas. As its owner or an"
            f" administrator run\n  {grant}\nthen `archiver migrate` again."
        )
    query = "SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = :name"
    owner = connection.scalar(text(query), {"name": tables.SCHEMA})
    return (
        f"The database {where(connection)} refused: {refusal}.\nRun `archiver migrate` as the user"
        f" {owner}, who owns the schema {tables.SCHEMA}."
    )


def _upgrade(connection: Connection, revision: str, variables: Sequence[Variable] | None) -> None:
    # Once an owner has created the schemas and granted the privileges, an ordinary user need not be able to do so.
    if _is_done(connection, revision, variables):
        return
    if current(connection) is not None and revision == "head":
        _refuse_newer(connection)
    # Alembic keeps its version table there, so the schema must exist first.
    if not connection.scalar(text("SELECT to_regnamespace(:name) IS NOT NULL"), {"name": tables.SCHEMA}):
        with _another_migration():
            connection.execute(text(f"CREATE SCHEMA {tables.SCHEMA}"))
    _lock(connection)
    if _is_done(connection, revision, variables):  # another migration has done it in the meantime
        return
    is_at = current(connection)
    _repair(connection)
    _apply(connection, revision)
    if revision not in ("head", head()):
        roles.grant_missing(connection)  # all others at head
        return
    if revision == "head" and variables is not None:
        variable_columns.bring_up_to_date(connection, variables)
    # Again, so that a dump shows the privileges in the order of a fresh database.
    (roles.bring_up_to_date if is_at == head() else roles.grant_all)(connection)


def _apply(connection: Connection, revision: str) -> None:
    """Apply the migrations up to `revision`; the command of Alembic would load them all again."""

    def steps(is_at: Any, _: MigrationContext) -> list[Any]:
        pending = migrations.iterate_revisions(revision, is_at, implicit_base=True)
        return [MigrationStep.upgrade_from_script(migrations.revision_map, each) for each in reversed(list(pending))]

    migrations = _migrations()
    with EnvironmentContext(_config(connection), migrations, fn=steps, destination_rev=revision):
        migrations.run_env()


def _is_done(connection: Connection, revision: str, variables: Sequence[Variable] | None) -> bool:
    is_at = current(connection)
    if revision != "head":
        return is_at is not None and is_at >= revision
    if is_at != head():
        return False
    has_columns = variables is None or (
        variable_columns.name_difference(connection, variables) is None
        and variable_columns.is_promoted(connection, variables)
    )
    return has_columns and roles.are_granted(connection)


Indexes = Mapping[str, str]  # by name: table, expressions and condition of each index


def _pending(engine: Engine, revision: str) -> list[tuple[str, Indexes]]:
    """Return the revisions that an existing database lacks, in order, each with the indexes to create before it.

    Those up to the repair are one step.
    """
    with transaction(engine) as connection:
        is_at = current(connection)
    if is_at not in _known() or (revision != "head" and is_at >= revision):
        return []
    pending = reversed(list(_migrations().iterate_revisions(revision, is_at)))
    return [(each.revision, getattr(each.module, "CONCURRENTLY", {})) for each in pending if each.revision >= _REPAIR]


_SELECT_INDEX = text(
    """
    SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
      JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = :schema AND c.relname = :name
    """
)


def _create(guard: Connection, engine: Engine, indexes: Indexes) -> None:
    """Create the missing indexes, and create again each index whose creation was interrupted.

    The transaction of `guard` excludes other migrations until all are created. It must hold no snapshot, because
    Postgres would wait for the end of that snapshot.
    """
    _lock(guard)
    own = connect(engine.url, pool_size=1, prepared_statements=False)
    try:
        with own.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql(f"SET statement_timeout = '{INDEX_SECONDS}s'")
            connection.exec_driver_sql(f"SET lock_timeout = '{INDEX_LOCK_SECONDS}s'")
            created = [name for name in indexes if _create_index(connection, name, indexes[name])]
            if created:  # otherwise the new expressions, and a column that Postgres samples again, have no statistics
                connection.exec_driver_sql("ANALYZE archiver.sessions, archiver.chats, archiver.messages")
    finally:
        own.dispose()


def _create_index(connection: Connection, name: str, definition: str) -> bool:
    is_valid = connection.scalar(_SELECT_INDEX, {"schema": tables.SCHEMA, "name": name})
    if is_valid:
        return False
    if is_valid is not None:
        connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {tables.SCHEMA}.{name}")
    connection.exec_driver_sql(f"CREATE INDEX CONCURRENTLY {name} ON {definition}")
    return True


def _repair(connection: Connection) -> None:
    """Prepare an older database for the migrations that precede the repair migration, which repairs the rest."""
    is_at = current(connection)
    if is_at is not None and is_at < _REPAIRED_FROM:
        _migrations().get_revision(_REPAIR).module.repair(connection, _migrations(), is_at)


def downgrade(engine: Engine, revision: str) -> None:
    """Downgrade the schema to `revision`; `base` removes it with all data."""

    def work(connection: Connection) -> None:
        _lock(connection)
        command.downgrade(_config(connection), revision)

    _patiently(engine, work)


def _refuse_newer(connection: Connection) -> None:
    if current(connection) not in _known():
        check(connection)


# One migration per database at a time. Only the owner may lock the row of the version, so no other user can block a
# migration. Before that row exists, the unique names of new objects exclude concurrent migrations.
_LOCK_TABLE = text(f"LOCK TABLE {tables.SCHEMA}.{VERSION_TABLE} IN SHARE ROW EXCLUSIVE MODE")
_LOCK_ROW = text(f"SELECT version_num FROM {tables.SCHEMA}.{VERSION_TABLE} FOR UPDATE")  # noqa: S608  # only constants are inserted, never input
_MADE_BY_ANOTHER = {"23505", "42P06", "42P07"}  # SQLSTATEs: unique violation, duplicate schema, duplicate table


def _lock(connection: Connection) -> None:
    """Wait for another migration, and keep others waiting until the end of this transaction."""
    name = f"{tables.SCHEMA}.{VERSION_TABLE}"
    if not connection.scalar(text("SELECT to_regclass(:name) IS NOT NULL"), {"name": name}):
        return
    with _another_migration():
        if connection.execute(_LOCK_ROW).first() is None:
            connection.execute(_LOCK_TABLE)


class _UnderWayError(Exception):
    """Another migration of this database is under way."""


@contextmanager
def _another_migration() -> Iterator[None]:
    """Raise `_UnderWayError` if a lock timeout occurs in the block: another migration holds the lock."""
    try:
        yield
    except DBAPIError as error:
        if not is_lock_timeout(error):
            raise
        raise _UnderWayError from error


def _patiently(engine: Engine, work: Callable[[Connection], None], lock_seconds: float | None = None) -> None:
    """Run `work` in one transaction; retry if a lock was not free for `lock_seconds`, by default `_LOCK_SECONDS`.

    All other sessions queue behind a waiting table lock, so each attempt waits only briefly. Attempts end after
    `LOCK_WAIT_SECONDS` of waits and pauses, or after `STATEMENT_SECONDS` if another migration is under way. Raises a
    `SchemaError` that names the session that holds the lock.
    """
    began, waited, races = monotonic(), 0.0, 0
    with lock_waits.watching(engine) as watch:
        while True:
            try:
                with transaction(
                    engine, statement_seconds=STATEMENT_SECONDS, lock_seconds=_LOCK_SECONDS
                ) as connection:
                    work(connection)
                    return
            except _UnderWayError:
                if monotonic() - began > STATEMENT_SECONDS:
                    raise SchemaError(f"another migration is taking too long. {watch.explain()}") from None
            except DBAPIError as error:
                if sqlstate(error) in _MADE_BY_ANOTHER and races < RACES:
                    races += 1
                elif not is_lock_timeout(error):
                    raise
                else:
                    waited += lock_seconds or _LOCK_SECONDS
                if waited > LOCK_WAIT_SECONDS:
                    raise SchemaError(f"{_blocked(engine)} {watch.explain()}") from None
            watch.report.add(watch.holders)
            sleep(PAUSE_SECONDS)
            waited += PAUSE_SECONDS


def _blocked(engine: Engine) -> str:
    """Describe how far a migration came that gives up."""
    with transaction(engine) as connection:
        is_at = current(connection)
    at = "" if is_at is None else f" beyond {is_at}; `archiver migrate` continues from there"
    return f"the schema cannot be changed{at}."


@cache
def _migrations() -> ScriptDirectory:
    """Return the migrations, loaded once."""
    return ScriptDirectory.from_config(_config())


def _known() -> set[str]:
    return {each.revision for each in _migrations().walk_revisions()}


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def scripts() -> Path:
    """Return the folder of the migrations: in the wheel, or next to the package in a checkout."""
    package = Path(__file__).parent.parent
    packed = package / "_migrations"
    return packed if packed.is_dir() else package.parent / "migrations"
