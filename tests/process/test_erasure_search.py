"""Erasures and holds search the decoded text of a body; history of an erased turn is also erased (I8)."""

import gzip
import html
import json
import unicodedata
from random import Random
from typing import Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import Engine

from archiver.compliance import erasure
from archiver.compliance.erasure import Target
from archiver.compliance.erasure.quarantine_matches import select_matches, select_unsearchable
from archiver.compliance.erasure.targets import of_variable
from archiver.database import transaction
from tests.support import servers
from tests.support.encodings import of_every_character
from tests.support.erasures import (
    ACT,
    erase,
    hold,
    holds_text,
    is_rebuilt_the_same,
    quarantined,
    read,
    record,
    sweep,
    texts,
)
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.rows import rows

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

SESSION, CHAT, CUSTOMER = "s/1+ж7", "c&1/é7", "Zoë O'Hara <z@x.de>"
MENTIONS = {"about": SESSION, "chat": CHAT, "customer": CUSTOMER}
PLAIN = json.dumps(MENTIONS, ensure_ascii=False)
BODIES = [
    json.dumps(MENTIONS).replace("/", "\\/").encode(),
    PLAIN.replace("+", "\\u002B").replace("&", "\\u0026").replace("<", "\\u003C").replace("'", "\\u0027").encode(),
    b"[" + b", ".join(of_every_character(each).encode() for each in ("customer", *MENTIONS.values())) + b"]",
    json.dumps([json.dumps({"x": json.dumps(MENTIONS)})]).encode(),
    json.dumps(MENTIONS).encode()[:-1],
    urlencode({"payload": PLAIN}).encode(),
    PLAIN.encode("utf-16"),
    PLAIN.encode("utf-16-be"),
    PLAIN.encode("utf-32-le"),
    gzip.compress(json.dumps(MENTIONS).encode()),
    html.escape(PLAIN).encode(),
    unicodedata.normalize("NFD", PLAIN).encode(),
]
OTHERS = [
    json.dumps({"about": SESSION + "2", "chat": CHAT + "2", "customer": "Zoë"}).encode(),
    gzip.compress(b'{"about": "s"}'),
]


def store_mentions(engine: Engine) -> None:
    """A session, and the quarantine with bodies that are about it, and others."""
    variables = {"variableValues": {"customer": CUSTOMER}}
    record(engine, created(CHAT, SESSION, assistantOverrides=variables), created("c9", "s9"))
    outcomes = record(engine, *BODIES, *OTHERS)
    assert {each.status for each in outcomes} == {"quarantined"}


@pytest.mark.parametrize("target", [Target(SESSION), Target(SESSION, CHAT)])
def test_i8_an_erasure_finds_what_is_about_it_however_it_was_encoded(engine: Engine, target: Target) -> None:
    store_mentions(engine)
    erase(engine, target)
    assert quarantined(engine) == sorted(OTHERS)


def test_i8_so_does_one_by_variable(engine: Engine) -> None:
    store_mentions(engine)
    with transaction(engine) as connection:
        targets = sorted(of_variable(connection, "customer", CUSTOMER))
        result = select_matches(connection, [], [("customer", CUSTOMER)])
    assert len(result.by_variable) == len(BODIES)
    erasure.order(engine, targets, "request", ACT, matches=result)
    sweep(engine)
    assert quarantined(engine) == sorted(OTHERS)


@pytest.mark.parametrize("criteria", [{"session_id": SESSION}, {"variable": "customer", "value": CUSTOMER}])
def test_i8_a_hold_keeps_what_is_about_it_however_it_was_encoded(engine: Engine, criteria: dict[str, Any]) -> None:
    store_mentions(engine)
    marked = [b'{"s9": ' + body + b" broken" for body in BODIES[:4]]
    marked += [json.dumps({"s9": body.decode()}).encode() for body in BODIES[:6]]
    marked.append(b"s9 " + gzip.compress(json.dumps(MENTIONS).encode()))  # which cannot be searched
    record(engine, *marked, b'{"s9" broken')
    hold(engine, **criteria)
    erase(engine, Target("s9"))
    assert quarantined(engine) == sorted([*BODIES, *OTHERS, *marked])


def test_i8_an_unknown_event_that_names_an_erased_turn_by_escapes_goes_with_it(engine: Engine) -> None:
    record(engine, created("c-1", "s1"))
    for number, name in enumerate(("c-1", "c-12")):
        inner = json.dumps({"of": f"marker {number}", "id": json.loads(of_every_character(name))})
        record(engine, json.dumps({"type": "chat.rated", "sessionId": "s1", "rating": inner}).encode())
    erase(engine, Target("s1", "c-1"))
    assert holds_text(engine, "marker 0", "marker 1") == ["marker 1"]


@on_one_version
def test_i8_what_cannot_be_searched_is_counted_reported_and_listed(database_url: str, engine: Engine) -> None:
    record(
        engine,
        created("c1", "s1"),
        b'{"s1" broken',
        b"\xff\xfe\xfd" + Random(7).randbytes(300),
        b"\x1f\x8b\x08cut off",
    )
    unsearchable = rows(engine, "SELECT id FROM archiver.quarantine WHERE get_byte(body, 0) <> 123 ORDER BY id")
    with transaction(engine) as connection:
        assert [(each,) for each in select_unsearchable(connection)] == unsearchable
    done = archiver("erase", "--session", "s1", "--reason", "x", "--yes", "--json", database_url=database_url)
    assert done.returncode == 0, done.stderr
    assert "2 quarantined bodies cannot be decoded" in done.stderr
    assert "archiver quarantine list --unsearchable" in done.stderr
    assert {"quarantined": 1, "unsearchable": 2}.items() <= json.loads(done.stdout).items()
    listed = archiver("quarantine", "list", "--unsearchable", "--json", database_url=database_url)
    assert [(each["id"],) for each in json.loads(listed.stdout)] == unsearchable
    # While anything is held nothing goes of which it is not known what it is about.
    record(engine, created("c2", "s2"), b'"s2" \xff')
    hold(engine, session_id="s8")
    erase(engine, Target("s2"))
    assert len(quarantined(engine)) == len(unsearchable) + 1


NUMBER = "Bitte buchen Sie es von meiner Karte 4111 1111 1111 1234 ab, danke"


def test_i8_history_that_cut_an_erased_turn_within_a_number_keeps_none_of_it(engine: Engine) -> None:
    record(engine, created("c1", "s1", input=NUMBER, output="answer one"))
    read(engine, "s1", 5, ("user", NUMBER[:50]), ("assistant", "ok"))
    erase(engine, Target("s1", "c1"))
    assert holds_text(engine, "4111 11") == []  # four digits alone may be in a digest
    assert is_rebuilt_the_same(engine)


QUESTION = 'Größe "XL" & Farbe: 5 € — bitte\nbis zum Frühling liefern an café & co, danke'
WORDINGS = {
    "line ends": QUESTION.replace("\n", "\r\n") + "\r\n",
    "decomposed": unicodedata.normalize("NFD", QUESTION),
    "entities": html.escape(QUESTION),
    "named entities": QUESTION.replace("ö", "&ouml;").replace("&", "&amp;", 1).replace("é", "&#233;"),
    "no-break spaces": QUESTION.replace(" ", "\u00a0"),
    "trimmed": "  " + QUESTION + "\n\n",
    "cut off": QUESTION[:60] + "...",
    "masked": QUESTION.replace("5", "***"),
}


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("is_webhook_plain", [True, False])
def test_i8_history_that_words_an_erased_turn_otherwise_keeps_none_of_it(
    engine: Engine, wording: str, is_webhook_plain: bool
) -> None:
    words = WORDINGS[wording]
    by_webhook, by_history = (
        (QUESTION, words) if is_webhook_plain or wording in ("cut off", "masked") else (words, QUESTION)
    )
    record(engine, created("c1", "s1", input=by_webhook, output="answer one"), created("c2", "s1"))
    lines = [
        ("user", by_history),
        ("assistant", "answer one"),
        ("user", "question of c2"),
        ("assistant", "answer to c2"),
    ]
    read(engine, "s1", 5, *lines)
    erase(engine, Target("s1", "c1"))
    assert texts(engine, "s1") == ["question of c2", "answer to c2"]
    (body,) = rows(engine, "SELECT body FROM archiver.events WHERE source = 'history' AND body IS NOT NULL")
    assert [each["content"] for each in json.loads(bytes(body[0]))["session"]["messages"]] == texts(engine, "s1")
    assert is_rebuilt_the_same(engine)
