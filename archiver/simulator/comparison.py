"""Compare the archive with the deliveries, and with histories, message by message, without I/O.

`expected` determines independently what the deliveries add up to, and shares no code with the archiver.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from archiver.simulator.faults import CREATED, DELETED
from archiver.simulator.upstream import Session

_SHOWN = 60  # characters of a message


class TranscriptMessage(NamedTuple):
    """One message of a transcript."""

    chat_id: str
    role: str
    content: str
    is_deleted: bool


class ChatRow(NamedTuple):
    """One turn, without its messages."""

    session_id: str
    chat_id: str
    is_deleted: bool
    cost: Decimal | None
    variables: Mapping[str, Any] | None


class ConversationRow(NamedTuple):
    """The figures of one session."""

    session_id: str
    chats: int
    messages: int
    user_messages: int
    assistant_messages: int
    cost: Decimal | None
    deleted_chats: int


@dataclass
class Archive:
    """The transcripts that the views show or should show, by session, each in order."""

    messages: dict[str, list[TranscriptMessage]] = field(default_factory=dict)
    chats: list[ChatRow] = field(default_factory=list)
    conversations: list[ConversationRow] = field(default_factory=list)


def expected(deliveries: Iterable[tuple[str, Mapping[str, Any]]]) -> Archive:
    """Return the archive that the accepted deliveries, in any order, add up to."""
    created: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    deleted: dict[str, Mapping[str, Any]] = {}
    for kind, chat in deliveries:
        if kind == CREATED:
            created[chat["id"]].append(chat)
        elif kind == DELETED:
            deleted.setdefault(chat["id"], chat)
            if "sessionId" in chat:
                deleted[chat["id"]] = chat
    turns = {chat_id: _newest(revisions) for chat_id, revisions in created.items()}
    for chat_id, chat in deleted.items():
        turns.setdefault(chat_id, {"sessionId": "", "createdAt": "", "input": [], **chat})
    archive = Archive()
    for chat in sorted(turns.values(), key=lambda chat: str(chat["createdAt"])):
        _add(archive, chat, chat["id"] in deleted)
    archive.conversations = [*_conversations(archive)]
    return archive


def _newest(revisions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the newest revision, with the newest non-empty output. ISO times in one format sort as strings."""
    ordered = sorted(revisions, key=lambda chat: str(chat["updatedAt"]))
    outputs = [chat["output"] for chat in ordered if chat.get("output")]
    return {**ordered[-1], "output": outputs[-1] if outputs else []}


def _add(archive: Archive, chat: Mapping[str, Any], is_deleted: bool) -> None:
    given = chat["input"]
    inputs = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [
        TranscriptMessage(chat["id"], message["role"], message["content"], is_deleted)
        for message in [*inputs, *chat.get("output", [])]
    ]
    if messages:
        archive.messages.setdefault(chat["sessionId"], []).extend(messages)
    cost = Decimal(str(chat["cost"])) if "cost" in chat else None
    variables = chat.get("assistantOverrides", {}).get("variableValues")
    archive.chats.append(ChatRow(chat["sessionId"], chat["id"], is_deleted, cost, variables))


def _conversations(archive: Archive) -> Iterator[ConversationRow]:
    for session_id in {chat.session_id for chat in archive.chats} - {""}:
        chats = [chat for chat in archive.chats if chat.session_id == session_id]
        roles = Counter(message.role for message in archive.messages.get(session_id, []))
        costs = [chat.cost for chat in chats if chat.cost is not None]
        yield ConversationRow(
            session_id,
            len(chats),
            roles.total(),
            roles["user"],
            roles["assistant"],
            sum(costs, Decimal(0)) if costs else None,
            sum(chat.is_deleted for chat in chats),
        )


def differences(expected: Archive, found: Archive) -> list[str]:
    """Return each difference as a sentence; empty if the archive equals the deliveries."""
    lines = []
    for session_id in sorted(expected.messages.keys() | found.messages.keys()):
        lines_of_session = _transcripts(expected.messages.get(session_id, []), found.messages.get(session_id, []))
        lines += [f"session {session_id}: {line}" for line in lines_of_session]
    lines += _rows("chat", expected.chats, found.chats)
    lines += _rows("conversation", expected.conversations, found.conversations)
    return lines


def _transcripts(expected: Sequence[TranscriptMessage], found: Sequence[TranscriptMessage]) -> Iterator[str]:
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    for message in [*missing.elements()]:
        other = next((each for each in extra if each.chat_id == message.chat_id and each.role == message.role), None)
        if other is None:
            yield f"{_shown(message)} is missing"
            continue
        extra -= Counter([other])
        if other.content != message.content:
            yield f"{_shown(message)} reads {_cut(other.content)}"
        if other.is_deleted != message.is_deleted:
            yield f"{_shown(message)} is {'' if other.is_deleted else 'not '}marked as deleted"
    for message in extra.elements():
        yield f"{_shown(message)} was never delivered"
    if Counter(expected) == Counter(found):
        for position, (right, wrong) in enumerate(zip(expected, found, strict=True), start=1):
            if right != wrong:
                yield f"order: {_shown(wrong)} is at position {position}, where {_shown(right)} belongs"
                return


def _rows(name: str, expected: Sequence[NamedTuple], found: Sequence[NamedTuple]) -> Iterator[str]:
    """Yield the differences between rows, matched by their ids, which are the string fields."""
    right, wrong = _by_id(expected), _by_id(found)
    for key in sorted(right.keys() | wrong.keys()):
        label = f"{name} {' '.join(key)}"
        if len(wrong.get(key, [])) > 1:
            yield f"{label}: {len(wrong[key])} rows"
        elif key not in wrong:
            yield f"{label} is missing"
        elif key not in right:
            yield f"{label} was never delivered"
        else:
            yield from _fields(label, right[key][0], wrong[key][0])


def _by_id(rows: Sequence[NamedTuple]) -> dict[tuple[str, ...], list[NamedTuple]]:
    result: defaultdict[tuple[str, ...], list[NamedTuple]] = defaultdict(list)
    for row in rows:
        result[tuple(value for value in row if isinstance(value, str))].append(row)
    return dict(result)


def _fields(label: str, right: NamedTuple, wrong: NamedTuple) -> Iterator[str]:
    for name, value, other in zip(right._fields, right, wrong, strict=True):
        if value != other:
            yield f"{label}: {name} is {other}, not {value}"


class ArchivedMessage(NamedTuple):
    """One message of the archive."""

    chat_id: str | None
    role: str
    content: str
    source: str
    in_history: bool | None


def history_differences(sessions: Iterable[Session], archived: Mapping[str, Sequence[ArchivedMessage]]) -> list[str]:
    """Return each difference as a sentence; empty if every session equals the platform's, message by message."""
    lines: list[str] = []
    known = set()
    for session in sessions:
        known.add(session.id)
        lines += [f"session {session.id}: {line}" for line in _of_session(session, archived.get(session.id, ()))]
    return lines + [f"session {each}: it is not on the platform" for each in sorted(archived.keys() - known - {""})]


def _of_session(session: Session, lines: Sequence[ArchivedMessage]) -> Iterator[str]:
    expected = [(message["role"], message["content"]) for message in session.messages()]
    shown = [(line.role, line.content) for line in lines if line.in_history]
    if shown != expected:
        place = next((n for n, (one, other) in enumerate(zip(expected, shown, strict=False)) if one != other), None)
        if place is None:
            yield f"{len(shown)} messages, but the platform has {len(expected)}"
        else:
            yield f"message {place + 1} is {_cut(shown[place][1])}, not {_cut(expected[place][1])}"
    for line in lines:
        # A message that the platform no longer shows was deleted; the webhook says which turn it was.
        if not line.in_history and (line.chat_id is None or line.chat_id in session.chats):
            yield f"{_cut(line.content)} is not in the platform's history"


def _shown(message: TranscriptMessage) -> str:
    return f"chat {message.chat_id}, {message.role} {_cut(message.content)}"


def _cut(content: str) -> str:
    return repr(content if len(content) <= _SHOWN else content[:_SHOWN] + "…")
