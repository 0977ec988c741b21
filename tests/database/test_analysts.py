"""Answers to analysts' questions: those of plain tables made from the ledger, and what they cost in buffers."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from archiver.database import roles
from tests.conftest import Cluster
from tests.support.analysts import QUESTIONS, asked, fill, make_plain_tables, measure, worked_queries

SESSIONS, RECENT = 240, 120


@pytest.fixture(scope="module")
def filled(cluster: Cluster) -> Iterator[str]:
    """An archive of some hundred sessions, with plain tables beside it."""
    url = cluster.clone()
    engine = cluster.engine(url)
    fill(engine, SESSIONS, RECENT, datetime.now(UTC))
    engine.dispose()
    with psycopg.connect(url) as connection:
        make_plain_tables(connection)
    yield url
    cluster.drop(url)


@pytest.fixture
def asking(filled: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(filled) as connection:
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


def test_every_worked_query_of_the_documentation_answers_a_reader(asking: psycopg.Connection[Any]) -> None:
    queries = worked_queries(asking)
    assert len(queries) == 20
    asking.execute(f"SET ROLE {roles.READER}")
    assert [heading for heading, query in queries.items() if not asking.execute(query).fetchall()] == []
