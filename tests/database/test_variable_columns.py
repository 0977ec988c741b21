"""Variables as typed columns of `analytics.sessions`: values, changes of the setting, and what is reported."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from archiver.database import catalogue, roles, schema, tables, transaction, variable_columns
from archiver.database.variable_columns import VariableColumnError
from archiver.settings.variables import RESERVED, Variable, parse
from tests.support.feeds import publish
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.rows import execute, rows
from tests.support.versions import on_one_version


def columns(engine: Engine) -> list[str]:
    query = "SELECT column_name FROM information_schema.columns WHERE table_schema = 'analytics'"
    order = "AND table_name = 'sessions' ORDER BY ordinal_position"
    own = {column.name for column in tables.summaries.c}
    return [name for (name,) in rows(engine, f"{query} {order}") if name not in own]


def migrate(engine: Engine, setting: str) -> None:
    schema.upgrade(engine, variables=parse(setting))


def differences(engine: Engine, setting: str) -> list[str]:
    with transaction(engine) as connection:
        return [each.detail for each in catalogue.select_differences(connection, parse(setting))]


def test_the_columns_of_the_view_are_reserved() -> None:
    assert {column.name for column in tables.summaries.c} <= RESERVED


def test_variables_become_columns_and_find_their_sessions(engine: Engine) -> None:
    migrate(engine, "customerTier,seats:number,isTrial:boolean,since:time")
    record(
        engine,
        variables("a", customerTier="Premium", seats=3, isTrial=True, since="2024-02-29T10:00:00+02:00"),
        variables("b", customerTier=["x"], seats="2.5e1", isTrial="FALSE", since="2024-02-29"),
        variables("c", seats="many", isTrial=1, since="2023-02-29"),
    )
    publish(engine)
    query = "SELECT session_id, customer_tier, seats, is_trial, since FROM analytics.sessions ORDER BY 1"
    assert rows(engine, query) == [
        ("s-a", "Premium", Decimal(3), True, datetime(2024, 2, 29, 8, tzinfo=UTC)),
        ("s-b", '["x"]', Decimal(25), False, datetime(2024, 2, 29, tzinfo=UTC)),
        ("s-c", None, None, None, None),
    ]


def variables(name: str, **values: Any) -> bytes:
    return created(name, f"s-{name}", assistantOverrides={"variableValues": values})


_numbers = st.from_regex(r" ?[+-]?[0-9.]{0,4}(e[+-]?[0-9]{0,4})? ?", fullmatch=True)
_moments = st.from_regex(
    r"[0-9]{4}-[0-3][0-9]-[0-3][0-9]([T ][0-2][0-9]:[0-6][0-9](:[0-6][0-9](\.[0-9]{0,7})?)?)? ?"
    r"(Z|[+-][0-2][0-9]:?([0-6][0-9])?)?",
    fullmatch=True,
)
_values = st.one_of(
    _numbers, _moments, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.lists(st.text())
)


@on_one_version
def test_no_value_makes_the_view_fail(engine: Engine) -> None:
    select = ", ".join(variable_columns.expression(each) for each in parse("v:number,w:boolean,x:time"))
    query = f"SELECT {select}, variables FROM jsonb_array_elements($1::jsonb) AS t (variables)"

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(_values, max_size=20))
    def check(values: list[Any]) -> None:
        documents = json.dumps([{"v": each, "w": each, "x": each} for each in values]).replace("\\u0000", "")
        with transaction(engine) as connection:
            found = connection.exec_driver_sql(query, (documents,)).all()
        for number, is_true, _, sent in found:
            value = sent["v"]
            if isinstance(value, bool):
                assert is_true is value
            elif isinstance(value, int):
                assert number == value
            elif str(value).lower() not in ("true", "false"):
                assert is_true is None

    check()


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2024-01-15T09:30:00Z", datetime(2024, 1, 15, 9, 30, tzinfo=UTC)),
        ("2024-01-15 09:30", datetime(2024, 1, 15, 9, 30, tzinfo=UTC)),
        ("2024-01-15T09:30:00.25-0130", datetime(2024, 1, 15, 11, 0, 0, 250_000, tzinfo=UTC)),
        ("2000-02-29", datetime(2000, 2, 29, tzinfo=UTC)),
        ("1900-02-29", None),
        ("2024-04-31", None),
        ("2024-01-15T24:00:00Z", None),
        ("0000-01-01", None),
        ("yesterday", None),
        (1_705_311_000, None),
    ],
)
def test_a_time_is_one_of_the_calendar_and_in_utc_without_a_zone(
    engine: Engine, value: Any, moment: datetime | None
) -> None:
    select = variable_columns.expression(Variable("x", "x", "time"))
    with transaction(engine) as connection:
        connection.exec_driver_sql("SET LOCAL TimeZone = 'Asia/Tokyo'")
        found = connection.exec_driver_sql(
            f"SELECT {select} FROM (SELECT $1::jsonb AS variables) t", (json.dumps({"x": value}),)
        ).scalar()
    assert found == moment


# Changes of the setting


def test_columns_are_added_at_the_end_and_the_view_stays_for_those_who_use_it(engine: Engine) -> None:
    migrate(engine, "b")
    execute(engine, "CREATE VIEW public.mine AS SELECT session_id, b FROM analytics.sessions")
    migrate(engine, "a:number,b,c")
    assert columns(engine) == ["b", "a", "c"]
    assert differences(engine, "a:number,b,c") == []
    migrate(engine, "c,b,a:number")
    assert columns(engine) == ["b", "a", "c"]
    schema.upgrade(engine)  # without the setting, as tests and earlier callers do
    assert columns(engine) == ["b", "a", "c"]


def test_a_removed_column_goes_with_its_grants_kept(engine: Engine) -> None:
    execute(engine, "DROP ROLE IF EXISTS analyst", "CREATE ROLE analyst")
    migrate(engine, "a,order,c")
    execute(engine, "GRANT SELECT ON analytics.sessions TO analyst")
    comments = "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute"
    of_view = "WHERE attrelid = 'analytics.sessions'::regclass AND attnum > 0 ORDER BY attnum"
    before = rows(engine, f"{comments} {of_view}")
    migrate(engine, "order:number,c")
    assert columns(engine) == ["order", "c"]
    assert differences(engine, "order:number,c") == []
    after = dict(rows(engine, f"{comments} {of_view}"))
    assert {name: comment for name, comment in before if name in after} | {
        "order": "Variable order as number; null if it has no such value."
    } == after
    assert rows(engine, "SELECT has_table_privilege('analyst', 'analytics.sessions', 'SELECT')") == [(True,)]
    migrate(engine, "")
    assert columns(engine) == []
    with transaction(engine) as connection:
        assert roles.are_granted(connection)
    execute(engine, "DROP OWNED BY analyst", "DROP ROLE analyst")


def test_a_column_that_another_view_uses_is_not_removed(engine: Engine) -> None:
    migrate(engine, "a,b")
    execute(engine, "CREATE VIEW public.mine AS SELECT session_id, b FROM analytics.sessions")
    with pytest.raises(VariableColumnError, match=r"view public\.mine depends on view analytics\.sessions"):
        migrate(engine, "a")
    assert columns(engine) == ["a", "b"]


def test_a_column_may_come_from_another_name(engine: Engine) -> None:
    record(engine, variables("a", customerTier="camel", customer_tier="snake"))
    publish(engine)
    for name, value in (("customerTier", "camel"), ("customer_tier", "snake")):
        migrate(engine, name)
        assert rows(engine, "SELECT customer_tier FROM analytics.sessions") == [(value,)]
        assert differences(engine, name) == []


def test_columns_that_the_setting_does_not_name_are_reported(engine: Engine) -> None:
    migrate(engine, "a,b:number")
    assert differences(engine, "a,b:number") == []
    assert differences(engine, "b,c") == [
        "The columns of analytics.sessions differ from ARCHIVER_ANALYTICS_VARIABLES: missing b, c; surplus a."
    ]
    query = variable_columns.definition(parse("a,b:number")).replace(
        "(variables ->> 'a')", "upper(variables ->> 'a')"
    )
    execute(engine, f"CREATE OR REPLACE VIEW analytics.sessions AS {query}")
    (found,) = differences(engine, "a,b:number")
    assert "has a different definition" in found
    with transaction(engine) as connection:
        assert len(catalogue.repair(connection, parse("a,b:number"))) == 1
    assert differences(engine, "a,b:number") == []


@pytest.mark.parametrize("query", ["SELECT session_id, variables ->> 'a' AS a FROM archiver.summaries", None])
def test_a_repair_recreates_the_view_with_its_columns_comments_and_grants(engine: Engine, query: str | None) -> None:
    migrate(engine, "a,b:number")
    comment = "SELECT obj_description('analytics.sessions'::regclass)"
    before = rows(engine, comment)
    execute(
        engine, "DROP VIEW analytics.sessions", *([f"CREATE VIEW analytics.sessions AS {query}"] if query else [])
    )
    with transaction(engine) as connection:
        catalogue.repair(connection, parse("a,b:number"))
    assert differences(engine, "a,b:number") == []
    assert columns(engine) == ["a", "b"]
    silent = "SELECT attname FROM pg_attribute WHERE attrelid = 'analytics.sessions'::regclass AND attnum > 0"
    assert rows(engine, f"{silent} AND col_description(attrelid, attnum) IS NULL") == []
    assert rows(engine, comment) == before
