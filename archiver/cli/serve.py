"""`archiver serve` and `archiver migrate`."""

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import click
import structlog
import uvicorn
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from uvicorn.supervisors import Multiprocess

from archiver import database, settings, telemetry
from archiver.cli import connection, escaped, fail, options
from archiver.cli.output import Whole
from archiver.compliance.seals import signing_key
from archiver.console import openid
from archiver.database import catalogue, schema
from archiver.database.connections import Connections
from archiver.http import WEBHOOK_PATH, create, open_files
from archiver.inbound import signatures
from archiver.inbound.spool import MIN_ROOM_BYTES, SPOOL_FOLDER, SpoolError, select_room
from archiver.operations import reloading
from archiver.operations.audit_settings import record_settings
from archiver.settings import Settings, SettingsError
from archiver.telemetry.metrics_folder import shared_metrics
from archiver.worker.worker_process import running_worker

log = structlog.get_logger(__name__)

DRAIN_SECONDS = 30
BACKLOG = 2048


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, type=Whole(0, 65535), help="Port; 0 selects a free one.")
@click.option("--workers", default=1, show_default=True, type=Whole(1, 64), help="Number of receiving processes.")
@click.option(
    "--migrate/--no-migrate",
    default=None,
    help="Migrate the schema to head first.  [default: only with the embedded database]",
)
@click.option(
    "--insecure", is_flag=True, help="Accept unsigned deliveries if no secret is set. Never use it in public."
)
@click.option(
    "--worker/--no-worker",
    "has_worker",
    default=True,
    show_default=True,
    help="Also run the background duties; with --no-worker, run `archiver worker` elsewhere.",
)
def serve(*, host: str, port: int, workers: int, migrate: bool | None, insecure: bool, has_worker: bool) -> None:
    """Receive webhooks at POST /webhooks/callhq until SIGTERM or Ctrl-C.

    A worker process fetches histories (with CALLHQ_API_KEY), publishes changes, seals the ledger and completes
    erasures, unless --no-worker is given. On SIGTERM or Ctrl-C the receiver accepts no further deliveries, writes the
    accepted ones, responds to them, and exits 0.
    """
    # From the start, so that no signal is lost. Uvicorn handles them while it serves, then raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    reloading.block()
    used = reloading.look()
    reloading.require_files(used)
    configuration = settings.read()
    telemetry.configure_logs(configuration.log_level, configuration.log_format)
    connection.warn_of_unknown_variables()
    configuration = _require_authentication(configuration, insecure=insecure)
    signing_key(configuration)
    openid.require(configuration)
    database_name = connection.named(configuration)
    allow_files(open_files(configuration))
    with (
        connection.supervised_database_url(configuration) as url,
        shared_metrics(configuration.home, workers + has_worker),
    ):
        should_migrate = configuration.database_url is None if migrate is None else migrate
        _prepare(configuration, url, database_name, should_migrate=should_migrate)
        environment = _inherited_environment(configuration, url)
        os.environ.update(environment)
        for name in environment:
            os.environ.pop(f"{name}_FILE", None)
        configuration = configuration.model_copy(update={"database_url": SecretStr(url)})
        with listening(host, port) as listener:
            log.info("receiver started", url=f"{address(listener)}{WEBHOOK_PATH}", database=database_name)
            with running_worker(environment, url) if has_worker else nullcontext() as worker_process:
                forward = None if worker_process is None else worker_process.hang_up
                if workers == 1:
                    _receive(configuration, used, listener, forward)
                else:
                    _receive_in_processes(configuration, listener, workers, forward)


_WITHOUT_SECRETS = """
To try the archiver without a secret: archiver serve --insecure
With make: make run ARGS=--insecure"""


def _require_authentication(configuration: Settings, *, insecure: bool) -> Settings:
    if insecure and (not configuration.secrets or configuration.webhook_scheme == "none"):
        log.warning("signatures not verified; anyone who reaches this port can write to the archive")
        return configuration.model_copy(update={"webhook_scheme": "none"})
    if configuration.webhook_scheme == "none" and not insecure:
        raise SettingsError(
            "ARCHIVER_WEBHOOK_SCHEME is none: anyone could write to the archive. Choose another scheme,"
            " or pass --insecure."
        )
    try:
        signatures.verifier(configuration)
    except SettingsError as error:
        hint = "" if configuration.secrets else _WITHOUT_SECRETS
        raise SettingsError(f"{error}{hint}") from None
    return configuration


def allow_files(needed: int) -> None:
    """Raise the soft limit on open files: each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        log.warning(
            "open file limit too low for ARCHIVER_MAX_CONNECTIONS; raise it (ulimit -Hn)",
            limit=hard,
            needed=needed,
        )


def _prepare(configuration: Settings, url: str, database_name: str, *, should_migrate: bool) -> None:
    try:
        with Connections(database.database_url(url), configuration.prepared_statements).synchronous() as engine:
            if should_migrate:
                schema.upgrade(engine, variables=configuration.promoted_variables)
            with database.transaction(engine) as opened:
                schema.check(opened)
            record_settings(engine, configuration, "serve")
    except SQLAlchemyError as error:
        if not database.is_connection_failure(error) or not _can_spool(configuration):
            raise
        # Deliveries to a stopped receiver are not sent again.
        log.error(  # noqa: TRY400  # a traceback would add nothing
            "database unavailable; spooling (run `archiver doctor`)",
            database=database_name,
            reason=database.explain(error),
        )


def _can_spool(configuration: Settings) -> bool:
    if configuration.spool == "off":
        return False
    try:
        return select_room(configuration.home.resolve() / SPOOL_FOLDER) >= MIN_ROOM_BYTES
    except SpoolError:
        return False


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket. Raises `SettingsError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host."
        ) from None
    with listener:
        yield listener


def address(listener: socket.socket) -> str:
    """Return the URL of the listening socket, without a path."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if listener.family == socket.AF_INET6 else host
    return f"http://{shown}:{port}"


# No WebSocket: no route uses it, and an upgrade would bypass the routes.
_SERVER = {
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "ws": "none",
    "http": "archiver.http.connections:Connection",
    "loop": "archiver.http.listening:DrainingLoop",
    "timeout_graceful_shutdown": DRAIN_SECONDS,
    "backlog": BACKLOG,
}


def server_options(configuration: Settings) -> dict[str, Any]:
    """Return the options of the HTTP server."""
    # Only signatures that cover the URL need the scheme and host with which a proxy was called.
    return _SERVER | {"proxy_headers": "{url}" in configuration.hmac_template}


Forward = Callable[[], None] | None  # passes SIGHUP on to the worker


def _receive(configuration: Settings, used: Mapping[str, str], listener: socket.socket, forward: Forward) -> None:
    server = uvicorn.Server(uvicorn.Config(create(configuration, used, forward), **server_options(configuration)))
    server.run([listener])
    if not server.started:
        sys.exit(1)


def _receive_in_processes(configuration: Settings, listener: socket.socket, workers: int, forward: Forward) -> None:
    """Run several receiving processes, which inherit the decisions of this process from the environment."""
    server = uvicorn.Config("archiver.http:create", factory=True, workers=workers, **server_options(configuration))
    _Processes(server, listener, forward).run()


class _Processes(Multiprocess):
    """Uvicorn's process supervisor, which also closes its own listening socket."""

    def __init__(self, server: uvicorn.Config, listener: socket.socket, forward: Forward) -> None:
        super().__init__(server, sockets=[listener])
        self._forward = forward

    def handle_signals(self) -> None:
        """Forward SIGHUP to all processes, so that each reloads its settings files."""
        while signal.sigtimedwait({signal.SIGHUP}, 0) is not None:
            if self._forward is not None:
                self._forward()
            for process in self.processes:
                if process.pid is not None and process.exitcode is None:
                    os.kill(process.pid, signal.SIGHUP)
        super().handle_signals()

    def terminate_all(self) -> None:
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


def _inherited_environment(configuration: Settings, url: str) -> dict[str, str]:
    """Return the environment for child processes: the embedded database and --insecure."""
    decided = {} if configuration.database_url else {"DATABASE_URL": url}
    return decided | ({"ARCHIVER_WEBHOOK_SCHEME": "none"} if configuration.webhook_scheme == "none" else {})


@click.command()
@click.option(
    "--check", is_flag=True, help="Only report the revision and each difference from the schema of this version."
)
@click.option("--repair", is_flag=True, help="Repair differences that SQL statements can undo, then report.")
@options.json_option
def migrate(check: bool, repair: bool, as_json: bool) -> None:
    """Migrate the database to the schema of this version.

    Safe to run while receivers run. A second concurrent run waits for the first. Exit 1 if the schema then differs
    from the schema that this version expects.
    """
    if check and repair:
        raise click.UsageError("use either --check or --repair")
    configuration = settings.read()
    telemetry.configure_logs("warning", configuration.log_format)
    with connection.engine(configuration, create=not check) as engine:
        if not check:
            schema.upgrade(engine, variables=configuration.promoted_variables)
        if repair:
            for difference in _repaired(engine, configuration):
                click.echo(f"Repaired: {escaped(difference.detail)}", err=as_json)
        _report(engine, configuration, as_json=as_json)


def _repaired(engine: Engine, configuration: Settings) -> list[catalogue.Difference]:
    with database.transaction(engine, statement_seconds=schema.STATEMENT_SECONDS) as opened:
        schema.check(opened)
        return catalogue.repair(opened, configuration.promoted_variables)


def _report(engine: Engine, configuration: Settings, *, as_json: bool) -> None:
    with database.transaction(engine) as opened:
        at = schema.current(opened)
        variables = configuration.promoted_variables
        differences = catalogue.select_differences(opened, variables) if at == schema.head() else []
        if as_json:
            output = [
                {"object": each.object, "verdict": each.verdict, "detail": each.detail, "advice": each.advice}
                for each in differences
            ]
            click.echo(json.dumps({"schema": at, "head": schema.head(), "differences": output}))
        schema.check(opened)
    for each in differences:
        click.echo(f"archiver: {each.verdict}: {escaped(each.detail)}\n  -> {escaped(each.advice)}", err=True)
    if failures := sum(each.verdict == "failure" for each in differences):
        fail(f"the schema is at {schema.head()}, with {failures:,} differences")
    if not as_json:
        click.echo(f"The schema is at {schema.head()}, as this version requires.")
