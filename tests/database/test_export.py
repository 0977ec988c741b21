"""Exports hold what they say, byte for byte, and whatever is changed in one is found."""

import csv
import io
import json
import os
import re
import tracemalloc
from base64 import b64decode, b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from archiver.compliance import erasure, export, seals
from archiver.compliance.erasure import Criteria, Target
from archiver.compliance.export import Finding, FolderError, Selection, UnknownSelectionError, reading
from archiver.compliance.export.records import EventLine, is_plain
from archiver.database import snapshot, transaction
from tests.support.erasures import NOW, erase, record
from tests.support.exports import KEY, NASTY, check, copied, fill, lines, make, reforge, rewrite
from tests.support.payloads import created
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version


@pytest.fixture
def archive(engine: Engine) -> Engine:
    fill(engine)
    return engine


@pytest.fixture
def exported(archive: Engine, tmp_path: Path) -> Path:
    make(archive, tmp_path / "whole")
    return tmp_path / "whole"


def as_json(engine: Engine, query: str) -> list[Any]:
    return [row[0] for row in rows(engine, f"SELECT row_to_json(v) FROM ({query}) v")]


# What is in it


def test_an_export_checks_and_holds_every_row_as_it_is(archive: Engine, exported: Path) -> None:
    assert check(exported, is_keyed=True) == []
    for view, order in (("chats", "chat_id"), ("messages", "position")):
        expected = as_json(archive, f"SELECT * FROM analytics.{view} ORDER BY session_id, {order}")
        result = lines(exported, f"{view}.jsonl")
        assert sorted(map(str, result)) == sorted(map(str, expected))
    data = {each["session_id"]: each for each in lines(exported, "conversations.jsonl")}
    for each in as_json(archive, "SELECT * FROM analytics.conversations"):
        assert each.items() <= data[each["session_id"]].items()
    assert (data["s2"]["coverage"], data["s2"]["reason"]) == ("unverified", "erased")
    assert data["s3"]["erased_at"] is not None


def test_an_event_holds_the_exact_bytes_that_arrived(archive: Engine, exported: Path) -> None:
    ledger = {row[0]: row[1:] for row in rows(archive, "SELECT id, body, salt, received_at FROM archiver.events")}
    result = lines(exported, "events.jsonl")
    assert [each["id"] for each in result] == sorted(ledger)
    for each in result:
        body, salt, received_at = ledger[each["id"]]
        results = b64decode(each["body_base64"]) if "body_base64" in each else each["body"]
        assert (results.encode() if isinstance(results, str) else results) == (None if body is None else bytes(body))
        assert each["salt"] == (None if salt is None else bytes(salt).hex())
        assert datetime.fromisoformat(each["received_at"]) == received_at
    assert sum("body_base64" in each for each in result) == 1
    assert {each["chat_id"] for each in result if each["body"] is None and "body_base64" not in each} >= {"c3"}


def test_csv_holds_what_the_json_holds(exported: Path) -> None:
    for name in ("conversations", "chats", "messages"):
        with (exported / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            result = list(csv.DictReader(file))
        expected = lines(exported, f"{name}.jsonl")
        assert list(result[0]) == list(expected[0])
        assert len(result) == len(expected)
        for row, item in zip(result, expected, strict=True):
            plain = {key: value for key, value in item.items() if isinstance(value, str) and "T" not in value}
            assert {key: row[key] for key in plain} == plain
    assert any(NASTY.replace("\0", "\ufffd") == row["content"] for row in lines(exported, "messages.jsonl"))


def test_openai_lines_are_conversations_in_order_without_what_was_deleted(archive: Engine, exported: Path) -> None:
    expected = []
    for (session_id,) in rows(archive, "SELECT session_id FROM archiver.sessions WHERE session_id <> '' ORDER BY 1"):
        rows_found = rows(
            archive,
            f"SELECT role, content FROM analytics.messages WHERE session_id = '{session_id}' AND deleted_at IS NULL"
            " ORDER BY position",
        )
        expected += (
            [{"messages": [{"role": role, "content": content} for role, content in rows_found]}] if rows_found else []
        )
    assert lines(exported, "openai.jsonl") == expected
    assert "question of c2" not in (exported / "openai.jsonl").read_text()
    assert "question of c2" in (exported / "messages.jsonl").read_text()


@on_one_version
def test_the_manifest_says_what_was_asked_for_and_how_much_there_is(archive: Engine, tmp_path: Path) -> None:
    made = make(archive, tmp_path / "one", Selection(["s1"]), formats=("openai",), settings={"on_delete": "keep"})
    data = json.loads((tmp_path / "one" / "manifest.json").read_bytes())
    assert sha256((tmp_path / "one" / "manifest.json").read_bytes()).hexdigest() == made.digest
    assert (data["asked"], data["actor"], data["reason"]) == ({"sessions": ["s1"]}, "anna@desk", "case 7")
    assert data["settings"]["here"] == {"on_delete": "keep"}
    assert data["head"]["id"] == 3
    (messages,) = rows(archive, "SELECT count(*) FROM archiver.messages WHERE session_id = 's1'")[0]
    assert {"conversations": 1, "chats": 3, "messages": messages, "unsealed": 0}.items() <= data["counts"].items()
    assert sum(data["coverage"].values()) == 1
    assert check(tmp_path / "one") == []
    assert {each["session_id"] for each in lines(tmp_path / "one", "events.jsonl")} == {"", "s1"}


def test_events_without_a_session_go_with_the_sessions_that_they_speak_of(archive: Engine, tmp_path: Path) -> None:
    make(archive, tmp_path / "one", Selection(["s1"]))
    unassigned = [each["chat_id"] for each in lines(tmp_path / "one", "events.jsonl") if not each["session_id"]]
    assert unassigned == ["c2"]
    make(archive, tmp_path / "other", Selection(["s2"]))
    assert all(each["session_id"] == "s2" for each in lines(tmp_path / "other", "events.jsonl"))
    assert [each["chat_id"] for each in lines(tmp_path / "other", "erasures.jsonl")] == ["c3"]
    ordered = [each["act_id"] for each in lines(tmp_path / "other", "erasures.jsonl")]
    assert [each["id"] for each in lines(tmp_path / "other", "acts.jsonl")] == ordered
    assert check(tmp_path / "other", is_keyed=True) == []


@on_one_version
@pytest.mark.parametrize("session_id", ["s1", "s2", "s3", "s4", "s9"])
def test_each_session_alone_checks(archive: Engine, tmp_path: Path, session_id: str) -> None:
    make(archive, tmp_path / "one", Selection([session_id]))
    assert check(tmp_path / "one", is_keyed=True) == []


@on_one_version
def test_unknown_selections_are_reported(archive: Engine, tmp_path: Path) -> None:
    with pytest.raises(UnknownSelectionError, match="session no, nor"):
        make(archive, tmp_path / "one", Selection(["s1", "no", "nor"]))
    with pytest.raises(UnknownSelectionError, match="hold 7 does not exist"):
        make(archive, tmp_path / "one", Selection(), hold_ids=[7])
    assert list(tmp_path.iterdir()) == []


@on_one_version
def test_an_export_is_recorded_before_and_after(archive: Engine, tmp_path: Path) -> None:
    criteria = Criteria(variable="customerTier", value="Premium")
    with transaction(archive) as connection:
        number = erasure.insert_hold(connection, criteria, "anna", "case 7")
    made = make(archive, tmp_path / "held", Selection(), hold_ids=[number])
    query = "SELECT id, actor, reason, kind, detail FROM archiver.acts WHERE kind ~ '^export' ORDER BY id"
    rows_found = rows(archive, query)
    assert [row[1:4] for row in rows_found] == [
        ("anna@desk", "case 7", "export"),
        ("anna@desk", "case 7", "export.done"),
    ]
    assert rows_found[0][4] == {"holds": [number], "formats": list(export.FORMATS)}
    assert (rows_found[1][4]["act"], rows_found[1][4]["manifest_sha256"]) == (rows_found[0][0], made.digest)
    assert rows_found[1][4]["events"] == made.manifest.counts.events
    assert "Premium" not in str(rows_found) + (tmp_path / "held" / "manifest.json").read_text()
    with pytest.raises(UnknownSelectionError):
        make(archive, tmp_path / "none", Selection(["none"]))
    kinds = [row[0] for row in rows(archive, "SELECT kind FROM archiver.acts WHERE kind ~ '^export' ORDER BY id")]
    assert kinds == ["export", "export.done", "export"]


@on_one_version
def test_nothing_is_written_where_something_is(archive: Engine, exported: Path, tmp_path: Path) -> None:
    before = sorted(each.name for each in exported.iterdir())
    with pytest.raises(FolderError, match="is not an empty folder"):
        make(archive, exported)
    with pytest.raises(FolderError, match="create it first"):
        make(archive, tmp_path / "no" / "where")
    assert sorted(each.name for each in exported.iterdir()) == before
    (tmp_path / "empty").mkdir()
    make(archive, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700
    assert all(each.stat().st_mode & 0o777 == 0o600 for each in (tmp_path / "empty").iterdir())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "whole"]


# Selection: as legal holds have it


IDS = [f"s{number}" for number in range(4)]
MOMENTS = [None, *(datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4))]


@on_one_version
def test_a_selection_is_what_a_hold_on_the_same_covers(engine: Engine) -> None:
    for number in range(12):
        day = 1 + number % 4
        record(
            engine,
            created(
                f"c{number}",
                [*IDS, None][number % 5],
                createdAt=f"2024-01-0{day}T00:00:00Z" if number % 3 else None,
                at=1_704_067_200_000 + 86_400_000 * (number % 5),
                assistantId=f"a{number % 2}",
                assistantOverrides={"variableValues": {"v": number % 3}},
            ),
        )
        record(engine, created(f"c{number}", session_id=None, at=1, status="again"), minute=1)
    execute(
        engine,
        "INSERT INTO archiver.sessions (session_id, first_event_at, last_event_at, assistant_id)"
        " VALUES ('bare', '2024-01-02', '2024-01-02', 'a1')",
    )
    sessions = [row[0] for row in rows(engine, "SELECT session_id FROM archiver.sessions WHERE session_id <> ''")]
    turns = [row[0] for row in rows(engine, "SELECT DISTINCT chat_id FROM archiver.chats")]
    whole = [Target(each) for each in [*sessions, "elsewhere"]]
    # Of what stands without a session, what is there.
    alone = [Target("", each) for each in turns]
    covered = 0

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.builds(
            Criteria,
            session_id=st.sampled_from([None, None, None, *IDS, "bare", "elsewhere"]),
            assistant_id=st.sampled_from([None, None, "a0", "a1"]),
            variable=st.sampled_from([None, None, "v"]),
            value=st.sampled_from(["0", "1"]),
            since=st.sampled_from(MOMENTS),
            until=st.sampled_from(MOMENTS),
        )
    )
    def compare(drawn: Criteria) -> None:
        nonlocal covered
        criteria = Criteria(
            drawn.session_id,
            drawn.assistant_id,
            drawn.variable,
            drawn.value if drawn.variable else None,
            drawn.since,
            drawn.until,
        )
        if criteria.is_empty:
            return
        selection = Selection(criteria=[criteria])
        with engine.connect() as connection:
            selection.prepare(connection)
            erasure.insert_hold(connection, criteria, "tester", "because")
            held = set(erasure.covering(connection, [*whole, *alone]))
            driver = connection.connection.driver_connection
            values = {Target(row[0]) for row in connection.exec_driver_sql(selection.sessions().as_string(driver))}
            unassigned = {
                Target("", row[0]) for row in connection.exec_driver_sql(selection.turns().as_string(driver))
            }
            connection.rollback()
        assert values == {each for each in held if each.session_id}
        assert unassigned == {each for each in held if not each.session_id}
        covered += len(held)

    compare()
    assert covered > 100


# What somebody does to it


def leaves_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves_of(each, (*path, key))
    else:
        yield path


def other(value: Any) -> Any:
    """Something else that may stand there as well."""
    if isinstance(value, str):
        if value[4:5] == "-" and value[10:11] == "T":
            return (datetime.fromisoformat(value) + timedelta(microseconds=1)).isoformat()
        is_hexadecimal = value and set(value) <= set("0123456789abcdef")
        return value[:-1] + ("0" if value[-1] != "0" else "1") if is_hexadecimal else value + "x"
    if isinstance(value, int | float):
        return value + 1 if not isinstance(value, bool) else not value
    return "x" if value is None else {"x": 1}


def mutated(record: Any, path: tuple[Any, ...]) -> Any:
    changed = json.loads(json.dumps(record))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other(inner[path[-1]])
    return changed


@on_one_version
def test_i9_every_changed_field_of_every_file_is_found(exported: Path, tmp_path: Path) -> None:
    tried = 0
    for name in sorted(each.name for each in exported.iterdir()):
        whole = (exported / name).read_bytes()
        if name.endswith(".jsonl"):
            content = whole.splitlines(keepends=True)
            places = range(min(len(content), 3))
        else:
            content, places = [whole], range(1)
        for place in places:
            if not name.endswith((".jsonl", ".json")):
                forged = [b"x" + content[place][1:]]
            else:
                record = json.loads(content[place])
                forged = [json.dumps(mutated(record, path)).encode() + b"\n" for path in leaves_of(record)]
            for line in forged:
                folder = copied(exported, tmp_path / "forged")
                rewrite(folder, name, [*content[:place], line, *content[place + 1 :]])
                result = check(folder)
                assert name in {item.file for item in result} or name == "manifest.sha256", (name, line[:200])
                assert result
                tried += 1
    assert tried > 150


# What a seal does not vouch for: counters, and in erased rows nothing else.
COUNTERS = {"last_received_at", "delivery_count", "earliest_at"}
SEALED = ("events.jsonl", "acts.jsonl", "erasures.jsonl")


@on_one_version
def test_i9_a_changed_row_is_named_even_under_a_new_manifest(exported: Path, tmp_path: Path) -> None:
    tried = 0
    for name in SEALED:
        content = (exported / name).read_bytes().split(b"\n")[:-1]
        through = {"events.jsonl": -2, "acts.jsonl": 2, "erasures.jsonl": None}[name]  # what is sealed
        for place, line in list(enumerate(content))[:through]:
            record = json.loads(line)
            for field in record.keys() - COUNTERS:
                forged = [*content[:place], compact(mutated(record, (field,))), *content[place + 1 :]]
                folder = copied(exported, tmp_path / "forged")
                rewrite(folder, name, [each + b"\n" for each in forged])
                reforge(folder)
                data = [item for item in check(folder, is_keyed=True) if item.file in {name, "seals.jsonl"}]
                assert any(item.line == place + 1 or str(record["id"]) in (item.what or "") for item in data), (
                    name,
                    place,
                    field,
                )
                tried += 1
    assert tried > 100


def compact(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


@on_one_version
def test_i9_rows_removed_doubled_put_in_and_swapped_are_named(exported: Path, tmp_path: Path) -> None:
    for name in SEALED:
        content = [each + b"\n" for each in (exported / name).read_bytes().split(b"\n")[:-1]]
        put_in = compact(json.loads(content[0]) | {"id": -5}) + b"\n"
        for forged, named in (
            (content[1:], json.loads(content[0])["id"]),
            ([content[0], *content], None),
            ([put_in, *content], -5),
            ([content[1], content[0], *content[2:]], None),
        ):
            folder = copied(exported, tmp_path / "forged")
            rewrite(folder, name, forged)
            reforge(folder)
            result = check(folder)
            assert result, name
            assert named is None or any(f" {named}, sealed by" in str(item) for item in result), (name, result)


@on_one_version
def test_i9_a_body_that_is_taken_out_like_an_erased_one_is_found(exported: Path, tmp_path: Path) -> None:
    content = (exported / "events.jsonl").read_bytes().split(b"\n")[:-1]
    record = json.loads(content[0])
    salted = sha256(bytes.fromhex(record["salt"] + record["dedupe_key"])).hexdigest()
    record |= {"body": None, "salt": None, "dedupe_key": salted}
    folder = copied(exported, tmp_path / "forged")
    rewrite(folder, "events.jsonl", [compact(record) + b"\n", *(each + b"\n" for each in content[1:])])
    reforge(folder, lambda told: told["counts"].update(erased=told["counts"]["erased"] + 1))
    assert [(item.fault, item.what) for item in check(folder)] == [("erased_without_record", "event 1")]


@on_one_version
def test_i9_a_salt_that_gave_bytes_to_the_body_is_found(exported: Path, tmp_path: Path) -> None:
    """Hashed one after the other, salt and body have no boundary but the salt's length."""
    content = (exported / "events.jsonl").read_bytes().split(b"\n")[:-1]
    record = json.loads(content[0])
    # Bytes that are text as well, as a body must be here.
    salt, given = record["salt"], bytes.fromhex(record["salt"])[12:]
    record |= {"salt": salt[:24], "dedupe_key": given.hex() + record["dedupe_key"]}
    record |= {"body": None, "body_base64": b64encode(given + record["body"].encode()).decode()}
    folder = copied(exported, tmp_path / "forged")
    rewrite(folder, "events.jsonl", [compact(record) + b"\n", *(each + b"\n" for each in content[1:])])
    reforge(folder)
    assert [(item.fault, item.what) for item in check(folder)] == [("body_changed", "event 1")]


@on_one_version
def test_i9_a_replaced_seal_is_out_of_the_chain(exported: Path, tmp_path: Path) -> None:
    content = (exported / "seals.jsonl").read_bytes().splitlines(keepends=True)
    record = json.loads(content[1])
    statement = re.sub(r"sealed_at \d{4}", "sealed_at 1999", record["statement"])
    record |= {"statement": statement, "hash": sha256(statement.encode()).hexdigest()}
    folder = copied(exported, tmp_path / "forged")
    rewrite(folder, "seals.jsonl", [content[0], compact(record) + b"\n", *content[2:]])
    reforge(folder)
    assert [(item.fault, item.what) for item in check(folder)] == [("out_of_chain", "seal 3")]
    assert [item.fault for item in check(folder, is_keyed=True)] == ["wrong_signature", "out_of_chain"]


@on_one_version
def test_i9_every_changed_field_of_a_seal_is_found_under_a_new_manifest(archive: Engine, tmp_path: Path) -> None:
    make(archive, tmp_path / "one", Selection(["s1", "s2"]))
    content = (tmp_path / "one" / "seals.jsonl").read_bytes().splitlines(keepends=True)
    assert len(content) == 3
    assert any(json.loads(line)["cover"] for line in content)
    for place, line in enumerate(content):
        record = json.loads(line)
        for path in leaves_of(record):
            forged = json.dumps(mutated(record, path)).encode() + b"\n"
            folder = copied(tmp_path / "one", tmp_path / "forged")
            rewrite(folder, "seals.jsonl", [*content[:place], forged, *content[place + 1 :]])
            reforge(folder)
            assert any(item.file == "seals.jsonl" for item in check(folder, is_keyed=True)), path
        folder = copied(tmp_path / "one", tmp_path / "forged")
        rewrite(folder, "seals.jsonl", content[:place] + content[place + 1 :])
        reforge(folder)
        assert check(folder)


@on_one_version
def test_i9_an_archive_that_was_forged_is_found_in_its_export(archive: Engine, tmp_path: Path) -> None:
    execute(archive, "UPDATE archiver.events SET type = 'forged' WHERE id = 2", unguarded=True)
    make(archive, tmp_path / "whole")
    assert [str(item) for item in check(tmp_path / "whole")] == [
        "events.jsonl, line 2, event 2, sealed by 1: it differs from its sealed state"
    ]


@on_one_version
def test_the_manifest_is_signed_and_an_unknown_key_is_found(archive: Engine, tmp_path: Path) -> None:
    make(archive, tmp_path / "signed", key=KEY)
    checked = export.Checked()
    assert check(tmp_path / "signed", is_keyed=True, checked=checked) == []
    assert checked.is_signed
    folder = copied(tmp_path / "signed", tmp_path / "forged")
    reforge(folder, lambda values: values.update(reason="another"))
    assert [item.fault for item in check(folder, is_keyed=True)] == ["manifest_signature"]
    (folder / "manifest.sig").unlink()
    assert [(item.file, item.fault) for item in check(folder)] == [("manifest.sig", "missing")]
    public = Ed25519PrivateKey.generate().public_key()
    unknown_keys = export.Keys({seals.key_id(public): public})
    values = {item.fault for item in export.check(tmp_path / "signed", keys=unknown_keys)}
    assert values == {"unknown_key"}


@on_one_version
def test_exported_seals_pin_what_is_in_it(archive: Engine, exported: Path) -> None:
    with snapshot(archive, statement_seconds=30) as connection:
        heads = {seal.id: seal.hash for seal, _ in seals.select_seals(connection)}
    assert check(exported, heads=heads) == []
    result = check(exported, heads=heads | {2: bytes(32)})
    assert [(item.fault, item.what) for item in result] == [("not_the_known_one", "seal 2")]


def stripped(folder: Path, to: Path) -> Path:
    """A copy of which nobody signed the manifest."""
    copied(folder, to)
    (to / "manifest.sig").unlink(missing_ok=True)
    return to


@on_one_version
def test_i9_what_outlives_the_signature_is_found(archive: Engine, tmp_path: Path) -> None:
    whole, forged = tmp_path / "whole", tmp_path / "forged"
    make(archive, whole, key=KEY)
    with snapshot(archive, statement_seconds=30) as connection:
        exported = [seal for seal, _ in seals.select_seals(connection)]
    known: dict[str, Any] = {"heads": {seal.id: seal.hash for seal in exported}, "through": exported[-1].through}
    assert check(whole, is_keyed=True, digest=None, **known) == []
    folder = stripped(whole, forged)
    reforge(folder, lambda result: result.update(signed_by=None))
    assert [str(item) for item in check(folder, is_keyed=True, digest=None, **known)] == [
        "manifest.json: it is not signed, although it must be"
    ]
    recorded = sha256((whole / "manifest.json").read_bytes()).hexdigest()
    assert [item.fault for item in check(folder, is_keyed=True, digest=recorded, **known)] == ["not_recorded"]
    # All seals but the first, or all, left out: what they held could be anything.
    for remaining in (1, 0):
        folder = stripped(whole, forged)
        content = (folder / "seals.jsonl").read_bytes().splitlines(keepends=True)[:remaining]
        rewrite(folder, "seals.jsonl", content)
        through = exported[0].through["events"] if remaining else 0
        held = [each["id"] for each in lines(folder, "events.jsonl") if each["id"] > through]

        def change(result: dict[str, Any], remaining: int = remaining, rest: int = len(held)) -> None:
            result.update(signed_by=None, head={"id": 1, "hash": exported[0].hash.hex()} if remaining else None)
            result["counts"]["unsealed"] = rest

        reforge(folder, change)
        assert check(folder) == []
        result = check(folder, **known)
        beyond = exported[-1].through["events"]
        expected = {f"event {each}" for each in held if each <= beyond}
        assert {item.what for item in result if item.file == "events.jsonl"} == expected
        assert {item.fault for item in result} == {"seal_left_out"} | ({"none_known"} if not remaining else set())


@on_one_version
def test_what_is_not_sealed_yet_is_counted_of_each_kind(archive: Engine, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "forged")
    last = {name: lines(folder, f"{name}.jsonl")[-1] for name in ("erasures", "acts")}
    for name, each in last.items():
        with (folder / f"{name}.jsonl").open("ab") as file:
            file.write(compact(each | {"id": 10**15}) + b"\n")
    reforge(folder)
    before, checked = export.Checked(), export.Checked()
    assert check(exported, checked=before) == check(folder, checked=checked) == []
    assert before.unsealed["events"] == checked.unsealed["events"] == 2
    for name in last:
        assert checked.unsealed[name] == before.unsealed[name] + 1


@on_one_version
def test_i9_a_line_with_a_key_twice_is_damaged(exported: Path, tmp_path: Path) -> None:
    for name in ("events", "erasures", "acts", "seals"):
        for number in range(len(lines(exported, f"{name}.jsonl"))):
            for put_in in (b'{"id":7,', b'{"id" :7,', b'{"\\u0069d":7,', b'{"body":"x", '):
                folder = copied(exported, tmp_path / "forged")
                content = (folder / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
                content[number] = content[number].replace(b"{", put_in, 1)
                rewrite(folder, f"{name}.jsonl", content)
                reforge(folder)
                assert Finding(f"{name}.jsonl", "damaged", number + 1) in check(folder)


def test_i9_keys_behind_the_body_are_seen() -> None:
    event = EventLine(1, "t", "s", "", None, NOW, NOW, 1, None, None, None, "", "", None, "x")
    plain = msgspec.json.encode(event).replace(b',"body_base64":null', b"") + b"\n"
    assert is_plain(plain, event)
    for other in (b',"body":"x"', b',"bod\\u0079":"x"', b' ,"body" :"x"', b',"body":"\\u0078"'):
        doubled = plain.replace(b',"body":"x"', b',"body":"y"' + other)
        assert msgspec.json.decode(doubled, type=EventLine) == event
        assert not is_plain(doubled, event)


@on_one_version
def test_the_manifest_names_only_keys_and_numbers_that_can_be(exported: Path, tmp_path: Path) -> None:
    def put_count(document: dict[str, Any]) -> None:
        document["counts"]["unsealed"] = 10**30

    for change in (
        lambda told: told.update(signed_by="\x1b[2Jx"),
        lambda told: told.update(signed_by="0" * 16 + "\n"),
        lambda told: told.update(act=10**30),
        put_count,
    ):
        folder = copied(exported, tmp_path / "forged")
        reforge(folder, change)
        assert [(item.file, item.fault) for item in check(folder)] == [("manifest.json", "damaged")]


@on_one_version
def test_more_places_than_entries_are_not_even_read(exported: Path, tmp_path: Path) -> None:
    for name, filler in (("places", b"[0,0]"), ("cover", b'""')):
        folder = copied(exported, tmp_path / "forged")
        content = (folder / "seals.jsonl").read_bytes().splitlines(keepends=True)
        start, _, rest = content[0].partition(b'"%s":[' % name.encode())
        content[0] = start + b'"%s":[' % name.encode() + b",".join([filler] * 500_000) + rest[rest.index(b"]") :]
        if name == "places":
            content[0] = start + b'"places":[' + b",".join([filler] * 500_000) + rest[rest.index(b'],"entries') :]
        rewrite(folder, "seals.jsonl", content)
        reforge(folder)
        tracemalloc.start()
        result = check(folder)
        _, limit = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert Finding("seals.jsonl", "damaged", 1) in result
        assert limit < 12 * len(content[0])


@on_one_version
def test_the_value_of_a_hold_is_in_no_statement(engine: Engine, tmp_path: Path) -> None:
    record(engine, created("c1", "s1", assistantOverrides={"variableValues": {"name": "Ann Whoever"}}))
    record(engine, created("c2", "s2"))
    with transaction(engine) as connection:
        erasure.insert_hold(connection, Criteria(variable="name", value="Ann Whoever"), "anna", "case")
    selection = Selection(criteria=[Criteria(variable="name", value="Ann Whoever")])
    assert "Ann" not in selection.where().as_string()
    make(engine, tmp_path / "held", Selection(), hold_ids=[1])
    assert {each["session_id"] for each in lines(tmp_path / "held", "events.jsonl")} == {"s1"}


def damage_links(folder: Path) -> None:
    (folder / "chats.jsonl").rename(folder.parent / "elsewhere")
    (folder / "chats.jsonl").symlink_to(folder.parent / "elsewhere")


def put(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def add(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + content)


def cut(name: str) -> Any:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def replace_by_folder(folder: Path) -> None:
    (folder / "acts.jsonl").unlink()
    (folder / "acts.jsonl").mkdir()


def replace_by_pipe(folder: Path) -> None:
    (folder / "events.jsonl").unlink()
    os.mkfifo(folder / "events.jsonl")


DAMAGES: list[tuple[Any, str, str]] = [
    (damage_links, "chats.jsonl", "not_a_file"),
    (replace_by_folder, "acts.jsonl", "not_a_file"),
    (replace_by_pipe, "events.jsonl", "not_a_file"),
    (put("more.txt", b""), "more.txt", "extra"),
    (put("manifest.json", b"{"), "manifest.json", "damaged"),
    (put("manifest.json", b"[" * 100_000), "manifest.json", "damaged"),
    (put("manifest.json", b"\xff"), "manifest.json", "damaged"),
    (add("events.jsonl", b"[" * 100_000 + b"\n"), "events.jsonl", "damaged"),
    (add("events.jsonl", b"\xff\xfe\x00\n"), "events.jsonl", "damaged"),
    (add("events.jsonl", b"\n" * 20_000), "events.jsonl", "damaged"),
    (add("seals.jsonl", b'{"id": 1}\n'), "seals.jsonl", "damaged"),
    (add("conversations.jsonl", b"null\n"), "conversations.jsonl", "damaged"),
    *((cut(f"{name}.jsonl"), f"{name}.jsonl", "damaged") for name in ("events", "acts", "erasures", "seals")),
    *((cut(name), name, "digest") for name in ("messages.jsonl", "chats.csv", "openai.jsonl")),
    *(
        ((lambda folder, gone=f"{name}.jsonl": (folder / gone).unlink()), f"{name}.jsonl", "missing")
        for name in ("conversations", "chats", "messages", "events", "acts", "erasures", "seals", "openai")
    ),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json", "missing"),
    (lambda folder: (folder / "manifest.sha256").unlink(), "manifest.sha256", "missing"),
]


@on_one_version
def test_every_damage_is_a_finding(exported: Path, tmp_path: Path) -> None:
    for damage, name, fault in DAMAGES:
        folder = copied(exported, tmp_path / "forged")
        damage(folder)
        result = check(folder)
        assert (name, fault) in {(item.file, item.fault) for item in result}, (name, fault)
        assert len(result) <= 10_001


@on_one_version
def test_a_manifest_leads_to_no_other_file(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "forged")
    data = json.loads((folder / "manifest.json").read_bytes())
    data["files"]["../whole/chats.jsonl"] = data["files"].pop("chats.jsonl")
    (folder / "manifest.json").write_text(json.dumps(data))
    assert {item.fault for item in check(folder)} == {"manifest_digest", "damaged"}


@on_one_version
def test_a_line_that_is_too_long_is_a_finding(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 100_000)
    result = check(exported)
    long = [item.line for item in result if item.fault == "too_long"]
    content = (exported / "events.jsonl").read_bytes().split(b"\n")
    assert long == [number for number, line in enumerate(content, 1) if len(line) >= 100_000]
    assert not {"digest", "size", "rows"} & {item.fault for item in result}


def test_quoted_line_ends_are_no_rows_of_csv(tmp_path: Path) -> None:
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerows([["a", "b"], ['x"\n"', "y"], ["", "\n\n"], ["=1", ","]])
    (tmp_path / "some.csv").write_text(written.getvalue(), newline="")
    assert reading.measured(tmp_path / "some.csv").rows == 3


@given(said=st.text())
def test_any_text_is_one_row_of_csv(tmp_path_factory: pytest.TempPathFactory, said: str) -> None:
    written = io.StringIO(newline="")
    csv.writer(written).writerows([["a"], [said], ["b" + said]])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(written.getvalue().encode("utf-8", "surrogatepass"))
    assert reading.measured(path).rows == 2


@on_one_version
def test_everything_of_an_empty_archive_is_nothing(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UnknownSelectionError):
        make(engine, tmp_path / "empty")
    assert list(tmp_path.iterdir()) == []


@on_one_version
def test_the_rest_of_a_session_that_was_erased_before_its_first_event_is_exported(
    engine: Engine, tmp_path: Path
) -> None:
    erase(engine, Target("s7"))
    made = make(engine, tmp_path / "left", Selection(["s7"]))
    assert (made.manifest.head, made.manifest.counts.events) == (None, 0)
    assert check(tmp_path / "left") == []


@on_one_version
def test_counts_include_unsealed_and_unexported_rows(archive: Engine, exported: Path) -> None:
    data = json.loads((exported / "manifest.json").read_bytes())["counts"]
    (counted,) = rows(
        archive,
        "SELECT count(*), count(*) FILTER (WHERE body IS NULL),"
        " count(*) FILTER (WHERE id > (SELECT max(events_through) FROM archiver.seals)),"
        " (SELECT count(*) FROM archiver.quarantine) FROM archiver.events",
    )
    assert (data["events"], data["erased"], data["unsealed"], data["quarantined"]) == counted
    assert counted[2] == 2
