"""A restored copy does not act as production, and a database in an earlier state is reported (I11, I9)."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from archiver import embedded
from tests.conftest import Cluster
from tests.support.clusters import Server, placed, programs_of
from tests.support.followups import receiving, subscribe
from tests.support.load import rows
from tests.support.payloads import created
from tests.support.receivers import Receiver, archiver, serving
from tests.support.servers import let_writer_in, program
from tests.support.waiting import until

SETTINGS = {"ARCHIVER_SEAL_EVERY": "1", "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE": "true"}


def tail(url: str, at: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    options = {"ARCHIVER_HOME": str(home)} if home else {}
    return archiver("followups", "tail", "--from", at, "--no-follow", database_url=url, **options)


def feed_end(url: str) -> tuple[str, int]:
    """The epoch and the cursor of the newest change."""
    return tuple(rows(url, "SELECT epoch, cursor FROM analytics.changes ORDER BY cursor DESC LIMIT 1")[0])


def is_published(url: str) -> bool:
    """Whether all is, the seals of all events included."""
    return is_all_sealed(url) and not rows(url, "SELECT 1 FROM archiver.outbox")


def post(receiver: Receiver, number: int) -> str:
    status: str = receiver.post(created(f"c{number}", f"s{number}")).json()["status"]
    return status


def newest_seal(url: str) -> int:
    return int(rows(url, "SELECT coalesce(max(id), 0) FROM archiver.seals")[0][0])


def is_all_sealed(url: str) -> bool:
    query = "SELECT max(id) <= (SELECT coalesce(max(events_through), 0) FROM archiver.seals) FROM archiver.events"
    return bool(rows(url, query)[0][0])


def remembered(home: Path) -> dict[str, Any]:
    """What this machine remembers of the newest epoch."""
    path = home / "served.json"
    return list(json.loads(path.read_text()).values())[-1] if path.exists() else {}


def assert_is_stopped(receiver: Receiver, url: str, home: Path, why: str) -> None:
    """It receives, but neither seals nor publishes, and says so in each place."""
    until(lambda: "is not the one served before" in receiver.stderr(), "the log says so")
    stopped = {f'archiver_worker_up{{duty="{duty}"}} 0.0' for duty in ("seal", "publish", "followups", "identity")}
    until(lambda: stopped <= set(receiver.get("/metrics").text.splitlines()), "the duties are stopped")
    before = newest_seal(url), rows(url, "SELECT max(cursor) FROM archiver.changes")
    assert post(receiver, 1_000) in {"stored", "duplicate"}
    assert receiver.get("/readyz").status_code == 200
    result = json.loads(archiver("doctor", "--json", database_url=url, ARCHIVER_HOME=str(home)).stdout)
    (finding,) = [each for each in result if each["check"] == "identity"]
    assert (finding["verdict"], why in finding["detail"]) == ("failure", True), finding
    for command in ("seal", "verify", "tail"):
        arguments = ["followups", "tail", "--from", "0", "--no-follow"] if command == "tail" else [command]
        ended = archiver(*arguments, database_url=url, ARCHIVER_HOME=str(home))
        assert (ended.returncode, "archiver adopt" in ended.stderr) == (command != "tail", True), ended.stderr
    verified = json.loads(archiver("verify", "--json", database_url=url, ARCHIVER_HOME=str(home)).stdout)
    assert (verified["ok"], why in verified["identity"]) == (False, True)
    assert [(each["table"], each["fault"]) for each in verified["findings"]] == [("epochs", "not_the_one_served")]
    assert (newest_seal(url), rows(url, "SELECT max(cursor) FROM archiver.changes")) == before


def test_a_restored_copy_receives_but_seals_and_sends_nothing_until_it_is_adopted(
    url: str, own: Cluster, tmp_path: Path
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    with receiving() as endpoint:
        engine = own.engine(url)
        subscribe(engine, endpoint.url, "chat.created")
        engine.dispose()
        with serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
            assert post(receiver, 1) == "stored"
            until(lambda: is_all_sealed(url), "it is sealed")
            until(lambda: len(endpoint.got) == 1, "it is sent")
            assert receiver.stop() == 0
        copy = own.clone(url.partition("?")[0].rpartition("/")[2])
        with serving(copy, "--worker", ARCHIVER_HOME=str(other), **SETTINGS) as receiver:
            assert_is_stopped(receiver, copy, other, "object id")
            assert len(endpoint.got) == 1
            no = archiver("adopt", database_url=copy, ARCHIVER_HOME=str(other))  # an empty answer
            assert (no.returncode, "object id" in no.stderr) == (1, True)
            yes = archiver("adopt", "--yes", database_url=copy, ARCHIVER_HOME=str(other))
            assert (yes.returncode, "Epoch 2" in yes.stdout) == (0, True), yes.stderr
            until(lambda: is_all_sealed(copy), "it is sealed again")
            until(lambda: len(endpoint.got) == 2, "it is sent again")
            assert receiver.stop() == 0
        assert rows(copy, "SELECT detail ->> 'epoch' FROM archiver.acts WHERE kind = 'adopt'") == [("2",)]
        again = archiver("adopt", "--yes", database_url=copy, ARCHIVER_HOME=str(other))
        assert (again.returncode, "Nothing to adopt" in again.stdout) == (0, True)
        # The original goes on, and so does a machine that never served it.
        with serving(url, "--worker", ARCHIVER_HOME=str(tmp_path / "third"), **SETTINGS) as receiver:
            assert post(receiver, 2) == "stored"
            until(lambda: is_all_sealed(url), "it is sealed")
            assert receiver.stop() == 0
        own.drop(copy)


@contextmanager
def primary_of(postgres: embedded.Postgres, stack: ExitStack) -> Iterator[tuple[Server, Server]]:
    programs, user = programs_of(postgres), postgres.data.stat().st_uid if os.getuid() == 0 else None
    primary, other = (stack.enter_context(placed(programs, user)) for _ in range(2))
    primary.run("initdb", "-D", primary.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
    primary.start()
    with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE archive")
    assert archiver("migrate", database_url=primary.url("archive")).returncode == 0
    let_writer_in(primary.url("archive"))
    yield primary, other


def base_backup(primary: Server, other: Server, *options: str) -> None:
    where: list[str | Path] = ["-d", primary.url("postgres"), "-D", other.data, "-X", "stream", "-c", "fast"]
    other.run("pg_basebackup", *where, *options)


@contextmanager
def replicated(postgres: embedded.Postgres, stack: ExitStack) -> Iterator[tuple[Server, Server, str]]:
    """A primary, its standby, and a URL that finds the one of them that takes writes."""
    with primary_of(postgres, stack) as (primary, standby):
        base_backup(primary, standby, "-R")
        standby.start()
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        yield primary, standby, f"postgresql://postgres@{hosts}/archive?target_session_attrs=read-write"


def test_a_restored_backup_that_lacks_acknowledged_events_is_reported(
    postgres: embedded.Postgres, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with ExitStack() as stack, primary_of(postgres, stack) as (primary, backup):
        url = primary.url("archive")
        with serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
            assert post(receiver, 1) == "stored"
            until(lambda: is_all_sealed(url), "it is sealed")
            until(lambda: is_published(url), "it is published")
            base_backup(primary, backup)
            remaining = feed_end(url)
            assert post(receiver, 2) == "stored"
            until(lambda: is_published(url), "it is published")
            until(lambda: remembered(home).get("seal_id") == newest_seal(url), "this machine remembers it")
            lost = feed_end(url)
            until(lambda: remembered(home).get("cursor") == lost[1], "this machine remembers the newest change")
            assert receiver.stop() == 0
        primary.kill()
        backup.start()
        url = backup.url("archive")
        # A machine that remembers nothing is stopped by what the command has found on another.
        for folder, reason in ((home, "it lacks event"), (tmp_path / "other", "found by the machine")):
            refused = archiver("seal", database_url=url, ARCHIVER_HOME=str(folder))
            assert (refused.returncode, reason in refused.stderr) == (1, True), refused.stderr
        with serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
            assert_is_stopped(receiver, url, home, "it lacks event")
            # Ids that are given again do not hide it.
            for number in range(2_000, 2_010):
                assert post(receiver, number) == "stored"
            assert_is_stopped(receiver, url, home, "it lacks event")
            # A cursor that the database has is gone on from; one that was lost is not.
            assert tail(url, f"{remaining[0]}:{remaining[1]}").returncode == 0
            assert tail(url, f"{lost[0]}:{lost[1]}").returncode == 1
            # A machine that remembers nothing stops as well.
            other = tmp_path / "other"
            (finding,) = [
                each
                for each in json.loads(
                    archiver("doctor", "--json", database_url=url, ARCHIVER_HOME=str(other)).stdout
                )
                if each["check"] == "identity"
            ]
            assert (finding["verdict"], "found by the machine" in finding["detail"]) == ("failure", True)
            adopted = archiver("adopt", "--yes", "--json", database_url=url, ARCHIVER_HOME=str(other))
            answer = json.loads(adopted.stdout)
            assert (answer["adopted"], answer["epoch"], "lacks" in answer["reason"]) == (True, 2, True)
            until(lambda: is_published(url), "it is published again")
            assert receiver.stop() == 0
        new = feed_end(url)
        assert (new[0].startswith("2-"), new[1] > lost[1]) == (True, True)
        for at in (f"{lost[0]}:{lost[1]}", f"{lost[1]}"):
            ended = tail(url, at)
            advice = f"--from {new[0]}:{remaining[1]}"
            assert (ended.returncode, ended.stdout, advice in ended.stderr) == (1, "", True), ended.stderr
        for at in (f"{new[0]}:{remaining[1]}", f"{remaining[0]}:{remaining[1]}", f"{remaining[1]}"):
            ended = tail(url, at)
            result = [json.loads(line) for line in ended.stdout.splitlines()]
            assert ended.returncode == 0
            assert {each["epoch"] for each in result} == {new[0]}
            assert "epoch" in ended.stderr
            assert "were deleted" not in ended.stderr
        assert (tail(url, f"{new[0]}:{new[1]}").returncode, tail(url, f"{new[1]}").stderr) == (0, "")
        assert (tail(url, "9-00000000:1").returncode, tail(url, ":1").returncode, tail(url, "x").returncode) == (
            1,
            2,
            2,
        )


def test_a_dump_restored_into_another_database_is_stopped(url: str, own: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
        assert post(receiver, 1) == "stored"
        until(lambda: is_published(url), "it is published")
        end = feed_end(url)
        assert receiver.stop() == 0
    own.execute("CREATE DATABASE restored")
    restored = own.url("restored")
    dump = tmp_path / "dump"
    subprocess.run([program("pg_dump"), "-Fc", "-f", dump, url], check=True)
    subprocess.run([program("pg_restore"), "-d", restored, dump], check=True)
    with serving(restored, "--worker", ARCHIVER_HOME=str(tmp_path / "other"), **SETTINGS) as receiver:
        assert_is_stopped(receiver, restored, tmp_path / "other", "object id")
        assert tail(restored, f"{end[0]}:{end[1]}").returncode == 0
        assert receiver.stop() == 0
    own.drop(restored)


def test_a_promoted_standby_that_lacks_acknowledged_events_stops_every_machine(
    postgres: embedded.Postgres, tmp_path: Path
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    with (
        ExitStack() as stack,
        replicated(postgres, stack) as (primary, standby, url),
        serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver,
    ):
        assert post(receiver, 1) == "stored"
        first = primary.url("archive")
        until(lambda: is_published(first), "it is published")
        until(lambda: feed_end(standby.url("archive")) == feed_end(first), "the standby has it")
        standby.run("pg_ctl", "-D", standby.data, "-m", "fast", "-w", "stop")
        assert post(receiver, 2) == "stored"
        until(lambda: is_published(first), "it is published")
        newest = feed_end(first)[1]
        until(lambda: remembered(home).get("cursor") == newest, "this machine remembers it")
        primary.kill()
        standby.start()
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        until(lambda: post(receiver, 3) in {"stored", "duplicate"}, "it takes events")
        assert_is_stopped(receiver, url, home, "it lacks event")
        # One that remembers nothing, such as another host, or this one with an empty folder.
        with serving(url, "--worker", ARCHIVER_HOME=str(other), **SETTINGS) as second:
            assert_is_stopped(second, url, other, "it lacks event")
            assert archiver("adopt", "--yes", database_url=url, ARCHIVER_HOME=str(other)).returncode == 0
            until(lambda: is_published(standby.url("archive")), "it is published again")
            assert feed_end(standby.url("archive"))[1] > newest
            assert second.stop() == 0
        assert receiver.stop() == 0


@pytest.mark.parametrize("fault", ["locked", "revoked"])
def test_i13_seals_that_cannot_be_read_stop_neither_feed_nor_followups(fault: str, url: str, own: Cluster) -> None:
    with receiving() as endpoint, ExitStack() as stack:
        engine = own.engine(url)
        subscribe(engine, endpoint.url, "chat.created")
        engine.dispose()
        receiver = stack.enter_context(serving(url, "--worker", **SETTINGS))
        assert post(receiver, 1) == "stored"
        until(lambda: is_published(url), "it is published")
        until(lambda: len(endpoint.got) == 1, "it is sent")
        holder = stack.enter_context(psycopg.connect(url))
        if fault == "locked":
            holder.execute("LOCK TABLE archiver.seals IN ACCESS EXCLUSIVE MODE")
        else:
            holder.execute("REVOKE SELECT ON archiver.seals FROM archiver_writer")
            holder.commit()
        up = 'archiver_worker_up{duty="identity"} 0.0'
        until(lambda: up in receiver.get("/metrics").text, "it is reported")
        for number in range(2, 8):
            assert post(receiver, number) == "stored"
        until(lambda: len(endpoint.got) == 7, "all are sent all the same")
        holder.rollback()
        holder.execute("GRANT SELECT ON archiver.seals TO archiver_writer")
        holder.commit()
        until(lambda: up not in receiver.get("/metrics").text, "it is compared again")
        until(lambda: is_published(url), "it is sealed again")
        assert receiver.stop() == 0


def test_a_folder_that_cannot_be_written_stops_nothing_and_is_reported(url: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "served.lock").mkdir(parents=True)
    with serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
        assert post(receiver, 1) == "stored"
        until(lambda: is_published(url), "it is published")
        up = 'archiver_worker_up{duty="identity"} 0.0'
        until(lambda: up in receiver.get("/metrics").text, "it is reported")
        until(lambda: "served.json (ARCHIVER_HOME) cannot be written" in receiver.stderr(), "and logged")
        assert not remembered(home)
        (home / "served.lock").rmdir()
        until(lambda: remembered(home).get("cursor") == feed_end(url)[1], "it is remembered, with nothing new")
        (home / "served.json").write_text("{")
        until(lambda: "is damaged" in receiver.stderr(), "a damaged one is reported")
        assert receiver.stop() == 0


def test_a_planned_failover_to_a_standby_that_lacks_nothing_stops_nothing(
    postgres: embedded.Postgres, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with (
        ExitStack() as stack,
        replicated(postgres, stack) as (primary, standby, url),
        serving(url, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver,
    ):
        assert post(receiver, 1) == "stored"
        until(lambda: is_all_sealed(primary.url("archive")), "it is sealed")
        primary.run("pg_ctl", "-D", primary.data, "-m", "fast", "-w", "stop")
        standby.run("pg_ctl", "-D", standby.data, "-w", "promote")
        until(lambda: post(receiver, 2) in {"stored", "duplicate"}, "it takes events")
        until(lambda: is_all_sealed(standby.url("archive")), "it is sealed")
        until(lambda: remembered(home).get("timeline") == 2, "the timeline went up")
        assert "not the one served before" not in receiver.stderr()
        assert receiver.stop() == 0


def test_a_copied_folder_of_the_embedded_database_is_stopped_and_a_moved_one_is_not() -> None:
    with tempfile.TemporaryDirectory(prefix="archiver-identity-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # else, as root, the data would lie elsewhere
        home, copy, moved = folder / "home", folder / "copy", folder / "moved"
        with serving(None, "--worker", ARCHIVER_HOME=str(home), **SETTINGS) as receiver:
            assert post(receiver, 1) == "stored"
            until(lambda: remembered(home).get("seal_id", 0) > 0, "it is sealed")
            assert receiver.stop() == 0
        assert not (home / "postgres").is_symlink()
        shutil.copytree(home, copy, symlinks=True)
        owner = (home / "postgres").stat()
        for path in [copy / "postgres", *(copy / "postgres").rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid)
        home.rename(moved)
        with serving(None, "--worker", ARCHIVER_HOME=str(moved), **SETTINGS) as receiver:
            before = remembered(moved)["seal_id"]
            assert post(receiver, 2) == "stored"
            until(lambda: remembered(moved)["seal_id"] > before, "the moved one is sealed")
            assert receiver.stop() == 0
        with serving(None, "--worker", ARCHIVER_HOME=str(copy), **SETTINGS) as receiver:
            up = 'archiver_worker_up{duty="seal"} 0.0'
            until(lambda: up in receiver.get("/metrics").text, "the copy is not sealed")
            until(lambda: "it has other files" in receiver.stderr(), "the log says why")
            assert post(receiver, 3) == "stored"
            assert archiver("adopt", "--yes", ARCHIVER_HOME=str(copy)).returncode == 0
            until(lambda: remembered(copy)["seal_id"] > 0, "it is sealed again")
            assert receiver.stop() == 0
