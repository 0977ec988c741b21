"""No command prints a control character of a stored value on its text output: it would act on the terminal."""

import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from archiver.cli import cli, escaped
from archiver.compliance import erasure
from archiver.compliance.erasure import Criteria
from archiver.database import transaction
from archiver.ledger import audit_log
from archiver.outbound.followups import subscriptions
from tests.support import servers
from tests.support.erasures import hold, record
from tests.support.payloads import created

ON_ONE_VERSION = True  # the commands are the same on every version

CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160), 0x61C, 0x2028, 0x2029, *range(0x202A, 0x202F)]))
HOSTILE = f"boss{CONTROLS}\narchiver: nothing was found\n[bold]\x1b]0;owned\x07"
HOSTILE_ID = f"s{HOSTILE}"[:100]

COMMANDS = [
    ["audit"],
    ["audit", "--kind", "unknown"],
    ["hold", "list", "--all"],
    ["quarantine", "list"],
    ["quarantine", "list", "--reason", "unknown"],
    ["quarantine", "show", "1"],
    ["quarantine", "retry", "--all"],
    ["followups", "list"],
    ["followups", "show", "1"],
    ["followups", "deliveries"],
    ["seals", "list"],
    ["verify"],
    ["status"],
    ["doctor"],
    ["erase", "--session", HOSTILE_ID, "--reason", "r", "--dry-run"],
    ["erase", "--session", f"unknown{HOSTILE_ID}"[:100], "--reason", "r", "--dry-run"],
    ["erase", "--where", f"{HOSTILE}=x", "--reason", "r", "--dry-run"],
    ["retention", "--dry-run"],
    ["backfill", "--all", "--dry-run"],
    ["migrate", "--check"],
]


@given(st.text())
def test_an_escaped_value_is_on_one_line_and_has_no_control_character(value: str) -> None:
    result = escaped(value)
    kinds = {unicodedata.category(each) for each in set(result) - set("\u200c\u200d")}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert result == value or not value.isprintable()


@pytest.mark.parametrize(
    "value", ["a\u00a0b", "\u5c71\u7530\u3000\u592a\u90ce", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
)
def test_spaces_and_joiners_of_ordinary_text_stay(value: str) -> None:
    assert escaped(value) == value


@pytest.fixture
def _hostile_archive(engine: Engine) -> None:
    """An archive in which every text that comes from outside holds control characters."""
    body = created("c1", HOSTILE_ID, assistantId=HOSTILE_ID, assistantOverrides={"variableValues": {HOSTILE: "x"}})
    record(engine, body, created("c1\x1b[31m", HOSTILE_ID))
    hold(engine, session_id=HOSTILE_ID)
    with transaction(engine) as connection:
        placed = erasure.insert_hold(connection, Criteria(variable=HOSTILE, value=HOSTILE), HOSTILE, HOSTILE)
        erasure.release_hold(connection, placed, HOSTILE, HOSTILE)
        audit_log.insert_entry(connection, "export", HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
        only = {"assistant_id": HOSTILE, "variable": HOSTILE, "value": HOSTILE, "contains": HOSTILE}
        values = {"url": f"http://127.0.0.1/{HOSTILE}", "events": ["chat.created"], "secret": "x", **only}
        made = subscriptions.insert_subscription(connection, {"is_ordered": True, "concurrency": 1, **values}, None)
        subscriptions.pause(connection, made, HOSTILE)
        connection.execute(
            text(
                "INSERT INTO archiver.quarantine (received_at, last_received_at, delivery_count, reason, detail,"
                " body, body_digest, source, type, session_id, key_id)"
                " VALUES (:at, :at, 1, :text, :text, :body, :body, :text, :text, :id, :text)"
            ),
            {"at": datetime.now(UTC), "text": HOSTILE, "body": HOSTILE.replace("\n", " ").encode(), "id": HOSTILE_ID},
        )
        connection.execute(text("CREATE FUNCTION archiver.\"f\x1b[31m\n\"() RETURNS int LANGUAGE sql AS 'SELECT 1'"))


@pytest.mark.usefixtures("_hostile_archive")
@pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
def test_no_command_prints_a_control_character_of_a_stored_value(database_url: str, tmp_path: Path) -> None:
    environment = {
        "DATABASE_URL": database_url,
        "ARCHIVER_HOME": str(tmp_path),
        "ARCHIVER_RETENTION_DAYS": "1",
        "ARCHIVER_WEBHOOK_SECRETS": "x" * 40,
        "CALLHQ_API_KEY": "key",
        "CALLHQ_API_URL": "http://127.0.0.1:9",
    }
    printed = {}
    for command in COMMANDS:
        result = CliRunner().invoke(cli, command, env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        printed[" ".join(command)] = result.output
    acting = {command: found for command, output in printed.items() if (found := _acting(output))}
    assert acting == {}
    for name in ("audit", "hold list --all", "quarantine list", "quarantine show 1", "followups list"):
        assert "\\x1b" in printed[name]


def _acting(output: str) -> Sequence[str]:
    acting = re.findall(r"[^\x00-\x1f\x7f-\x9f]{,20}[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028-\u202e]", output)
    return acting + re.findall(r"^archiver: nothing was found.*", output, re.MULTILINE)
