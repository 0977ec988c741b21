"""Holds equal the audit log, each user adds only its own kinds of entry, and seals claim only their rows."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from subprocess import CompletedProcess
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, SQLAlchemyError

from archiver.compliance import erasure, legal_holds, seals
from archiver.compliance.erasure import Criteria, Target
from archiver.compliance.erasure.retention import Rules, expire, preview
from archiver.compliance.seals import chain
from archiver.database import catalogue, schema, snapshot, transaction
from archiver.ledger import audit_log
from tests.support import servers
from tests.support.erasures import ACT, TIMING, as_writer, erase, hold, record, sweep, texts
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.rows import execute, rows

ON_ONE_VERSION = True  # the guards are the same text in every version

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)
VARIABLE: dict[str, Any] = {"assistantOverrides": {"variableValues": {"customer": "Mary"}}}


def release(engine: Engine, hold_id: int) -> None:
    with transaction(engine) as connection:
        erasure.release_hold(connection, hold_id, "judge@court", "closed")


def found(engine: Engine) -> list[tuple[str, int, str]]:
    with snapshot(engine, statement_seconds=60) as connection:
        return [(each.table, each.id, each.fault) for each in seals.verify(connection)]


def held(engine: Engine, *targets: Target) -> dict[Target, list[int]]:
    with transaction(engine) as connection:
        return dict(erasure.covering(connection, targets))


@pytest.mark.parametrize(
    "tampering",
    [
        "DELETE FROM archiver.holds",
        "UPDATE archiver.holds SET released_at = now(), released_by = 'x'",
        "UPDATE archiver.holds SET session_id = 'other', assistant_id = 'other'",
        "UPDATE archiver.holds SET until = '2001-01-01Z'",
        "UPDATE archiver.holds SET value = 'Bob' WHERE variable IS NOT NULL",
    ],
)
@pytest.mark.parametrize(
    "criteria",
    [
        {"session_id": "s1"},
        {"assistant_id": "assistant-1"},
        {"variable": "customer", "value": "Mary"},
        {"since": datetime(2024, 1, 1, tzinfo=UTC)},
    ],
)
def test_i8_a_hold_whose_row_is_tampered_with_still_holds_and_is_named(
    engine: Engine, tampering: str, criteria: dict[str, Any]
) -> None:
    record(engine, created("c1", "s1", **VARIABLE))
    hold_id = hold(engine, **criteria)
    seals.seal(engine)
    assert found(engine) == []
    execute(engine, tampering, unguarded=True)
    is_changed = "Bob" not in tampering or "variable" in criteria
    assert held(engine, Target("s1")) == {Target("s1"): [hold_id]}
    with pytest.raises(erasure.HeldError):
        erase(engine, Target("s1"))
    assert [each[:2] for each in found(engine)] == ([("holds", hold_id)] if is_changed else [])
    release(engine, hold_id)
    assert held(engine, Target("s1")) == {}
    erase(engine, Target("s1"))
    assert texts(engine, "s1") == []


def test_i8_a_hold_by_variable_whose_row_is_lost_covers_every_value_and_no_session_without_it(engine: Engine) -> None:
    other: dict[str, Any] = {"assistantOverrides": {"variableValues": {"customer": "Bob"}}}
    record(engine, created("c1", "s1", **VARIABLE), created("c2", "s2", **other), created("c3", "s3"))
    hold(engine, variable="customer", value="Mary")
    targets = [Target("s1"), Target("s2"), Target("s3")]
    assert held(engine, *targets).keys() == {Target("s1")}
    execute(engine, "DELETE FROM archiver.holds", unguarded=True)
    assert held(engine, *targets).keys() == {Target("s1"), Target("s2")}


def test_i8_the_audit_log_holds_no_value_and_no_salt_of_a_released_hold(engine: Engine) -> None:
    hold_id = hold(engine, variable="customer", value="Mary")
    ((detail, salt),) = rows(engine, "SELECT a.detail, h.salt FROM archiver.acts a CROSS JOIN archiver.holds h")
    assert "Mary" not in json.dumps(detail)
    assert detail["value_digest"] == legal_holds.value_digest(bytes(salt), "Mary")
    release(engine, hold_id)
    assert rows(engine, "SELECT value, salt FROM archiver.holds") == [(None, None)]
    assert found(engine) == []


def test_i8_a_hold_without_an_entry_holds_too_and_is_named(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    execute(
        engine,
        "INSERT INTO archiver.holds (placed_at, author, reason, session_id) VALUES (now(), 'x', 'y', 's1')",
    )
    assert held(engine, Target("s1")).keys() == {Target("s1")}
    assert found(engine) == [("holds", 1, "without_act")]


@pytest.mark.parametrize("column", ["reason", "author"])
def test_i9_a_changed_reason_or_author_of_a_hold_is_found(engine: Engine, column: str) -> None:
    hold_id = hold(engine, session_id="s1")
    execute(engine, f"UPDATE archiver.holds SET {column} = 'another'", unguarded=True)
    assert found(engine) == [("holds", hold_id, "differs_from_log")]


RULES = Rules(content=0, by_assistant={}, metadata=1)


def test_i9_retention_refuses_what_a_lost_hold_covers(engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    hold(engine, session_id="s1")
    execute(engine, "DELETE FROM archiver.holds", unguarded=True)
    rules, later = Rules(content=1, by_assistant={}, metadata=0), datetime.now(UTC) + timedelta(days=900)
    due = preview(engine, rules, later)
    assert (due.held, due.content.total()) == (1, 0)
    for _ in expire(engine, rules, later, timing=TIMING, due=due, who="archiver"):
        pass
    sweep(engine)
    assert texts(engine, "s1") == ["question of c1", "answer to c1"]


FORGED = """
    WITH act AS (
        INSERT INTO archiver.acts (at, actor, kind, detail)
        VALUES (now(), 'archiver', 'retention', '{"rules": {"metadata": 30, "content": 30}}') RETURNING id
    ) %s
"""
FORGED_REMOVAL = FORGED % (
    "INSERT INTO archiver.removals (event_id, act_id)"
    " SELECT e.id, act.id FROM act, archiver.events e WHERE e.session_id = 's1'"
)
FORGED_ERASURE = FORGED % (
    "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
    " SELECT 's1', '', now(), 'retention', id FROM act"
)
WIPE = "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = sha256(salt || dedupe_key)"


@pytest.mark.parametrize("is_sealed", [True, False])
def test_i9_what_a_writer_forges_against_a_hold_is_named(
    engine: Engine, database_url: str, *, is_sealed: bool
) -> None:
    record(engine, created("c1", "s1"), created("c2", "s2"))
    hold(engine, session_id="s1")
    seals.seal(engine)
    with as_writer(database_url) as writer:
        execute(writer, FORGED_ERASURE, f"{WIPE} WHERE session_id = 's1'")
        if is_sealed:
            seals.seal(writer)
        assert found(engine) == [("erasures", 1, "held")]
        execute(writer, FORGED_REMOVAL, "DELETE FROM archiver.events WHERE session_id = 's1'")
        if is_sealed:
            seals.seal(writer)
    assert found(engine) == [("erasures", 1, "held"), ("removals", 1, "held")]


@on_one_version
def test_i9_the_command_names_the_hold(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    hold_id = hold(engine, session_id="s1")
    execute(engine, FORGED_ERASURE, f"{WIPE} WHERE session_id = 's1'")
    execute(engine, "DELETE FROM archiver.holds", unguarded=True)
    process = archiver("verify", database_url=database_url)
    assert process.returncode == 1
    assert f"hold {hold_id}: its row is missing" in process.stdout + process.stderr
    assert f"erasure 1, legal hold {hold_id}: the hold was in force" in process.stdout + process.stderr
    listed = archiver("hold", "list", database_url=database_url)
    assert "case 7" in listed.stdout
    assert archiver("hold", "release", str(hold_id), "--reason", "x", database_url=database_url).returncode == 0


def test_i9_lawful_holds_and_erasures_cause_no_finding(engine: Engine) -> None:
    """Before, after and between; turns whose session becomes known; a hold between order and sweep."""
    record(engine, *(created(f"c{number}", f"s{number}") for number in range(6)), created("u1", None))
    erase(engine, Target("s0"))
    holds = [hold(engine, session_id=f"s{number}") for number in range(4)]
    seals.seal(engine)
    done = erase(engine, Target("s1"), Target("s4"), Target("s2", "c2"), skip_held=True)
    assert done.targets == [Target("s4")]
    erase(engine, Target("", "u1"))
    assert record(engine, created("u1", "s3"), minute=1)[0].reason == "erased"
    release(engine, holds[1])
    erase(engine, Target("s1"))
    again = hold(engine, session_id="s1")
    erasure.order(engine, [Target("s5")], "request", ACT)
    holds.append(hold(engine, session_id="s5"))
    sweep(engine)
    seals.seal(engine)
    assert found(engine) == []
    for hold_id in (holds[0], *holds[2:], again):
        release(engine, hold_id)
    sweep(engine)
    erase(engine, Target("s2"), Target("s3"))
    execute(
        engine,
        "INSERT INTO archiver.removals (event_id, act_id) VALUES (1, 1)",
        "DELETE FROM archiver.events WHERE id = 1",
    )
    seals.seal(engine)
    assert [each for each in found(engine) if each[2] != "without_act"] == []


# Who adds what


AUDITOR = "archiver_auditor"
WRITER = "archiver_writer"
OWN: dict[str, set[str]] = {
    AUDITOR: {"export", "export.done"},
    WRITER: {kind for kind in audit_log.KINDS if not kind.startswith("hold.")},
}


@contextmanager
def as_role(engine: Engine, role: str) -> Iterator[Connection]:
    with engine.connect() as connection:
        connection.execute(text(f"SET LOCAL ROLE {role}"))
        yield connection


@pytest.mark.parametrize("kind", [*audit_log.KINDS, "made.up", "HOLD.RELEASE", ""])
@pytest.mark.parametrize("role", [AUDITOR, WRITER])
def test_i9_a_role_adds_only_the_kinds_that_its_commands_make(engine: Engine, role: str, kind: str) -> None:
    added = text("INSERT INTO archiver.acts (at, actor, kind, detail) VALUES (now(), 'boss', :kind, '{}')")
    with as_role(engine, role) as connection:
        if kind in OWN[role]:
            connection.execute(added, {"kind": kind})
        else:
            with pytest.raises(SQLAlchemyError, match="may not add entries of kind"):
                connection.execute(added, {"kind": kind})


def test_i9_who_may_place_holds_adds_their_entries(engine: Engine) -> None:
    execute(
        engine,
        "DROP ROLE IF EXISTS counsel",
        "CREATE ROLE counsel IN ROLE archiver_auditor",
        "GRANT INSERT, UPDATE (released_at, released_by) ON archiver.holds TO counsel",
        "GRANT USAGE ON SCHEMA archiver_jobs TO counsel",
        "GRANT UPDATE ON archiver_jobs.lock_placement TO counsel",
    )
    try:
        with as_role(engine, "counsel") as connection:
            hold_id = erasure.insert_hold(connection, Criteria(session_id="s1"), "counsel", "case")
            erasure.release_hold(connection, hold_id, "counsel", "closed")
            with pytest.raises(SQLAlchemyError, match="may not add"):
                audit_log.insert_entry(connection, "erase", "boss", "x")
    finally:
        execute(engine, "DROP OWNED BY counsel", "DROP ROLE counsel")


def test_i9_time_and_database_user_are_those_of_postgres_and_sealed(engine: Engine, database_url: str) -> None:
    forged = "INSERT INTO archiver.acts (at, actor, kind, detail, database_user) VALUES"
    with as_writer(database_url) as writer:
        execute(writer, f"{forged} ('2001-01-01Z', 'boss', 'erase', '{{}}', 'boss')")
        execute(
            writer,
            "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id, recorded_at, database_user)"
            " VALUES ('s', '', '2001-01-01Z', 'request', 1, '2001-01-01Z', 'boss')",
            "INSERT INTO archiver.removals (event_id, act_id, recorded_at, session_id, database_user)"
            " VALUES (9, 1, '2001-01-01Z', 'other', 'boss')",
        )
    stamped = "database_user = session_user AND now() - {} BETWEEN interval '0' AND interval '10 minutes'"
    for table, time in (("acts", "at"), ("erasures", "recorded_at"), ("removals", "recorded_at")):
        assert rows(engine, f"SELECT {stamped.format(time)} FROM archiver.{table}") == [(True,)]
    seals.seal(engine)
    for table, column in (("acts", "database_user"), ("erasures", "recorded_at"), ("removals", "session_id")):
        with engine.connect() as connection:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            changed = "NULL" if column != "recorded_at" else "now() + interval '1 s'"
            connection.execute(text(f"UPDATE archiver.{table} SET {column} = {changed}"))
            assert (table, 1, "changed") in [(each.table, each.id, each.fault) for each in seals.verify(connection)]


def test_i9_entries_of_before_verify_as_they_were_sealed(engine: Engine) -> None:
    """Rows without the new columns have the leaf that they had."""
    execute(
        engine,
        "INSERT INTO archiver.acts (at, actor, kind, detail)"
        " VALUES (now(), 'x', 'erase', '{\"rule\"\\: \"request\"}')",
        "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
        " VALUES ('s', '', now(), 'request', 1)",
        "INSERT INTO archiver.removals (event_id, act_id) VALUES (9, 1)",
        unguarded=True,
    )
    assert rows(engine, "SELECT database_user FROM archiver.acts") == [(None,)]
    leaf = "'\\x0041'::bytea || decode('00000008', 'hex') || int8send(id) || decode('00000008', 'hex')"
    leaf += " || timestamptz_send(at) || decode('00000001', 'hex') || 'x'::bytea || decode('00000005', 'hex')"
    leaf += " || 'erase'::bytea || decode('ffffffff', 'hex') || int4send(octet_length(detail::text))"
    leaf += " || convert_to(detail::text, 'UTF8')"
    ((expected,),) = rows(engine, f"SELECT sha256({leaf}) FROM archiver.acts".replace("::", r"\:\:"))
    seals.seal(engine)
    with transaction(engine) as connection:
        ((_, entries),) = chain.select_seals(connection)
    assert bytes(expected) in chain.hashes(entries)
    assert {fault for _, _, fault in found(engine)} <= {"without_act"}


# How far a seal reaches


FORGED_SEAL = """
    INSERT INTO archiver.seals (id, sealed_at, events_through, recounts_through, acts_through, erasures_through,
                                removals_through, entries, root, previous, hash)
    VALUES (:id, :sealed_at, :events_through, :recounts_through, :acts_through, :erasures_through,
            :removals_through, :entries, :root, :previous, :hash)
"""


def forge_seal(connection: Connection, reach: dict[str, int], entries: bytes = b"") -> None:
    """A seal that follows the newest one well, but for what it reaches."""
    before = chain.select_newest(connection)
    through = before.through | reach
    seal = chain.make(before, entries, through, None)
    values = {name: getattr(seal, name) for name in ("id", "sealed_at", "root", "previous", "hash")}
    values |= {f"{name}_through": number for name, number in through.items()} | {"entries": entries}
    connection.execute(text(FORGED_SEAL), values)


REACHES = [
    {"events": 2**62},
    {"acts": 2**62},
    {"removals": 2**63 - 1},
    {"erasures": 2**62, "events": 2**62, "recounts": 2**62},
    {"events": 1_000},
    {"events": 3},
    {},
]


@pytest.mark.parametrize("reach", REACHES)
def test_i9_a_writer_cannot_add_a_seal_that_reaches_other_rows_than_it_lists(
    engine: Engine, database_url: str, reach: dict[str, int]
) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    seals.seal(engine)
    record(engine, created("c3", "s1"))
    for entries, more in ((b"", {}), (bytes(41), {"events": 2**62})):
        with (
            as_writer(database_url) as writer,
            writer.connect() as connection,
            pytest.raises(SQLAlchemyError, match="reaches"),
        ):
            forge_seal(connection, reach | more, entries)
    assert [each.size for each in seals.seal(engine)] == [1]
    assert found(engine) == []


@pytest.mark.parametrize("reach", REACHES[:-2])
def test_i9_a_seal_that_reaches_too_far_is_named_and_no_innocent_event(engine: Engine, reach: dict[str, int]) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    seals.seal(engine)
    record(engine, created("c3", "s1"), created("c3", "s1"), created("c4", "s2"))
    hold(engine, session_id="s2")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        forge_seal(connection, reach)
    assert found(engine) == [("seals", 2, "out_of_bounds")]
    with pytest.raises(seals.BoundsError, match="seal 2 claims rows that do not exist"):
        seals.seal(engine)
    execute(engine, "DELETE FROM archiver.seals WHERE id = 2", unguarded=True)
    assert len(seals.seal(engine)) == 1
    assert found(engine) == []


def test_i9_one_that_lists_nothing_of_what_it_reaches_is_named_and_no_innocent_event(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    seals.seal(engine)
    record(engine, created("c3", "s1"), created("c4", "s2"))
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        forge_seal(connection, {"events": 4})
    assert found(engine) == [("seals", 2, "out_of_bounds")]


@on_one_version
def test_i9_the_command_refuses_to_seal_after_it(database_url: str, engine: Engine) -> None:
    record(engine, created("c1", "s1"))
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        forge_seal(connection, {"events": 2**62})
    process = archiver("seal", database_url=database_url)
    assert process.returncode == 1
    assert "seal 1 claims rows that do not exist" in process.stderr
    assert "archiver verify" in process.stderr


@on_one_version
def test_the_audit_log_shows_the_database_user_beside_the_stated_actor(database_url: str, engine: Engine) -> None:
    execute(
        engine,
        "SET LOCAL ROLE archiver_auditor",
        "INSERT INTO archiver.acts (actor, kind, reason, detail) VALUES ('boss',"
        " 'export', 'yearly audit of case 7 before the court', '{\"session\": \"session-123456789\"}')",
    )
    ((user,),) = rows(engine, "SELECT database_user FROM archiver.acts")
    wide = archiver("audit", database_url=database_url)
    assert re.search(rf"│ boss +│ {user} +│ export +│ yearly audit of case 7 before the court +│", wide.stdout), (
        wide.stdout
    )
    narrow = archiver("audit", database_url=database_url, COLUMNS="80").stdout
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    assert f"actor: boss\ndatabase user: {user}\nkind: export\nreason: yearly audit of case 7" in narrow


@on_one_version
def test_holds_on_a_narrow_terminal_are_blocks_of_lines(database_url: str, engine: Engine) -> None:
    hold = archiver(
        "hold", "add", "--session", "s1", "--reason", "case 7", "--actor", "anna", database_url=database_url
    )
    assert hold.returncode == 0
    ((day,),) = rows(engine, "SELECT to_char(placed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') FROM archiver.holds")
    narrow = archiver("hold", "list", database_url=database_url, COLUMNS="80").stdout
    assert narrow == f"id: 1\nplaced: {day}\nauthor: anna\nholds: session s1\nreason: case 7\n\n"


@on_one_version
@pytest.mark.parametrize("option", ["--actor", "--reason"])
def test_i12_actor_and_reason_have_a_length_limit(database_url: str, engine: Engine, option: str) -> None:
    def place(length: int) -> CompletedProcess[str]:
        given = {"--actor": "anna", "--reason": "case 7", option: "x" * length}
        arguments = [text for pair in given.items() for text in pair]
        return archiver("hold", "add", "--session", "s1", *arguments, database_url=database_url)

    refused = place(1001)
    assert refused.returncode == 2
    assert f"Invalid value for '{option}': 1,001 characters; at most 1,000 are recorded" in refused.stderr
    assert rows(engine, "SELECT id FROM archiver.acts") == []
    assert place(1000).returncode == 0


@pytest.mark.parametrize("column", ["actor", "reason"])
def test_an_entry_with_a_long_actor_or_reason_is_refused_by_postgres_and_an_earlier_one_stays(
    engine: Engine, column: str
) -> None:
    other = {"actor": "reason", "reason": "actor"}[column]

    def insert(characters: int) -> None:
        columns, values = f"({column}, {other}, kind, detail)", f"repeat('ü', {characters}), 'x', 'export', '{{}}'"
        execute(engine, f"INSERT INTO archiver.acts {columns} VALUES ({values})")

    schema.downgrade(engine, "0019")
    insert(1_001)
    schema.upgrade(engine)
    insert(1_000)
    with pytest.raises(DataError):
        insert(1_001)
    lengths = f"SELECT length({column}) FROM archiver.acts WHERE kind = 'export' ORDER BY id"
    assert rows(engine, lengths) == [(1_001,), (1_000,)]
    with transaction(engine) as connection:
        assert catalogue.select_differences(connection) == []
