"""`archiver serve` and `archiver migrate`."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import click
import structlog
import uvicorn
from sqlalchemy import Engine
from uvicorn.supervisors import Multiprocess

from archiver import database, schema, settings, signatures, telemetry
from archiver.cli import connection

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 30


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Receiving processes.")
@click.option(
    "--migrate/--no-migrate",
    default=None,
    help="Bring the schema to head first.  [default: only with the embedded database]",
)
@click.option("--insecure", is_flag=True, help="Accept unsigned deliveries where no secret is set. Never in public.")
@click.option("--no-worker", is_flag=True, help="Only receive. (This version has no background work yet.)")
def serve(*, host: str, port: int, workers: int, migrate: bool | None, insecure: bool, no_worker: bool) -> None:
    """Receive webhooks at POST /webhooks/callhq until told to stop.

    SIGTERM or Ctrl-C: takes no more, writes and answers what was accepted, exits 0.
    """
    del no_worker
    configuration = settings.read()
    telemetry.configure_logs(configuration.log_level, configuration.log_format)
    _require_authentication(configuration, insecure=insecure)
    with connection.database_url(configuration) as url, _multiprocess_metrics(workers):
        os.environ["DATABASE_URL"] = url  # for the receiving processes
        os.environ.pop("DATABASE_URL_FILE", None)
        should_migrate = configuration.database_url is None if migrate is None else migrate
        _prepare(configuration, url, should_migrate=should_migrate)
        _receive(host, port, workers)


def _require_authentication(configuration: settings.Settings, *, insecure: bool) -> None:
    if insecure and not configuration.secrets:
        os.environ["ARCHIVER_WEBHOOK_SCHEME"] = "none"
        os.environ.pop("ARCHIVER_WEBHOOK_SCHEME_FILE", None)
        log.warning("unsigned deliveries are accepted: anyone who reaches this port can write to the archive")
        return
    if configuration.webhook_scheme == "none" and not insecure:
        raise settings.SettingsError(
            "ARCHIVER_WEBHOOK_SCHEME is none: anyone could write to the archive. Choose another scheme,"
            " or say --insecure if that is what you want."
        )
    try:
        signatures.verifier(configuration)
    except settings.SettingsError as error:
        hint = "" if configuration.secrets else "\nTo try it out without any: archiver serve --insecure"
        raise settings.SettingsError(f"{error}{hint}") from None


def _prepare(configuration: settings.Settings, url: str, *, should_migrate: bool) -> None:
    engine = database.connect(
        database.database_url(url), pool_size=1, prepared_statements=configuration.prepared_statements
    )
    try:
        if should_migrate:
            schema.upgrade(engine)
        with database.transaction(engine) as opened:
            schema.check(opened)
    finally:
        engine.dispose()


@contextmanager
def _multiprocess_metrics(workers: int) -> Iterator[None]:
    """A folder in which several processes keep their counters, so that /metrics of any tells of all."""
    if workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="archiver-metrics-") as folder:
        os.environ[telemetry.MULTIPROCESS_FOLDER] = folder
        yield


def _receive(host: str, port: int, workers: int) -> None:
    server_settings = uvicorn.Config(
        "archiver.app:create",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        backlog=2048,
    )
    # Uvicorn raises the signal that stopped it once more when it is done; stopping as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    listener = server_settings.bind_socket()
    address, bound_port = listener.getsockname()[:2]
    log.info("receiving", url=f"http://{address}:{bound_port}/webhooks/callhq", workers=workers)
    if workers > 1:
        Multiprocess(server_settings, sockets=[listener]).run()
        return
    server = uvicorn.Server(server_settings)
    server.run([listener])
    if not server.started:
        sys.exit(1)


@click.command()
@click.option("--check", is_flag=True, help="Only tell whether the schema is at head; exit 1 if it is not.")
def migrate(check: bool) -> None:
    """Bring the database's schema to the one that this version needs.

    Safe to run while receivers run, and twice at once: the second waits for the first.
    """
    configuration = settings.read()
    with connection.engine(configuration) as engine:
        if not check:
            schema.upgrade(engine)
        _report(engine)


def _report(engine: Engine) -> None:
    with database.transaction(engine) as opened:
        schema.check(opened)
        click.echo(f"The schema is at {schema.head()}, as this version needs it.")
