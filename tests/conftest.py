"""Real databases: one server a session and version, one migrated template, one clone of it a test."""

import itertools
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
from coverage import Coverage
from hypothesis import HealthCheck, is_hypothesis_test, settings
from psycopg import sql
from sqlalchemy import Engine

from archiver import database
from archiver.database import schema
from tests.support import processes, servers
from tests.support.waiting import until

_TEMPLATE = "archiver_template"
ELSEWHERE = Path("/var/lib/callhq-archiver")
_numbers = itertools.count()

# No example has a deadline, and none is rejected because it was slow to make: a machine may stall for seconds.
settings.register_profile("archiver", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("archiver")


class Cluster:
    """A running server; `clone` makes databases that are migrated already."""

    def __init__(self, version: str, url: str) -> None:
        self.version = version
        self._url = url
        self.sync(is_on=False)
        self.execute(f"CREATE DATABASE {_TEMPLATE}")
        engine = self.engine(self.url(_TEMPLATE))
        schema.upgrade(engine)
        engine.dispose()
        servers.let_writer_in(self.url("postgres"))

    def url(self, name: str) -> str:
        return self._url.format(database=name)

    def engine(self, url: str, pool_size: int = 5) -> Engine:
        return database.connect(database.database_url(url), pool_size=pool_size)

    def clone(self, template: str = _TEMPLATE) -> str:
        """The URL of a new database."""
        name = f"test_{next(_numbers)}"
        # Page by page through the log, as is the default, costs ten times the processor time.
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def drop(self, url: str) -> None:
        name = database.database_url(url).database or ""
        self.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def sync(self, *, is_on: bool) -> None:
        """Write through to the disk, or not: a database that is dropped costs a checkpoint, of all its files."""
        value = "on" if is_on else "off"
        self.execute(f"ALTER SYSTEM SET fsync = {value}")
        self.execute("SELECT pg_reload_conf()")
        until(lambda: self._shown("fsync") == value, f"a new session has fsync = {value}")

    def _shown(self, setting: str) -> object:
        with psycopg.connect(self.url("postgres")) as connection:
            return (connection.execute(f"SHOW {setting}").fetchone() or (None,))[0]

    def execute(self, statement: str | sql.Composed) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    """No setting of the machine reaches a test, nor a width of its terminal."""
    own = ("ARCHIVER_", "CALLHQ_", "DATABASE_URL", "PG", "COLUMNS", "LINES")
    for name in [name for name in os.environ if name.startswith(own)]:
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _keep_bytecode(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where Python keeps no bytecode, each of hundreds of processes would compile every module again."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.getbasetemp().parent / "bytecode")


@pytest.fixture(scope="session", autouse=True)
def _leave_no_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As root, the data of a home that others cannot reach lies elsewhere, and would outlive it."""
    yield
    for link in tmp_path_factory.getbasetemp().rglob("postgres"):
        if link.is_symlink() and link.resolve().parent.parent == ELSEWHERE:
            until(partial(_is_removed, link.resolve().parent), f"{link} is removed")


def _is_removed(folder: Path) -> bool:
    """A server whose last user was killed may be about to end in it."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a module that says `ON_ONE_VERSION` run each test on the first version of Postgres alone."""
    others = {*servers.versions()[1:]}
    dropped = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and getattr(item.module, "ON_ONE_VERSION", False)
        and hasattr(item, "callspec")
        and item.callspec.params.get("cluster") in others
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Trace for coverage only what reaches branches that no other test does: tracing doubles the time of Python.

    The repetition of a test on a second version of Postgres, the examples of a property, the tests of faults, and the
    modules that say `UNTRACED` reach hardly any.
    """
    measurement = Coverage.current()
    if measurement is None or _is_traced(item):
        return (yield)
    measurement.stop()
    processes.suspended |= {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("COVERAGE_")}
    try:
        return (yield)
    finally:
        os.environ.update(processes.suspended)
        processes.suspended.clear()
        measurement.start()


def _is_traced(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return True
    is_slow = item.path.parent.name == "faults" or getattr(item.module, "UNTRACED", False)
    version = item.callspec.params.get("cluster") if hasattr(item, "callspec") else None
    is_repetition = version in servers.versions()[1:] or is_hypothesis_test(item.obj)
    return not is_slow and not is_repetition


@pytest.fixture(scope="session", params=servers.versions())
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    version: str = request.param
    with servers.folder() as folder, servers.running(version, folder / servers.fresh_name("postgres")) as url:
        yield Cluster(version, url)


@pytest.fixture
def durable(cluster: Cluster) -> Iterator[None]:
    """The server survives a crash of the machine, as `archiver doctor` wants it."""
    cluster.sync(is_on=True)
    yield
    cluster.sync(is_on=False)


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """A migrated, empty database."""
    url = cluster.clone()
    yield url
    cluster.drop(url)


@pytest.fixture
def empty_database_url(cluster: Cluster) -> Iterator[str]:
    """A database in which nothing was ever migrated."""
    url = cluster.clone("template0")
    yield url
    cluster.drop(url)


@pytest.fixture
def engine(cluster: Cluster, database_url: str) -> Iterator[Engine]:
    engine = cluster.engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
