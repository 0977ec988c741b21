"""A running demo whose console has a user of each role, and something to see on each page."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from archiver import database, events
from archiver.console import accounts
from archiver.console.accounts import ROLES
from archiver.database import transaction
from archiver.ledger import quarantine
from tests.support import processes
from tests.support.browsing import PASSWORD
from tests.support.followups import subscribe
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.visitors import Demo
from tests.support.waiting import until


@contextmanager
def running_demo(folder: Path, conversations: int = 40) -> Iterator[Demo]:
    """`archiver demo` with the same conversations each time."""
    log = folder / "log"
    environment = os.environ | {"ARCHIVER_HOME": str(folder / "home"), "COLUMNS": "200"}
    command = ["demo", "--conversations", str(conversations)]
    process = processes.start(command, environment, stdout=log, stderr=log, is_apart=True)
    try:
        until(lambda: "Press Ctrl-C" in log.read_text() or process.poll() is not None, "the demo has started")
        text = log.read_text()
        assert process.poll() is None, text
        yield Demo(
            _said(r"(http://127\.0\.0\.1:\d+)/webhooks", text),
            _said(r"DATABASE_URL='([^']+)'", text),
            _said(r"log in as demo with password (\S+)", text),
            _said(r"x-webhook-secret: ([^']+)'", text),
        )
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _said(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def furnish(demo: Demo) -> None:
    """Add a user of each role, a hold, two quarantined deliveries of which one can be archived, and a subscription.

    The conversation `session-by-hand` gets a revision. All of it is sealed.
    """
    for number, answer in enumerate(("Delivery takes three days.", "Delivery takes five days. We are sorry.")):
        body = created(
            "chat-by-hand", "session-by-hand", 1_705_311_000_000 + number * 60_000, input="When?", output=answer
        )
        demo.post(body)
    demo.post(b'{"message": {"type": "chat.created", "chat": ')
    engine = database.connect(database.database_url(demo.database_url), pool_size=1)
    password_hash = accounts.hash_password(PASSWORD)
    with transaction(engine) as connection:
        for role in ROLES:
            accounts.insert_user(connection, role, role, password_hash, "demo")
        parsed = events.Delivery(events.parse(created("chat-retried", "session-retried")), datetime.now(UTC), None)
        detail = "Postgres refused the event (53100)."
        quarantine.upsert_quarantine(connection, [parsed], quarantine.NOT_STORABLE, detail)
    subscribe(engine, "http://127.0.0.1:9/hooks", "chat.created", after=None)
    engine.dispose()
    assert archiver("seal", database_url=demo.database_url).returncode == 0
