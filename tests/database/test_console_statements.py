"""The statements of each page of the console: few, and as many in a larger archive (I12)."""

from collections.abc import Mapping

from sqlalchemy import Engine

from tests.support.console_pages import PAGES, Subject, statements_of, surround
from tests.support.erasures import read, record, said
from tests.support.feeds import publish
from tests.support.payloads import created
from tests.support.searching import index

ON_ONE_VERSION = True
MOST = 16  # statements of a page


def fill(engine: Engine, conversations: range, turns: int) -> None:
    for number in conversations:
        chats = [f"chat-{number}-{turn}" for turn in range(turns)]
        bodies = [created(chat, f"session-{number}", output=f"refund of {chat}") for chat in chats]
        record(engine, *bodies, minute=number)
        read(engine, f"session-{number}", number + 1, *said(*chats, f"lost-{number}"))
    publish(engine)
    index(engine, "simple")


def counted(engine: Engine, subject: Subject) -> Mapping[str, int]:
    return {name: len(statements_of(engine, page, subject)) for name, page in PAGES.items()}


def test_i12_the_statements_of_a_page_do_not_grow_with_the_archive(engine: Engine) -> None:
    fill(engine, range(3), 2)
    few = counted(engine, surround(engine))
    assert min(few.values()) > 0
    assert max(few.values()) <= MOST, few
    fill(engine, range(3, 60), 5)
    many = counted(engine, surround(engine))
    assert not {name: number for name, number in many.items() if number > few[name]}
