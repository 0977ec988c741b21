"""A worker with a wrong password waits until the database or the file with the password is corrected (I13)."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from archiver import embedded
from tests.support.clusters import placed, programs_of
from tests.support.load import rows
from tests.support.receivers import archiver
from tests.support.servers import unprivileged
from tests.support.waiting import until


@pytest.mark.parametrize("mended", ["url", "passfile", "database"])
def test_a_worker_with_a_wrong_password_works_once_it_is_right(
    mended: str, postgres: embedded.Postgres, tmp_path: Path
) -> None:
    passwords, url = tmp_path / "passwords", tmp_path / "url"
    passwords.write_text("*:*:*:*:wrong")
    passwords.chmod(0o600)
    with ExitStack() as stack:
        server = stack.enter_context(placed(programs_of(postgres), unprivileged()))
        server.run("initdb", "-D", server.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        server.start()
        plain = server.url("postgres")
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute("CREATE ROLE worker SUPERUSER LOGIN PASSWORD 'right'")
        assert archiver("migrate", database_url=plain).returncode == 0
        rules = "host all worker all scram-sha-256\n"
        (server.data / "pg_hba.conf").write_text(f"{rules}host all all all trust\n")
        server.run("pg_ctl", "-D", server.data, "reload")
        place = server.url("postgres").replace("postgres@", "worker@")
        url.write_text(f"{place}?passfile={passwords}")
        log = stack.enter_context((tmp_path / "log").open("wb"))
        environment = {"DATABASE_URL_FILE": str(url), "ARCHIVER_HOME": str(tmp_path), "ARCHIVER_LOG_FORMAT": "json"}
        worker = subprocess.Popen(
            [sys.executable, "-m", "archiver", "worker"], env=os.environ | environment, stdout=log, stderr=log
        )
        stack.callback(worker.wait)
        stack.callback(worker.kill)

        def log_text() -> str:
            return (tmp_path / "log").read_text()

        until(lambda: worker.poll() is not None or "duty not working" in log_text(), "it reports the fault")
        assert worker.poll() is None, log_text()
        assert "password authentication failed" in log_text()
        if mended == "url":
            url.write_text(place.replace("worker@", "worker:right@"))
        elif mended == "passfile":
            passwords.write_text("*:*:*:*:right")
        else:
            with psycopg.connect(plain, autocommit=True) as connection:
                connection.execute("ALTER ROLE worker PASSWORD 'wrong'")
        until(lambda: rows(plain, "SELECT 1 FROM archiver.workers"), "it works")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
