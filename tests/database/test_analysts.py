"""Answers to analysts' questions: those of plain tables made from the ledger, and what they cost in buffers."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from archiver.database import roles
from tests.support.analysts import QUESTIONS, asked, fill, make_plain_tables, measure

SESSIONS, RECENT = 240, 120


@pytest.fixture
def asking(engine: Engine, database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to an archive of some hundred sessions, with plain tables beside it."""
    fill(engine, SESSIONS, RECENT, datetime.now(UTC))
    with psycopg.connect(database_url) as connection:
        make_plain_tables(connection)
        yield connection


def test_every_answer_is_that_of_plain_tables_made_from_the_ledger(asking: psycopg.Connection[Any]) -> None:
    queries = {each.name: (asked(asking, each), asked(asking, each, "plain")) for each in QUESTIONS if each.is_plain}
    asking.execute(f"SET ROLE {roles.READER}")
    for name, (query, plain) in queries.items():
        answer = asking.execute(query).fetchall()
        assert answer == asking.execute(plain).fetchall(), name
        assert answer, name


def test_every_question_may_be_asked_by_a_reader_and_keeps_its_budget(asking: psycopg.Connection[Any]) -> None:
    queries = [(each, asked(asking, each)) for each in QUESTIONS]
    asking.execute(f"SET ROLE {roles.READER}")
    costs = {each.name: (measure(asking, query).buffers, each.budget) for each, query in queries}
    assert {name: cost for name, cost in costs.items() if cost[1] is not None and cost[0] > cost[1]} == {}
