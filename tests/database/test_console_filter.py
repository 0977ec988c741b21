"""The filter of conversations: words, promoted variables, suggestions."""

from collections.abc import Sequence

import pytest
from sqlalchemy import Engine

from archiver.console.conversations import select_conversations
from archiver.console.filters import FilterError, term
from archiver.console.listing import Page, Query
from archiver.database import schema, transaction
from archiver.settings import variables
from archiver.settings.variables import Variable
from tests.support.erasures import hold, record
from tests.support.feeds import publish
from tests.support.payloads import created
from tests.support.searching import index

ON_ONE_VERSION = True
PROMOTED = variables.parse("customerTier,seats:number,isNew:boolean,since:time")


def conversation(engine: Engine, session_id: str, answer: str = "fine", **values: object) -> None:
    record(
        engine, created(f"{session_id}-1", session_id, output=answer, assistantOverrides={"variableValues": values})
    )


def found(
    engine: Engine, q: str, promoted: Sequence[Variable] = (), *, may_read: bool = True, suggests: bool = False
) -> Page:
    publish(engine)
    with transaction(engine) as connection:
        return select_conversations(connection, Query({"q": q}, may_read, suggests=suggests), promoted)


def ids(page: Page) -> list[str]:
    return sorted(row["session_id"] for row in page.rows)


def test_words_are_found_in_every_message_with_a_snippet(engine: Engine) -> None:
    conversation(engine, "a", "You get a full refund tomorrow.")
    conversation(engine, "b", "You get nothing.")
    publish(engine)
    index(engine, "simple")
    page = found(engine, "refund")
    assert ids(page) == ["a"]
    assert "**refund**" in page.rows[0]["match"]
    assert ids(found(engine, '"full refund" coverage:open')) == ["a"]
    assert ids(found(engine, '"refund full"')) == []
    assert ids(found(engine, "refund nothing")) == []
    assert ids(found(engine, "refund coverage:lost")) == []


def test_without_search_words_are_found_in_first_questions(engine: Engine) -> None:
    conversation(engine, "a")
    page = found(engine, "question")
    assert ids(page) == ["a"]
    assert "Search is off" in page.note


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        ("customerTier:Premium", ["a"]),
        ("customer_tier:Premium", ["a"]),
        ('customerTier:"two words"', ["b"]),
        ("seats>2", ["b"]),
        ("seats<=2", ["a"]),
        ("isNew:yes", ["a"]),
        ("since>=2024-01-01", ["b"]),
        ("customerTier:Premium seats>2", []),
    ],
)
def test_promoted_variables_are_qualifiers(q: str, expected: list[str], engine: Engine) -> None:
    schema.upgrade(engine, variables=PROMOTED)
    conversation(engine, "a", customerTier="Premium", seats=2, isNew=True, since="2023-05-01")
    conversation(engine, "b", customerTier="two words", seats="3", since="2024-05-01")
    page = found(engine, q, PROMOTED)
    assert ids(page) == expected
    assert all("customer_tier" in row for row in page.rows)


def test_content_is_not_found_out_by_roles_that_do_not_see_it(engine: Engine) -> None:
    schema.upgrade(engine, variables=PROMOTED)
    for q in ("word", "customerTier:Premium"):
        with pytest.raises(FilterError, match="Your role shows no content"):
            found(engine, q, PROMOTED, may_read=False)


def test_a_variable_without_a_column_is_no_qualifier(engine: Engine) -> None:
    conversation(engine, "a", customerTier="Premium")
    assert found(engine, "", PROMOTED).rows[0]["customer_tier"] is None
    with pytest.raises(FilterError, match="There is no qualifier 'customerTier'"):
        found(engine, "customerTier:Premium", PROMOTED)


def test_terms_are_suggested_and_values_only_to_those_who_see_them(engine: Engine) -> None:
    schema.upgrade(engine, variables=PROMOTED)
    conversation(engine, "a", customerTier='gold "24"')
    seen = found(engine, "", PROMOTED, suggests=True).suggestions
    assert {"coverage:repaired", "assistant:assistant-1", 'customer_tier:"gold "'} <= {*seen}
    unseen = found(engine, "", PROMOTED, suggests=True, may_read=False).suggestions
    assert "assistant:assistant-1" in unseen
    assert not [each for each in unseen if "gold" in each]


@pytest.mark.parametrize(("value", "expected"), [("a", "f:a"), ("a b", 'f:"a b"'), ('a"b', 'f:"a"'), ("", 'f:""')])
def test_a_suggested_term_is_one_term(value: str, expected: str) -> None:
    assert term("f", value) == expected


def test_holds_of_every_kind_are_found(engine: Engine) -> None:
    for session_id, assistant, tier in (("a", "as_1", "Free"), ("b", "as_2", "Premium"), ("c", "as_2", "Free")):
        variables_of = {"variableValues": {"tier": tier}}
        body = created(f"{session_id}-1", session_id, assistantId=assistant, assistantOverrides=variables_of)
        record(engine, body)
    assert (ids(found(engine, "held:yes")), ids(found(engine, "held:no"))) == ([], ["a", "b", "c"])
    hold(engine, session_id="a")
    hold(engine, variable="tier", value="Premium")
    assert (ids(found(engine, "held:yes")), ids(found(engine, "held:no"))) == (["a", "b"], ["c"])
    assert ids(found(engine, "held:yes assistant:as_2")) == ["b"]
    with pytest.raises(FilterError):
        found(engine, "held:maybe")
    with pytest.raises(FilterError, match="shows no content"):  # a hold may be by the value of a variable
        found(engine, "held:yes", may_read=False)


def test_a_page_about_holds_examines_fewer_and_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archiver.console.conversations.EXAMINED_FOR_HOLDS", 2)
    for number in range(3):
        record(engine, created(f"chat-{number}", f"s{number}"), minute=number)
    hold(engine, session_id="s0")
    first = found(engine, "held:yes")
    assert (ids(first), "about the 2 conversations" in first.note) == ([], True)
    with transaction(engine) as connection:
        query = Query({"q": "held:yes"}, may_read=True, after=first.after)
        assert ids(select_conversations(connection, query)) == ["s0"]
