"""Seals: each change, removal, insertion and move of a row is found and named (I9)."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from hashlib import sha256
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from archiver import events, ledger
from archiver.archive import Timing
from archiver.compliance import erasure, seals
from archiver.compliance.seals import bounds, chain, leaves, merkle
from archiver.compliance.seals.findings import Finding
from archiver.database import snapshot, tables, transaction
from archiver.events import Delivery, responses
from tests.support.observations import record
from tests.support.payloads import created, deleted
from tests.support.rows import execute, rows
from tests.support.seals import KEY, NOW, erase, forge
from tests.support.slowness import holding
from tests.support.versions import on_one_version

# The tree

# Leaves and roots of the test vectors of Certificate Transparency's reference implementation.
LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize("size", ROOTS)
def test_the_root_is_that_of_the_published_vectors(size: int) -> None:
    hashes = [merkle.leaf_hash(bytes.fromhex(leaf)) for leaf in LEAVES[:size]]
    assert merkle.root(hashes).hex() == ROOTS[size]


def as_the_rfc_has_it(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) < 2:
        return sha256(b"\0" + leaves[0]).digest() if leaves else sha256(b"").digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\1" + as_the_rfc_has_it(leaves[:split]) + as_the_rfc_has_it(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=3), max_size=70))
def test_the_root_is_that_of_the_rfcs_recursion(leaves: list[bytes]) -> None:
    assert merkle.root([merkle.leaf_hash(leaf) for leaf in leaves]) == as_the_rfc_has_it(leaves)


@given(st.integers(1, 70), st.data())
def test_a_path_leads_to_the_root_and_no_other_does(size: int, data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(size)]
    root = merkle.root(hashes)
    index = data.draw(st.integers(0, size - 1))
    path = merkle.path(hashes, index)
    assert merkle.root_of_path(hashes[index], index, size, path) == root
    assert merkle.root_of_path(merkle.leaf_hash(b"another"), index, size, path) != root
    assert merkle.root_of_path(hashes[index], index, size, [*path, root]) is None
    if path:
        assert merkle.root_of_path(hashes[index], index, size, path[:-1]) is None
        turned = [bytes(32), *path[1:]]
        assert merkle.root_of_path(hashes[index], index, size, turned) != root


@given(st.integers(0, 70), st.data())
def test_a_cover_leads_to_the_root_and_no_other_does(size: int, data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(size)]
    root = merkle.root(hashes)
    selected = sorted(data.draw(st.sets(st.integers(0, size - 1)) if size else st.just(set[int]())))
    chosen = [hashes[index] for index in selected]
    cover = merkle.cover(hashes, selected)
    assert merkle.root_of_cover(chosen, selected, size, cover) == root
    assert merkle.root_of_cover(chosen, selected, size, [*cover, root]) is None
    for place in range(len(cover)):
        turned = [*cover[:place], bytes(32), *cover[place + 1 :]]
        assert merkle.root_of_cover(chosen, selected, size, turned) != root
        assert merkle.root_of_cover(chosen, selected, size, cover[:place] + cover[place + 1 :]) != root
    for place in range(len(chosen)):
        turned = [*chosen[:place], bytes(32), *chosen[place + 1 :]]
        assert merkle.root_of_cover(turned, selected, size, cover) != root
    if size and len(selected) == size:
        assert cover == []


@given(st.integers(1, 70), st.data())
def test_a_cover_of_one_leaf_is_its_path(size: int, data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    assert sorted(merkle.cover(hashes, [index])) == sorted(merkle.path(hashes, index))


# An archive with something in every sealed table


def read(engine: Engine, session_id: str, seconds: float) -> None:
    answer = msgspec.json.encode({"id": session_id, "messages": [{"role": "user", "content": "hello"}]})
    fact = responses.parse_history(session_id, 200, answer)
    with transaction(engine) as connection:
        ledger.record(connection, [Delivery(fact, NOW + timedelta(seconds=seconds), None, responses.SOURCE)])


def act(engine: Engine, kind: str, **detail: Any) -> None:
    execute(
        engine,
        "INSERT INTO archiver.acts (at, actor, kind, reason, detail) VALUES"
        f" (now(), 'tester', '{kind}', 'because', '{msgspec.json.encode(detail).decode()}')".replace(":", r"\:"),
    )


@pytest.fixture
def sealed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Five signed seals over every kind of row; deliveries and an erasure before and after their sealing."""
    monkeypatch.setattr(bounds, "LEAVES", 4)
    record(engine, created("a", "s"), created("b", "s"), deleted("c", session_id=None))
    record(engine, created("b", "s", at=1_600_000_000_000), seconds=5)
    seals.seal(engine, KEY)
    record(engine, created("d", "t"), b'{"type": "x.unknown"}', deleted("a", session_id="s"), seconds=1)
    record(engine, created("e", "t"))
    record(engine, created("a", "s"), created("d", "t"), seconds=9)
    act(engine, "erase", rule="request", sessions=1)
    act(engine, "retention", rules={"metadata": 30})
    seals.seal(engine, KEY)
    erase(engine, "t", "e")
    read(engine, "s", 20)
    record(engine, created("d", "t"), seconds=30)
    # The row of an event that retention removed.
    execute(
        engine,
        "INSERT INTO archiver.removals (event_id, act_id) SELECT id, 2 FROM archiver.events WHERE chat_id = 'c'",
        "DELETE FROM archiver.events WHERE chat_id = 'c'",
    )
    seals.seal(engine, KEY)
    record(engine, created("z", "z"))
    return engine


def findings(connection: Connection, **options: Any) -> list[Finding]:
    return list(seals.verify(connection, keys={seals.key_id(KEY.public_key()): KEY.public_key()}, **options))


def verify(engine: Engine, **options: Any) -> list[Finding]:
    with snapshot(engine, statement_seconds=30) as connection:
        return findings(connection, **options)


def test_an_unmodified_archive_verifies(sealed: Engine) -> None:
    checked = seals.Checked()
    assert verify(sealed, checked=checked) == []
    counted = rows(sealed, "SELECT (SELECT count(*) FROM archiver.events), (SELECT count(*) FROM archiver.seals)")
    assert counted == [(checked.events + checked.unsealed, checked.seals)]
    assert checked.unsealed == 1
    assert checked.seals >= 3


# What somebody with all rights does to it


@pytest.fixture
def forged(sealed: Engine) -> Iterator[Connection]:
    """A connection past all guards, whose changes are undone."""
    with sealed.connect() as connection:
        yield connection
        connection.rollback()


FLIPS = {
    "TEXT": ["{c} || 'x'", "coalesce({c}, 'x') || ' '", "NULL", "''"],
    "BLOB": ["set_byte({c}, 0, get_byte({c}, 0) # 1)", "{c} || '\\x00'", "NULL", "''"],
    "BIGINT": ["{c} + 1000", "-{c}"],
    "INTEGER": ["{c} + 1", "{c} - 1", "{c} + 1000"],
    "DATETIME": ["{c} + interval '1 microsecond'", "{c} - interval '1 day'", "NULL", "'epoch'"],
    "BOOLEAN": ["NOT {c}"],
    "ARRAY": ["array_append({c}, NULL)", "{c}[2\\:]", "NULL", "'{{}}'"],
    "JSONB": ["{c} || '{{\"more\"\\: 1}}'", "'{{}}'"],
}
SEALED = ("events", "recounts", "acts", "erasures", "removals", "seals")


@on_one_version
@pytest.mark.parametrize(
    ("table", "column"),
    [(table, column.name) for table in SEALED for column in tables.metadata.tables[f"archiver.{table}"].columns],
)
def test_i9_each_changed_column_is_found_and_named(forged: Connection, table: str, column: str) -> None:
    heads = {seal.id: seal.hash for seal, _ in chain.select_seals(forged)}
    kind = str(tables.metadata.tables[f"archiver.{table}"].columns[column].type).split("(")[0].split()[0]
    changed = 0
    for row_id in sealed_ids(forged, table):
        for flip in FLIPS[kind]:
            value = flip.format(c=column)
            statement = (
                f"UPDATE archiver.{table} SET {column} = {value}"
                f" WHERE id = {row_id} AND {column} IS DISTINCT FROM {value}"
            )
            try:
                touched = forge(forged, statement, table if column == "id" else None)
            except DBAPIError:
                continue  # such a row cannot be
            changed += touched
            result = findings(forged, heads=heads) if touched else []
            assert not touched or any(item.table == table and item.id == row_id for item in result), (row_id, flip)
    assert changed


def sealed_ids(connection: Connection, table: str) -> list[int]:
    rule = "true" if table == "seals" else f"id <= (SELECT max({table}_through) FROM archiver.seals)"
    return list(connection.scalars(text(f"SELECT id FROM archiver.{table} WHERE {rule} ORDER BY id")))


@on_one_version
@pytest.mark.parametrize("table", SEALED)
def test_i9_each_removed_row_is_found_and_named(forged: Connection, table: str) -> None:
    ids = sealed_ids(forged, table)
    for row_id in ids[:-1] if table == "seals" else ids:
        assert forge(forged, f"DELETE FROM archiver.{table} WHERE id = {row_id}") == 1
        assert any(item.table == table and item.id == row_id for item in findings(forged)), row_id


@pytest.mark.parametrize("row_id", [-(2**63), 0, 1, 3])
def test_i9_a_row_put_in_is_found_and_named(forged: Connection, row_id: int) -> None:
    names = [column.name for column in tables.events.c if column.name not in {"id", "session_id"}]
    forge(
        forged,
        f"INSERT INTO archiver.events (id, session_id, {', '.join(names)}) OVERRIDING SYSTEM VALUE"
        f" SELECT CAST({row_id} AS numeric), 'put in', {', '.join(names)} FROM archiver.events WHERE chat_id = 'b'",
    )
    assert any(item.id == row_id for item in findings(forged))


@pytest.mark.parametrize(
    "columns", ["body, salt, body_digest", "body", "salt", "body, salt", "received_at", "dedupe_key", "id"]
)
def test_i9_rows_that_trade_places_are_found(forged: Connection, columns: str) -> None:
    first, second = forged.scalars(
        text("SELECT id FROM archiver.events WHERE chat_id IN ('b', 'd') AND type = 'chat.created' ORDER BY id")
    )
    names = columns.split(", ")
    forge(forged, "ALTER TABLE archiver.events DROP CONSTRAINT events_pkey", "events")
    swapped = forged.execute(
        text(
            f"UPDATE archiver.events e SET {', '.join(f'{name} = o.{name}' for name in names)}"
            f" FROM archiver.events o WHERE (e.id, o.id) IN (({first}, {second}), ({second}, {first}))"
        )
    )
    assert swapped.rowcount == 2
    assert {first, second} <= {item.id for item in findings(forged)}


def test_i9_seals_recreated_without_the_key_are_found(sealed: Engine, forged: Connection) -> None:
    forge(forged, "UPDATE archiver.events SET type = 'forged' WHERE chat_id = 'b'")
    before, rewritten = chain.FIRST, 0
    for seal, entries in list(chain.select_seals(forged)):
        now = {
            (kind.letter, row_id): hashed
            for kind in leaves.KINDS
            for row_id, hashed in leaves.select_leaves(
                forged, kind, before.through[kind.table], seal.through[kind.table]
            )
        }
        recreated = b"".join(
            leaves.pack(entry.letter, [(entry.id, now.get((entry.letter, entry.id), entry.hash))])
            for entry in chain.unpack(entries)
        )
        made = chain.make(before, recreated, seal.through, None)
        forged.execute(text(f"DELETE FROM archiver.seals WHERE id = {seal.id}"))
        chain.insert_seal(forged, made, recreated)
        before, rewritten = made, rewritten + 1
    # As a chain of unsigned seals it is whole: only the key, or exported seals, tell.
    assert list(seals.verify(forged)) == []
    assert {item.fault for item in findings(forged)} == {"unsigned"}
    assert findings(forged, signed_since=rewritten + 1) == []
    with snapshot(sealed, statement_seconds=30) as honest:
        heads = {seal.id: seal.hash for seal, _ in chain.select_seals(honest)}
    result = list(seals.verify(forged, heads=heads))
    assert {(item.table, item.fault) for item in result} == {("seals", "not_the_known_one")}
    assert len(result) == rewritten


def test_i9_a_chain_cut_at_its_end_is_found_against_exported_seals(sealed: Engine, forged: Connection) -> None:
    heads = {seal.id: seal.hash for seal, _ in chain.select_seals(forged)}
    last = max(heads)
    forge(forged, f"DELETE FROM archiver.seals WHERE id = {last}")
    assert findings(forged, heads=heads) == [Finding("seals", last, "missing")]
    assert verify(sealed, heads=heads) == []


def test_i9_a_seal_signed_by_another_key_is_found(sealed: Engine) -> None:
    unknown_key = Ed25519PrivateKey.generate().public_key()
    with snapshot(sealed, statement_seconds=30) as connection:
        result = list(seals.verify(connection, keys={seals.key_id(unknown_key): unknown_key}))
        forged = list(seals.verify(connection, keys={seals.key_id(KEY.public_key()): unknown_key}))
    assert result
    assert {item.fault for item in result} == {"unknown_key"}
    assert {item.fault for item in forged} == {"wrong_signature"}


def test_a_verification_that_is_broken_off_leaves_its_connection_free(sealed: Engine) -> None:
    execute(sealed, "UPDATE archiver.events SET body = 'x' WHERE chat_id = 'b'", unguarded=True)
    with snapshot(sealed, statement_seconds=30) as connection, closing(seals.verify(connection)) as item:
        assert next(item).fault == "body_changed"
    assert rows(sealed, "SELECT 1") == [(1,)]


def test_increments_are_verified_after_a_seal(sealed: Engine, forged: Connection) -> None:
    forge(forged, "UPDATE archiver.events SET type = 'forged' WHERE chat_id = 'a' AND type = 'chat.created'")
    assert findings(forged)
    assert not [item for item in findings(forged, after_seal=1) if item.fault == "changed"]
    assert verify(sealed, after_seal=2) == []


def test_content_that_is_gone_without_an_erasure_is_found(forged: Connection) -> None:
    event_id = forged.scalar(text("SELECT id FROM archiver.events WHERE chat_id = 'b'"))
    forge(
        forged,
        "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = sha256(salt || dedupe_key)"
        f" WHERE id = {event_id}",
    )
    assert findings(forged) == [Finding("events", int(event_id or 0), "erased_without_record")]


def test_i9_rows_before_and_after_the_seals_that_are_verified_are_looked_at_too(forged: Connection) -> None:
    sealed_first, unsealed = forged.scalars(
        text("SELECT min(id) FROM archiver.events WHERE chat_id IN ('a', 'z') GROUP BY chat_id ORDER BY 1")
    )
    for event_id in (sealed_first, unsealed):
        assert wipe(forged, f"id = {event_id}") == 1
        assert findings(forged, after_seal=2) == [Finding("events", event_id, "erased_without_record")]
    # One that was never delivered again, so that no recount tells of it.
    once = "id = (SELECT min(id) FROM archiver.events e WHERE delivery_count = 1)"
    assert forge(forged, f"UPDATE archiver.events SET last_received_at = 'epoch' WHERE {once}") == 1
    assert [item.fault for item in findings(forged, after_seal=2)] == ["counters_changed"]


def test_a_salt_that_gave_bytes_to_the_body_is_found(forged: Connection) -> None:
    """Hashed one after the other, salt and body have no boundary but the salt's length."""
    event_id = forged.scalar(text("SELECT id FROM archiver.events WHERE chat_id = 'b'"))
    forge(
        forged,
        "UPDATE archiver.events SET body = substr(salt, 13) || body, dedupe_key = substr(salt, 13) || dedupe_key,"
        f" salt = substr(salt, 1, 12) WHERE id = {event_id}",
    )
    assert findings(forged) == [Finding("events", int(event_id or 0), "changed")]


def test_counters_that_a_recount_put_in_lowers_are_found(forged: Connection) -> None:
    event_id = forged.scalar(text("SELECT event_id FROM archiver.recounts ORDER BY id LIMIT 1"))
    forge(
        forged,
        "UPDATE archiver.events SET delivery_count = 1, last_received_at = received_at, earliest_at = NULL"
        f" WHERE id = {event_id}",
    )
    forged.execute(
        text(
            "INSERT INTO archiver.recounts (event_id, delivery_count, last_received_at)"
            f" SELECT id, 1, received_at FROM archiver.events WHERE id = {event_id}"
        )
    )
    assert {(item.table, item.fault) for item in findings(forged)} == {("recounts", "went_back")}


def test_an_erasure_without_an_act_is_found(forged: Connection) -> None:
    forge(
        forged,
        "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
        " VALUES ('s', '', now(), 'request', 999)",
    )
    assert [(item.table, item.fault) for item in findings(forged)] == [("erasures", "without_act")]


def test_seals_are_verified_from_one_that_is_missing(forged: Connection) -> None:
    forge(forged, "DELETE FROM archiver.seals WHERE id = 2")
    assert Finding("seals", 2, "missing") in findings(forged, after_seal=2)


# Sealing


def test_nothing_new_makes_no_seal(engine: Engine) -> None:
    assert seals.seal(engine, KEY) == []
    record(engine, created())
    assert len(seals.seal(engine, KEY)) == 1
    assert seals.seal(engine, KEY) == []


def test_a_redelivery_after_its_sealing_is_sealed_too(engine: Engine) -> None:
    record(engine, created())
    seals.seal(engine, KEY)
    for count in (2, 3):
        record(engine, created(), seconds=count)
        assert verify(engine) == []
        (seal,) = seals.seal(engine, KEY)
        assert seal.size == 1
        assert verify(engine) == []
    assert rows(engine, "SELECT delivery_count, is_recounted FROM archiver.events") == [(3, False)]
    assert rows(engine, "SELECT delivery_count FROM archiver.recounts ORDER BY id") == [(2,), (3,)]


def test_more_redeliveries_than_one_seal_holds_are_no_tampering(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LEAVES", 3)
    bodies = [created(f"c{n}", "s") for n in range(8)]
    record(engine, *bodies)
    seals.seal(engine, KEY)
    record(engine, *bodies, seconds=5)
    record(engine, created("new", "s"), created("new", "s"))
    for _ in range(6):
        seals.seal(engine, KEY, limit=1)
        with snapshot(engine, statement_seconds=30) as connection:
            assert list(seals.verify(connection)) == []
    assert rows(engine, "SELECT count(*) FROM archiver.events WHERE is_recounted") == [(0,)]


def test_what_is_not_committed_yet_is_waited_for_and_not_left_out(engine: Engine) -> None:
    with engine.connect() as late:
        event = events.parse(created("late", "s"))
        assert isinstance(event, events.Event)
        ledger.record(late, [Delivery(event, NOW, "key")])
        record(engine, created("early", "t"))  # a higher id, committed first
        with pytest.raises(seals.LedgerBusyError):
            seals.seal(engine, KEY)
        assert rows(engine, "SELECT count(*) FROM archiver.seals") == [(0,)]
        late.commit()
    (seal,) = seals.seal(engine, KEY)
    assert seal.size == 2
    assert verify(engine) == []


def test_i13_transactions_that_write_without_a_pause_do_not_end_sealing(engine: Engine) -> None:
    def write(connection: Connection, name: str) -> None:
        event = events.parse(created(name, name))
        assert isinstance(event, events.Event)
        ledger.record(connection, [Delivery(event, NOW, "key")])

    settling = seals.Settling()
    record(engine, created("before", "b"))
    with engine.connect() as first, engine.connect() as second:
        write(first, "first")
        record(engine, created("between", "w"))  # a higher id, committed first
        with pytest.raises(seals.LedgerBusyError):
            seals.seal(engine, KEY, None, settling)
        write(second, "second")
        first.commit()
        record(engine, created("after", "a"))
        (seal,) = seals.seal(engine, KEY, None, settling)
        assert seal.size == 3
        assert verify(engine) == []
        second.commit()
    (seal,) = seals.seal(engine, KEY, None, settling)
    assert seal.size == 2
    assert verify(engine) == []


def test_i13_locks_on_tables_that_are_not_sealed_do_not_stop_sealing(engine: Engine) -> None:
    record(engine, created("a"))
    others = ("quarantine", "holds", "subscriptions")  # each has a sequence
    with holding(engine, f"LOCK TABLE {', '.join(f'archiver.{each}' for each in others)} IN ACCESS EXCLUSIVE MODE"):
        assert seals.seal(engine, KEY)
    with holding(engine, "LOCK TABLE archiver.outbox IN ACCESS EXCLUSIVE MODE"):
        assert seals.seal(engine, KEY) == []  # only a new seal is published


def test_i13_a_vacuum_does_not_end_sealing(engine: Engine) -> None:
    record(engine, created("before", "b"))
    # The lock that VACUUM and CREATE INDEX CONCURRENTLY hold while they run.
    with holding(engine, "LOCK TABLE archiver.events IN SHARE UPDATE EXCLUSIVE MODE"):
        (seal,) = seals.seal(engine, KEY)
    assert seal.size == 1
    assert verify(engine) == []


# What whoever holds the rights of a writer, or all, does beside the seals


def wipe(connection: Connection, which: str) -> int:
    """Take content away as an erasure does, and tell no one."""
    return forge(
        connection,
        "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = sha256(salt || dedupe_key)"
        f" WHERE body IS NOT NULL AND {which}",
    )


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("erase", {"rule": "request", "rules": {"metadata": 30}}),
        ("settings.changed", {"part": "serve"}),
        ("retention", {"rules": {"metadata": 0}}),
        ("retention", {}),
    ],
)
def test_i9_a_removal_that_cites_another_act_is_found(forged: Connection, kind: str, detail: dict[str, Any]) -> None:
    event_id, act_id = int(forged.scalar(text("SELECT id FROM archiver.events WHERE chat_id = 'b'")) or 0), 900
    forge(forged, f"DELETE FROM archiver.events WHERE id = {event_id}")
    insert_entry(forged, act_id, kind, detail)
    forged.execute(text(f"INSERT INTO archiver.removals (event_id, act_id) VALUES ({event_id}, {act_id})"))
    assert [(item.table, item.fault) for item in findings(forged)] == [("removals", "without_act")]


@pytest.mark.parametrize(
    ("kind", "detail", "rule", "is_right"),
    [
        ("settings.changed", {"part": "serve"}, "request", False),
        ("erase.refused", {"rule": "request"}, "request", False),
        ("erase", {"rule": "chat.deleted"}, "request", False),
        ("erase", {}, "request", False),
        ("retention", {"rules": {"metadata": 0}}, "request", False),
        ("retention", {"rules": {"metadata": 0}}, "retention", True),
        ("erase", {"rule": "chat.deleted"}, "chat.deleted", True),
        ("erase.replay", {"rule": "retention"}, "retention", True),
    ],
)
def test_i9_an_erasure_that_cites_another_act_is_found(
    forged: Connection, kind: str, detail: dict[str, Any], rule: str, *, is_right: bool
) -> None:
    wipe(forged, "session_id = 's'")
    insert_entry(forged, 900, kind, detail)
    forged.execute(
        text(
            "INSERT INTO archiver.erasures (session_id, chat_id, erased_at, rule, act_id)"
            f" VALUES ('s', '', now(), '{rule}', 900)"
        )
    )
    expected = [] if is_right else [("erasures", "without_act")]
    assert [(item.table, item.fault) for item in findings(forged)] == expected


def insert_entry(connection: Connection, act_id: int, kind: str, detail: dict[str, Any]) -> None:
    connection.execute(
        text(
            "INSERT INTO archiver.acts (id, at, actor, kind, detail) OVERRIDING SYSTEM VALUE"
            " VALUES (:id, now(), 'tester', :kind, CAST(:detail AS jsonb))"
        ),
        {"id": act_id, "kind": kind, "detail": msgspec.json.encode(detail).decode()},
    )


def test_what_an_erased_turn_took_with_it_is_no_tampering(engine: Engine) -> None:
    """A fact of an unknown type tells its turn in its bytes alone."""
    record(engine, created("c1", "s1"), b'{"type": "x.rated", "sessionId": "s1", "rating": {"of": "c1", "stars": 2}}')
    seals.seal(engine, KEY)
    erase_turn(engine, "s1", "c1")
    assert rows(engine, "SELECT DISTINCT body IS NULL FROM archiver.events") == [(True,)]
    assert verify(engine) == []


def erase_turn(engine: Engine, session_id: str, chat_id: str) -> None:
    ordered = erasure.AuditEntry("erase", "tester", "because")
    erasure.order(engine, [erasure.Target(session_id, chat_id)], "request", ordered)
    for _ in erasure.sweep(engine, Timing()):
        pass


def test_i9_what_stays_where_a_turn_was_erased_may_not_go(engine: Engine) -> None:
    record(engine, created("c1", "s1"), created("c2", "s1"))
    read(engine, "s1", 1)
    registered = responses.register({"id": "s1", "name": "of somebody"})
    with transaction(engine) as connection:
        ledger.record(connection, [Delivery(registered, NOW, None, responses.APPLICATION)])
    erase_turn(engine, "s1", "c1")
    seals.seal(engine, KEY)
    assert verify(engine) == []
    with engine.connect() as forged:
        for kind in ("history.redacted", "session.registered"):
            assert wipe(forged, f"type = '{kind}'") == 1
            assert [item.fault for item in findings(forged)] == ["erased_without_record"], kind


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("earliest_at", "NULL"),
        ("earliest_at", "earliest_at + interval '1 s'"),
        ("delivery_count", "delivery_count - 1"),
        ("last_received_at", "last_received_at - interval '1 s'"),
    ],
)
def test_i9_a_recount_put_in_that_takes_something_back_is_found(engine: Engine, column: str, value: str) -> None:
    at = 1_705_311_000_000
    record(engine, created("a", "s", at=at))
    record(engine, created("a", "s", at=at - 2000), seconds=5)
    seals.seal(engine, KEY)
    assert verify(engine) == []
    with engine.connect() as forged:
        forge(forged, f"UPDATE archiver.events SET {column} = {value}")
        forged.execute(RECOUNT)
        assert [(item.table, item.fault) for item in findings(forged)] == [("recounts", "went_back")]


RECOUNT = text(
    "INSERT INTO archiver.recounts (event_id, delivery_count, last_received_at, earliest_at)"
    " SELECT id, delivery_count, last_received_at, earliest_at FROM archiver.events"
)


def test_i9_a_first_recount_of_a_time_that_is_no_earlier_one_is_found(engine: Engine) -> None:
    record(engine, created("a", "s"))
    seals.seal(engine, KEY)
    with engine.connect() as forged:
        forge(
            forged,
            "UPDATE archiver.events SET delivery_count = 2, earliest_at = occurred_at + interval '1 day'",
        )
        forged.execute(RECOUNT)
        assert [(item.table, item.fault) for item in findings(forged)] == [("recounts", "went_back")]


def test_i9_a_gap_of_any_size_among_seals_is_one_finding(forged: Connection) -> None:
    newest = chain.select_newest(forged).id
    huge = 2**63 - 1
    forge(forged, f"UPDATE archiver.seals SET id = {huge} WHERE id = {newest}")
    gap = Finding("seals", newest, "missing", through=huge - 1)
    assert gap in findings(forged)
    assert str(gap) == f"seals {newest} to {huge - 1}: its row is missing"
    forge(forged, f"DELETE FROM archiver.seals WHERE id = {newest - 1}")
    assert Finding("seals", newest - 1, "missing") in findings(forged)


@pytest.mark.parametrize("sealed_at", ["infinity", "-infinity", "20000-01-01", "0044-03-15 BC"])
def test_i9_a_seal_of_a_time_that_cannot_be_is_named(forged: Connection, sealed_at: str) -> None:
    forge(forged, f"UPDATE archiver.seals SET sealed_at = '{sealed_at}' WHERE id = 2".replace(":", r"\:"))
    assert {(item.table, item.id, item.fault) for item in findings(forged)} >= {("seals", 2, "altered")}


def test_exported_seals_are_compared_wherever_a_verification_begins(sealed: Engine) -> None:
    with snapshot(sealed, statement_seconds=30) as connection:
        heads = {seal.id: seal.hash for seal, _ in chain.select_seals(connection)}
    newest = max(heads)
    for number in heads:
        checked = seals.Checked()
        result = verify(sealed, after_seal=newest, heads=heads | {number: bytes(32)}, checked=checked)
        assert result == [Finding("seals", number, "not_the_known_one")]
        assert checked.compared == len(heads)
    assert verify(sealed, after_seal=newest, heads=heads) == []
    assert verify(sealed, after_seal=newest, heads={newest + 5: bytes(32)}) == [
        Finding("seals", newest + 5, "missing")
    ]
    with sealed.connect() as forged:
        forge(forged, "DELETE FROM archiver.seals WHERE id = 1")
        assert Finding("seals", 1, "missing") in findings(forged, after_seal=newest, heads=heads)
