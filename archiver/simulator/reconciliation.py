"""Compare the archive with the platform after histories were read. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from archiver.simulator.upstream import Session

_SHOWN = 60  # characters of a content


class ArchivedMessage(NamedTuple):
    """One message of the archive."""

    chat_id: str | None
    role: str
    content: str
    source: str
    in_history: bool | None


def differences(sessions: Iterable[Session], archived: Mapping[str, Sequence[ArchivedMessage]]) -> list[str]:
    """Yield each difference as a sentence; none if every session equals the platform's, message by message."""
    lines: list[str] = []
    known = set()
    for session in sessions:
        known.add(session.id)
        lines += [f"session {session.id}: {line}" for line in _of_session(session, archived.get(session.id, ()))]
    return lines + [f"session {each}: the platform has none" for each in sorted(archived.keys() - known - {""})]


def _of_session(session: Session, lines: Sequence[ArchivedMessage]) -> Iterator[str]:
    expected = [(message["role"], message["content"]) for message in session.messages()]
    shown = [(line.role, line.content) for line in lines if line.in_history]
    if shown != expected:
        place = next((n for n, (one, other) in enumerate(zip(expected, shown, strict=False)) if one != other), None)
        if place is None:
            yield f"{len(shown)} messages, where the platform has {len(expected)}"
        else:
            yield f"message {place + 1} is {_cut(shown[place][1])}, not {_cut(expected[place][1])}"
    for line in lines:
        # A message that the platform no longer shows was deleted; the webhook says which turn it was.
        if not line.in_history and (line.chat_id is None or line.chat_id in session.chats):
            yield f"{_cut(line.content)} is not in the platform's history"


def figures(archived: Mapping[str, Sequence[ArchivedMessage]], backfill: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table, as (what, how many)."""
    coverage: Mapping[str, int] = backfill["coverage"]
    rate = backfill["sessions"] / backfill["seconds"] if backfill["seconds"] else 0.0
    return [
        ("histories read", f"{backfill['sessions']:,}"),
        ("messages that webhooks had lost, recovered", f"{backfill['recovered_messages']:,}"),
        ("messages archived", f"{sum(map(len, archived.values())):,}"),
        *((f"sessions now {state}", f"{count:,}") for state, count in sorted(coverage.items())),
        ("histories per second", f"{rate:,.0f}"),
    ]


def _cut(content: str) -> str:
    return repr(content if len(content) <= _SHOWN else content[:_SHOWN] + "…")
