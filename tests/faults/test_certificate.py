"""Postgres over TLS with an expired certificate: an error with a remedy, or the spool (I1)."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.clusters import Server, placed
from tests.support.load import assert_archived, rows
from tests.support.outages import post, until_drained
from tests.support.receivers import archiver, serving
from tests.support.servers import let_writer_in
from tests.support.waiting import until

AUTHORITY = """
[ca]
default_ca = own
[own]
database = index.txt
serial = serial
new_certs_dir = .
default_md = sha256
policy = policy
copy_extensions = copy
unique_subject = no
[policy]
commonName = supplied
"""
EXPIRED, VALID = ("20200101000000Z", "20200201000000Z"), ("20200101000000Z", "20990101000000Z")


class Certificates:
    """One key, and certificates for it that are valid from one time to another; the server has the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "ca.cnf").write_text(AUTHORITY)
        (folder / "index.txt").touch()
        (folder / "serial").write_text("01")
        name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        self._run("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "request", *name)

    def issue(self, times: tuple[str, str], server: Server) -> None:
        made = ["-in", "request", "-out", "certificate", "-startdate", times[0], "-enddate", times[1]]
        self._run("ca", "-batch", "-notext", "-selfsign", "-config", "ca.cnf", "-keyfile", "key", *made)
        for file in ("certificate", "key"):
            place = server.data / f"server.{file}"
            shutil.copy(self._folder / file, place)
            place.chmod(0o600)
            shutil.chown(place, server.data.stat().st_uid)

    @property
    def trusted(self) -> Path:
        return self._folder / "certificate"

    def _run(self, *arguments: str) -> None:
        ended = subprocess.run(["openssl", *arguments], cwd=self._folder, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


@pytest.fixture
def server() -> Iterator[Server]:
    if shutil.which("openssl") is None or not servers.SYSTEM_15.is_dir():
        pytest.skip("there is no openssl, or no Postgres with TLS in /usr/lib/postgresql/15; the embedded has none")
    with placed(servers.SYSTEM_15, servers.unprivileged()) as server:
        server.run("initdb", "-D", server.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        yield server


def test_i1_an_expired_certificate_ends_a_start_without_spool_or_spools(server: Server, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "authority")
    certificates.issue(EXPIRED, server)
    server.start(ssl="on", ssl_cert_file="server.certificate", ssl_key_file="server.key")
    plain = server.url("postgres") + "?sslmode=disable"
    url = f"{server.url('postgres')}?sslmode=verify-full&sslrootcert={certificates.trusted}"
    settings = {"ARCHIVER_HOME": str(tmp_path / "home"), "ARCHIVER_WEBHOOK_SECRETS": "x" * 20, "CALLHQ_API_KEY": "k"}
    for command in (
        ["serve", "--port", "0"],
        ["serve", "--port", "0", "--migrate"],
        ["status"],
        ["doctor"],
    ):
        process = archiver(*command, database_url=url, **settings, ARCHIVER_SPOOL="off")
        texts = " ".join((process.stdout + process.stderr).split())
        assert (process.returncode, "certificate" in texts, "renew it" in texts) == (1, True, True), texts
        assert ("Traceback" in texts, "receiver started" in texts) == (False, False)
    assert not (tmp_path / "home" / "spool").exists()

    certificates.issue(VALID, server)
    server.run("pg_ctl", "-D", server.data, "reload")
    until(lambda: archiver("migrate", database_url=url).returncode == 0, "the new certificate is accepted")
    let_writer_in(url)
    with serving(url, ARCHIVER_HOME=str(tmp_path / "home")) as receiver:
        assert set(post(receiver, range(10))) == {"stored"}
        valid = certificates.trusted.read_bytes()
        certificates.issue(EXPIRED, server)
        certificates.trusted.write_bytes(
            valid + certificates.trusted.read_bytes()
        )  # both are trusted, one is expired
        server.run("pg_ctl", "-D", server.data, "reload")
        others = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'callhq-archiver'"
        )
        until(
            lambda: rows(plain, others) and "certificate" in receiver.get("/readyz").json()["database"], "it is seen"
        )
        assert set(post(receiver, range(10, 20))) == {"spooled"}
        assert receiver.get("/readyz").status_code == 200
        assert "certificate" in receiver.stderr()
        certificates.issue(VALID, server)
        server.run("pg_ctl", "-D", server.data, "reload")
        until_drained(receiver)
    assert_archived(plain, set(range(20)))
