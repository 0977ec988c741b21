"""The disk of the spool: full, damaged, or emptied by somebody under a receiver that uses it (I1, I3)."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from archiver import embedded
from tests.support.disks import small_disk
from tests.support.load import assert_archived, body_of, rows
from tests.support.outages import post, stopped, until_drained, waiting
from tests.support.receivers import Receiver, archiver, serving
from tests.support.waiting import until

SMALL = 3 * 1_048_576


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SMALL) as place:
        yield place


def fill(disk: Path, leave: int) -> None:
    """Take all but so many bytes of it, as logs do."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        result = os.statvfs(disk)
        left = result.f_bavail * result.f_frsize
        file.write(bytes(max(left - leave, 0)))


def spool_until_refused(receiver: Receiver, numbers: Iterator[int]) -> set[int]:
    """What it took, one by one, until it asked to come again."""
    taken: set[int] = set()
    for number in numbers:
        reply = receiver.post(body_of(number))
        if reply.status_code != 200:
            assert (reply.status_code, reply.json()["status"]) == (503, "unavailable")
            assert int(reply.headers["retry-after"]) > 0
            return taken
        assert reply.json()["status"] == "spooled"
        taken.add(number)
    raise AssertionError("unreachable: the numbers have no end")


def test_i1_a_full_disk_of_the_spool_loses_nothing_and_is_emptied_without_room(
    postgres: embedded.Postgres, url: str, disk: Path
) -> None:
    """To delete takes room too: what has gone is archived once all the same, and its room is had back."""
    numbers = count()
    with serving(url, ARCHIVER_HOME=str(disk)) as receiver:
        with stopped(postgres, signal.SIGQUIT):
            fill(disk, leave=400_000)
            taken = spool_until_refused(receiver, numbers)
            assert len(taken) > 20
            ready = receiver.get("/readyz")
            assert (ready.status_code, ready.json()["spool"]) == (503, "full")
            assert int(ready.headers["retry-after"]) > 0
            (disk / "ballast").unlink()
            assert receiver.get("/readyz").json()["spool"] == "ready"
            fill(disk, leave=400_000)
            more = spool_until_refused(receiver, numbers)
            assert len(more) > 20
            fill(disk, leave=0)
            assert waiting(receiver) == len(taken | more)
        until_drained(receiver)
        assert rows(url, "SELECT max(delivery_count) FROM archiver.events") == [(1,)]
        assert_archived(url, taken | more)
        until(lambda: (disk / "spool" / "spool-0.db").stat().st_size < 100_000, "its room is had back")
        for path in (disk / "spool").iterdir():  # (I8)
            assert b"question of" not in path.read_bytes()
        with stopped(postgres, signal.SIGQUIT):
            (disk / "ballast").unlink()
            assert set(post(receiver, range(100_000, 100_010))) == {"spooled"}
        until_drained(receiver)
    assert_archived(url, taken | more | set(range(100_000, 100_010)))


def test_i3_a_receiver_killed_on_a_full_disk_leaves_a_spool_that_is_archived_once(
    postgres: embedded.Postgres, url: str, disk: Path
) -> None:
    home = {"ARCHIVER_HOME": str(disk)}
    with serving(url, **home) as receiver:
        with stopped(postgres, signal.SIGQUIT):
            fill(disk, leave=400_000)
            taken = spool_until_refused(receiver, count())
            fill(disk, leave=0)
        until(lambda: rows(url, "SELECT 1 FROM archiver.events LIMIT 1"), "it has begun to empty it")
        receiver.kill()
    (disk / "ballast").unlink()
    with serving(url, **home) as second:
        until_drained(second)
    assert_archived(url, taken)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_files(folder: Path) -> None:
    for path in folder.glob("spool-*"):
        path.unlink()


def move_away(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("remove", [remove_folder, remove_files, move_away])
def test_i1_a_spool_that_is_removed_under_a_receiver_is_recreated(
    postgres: embedded.Postgres, url: str, tmp_path: Path, remove: Callable[[Path], None]
) -> None:
    """What it held, and what comes after, is there for a successor although the receiver is killed."""
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as receiver, stopped(postgres, signal.SIGQUIT):
        assert set(post(receiver, range(10))) == {"spooled"}
        remove(tmp_path / "spool")
        assert set(post(receiver, range(10, 20))) == {"spooled"}
        assert waiting(receiver) == 20
        assert receiver.get("/readyz").json()["spool"] == "ready"
        assert "removed while in use" in receiver.stderr()
        receiver.kill()
    with serving(url, **home) as second:
        until_drained(second)
    assert_archived(url, set(range(20)))


def test_i1_a_spool_that_cannot_be_recreated_accepts_nothing_and_reports_it(
    postgres: embedded.Postgres, url: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    with serving(url, ARCHIVER_HOME=str(tmp_path)) as receiver:
        with stopped(postgres, signal.SIGQUIT):
            assert set(post(receiver, range(10))) == {"spooled"}
            shutil.rmtree(spool)
            spool.write_bytes(b"")
            assert receiver.post(body_of(10)).status_code == 503
            ready = receiver.get("/readyz")
            assert (ready.status_code, "ARCHIVER_HOME" in ready.json()["spool"]) == (503, True)
            spool.unlink()
            assert set(post(receiver, range(11, 20))) == {"spooled"}
        until_drained(receiver)
        assert set(post(receiver, range(20, 25))) == {"stored"}
    assert_archived(url, set(range(25)) - {10})


def test_i3_two_receivers_with_one_spool_after_its_lock_was_removed_store_each_event_once(
    postgres: embedded.Postgres, url: str, tmp_path: Path
) -> None:
    home = {"ARCHIVER_HOME": str(tmp_path)}
    with serving(url, **home) as one, stopped(postgres, signal.SIGQUIT):
        assert set(post(one, range(20))) == {"spooled"}
        (tmp_path / "spool" / "spool-0.lock").unlink()
        with serving(url, **home) as other:
            assert set(post(other, range(20, 40))) == {"spooled"}
            assert set(post(one, range(40, 60))) == {"spooled"}
            until(postgres.restart_if_ended, "Postgres starts again")
            until_drained(other)
            until_drained(one)
    assert_archived(url, set(range(60)))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4_096 * 4_096)
        file.write(b"\xff" * 4_096)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [overwrite, truncate])
def test_i1_what_can_be_read_of_a_damaged_spool_is_archived(
    postgres: embedded.Postgres, url: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """And nothing else: no event that is not byte for byte what was acknowledged."""
    home = {"ARCHIVER_HOME": str(tmp_path)}
    spool = tmp_path / "spool"
    with serving(url, **home) as receiver, stopped(postgres, signal.SIGQUIT):
        assert set(post(receiver, range(200))) == {"spooled"}
        assert receiver.stop() == 0
        damage(spool / "spool-0.db")
        process = archiver("status", database_url=url, **home)
        assert (process.returncode, "is damaged" in process.stderr, "Traceback" in process.stderr) == (1, True, False)
        with serving(url, **home) as second:
            assert "readable deliveries saved" in second.stderr()
            assert set(post(second, range(200, 210))) == {"spooled"}
            assert second.stop() == 0
    with serving(url, **home) as third:
        until_drained(third)
        assert set(post(third, range(210, 220))) == {"stored"}
    assert (spool / "damaged-spool-0-1.db").exists()
    archived = rows(url, "SELECT count(*) FROM archiver.events")[0][0]
    assert 90 < archived < 220
    assert_archived(url, set(range(200, 220)))


def findings(home: Path, url: str, **settings: str) -> dict[str, tuple[str, str]]:
    """What `doctor` says of the spool, by what it checked: the verdict, and all of the text."""
    data = archiver(
        "doctor", "--json", database_url=url, ARCHIVER_HOME=str(home), ARCHIVER_WEBHOOK_SECRETS="x" * 20, **settings
    )
    values = {
        each["check"]: (each["verdict"], f"{each['detail']} {each['advice']}") for each in json.loads(data.stdout)
    }
    is_bad = any(verdict == "failure" for verdict, _ in values.values())
    assert (data.returncode, "Traceback" in data.stderr) == (int(is_bad), False)
    return {check: each for check, each in values.items() if check.startswith("spool")}


def test_doctor_says_what_is_wrong_with_the_spool(postgres: embedded.Postgres, url: str, disk: Path) -> None:
    few = {"ARCHIVER_SPOOL_BYTES": "1048576"}
    assert findings(disk, url, **few)["spool"][0] == "ok"
    assert not (disk / "spool").exists()
    verdict, text = findings(disk, url)["spool"]
    assert (verdict, "ARCHIVER_SPOOL_BYTES" in text) == ("warning", True)
    verdict, text = findings(disk, url, ARCHIVER_SPOOL="off")["spool"]
    assert (verdict, "ARCHIVER_SPOOL is off" in text) == ("warning", True)
    with serving(url, ARCHIVER_HOME=str(disk)) as receiver, stopped(postgres, signal.SIGQUIT):
        assert set(post(receiver, range(30))) == {"spooled"}
        assert receiver.stop() == 0
    result = findings(disk, url, **few)
    assert result["spool"][0] == "ok"
    assert (result["spooled"][0], "30 events" in result["spooled"][1]) == ("warning", True)
    assert "archiver serve" in result["spooled"][1]
    fill(disk, leave=0)
    verdict, text = findings(disk, url, **few)["spool"]
    assert (verdict, "full" in text, "ARCHIVER_HOME" in text) == ("failure", True, True)
    (disk / "ballast").unlink()
    overwrite(disk / "spool" / "spool-0.db")
    with serving(url, ARCHIVER_HOME=str(disk)) as receiver:
        until_drained(receiver)
    verdict, text = findings(disk, url, **few)["spool files"]
    assert (verdict, "damaged-spool-0-1.db" in text, "delete the files" in text) == ("warning", True, True)
    assert_archived(url, set())
    shutil.rmtree(disk / "spool")
    (disk / "spool").write_bytes(b"")
    verdict, text = findings(disk, url, **few)["spool"]
    assert (verdict, "ARCHIVER_HOME" in text) == ("failure", True)
