"""A running demo whose console has a user of each role, and something to see on each page."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from archiver import database, events
from archiver.archive import Timing
from archiver.console import accounts
from archiver.database import transaction
from archiver.events import Delivery, responses
from archiver.inbound.writing import store
from archiver.ledger import quarantine
from archiver.settings.console_roles import ROLES
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


TOLD = "session-by-hand"
# Turns of a conversation, each a question and an answer. No webhook delivers the third; history supplies it.
TURNS = (
    ("Hello, where is my order 4711?", "It left our warehouse this morning."),
    ("When will it arrive?", "Delivery takes five days. I am sorry for the delay."),
    ("Can I still change the address?", "Yes, until tomorrow noon. What is the new address?"),
    ("1 Example Street, please.", "Thank you, I have changed it. You will receive a confirmation."),
)
LOST = 2
EARLIER_ANSWER = "Delivery takes three days."


def furnish(demo: Demo) -> None:
    """Add a user of each role, two quarantined deliveries of which one can be archived, and a subscription.

    The conversation `TOLD` has a revision, and a turn that only the history knows. All of it is sealed.
    """
    now = datetime.now(UTC)
    for number, (question, answer) in enumerate(TURNS):
        if number != LOST:
            for text in (EARLIER_ANSWER, answer) if number == 1 else (answer,):
                at = now - timedelta(minutes=len(TURNS) - number, seconds=0 if text == answer else 20)
                assert demo.post(_turn(number, at, question, text)) == 200
    demo.post(b'{"message": {"type": "chat.created", "chat": ')
    engine = database.connect(database.database_url(demo.database_url), pool_size=1)
    password_hash = accounts.hash_password(PASSWORD)
    with transaction(engine) as connection:
        for role in ROLES:
            accounts.insert_user(connection, role, role, password_hash, "demo")
        parsed = Delivery(events.parse(created("chat-retried", "session-retried")), now, None)
        detail = "Postgres refused the event (53100)."
        quarantine.upsert_quarantine(connection, [parsed], quarantine.NOT_STORABLE, detail)
        roles = ("user", "assistant")
        lines = [{"role": role, "content": text} for turn in TURNS for role, text in zip(roles, turn, strict=True)]
        body = json.dumps({"session": {"id": TOLD, "name": "Order 4711", "messages": lines}}).encode()
        reading = Delivery(responses.parse_history(TOLD, 200, body), datetime.now(UTC), None, source=responses.SOURCE)
        store(connection, [reading], Timing())
    subscribe(engine, "http://127.0.0.1:9/hooks", "chat.created", after=None)
    engine.dispose()
    assert archiver("seal", database_url=demo.database_url).returncode == 0


def _turn(number: int, at: datetime, question: str, answer: str) -> bytes:
    times = {"createdAt": f"{at:%Y-%m-%dT%H:%M:%SZ}", "updatedAt": f"{at:%Y-%m-%dT%H:%M:%SZ}"}
    fields = {"input": question, "output": answer, "assistantId": "support", **times}
    return created(f"chat-{number + 1}", TOLD, int(at.timestamp() * 1000), **fields)
