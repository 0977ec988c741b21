"""An export in Parquet equals the views after each run, whatever changed since, and keeps nothing that was erased."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sqlalchemy import Engine

from archiver.compliance import export
from archiver.compliance.erasure import Target
from archiver.compliance.export import FolderError, WrongCursorError
from archiver.database import identity, transaction
from archiver.worker.summing import Summing
from tests.support.erasures import erase, holds_text, read, record, said
from tests.support.exports import KEY, check, copied, fill
from tests.support.feeds import cursor
from tests.support.parquet import contained, days, inodes, update, viewed, written
from tests.support.payloads import created, deleted
from tests.support.rows import execute, rows
from tests.support.searching import index, lexemes
from tests.support.versions import on_one_version


def on_day(day: int, hour: int = 9) -> str:
    return f"2024-01-{day:02d}T{hour:02d}:30:00Z"


def turn(chat_id: str, session_id: str | None, day: int, **fields: Any) -> bytes:
    moment = datetime.fromisoformat(on_day(day))
    return created(chat_id, session_id, int(moment.timestamp() * 1000), **({"createdAt": on_day(day)} | fields))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return tmp_path / "lake"


# What is in it


def test_the_files_hold_every_row_of_the_views_on_its_day(engine: Engine, lake: Path) -> None:
    fill(engine)
    record(engine, turn("late", "s5", 15, createdAt="2024-01-15T23:59:59.999999Z"), turn("next", "s5", 16))
    completed = update(engine, lake)
    assert contained(lake) == viewed(engine)
    assert {path.parent.name for path in lake.rglob("*.parquet")} == {f"day={day}" for day in days(engine)}
    counts = {table: len(found) for table, found in viewed(engine).items()}
    assert {name: getattr(completed.manifest.counts, name) for name in counts} == counts
    assert check(lake) == []


@on_one_version
def test_the_columns_have_types(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 3, cost="0.1234567890123456789"))
    update(engine, lake)
    schema = parquet.read_schema(lake / "chats/day=2024-01-03/chats.parquet")
    assert schema.field("cost").type == pyarrow.decimal128(38, 18)
    assert schema.field("began_at").type == pyarrow.timestamp("us", "UTC")
    assert schema.field("began_is_told").type == pyarrow.bool_()
    assert schema.field("variables").type == pyarrow.string()
    (row,) = parquet.ParquetFile(lake / "chats/day=2024-01-03/chats.parquet").read().to_pylist()
    assert str(row["cost"]) == "0.123456789012345679"
    assert json.loads(row["variables"]) == {"customerTier": "Premium"}
    messages = parquet.read_schema(lake / "messages/day=2024-01-03/messages.parquet")
    assert [messages.field(name).type for name in ("position", "ordinal")] == [pyarrow.int64(), pyarrow.int32()]
    recorded = json.loads((lake / "manifest.json").read_bytes())["parquet"]["columns"]
    assert recorded["messages"] == {name: str(messages.field(name).type) for name in messages.names}


@on_one_version
def test_rows_are_written_in_groups_of_bounded_size(
    engine: Engine, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archiver.compliance.export.parquet.files.GROUP_ROWS", 3)
    monkeypatch.setattr("archiver.compliance.export.parquet.files.GROUP_BYTES", 1_000)
    record(engine, *(turn(f"c{number}", "s1", 3) for number in range(5)), turn("long", "s1", 3, input="x" * 3_000))
    update(engine, lake)
    file = parquet.ParquetFile(lake / "messages/day=2024-01-03/messages.parquet")
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert sum(sizes) == 12
    assert max(sizes) == 3
    assert contained(lake) == viewed(engine)


# Later runs


def test_a_later_run_writes_the_days_of_the_changed_sessions_alone(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1), turn("c2", "s1", 2), turn("c3", "s2", 2), turn("c4", "s3", 5))
    first = update(engine, lake).manifest
    assert first.parquet is not None
    assert (first.parquet.since, first.parquet.why) == (None, "the folder is new")
    before = inodes(lake)
    record(engine, turn("c5", "s1", 8), minute=5)
    second = update(engine, lake).manifest
    assert second.parquet is not None
    assert second.parquet.since == first.parquet.cursor
    assert written(lake) == ["2024-01-01", "2024-01-02", "2024-01-08"]
    after = inodes(lake)
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {f"{table}/day=2024-01-05/{table}.parquet" for table in ("conversations", "chats", "messages")}
    assert contained(lake) == viewed(engine)
    assert check(lake) == []
    assert update(engine, lake).manifest.counts == second.counts
    assert written(lake) == []


@on_one_version
def test_a_turn_whose_day_changes_moves_to_the_other_file(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 4), turn("c2", "s1", 9))
    update(engine, lake)
    record(engine, turn("c2", "s1", 1), minute=5)  # the earliest reported time applies
    update(engine, lake)
    assert written(lake) == ["2024-01-01", "2024-01-04", "2024-01-09"]
    assert contained(lake) == viewed(engine)
    assert sorted(path.parent.name for path in lake.glob("chats/*/*")) == ["day=2024-01-01", "day=2024-01-04"]
    assert not (lake / "chats/day=2024-01-09").exists()
    assert check(lake) == []


@on_one_version
def test_a_change_that_is_not_published_is_in_the_files_and_is_written_again(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1), turn("c2", "s2", 2))
    update(engine, lake)
    record(engine, turn("c3", "s1", 3), turn("c4", None, 4), minute=1)
    first = update(engine, lake, publishes=False).manifest.parquet
    assert written(lake) == ["2024-01-01", "2024-01-03", "2024-01-04"]
    assert contained(lake) == viewed(engine)
    second = update(engine, lake).manifest.parquet
    assert written(lake) == ["2024-01-01", "2024-01-03", "2024-01-04"]
    assert first is not None
    assert second is not None
    assert first.cursor < second.cursor


@on_one_version
def test_an_unassigned_turn_moves_to_its_session(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", None, 1), turn("c2", None, 2))
    update(engine, lake)
    record(engine, turn("c1", "s1", 7), minute=5)
    update(engine, lake)
    assert "2024-01-01" in written(lake)
    assert "2024-01-02" not in written(lake)
    assert contained(lake) == viewed(engine)


@on_one_version
def test_a_cursor_further_back_writes_more_and_one_beyond_is_refused(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1))
    begun = cursor(engine)
    record(engine, turn("c2", "s2", 2), minute=1)
    update(engine, lake)
    newest = cursor(engine)
    update(engine, lake, since=begun)
    assert written(lake) == ["2024-01-02"]
    update(engine, lake, since=0)
    assert written(lake) == ["2024-01-01", "2024-01-02"]
    with pytest.raises(WrongCursorError, match=f"--since-cursor {newest + 1} would omit"):
        update(engine, lake, since=newest + 1)
    assert check(lake) == []


@on_one_version
@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("DELETE FROM archiver.changes WHERE cursor <= (SELECT max(cursor) - 1 FROM archiver.changes)", "deleted"),
        ("epochs", "a new epoch"),
        ("CREATE OR REPLACE VIEW analytics.chats AS SELECT *, 1 AS added FROM ({view}) v", "columns of the views"),
    ],
)
def test_a_feed_that_does_not_suffice_has_everything_written(
    engine: Engine, lake: Path, statement: str, why: str
) -> None:
    begin_epoch(engine, 1)
    record(engine, turn("c1", "s1", 1), turn("c2", "s2", 2))
    update(engine, lake)
    record(engine, turn("c3", "s2", 3), turn("c4", "s2", 4), minute=1)
    cursor(engine)
    view = rows(engine, "SELECT pg_get_viewdef('analytics.chats'::regclass)")[0][0].rstrip("; ")
    if statement == "epochs":
        begin_epoch(engine, 2)
    else:
        execute(engine, statement.replace("{view}", view).replace(":", "\\:"), unguarded=True)
    result = update(engine, lake).manifest.parquet
    assert result is not None
    assert result.since is None
    assert why in str(result.why)
    assert contained(lake) == viewed(engine)
    assert check(lake) == []


def begin_epoch(engine: Engine, number: int) -> None:
    with transaction(engine) as connection:
        identity.insert_epoch(connection, identity.select_identity(connection, None), number)


@on_one_version
def test_a_folder_of_something_else_is_refused(engine: Engine, lake: Path, tmp_path: Path) -> None:
    record(engine, turn("c1", "s1", 1))
    update(engine, lake)
    manifest = json.loads((lake / "manifest.json").read_bytes())
    manifest["parquet"]["epoch"] = "1-elsewhere"
    (lake / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WrongCursorError, match="is an export of another database"):
        update(engine, lake)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FolderError, match="is not an export in Parquet"):
        update(engine, tmp_path / "mine")
    with pytest.raises(FolderError, match="create it first"):
        update(engine, tmp_path / "no" / "where")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lake", "mine"]


# What was erased


MARKERS = sorted(f"marker{number}{'x' * number}" for number in range(12))
UNEXPORTED = ["name of s1", "quarantinedmarker"]


def leaks(folder: Path) -> list[str]:
    """The markers in any file: in its bytes, or in a column or in the statistics that pyarrow reads."""
    found = []
    for path in filter(Path.is_file, folder.rglob("*")):
        whole = path.read_bytes()
        if path.suffix == ".parquet":
            file = parquet.ParquetFile(path)
            whole += str(file.read().to_pylist()).encode() + str(file.metadata.to_dict()).encode()
        found += [marker for marker in MARKERS if marker.encode() in whole]
    return sorted(set(found))


def derive(engine: Engine) -> None:
    """Bring all that is derived from the archive up to date, and what the planner remembers of it."""
    index(engine, "simple")
    while rows(engine, "SELECT FROM archiver.stale_buckets LIMIT 1"):
        Summing(engine).sum(lambda: None)
    execute(engine, "ANALYZE")


@pytest.mark.parametrize("is_published", [True, False])
def test_i8_erased_content_is_in_no_table_and_in_no_file_after_the_next_run(
    engine: Engine, lake: Path, is_published: bool
) -> None:
    fields: list[dict[str, Any]] = [
        {"input": MARKERS[0], "assistantOverrides": {"variableValues": {"name": MARKERS[1]}}},
        {"input": f"long {'word ' * 500} {MARKERS[2]}", "output": [{"role": MARKERS[3], "content": MARKERS[4]}]},
        {"input": "x", "output": [{"role": "assistant", "content": MARKERS[5]}], "status": MARKERS[6]},
        {"assistantId": MARKERS[10], "externalChatId": MARKERS[11]},
    ]
    record(engine, *(turn(f"c{number}", "s1", 1 + number, **each) for number, each in enumerate(fields)))
    record(engine, turn("d1", "s2", 2, input=MARKERS[7]), turn("d2", "s2", 6), turn("kept", "s3", 9))
    read(engine, "s1", 1, ("user", MARKERS[8]), ("assistant", "of history"))
    record(engine, turn("stray", None, 7, input=MARKERS[9]), b'{"sessionId": "s1", quarantinedmarker')
    update(engine, lake, key=KEY)
    derive(engine)
    assert leaks(lake) == MARKERS
    assert holds_text(engine, *MARKERS, *UNEXPORTED) == [*MARKERS, *UNEXPORTED]
    assert rows(engine, f"SELECT FROM archiver.days WHERE assistant_id = '{MARKERS[10]}'")
    assert set(MARKERS[7:10]) <= lexemes(engine)
    erase(engine, Target("s1"), Target("s2", "d1"), Target("", "stray"))
    state = update(engine, lake, publishes=is_published, key=KEY).manifest.parquet
    assert leaks(lake) == []
    assert state is not None
    assert {"2024-01-01", "2024-01-02", "2024-01-03", "2024-01-07"} <= set(state.erased) <= set(state.written)
    assert "2024-01-09" not in state.written
    assert contained(lake) == viewed(engine)
    assert check(lake, is_keyed=True) == []
    derive(engine)
    assert holds_text(engine, *MARKERS, *UNEXPORTED) == []


# Any history


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(0, 5), st.integers(0, 2), st.integers(1, 6)),
        st.tuples(st.just("delete"), st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.just("read"), st.integers(0, 2), st.lists(st.integers(0, 7), max_size=4)),
        st.tuples(st.just("erase"), st.integers(0, 5), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("run"), st.booleans()),
    ),
    min_size=1,
    max_size=12,
)
EXAMPLES = count()


def act(engine: Engine, lake: Path, kind: str, *values: Any, name: str, minute: int) -> None:
    """`name`: prefix of the ids of one example."""
    sessions = (f"{name}-s0", f"{name}-s1", None)
    if kind == "turn":
        chat, session, day = values
        record(engine, turn(f"{name}-c{chat}", sessions[session], day), minute=minute)
    elif kind == "delete":
        chat, session = values
        record(engine, deleted(f"{name}-c{chat}", sessions[session]), minute=minute)
    elif kind == "read":
        session, chats = values
        read(engine, sessions[session] or f"{name}-s2", minute, *said(*(f"{name}-c{chat}" for chat in chats)))
    elif kind == "erase":
        chat, session, is_whole = values
        session_id = sessions[session] or f"{name}-s2"
        erase(engine, Target(session_id) if is_whole else Target(session_id, f"{name}-c{chat}"))
    else:
        update(engine, lake, publishes=values[0])
        assert contained(lake) == viewed(engine)


@on_one_version
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(acts=ACTS, is_published=st.booleans())
def test_an_updated_folder_equals_the_views_after_any_history(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, acts: list[Any], is_published: bool
) -> None:
    """The database keeps what the examples before left in it."""
    lake, name = tmp_path_factory.mktemp("lakes") / "lake", f"e{next(EXAMPLES)}"
    for minute, each in enumerate(
        [*acts[: len(acts) // 2], ("run", True), *acts[len(acts) // 2 :], ("run", is_published)]
    ):
        act(engine, lake, *each, name=name, minute=minute)
    assert check(lake) == []


# What stops in the middle


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from archiver import database
from archiver.compliance import export
from tests.support.parquet import REQUEST
import pyarrow.parquet

url, original, copies = sys.argv[1:]

def run(folder, step):
    left = step
    def hook(event, arguments):
        nonlocal left
        if event in {"open", "os.rename", "os.remove"} and str(folder) in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    export.update(database.connect(database.database_url(url), pool_size=2), folder, REQUEST)
    os._exit(0)

step, status, folder = 0, signal.SIGKILL, Path(original)
while status == signal.SIGKILL:
    step += 1 if (folder / ".new" / "manifest.json").exists() else 3  # each step once the change is decided
    folder = Path(copies) / str(step)
    shutil.copytree(original, folder)
    pid = os.fork()
    if pid == 0:
        run(folder, step)
    status = os.waitpid(pid, 0)[1]
sys.exit(status)
"""


@on_one_version
def test_a_kill_at_each_step_leaves_a_readable_folder_that_the_next_run_completes(
    engine: Engine, database_url: str, lake: Path, tmp_path: Path
) -> None:
    record(engine, turn("c1", "s1", 3), turn("c2", "s2", 5))
    update(engine, lake)
    former, kept = contained(lake), "2024-01-05"
    record(engine, turn("c1", "s1", 2), minute=1)
    cursor(engine)
    (tmp_path / "copies").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, database_url, str(lake), str(tmp_path / "copies")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    new = viewed(engine)
    states = []
    for folder in sorted((tmp_path / "copies").iterdir(), key=lambda path: int(path.name)):
        left = contained(folder)
        states.append("former" if left == former else "new" if left == new else "between")
        for table, found in left.items():
            for day in {row[0] for row in found}:
                of_day = [row for row in found if row[0] == day]
                assert of_day in ([row for row in whole[table] if row[0] == day] for whole in (former, new))
            assert [row for row in found if row[0] == kept] == [row for row in former[table] if row[0] == kept]
        if states[-1] == "former":
            assert {each.fault for each in check(folder)} <= {"extra"}
        update(engine, folder)
        assert written(folder) == [] or states[-1] == "former"  # the files were complete and only had to be moved
        assert contained(folder) == new
        assert check(folder) == []
        assert not (folder / ".new").exists()
    assert states == sorted(states, key=["former", "between", "new"].index)
    assert set(states) == {"former", "between", "new"}


@on_one_version
def test_a_missing_or_shortened_file_is_written_again(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1), turn("c2", "s2", 2), turn("c3", "s3", 3))
    update(engine, lake)
    (lake / "chats/day=2024-01-01/chats.parquet").unlink()
    shortened = lake / "messages/day=2024-01-02/messages.parquet"
    shortened.write_bytes(shortened.read_bytes()[:-1])
    update(engine, lake)
    assert written(lake) == ["2024-01-01", "2024-01-02"]
    assert contained(lake) == viewed(engine)
    assert check(lake) == []


@on_one_version
def test_two_exports_cannot_write_one_folder(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1))
    result: list[str] = []

    def progress(*_: Any) -> None:
        with pytest.raises(FolderError, match="another export is writing to"):
            update(engine, lake)
        result.append("refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archiver.compliance.export.parquet.updating.PROGRESS_EVERY", 1)
        update(engine, lake, on_progress=progress)
    assert set(result) == {"refused"}
    assert check(lake) == []


# The check


@on_one_version
def test_the_check_finds_a_changed_a_missing_and_an_additional_file(
    engine: Engine, lake: Path, tmp_path: Path
) -> None:
    record(engine, turn("c1", "s1", 1), turn("c2", "s2", 2))
    update(engine, lake, key=KEY)
    assert check(lake, is_keyed=True) == []
    name = "messages/day=2024-01-02/messages.parquet"

    def faults(change: Callable[[Path], Any]) -> list[tuple[str, str]]:
        folder = copied(lake, tmp_path / "changed")
        change(folder)
        return [(each.file, each.fault) for each in check(folder, digest=digest)]

    digest = sha256((lake / "manifest.json").read_bytes()).hexdigest()
    content = bytearray((lake / name).read_bytes())
    content[len(content) // 2] ^= 1
    assert faults(lambda folder: (folder / name).write_bytes(content)) == [(name, "digest")]
    assert faults(lambda folder: (folder / name).unlink()) == [(name, "missing")]
    surplus = "messages/day=2024-01-02/part.parquet"
    assert faults(lambda folder: (folder / surplus).write_bytes(content)) == [(surplus, "extra")]
    assert faults(lambda folder: (folder / "chats/link").symlink_to(lake)) == [("chats/link", "extra")]
    assert ("manifest.json", "counts") in faults(lambda folder: reworded(folder, '"chats": 2', '"chats": 3'))
    assert ("manifest.json", "manifest_digest") in faults(lambda folder: reworded(folder, "case 7", "case 8"))
    assert faults(lambda folder: reworded(folder, name, "messages/day=2024-01-02/../../../etc/passwd"))[-1] == (
        "manifest.json",
        "damaged",
    )


def reworded(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@on_one_version
def test_a_run_is_recorded_before_and_after(engine: Engine, lake: Path) -> None:
    record(engine, turn("c1", "s1", 1))
    update(engine, lake)
    completed = update(engine, lake, since=0)
    found = rows(engine, "SELECT kind, actor, reason, detail FROM archiver.acts WHERE kind ~ '^export' ORDER BY id")
    assert [row[0] for row in found] == ["export", "export.done"] * 2
    assert found[2][1:] == ("anna@desk", "case 7", {"all": True, "formats": [export.PARQUET], "since_cursor": 0})
    assert found[3][3]["manifest_sha256"] == completed.digest
    assert completed.manifest.act == found[3][3]["act"]
