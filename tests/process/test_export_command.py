"""`archiver export` as a command: roles, kills, a full disk, and an archive that is written meanwhile."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import Engine

from archiver.compliance.export import spreadsheet
from archiver.compliance.export.partial_folder import remove_left
from tests.support.disks import small_disk
from tests.support.erasures import record
from tests.support.exports import KEY, copied, fill, lines, reforge
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.rows import execute, rows
from tests.support.servers import as_writer
from tests.support.versions import on_one_version
from tests.support.waiting import until


@pytest.fixture
def url(engine: Engine, database_url: str) -> str:
    fill(engine)
    return database_url


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "case 7"


@pytest.fixture(autouse=True)
def _has_parent(output: Path) -> None:
    output.parent.mkdir()


def ok(*arguments: str | Path, url: str | None = None, **settings: str) -> str:
    ended = archiver("export", *map(str, arguments), database_url=url, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@contextmanager
def as_auditor(url: str) -> Iterator[str]:
    """The same database for somebody who is given archiver_auditor, and nothing else."""
    with psycopg.connect(url, autocommit=True) as connection:
        name = f"auditor_{connection.info.dbname}"
        connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE archiver_auditor".encode())
        yield url.replace("postgresql://postgres@", f"postgresql://{name}@")
        connection.execute(f"DROP ROLE {name}".encode())


def test_an_auditor_exports_and_anybody_checks_without_a_database(url: str, output: Path, tmp_path: Path) -> None:
    (tmp_path / "seal.pub").write_bytes(
        KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    with as_auditor(url) as auditors:
        process = ok("--output", output, "--all", "--format", "csv", "--format", "openai", url=auditors)
    assert "events.jsonl" in process
    assert "not yet sealed) to" in process
    unsigned = archiver("export", "--check", str(output), "--key", str(tmp_path / "seal.pub"))
    assert unsigned.returncode == 1
    assert "manifest.json: it is not signed, although it must be" in unsigned.stderr
    recorded = sha256((output / "manifest.json").read_bytes()).hexdigest()
    checked = ok("--check", output, "--key", tmp_path / "seal.pub", "--manifest", recorded)
    (digest,) = [line.split(": ")[1].split(",")[0] for line in checked.splitlines() if "SHA-256" in line]
    assert digest in process
    assert digest in archiver("acts", "--kind", "export.done", "--json", database_url=url).stdout
    sums = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=output, capture_output=True, check=False)
    assert sums.returncode == 0


def test_a_writer_exports_too_and_prints_the_manifest(url: str, output: Path, tmp_path: Path) -> None:
    key = tmp_path / "seal.key"
    key.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = tmp_path / "seal.pub"
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    data = ok(
        *("--output", output, "--session", "s1", "--reason", "why", "--actor", "anna", "--json"),
        url=as_writer(url),
        ARCHIVER_SEAL_KEY_FILE=str(key),
        ARCHIVER_ON_DELETE="erase",
    )
    assert json.loads(data) == json.loads((output / "manifest.json").read_bytes())
    assert json.loads(data)["settings"]["here"]["on_delete"] == "erase"
    assert "BEGIN" not in data
    assert "signed by" in ok("--check", output, "--key", public)
    assert "not checked: give --key" in ok("--check", output)
    assert json.loads(ok("--check", output, "--key", public, "--json"))["manifest_signature_checked"]
    # As the documentation has it, without this program.
    openssl = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    verified = subprocess.run(
        [*openssl, "-in", "manifest.json", "-sigfile", "manifest.sig"], cwd=output, check=False, capture_output=True
    )
    assert verified.returncode == 0, verified.stderr


@on_one_version
def test_an_unsigned_export_fails_its_check_without_unsigned_or_manifest(
    url: str, engine: Engine, output: Path, tmp_path: Path
) -> None:
    """Its transcripts can be changed by anyone who can write to the folder."""
    ok("--output", output, "--all", url=url)
    public = tmp_path / "seal.pub"
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    folder = copied(output, tmp_path / "forged")
    content = (folder / "messages.jsonl").read_bytes()
    (folder / "messages.jsonl").write_bytes(content.replace(b"only history knows", b"nothing of the kind"))
    reforge(folder)
    for each in (output, folder):
        ended = archiver("export", "--check", str(each))
        assert ended.returncode == 1
        last = ended.stderr.splitlines()[-1]
        assert last.startswith("archiver: The export is not signed: transcripts")
        assert "--manifest SHA256" in last
        assert json.loads(archiver("export", "--check", str(each), "--json").stdout)["ok"] is False
        accepted = ok("--check", each, "--unsigned").splitlines()
        assert accepted[-1].startswith("The export is not signed: transcripts")
        assert json.loads(ok("--check", each, "--unsigned", "--json"))["ok"] is True
        ok("--check", each, "--unsigned", "--key", public)
    ((act, recorded),) = rows(
        engine,
        "SELECT detail ->> 'act', detail ->> 'manifest_sha256' FROM archiver.acts WHERE kind = 'export.done'",
    )
    lines_of_it = ok("--check", output, "--manifest", recorded).splitlines()
    assert f'export.done with detail "act": {act}:' in lines_of_it[-1]
    assert archiver("export", "--check", str(folder), "--manifest", recorded).returncode == 1


@on_one_version
def test_csv_cells_that_a_spreadsheet_would_run_are_made_harmless_unless_raw(
    url: str, engine: Engine, output: Path
) -> None:
    risky = [
        '=HYPERLINK("http://example.com")',
        "+1",
        "-2+3",
        "@x",
        "\t=1",
        "\r=1",
        "\x1b[31mred",
        "'=quoted",
        "plain",
    ]
    record(engine, *(created(f"risky{number}", "s5", input=each) for number, each in enumerate(risky)), minute=40)
    ok("--output", output, "--session", "s5", "--format", "csv", url=url)
    raw = output.with_name("raw")
    ok("--output", raw, "--session", "s5", "--format", "csv", "--raw-csv", url=url)
    contents = {}
    for folder in (output, raw):
        with (folder / "messages.csv").open(newline="") as file:
            contents[folder] = [row["content"] for row in csv.DictReader(file) if row["role"] == "user"]
        ok("--check", folder, "--unsigned")
    assert contents[raw] == risky
    assert [spreadsheet.restore_cell(each) for each in contents[output]] == risky
    assert not any(each.startswith(("=", "+", "-", "@", "\t", "\r")) for each in contents[output])
    assert "\x1b" not in (output / "messages.csv").read_text()
    kinds = [json.loads((folder / "manifest.json").read_bytes())["csv"] for folder in (output, raw)]
    assert kinds == ["neutralised", "raw"]


@on_one_version
def test_i9_findings_are_named_and_exit_1(url: str, output: Path, tmp_path: Path) -> None:
    ok("--output", output, "--all", url=url)
    folder = copied(output, tmp_path / "forged")
    content = (folder / "events.jsonl").read_bytes()
    (folder / "events.jsonl").write_bytes(content.replace(b"chat.deleted", b"chat.forgery", 1))
    (folder / "[bold]\x1b[31m").touch()
    reforge(folder)
    ended = archiver("export", "--check", str(folder))
    assert ended.returncode == 1
    assert "events.jsonl, line 3, event 3, sealed by 1: it differs from its sealed state" in ended.stderr
    assert "[bold]\\x1b[31m: it does not belong to the export" in ended.stderr
    assert "\x1b" not in ended.stderr
    data = json.loads(archiver("export", "--check", str(folder), "--json").stdout)
    assert {(item["file"], item["line"], item["fault"]) for item in data["findings"]} >= {
        ("events.jsonl", 3, "changed")
    }
    seals = tmp_path / "seals.jsonl"
    seals.write_text(archiver("seals", "export", database_url=url).stdout)
    heads = [json.loads(line) for line in seals.read_text().splitlines()]
    data = json.loads(ok("--check", output, "--against", seals, "--unsigned", "--json"))
    assert data["compared"] == data["seals"] == len(heads)
    seals.write_text("".join(json.dumps(head | {"hash": "00" * 32}) + "\n" for head in heads))
    ended = archiver("export", "--check", str(output), "--against", str(seals))
    assert ended.returncode == 1
    assert "it differs from the seal exported earlier under this number" in ended.stderr
    assert f"Compared with {len(heads)} seals exported earlier." in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--all"], "specify --output DIR"),
        (["--output", "x"], "specify what to export"),
        (["--output", "x", "--all", "--session", "s"], "use only one of"),
        (["--output", "x", "--all", "--hold", "1"], "use only one of"),
        (["--output", "x", "--since", "2024-03-02", "--until", "2024-03-02"], "--since is not before --until"),
        (["--output", "x", "--check", "."], "not both"),
        (["--output", "x", "--session", ""], "invalid session id"),
        (["--output", "x", "--since", "yesterday"], "expected 2024-01-15"),
        (["--output", "x", "--all", "--key", __file__], "require --check"),
        (["--output", "x", "--all", "--signed-since", "2"], "require --check"),
        (["--output", "x", "--all", "--against", __file__], "require --check"),
        (["--output", "x", "--all", "--manifest", "0" * 64], "require --check"),
        (["--output", "x", "--all", "--unsigned"], "require --check"),
        (["--output", "x", "--all", "--raw-csv"], "requires --format csv"),
        (["--check", ".", "--raw-csv"], "checks a whole export"),
        (["--check", ".", "--all"], "checks a whole export"),
        (["--check", ".", "--key", __file__], "not an Ed25519 public key"),
        (["--check", ".", "--against", __file__], "line 1 is not output"),
    ],
)
def test_wrong_usage_is_reported(arguments: list[str], advice: str) -> None:
    ended = archiver("export", *arguments, database_url="postgresql://127.0.0.1:1/none")
    assert ended.returncode == 2
    assert advice in " ".join(ended.stderr.split())


@on_one_version
def test_an_impossible_export_is_reported_and_leaves_nothing(url: str, output: Path) -> None:
    for arguments, advice in (
        (("--session", "s1", "--session", "none"), "unknown session none"),
        (("--hold", "9"), "hold 9 does not exist; see `archiver hold list --all`"),
        (("--hold", "8", "--hold", "9"), "holds 8, 9 do not exist; see `archiver hold list --all`"),
        (("--until", "2001-01-01"), "nothing archived matches the selection; nothing was exported"),
    ):
        ended = archiver("export", "--output", str(output), *arguments, database_url=url)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert f"archiver: {advice}" in ended.stderr
    (output / "mine").mkdir(parents=True)
    ended = archiver("export", "--output", str(output), "--all", database_url=url)
    assert ended.returncode == 1
    assert "is not an empty folder; choose another" in ended.stderr
    assert [each.name for each in output.parent.rglob("*")] == ["case 7", "mine"]
    ended = archiver("export", "--check", str(output))
    assert ended.returncode == 1
    assert "manifest.json: it is missing" in ended.stderr


@on_one_version
def test_a_missing_privilege_is_reported_and_leaves_nothing(url: str, output: Path) -> None:
    with as_auditor(url) as auditors:
        with psycopg.connect(url) as connection:
            connection.execute("REVOKE SELECT ON analytics.messages FROM archiver_auditor")
        ended = archiver("export", "--output", str(output), "--all", database_url=auditors)
    assert ended.returncode == 1
    assert "permission denied for view messages" in ended.stderr
    assert "archiver doctor" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(output.parent.iterdir()) == []


@contextmanager
def waiting_export(url: str, output: Path) -> Iterator[subprocess.Popen[str]]:
    """An export that has begun, and waits for a table that we hold."""
    command = [sys.executable, "-m", "archiver", "export", "--output", str(output), "--all"]
    with psycopg.connect(url) as holder:
        holder.execute("LOCK TABLE archiver.chats IN ACCESS EXCLUSIVE MODE")
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"DATABASE_URL": url}
        ) as process:
            try:
                until(lambda: is_awaited(url), "the export waits")
                yield process
                holder.rollback()
                process.wait(120)
            finally:
                process.kill()


def is_awaited(url: str) -> bool:
    with psycopg.connect(url) as connection:
        query = (
            "SELECT 1 FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE NOT l.granted AND d.datname = current_database()"
        )
        return connection.execute(query).fetchone() is not None


@on_one_version
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_an_export_that_is_stopped_leaves_nothing(url: str, output: Path, number: signal.Signals) -> None:
    with waiting_export(url, output) as process:
        assert [each.name.startswith(".case 7.partial-") for each in output.parent.iterdir()] == [True]
        for _ in range(20):  # whoever is impatient
            process.send_signal(number)
        assert process.wait(120) == 1
    assert list(output.parent.iterdir()) == []


@on_one_version
def test_what_a_killed_export_left_goes_with_the_next_and_nothing_else_does(url: str, output: Path) -> None:
    others = [
        output.parent / name for name in (".mine.partial-abcdefgh", ".case.partial-x", "case 7.partial-abcdefgh")
    ]
    for each in others:
        each.mkdir()
        (each / "mine.txt").touch()
    with waiting_export(url, output) as process:
        process.kill()
        process.wait()
    (left,) = output.parent.glob(".case 7.partial-*")
    with waiting_export(url, output.with_name("first")):
        assert not left.exists()
        (made,) = output.parent.glob(".first.partial-*")
        remove_left(output.parent)  # as an export beside it does
        assert made.exists()
    assert sorted(output.parent.iterdir()) == sorted([*others, output.with_name("first")])


@on_one_version
def test_a_report_that_cannot_be_written_leaves_the_export_and_says_so(url: str, output: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "archiver", "export", "--output", str(output), "--session", "s1"],
            env=os.environ | {"DATABASE_URL": url},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert f"the export in {output} is complete" in ended.stderr
    ok("--check", output, "--unsigned")


@on_one_version
def test_events_that_arrive_during_an_export_are_not_in_it(url: str, engine: Engine, output: Path) -> None:
    before = rows(engine, "SELECT count(*), max(id) FROM archiver.events")
    with waiting_export(url, output):
        names = "session_id, type, source, received_at, last_received_at, delivery_count, body, salt, body_digest"
        execute(
            engine,
            f"INSERT INTO archiver.events (dedupe_key, {names}) SELECT sha256('another'), {names}"
            " FROM archiver.events WHERE id = 1",
        )
    assert rows(engine, "SELECT count(*) FROM archiver.events") == [(before[0][0] + 1,)]
    ok("--check", output, "--unsigned")
    result = [each["id"] for each in lines(output, "events.jsonl")]
    assert (len(result), result[-1]) == before[0]


SMALL = 1_048_576


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SMALL) as place:
        yield place


@on_one_version
def test_a_full_disk_is_reported_and_leaves_nothing(url: str, engine: Engine, disk: Path) -> None:
    record(engine, *(created(f"more{number}", "s1", input="word " * 10_000) for number in range(30)), minute=30)
    ended = archiver("export", "--output", str(disk / "here"), "--all", database_url=url)
    assert ended.returncode == 1
    assert "No space for the export" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(disk.iterdir()) == []
    ok("--output", disk / "here", "--session", "s2", url=url)
    ok("--check", disk / "here", "--unsigned")


@on_one_version
def test_holds_and_times_select_and_released_holds_do_so_too(url: str, engine: Engine, output: Path) -> None:
    execute(
        engine,
        "INSERT INTO archiver.holds (placed_at, author, reason, session_id, released_at, released_by)"
        " VALUES (now(), 'anna', 'case', 's4', now(), 'anna')",
    )
    ok("--output", output, "--hold", "1", url=url)
    assert {each["session_id"] for each in lines(output, "events.jsonl")} == {"s4"}
    shutil.rmtree(output)
    ok("--output", output, "--since", "2024-03-01", "--until", "2024-03-02", url=url)
    assert {each["session_id"] for each in lines(output, "conversations.jsonl")} == {"s4"}
    data: dict[str, Any] = json.loads((output / "manifest.json").read_bytes())
    assert data["asked"] == {"since": "2024-03-01T00:00:00+00:00", "until": "2024-03-02T00:00:00+00:00"}
    ok("--check", output, "--unsigned")
