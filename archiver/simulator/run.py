"""The demo: a database, a real receiver, the simulated platform and its customers, and then the comparison."""

import asyncio
import contextlib
import fcntl
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from pydantic import SecretStr
from rich.console import Console

from archiver import database, embedded
from archiver.console import accounts
from archiver.database.connections import Connections
from archiver.embedded import EmbeddedError, Postgres
from archiver.errors import ArchiverError
from archiver.inbound import signatures
from archiver.ledger import audit_log
from archiver.settings import Settings
from archiver.simulator import archive_reader, client, comparison, verdict
from archiver.simulator.conversations import conversations
from archiver.simulator.faults import Faults
from archiver.simulator.invalid_deliveries import InvalidDelivery, Proof, invalid_deliveries
from archiver.simulator.platform import Platform, create
from archiver.simulator.receiver import backfilled, receiving
from archiver.simulator.serving import serving, stopping
from archiver.simulator.upstream import Session
from archiver.simulator.view import View
from archiver.simulator.webhooks import Delivery, Record, Sender

DATABASE = "archiver_demo"
MAX_CONVERSATIONS = 10_000
WEBHOOK_PATH = "/webhooks/callhq"
LOOPBACK = "127.0.0.1"


class DemoRunningError(ArchiverError):
    """Another demo is running in this folder."""

    message = "another demo is running in this folder. Stop it, or set ARCHIVER_HOME to another folder."


@dataclass(frozen=True, slots=True)
class _Plan:
    conversations: int
    faults: Faults
    home: Path
    exit_when_done: bool


def run(
    *,
    exit_when_done: bool,
    seed: int,
    conversations: int,
    loss: float,
    duplicates: float,
    home: Path,
    console: Console,
) -> int:
    """Run the demo until Ctrl-C or SIGTERM, or to its end. `home`: folder of the database, which each run empties.

    Returns 0 if the archive equals the deliveries and the platform's histories; 1 if it does not, or if the demo
    failed or was stopped before the comparison. Raises `ValueError` for an invalid probability or number of
    conversations.
    """
    if not 0 < conversations <= MAX_CONVERSATIONS:
        raise ValueError(f"conversations: from 1 to {MAX_CONVERSATIONS}")
    faults = Faults(
        seed=seed,
        loss=loss,
        duplicates=duplicates,
        reorder=0.1,
        delay=0.05,
        deletion_before_creation=0.2,
        output_missing_at_creation=0.1,
        bare_deletion=0.3,
    )
    return asyncio.run(_until_stopped(_Plan(conversations, faults, home, exit_when_done), View(console)))


async def _until_stopped(plan: _Plan, view: View) -> int:
    outcome = _Outcome()
    demo = asyncio.create_task(_demo(plan, view, outcome))
    with stopping(demo.cancel):
        try:
            await demo
        except asyncio.CancelledError:
            view.say("Stopped." if outcome.code is not None else "Stopped before the archive could be compared.")
        except (ArchiverError, OSError, psycopg.Error) as error:
            view.say(str(error))
            return 1
    return 1 if outcome.code is None else outcome.code


@dataclass
class _Outcome:
    code: int | None = None  # None until the archive has been compared


async def _demo(plan: _Plan, view: View, outcome: _Outcome) -> None:
    record, secret = Record(), secrets.token_urlsafe(24)
    signer = _signer(secret)
    async with contextlib.AsyncExitStack() as stack:
        _check_not_running(plan.home)
        view.say("Starting Postgres …")
        postgres = await stack.enter_async_context(_postgres(plan.home))
        stack.enter_context(_lock_home(plan.home))
        await asyncio.to_thread(_empty_database, postgres)
        url = postgres.database_url(DATABASE)
        view.say("Starting archiver serve …")
        webhook_url = await stack.enter_async_context(receiving(url, secret, plan.home / "serve.log")) + WEBHOOK_PATH
        sender = Sender(webhook_url, signer, record)
        platform = Platform(sender, plan.faults, api_key=None)
        api = await stack.enter_async_context(serving(create(platform), LOOPBACK, 0)) + "/api"
        view.say(f"The simulated CallHQ at {api} sends its webhooks to {webhook_url}")
        traffic = await _traffic(plan, view, api, sender)
        holdings = await asyncio.to_thread(archive_reader.read, url)
        problems = verdict.problems(traffic, holdings)
        delivered = bool(traffic.accepted)
        view.results(verdict.figures(traffic, holdings), "what was delivered", problems, has_delivered=delivered)
        problems += await _reconcile(view, url, api, platform.upstream.sessions())
        outcome.code = 1 if problems else 0
        if not plan.exit_when_done:
            psql, password = postgres.psql_command(DATABASE), secrets.token_urlsafe(12)
            await asyncio.to_thread(_add_user, url, password)
            view.print_next_steps(
                receiver=webhook_url, secret=secret, password=password, api=api, psql=psql, database_url=url
            )
            await asyncio.Event().wait()


async def _reconcile(view: View, url: str, api: str, sessions: Sequence[Session]) -> list[str]:
    """Fetch every history, and compare the archive with the platform itself."""
    view.say("Reading the histories, to recover what webhooks lost …")
    backfill = await backfilled(url, api, [session.id for session in sessions])
    archived = await asyncio.to_thread(archive_reader.read_lines, url)
    problems = comparison.history_differences(sessions, archived)
    view.results(verdict.history_figures(archived, backfill), "the platform", problems)
    return problems


def _signer(secret: str) -> signatures.Verifier:
    """Return a verifier with default settings: the receiver does not use those of the environment either."""
    return signatures.verifier(Settings.model_construct(webhook_secrets=SecretStr(secret)))


@contextlib.asynccontextmanager
async def _postgres(home: Path) -> AsyncIterator[Postgres]:
    """Run Postgres during the block. Cancellation during the start waits until the start is complete."""
    starting = asyncio.ensure_future(asyncio.to_thread(embedded.start, home))
    try:
        postgres = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(EmbeddedError):
            await asyncio.to_thread((await starting).stop)
        raise
    try:
        yield postgres
    finally:
        await asyncio.to_thread(postgres.stop)


@contextlib.contextmanager
def _lock_home(home: Path) -> Iterator[None]:
    """Lock the folder during the block.

    Raises `DemoRunningError` if another demo uses the folder, because this one would empty its database.
    """
    with (home / "demo.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoRunningError from None
        yield


def _check_not_running(home: Path) -> None:
    """Raise `DemoRunningError` before anything starts. If the lock cannot be opened, the start reports the cause."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        if (home / "demo.lock").exists():
            with _lock_home(home):
                pass


def _empty_database(postgres: Postgres) -> None:
    name = sql.Identifier(DATABASE)
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(name))


def _add_user(url: str, password: str) -> None:
    """Add the user `demo` of the console, an auditor."""
    password_hash = accounts.hash_password(password)
    with Connections(database.database_url(url)).synchronous() as engine, database.transaction(engine) as connection:
        accounts.insert_user(connection, "demo", "auditor", password_hash, audit_log.actor())


async def _traffic(plan: _Plan, view: View, api: str, sender: Sender) -> verdict.Run:
    """Run all conversations and invalid deliveries until every webhook is answered or abandoned."""
    started = time.monotonic()
    with view.progress(plan.conversations, sender.record) as bar:
        async with client.connect(api, "demo") as http, asyncio.TaskGroup() as group:
            sending = group.create_task(_send_invalid(plan.faults.seed, sender))
            script = conversations(plan.faults.seed, plan.conversations)
            await client.run_all(client.Client(http), script, bar.advance)
        await sender.drain()
        bar.end()
    answered = sending.result()
    excluded = {id(delivery) for _, delivery in answered}
    webhooks = [delivery for delivery in sender.record.deliveries if id(delivery) not in excluded]
    return verdict.Run(webhooks, answered, time.monotonic() - started)


async def _send_invalid(seed: int, sender: Sender) -> list[tuple[InvalidDelivery, Delivery]]:
    signers: dict[Proof, signatures.Verifier | None] = {
        "right": sender.verifier,
        "wrong": _signer(secrets.token_urlsafe(24)),
        "none": None,
    }
    return [
        (invalid, await sender.send(invalid.body, signers[invalid.proof])) for invalid in invalid_deliveries(seed)
    ]
