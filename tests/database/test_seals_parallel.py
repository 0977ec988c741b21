"""Verification by several processes finds what one finds, in the same order, and never less (I9)."""

import multiprocessing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from archiver import database
from archiver.compliance import seals
from archiver.compliance.seals import bounds, chain, ranges
from archiver.compliance.seals.findings import Finding
from archiver.database import snapshot
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.rows import execute
from tests.support.seals import KEY, erase, forge
from tests.support.versions import on_one_version
from tests.support.waiting import until

KEYS = {seals.key_id(KEY.public_key()): KEY.public_key()}
ALONE = seals.Parallelism(jobs=1, window=1)  # a seal is a window
TOGETHER = seals.Parallelism(jobs=3, min_leaves=0, window=1)


@pytest.fixture
def sealed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A dozen seals, some events delivered again, and some that are not sealed."""
    monkeypatch.setattr(bounds, "LEAVES", 4)
    execute(
        engine,
        "INSERT INTO archiver.acts (at, actor, kind, reason, detail)"
        """ VALUES (now(), 'tester', 'erase', 'because', '{"rule"\\: "request"}')""",
    )
    for number in range(10):
        record(engine, *(created(f"c{number}-{each}", f"s{number}") for each in range(4)))
        if number % 3:
            record(engine, created(f"c{number - 1}-0", f"s{number - 1}"), seconds=60)
        seals.seal(engine, KEY)
    erase(engine, "s3", "c3-1")
    seals.seal(engine, KEY)
    record(engine, *(created(f"new-{each}", "s") for each in range(3)))
    return engine


def found(connection: Connection, effort: seals.Parallelism, **options: Any) -> tuple[list[Finding], seals.Checked]:
    checked = seals.Checked()
    result = list(seals.verify(connection, keys=KEYS, effort=effort, checked=checked, **options))
    return result, checked


TAMPERING = [
    "UPDATE archiver.events SET type = 'forged' WHERE id % 7 = 1",
    "UPDATE archiver.events SET body = 'forged' WHERE id % 9 = 2",
    "UPDATE archiver.events SET delivery_count = 7 WHERE id % 11 = 3",
    "UPDATE archiver.events SET is_recounted = true WHERE id % 8 = 3",
    "UPDATE archiver.events SET body = NULL, salt = NULL, dedupe_key = sha256(salt || dedupe_key)"
    " WHERE body IS NOT NULL AND id % 13 = 4",
    "DELETE FROM archiver.events WHERE id % 10 = 5",
    "UPDATE archiver.events SET id = -id WHERE id % 17 = 6",
    "DELETE FROM archiver.seals WHERE id = 1",
    "DELETE FROM archiver.seals WHERE id IN (4, 5, 6)",
    "DELETE FROM archiver.seals WHERE id = (SELECT max(id) FROM archiver.seals)",
    "UPDATE archiver.seals SET id = -id WHERE id IN (2, 9)",
    "UPDATE archiver.seals SET id = CASE id WHEN 7 THEN 8 ELSE 7 END WHERE id IN (7, 8)",
    "UPDATE archiver.seals SET events_through = events_through + 9 WHERE id = 3",
    "UPDATE archiver.seals SET events_through = events_through - 9 WHERE id = 6",
    "UPDATE archiver.seals SET signature = NULL, key_id = NULL WHERE id IN (3, 10)",
    r"UPDATE archiver.seals SET hash = '\x00', entries = '\x' WHERE id = 5",
    "UPDATE archiver.recounts SET delivery_count = 1 WHERE id = 2",
    "DELETE FROM archiver.recounts WHERE id = 3",
]


def tamper(connection: Connection, statements: list[str]) -> None:
    forge(connection, "SELECT 1", "events")
    connection.execute(text("ALTER TABLE archiver.seals DROP CONSTRAINT IF EXISTS seals_pkey"))
    for statement in statements:
        connection.execute(text(statement))


def heads_of(engine: Engine) -> dict[int, bytes]:
    """As they were exported, and some that never were."""
    with snapshot(engine, statement_seconds=30) as connection:
        known = {seal.id: seal.hash for seal, _ in chain.select_seals(connection)}
    return known | {5: bytes(32), 77: bytes(32), max(known) + 1: bytes(32)}


@on_one_version
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_find_together_what_the_whole_does(sealed: Engine, data: st.DataObject) -> None:
    """Wherever they are cut, each by itself."""
    heads = heads_of(sealed)
    with sealed.connect() as forged:
        tamper(forged, data.draw(st.lists(st.sampled_from(TAMPERING), max_size=4, unique=True)))
        after = data.draw(
            st.sampled_from([0, 0, *forged.scalars(text("SELECT id FROM archiver.seals WHERE id > 0 ORDER BY id"))])
        )
        windows, _, _ = ranges.windows_after(forged, after, 1, heads)
        held = ranges.VerificationContext(ranges.Signing(KEYS, 2), heads, 40)
        whole = list(ranges.verify_range(forged, ranges.Range(after, windows), held, seals.Checked()))
        cuts = sorted(data.draw(st.sets(st.integers(0, len(windows)))) | {0, len(windows)})
        parts: list[Finding] = []
        for start, end in pairwise(cuts):
            begin = windows[start - 1] if start else after
            parts += ranges.verify_range(forged, ranges.Range(begin, windows[start:end]), held, seals.Checked())
        assert parts == whole
        forged.rollback()


@on_one_version
def test_several_processes_find_what_one_does(sealed: Engine) -> None:
    since: dict[str, Any] = {"after_seal": 3, "heads": heads_of(sealed)}
    cases: list[tuple[list[str], dict[str, Any]]] = [([], {}), (TAMPERING[:6], {}), (TAMPERING[6:], since)]
    for statements, options in cases:
        with sealed.connect() as forged:
            tamper(forged, statements)
            forged.commit()
        with snapshot(sealed, statement_seconds=30) as connection:
            item, checked = found(connection, TOGETHER, **options)
            assert (item, checked) == found(connection, ALONE, **options)
        assert bool(item) == bool(statements)
        assert checked.seals >= TOGETHER.jobs


@on_one_version
def test_they_see_the_snapshot_of_the_first(sealed: Engine) -> None:
    with snapshot(sealed, statement_seconds=30) as connection:
        alone = found(connection, ALONE)
        execute(sealed, *TAMPERING[:3], unguarded=True)
        assert found(connection, TOGETHER) == alone
    with snapshot(sealed, statement_seconds=30) as connection:
        assert found(connection, TOGETHER)[0]


@on_one_version
def test_what_processes_without_a_connection_leave_is_done_by_the_first(sealed: Engine) -> None:
    with sealed.connect() as forged:
        tamper(forged, TAMPERING[:3])
        forged.commit()
    with snapshot(sealed, statement_seconds=30) as connection:
        alone = found(connection, ALONE)
    with unreachable_engine(sealed) as elsewhere, snapshot(elsewhere, statement_seconds=30) as connection:
        assert found(connection, TOGETHER) == alone


@contextmanager
def unreachable_engine(engine: Engine) -> Iterator[Engine]:
    """An engine whose URL leads nowhere, for all but itself."""
    made = database.connect(engine.url, pool_size=1)
    made.url = engine.url.set(host="127.0.0.1", port=1, query={})  # the other processes connect to this one
    yield made
    made.dispose()


@contextmanager
def under_way(engine: Engine) -> Iterator[Iterator[Finding]]:
    """A verification that has told its first finding, while the other processes only begin."""
    execute(engine, "UPDATE archiver.events SET body = 'x' WHERE id = 1", unguarded=True)
    with (
        snapshot(engine, statement_seconds=30) as connection,
        closing(seals.verify(connection, effort=TOGETHER)) as verification,
    ):
        next(verification)
        yield verification


@on_one_version
def test_a_process_that_is_killed_is_no_verification(sealed: Engine) -> None:
    with under_way(sealed) as verification:
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(seals.HelperLostError, match="--jobs 1"):
            list(verification)


@on_one_version
def test_no_process_is_left_where_a_verification_is_broken_off(sealed: Engine) -> None:
    with under_way(sealed):
        assert len(multiprocessing.active_children()) == TOGETHER.jobs - 1
    until(lambda: not multiprocessing.active_children(), "they have ended")
