"""The embedded Postgres after kill -9 of each process, and beside processes that look similar."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from archiver import embedded
from archiver.embedded import paths, postmaster
from tests.support.embedding import query, server_pid, user_process
from tests.support.waiting import until


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="embedded-test-")).resolve()
    folder.chmod(0o711)
    yield folder / "home"
    for lock in folder.glob("**/postgres.watch"):
        postmaster.stop_server(lock.with_name("postgres"))
        with paths.exclusive(lock):  # the watchdog gives it up when it goes
            pass
    shutil.rmtree(folder)


def watchdog(home: Path) -> int | None:
    data = os.fsencode(home / "postgres")
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(postmaster.__file__) in command and data in command:
                return int(entry.name)
    return None


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not postmaster.is_running(pid), f"{pid} is dead")


def remember(postgres: embedded.Postgres) -> None:
    query(postgres, "CREATE TABLE kept AS SELECT 7 AS seven")


def assert_remembered(home: Path) -> None:
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT seven FROM kept") == (7,)


def owned(home: Path, command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
    """A process of the user that Postgres runs as: only theirs could pass for a postmaster."""
    owner = (home / "postgres").stat()
    if os.geteuid() == 0:
        settings |= {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    return subprocess.Popen(command, cwd="/", **settings)


@contextmanager
def bystander(home: Path, *, name: str) -> Iterator[int]:
    """A process that waits for its input, under any name."""
    with owned(home, [name, "-c", "read line"], executable="/bin/sh", stdin=subprocess.PIPE) as process:
        yield process.pid
        assert process.poll() is None, "the innocent process was killed"
        process.communicate()


def leave_pid_file(home: Path, pid: int) -> None:
    """What a crash leaves, but with a pid that has meanwhile been given to another process."""
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        path = home / "postgres" / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([f"{pid}\n", *lines[1:]]))


def test_the_server_goes_when_its_only_user_is_killed(home: Path) -> None:
    with user_process(home) as process:
        pid = server_pid(process)
        with psycopg.connect(f"postgresql://postgres@/archiver?host={home}/postgres") as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS seven")
        process.kill()
        process.communicate()
    until(lambda: not postmaster.is_running(pid), "the server is gone")
    assert "database system is shut down" in (home / "postgres.log").read_text()
    assert_remembered(home)


def test_the_server_stays_while_one_user_of_two_lives(home: Path) -> None:
    with user_process(home) as one, user_process(home) as other:
        pid = server_pid(one)
        assert server_pid(other) == pid
        one.kill()
        one.communicate()
        with embedded.running(home) as postgres:
            assert query(postgres, "SELECT 1") == (1,)
            assert postgres.pid == pid
        other.kill()
        other.communicate()
    until(lambda: not postmaster.is_running(pid), "the server is gone")


def test_users_that_come_while_others_are_killed_always_find_a_server(home: Path) -> None:
    embedded.start(home).stop()
    for _ in range(15):
        with user_process(home) as doomed:
            server_pid(doomed)
            doomed.kill()
            with embedded.running(home) as postgres:
                assert query(postgres, "SELECT 1") == (1,)
            doomed.communicate()
    until(lambda: postmaster.serving(home / "postgres") is None, "the server is gone")


def test_a_killed_watchdog_is_replaced_by_the_next_start(home: Path) -> None:
    with ExitStack() as processes:
        one = processes.enter_context(user_process(home))
        pid = server_pid(one)
        kill(until(lambda: watchdog(home), "there is a watchdog"))
        other = processes.enter_context(user_process(home))
        assert server_pid(other) == pid
        for process in (one, other):
            process.kill()
            process.communicate()
    until(lambda: not postmaster.is_running(pid), "the new watchdog stopped the server")


def test_without_watchdog_and_users_the_next_start_takes_the_server_over(home: Path) -> None:
    with user_process(home) as process:
        pid = server_pid(process)
        kill(until(lambda: watchdog(home), "there is a watchdog"))
        process.kill()
        process.communicate()
    assert postmaster.is_running(pid)
    with embedded.running(home) as postgres:
        assert postgres.pid == pid
    assert not postmaster.is_running(pid)


def test_there_is_one_watchdog_and_it_ends_with_the_server(home: Path) -> None:
    with embedded.running(home), embedded.running(home):
        pid = until(lambda: watchdog(home), "there is a watchdog")
        with pytest.raises(BlockingIOError):
            _lock(home / "postgres.watch")
    until(lambda: not postmaster.is_running(pid), "the watchdog is gone")
    _lock(home / "postgres.watch")


def _lock(path: Path) -> None:
    file = paths.open_file(path)
    try:
        if not postmaster.try_lock(file):
            raise BlockingIOError
    finally:
        os.close(file)


def test_the_watchdog_stops_the_server_and_gives_its_own_lock_up_first(home: Path) -> None:
    """The watchdog's own code, run here: its process does the same."""
    with ExitStack() as users:
        postgres = users.enter_context(embedded.running(home))
        kill(until(lambda: watchdog(home), "there is a watchdog"))
        files = [paths.open_file(home / f"postgres.{name}") for name in ("lock", "users", "watch")]
        assert postmaster.try_lock(files[2])
        thread = threading.Thread(target=postmaster.watch, args=(postgres.data, *files))
        thread.start()
        with user_process(home) as process:
            assert server_pid(process) == postgres.pid
            users.close()
            assert postmaster.is_running(postgres.pid)
            process.kill()
            process.communicate()
    thread.join(120)
    assert not postmaster.is_running(postgres.pid)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(files[2])
    for file in files[:2]:
        os.close(file)


def test_a_killed_postmaster_loses_nothing_that_was_committed(home: Path) -> None:
    with embedded.running(home) as first:
        remember(first)
        kill(first.pid)
        with embedded.running(home) as second:
            assert second.pid != first.pid
            assert query(second, "SELECT seven FROM kept") == (7,)
    assert_remembered(home)


# pg_sleep would notice that the postmaster is gone.
BUSY = """
DO $$
BEGIN WHILE (pg_stat_file('{done}', true)).size IS NULL LOOP END LOOP; END
$$
"""


def work_on(url: str, done: Path) -> None:
    """A backend that is busy until a file exists, whatever happens to its postmaster."""
    with suppress(psycopg.OperationalError), psycopg.connect(url) as connection:
        connection.execute(BUSY.format(done=done).encode())


def test_backends_that_outlive_their_postmaster_are_waited_for(home: Path) -> None:
    with embedded.running(home) as postgres, ThreadPoolExecutor() as threads:
        remember(postgres)
        log, done = home / "postgres.log", home / "done"
        working = threads.submit(work_on, postgres.url, done)
        active = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        (orphan,) = until(lambda: query(postgres, f"{active} AND query LIKE '%DO $$%'"), "the backend is busy")
        kill(postgres.pid)
        assert postmaster.is_running(orphan)
        starting = threads.submit(assert_remembered, home)
        try:
            until(lambda: "pre-existing shared memory block" in log.read_text(), "the start waits for the backend")
            assert postmaster.is_running(orphan)
            assert not starting.done()
        finally:
            done.touch()
        starting.result(240)
        assert not postmaster.is_running(orphan)
        working.result(240)


def test_a_smart_shutdown_is_reported_without_earlier_errors(home: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match="plenty"):
        embedded.start(home, options={"shared_buffers": "plenty"})
    with embedded.running(home) as postgres:
        with psycopg.connect(postgres.url):
            os.kill(postgres.pid, signal.SIGTERM)
            log = home / "postgres.log"
            until(lambda: "received smart shutdown request" in log.read_text(), "it shuts down")
            with pytest.raises(embedded.EmbeddedError, match=f"pid {postgres.pid}.*is shutting down") as item:
                embedded.start(home)
            assert "plenty" not in str(item.value)
        with embedded.running(home) as again:  # once they have gone
            assert query(again, "SELECT 1") == (1,)
            query(again, "ALTER DATABASE postgres WITH ALLOW_CONNECTIONS false")
            with pytest.raises(embedded.EmbeddedError, match="refuses the connection") as refused:
                embedded.start(home)
            assert "plenty" not in str(refused.value)
            assert "smart shutdown" not in str(refused.value)
            assert "starting PostgreSQL" in str(refused.value)


@pytest.mark.parametrize("also_initdb", [False, True], ids=["its parent", "initdb too"])
def test_a_killed_initdb_leaves_nothing_dead(home: Path, also_initdb: bool) -> None:
    with user_process(home) as process:
        fresh = until(lambda: next(home.glob("postgres.new-*/base/1"), None), "initdb is at work")
        assert not (home / "postgres").exists()
        process.kill()
        if also_initdb:
            kill(initdb_of(fresh.parent.parent))
        with embedded.running(home) as postgres:
            assert query(postgres, "SELECT 1") == (1,)
            assert not list(home.glob("postgres.new-*"))
        process.communicate()


def initdb_of(fresh: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(command[0])).name == "initdb" and os.fsencode(fresh) in command:
                return int(entry.name)
    raise AssertionError(f"no initdb works on {fresh}")


def test_no_other_process_is_mistaken_for_the_server(home: Path) -> None:
    with embedded.running(home) as postgres:
        remember(postgres)
        kill(postgres.pid)
        for name in ("innocent", "postgres"):
            with bystander(home, name=name) as pid:
                leave_pid_file(home, pid)
                assert postmaster.serving(home / "postgres") is None
                postmaster.stop_server(home / "postgres")
                with embedded.running(home) as again:
                    assert query(again, "SELECT seven FROM kept") == (7,)
                    kill(again.pid)


def test_a_stale_pid_that_is_a_zombie_or_we_ourselves_does_not_stop_a_start(home: Path) -> None:
    with embedded.running(home) as postgres:
        remember(postgres)
        with owned(home, ["/bin/sh", "-c", ":"]) as zombie:
            until(lambda: not postmaster.is_running(zombie.pid), "it is a zombie")
            assert postmaster.exists(zombie.pid)
            for pid in (zombie.pid, os.getpid(), os.getppid(), 1):
                kill(postmaster.serving(home / "postgres") or postgres.pid)
                leave_pid_file(home, pid)
                with embedded.running(home) as again:
                    assert query(again, "SELECT seven FROM kept") == (7,)


@pytest.mark.parametrize("text", ["", "rubbish\n", "12"])
def test_a_pid_file_without_sense_does_not_hang_a_start(home: Path, text: str) -> None:
    embedded.start(home).stop()
    (home / "postgres" / "postmaster.pid").write_text(text)
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT 1") == (1,)


def test_a_server_that_answers_from_elsewhere_is_left_alone(home: Path) -> None:
    """As from another container: its pid means nothing here, but its socket is live."""
    embedded.start(home).stop()
    path = home / "postgres" / ".s.PGSQL.5432"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(embedded.EmbeddedError, match="another Postgres, perhaps in another container"):
            embedded.start(home)
        assert path.exists()
    embedded.start(home).stop()


def test_a_failed_start_leaves_no_server_and_no_short_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_home = home / ("h" * 100)
    home.mkdir()
    home.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(home.parent))  # those of other tests are elsewhere
    with pytest.raises(embedded.EmbeddedError, match="did not start"):
        embedded.start(long_home, options={"shared_buffers": "plenty"})
    assert (long_home / "postgres.socket").readlink().parent == home.parent
    assert list(home.parent.glob(f"{postmaster.SHORT_PREFIX}*")) == []


def test_a_crash_leaves_no_short_folder_behind_for_long(home: Path) -> None:
    long_home = home / ("h" * 100)
    home.mkdir()
    home.chmod(0o711)
    with embedded.running(long_home) as postgres:
        kill(postgres.pid)
        embedded.start(long_home).stop()
    assert not postgres.socket_dir.exists()


def has_waiter(path: Path) -> bool:
    """Whether somebody waits for a lock of a file: the kernel lists that one with an arrow."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_the_last_user_is_not_mistaken_when_the_watchdog_takes_its_lock_for_an_instant(home: Path) -> None:
    home.mkdir()
    users = home / "postgres.users"
    of_watchdog, of_user = paths.open_file(users), paths.open_file(users)
    assert postmaster.try_lock(of_watchdog)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(postmaster.is_last(of_user)))
    thread.start()
    until(lambda: has_waiter(users), "it waits")
    os.close(of_watchdog)
    thread.join(120)
    os.close(of_user)
    assert answers == [True]


def test_the_watchdog_does_not_stop_a_server_with_a_new_user(home: Path) -> None:
    with user_process(home) as process:
        pid = server_pid(process)
        with paths.exclusive(home / "postgres.lock"):
            process.kill()
            process.communicate()
            until(lambda: has_waiter(home / "postgres.lock"), "the watchdog wants to stop the server")
            users = paths.join_users(home)
        try:
            until(lambda: has_waiter(home / "postgres.users"), "the watchdog waits for the new user")
            assert postmaster.is_running(pid)
        finally:
            os.close(users)
    until(lambda: not postmaster.is_running(pid), "the server is gone")
