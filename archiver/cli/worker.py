"""`archiver worker` and `archiver rebuild`: background duties, and rebuilding the archive."""

import click
import structlog
from prometheus_client import start_http_server
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from sqlalchemy.exc import SQLAlchemyError

from archiver import database, settings, telemetry
from archiver.archive import Timing
from archiver.archive.rebuild import count_events
from archiver.archive.rebuild import rebuild as replay
from archiver.cli import connection, options
from archiver.cli.output import Whole, counted, progress
from archiver.compliance.seals import signing_key
from archiver.database import schema
from archiver.operations import reloading
from archiver.settings import Settings
from archiver.worker.worker_process import work

log = structlog.get_logger(__name__)


@click.command()
@click.option("--metrics-port", type=Whole(1, 65535), help="Serve Prometheus metrics on this port of 127.0.0.1.")
def worker(metrics_port: int | None) -> None:
    """Run the background duties (histories, changes, seals, erasure) until SIGTERM.

    Any number of workers may run, on any number of machines. `archiver serve` runs one itself, unless --no-worker is
    given. On SIGTERM or Ctrl-C the worker completes the current work and exits 0.
    """
    reloading.block()
    used = reloading.look()
    reloading.require_files(used)
    configuration = settings.read()
    telemetry.configure_logs(configuration.log_level, configuration.log_format)
    signing_key(configuration)
    connection.warn_of_unknown_variables()
    with connection.supervised_database_url(configuration, create=False) as url:
        _check(configuration, url)
        if metrics_port is not None:
            _serve_metrics(metrics_port)
        work(configuration, url, used)


def _check(configuration: Settings, url: str) -> None:
    """Check the schema. If the database is unreachable, log the error; each duty retries later."""
    try:
        with connection.engine_at(configuration, url) as engine, database.transaction(engine) as opened:
            schema.check(opened)
    except SQLAlchemyError as error:
        if not database.is_connection_failure(error):
            raise
        log.error(  # noqa: TRY400  # a traceback would add nothing
            "database unavailable; worker waits for it or for a new DATABASE_URL file",
            database=connection.named(configuration),
            reason=database.explain(error),
            advice="run `archiver doctor`",
        )


def _serve_metrics(port: int) -> None:
    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        raise settings.SettingsError(
            f"cannot listen on 127.0.0.1:{port}: {error.strerror or error}. Choose another --metrics-port."
        ) from None


@click.command()
@options.yes_option
def rebuild(*, yes: bool) -> None:
    """Rebuild sessions, chats and messages from the ledger while the receiver runs.

    It proceeds session by session, so dashboards never see an empty archive. If it is interrupted, run it again.
    """
    configuration = settings.read()
    with connection.engine(configuration, create=False) as engine:
        with database.transaction(engine, statement_seconds=600) as opened:
            schema.check(opened)
            events = count_events(opened)
        options.confirm(f"Rebuild the archive from {counted(events, 'ledger row')}?", yes=yes)
        columns = (
            TextColumn("Rebuilding"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        done = 0
        with progress(*columns) as bar:
            task = bar.add_task("", total=events)
            for read in replay(engine, Timing.of(configuration)):
                done += read
                bar.update(task, completed=done, total=max(events, done))
    click.echo(f"The archive was rebuilt from {counted(done, 'ledger row')}.")
