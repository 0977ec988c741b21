"""`archiver export --format parquet` as a command."""

import json
import random
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine

from tests.support.disks import small_disk
from tests.support.erasures import record
from tests.support.feeds import cursor
from tests.support.parquet import contained, viewed
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.versions import on_one_version

PARQUET = ("--format", "parquet")


def export(*arguments: str | Path, url: str, status: int = 0, **settings: str) -> str:
    ended = archiver("export", *map(str, arguments), database_url=url, **settings)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr if status else ended.stdout


@on_one_version
def test_an_auditor_creates_updates_and_checks_an_export(engine: Engine, database_url: str, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    record(engine, created("c1", "s1"), created("c2", "s2", createdAt="2024-01-16T00:00:00Z"))
    newest = cursor(engine)
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = f"auditor_{connection.info.dbname}"
        connection.execute(f"CREATE ROLE {name} LOGIN IN ROLE archiver_auditor".encode())
    url = database_url.replace("postgresql://postgres@", f"postgresql://{name}@")
    try:
        first = export("--output", lake, *PARQUET, "--all", "--reason", "lake", url=url)
        assert f"2 conversations, 2 turns and 4 messages, up to cursor {newest}." in first
        assert "Wrote all of 2 days: the folder is new." in first
        record(engine, created("c3", "s2", createdAt="2024-01-16T01:00:00Z"), minute=1)
        cursor(engine)
        second = export("--output", lake, *PARQUET, "--since-cursor", str(newest), url=url)
        assert f"Wrote 1 day again for the changes after cursor {newest}." in second
        assert contained(lake) == viewed(engine)
        printed = json.loads(export("--output", lake, *PARQUET, "--all", "--json", url=url))
    finally:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(f"DROP ROLE {name}".encode())
    assert printed == json.loads((lake / "manifest.json").read_bytes())
    assert printed["parquet"]["written"] == []
    checked = export("--check", lake, "--unsigned", url="postgresql://127.0.0.1:1/none")
    assert "6 files in Parquet, up to cursor" in checked
    (lake / "chats/day=2024-01-16/chats.parquet").write_bytes(b"PAR1")
    changed = export("--check", lake, "--unsigned", url="postgresql://127.0.0.1:1/none", status=1)
    assert "chats/day=2024-01-16/chats.parquet: its SHA-256 is not the one in the manifest" in changed


@on_one_version
def test_a_missing_library_is_reported_with_the_command_that_installs_it(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "without" / "pyarrow").mkdir(parents=True)
    (tmp_path / "without" / "pyarrow" / "__init__.py").write_text("raise ImportError('not installed')")
    advice = export(
        *("--output", tmp_path / "lake", *PARQUET, "--all"),
        url=database_url,
        status=1,
        PYTHONPATH=str(tmp_path / "without"),
    )
    assert "pip install 'callhq-archiver[parquet]'" in advice
    assert not (tmp_path / "lake").exists()


@on_one_version
def test_a_full_disk_leaves_the_export_as_it_was(engine: Engine, database_url: str, tmp_path: Path) -> None:
    record(engine, created("c1", "s1", createdAt="2024-01-14T00:00:00Z"))
    cursor(engine)
    with small_disk(tmp_path / "disk", 1_048_576) as disk:
        export("--output", disk / "lake", *PARQUET, "--all", url=database_url)
        before = contained(disk / "lake")
        # No compression helps against different words.
        record(engine, *(created(f"more{n}", "s2", input=noise(n)) for n in range(30)), minute=30)
        cursor(engine)
        advice = export("--output", disk / "lake", *PARQUET, "--all", url=database_url, status=1)
        assert "No space for the export" in advice
        assert contained(disk / "lake") == before
        export("--check", disk / "lake", "--unsigned", url=database_url)
        export("--output", disk / "new", *PARQUET, "--all", url=database_url, status=1)
        assert sorted(each.name for each in disk.iterdir()) == ["lake"]


def noise(number: int) -> str:
    return random.Random(number).randbytes(60_000).hex()


@pytest.mark.parametrize(
    "arguments",
    [
        [*PARQUET],
        [*PARQUET, "--all", "--format", "csv"],
        [*PARQUET, "--session", "s1"],
        [*PARQUET, "--since-cursor", "3", "--hold", "1"],
        ["--all", "--since-cursor", "3"],
    ],
)
def test_wrong_usage_is_reported(arguments: list[str], tmp_path: Path) -> None:
    url = "postgresql://127.0.0.1:1/none"
    assert "--since-cursor requires --format parquet" in " ".join(
        export("--output", tmp_path / "lake", *arguments, url=url, status=2).split()
    )
    assert "accepts no selection or format" in " ".join(
        export("--check", tmp_path, "--since-cursor", "3", url=url, status=2).split()
    )
