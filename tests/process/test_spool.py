"""The spool: durable, bounded, one process per file, and no remains of drained deliveries."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver import events
from archiver.events import Content, Delivery, Event
from archiver.inbound.spool import (
    Spool,
    SpoolError,
    SpoolFullError,
    open_left_behind,
    open_spool,
    select_depth,
    set_aside_files,
)
from tests.support.spools import NOW, ROOM, spooled


def bodies(spool: Spool, after: int = 0, limit: int = 1_000, most_bytes: int = 10**9) -> list[bytes]:
    return [each.row[-1] for each in spool.select_oldest(after, limit, most_bytes)]


TEXTS = st.text(st.characters(codec="utf-8"))
WEBHOOKS = st.builds(Delivery, st.binary().map(events.parse), st.datetimes(timezones=st.just(UTC)), st.none() | TEXTS)
REGISTRATIONS = st.builds(
    Delivery,
    st.builds(
        Event,
        st.just("session.registered"),
        st.binary(),
        st.binary(),
        st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        *[st.none()] * 3,
    ),
    st.datetimes(timezones=st.just(UTC)),
    st.none() | TEXTS,
    st.just("application"),
)


@given(st.lists(WEBHOOKS | REGISTRATIONS, min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_i1_spooled_deliveries_are_read_back_in_order_by_any_process(
    tmp_path_factory: pytest.TempPathFactory, deliveries: list[Delivery[Content]]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = open_spool(folder, ROOM)
    spool.append(deliveries)
    spool.close()
    again = open_spool(folder, ROOM)
    result = again.select_oldest(0, 100, 10**9)
    again.close()
    assert [each.id for each in result] == list(range(1, len(result) + 1))
    assert [each.restore() for each in result] == deliveries


def test_depth_counts_waiting_deliveries_only(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    assert spool.depth().events == 0
    spool.append([spooled(b"one", 1), spooled(b"three", 2)])
    depth = spool.depth()
    assert (depth.events, depth.bytes, depth.oldest_at) == (2, 8, NOW + timedelta(seconds=1))
    assert select_depth(tmp_path) == depth
    spool.delete(spool.select_oldest(0, 1, 10**9))
    depth = spool.depth()
    assert (depth.events, depth.bytes, depth.oldest_at) == (1, 5, NOW + timedelta(seconds=2))
    spool.close()
    assert select_depth(tmp_path) == depth
    again = open_spool(tmp_path, ROOM)
    assert again.depth() == depth
    again.close()


def test_a_page_is_bounded_in_events_and_bytes_and_holds_at_least_one(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"x" * 100) for _ in range(10)])
    assert len(bodies(spool, limit=3)) == 3
    assert len(bodies(spool, most_bytes=250)) == 2
    assert len(bodies(spool, most_bytes=1)) == 1
    assert len(bodies(spool, after=8)) == 2
    spool.close()


def test_i12_a_full_spool_takes_nothing_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    taken = 0
    while spool.room() > 120_000:
        spool.append([spooled(b"x" * 10_000)] * 10)
        taken += 10
    with pytest.raises(SpoolFullError, match="ARCHIVER_SPOOL_BYTES"):
        spool.append([spooled(b"x" * 10_000)] * 13)
    assert spool.depth().events == len(bodies(spool)) == taken > 50
    assert spool.path.stat().st_size <= ROOM
    spool.delete(spool.select_oldest(0, 20, 10**9))
    spool.append([spooled(b"x" * 10_000)] * 10)
    spool.close()


def test_i8_nothing_of_what_has_gone_is_left_on_disk_while_others_wait(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"gone words"), spooled(b"waiting words")])
    spool.delete(spool.select_oldest(0, 1, ROOM))
    on_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"waiting words" in on_disk
    assert b"gone words" not in on_disk
    spool.close()


def test_i8_nothing_of_what_has_gone_is_left_on_disk(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"hunter2-%d" % number * 700) for number in range(20)])
    assert any(b"hunter2" in path.read_bytes() for path in tmp_path.iterdir())
    spool.delete(spool.select_oldest(0, 100, 10**9))
    for path in tmp_path.iterdir():
        assert b"hunter2" not in path.read_bytes(), path
    assert spool.path.stat().st_size < 50_000
    spool.close()


def test_each_process_has_a_file_of_its_own_and_finds_what_others_left_behind(tmp_path: Path) -> None:
    first, second = open_spool(tmp_path, ROOM), open_spool(tmp_path, ROOM)
    assert first.path != second.path
    second.append([spooled(b"second")])
    assert list(open_left_behind(tmp_path)) == []
    second.close()
    for left in open_left_behind(tmp_path):
        assert bodies(left) == [b"second"]
        left.delete(left.select_oldest(0, 1, 10**9))
    assert list(open_left_behind(tmp_path)) == []
    first.close()
    assert select_depth(tmp_path).events == 0


_SPOOL_AND_TELL = """
import sys
from pathlib import Path
from archiver.inbound.spool import open_spool
from tests.support.spools import ROOM, spooled
spool = open_spool(Path(sys.argv[1]), ROOM)
for number in range(10_000):
    spool.append([spooled(str(number).encode())])
    print(number, flush=True)
"""


def test_i1_kill_9_loses_nothing_that_was_taken_and_frees_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SPOOL_AND_TELL, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        results = [process.stdout.readline().strip() for _ in range(50)]
        process.kill()
        results += [line.strip() for line in process.stdout if line.endswith("\n")]
    spool = open_spool(tmp_path, ROOM)
    assert spool.path.name == "spool-0.db"
    result = [body.decode() for body in bodies(spool, limit=20_000)]
    assert result[: len(results)] == results
    assert len(result) - len(results) <= 1
    spool.close()


def test_files_are_private(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "new", ROOM)
    spool.append([spooled(b"x")])
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o600}
    spool.close()


def test_what_is_no_spool_is_an_error_that_names_the_settings(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SpoolError, match=r"ARCHIVER_HOME.*ARCHIVER_SPOOL=off"):
        open_spool(tmp_path / "file", ROOM)


def damage(path: Path, start: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * size)


def test_i1_of_a_damaged_file_everything_that_can_be_read_is_kept(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"%d " % number * 100) for number in range(200)])
    before = set(bodies(spool))
    spool.close()
    damage(spool.path, 20 * 4_096, 4_096)
    with pytest.raises(SpoolError, match=r"damaged.*sets the file aside"):
        select_depth(tmp_path)
    again = open_spool(tmp_path, ROOM)
    result = bodies(again)
    assert set(result) < before
    assert 180 < len(result) == again.depth().events
    (aside,) = set_aside_files(tmp_path)
    assert aside.stat().st_size > 20 * 4_096
    again.append([spooled(b"new")])
    assert bodies(again)[-1] == b"new"
    again.close()


@pytest.mark.parametrize("keeps", [0, 100, 4_096 * 25 + 17])
def test_i1_a_file_that_lost_its_end_does_not_keep_a_process_from_spooling(tmp_path: Path, keeps: int) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"%d " % number * 100) for number in range(200)])
    spool.close()
    os.truncate(spool.path, keeps)
    again = open_spool(tmp_path, ROOM)
    result = bodies(again)
    assert len(result) > 80 if keeps > 4_096 else not result
    again.append([spooled(b"new")])
    assert bodies(again) == [*result, b"new"]
    again.close()


def test_i2_a_delivery_that_the_disk_changed_is_no_delivery(tmp_path: Path) -> None:
    """SQLite looks at no body: that its bytes are those which were verified, only our checksum tells."""
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"a" * 20_000), spooled(b"b" * 20_000), spooled(b"c" * 20_000)])
    spool.close()
    damage(spool.path, spool.path.read_bytes().index(b"b" * 4_000) + 2_000, 1)
    again = open_spool(tmp_path, ROOM)
    assert again.depth().events == 3
    assert bodies(again) == [b"a" * 20_000, b"c" * 20_000]
    assert again.depth().events == 2
    assert len(set_aside_files(tmp_path)) == 1
    again.close()


def test_i1_a_file_of_the_version_before_checksums_is_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "spool-0.db")) as database:
        database.execute(
            "CREATE TABLE spooled (id INTEGER PRIMARY KEY AUTOINCREMENT, received_at TEXT NOT NULL,"
            " source TEXT NOT NULL, key_id TEXT, body BLOB NOT NULL, type TEXT, session_id TEXT, dedupe_key BLOB)"
        )
        database.execute(
            "INSERT INTO spooled (received_at, source, body) VALUES (?, 'webhook', ?)", (NOW.isoformat(), b"x")
        )
        database.commit()
    spool = open_spool(tmp_path, ROOM)
    spool.append([spooled(b"y")])
    assert bodies(spool) == [b"x", b"y"]
    spool.close()


@pytest.mark.parametrize("removed", ["spool-0.db", "spool-0.db-wal", "spool-0.lock", ""])
def test_i1_a_file_removed_while_in_use_is_recreated_with_its_content(tmp_path: Path, removed: str) -> None:
    folder = tmp_path / "spool"
    spool = open_spool(folder, ROOM)
    spool.append([spooled(b"before")])
    if removed:
        (folder / removed).unlink()
    else:
        shutil.rmtree(folder)
    spool.append([spooled(b"after")])
    other = open_spool(folder, ROOM)
    assert other.path != spool.path
    assert bodies(spool) == [b"before", b"after"]
    assert spool.depth().events == 2
    other.close()
    spool.close()
    result = [body for left in open_left_behind(folder) for body in bodies(left)]
    assert set(result) == {b"before", b"after"}


def test_one_damaged_file_keeps_no_other_from_being_adopted(tmp_path: Path) -> None:
    spools = [open_spool(tmp_path, ROOM) for _ in range(3)]
    for spool in spools:
        spool.append([spooled(spool.path.name.encode())])
    for spool in spools[1:]:
        spool.close()
    (tmp_path / "spool-1.db").write_bytes(b"no database at all" * 1_000)
    (tmp_path / "damaged-spool-1-1.db").mkdir()
    assert [bodies(left) for left in open_left_behind(tmp_path)] == [[b"spool-2.db"]]
    assert [path.name for path in set_aside_files(tmp_path)] == ["damaged-spool-1-1.db", "damaged-spool-1-2.db"]
    spools[0].close()


def test_i1_each_commit_is_fsynced(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    (synchronous,) = spool._database.execute("PRAGMA synchronous").fetchone()
    (journal,) = spool._database.execute("PRAGMA journal_mode").fetchone()
    assert (synchronous, journal) == (2, "wal")
    spool.close()


def test_i1_what_was_drained_from_a_file_takes_nothing_out_of_the_next(tmp_path: Path) -> None:
    """The drain waits for Postgres meanwhile: what it lets go of then must be what it had read."""
    with closing(open_spool(tmp_path / "spool", ROOM)) as spool:
        spool.append([spooled(f"{number}".encode()) for number in range(6)])
        spool.delete(spool.select_oldest(0, 2, ROOM))
        being_written = spool.select_oldest(0, 2, ROOM)
        spool.path.unlink()
        spool.room()  # as /readyz asks: it goes on in another file, where the ids begin anew
        spool.delete(being_written)
        assert bodies(spool) == [b"2", b"3", b"4", b"5"]
        assert spool.events == 4
        spool.delete(spool.select_oldest(0, 10, ROOM))
        assert (bodies(spool), spool.events) == ([], 0)


def test_a_damaged_file_is_set_aside_by_the_next_write(tmp_path: Path) -> None:
    with closing(open_spool(tmp_path / "spool", ROOM)) as spool:
        spool.append([spooled(b"gone")])
        spool.delete(spool.select_oldest(0, 10, ROOM))
    with closing(sqlite3.connect(spool.path)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'spooled'").fetchone()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with spool.path.open("r+b") as file:
        file.seek((page - 1) * 4_096 + 5)
        file.write(b"\0\2")  # where the cells begin
    with closing(open_spool(tmp_path / "spool", ROOM)) as spool:
        spool.append([spooled(b"new")])
        assert bodies(spool) == [b"new"]
    assert len(set_aside_files(tmp_path / "spool")) == 1
