"""The command line: real processes, their output and their exit codes."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT, CompletedProcess, run

import psycopg
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from psycopg.conninfo import conninfo_to_dict
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from archiver.database import database_url as parse_url
from archiver.database import schema
from archiver.version import describe
from tests.conftest import Cluster
from tests.support import servers
from tests.support.commands import failed, output_of
from tests.support.payloads import SECRET, created
from tests.support.proxies import Proxy
from tests.support.receivers import archiver, archiver_raw, serving, starting
from tests.support.seals import KEY
from tests.support.upstreams import API_KEY, hosting, simulated
from tests.support.waiting import until

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

HUNTER = "hunter2-hunter2-hunter2"  # a secret that no output may hold
NOWHERE = "postgresql://archiver@127.0.0.1:1/archive"  # port 1: nobody listens


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("serve",),
        ("migrate",),
        ("status",),
        ("doctor",),
        ("quarantine",),
        ("quarantine", "list"),
        ("quarantine", "show"),
        ("quarantine", "retry"),
    ],
)
def test_every_command_explains_itself(arguments: tuple[str, ...], cluster: Cluster) -> None:
    del cluster
    process = archiver(*arguments, "--help")
    assert process.returncode == 0
    assert process.stdout.startswith("Usage: ")
    assert process.stderr == ""


def test_it_runs_as_a_module_and_as_a_command(cluster: Cluster) -> None:
    del cluster
    for command in ([sys.executable, "-m", "archiver"], [str(Path(sys.executable).with_name("archiver"))]):
        process = run([*command, "--version"], capture_output=True, text=True, check=False)
        assert (process.returncode, process.stdout) == (0, f"{describe()}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sevre",),
        ("serve", "--port", "70000"),
        ("serve", "--workers", "0"),
        ("serve", "--workers", "x"),
        ("quarantine", "show", "one"),
        ("quarantine", "retry"),
        ("quarantine", "retry", "1", "--all"),
        ("quarantine", "show", "1", "--raw", "--json"),
        ("migrate", "extra"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], cluster: Cluster) -> None:
    del cluster
    process = archiver(*arguments, database_url=NOWHERE)
    assert process.returncode == 2
    assert "Usage: " in output_of(process)
    assert "range" not in process.stderr.replace("not in the range", "")


# serve


@pytest.mark.parametrize("secrets", [{}, {"ARCHIVER_WEBHOOK_SECRETS": " , ,"}])
def test_serve_refuses_without_a_secret_and_says_how_to_make_one(url: str, secrets: dict[str, str]) -> None:
    text = failed(archiver("serve", "--port", "0", database_url=url, **secrets))
    assert "ARCHIVER_WEBHOOK_SECRETS" in text
    assert "secrets.token_urlsafe(32)" in text
    assert "archiver serve --insecure" in text
    assert "make run ARGS=--insecure" in text  # which needs no activated venv


@pytest.mark.parametrize("scheme", ["secret", "none"])
def test_serve_starts_insecure_without_a_secret_and_warns(url: str, scheme: str) -> None:
    settings = {"ARCHIVER_WEBHOOK_SECRETS": "", "ARCHIVER_WEBHOOK_SCHEME": scheme}
    with serving(url, "--insecure", **settings) as receiver:
        assert receiver.post(created(f"unsigned-{scheme}"), {}).json()["status"] == "stored"
        assert '"level": "warning"' in receiver.stderr() or scheme == "none"
    with psycopg.connect(url) as connection:
        query = "SELECT key_id FROM archiver.events WHERE chat_id = %s"
        assert connection.execute(query, (f"unsigned-{scheme}",)).fetchall() == [("none",)]


def test_insecure_beside_a_secret_still_verifies(url: str) -> None:
    with serving(url, "--insecure") as receiver:
        assert receiver.post(created(), {}).status_code == 401


def test_scheme_none_must_be_wanted(url: str) -> None:
    text = failed(archiver("serve", database_url=url, ARCHIVER_WEBHOOK_SCHEME="none"))
    assert "ARCHIVER_WEBHOOK_SCHEME" in text
    assert "--insecure" in text


def test_serve_on_an_unmigrated_database_says_to_migrate(empty_database_url: str) -> None:
    text = failed(archiver("serve", "--port", "0", database_url=empty_database_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER))
    assert "archiver migrate" in text
    assert HUNTER not in text


def test_serve_migrates_where_it_is_asked_to(empty_database_url: str) -> None:
    with serving(empty_database_url, "--migrate") as receiver:
        assert receiver.post(created()).json()["status"] == "stored"


def test_a_port_in_use_is_named(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = failed(archiver("serve", "--port", str(port), database_url=url, ARCHIVER_WEBHOOK_SECRETS=HUNTER))
    assert f"127.0.0.1:{port}" in text
    assert "--port" in text


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARCHIVER_WEBHOOK_SCHEME", HUNTER),
        ("ARCHIVER_MAX_BODY", HUNTER),
        ("ARCHIVER_MAX_BODY", "0"),
        ("ARCHIVER_BATCH_EVENTS", "1001"),
        ("ARCHIVER_PREPARED_STATEMENTS", "perhaps"),
        ("ARCHIVER_SECRET_HEADER", " "),
        ("ARCHIVER_SECRET_HEADER", "x y"),
        ("ARCHIVER_SECRET_HEADER", "Content-Length"),
        ("ARCHIVER_HMAC_HEADER", "transfer-encoding"),
        ("ARCHIVER_SECRET_HEADER", "x-hunter:"),
        ("ARCHIVER_SECRET_HEADER", "x-hünter"),
        ("ARCHIVER_HMAC_HEADER", '"x-signature"'),
        ("ARCHIVER_HMAC_TIMESTAMP_HEADER", "x(y)"),
        ("ARCHIVER_HMAC_ID_HEADER", "svix/id"),
        ("ARCHIVER_HMAC_PREFIX", " sha256="),
        ("ARCHIVER_HMAC_PREFIX", "sha256\n="),
        ("ARCHIVER_HMAC_PREFIX", "é="),
        ("ARCHIVER_WEBHOOK_SECRETS", f"{HUNTER}\nhunter3"),
        ("ARCHIVER_WEBHOOK_SECRETS", f"ok,{HUNTER}\x7f"),
        ("CALLHQ_API_KEY", f"{HUNTER}\nx"),
        ("CALLHQ_API_KEY", f"{HUNTER}é"),
        ("ARCHIVER_API_TOKEN", f"{HUNTER} x"),
        ("ARCHIVER_API_TOKEN", f"{HUNTER}\tx"),
        ("CALLHQ_API_URL", "https://"),
        ("CALLHQ_API_URL", f"https://user:{HUNTER}@host:port/api"),
        ("CALLHQ_API_URL", f"https://host/{HUNTER} x"),
        ("CALLHQ_API_URL", f"https://host/api?key={HUNTER}"),
        ("ARCHIVER_HISTORY_RATE", "inf"),
        ("ARCHIVER_FOLLOWUPS_RATE", "nan"),
        ("ARCHIVER_RETENTION_BY_ASSISTANT", "a=1,a=2"),
    ],
)
def test_a_wrong_setting_is_named_without_its_value(url: str, name: str, value: str) -> None:
    text = failed(archiver("serve", "--port", "0", database_url=url, **{name: value}))
    assert name in text
    assert HUNTER not in text


def test_all_wrong_settings_are_named_at_once(url: str) -> None:
    text = failed(archiver("status", database_url=url, ARCHIVER_MAX_BODY="x", ARCHIVER_LOG_FORMAT="x"))
    assert "ARCHIVER_MAX_BODY" in text
    assert "ARCHIVER_LOG_FORMAT" in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ARCHIVER_WEBHOOK_SCHEME": "standard", "ARCHIVER_WEBHOOK_SECRETS": f"{HUNTER}!"}, "base64"),
        ({"ARCHIVER_WEBHOOK_SCHEME": "hmac", "ARCHIVER_HMAC_TEMPLATE": "{timestamp}"}, "ARCHIVER_HMAC_TEMPLATE"),
        ({"ARCHIVER_WEBHOOK_SCHEME": "hmac", "ARCHIVER_HMAC_TEMPLATE": "{bodi}"}, "ARCHIVER_HMAC_TEMPLATE"),
    ],
)
def test_a_scheme_that_cannot_work_is_refused_at_the_start(url: str, settings: dict[str, str], told: str) -> None:
    text = failed(archiver("serve", database_url=url, **{"ARCHIVER_WEBHOOK_SECRETS": HUNTER, **settings}))
    assert told in text
    assert HUNTER not in text


def test_settings_may_stand_in_files(url: str, tmp_path: Path) -> None:
    secrets, database = tmp_path / "secrets", tmp_path / "url"
    secrets.write_text(f"\n{SECRET}\n")
    database.write_text(f"{url}\n")
    files = {"ARCHIVER_WEBHOOK_SECRETS_FILE": str(secrets), "DATABASE_URL_FILE": str(database)}
    with serving(None, **files, ARCHIVER_WEBHOOK_SECRETS="") as receiver:
        assert receiver.post(created("by file")).json()["status"] == "stored"
    assert archiver("migrate", "--check", DATABASE_URL_FILE=str(database)).returncode == 0


@pytest.mark.parametrize("value", ["", " \n"])
def test_h3_an_empty_database_url_is_no_wish_for_the_embedded_one(
    value: str, tmp_path: Path, cluster: Cluster
) -> None:
    del cluster
    (tmp_path / "url").write_text(value)
    empty = "set, but empty: unset it"
    home = {"ARCHIVER_HOME": str(tmp_path / "home"), "ARCHIVER_WEBHOOK_SECRETS": HUNTER}
    for command in (["serve", "--port", "0"], ["migrate"], ["status"], ["quarantine", "list"]):
        assert f"DATABASE_URL: {empty}" in failed(archiver(*command, database_url=value, **home))
    assert f"DATABASE_URL_FILE: {empty}" in failed(
        archiver("migrate", DATABASE_URL_FILE=str(tmp_path / "url"), **home)
    )
    assert f"DATABASE_URL_FILE: {empty}" in failed(archiver("migrate", DATABASE_URL_FILE=value, **home))
    assert not (tmp_path / "home").exists()


def test_values_from_a_list_may_be_written_in_capitals(url: str) -> None:
    settings = {"ARCHIVER_WEBHOOK_SCHEME": "Bearer", "ARCHIVER_LOG_LEVEL": "WARNING", "ARCHIVER_HMAC_ENCODING": "HEX"}
    process = archiver("doctor", database_url=url, ARCHIVER_WEBHOOK_SECRETS=HUNTER, **settings)
    assert "Scheme bearer" in output_of(process)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ARCHIVER_QUEUE_EVENTS", "0", "must be at least 1"),
        ("ARCHIVER_BATCH_EVENTS", "1001", "must be from 1 to 1000"),
        ("ARCHIVER_MAX_BODY", "1k", "must be a whole number, without a unit, from 1 to 268435456"),
        ("ARCHIVER_QUEUE_EVENTS", "1.5", "must be a whole number, without a unit, at least 1"),
        ("ARCHIVER_HISTORY_RATE", "2/s", "must be a number, without a unit, at least 0"),
        ("ARCHIVER_PREPARED_STATEMENTS", "perhaps", "must be true or false"),
        ("ARCHIVER_SPOOL", "perhaps", "must be 'on' or 'off'"),
        ("ARCHIVER_HOME", " ", "set, but empty: unset it to use .archiver in the working directory"),
        ("ARCHIVER_HOME", f"{__file__}", f"{__file__} is a file; name a folder"),
        ("ARCHIVER_HOME", f"{__file__}/a/b", f"{__file__} is a file; name a folder"),
    ],
)
def test_a_wrong_setting_is_reported_as_documented(url: str, name: str, value: str, told: str) -> None:
    assert failed(archiver("status", database_url=url, **{name: value})) == f"archiver: {name}: {told}."


def test_an_empty_home_makes_no_database(home: Path, cluster: Cluster) -> None:
    del cluster
    home.mkdir()
    command = [sys.executable, "-m", "archiver", "migrate"]
    process = run(command, cwd=home, env={**os.environ, "ARCHIVER_HOME": ""}, capture_output=True, check=False)
    assert (process.returncode, list(home.iterdir())) == (1, [])


@pytest.mark.parametrize("name", ["ARCHIVER_SECRET_HEADER", "ARCHIVER_HMAC_HEADER"])
def test_of_two_headers_the_wrong_one_is_named(url: str, name: str) -> None:
    text = failed(archiver("status", database_url=url, **{name: " "}))
    assert text == f"archiver: {name}: must not be empty."


def test_a_setting_and_its_file_together_are_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(url)
    text = failed(archiver("status", database_url=url, DATABASE_URL_FILE=str(tmp_path / "url")))
    assert "DATABASE_URL and DATABASE_URL_FILE are both set" in text


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(url: str, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secrets"
    if content is not None:
        path.write_bytes(content)
    text = failed(archiver("serve", database_url=url, ARCHIVER_WEBHOOK_SECRETS_FILE=str(path)))
    assert f"ARCHIVER_WEBHOOK_SECRETS_FILE: cannot read {path}" in text


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_pipe_in_the_place_of_a_file_is_refused(url: str, tmp_path: Path, command: str) -> None:
    """Such as the shell makes for `ARCHIVER_WEBHOOK_SECRETS_FILE=<(pass show callhq)`."""
    os.mkfifo(tmp_path / "secrets")
    files = {"ARCHIVER_WEBHOOK_SECRETS": "", "ARCHIVER_WEBHOOK_SECRETS_FILE": str(tmp_path / "secrets")}
    text = failed(archiver(command, database_url=url, **files))
    assert f"ARCHIVER_WEBHOOK_SECRETS_FILE: {tmp_path / 'secrets'} is not a regular file" in text


@pytest.mark.usefixtures("cluster")
def test_the_null_device_in_the_place_of_a_file_is_an_empty_setting() -> None:
    others = {"ARCHIVER_WEBHOOK_SECRETS": "s", "ARCHIVER_SPOOL": "off"}
    text = failed(archiver("serve", database_url=NOWHERE, ARCHIVER_API_TOKEN_FILE=os.devnull, **others))
    assert "DATABASE_URL" in text
    assert "regular file" not in text


# DATABASE_URL


@pytest.mark.parametrize(
    "wrong",
    [
        f"mysql://archiver:{HUNTER}@localhost/archive",
        f"postgresql+asyncpg://archiver:{HUNTER}@localhost/archive",
        f"{HUNTER} is not a URL",
        f"//{HUNTER}",
        f"postgresql://archiver:{HUNTER}",
        f"postgresql://archiver:{HUNTER}@localhost:port/archive",
        f"postgresql://archiver:{HUNTER}@localhost:port,other:5432/archive",
        f"postgresql://archiver:{HUNTER}@localhost,/archive",
    ],
)
def test_a_wrong_database_url_is_named_without_its_value(wrong: str, cluster: Cluster) -> None:
    del cluster
    text = failed(archiver("serve", "--insecure", database_url=wrong))
    assert "DATABASE_URL" in text
    assert HUNTER not in text


@pytest.mark.parametrize("password", [f"{HUNTER}@x", f"x@{HUNTER}", f"@{HUNTER}", f"{HUNTER}@", f"{HUNTER}@#@x"])
@pytest.mark.parametrize("place", ["127.0.0.1:1/archive", "/archive?host=/nowhere"])
def test_an_at_sign_in_the_password_is_to_be_encoded(password: str, place: str, cluster: Cluster) -> None:
    del cluster
    text = failed(archiver("status", database_url=f"postgresql://archiver:{password}@{place}"))
    assert "DATABASE_URL" in text
    assert "%40" in text
    assert HUNTER not in text


@pytest.mark.parametrize(
    "unreachable",
    [
        f"postgresql://archiver:{HUNTER}@127.0.0.1:1/archive",
        f"postgres://archiver:{HUNTER}%40%2F%3A%23@127.0.0.1:1/archive",
        f"postgresql://archiver:{HUNTER}/?#:@127.0.0.1:1/archive",
        f"postgresql://archiver@127.0.0.1:1/archive?password={HUNTER}",
        f"postgresql://archiver:{HUNTER}@no-such-host.invalid/archive",
        f"postgresql://archiver:{HUNTER}@127.0.0.1:99999/archive",
        f"postgresql://archiver:{HUNTER}%2C@127.0.0.1:1,127.0.0.1:2/archive?target_session_attrs=read-write",
        f"postgresql://archiver:{HUNTER}@127.0.0.1:1,[::1]:1/archive",
    ],
)
def test_an_unreachable_database_is_explained_without_the_password(unreachable: str, cluster: Cluster) -> None:
    del cluster
    text = failed(archiver("status", database_url=unreachable))
    assert "DATABASE_URL" in text
    assert "archiver doctor" in text
    assert HUNTER not in text


def test_an_unknown_connection_option_is_named_without_the_password(cluster: Cluster) -> None:
    del cluster
    url = f"postgresql://archiver:{HUNTER}@127.0.0.1:1/archive?no_such_option=1"
    text = failed(archiver("status", database_url=url))
    assert "DATABASE_URL" in text
    assert "no_such_option" in text
    assert HUNTER not in text


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_an_unreachable_database_is_not_reported_as_a_refusal(host: str, cluster: Cluster) -> None:
    del cluster
    text = failed(archiver("status", database_url=f"postgresql://archiver@{host}/archive"))
    assert text.startswith("archiver: the database cannot be reached: ")


def test_a_database_that_does_not_exist_is_explained(cluster: Cluster) -> None:
    text = failed(archiver("migrate", database_url=cluster.url("no_such_database")))
    assert "no_such_database" in text


# migrate


def test_migrate_brings_an_empty_database_to_head_and_check_only_reports(empty_database_url: str) -> None:
    text = failed(archiver("migrate", "--check", database_url=empty_database_url))
    assert "archiver migrate" in text
    for arguments in (["migrate"], ["migrate", "--check"], ["migrate"]):
        process = archiver(*arguments, database_url=empty_database_url)
        assert (arguments, process.returncode) == (arguments, 0)
        assert schema.head() in process.stdout


def test_check_changes_nothing(empty_database_url: str) -> None:
    archiver("migrate", "--check", database_url=empty_database_url)
    with psycopg.connect(empty_database_url) as connection:
        rows = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname IN ('archiver', 'analytics')")
        assert rows.fetchone() == (0,)


@pytest.fixture
def guest_url(cluster: Cluster, database_url: str) -> Iterator[str]:
    """The URL of a user who may read the archive's tables, and neither write them nor create anything."""
    cluster.execute("CREATE ROLE guest LOGIN")
    with psycopg.connect(database_url) as connection:
        connection.execute("GRANT USAGE ON SCHEMA archiver TO guest")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA archiver TO guest")
    yield parse_url(database_url).set(drivername="postgresql", username="guest").render_as_string()
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP OWNED BY guest")
    cluster.execute("DROP ROLE guest")


@pytest.fixture
def unprivileged_user(cluster: Cluster) -> Iterator[str]:
    """A user without any right of its own, whose name must be quoted."""
    name = "Stran-ger"
    cluster.execute(f'CREATE ROLE "{name}" LOGIN')
    yield name
    cluster.execute(f'DROP ROLE "{name}"')


def as_user(url: str, name: str) -> str:
    return parse_url(url).set(drivername="postgresql", username=name).render_as_string()


def test_migrate_and_doctor_compare_the_columns_for_variables_with_the_setting(empty_database_url: str) -> None:
    setting = {"ARCHIVER_ANALYTICS_VARIABLES": "customerTier,seats:number"}
    assert archiver("migrate", database_url=empty_database_url, **setting).returncode == 0
    assert archiver("migrate", "--check", database_url=empty_database_url, **setting).returncode == 0
    for arguments in (["migrate", "--check"], ["doctor"]):
        process = archiver(*arguments, database_url=empty_database_url)
        assert process.returncode == 1
        assert "differ from ARCHIVER_ANALYTICS_VARIABLES: surplus customer_tier, seats." in output_of(process)
    assert archiver("migrate", database_url=empty_database_url).returncode == 0
    assert archiver("migrate", "--check", database_url=empty_database_url).returncode == 0


@pytest.mark.usefixtures("durable")
def test_h2_migrate_and_doctor_give_the_sql_that_lets_a_user_create_the_schema(
    empty_database_url: str, unprivileged_user: str
) -> None:
    url, name = as_user(empty_database_url, unprivileged_user), parse_url(empty_database_url).database
    match = re.search(r"GRANT .*?;", failed(archiver("migrate", database_url=url)))
    assert match is not None
    assert match[0] == f'GRANT CREATE ON DATABASE {name} TO "{unprivileged_user}";'
    findings = examined(url)
    assert {each for each, finding in findings.items() if finding["verdict"] == "failure"} == {"schema"}
    assert match[0] in findings["schema"]["advice"]
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(match[0])
    assert archiver("migrate", database_url=url).returncode == 0
    assert examined(url)["privileges"]["verdict"] == "ok"
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(f'DROP OWNED BY "{unprivileged_user}" CASCADE')


@pytest.mark.usefixtures("durable")
def test_h2_doctor_gives_the_sql_that_lets_a_user_do_its_work(database_url: str, unprivileged_user: str) -> None:
    url = as_user(database_url, unprivileged_user)
    refused = failed(archiver("status", database_url=url))
    assert "permission denied for schema archiver" in refused
    assert "archiver doctor" in refused
    assert "DATABASE_URL" not in refused
    with psycopg.connect(database_url) as connection:
        owner = connection.execute("SELECT current_user").fetchone()
    assert f"as the user {owner[0] if owner else ''}" in failed(archiver("migrate", database_url=url))
    findings = examined(url)
    assert [each for each, finding in findings.items() if finding["verdict"] == "failure"] == ["privileges"]
    assert findings["database"]["verdict"] == "ok"
    assert "needs the role archiver_auditor" in refused
    assert "needs the role archiver_writer" in failed(archiver("rebuild", "--yes", database_url=url))
    with psycopg.connect(database_url) as connection:
        connection.execute(f'GRANT archiver_auditor TO "{unprivileged_user}"')
    for command in (
        ["verify"],
        ["acts"],
        ["seals", "list"],
        ["hold", "list"],
        ["quarantine", "list"],
        ["erase", "--list"],
    ):
        assert archiver(*command, database_url=url).returncode == 0, command
    assert "follow-ups not visible to this database user" in output_of(archiver("status", database_url=url))
    auditing = examined(url)["privileges"]
    assert (auditing["verdict"], "verify, prove and export" in auditing["detail"]) == ("warning", True)
    with psycopg.connect(database_url) as connection:
        connection.execute(f'REVOKE archiver_auditor FROM "{unprivileged_user}"')
    for statement in re.findall(r"GRANT .*?;", findings["privileges"]["advice"]):
        with psycopg.connect(database_url) as connection:
            connection.execute(statement)
    assert examined(url)["privileges"]["verdict"] == "ok"
    with serving(url) as receiver:
        assert receiver.post(created()).json()["status"] == "stored"
        assert receiver.post(b"{}").json()["status"] == "quarantined"
    assert archiver("rebuild", "--yes", database_url=url).returncode == 0
    with psycopg.connect(database_url) as connection:
        connection.execute(f'DROP OWNED BY "{unprivileged_user}"')


def test_migrate_at_head_needs_no_right_to_create(guest_url: str) -> None:
    with psycopg.connect(guest_url) as connection:
        right = "SELECT has_database_privilege(current_database(), 'CREATE')"
        assert connection.execute(right).fetchone() == (False,)
    process = archiver("migrate", database_url=guest_url)
    assert (process.returncode, process.stderr) == (0, "")
    assert schema.head() in process.stdout


def test_a_schema_of_the_future_is_left_alone(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE archiver.schema_version SET version_num = 'future'")
    for command in (["migrate"], ["migrate", "--check"], ["status"], ["quarantine", "list"]):
        assert "upgrade callhq-archiver" in failed(archiver(*command, database_url=database_url))


# status


def test_status_shows_what_the_archive_holds(database_url: str) -> None:
    with serving(database_url) as receiver:
        for chat_id, session_id in (("a", "s"), ("b", "s"), ("c", "t"), ("a", "s")):
            receiver.post(created(chat_id, session_id))
        receiver.post(b"{}")
    process = archiver("status", "--json", database_url=database_url)
    assert process.returncode == 0
    figures = json.loads(process.stdout)
    expected = {"sessions": 2, "chats": 3, "messages": 6, "events": 3, "deliveries": 4, "quarantine": 1}
    assert {name: figures[name] for name in expected} == expected
    assert figures["quarantine_reasons"] == {"no_event_type": 1}
    assert figures["coverage"] == {"open": 2}
    text = output_of(archiver("status", database_url=database_url))
    assert "sessions 2 2 open" in text
    assert "events 3 4 deliveries" in text
    assert "archiver quarantine list" in text
    assert "UTC" in text


def test_status_of_an_empty_archive(url: str, database_url: str) -> None:
    del url
    process = archiver("status", database_url=database_url)
    assert process.returncode == 0
    assert "last event never" in output_of(process)


# doctor


def verdicts(process: CompletedProcess[str]) -> dict[str, str]:
    findings = json.loads(process.stdout)
    values = {finding["check"]: finding["verdict"] for finding in findings}
    failures = [finding["check"] for finding in findings if finding["verdict"] == "failure"]
    assert process.stderr == (f"archiver: action required: {', '.join(failures)}\n" if failures else "")
    return values


def examined(url: str, **settings: str) -> dict[str, dict[str, str]]:
    """What `doctor` finds, by what was checked: each once."""
    process = archiver("doctor", "--json", database_url=url, ARCHIVER_WEBHOOK_SECRETS=HUNTER, **settings)
    findings = json.loads(process.stdout)
    assert len({finding["check"] for finding in findings}) == len(findings)
    return {finding["check"]: finding for finding in findings}


def test_status_and_doctor_say_which_database_they_ask(database_url: str, cluster: Cluster) -> None:
    name, host = parse_url(database_url).database, parse_url(database_url).query["host"]
    with_password = parse_url(database_url).set(drivername="postgresql", password=HUNTER)
    url = with_password.render_as_string(hide_password=False)
    result = f"{name} at {host} as {with_password.username}"
    assert f"database {result} " in output_of(archiver("status", database_url=url))
    assert json.loads(archiver("status", "--json", database_url=url).stdout)["database"] == result
    assert f"Reached {result}." in output_of(archiver("doctor", database_url=url, ARCHIVER_WEBHOOK_SECRETS=SECRET))
    empty = cluster.clone("template0")
    try:
        text = failed(archiver("status", database_url=empty))
        assert f"the database {parse_url(empty).database} at {host}" in text
    finally:
        cluster.drop(empty)


def test_doctor_shows_the_key_ids_of_the_ledger_and_no_secret(database_url: str) -> None:
    other = f"{HUNTER}-new"
    with serving(database_url) as receiver:
        receiver.post(created())
    with psycopg.connect(database_url) as connection:
        (key_id,) = connection.execute("SELECT key_id FROM archiver.events").fetchone() or ("",)
    process = archiver("doctor", database_url=database_url, ARCHIVER_WEBHOOK_SECRETS=f"{other},{SECRET}")
    assert f", {key_id}." in output_of(process)
    assert SECRET not in process.stdout
    assert HUNTER not in process.stdout


@pytest.mark.usefixtures("durable")
def test_doctor_warns_of_a_setting_that_is_misspelt(database_url: str) -> None:
    settings = {"ARCHIVER_WEBHOOK_SECRET": HUNTER, "ARCHIVER_MAXBODY_FILE": "x", "ARCHIVER_SOMETHING_ELSE": "y"}
    process = archiver("doctor", database_url=database_url, ARCHIVER_WEBHOOK_SECRETS=SECRET, **settings)
    assert process.returncode == 0
    shown = "ARCHIVER_WEBHOOK_SECRET is not a setting and has no effect. -> Did you mean ARCHIVER_WEBHOOK_SECRETS"
    assert shown in output_of(process)
    assert "Did you mean ARCHIVER_MAX_BODY_FILE?" in output_of(process)
    assert "ARCHIVER_SOMETHING_ELSE is not a setting" in output_of(process)
    assert HUNTER not in process.stdout


def test_serve_says_what_it_writes_to_and_which_variables_do_nothing(home: Path, cluster: Cluster) -> None:
    del cluster
    meant = {
        "DATABASE_URI": "DATABASE_URL",
        "DATABSE_URL_FILE": "DATABASE_URL_FILE",
        "POSTGRES_DSN": "DATABASE_URL",
        "ARCHIVER_DATABASE_URL": "DATABASE_URL",
        "CALLHQ_KEY": None,
        "ARCHIVER_FOO": None,
    }
    of_kubernetes = {"ARCHIVER_SERVICE_PORT_HTTP": "1", "ARCHIVER_PORT": "tcp://", "ARCHIVER_PORT_80_TCP_ADDR": "::1"}
    with serving(None, ARCHIVER_HOME=str(home), **dict.fromkeys(meant, HUNTER), **of_kubernetes) as receiver:
        assert receiver.stop() == 0
        log = receiver.stderr()
    lines = [json.loads(line) for line in log.splitlines()]
    assert {line["variable"]: line.get("meant") for line in lines if "variable" in line} == meant
    assert {line["level"] for line in lines if "variable" in line} == {"warning"}
    assert [line["database"] for line in lines if line["event"] == "receiver started"] == [f"embedded in {home}"]
    assert HUNTER not in log


def test_each_receiving_process_says_for_itself_that_it_stopped(url: str, tmp_path: Path) -> None:
    with serving(url, "--workers", "2", "--no-worker", ARCHIVER_HOME=str(tmp_path)) as receiver:
        until(lambda: len(list(tmp_path.glob("spool/*.lock"))) == 2, "both have begun")
        assert receiver.stop() == 0
        log = receiver.stderr()
    stopped = [line for line in map(json.loads, log.splitlines()) if line["event"] == "receiver stopped"]
    assert len({line["pid"] for line in stopped}) == 2


def test_serve_names_the_database_without_its_password(database_url: str) -> None:
    parsed = parse_url(database_url).set(drivername="postgresql", password=HUNTER)
    # Whoever says which database to use may have other variables of that kind.
    with serving(parsed.render_as_string(hide_password=False), DATABASE_URI=HUNTER) as receiver:
        log = receiver.stderr()
    lines = [json.loads(line) for line in log.splitlines()]
    (item,) = [line["database"] for line in lines if line["event"] == "receiver started"]
    assert item == f"{parsed.database} at {parsed.query['host']} as postgres"
    assert not any("variable" in line for line in lines)
    assert HUNTER not in log


def examined_platform(database_url: str, url: str, key: str = API_KEY) -> dict[str, str]:
    settings = {"CALLHQ_API_URL": url, "CALLHQ_API_KEY": key, "ARCHIVER_WEBHOOK_SECRETS": HUNTER}
    process = archiver("doctor", "--json", database_url=database_url, **settings)
    (finding,) = [each for each in json.loads(process.stdout) if each["check"] == "CallHQ"]
    assert process.returncode == (1 if finding["verdict"] == "failure" else 0)
    assert API_KEY not in process.stdout
    result: dict[str, str] = finding
    return result


@pytest.mark.usefixtures("durable")
def test_doctor_asks_callhq_whether_it_takes_the_key(database_url: str) -> None:
    with simulated() as callhq:
        assert examined_platform(database_url, f"{callhq.url}/api")["verdict"] == "ok"
        refused = examined_platform(database_url, f"{callhq.url}/api", "another key")
        assert (refused["verdict"], "CALLHQ_API_KEY" in refused["advice"]) == ("failure", True)
        for wrong in (callhq.url, f"{callhq.url}/api/v2", "http://127.0.0.1:1/api"):
            lost = examined_platform(database_url, wrong.replace("http://", f"http://me:{HUNTER}@"))
            assert (lost["verdict"], "CALLHQ_API_URL" in lost["advice"]) == ("failure", True)
            assert HUNTER not in str(lost)
    assert examined(database_url)["CallHQ"]["verdict"] == "warning"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (JSONResponse({"message": "Couldn't find the session."}, 404), "ok"),
        (JSONResponse({"error": "00000000-0000-0000-0000-000000000000 not found"}, 404), "ok"),
        (JSONResponse({"message": ["sessionId must be of version 4"]}, 400), "ok"),
        (JSONResponse({"session": {"messages": []}}), "ok"),
        (JSONResponse({"message": "Cannot GET /chats/session/00000000", "statusCode": 404}, 404), "failure"),
        (JSONResponse({"message": "Not Found"}, 404), "failure"),
        (HTMLResponse("<html>Session expired: log in</html>"), "failure"),
        (HTMLResponse("no session", 404), "failure"),
        (JSONResponse({"message": "session"}, 500), "failure"),
        (JSONResponse({"message": "slowly"}, 429), "warning"),
    ],
)
@pytest.mark.usefixtures("durable")
def test_doctor_distinguishes_the_api_from_another_server(database_url: str, answer: Response, verdict: str) -> None:
    calls = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            calls.append(scope["path"])
            await answer(scope, receive, send)

    with hosting(app) as url:
        assert examined_platform(database_url, url)["verdict"] == verdict
    assert calls == ["/chats/session/00000000-0000-0000-0000-000000000000"]


@pytest.mark.usefixtures("durable")
def test_doctor_finds_nothing_wrong_where_nothing_is(database_url: str) -> None:
    process = archiver("doctor", database_url=database_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    assert process.returncode == 0
    assert HUNTER not in output_of(process)
    process = archiver("doctor", "--json", database_url=database_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    assert process.returncode == 0
    result = verdicts(process)
    assert {"webhook secret", "database", "version", "durability", "schema", "privileges", "clock"} <= result.keys()
    assert "failure" not in result.values()
    assert HUNTER not in process.stdout


def test_doctor_warns_of_events_that_are_not_sealed(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO archiver.events (session_id, dedupe_key, type, source, received_at, last_received_at,"
            " delivery_count, body, salt, body_digest) SELECT '', '', 'x', 'webhook', at, at, 1, '', '', ''"
            " FROM (SELECT now() - interval '1 hour' AS at) AS told"
        )
    assert (checked := examined(database_url)["seals"])["verdict"] == "warning"
    assert "60 minutes ago is not sealed" in checked["detail"]
    assert archiver("seal", database_url=database_url).returncode == 0
    assert (checked := examined(database_url)["seals"])["verdict"] == "ok"
    assert "No seal is signed; to sign them, set ARCHIVER_SEAL_KEY" in checked["detail"]
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    checked = examined(database_url, ARCHIVER_SEAL_KEY=pem.decode())["seals"]
    assert (checked["verdict"], checked["detail"]) == ("ok", "Every event is sealed in time.")


def test_warnings_of_a_command_are_not_in_its_result(database_url: str, tmp_path: Path) -> None:
    with serving(database_url, "--worker") as receiver:
        until(lambda: receiver.metric('archiver_worker_up{duty="identity"}') == 1, "the database is known")
    (tmp_path / "served.json").write_text("damaged")
    result = archiver("verify", "--json", database_url=database_url, ARCHIVER_HOME=str(tmp_path))
    assert "database identity check incomplete" in result.stderr
    assert json.loads(result.stdout)["ok"]


@pytest.mark.usefixtures("durable")
def test_doctor_warns_of_a_secret_that_can_be_guessed(database_url: str) -> None:
    process = archiver("doctor", "--json", database_url=database_url, ARCHIVER_WEBHOOK_SECRETS=f"{HUNTER},short")
    assert process.returncode == 0
    assert verdicts(process)["webhook secret"] == "warning"


@pytest.fixture
def password_url(cluster: Cluster, database_url: str) -> Iterator[str]:
    """The URL of a user who must give a password, with a wrong one."""
    with psycopg.connect(cluster.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE locked LOGIN PASSWORD 'the right one'")
        (path,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        rules = Path(path).read_text()
        Path(path).write_text(f"local all locked scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        wrong = parse_url(database_url).set(drivername="postgresql", username="locked", password=HUNTER)
        result = wrong.render_as_string(hide_password=False)
        yield result
        Path(path).write_text(rules)
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("DROP ROLE locked")


def test_doctor_and_the_others_name_a_wrong_password(password_url: str) -> None:
    def is_refused() -> bool:
        try:
            psycopg.connect(password_url).close()
        except psycopg.OperationalError:
            return True
        return False

    until(is_refused, "Postgres asks for the password")
    for command in (["doctor"], ["doctor", "--json"], ["status"], ["migrate"]):
        process = archiver(*command, database_url=password_url, ARCHIVER_WEBHOOK_SECRETS=SECRET)
        assert process.returncode == 1
        assert "password authentication failed" in output_of(process)
        assert "DATABASE_URL" in output_of(process)
        assert command[0] != "doctor" or "Correct the user or the password" in output_of(process)
        assert HUNTER not in output_of(process)


def test_doctor_says_what_to_do_about_an_unmigrated_database(empty_database_url: str) -> None:
    process = archiver("doctor", database_url=empty_database_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    assert process.returncode == 1
    assert "archiver migrate" in output_of(process)
    process = archiver("doctor", "--json", database_url=empty_database_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    assert (process.returncode, verdicts(process)["schema"]) == (1, "failure")


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"DATABASE_URL": NOWHERE}, "database"),
        ({"DATABASE_URL": "postgresql://archiver@no-such-host.invalid/archive"}, "database"),
        ({"DATABASE_URL": f"mysql://{HUNTER}"}, "database"),
        ({"DATABASE_URL": NOWHERE, "ARCHIVER_WEBHOOK_SECRETS": ""}, "webhook secret"),
        ({"DATABASE_URL": NOWHERE, "ARCHIVER_MAX_BODY": "x"}, "settings"),
    ],
)
def test_doctor_fails_with_advice(settings: dict[str, str], check: str, cluster: Cluster) -> None:
    del cluster
    process = archiver("doctor", "--json", **{"ARCHIVER_WEBHOOK_SECRETS": HUNTER, **settings})
    assert process.returncode == 1
    assert verdicts(process)[check] == "failure"
    assert all(finding["advice"] for finding in json.loads(process.stdout) if finding["verdict"] == "failure")
    assert HUNTER not in process.stdout
    process = archiver("doctor", **{"ARCHIVER_WEBHOOK_SECRETS": HUNTER, **settings})
    assert process.returncode == 1
    assert f"failure {check}" in output_of(process)


@pytest.fixture
def without_ssl(database_url: str) -> Iterator[str]:
    """The URL of a server on TCP that has no TLS, and must."""
    options = conninfo_to_dict(database_url)
    proxy = Proxy(f"{options['host']}/.s.PGSQL.{options.get('port', 5432)}")
    yield f"postgresql://postgres@127.0.0.1:{proxy.port}/{options['dbname']}?sslmode=require"
    proxy.close()


def test_serve_without_a_spool_does_not_wait_for_a_server_to_learn_tls(without_ssl: str) -> None:
    settings = {"ARCHIVER_WEBHOOK_SECRETS": HUNTER, "ARCHIVER_SPOOL": "off"}
    text = failed(archiver("serve", "--port", "0", database_url=without_ssl, **settings))
    assert "does not support SSL" in text
    assert "DATABASE_URL" in text


def test_serve_without_a_database_names_the_one_that_it_waits_for(cluster: Cluster) -> None:
    del cluster
    with serving(f"postgresql://archiver:{HUNTER}@no-such-host.invalid/archive") as receiver:
        (line,) = [line for line in receiver.stderr().splitlines() if "database unavailable; spooling" in line]
    assert "archive at no-such-host.invalid as archiver" in line
    assert "archiver doctor" in line
    assert HUNTER not in line


def test_doctor_says_of_each_way_to_miss_a_database_what_helps(without_ssl: str, cluster: Cluster) -> None:
    for url, advice in (
        (without_ssl, "sslmode"),
        (NOWHERE, "Correct host and port"),
        (cluster.url("missing"), "CREATE DATABASE"),
        (as_user(cluster.url("postgres"), "missing"), "Correct the user"),
        ("postgresql://archiver@no-such-host.invalid/archive", "Correct the host"),
    ):
        assert advice in examined(url)["database"]["advice"]


def test_doctor_finds_missing_privileges(guest_url: str) -> None:
    process = archiver("doctor", "--json", database_url=guest_url, ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    result = verdicts(process)
    assert (process.returncode, result["database"], result["privileges"]) == (1, "ok", "failure")
    assert "GRANT archiver_writer TO" in process.stdout


@pytest.mark.parametrize("name", ["a[x]", "a[red]b[/red]", "a[/such]"])
def test_doctor_prints_square_brackets_as_they_are(name: str, cluster: Cluster) -> None:
    for settings, item in (
        ({"DATABASE_URL": cluster.url(name)}, f'database "{name}" does not exist'),
        ({"DATABASE_URL": NOWHERE, "ARCHIVER_WEBHOOK_SECRETS_FILE": f"/nowhere/{name}"}, f"read /nowhere/{name}:"),
    ):
        process = archiver("doctor", **settings)
        assert process.returncode == 1
        assert item in output_of(process)


# quarantine

STRANGE = b'{"\x1b[31m\x1b]0;owned\x07\x9b2J": "\xc2\x9b2J \xe2\x80\xae \xf0\x9f\x98\x80 \r\x08"'


@pytest.fixture
def quarantined(database_url: str) -> dict[bytes, int]:
    """Two deliveries in the quarantine, and their ids."""
    with serving(database_url) as receiver:
        return {body: receiver.post(body).json()["id"] for body in (STRANGE, b"{}")}


def test_i4_the_quarantine_can_be_listed_shown_and_retried(database_url: str, quarantined: dict[bytes, int]) -> None:
    def quarantine(*arguments: str) -> CompletedProcess[str]:
        return archiver("quarantine", *arguments, database_url=database_url)

    ids = [str(quarantined[body]) for body in (STRANGE, b"{}")]
    listed = quarantine("list")
    assert listed.returncode == 0
    assert "not_json" in listed.stdout
    assert "owned" not in listed.stdout
    rows = json.loads(quarantine("list", "--json").stdout)
    assert [(str(row["id"]), row["reason"], row["bytes"]) for row in rows] == [
        (ids[0], "not_json", len(STRANGE)),
        (ids[1], "no_event_type", 2),
    ]
    assert "body" not in rows[0]
    assert [str(row["id"]) for row in json.loads(quarantine("list", "--json", "--limit", "1").stdout)] == ids[:1]
    filtered = json.loads(quarantine("list", "--json", "--reason", "no_event_type").stdout)
    assert [str(row["id"]) for row in filtered] == ids[1:]

    shown = quarantine("show", ids[0])
    assert shown.returncode == 0
    assert "not_json" in shown.stdout
    assert re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]*", shown.stdout)
    assert "\\x1b[31m" in shown.stdout
    assert "\U0001f600" in shown.stdout
    raw = archiver_raw("quarantine", "show", ids[0], "--raw", database_url=database_url)
    assert (raw.returncode, raw.stdout, raw.stderr) == (0, STRANGE, b"")

    data = json.loads(quarantine("show", ids[0], "--json").stdout)
    assert (data["id"], data["bytes"], data["body"]) == (int(ids[0]), len(STRANGE), None)
    assert b64decode(data["body_base64"]) == STRANGE
    assert json.loads(quarantine("show", ids[1], "--json").stdout)["body"] == "{}"

    retried = quarantine("retry", "--all", "--json")
    assert retried.returncode == 1
    assert {key: value["status"] for key, value in json.loads(retried.stdout).items()} == dict.fromkeys(
        ids, "quarantined"
    )
    assert "still quarantined" in quarantine("retry", ids[0]).stdout


def test_i4_what_can_be_archived_by_now_leaves_the_quarantine(database_url: str) -> None:
    body = created("patience", externalChatId="refused")
    with psycopg.connect(database_url, autocommit=True) as connection, serving(database_url) as receiver:
        connection.execute("ALTER TABLE archiver.chats ADD CONSTRAINT strict CHECK (external_id <> 'refused')")
        data = receiver.post(body).json()
        assert (data["status"], data["reason"]) == ("quarantined", "not_storable")
        received = connection.execute("SELECT received_at FROM archiver.quarantine").fetchall()
        assert archiver("quarantine", "retry", str(data["id"]), database_url=database_url).returncode == 1
        connection.execute("ALTER TABLE archiver.chats DROP CONSTRAINT strict")
        retried = archiver("quarantine", "retry", "--reason", "not_storable", database_url=database_url)
        assert (retried.returncode, retried.stderr) == (0, "")
        assert f"{data['id']}: stored as event" in retried.stdout
        assert connection.execute("SELECT count(*) FROM archiver.quarantine").fetchone() == (0,)
        assert connection.execute("SELECT body FROM archiver.events").fetchall() == [(body,)]
        assert connection.execute("SELECT received_at FROM archiver.events").fetchall() == received
        assert receiver.post(body).json()["status"] == "duplicate"


def test_i4_a_locked_row_is_reported_and_keeps_no_other_in_the_quarantine(
    database_url: str, quarantined: dict[bytes, int]
) -> None:
    bodies = [created("c1", "s1"), created("c2", "s2")]
    first, *_ = quarantined.values()
    with psycopg.connect(database_url, autocommit=True) as connection, psycopg.connect(database_url) as beside:
        for body in bodies:
            connection.execute(
                "INSERT INTO archiver.quarantine (received_at, last_received_at, delivery_count, reason, detail,"
                " body, body_digest) VALUES (now(), now(), 1, 'not_storable', '', %s, sha256(%s))",
                [body, body],
            )
        beside.execute("SELECT FROM archiver.quarantine WHERE id = %s FOR UPDATE", [first])
        retried = archiver("quarantine", "retry", "--all", database_url=database_url)
        assert retried.returncode == 1
        assert f"{first}: still quarantined: Another session locks the delivery" in retried.stdout
        assert retried.stdout.count(": stored as event ") == len(bodies)
        assert "2 still quarantined" in retried.stderr
        query = "SELECT reason, (SELECT count(*) FROM archiver.acts WHERE kind = 'quarantine.retry')"
        found = connection.execute(f"{query} FROM archiver.quarantine WHERE id = %s", [first]).fetchall()
        assert found == [("not_json", 1)]


def test_an_empty_quarantine_says_so(url: str, database_url: str) -> None:
    del url
    for arguments in (["list"], ["retry", "--all"]):
        process = archiver("quarantine", *arguments, database_url=database_url)
        assert (process.returncode, process.stdout) == (0, "Nothing is quarantined.\n")
    for command in ("list", "retry"):
        process = archiver("quarantine", command, "--reason", "not_json", database_url=database_url)
        assert (process.returncode, process.stdout) == (0, "Nothing is quarantined with reason not_json.\n")
        process = archiver("quarantine", command, "--reason", "typo", database_url=database_url)
        assert (process.returncode, process.stdout) == (2, "")
        assert "not_json" in process.stderr
        assert "not_processable" in process.stderr
    assert json.loads(archiver("quarantine", "list", "--json", database_url=database_url).stdout) == []
    assert json.loads(archiver("quarantine", "retry", "--all", "--json", database_url=database_url).stdout) == {}


def test_output_that_is_not_a_terminal_is_not_wrapped(database_url: str) -> None:
    detail = " ".join(["a sentence"] * 30)
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO archiver.quarantine"
            " (received_at, last_received_at, delivery_count, reason, detail, body, body_digest)"
            " VALUES (now(), now(), 1, 'of_an_earlier_version', %s, '', '')",
            [detail],
        )
    listed = archiver("quarantine", "list", "--reason", "of_an_earlier_version", database_url=database_url)
    assert (listed.returncode, listed.stdout.count(detail)) == (0, 1)
    assert detail not in archiver("quarantine", "list", database_url=database_url, COLUMNS="80").stdout
    shown = archiver("quarantine", "show", "1", database_url=database_url).stdout
    assert ("of_an_earlier_version" in shown, "None" in shown) == (True, False)
    examined = archiver("doctor", database_url=NOWHERE).stdout
    assert "-> Correct host and port in DATABASE_URL, or start Postgres: no server listens there." in examined


def test_an_unknown_quarantine_id_is_1(url: str) -> None:
    assert "7 is not in the quarantine" in failed(archiver("quarantine", "show", "7", database_url=url))
    process = archiver("quarantine", "retry", "7", database_url=url)
    assert (process.returncode, process.stdout) == (1, "7: not in the quarantine\n")
    assert process.stderr == "archiver: 1 not in the quarantine; see `archiver quarantine list`\n"
    assert json.loads(archiver("quarantine", "retry", "7", "--json", database_url=url).stdout) == {"7": None}
    process = archiver("quarantine", "show", "7", "--raw", database_url=url)
    assert (process.returncode, process.stdout) == (1, "")


# Output


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["quarantine", "list"], ["status", "--json"], ["--version"]])
def test_an_output_that_is_full_is_said_in_one_line(command: list[str], unbuffered: str, url: str) -> None:
    environment = {**os.environ, "DATABASE_URL": url, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        program = [sys.executable, "-m", "archiver", *command]
        process = run(program, stdout=full, stderr=PIPE, env=environment, check=False)
    assert (process.returncode, process.stderr) == (1, b"archiver: cannot write: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_not_taken_whole_is_a_failure(unbuffered: str, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO archiver.quarantine"
            " (received_at, last_received_at, delivery_count, reason, detail, body, body_digest)"
            " VALUES (now(), now(), 1, 'not_json', '', convert_to(repeat('x', 1000000), 'UTF8'), '')"
        )
    # A pipe that takes what it can hold and no more.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    environment = {**os.environ, "DATABASE_URL": database_url, "PYTHONUNBUFFERED": unbuffered}
    program = [sys.executable, "-m", "archiver", "quarantine", "show", "1", "--raw"]
    process = run(program, stdout=writing, stderr=PIPE, env=environment, check=False)
    os.close(reading)
    os.close(writing)
    assert process.returncode == 1
    assert process.stderr.startswith(b"archiver: cannot write: ")


def test_a_reader_who_has_seen_enough_is_no_matter(url: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "archiver", "quarantine", "list"]
    process = run(program, stdout=writing, stderr=PIPE, env={**os.environ, "DATABASE_URL": url}, check=False)
    os.close(writing)
    assert process.stderr == b""


# The embedded database


@pytest.fixture
def home() -> Iterator[Path]:
    # Not below pytest's folder, which only its owner may enter: as root, Postgres runs as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="archiver-cli-"))
    folder.chmod(0o711)
    yield folder / "a home"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "command",
    [["status"], ["doctor"], ["quarantine", "list"], ["quarantine", "show", "1"], ["quarantine", "retry", "1"]],
)
def test_a_command_that_looks_makes_no_embedded_database(command: list[str], home: Path, cluster: Cluster) -> None:
    del cluster
    process = archiver(*command, ARCHIVER_HOME=str(home), ARCHIVER_WEBHOOK_SECRETS=HUNTER)
    assert process.returncode == 1
    assert f"embedded database in {home} (ARCHIVER_HOME). Set DATABASE_URL, or run" in output_of(process)
    assert not home.exists()


def test_a_command_beside_the_demo_says_where_its_database_is(home: Path, cluster: Cluster) -> None:
    del cluster
    (home / "demo" / "postgres").mkdir(parents=True)
    text = failed(archiver("status", ARCHIVER_HOME=str(home)))
    assert f"embedded database in {home} (ARCHIVER_HOME)" in text
    assert f"set ARCHIVER_HOME={shlex.quote(str(home / 'demo'))} to use it" in text


def test_without_a_database_url_the_commands_share_the_embedded_database(home: Path, cluster: Cluster) -> None:
    del cluster
    with starting(None, ARCHIVER_HOME=str(home)) as receiver, receiver:
        assert receiver.post(created()).json()["status"] == "stored"
        status = json.loads(archiver("status", "--json", ARCHIVER_HOME=str(home)).stdout)
        assert (status["database"], status["events"]) == (f"embedded in {home}", 1)
        examined = archiver("doctor", ARCHIVER_HOME=str(home), ARCHIVER_WEBHOOK_SECRETS=SECRET)
        assert f"Reached the one embedded in {home}." in output_of(examined)
        # Without a secret something must be done; what is to be pasted comes after it all the same.
        program = [sys.executable, "-m", "archiver", "doctor"]
        completed = run(
            program,
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            env={**os.environ, "ARCHIVER_HOME": str(home)},
            check=False,
        )
        assert completed.returncode == 1
        assert completed.stdout.splitlines()[-1] == examined.stdout.splitlines()[-1]
        psql = [*shlex.split(examined.stdout.splitlines()[-1]), "-tAc", "SELECT count(*) FROM analytics.messages"]
        assert run(psql, check=True, capture_output=True).stdout == b"2\n"
        receiver.signal(signal.SIGTERM)
        assert receiver.wait() == 0
    assert home.is_dir()
    process = archiver("status", "--json", ARCHIVER_HOME=str(home))
    assert json.loads(process.stdout)["messages"] == 2
    assert archiver("migrate", "--check", ARCHIVER_HOME=str(home)).returncode == 0
    processes = Path("/proc")
    until(lambda: not any(str(home).encode() in read(path) for path in processes.glob("[0-9]*/cmdline")), "its end")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["erase", "--session", "s", "--reason", "Gr\udcfcnde"],
        ["erase", "--where", "name=\udcff", "--reason", "x"],
        ["hold", "add", "--session", "s", "--reason", "x", "--actor", "\udcc3"],
        ["export", "--output", "\ud800"],
        ["\udcff"],
    ],
)
@pytest.mark.usefixtures("cluster")
def test_arguments_that_are_not_utf_8_are_wrong_usage(arguments: list[str]) -> None:
    ended = archiver(*arguments, database_url=NOWHERE)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"archiver: argument '.*\\u(d[8-f]..).*' is not UTF-8\n", ended.stderr)
