"""Turns, histories and transcripts in short notation."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from archiver.archive.transcript import (
    HistoryMessages,
    TranscriptLine,
    TurnMessages,
)
from archiver.events import Message

START = datetime(2024, 1, 15, tzinfo=UTC)


ROLES = {"u": "user", "a": "assistant", "t": "tool", "s": "system", "b": "bot"}


def minute(number: float) -> datetime:
    return START + timedelta(minutes=number)


def said(*texts: str) -> tuple[Message, ...]:
    """Messages from texts like `u hello`."""
    return tuple(Message(ROLES[text[0]], text[2:]) for text in texts)


def turn(
    chat_id: str,
    *texts: str,
    at: float = 0,
    told: float | None = None,
    inputs: int | None = None,
    is_deleted: bool = False,
) -> TurnMessages:
    """A turn whose input is what the user says at its beginning."""
    messages = said(*texts)
    if inputs is None:
        inputs = next((index for index, message in enumerate(messages) if message.role != "user"), len(messages))
    return TurnMessages(chat_id, messages, inputs, minute(at), minute(at if told is None else told), is_deleted)


def reading(*texts: str, at: float = 100) -> HistoryMessages:
    return HistoryMessages(said(*texts), minute(at))


def texts(lines: Iterable[TranscriptLine | Message]) -> list[tuple[str, str]]:
    return [(line.role, line.content) for line in lines]
