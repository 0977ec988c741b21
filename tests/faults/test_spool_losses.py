"""Damage to the spool by disks or people: intact deliveries are recovered, and losses are counted."""

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from archiver import events
from archiver.events import Delivery
from archiver.inbound.spool import Spool, SpoolError, open_left_behind, open_spool, select_lost
from archiver.inbound.spool.locked_file import hold
from archiver.operations.doctor import examine_spool
from archiver.settings import Settings
from tests.support.payloads import created
from tests.support.receivers import archiver, serving
from tests.support.waiting import until

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOM = 16 * 1_048_576
NOBODY = 65534  # the number of a user without rights
UNREACHABLE = "postgresql://nobody@127.0.0.1:1/x"
BESIDE = 160  # bytes before and after a body that its row may take


def body(number: int, size: int = 40) -> bytes:
    return f"<{number:06}>".encode() + bytes(65 + (number * 7 + at) % 26 for at in range(size))


def fill(folder: Path, sizes: list[int]) -> list[bytes]:
    """Spool so many deliveries, and let go of the file; answers their bodies."""
    expected = [body(number, size) for number, size in enumerate(sizes)]
    spool = open_spool(folder, ROOM)
    spool.append([Delivery(events.parse(each), NOW + timedelta(seconds=n), "k") for n, each in enumerate(expected)])
    spool.close()
    return expected


def left(spool: Spool) -> set[bytes]:
    """What can be drained."""
    result: set[bytes] = set()
    while page := spool.select_oldest(0, 50, 10**9):
        result |= {each.row[-1] for each in page}
        spool.delete(page)
    return result


def reopened(folder: Path) -> set[bytes]:
    spool = open_spool(folder, ROOM)
    try:
        return left(spool)
    finally:
        spool.close()


def is_untouched(raw: bytes, each: bytes, start: int, end: int) -> bool:
    """Whether the row of this body lies apart from the bytes that are damaged."""
    at = raw.index(each)
    return end <= at - BESIDE or start >= at + len(each) + BESIDE


@pytest.mark.parametrize("zeroed", [100, 4_096, 8_192])
def test_i1_all_rows_behind_a_damaged_head_are_found(tmp_path: Path, zeroed: int) -> None:
    expected = fill(tmp_path, [40 + 10 * n for n in range(40)] + [9_000, 40_000, 5_000])
    path = tmp_path / "spool-0.db"
    raw = path.read_bytes()
    path.write_bytes(bytes(zeroed) + raw[zeroed:])
    untouched = {each for each in expected if zeroed <= 100 or is_untouched(raw, each[:48], 0, zeroed)}
    assert len(untouched) > 20
    result = reopened(tmp_path)
    assert untouched <= result
    assert select_lost(tmp_path).events == len(expected) - len(result)


@given(st.floats(0, 1), st.integers(1, 6_000), st.booleans())
@settings(max_examples=60, deadline=None)
@example(0.0, 100, True)
@example(0.0, 6_000, False)
@example(0.578125, 91, False)
@example(0.59375, 131, True)
@example(0.001, 12, False)
@example(0.783203125, 28, True)
def test_i1_damage_anywhere_costs_no_row_that_it_does_not_touch(
    tmp_path_factory: pytest.TempPathFactory, place: float, length: int, is_zeroed: bool
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    expected = fill(folder, [40 + n for n in range(120)])
    path = folder / "spool-0.db"
    raw = path.read_bytes()
    start = int(place * (len(raw) - 1))
    end = min(start + length, len(raw))
    damage = bytes(end - start) if is_zeroed else bytes(each ^ 0x55 for each in raw[start:end])
    path.write_bytes(raw[:start] + damage + raw[end:])
    untouched = {each for each in expected if is_untouched(raw, each, start, end)}
    result = reopened(folder)
    assert untouched <= result <= set(expected)
    assert select_lost(folder).events == len(set(expected) - result)


def left_by_a_kill(folder: Path) -> tuple[Path, list[bytes]]:
    """A spool as after kill -9, its write-ahead log not written into its file, and the bodies that it holds."""
    spool = open_spool(folder / "live", ROOM)
    expected = [body(number, 300) for number in range(60)]
    for number, each in enumerate(expected):
        spool.append([Delivery(events.parse(each), NOW + timedelta(seconds=number), "k")])
    copied = folder / "copied"
    copied.mkdir()
    for name in ("spool-0.db", "spool-0.db-wal", "spool-0.count"):
        (copied / name).write_bytes((folder / "live" / name).read_bytes())
    spool.close()
    return copied, expected


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.7])
def test_i1_a_write_ahead_log_that_is_damaged_or_cut_costs_what_it_does_not_hold_and_no_more(
    tmp_path: Path, cut: float
) -> None:
    copied, expected = left_by_a_kill(tmp_path)
    wal = copied / "spool-0.db-wal"
    raw = bytearray(wal.read_bytes())
    at = int(cut * len(raw))
    raw[at : at + 200] = bytes(200)  # all behind it SQLite passes over
    wal.write_bytes(bytes(raw))
    result = reopened(copied)
    lost = set(expected) - result
    assert len(lost) <= 1
    assert select_lost(copied).events == len(lost)


@pytest.mark.parametrize("damaged", ["emptied", "head", "all", "log too"])
def test_i1_what_the_write_ahead_log_holds_is_found_although_its_file_is_damaged(
    tmp_path: Path, damaged: str
) -> None:
    """SQLite removes the log of an empty file, and all of a log behind a damaged frame, when it closes them."""
    copied, expected = left_by_a_kill(tmp_path)
    path, wal = copied / "spool-0.db", copied / "spool-0.db-wal"
    raw = path.read_bytes()
    path.write_bytes(b"" if damaged == "emptied" else b"x" * (100 if damaged == "head" else len(raw)) + raw[100:])
    if damaged == "log too":
        raw = wal.read_bytes()
        wal.write_bytes(raw[:32] + b"x" * 24 + raw[56:])
    assert reopened(copied) == set(expected)
    assert select_lost(copied).events == 0


def test_i1_a_write_ahead_log_that_is_removed_is_reported_with_the_number(tmp_path: Path) -> None:
    spool = open_spool(tmp_path / "live", ROOM)
    spool.append([Delivery(events.parse(body(number)), NOW, "k") for number in range(7)])
    home = tmp_path / "home"
    copied = home / "spool"
    copied.mkdir(parents=True)
    for name in ("spool-0.db", "spool-0.count"):
        (copied / name).write_bytes((tmp_path / "live" / name).read_bytes())
    spool.close()
    reopened(copied)
    assert select_lost(copied).events == 7
    reopened(copied)
    assert select_lost(copied).events == 7, "it is reported once"
    shown = archiver("doctor", database_url="postgresql://nobody@127.0.0.1:1/x", ARCHIVER_HOME=str(home))
    assert "7 acknowledged events are missing" in " ".join(shown.stdout.split())


def test_no_loss_is_reported_where_none_is(tmp_path: Path) -> None:
    expected = fill(tmp_path, [40] * 20)
    spool = open_spool(tmp_path, ROOM)
    spool.delete(spool.select_oldest(0, 5, 10**9))
    spool.close()
    assert len(reopened(tmp_path)) == 15
    spool = open_spool(tmp_path, ROOM)
    spool.delete(spool.select_oldest(0, 100, 10**9))
    spool.close()
    assert reopened(tmp_path) == set()
    assert select_lost(tmp_path).events == 0
    assert len(expected) == 20


@pytest.mark.parametrize("name", ["spool-0.db", "spool-0.db-wal", "spool-0.lock"])
@pytest.mark.parametrize("kind", ["folder", "link", "named pipe"])
def test_a_name_that_is_no_file_is_passed_over_and_reported(tmp_path: Path, name: str, kind: str) -> None:
    home = tmp_path / "home"
    folder = home / "spool"
    folder.mkdir(parents=True)
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "named pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / "elsewhere")
    spool = open_spool(folder, ROOM)
    spool.append([Delivery(events.parse(body(1)), NOW, "k")])
    assert left(spool) == {body(1)}
    assert spool.path.name == "spool-1.db"
    spool.close()
    assert not (tmp_path / "elsewhere").exists()
    shown = archiver("doctor", database_url="postgresql://nobody@127.0.0.1:1/x", ARCHIVER_HOME=str(home))
    assert name in shown.stdout


@pytest.mark.parametrize("name", ["lost.json", "lost.json.new"])
def test_i1_a_loss_that_cannot_be_recorded_stops_nothing_and_is_recorded_later(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    folder = home / "spool"
    fill(folder, [40] * 7)
    (folder / "spool-0.db").write_bytes(b"")
    (folder / name).mkdir()
    spool = open_spool(folder, ROOM)
    spool.append([Delivery(events.parse(body(9)), NOW, "k")])
    assert left(spool) == {body(9)}
    spool.close()
    shown = archiver("doctor", database_url="postgresql://nobody@127.0.0.1:1/x", ARCHIVER_HOME=str(home))
    assert str(folder / name) in shown.stdout
    (folder / name).rmdir()
    for _ in range(2):  # it is recorded once
        assert reopened(folder) == set()
        assert select_lost(folder).events == 7


def test_i1_a_replaced_file_whose_loss_cannot_be_recorded_is_recorded_later(tmp_path: Path) -> None:
    fill(tmp_path, [40] * 7)
    put_in_place(tmp_path / "spool-0.db", "folder")
    (tmp_path / "lost.json").mkdir()
    assert reopened(tmp_path) == set()
    (tmp_path / "lost.json").rmdir()
    for _ in range(2):
        assert reopened(tmp_path) == set()
        assert select_lost(tmp_path).events == 7


@pytest.mark.parametrize("name", ["spool-0.count", "lost.json"])
def test_a_file_with_the_length_of_a_whole_disk_is_not_read_into_memory(tmp_path: Path, name: str) -> None:
    expected = fill(tmp_path, [40] * 3)
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**40)
    assert reopened(tmp_path) == set(expected)
    assert select_lost(tmp_path).events == 0


def put_in_place(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("kind", ["folder", "link", "named pipe"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "left behind"])
def test_i1_a_file_that_is_replaced_by_something_else_is_reported_with_the_number(
    tmp_path: Path, kind: str, is_first: bool
) -> None:
    home = tmp_path / "home"
    folder = home / "spool"
    fill(folder, [40] * 7)
    if not is_first:
        for end in ("db", "lock", "count"):
            (folder / f"spool-0.{end}").rename(folder / f"spool-3.{end}")
    put_in_place(folder / f"spool-{0 if is_first else 3}.db", kind)
    for _ in range(2):  # it is reported once
        assert reopened(folder) == set()
        assert list(open_left_behind(folder)) == []
        assert select_lost(folder).events == 7
    shown = archiver("doctor", database_url="postgresql://nobody@127.0.0.1:1/x", ARCHIVER_HOME=str(home))
    assert "7 acknowledged events are missing" in " ".join(shown.stdout.split())


def test_a_file_that_is_replaced_while_its_process_runs_costs_nothing(tmp_path: Path) -> None:
    spool = open_spool(tmp_path, ROOM)
    spool.append([Delivery(events.parse(body(number)), NOW, "k") for number in range(7)])
    put_in_place(spool.path, "folder")
    other = open_spool(tmp_path, ROOM)
    assert select_lost(tmp_path).events == 0
    spool.append([Delivery(events.parse(body(7)), NOW, "k")])
    assert left(spool) | left(other) == {body(number) for number in range(8)}
    spool.close()
    other.close()
    assert reopened(tmp_path) == set()
    assert select_lost(tmp_path).events == 0


def test_the_metric_shows_the_events_of_a_replaced_file(database_url: str, tmp_path: Path) -> None:
    fill(tmp_path / "spool", [40] * 7)
    put_in_place(tmp_path / "spool" / "spool-0.db", "named pipe")
    with serving(database_url, ARCHIVER_HOME=str(tmp_path)) as receiver:
        until(lambda: "archiver_spool_lost_events 7.0" in receiver.get("/metrics").text, "the loss is shown")
        assert receiver.get("/readyz").json()["spool"] == "ready"
        assert receiver.stop() == 0
        assert "acknowledged events missing from the spool" in receiver.stderr()


def test_a_named_pipe_in_the_place_of_a_count_blocks_nothing(tmp_path: Path) -> None:
    for name in ("spool-0.count", "lost.json"):
        os.mkfifo(tmp_path / name)
    expected = fill(tmp_path, [40] * 3)
    assert reopened(tmp_path) == set(expected)
    assert select_lost(tmp_path).events == 0


def test_a_receiver_without_a_spool_tries_again_and_says_so(database_url: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o711)
    (home / "spool").write_text("in the way")
    with serving(database_url, ARCHIVER_HOME=str(home)) as receiver:
        assert receiver.get("/readyz").json()["spool"] == "none"
        (home / "spool").unlink()
        until(lambda: receiver.get("/readyz").json()["spool"] == "ready", "there is a spool again")
        assert receiver.post(created()).json()["status"] == "stored"


@pytest.mark.parametrize("log_too", [False, True])
def test_i1_an_older_copy_of_a_file_that_is_put_back_is_reported(tmp_path: Path, log_too: bool) -> None:
    """The copy has as many deliveries as were waiting, but others."""
    spool = open_spool(tmp_path, ROOM)
    spool.append([Delivery(events.parse(body(number)), NOW, "k") for number in range(5)])
    names = ("spool-0.db", "spool-0.db-wal") if log_too else ("spool-0.db",)
    if not log_too:
        spool.close()
    copies = {name: (tmp_path / name).read_bytes() for name in names}
    if not log_too:
        spool = open_spool(tmp_path, ROOM)
    spool.append([Delivery(events.parse(body(number)), NOW, "k") for number in range(5, 8)])
    spool.delete(spool.select_oldest(0, 5, 10**9))
    spool.close()
    for name, copy in copies.items():
        (tmp_path / name).write_bytes(copy)
    assert reopened(tmp_path) == {body(number) for number in range(5)}
    assert select_lost(tmp_path).events == 3
    reopened(tmp_path)
    assert select_lost(tmp_path).events == 3, "it is reported once"


def test_no_loss_is_reported_for_a_count_of_the_version_before_ids(tmp_path: Path) -> None:
    fill(tmp_path, [40] * 3)
    count = tmp_path / "spool-0.count"
    with count.open("r+b") as file:
        file.write(f"{3:020}\n".encode())  # in the place of the same bytes, as that version did
    fill(tmp_path, [40] * 2)
    (tmp_path / "spool-0.db").write_bytes(b"x" * 9_000)  # ids restart
    reopened(tmp_path)
    fill(tmp_path, [40])
    assert len(reopened(tmp_path)) == 1
    assert select_lost(tmp_path).events == 5


@contextmanager
def without_access_to(folder: Path, name: str) -> Iterator[None]:
    """Run the block as a user who owns the folder and may not use this file in it."""
    if os.geteuid() != 0:
        (folder / name).chmod(0)
        yield
        (folder / name).chmod(0o700)
        return
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    os.chown(folder / name, 0, 0)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["spool-0.db", "spool-0.lock", "."])
def test_a_file_of_another_user_is_named_with_its_owner_by_errors_and_doctor(name: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place) / "home" / "spool"
        fill(folder, [40] * 3)
        Path(place).chmod(0o711)
        owner = pwd.getpwuid(os.geteuid()).pw_name
        with without_access_to(folder, name):
            with pytest.raises(SpoolError, match=f"belongs to user {owner}; user .* may not read and write it"):
                hold(folder, 0, ROOM)
            shown = [
                each
                for each in examine_spool(Settings.model_validate({"ARCHIVER_HOME": str(folder.parent)}))
                if each.verdict == "failure"
            ]
        assert shown, "doctor reports it"
        assert all(f"user {owner}" in str(each) for each in shown), shown
        if name != ".":
            assert f"chown --reference={folder} {folder}/spool-*" in shown[0].advice


def test_a_command_of_root_reports_files_of_another_user() -> None:
    with TemporaryDirectory() as place:
        folder = Path(place) / "home" / "spool"
        fill(folder, [40] * 3)
        with without_access_to(folder, "spool-0.db"):
            pass
        shown = archiver("doctor", "--json", database_url=UNREACHABLE, ARCHIVER_HOME=str(folder.parent)).stdout
        assert ("spool-0.db" in shown) == (os.geteuid() == 0), shown
        assert "spool-0.lock" not in shown
