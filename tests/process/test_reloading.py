"""Settings in files are reloaded, without a signal and on SIGHUP; a wrong database at the start is survived."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import Engine

from archiver.compliance import seals
from tests.support.files import whole_lines
from tests.support.payloads import created
from tests.support.ports import free_port
from tests.support.receivers import Receiver, archiver, serving, starting
from tests.support.rows import rows
from tests.support.servers import as_writer
from tests.support.waiting import until

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres

OLD, NEW = "an old secret of the platform", "a new secret of the platform"


def code(receiver: Receiver, secret: str, number: int = 1) -> int:
    body = created(f"c{number}", f"s{number}")
    return receiver.post(body, {"x-webhook-secret": secret}).status_code


@contextmanager
def sending(receiver: Receiver, secret: str) -> Iterator[None]:
    """Deliveries one after the other meanwhile, each of which must be taken."""
    codes: list[int] = []
    ending = threading.Event()

    def send() -> None:
        while not ending.is_set():
            codes.append(code(receiver, secret, len(codes)))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    assert set(codes) == {200}


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("is_signalled", [False, True])
def test_secrets_are_rotated_without_a_restart_and_without_losing_a_delivery(
    workers: str, is_signalled: bool, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "secrets"
    file.write_text(OLD)
    options = {"ARCHIVER_WEBHOOK_SECRETS": "", "ARCHIVER_WEBHOOK_SECRETS_FILE": str(file)}
    with serving(database_url, "--workers", workers, "--no-worker", **options) as receiver:

        def change(value: str) -> None:
            file.write_text(value)
            if is_signalled:
                receiver.signal(signal.SIGHUP)

        def answers(secret: str, wanted: int) -> bool:
            return {code(receiver, secret) for _ in range(8)} == {wanted}

        assert (code(receiver, OLD), code(receiver, NEW)) == (200, 401)

        def reloads() -> Counter[int]:
            """How often each process read them again."""
            lines = [line for line in receiver.stderr().splitlines() if '"settings reloaded"' in line]
            return Counter(json.loads(line)["pid"] for line in lines)

        def started() -> int:
            return receiver.stderr().count('"receiving process started"')

        until(lambda: started() == int(workers), "each process has read the old one")
        with sending(receiver, OLD):
            before = reloads()
            change(f"{OLD},{NEW}")
            until(lambda: len(reloads() - before) == int(workers), "each process has read both")
            until(lambda: answers(NEW, 200), "both are accepted")
        with sending(receiver, NEW):
            change(NEW)
            until(lambda: answers(OLD, 401), "the old one is refused")
            change("")
            until(lambda: "new settings rejected" in receiver.stderr(), "an empty file is refused")
            until(lambda: receiver.metric("archiver_settings_current") == 0, "the metric says so")
            assert answers(NEW, 200)
        result = archiver("doctor", database_url=database_url, **options)
        assert result.returncode == 1
        assert "ARCHIVER_WEBHOOK_SECRETS" in result.stdout
        file.unlink()
        until(lambda: "cannot read" in receiver.stderr(), "a missing file is refused")
        os.mkfifo(file)
        until(lambda: "not a regular file" in receiver.stderr(), "a named pipe is refused")
        assert answers(NEW, 200)
        file.unlink()
        change(f"{NEW}\n")
        until(lambda: receiver.metric("archiver_settings_current") == 1, "it is read again")
        assert receiver.process.poll() is None
        assert receiver.stop() == 0


def test_one_process_with_rejected_settings_makes_the_metric_0(database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(OLD)
    options = {"ARCHIVER_WEBHOOK_SECRETS": "", "ARCHIVER_WEBHOOK_SECRETS_FILE": str(file)}
    with serving(database_url, "--worker", **options) as receiver:  # the worker beside it needs no secret
        until(lambda: receiver.metric('archiver_worker_up{duty="settings"}') == 1, "the worker reads its files, too")
        assert receiver.metric("archiver_settings_current") == 1
        file.write_text("")
        receiver.signal(signal.SIGHUP)
        until(lambda: receiver.metric("archiver_settings_current") == 0, "the receiver rejects the file")
        file.write_text(NEW)
        receiver.signal(signal.SIGHUP)
        until(lambda: receiver.metric("archiver_settings_current") == 1, "both use the file")


def test_a_token_is_changed_and_a_scheme_of_none_is_not_taken(database_url: str, tmp_path: Path) -> None:
    token, scheme = tmp_path / "token", tmp_path / "scheme"
    token.write_text("first")
    scheme.write_text("secret")
    files = {"ARCHIVER_API_TOKEN_FILE": str(token), "ARCHIVER_WEBHOOK_SCHEME_FILE": str(scheme)}
    with serving(database_url, **files) as receiver:

        def answer(value: str) -> int:
            headers = {"authorization": f"Bearer {value}"}
            url = f"{receiver.url}/sessions"
            return receiver._client.post(url, content=b'{"ids": ["s1"]}', headers=headers).status_code

        assert (answer("first"), answer("second")) == (200, 401)
        token.write_text("second")
        until(lambda: (answer("first"), answer("second")) == (401, 200), "the new one counts")
        scheme.write_text("none")
        receiver.signal(signal.SIGHUP)
        until(lambda: "--insecure" in receiver.stderr(), "it is refused")
        assert receiver.post(created("c1", "s1"), {}).status_code == 401


def closed_port_url() -> str:
    return f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"


def wrong(fault: str, right: str, folder: Path) -> str:
    """The URL of a database to which no connection comes about."""
    return {
        "host": closed_port_url(),
        "user": right.replace("test_writer@", "no_such_user:wrong@"),
        "database": right.replace("/test_", "/no_such_database_"),
        "certificate": f"{closed_port_url()}?sslmode=verify-full&sslrootcert={folder}/nowhere.pem",
    }[fault]


@pytest.mark.parametrize("fault", ["host", "user", "database", "certificate"])
def test_i1_a_start_with_a_wrong_database_spools_until_the_file_is_right(
    fault: str, database_url: str, engine: Engine, tmp_path: Path
) -> None:
    right = as_writer(database_url)
    file = tmp_path / "url"
    file.write_text(wrong(fault, right, tmp_path))
    with serving(None, "--worker", DATABASE_URL_FILE=str(file), ARCHIVER_SEAL_EVERY="1") as receiver:
        assert receiver.post(created("c1", "s1")).json()["status"] == "spooled"
        assert receiver.get("/readyz").status_code == 200
        assert receiver.get("/readyz").json()["database"] != "ready"
        assert "database unavailable; spooling" in receiver.stderr()
        file.write_text(right)
        until(lambda: rows(engine, "SELECT 1 FROM archiver.events"), "what was spooled is archived")
        until(lambda: rows(engine, "SELECT 1 FROM archiver.seals"), "the worker found it too")
        assert receiver.post(created("c2", "s2")).json()["status"] == "stored"
        assert receiver.stop() == 0


def test_a_start_with_a_wrong_database_and_without_a_spool_is_refused(tmp_path: Path) -> None:
    options = {"ARCHIVER_WEBHOOK_SECRETS": OLD, "ARCHIVER_HOME": str(tmp_path / "home"), "ARCHIVER_SPOOL": "off"}
    ended = archiver("serve", "--port", "0", database_url=closed_port_url(), **options)
    assert ended.returncode == 1
    assert "cannot be reached" in ended.stderr


def pem(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_the_worker_takes_a_new_key_and_keeps_the_old_one_where_the_file_is_wrong(
    database_url: str, engine: Engine, tmp_path: Path
) -> None:
    keys, numbers = [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()], count()
    file = tmp_path / "key"
    file.write_text(pem(keys[0]))
    with serving(database_url, "--worker", ARCHIVER_SEAL_KEY_FILE=str(file), ARCHIVER_SEAL_EVERY="1") as receiver:

        def signer() -> str:
            # One more each time: with what was sealed under the old key no new one would sign anything.
            number = next(numbers)
            receiver.post(created(f"c{number}", f"s{number}"))
            query = "SELECT key_id FROM archiver.seals ORDER BY id DESC LIMIT 1"
            rows_found: str = until(lambda: rows(engine, query), "it is sealed")[0][0]
            return rows_found

        ids = [seals.key_id(key.public_key()) for key in keys]
        assert signer() == ids[0]
        file.write_text("no key at all")
        failing = 'archiver_worker_up{duty="settings"} 0.0'
        until(lambda: failing in receiver.get("/metrics").text, "the worker reports it")

        def status() -> str:
            return " ".join(archiver("status", database_url=database_url).stdout.split())

        until(lambda: "settings failed" in status(), "status reports it")  # a worker records its state now and then
        assert signer() == ids[0]
        file.write_text(pem(keys[1]))
        until(lambda: signer() == ids[1], "the new key signs")
        assert receiver.stop() == 0


def reloaded(log: str) -> set[int]:
    """The processes that read their settings again."""
    lines = [json.loads(line) for line in log.splitlines() if '"settings reloaded"' in line]
    return {line["pid"] for line in lines}


@pytest.mark.parametrize("receivers", [1, 2])
def test_sighup_to_serve_reaches_its_worker_too(receivers: int, database_url: str) -> None:
    with serving(database_url, "--worker", "--workers", str(receivers)) as receiver:
        until(lambda: 'archiver_worker_up{duty="seal"} 1.0' in receiver.get("/metrics").text, "it works")
        receiver.signal(signal.SIGHUP)
        until(lambda: len(reloaded(receiver.stderr())) == receivers + 1, "receivers and worker read their files")
        assert "exited unexpectedly" not in receiver.stderr()
        assert receiver.stop() == 0


def test_sighup_while_the_worker_starts_ends_nothing(database_url: str) -> None:
    with serving(database_url, "--worker") as receiver:
        for _ in range(20):
            receiver.signal(signal.SIGHUP)
        until(lambda: len(reloaded(receiver.stderr())) == 2, "receiver and worker read their files")
        assert "exited unexpectedly" not in receiver.stderr()
        assert receiver.stop() == 0


def test_a_file_that_changes_while_serve_starts_is_read(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(OLD)
    options = {"ARCHIVER_WEBHOOK_SECRETS": "", "ARCHIVER_WEBHOOK_SECRETS_FILE": str(file)}
    with socket.create_server(("127.0.0.1", 0)) as database:
        url = f"postgresql://postgres@127.0.0.1:{database.getsockname()[1]}/silent"
        with starting(url, **options) as receiver:
            connection, _ = database.accept()  # the settings have been read by now
            file.write_text(NEW)
            connection.close()
            database.close()
            with receiver:
                until(lambda: (code(receiver, NEW), code(receiver, OLD)) == (200, 401), "the new one counts")


@contextmanager
def running_worker(log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`archiver worker`, killed in the end."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "archiver", "worker"],
            env={**os.environ, "ARCHIVER_LOG_FORMAT": "json", "ARCHIVER_SEAL_EVERY": "1", **environment},
            stdout=stderr,
            stderr=stderr,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_file_that_changes_while_a_worker_starts_is_read(database_url: str, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "url"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file.write_text(f"postgresql://postgres@127.0.0.1:{silent.getsockname()[1]}/silent")
        options = {"DATABASE_URL_FILE": str(file), "ARCHIVER_HOME": str(tmp_path)}
        with running_worker(tmp_path / "log", **options) as worker:
            connection, _ = silent.accept()
            file.write_text(as_writer(database_url))
            connection.close()
            silent.close()
            until(lambda: rows(engine, "SELECT 1 FROM archiver.workers"), "it works with the new one")
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(120) == 0


@pytest.mark.parametrize("fault", ["host", "user", "database", "certificate"])
def test_a_worker_with_a_wrong_database_waits_until_the_file_is_right(
    fault: str, database_url: str, engine: Engine, tmp_path: Path
) -> None:
    right = as_writer(database_url)
    file = tmp_path / "url"
    file.write_text(wrong(fault, right, tmp_path))
    with serving(database_url) as receiver:
        assert receiver.post(created("c1", "s1")).json()["status"] == "stored"
    options = {"DATABASE_URL_FILE": str(file), "ARCHIVER_HOME": str(tmp_path)}
    with running_worker(tmp_path / "log", **options) as worker:
        log = tmp_path / "log"
        until(lambda: worker.poll() is not None or "duty not working" in log.read_text(), "it reports the fault")
        assert worker.poll() is None, log.read_text()
        lines = [json.loads(line) for line in whole_lines(log).splitlines()]
        assert any("worker waits for it" in line["event"] and line["reason"] for line in lines), lines
        assert not any("Traceback" in line.get("exception", "") for line in lines if "waits" in line["event"])
        file.write_text(right)
        until(lambda: rows(engine, "SELECT 1 FROM archiver.seals"), "it seals")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0


def test_sighup_ends_no_worker(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, "--worker") as receiver:
        until(lambda: 'archiver_worker_up{duty="seal"} 1.0' in receiver.get("/metrics").text, "it works")
        os.killpg(receiver.process.pid, signal.SIGHUP)
        until(lambda: receiver.stderr().count("settings reloaded") >= 2, "receiver and worker read them again")
        assert "exited unexpectedly" not in receiver.stderr()
        assert receiver.stop() == 0
