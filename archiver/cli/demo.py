"""`archiver demo` and `archiver simulate`."""

import sys
from typing import get_args

import click
from rich.console import Console

from archiver import settings
from archiver.cli import complain
from archiver.cli.output import Number, Whole
from archiver.simulator.faults import Expired, Faults, with_history_faults
from archiver.simulator.run import run
from archiver.simulator.serving import simulate as serve_simulation
from archiver.simulator.serving import with_secret

SHARE = Number(0, 1)


@click.command()
@click.option(
    "--exit", "exit_when_done", is_flag=True, help="Exit after the comparison instead of continuing to serve."
)
@click.option(
    "--conversations", default=300, show_default=True, type=Whole(1, 10_000), help="Number of conversations."
)
@click.option("--loss", default=0.2, show_default=True, type=SHARE, help="Share of webhooks that never arrive.")
@click.option(
    "--duplicates", default=0.1, show_default=True, type=SHARE, help="Share of webhooks sent more than once."
)
@click.option("--seed", default=1, show_default=True, help="The same seed gives the same conversations and faults.")
def demo(*, exit_when_done: bool, conversations: int, loss: float, duplicates: float, seed: int) -> None:
    """Run a demo on this machine: a database, the receiver and a simulated CallHQ.

    The conversations cross real sockets with losses, duplicates, reordering, deletions before creations and
    forgeries. The archive is compared with the deliveries. Then the histories are fetched, and the archive is
    compared with the platform. Exit 1 if either comparison fails.
    """
    code = run(
        exit_when_done=exit_when_done,
        seed=seed,
        conversations=conversations,
        loss=loss,
        duplicates=duplicates,
        home=settings.read().home / "demo",
        console=Console(),
    )
    sys.exit(code)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", required=True, type=Whole(1, 65535), help="Port of the API, which is under /api.")
@click.option("--webhook", "webhook_url", metavar="URL", help="Receiver of the webhooks; without it none are sent.")
@click.option("--secret", default="", help="Secret that signs the webhooks.  [default: ARCHIVER_WEBHOOK_SECRETS]")
@click.option("--api-key", help="The only x-api-key accepted.  [default: any]")
@click.option("--loss", default=0.0, show_default=True, type=SHARE, help="Share of webhooks that are never sent.")
@click.option("--duplicates", default=0.0, show_default=True, type=SHARE, help="Share of webhooks sent repeatedly.")
@click.option(
    "--reorder",
    default=0.0,
    show_default=True,
    type=SHARE,
    help="Share of webhooks held until a later one has arrived.",
)
@click.option("--delay", default=0.0, show_default=True, type=SHARE, help="Share of webhooks delayed.")
@click.option(
    "--history-faults",
    default=0.0,
    show_default=True,
    type=SHARE,
    help="Share of history calls that fail: 500, 429, invalid JSON, slow, or no response.",
)
@click.option(
    "--history-latency",
    default=0.0,
    show_default=True,
    type=Number(0, 60),
    metavar="SECONDS",
    help="Latency of each history response.",
)
@click.option(
    "--lifetime",
    type=Number(0, min_open=True),
    metavar="SECONDS",
    help="Age at which a session's history expires.  [default: never]",
)
@click.option(
    "--expired",
    default="gone",
    show_default=True,
    type=click.Choice(get_args(Expired)),
    help="Response for an expired history: 410, 404, no messages, or the full history.",
)
@click.option("--keep-deleted", is_flag=True, help="Keep deleted chats in the history.")
@click.option("--seed", default=1, show_default=True, help="The same seed and calls give the same ids and faults.")
def simulate(
    *,
    host: str,
    port: int,
    webhook_url: str | None,
    secret: str,
    api_key: str | None,
    history_faults: float,
    lifetime: float | None,
    expired: Expired,
    keep_deleted: bool,
    seed: int,
    **shares: float,
) -> None:
    """Run only the simulated CallHQ platform.

    Its API is under /api, as CallHQ documents it. Its webhooks are signed according to the settings. GET
    /simulator/report lists the webhooks with their responses, and the history calls with their faults.
    """
    configuration = settings.read()
    if secret:
        configuration = with_secret(configuration, secret)
    faults = Faults(seed=seed, lifetime=lifetime, expired=expired, keep_deleted=keep_deleted, **shares)
    try:
        code = serve_simulation(
            configuration,
            host=host,
            port=port,
            webhook_url=webhook_url,
            faults=with_history_faults(faults, history_faults),
            api_key=api_key,
            announce=lambda url: click.echo(f"The simulated CallHQ API runs at {url}/api. Press Ctrl-C to stop it."),
        )
    except OSError as error:
        complain(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.")
        code = 1
    sys.exit(code)
