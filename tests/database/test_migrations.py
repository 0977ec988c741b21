"""Landed migrations stay as they are, and databases that earlier texts of them created are repaired."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

from archiver.database import roles, schema, transaction
from tests.conftest import Cluster
from tests.support import servers
from tests.support.rows import execute, rows
from tests.support.searching import index, keys

MIGRATIONS = Path("migrations").resolve()
VERSIONS = sorted((MIGRATIONS / "versions").glob("[0-9]*.py"))
DIGESTS = MIGRATIONS / "digests.txt"
EARLIER = Path("tests/landed").resolve()

# Each earlier text that a landed migration had, as a difference to the present one, and the digest of the whole.
TEXTS = {
    "0001a": "245d6e78bcde640cd48f01657792dbf55653f08668edfc54e130ac863511e547",
    "0001b": "74cd27f11d99ae9ca31fabd68622726c28434940d8dd2d4bbc2e88275b9a6059",
    "0002a": "136c5b4ec2c97d9dc4c8e83e19c91febe75c9da00324b223c8232fdb3e4566bb",
    "0002b": "72eadccd5cdcd650e9c5468f360f7e622142a6cb69f596f02ba715faf3a268a2",
    "0002c": "16152aeb253dd32a7c441196a19d9e04d728f6f9a362a0d3eee5e29495fffefc",
    "0003a": "3a6020b615a9b2932df9adc11902c4bbb8663c1f799f4f07de0ab75ae91b8dd1",
    "0003b": "bf7fa95acc45d612b61209c71bc7a5115623a957f2dcd779b8aa5fbc43e8b92a",
    "0003c": "261a53c1f06efad9c217906bdd502a1a76baaa7a16001421002116da68b71cd4",
    "0003d": "0d996ae93f5573d7ae0612c2bf6fd805d9cc4c7285d474ba025fecc217841d77",
    "0003e": "811383d65d89c3234906781229a5fefca474bf9bb77ddbde4936d03806475d7f",
    "0005a": "ddbef26710cd71b4cbd97c86d88ee2ce01103f4d3f030d9d1ec71571898e65c1",
    "0005b": "1ce467bfe55b49c041299e9d11b4b5dc1760621d40eb322ad1076102d8215e96",
}

# What a database had run: the text of each of its migrations, in order; a bare number is the present text. 0001a went
# no further, because 0002 adds columns that it had; 0002a and 0002b only to 0003a, since later texts of 0003 use a
# column that they lack.
HISTORIES = [
    "0001a",
    "0001b",
    "0001",
    "0001b 0002a",
    "0001b 0002b",
    "0001 0002b",
    "0001 0002c",
    "0001 0002",
    "0001b 0002a 0003a",
    "0001 0002c 0003b",
    "0001 0002 0003c",
    "0001 0002 0003d",
    "0001 0002 0003e",
    "0001b 0002a 0003a 0004 0005a",
    "0001b 0002b 0003a 0004 0005",
    "0001b 0002c 0003a 0004 0005b",
    "0001b 0002c 0003b 0004",
    "0001b 0002c 0003c 0004 0005a",
    "0001 0002 0003d 0004 0005b",
    "0001b 0002c 0003e 0004 0005",
    "0001 0002 0003 0004 0005",
]

# Once granted, and no longer.
GRANTS = (
    "GRANT INSERT ON archiver.events, archiver.recounts, archiver.acts, archiver.erasures, archiver.removals"
    " TO archiver_writer",
    "GRANT INSERT ON archiver.acts TO archiver_auditor",
    "GRANT INSERT (id) ON archiver.events TO archiver_writer",
    "GRANT SELECT ON archiver.messages TO archiver_reader",
    "GRANT USAGE ON SCHEMA archiver TO archiver_reader",
    "GRANT CREATE ON SCHEMA analytics TO archiver_reader",
    "GRANT UPDATE ON SEQUENCE archiver.events_id_seq TO archiver_writer",
    "GRANT EXECUTE ON FUNCTION archiver.settle() TO archiver_auditor",
    "GRANT SELECT ON analytics.chats TO archiver_reader WITH GRANT OPTION",
)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_landed_migration_is_never_edited() -> None:
    landed = {name: known for known, name in map(str.split, DIGESTS.read_text().splitlines())}
    present = {path.name: digest(path.read_bytes()) for path in VERSIONS}
    edited = [name for name, known in landed.items() if present.get(name) != known]
    assert edited == [], "write a new migration instead: docs/development.md"
    assert sorted(present.keys() - landed.keys()) == [], "run `make schema` to add its digest"


def test_one_migration_follows_another() -> None:
    numbers = [path.name[:4] for path in VERSIONS]
    assert numbers == [f"{number:04}" for number in range(1, len(VERSIONS) + 1)]


def patched(base: str, patch: str) -> str:
    """The text that a unified difference without context makes of another."""
    lines, made, at = base.splitlines(keepends=True), [], 0
    for line in patch.splitlines(keepends=True)[2:]:
        if hunk := re.match(r"@@ -(\d+)(?:,(\d+))? ", line):
            start = int(hunk[1]) - (hunk[2] != "0")
            made += lines[at:start]
            at = start
        elif line.startswith("-"):
            assert lines[at] == line[1:]
            at += 1
        else:
            made.append(line[1:])
    return "".join([*made, *lines[at:]])


def text_of(name: str) -> tuple[str, str]:
    """File name and text of a migration: of an earlier text, or of the present one."""
    (path,) = (path for path in VERSIONS if path.name.startswith(name[:4]))
    present = path.read_text(encoding="utf-8")
    if len(name) == 4:
        return path.name, present
    earlier = patched(present, (EARLIER / f"{name}.patch").read_text(encoding="utf-8"))
    assert digest(earlier.encode()) == TEXTS[name]
    return path.name, earlier


def upgrade_by(engine: Engine, history: str, folder: Path) -> None:
    """Bring a database to where this history left it. At each step the migrations before have their present text."""
    for name in history.split():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(MIGRATIONS, folder)
        file, content = text_of(name)
        (folder / "versions" / file).write_text(content, encoding="utf-8")
        with transaction(engine) as connection:
            connection.execute(text("CREATE SCHEMA IF NOT EXISTS archiver"))
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(folder).replace("%", "%%"))
            command.upgrade(config, name[:4])


def dumped(url: str) -> list[str]:
    """The schema with its grants, as pg_dump writes it."""
    run = subprocess.run([servers.program("pg_dump"), "-s", "-d", url], check=True, capture_output=True, text=True)
    # The key that restricts psql is random in each dump.
    return [line for line in run.stdout.splitlines() if not re.match(r"\\(un)?restrict ", line)]


@pytest.fixture(scope="module")
def fresh(cluster: Cluster) -> Iterator[list[str]]:
    """The dump of a database that the present migrations created."""
    url = cluster.clone()
    yield dumped(url)
    cluster.drop(url)


@pytest.mark.parametrize("history", HISTORIES)
def test_every_database_that_an_earlier_text_created_comes_to_the_schema_of_a_fresh_one(
    empty: Engine, empty_database_url: str, fresh: list[str], history: str, tmp_path: Path
) -> None:
    upgrade_by(empty, history, tmp_path / "migrations")
    if history.rsplit(maxsplit=1)[-1] >= "0003":
        execute(empty, *GRANTS)
    schema.upgrade(empty)
    assert dumped(empty_database_url) == fresh
    with transaction(empty) as connection:
        assert roles.are_granted(connection)


def test_the_histories_hold_every_earlier_text() -> None:
    assert {name for history in HISTORIES for name in history.split() if len(name) > 4} == TEXTS.keys()
    assert {path.stem for path in EARLIER.glob("*.patch")} == TEXTS.keys()


def test_the_repair_keeps_what_the_first_text_knew_of_sessions(empty: Engine, tmp_path: Path) -> None:
    upgrade_by(empty, "0001a", tmp_path / "migrations")
    execute(
        empty,
        "INSERT INTO archiver.sessions (session_id, name, status, assistant_id, first_event_at, last_event_at)"
        " VALUES ('s', 'Ann', 'active', 'a', now(), now())",
        "INSERT INTO archiver.chats (session_id, chat_id, first_received_at, deleted_at, source)"
        " VALUES ('s', 'c', now(), '2026-01-01Z', 'webhook')",
        "INSERT INTO archiver.messages (session_id, chat_id, ordinal, role, content, source)"
        " VALUES ('s', 'c', 0, 'user', 'Hello', 'webhook')",
    )
    before = rows(empty, "SELECT name, status, assistant_id, deleted_chats, messages FROM analytics.conversations")
    schema.upgrade(empty)
    after = rows(empty, "SELECT name, status, assistant_id, deleted_chats, messages FROM analytics.conversations")
    assert after == before == [("Ann", "active", "a", 1, 1)]


def test_the_repair_clears_the_value_of_a_hold_that_was_released_before(empty: Engine, tmp_path: Path) -> None:
    upgrade_by(empty, "0001 0002 0003c", tmp_path / "migrations")
    execute(
        empty,
        "INSERT INTO archiver.holds (placed_at, author, reason, variable, value)"
        " VALUES (now(), 'x', 'y', 'email', 'ann@example.com'), (now(), 'x', 'y', 'email', 'bob@example.com')",
        "UPDATE archiver.holds SET released_at = now(), released_by = 'x' WHERE id = 1",
    )
    schema.upgrade(empty)
    assert rows(empty, "SELECT id, value FROM archiver.holds ORDER BY id") == [(1, None), (2, "bob@example.com")]


def test_messages_of_an_earlier_version_are_found_after_0025_and_its_downgrade_leaves_nothing(empty: Engine) -> None:
    schema.upgrade(empty, "0024")
    execute(
        empty,
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at)"
        " VALUES ('s', '2025-01-01Z', '2025-01-01Z')",
        "INSERT INTO archiver.chats (session_id, chat_id, first_received_at, source)"
        " VALUES ('s', 'c', '2025-01-01Z', 'webhook')",
        "INSERT INTO archiver.messages (session_id, chat_id, ordinal, role, content, source)"
        " VALUES ('s', 'c', 0, 'user', 'Hello', 'webhook')",
    )
    for _ in range(2):
        schema.upgrade(empty)
        index(empty, "simple")
        assert keys(empty, "hello") == [("s", "c", 0)]
        schema.downgrade(empty, "0024")
        assert rows(empty, "SELECT count(*) FROM pg_class WHERE relname = 'y2025m01' OR relname LIKE 'search%'") == [
            (0,)
        ]


def test_a_greeting_and_turns_that_only_history_knows_are_kept_by_0021_and_its_downgrade(empty: Engine) -> None:
    schema.upgrade(empty, "0020")
    execute(
        empty,
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, repaired_messages)"
        " VALUES ('s', '2026-01-01Z', '2026-01-01Z', 1), ('t', '2026-01-02Z', '2026-01-02Z', 0)",
        "INSERT INTO archiver.chats (session_id, chat_id, first_received_at, created_at, cost, source)"
        " VALUES ('s', 'c', '2026-01-01Z', '2025-12-31Z', 0.25, 'webhook'),"
        " ('s', E'\\x1f1', '2026-01-02Z', NULL, NULL, 'history')",
        "INSERT INTO archiver.messages (session_id, chat_id, ordinal, role, content, source, place)"
        " VALUES ('s', E'\\x1f', 0, 'assistant', 'Welcome', 'history', 1),"
        " ('s', 'c', 0, 'user', 'Hello', 'webhook', 2), ('s', E'\\x1f1', 0, 'user', 'Lost', 'history', 3),"
        " ('t', E'\\x1f', 0, 'assistant', 'Welcome', 'history', 1)",
    )
    views = {
        "conversations": "session_id, chats, messages, repaired_messages, cost, started_at, last_message_at",
        "chats": "session_id, chat_id, created_at, first_received_at",
        "messages": "session_id, position, chat_id, content, created_at",
    }

    def seen() -> dict[str, list[tuple[object, ...]]]:
        return {
            view: rows(empty, f"SELECT {names} FROM analytics.{view} ORDER BY 1, 2") for view, names in views.items()
        }

    def described() -> list[tuple[object, ...]]:
        return rows(
            empty,
            "SELECT c.relname, a.attname, format_type(a.atttypid, NULL), col_description(c.oid, a.attnum)"
            " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0"
            " WHERE c.relnamespace = 'analytics'::regnamespace ORDER BY 1, a.attnum",
        )

    before, description = seen(), described()
    schema.upgrade(empty)
    assert seen() == before
    turns = "SELECT session_id, turn_id, began_at::date::text FROM analytics.lines ORDER BY 1, 2"
    upgraded = [
        ("s", "c", "2025-12-31"),
        ("s", "s#0", "2026-01-01"),
        ("s", "s#1", "2026-01-02"),
        ("t", "t#0", "2026-01-02"),
    ]
    assert rows(empty, turns) == upgraded
    schema.downgrade(empty, "0020")
    assert (seen(), described()) == (before, description)
    schema.upgrade(empty)
    assert rows(empty, turns) == upgraded


def test_users_with_passwords_are_kept_by_0031_and_its_downgrade_removes_those_without(empty: Engine) -> None:
    schema.upgrade(empty, "0030")
    columns = "name, role, password_hash, added_at, changed_at"
    execute(
        empty,
        f"INSERT INTO archiver.users ({columns}) VALUES ('ada', 'reader', 'hash', '2026-01-01Z', '2026-01-01Z')",
    )
    before = rows(empty, f"SELECT {columns}, disabled_at FROM archiver.users")
    for _ in range(2):
        schema.upgrade(empty)
        assert rows(empty, f"SELECT {columns}, disabled_at FROM archiver.users") == before
        execute(
            empty,
            f"INSERT INTO archiver.users ({columns}, issuer, subject)"
            " VALUES ('ada~1', 'reader', NULL, '2026-01-01Z', '2026-01-01Z', 'https://login.example', '1')",
            "INSERT INTO archiver.logins (token_digest, user_name, began_at, seen_at)"
            " VALUES ('a', 'ada', '2026-01-01Z', '2026-01-01Z'), ('b', 'ada~1', '2026-01-01Z', '2026-01-01Z')",
        )
        schema.downgrade(empty, "0030")
        assert rows(empty, f"SELECT {columns}, disabled_at FROM archiver.users") == before
        assert rows(empty, "SELECT user_name FROM archiver.logins") == [("ada",)]
        execute(empty, "DELETE FROM archiver.logins")
