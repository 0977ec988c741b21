"""`archiver console`: the console in a process of its own."""

import signal
import sys

import click
import structlog
import uvicorn

from archiver import database, settings, telemetry
from archiver.cli import connection
from archiver.cli.output import Whole
from archiver.cli.serve import address, allow_files, listening, server_options
from archiver.console import openid
from archiver.database import schema
from archiver.http import create_console, open_files
from archiver.operations import reloading

log = structlog.get_logger(__name__)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8001, show_default=True, type=Whole(0, 65535), help="Port; 0 selects a free one.")
def console(*, host: str, port: int) -> None:
    """Serve the console at /console, without receiving webhooks, until SIGTERM or Ctrl-C.

    `archiver serve` serves it too, unless ARCHIVER_CONSOLE is off. `archiver users add` adds users.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    reloading.block()
    used = reloading.look()
    reloading.require_files(used)
    configuration = settings.read()
    telemetry.configure_logs(configuration.log_level, configuration.log_format)
    connection.warn_of_unknown_variables()
    openid.require(configuration)
    allow_files(open_files(configuration))
    with connection.supervised_database_url(configuration, create=False) as url:
        with connection.engine_at(configuration, url) as engine, database.transaction(engine) as opened:
            schema.check(opened)
        with listening(host, port) as listener:
            log.info("console started", url=f"{address(listener)}/console/", database=connection.named(configuration))
            app = create_console(configuration, database.database_url(url), used)
            uvicorn.Server(uvicorn.Config(app, **server_options(configuration))).run([listener])
