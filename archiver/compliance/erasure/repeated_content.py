"""Find other turns whose deliveries repeat content of an erased turn.

Their bodies stay as received. They are reported so that an operator can erase them too.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from sqlalchemy import Connection, text

from archiver import events
from archiver.archive.transcript.context import messages_of_turn
from archiver.compliance.erasure.decoding import decode
from archiver.compliance.erasure.targets import Target
from archiver.events import Event, Message
from archiver.events.normal import normal_text

# Characters: text of at least this length is searched for anywhere in a delivery. Shorter text, such as "yes", recurs
# by chance and counts only as a whole message of the conversation that a turn resends.
_LONG = 16

_SELECT = text(
    """
    WITH chats AS MATERIALIZED (SELECT c.chat_id FROM archiver.chats c WHERE c.session_id = :session_id)
    SELECT e.session_id, e.chat_id, e.body FROM archiver.events e
     WHERE e.session_id = :session_id AND e.source = 'webhook' AND e.body IS NOT NULL
    UNION ALL
    SELECT e.session_id, e.chat_id, e.body FROM archiver.events e
     WHERE e.session_id = '' AND e.source = 'webhook' AND e.body IS NOT NULL
       AND e.chat_id IN (SELECT chat_id FROM chats)
    """
)


def select_repeating_turns(connection: Connection, targets: Iterable[Target]) -> list[Target]:
    """Return turns outside the targets whose deliveries repeat content of a target, within each session.

    `chat_id` is empty for events of unknown types without a chat id. Targets that are whole sessions have no such
    turn.
    """
    erased: dict[str, set[str]] = defaultdict(set)
    for each in targets:
        erased[each.session_id].add(each.chat_id)
    result: set[Target] = set()
    for session_id, chat_ids in erased.items():
        if session_id and "" not in chat_ids:
            result |= _of_session(connection, session_id, chat_ids)
    return sorted(result)


def _of_session(connection: Connection, session_id: str, chat_ids: Collection[str]) -> set[Target]:
    bodies = [(row.chat_id or "", bytes(row.body)) for row in connection.execute(_SELECT, {"session_id": session_id})]
    own_texts = {
        form
        for chat_id, body in bodies
        if chat_id in chat_ids
        for message in _question_and_answer(events.parse(body))
        if (form := normal_text(message.content))
    }
    if not own_texts:
        return set()
    return {
        Target(session_id, chat_id)
        for chat_id, body in bodies
        if chat_id not in chat_ids and _repeats(body, own_texts)
    }


def _question_and_answer(event: object) -> Sequence[Message]:
    if not isinstance(event, Event) or event.chat is None:
        return ()
    own_texts, answered = messages_of_turn(event.chat.input, event.chat.output)
    return (*own_texts, *answered)


def _repeats(body: bytes, own_texts: Collection[str]) -> bool:
    if any(normal_text(message.content) in own_texts for message in _before(events.parse(body))):
        return True
    long = [each for each in own_texts if len(each) >= _LONG]
    return bool(long) and any(each in form for form in _forms(body) for each in long)


def _before(event: object) -> Iterator[Message]:
    """Yield the messages of a delivery that precede its own question and answer."""
    if isinstance(event, Event) and event.chat is not None:
        yield from event.chat.input[:-1]
        yield from event.chat.output[:-1]


def _forms(body: bytes) -> Iterator[str]:
    return (normal_text(each) for each in decode(body).texts)
