"""Sessions and chats of the simulated platform, determined by the seed."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from archiver.errors import ArchiverError
from archiver.simulator import conversations
from archiver.simulator.faults import Faults, has_greeting
from archiver.simulator.seeds import identifier, seeded

MAX_SESSIONS = 100_000
MAX_CHATS = 1_000  # of one session
_THINKING = timedelta(milliseconds=250)  # from a chat's creation to its output, whose time is now
_TICK = timedelta(milliseconds=1)

Message = dict[str, str]

_GREETING: Message = {"role": "assistant", "content": "Hello, this is the front desk. How can I help you?"}


class UnknownError(ArchiverError):
    """There is no such session or chat."""


class FullError(ArchiverError):
    """The maximum number of sessions, or of chats in a session, is reached."""


class Session:
    """One conversation as the platform stores it."""

    def __init__(self, session_id: str, name: str, assistant_id: str, greeting: list[Message], now: datetime) -> None:
        self.id = session_id
        self.name = name
        self.assistant_id = assistant_id
        self.greeting = greeting  # before all chats, and part of none
        self.created_at = self.updated_at = self.last_chat_at = now
        self.variables: dict[str, Any] = {}
        self.chats: dict[str, dict[str, Any]] = {}
        self.turns = 0  # including deleted ones

    def messages(self) -> list[Message]:
        """Return the messages in order; deleted ones only if the platform keeps them."""
        messages = [
            message for chat in self.chats.values() for message in [*input_messages(chat["input"]), *chat["output"]]
        ]
        return [*self.greeting, *messages]

    def described(self, *, with_creation: bool = True) -> dict[str, Any]:
        """Return the session as the API returns it."""
        session_json = {
            "id": self.id,
            "name": self.name,
            "assistantId": self.assistant_id,
            "status": "active",
            "messages": self.messages(),
            "createdAt": iso(self.created_at),
            "updatedAt": iso(self.updated_at),
        }
        if not with_creation:
            del session_json["createdAt"]
        return session_json


class Upstream:
    """All sessions of the platform. Ids depend on the seed, not on the order of concurrent calls."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._seed = faults.seed
        self._sessions: dict[str, Session] = {}
        self._session_of: dict[str, str] = {}
        self._names: Counter[tuple[str, str]] = Counter()
        self._single: dict[str, dict[str, Any]] = {}  # chats without a session
        self._singles = 0  # including deleted ones

    def create_session(self, name: str, assistant_id: str) -> Session:
        """Create a session and return it. Raises `FullError`."""
        if len(self._sessions) >= MAX_SESSIONS:
            raise FullError(f"The simulator stores at most {MAX_SESSIONS} sessions")
        self._names[name, assistant_id] += 1
        session_id = identifier(self._seed, "session", name, assistant_id, self._names[name, assistant_id])
        greeting = [_GREETING] if has_greeting(self._faults, assistant_id) else []
        session = Session(session_id, name, assistant_id, greeting, datetime.now(UTC))
        self._sessions[session_id] = session
        return session

    def sessions(self) -> list[Session]:
        """Return all sessions."""
        return [*self._sessions.values()]

    def session(self, session_id: str) -> Session:
        """Return the session. Raises `UnknownError`."""
        try:
            return self._sessions[session_id]
        except KeyError:
            raise UnknownError(f"Session {session_id} not found") from None

    def create_chat(
        self, session_id: str, given: str | list[Message], overrides: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Create a turn, the input with its reply, and return it. Raises `UnknownError` and `FullError`."""
        session = self.session(session_id)
        if session.turns >= MAX_CHATS:
            raise FullError(f"A session of the simulator contains at most {MAX_CHATS} chats")
        chat = self._answer(session, given, overrides)
        self._session_of[chat["id"]] = session_id
        return chat

    def create_single_chat(
        self, assistant_id: str | None, given: str | list[Message], overrides: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Create a chat without a session, which no history contains, and return it. Raises `FullError`."""
        if len(self._single) >= MAX_SESSIONS:
            raise FullError(f"The simulator stores at most {MAX_SESSIONS} chats without a session")
        self._singles += 1
        alone = Session(
            identifier(self._seed, "single", self._singles), "", assistant_id or "", [], datetime.now(UTC)
        )
        chat = self._answer(alone, given, overrides)
        del chat["sessionId"]
        if assistant_id is None:
            del chat["assistantId"]
        self._single[chat["id"]] = chat
        return chat

    def _answer(
        self, session: Session, given: str | list[Message], overrides: dict[str, Any] | None
    ) -> dict[str, Any]:
        session_id = session.id
        session.turns += 1
        session.variables |= (overrides or {}).get("variableValues") or {}
        random = seeded(self._seed, "reply", session_id, session.turns)
        text = "\n".join(message["content"] for message in input_messages(given))
        replies = conversations.reply(text, session.messages(), session.variables, random)
        now = datetime.now(UTC)
        created_at = max(now - _THINKING, session.last_chat_at + _TICK)
        updated_at = max(now, created_at + _TICK)
        chat: dict[str, Any] = {
            "id": identifier(self._seed, "chat", session_id, session.turns),
            "externalChatId": identifier(self._seed, "external", session_id, session.turns),
            "sessionId": session_id,
            "input": given,
            "output": _numbered(replies, session.turns),
            "assistantId": session.assistant_id,
            "status": "active",
            "cost": round(0.002 + len(text) * 0.00001, 6),
            "createdAt": iso(created_at),
            "updatedAt": iso(updated_at),
        }
        if overrides is not None:
            chat["assistantOverrides"] = overrides
        session.chats[chat["id"]] = chat
        session.last_chat_at, session.updated_at = created_at, updated_at
        return chat

    def delete_chat(self, chat_id: str) -> dict[str, Any]:
        """Delete one turn and return it; the history drops it too, unless it keeps deleted turns.

        Raises `UnknownError`.
        """
        if chat_id in self._single:
            return self._single.pop(chat_id)
        session_id = self._session_of.pop(chat_id, None)
        if session_id is None:
            raise UnknownError(f"Chat {chat_id} not found")
        chats = self._sessions[session_id].chats
        return chats[chat_id] if self._faults.keep_deleted else chats.pop(chat_id)


def _numbered(replies: list[Message], turn: int) -> list[Message]:
    """Return the replies, numbered so that each differs from all others of the session."""
    return [
        {**reply, "content": f"{reply['content']} ({turn}.{place})"} for place, reply in enumerate(replies, start=1)
    ]


def input_messages(given: str | list[Message]) -> list[Message]:
    """Return the user's messages of one turn, given as text or as a list."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def iso(moment: datetime) -> str:
    """Return the time in ISO 8601, in UTC, to the millisecond, with `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
