"""Derive a turn from all its facts, independent of their order (I5). Pure."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

import msgspec

from archiver import events
from archiver.archive.transcript.context import as_sent, messages_of_turn
from archiver.events import Event, Message

T = TypeVar("T")

_NEVER = datetime.min.replace(tzinfo=UTC)


class Fact(msgspec.Struct, frozen=True, gc=False):
    """A fact about a chat, from one ledger row.

    `is_repeat`: only its times may have changed; its content is read from the ledger, not from this
    delivery, whose envelope may differ from the one that was stored.
    """

    event: Event
    source: str
    received_at: datetime
    occurred_at: datetime | None
    is_repeat: bool = False

    @property
    def revised_at(self) -> datetime:
        """Return the time that orders revisions: the upstream time if credible, otherwise the arrival.

        An upstream time that is too far after the arrival is ignored.
        """
        chat = self.event.chat
        updated, created = (chat.updated_at, chat.created_at) if chat else (None, None)
        if updated is None and self.occurred_at is None:
            return self.credible(created) or self.received_at
        return self.credible(updated) or self.credible(self.occurred_at) or self.received_at

    @property
    def order(self) -> tuple[datetime, datetime, datetime, bytes]:
        """Return the sort key of revisions, oldest first; arrival decides only without upstream times."""
        occurred_at = self.credible(self.occurred_at) or _NEVER
        return self.revised_at, occurred_at, self.received_at, self.event.dedupe_key

    @property
    def known_at(self) -> datetime:
        """Return the time at which the fact was true, on the clock of the readings; no later than its arrival."""
        return min(self.revised_at, self.received_at)

    def credible(self, moment: datetime | None) -> datetime | None:
        """Return the reported time; None if it is too far after the arrival of this fact."""
        return events.credible(moment, self.received_at)


class Turn(msgspec.Struct, frozen=True, gc=False):
    """The archived state of one chat."""

    assistant_id: str | None
    external_id: str | None
    status: str | None
    cost: Decimal | None
    variables: Mapping[str, Any] | None
    created_at: datetime | None
    updated_at: datetime | None
    answered_at: datetime | None  # when the first revision with an answer was made
    session_name: str | None
    session_status: str | None
    occurred_at: datetime | None
    first_received_at: datetime
    deleted_at: datetime | None
    vanished_at: datetime | None  # since when readings may omit it: its deletion, no later than its arrival
    source: str
    messages: tuple[Message, ...]
    inputs: int  # the number of input messages, which come first
    revised_at: datetime  # when the newest fact with content was true, no later than its arrival
    sent: tuple[Message, ...]  # the input including its repeats, as `context.as_sent` returns it

    @property
    def began_at(self) -> datetime:
        """Return the creation time, else the earliest envelope time, else the arrival time."""
        return self.created_at or self.occurred_at or self.first_received_at

    @property
    def has_content(self) -> bool:
        """Return whether any message of the turn has content."""
        return any(message.content.strip() for message in self.messages)


def fold(facts: Sequence[Fact]) -> Turn:
    """Return the turn that these facts, in any order, describe; at least one is required.

    The newest value of each field wins; an empty output never replaces a filled one; one deletion is enough.
    """
    if len(facts) == 1:
        return _turn_of(facts[0])
    ordered = sorted(facts, key=lambda fact: fact.order)
    with_chat = [(fact, fact.event.chat) for fact in ordered if fact.event.chat is not None]
    revisions = [chat for _, chat in with_chat]
    deletions = [fact for fact in ordered if fact.event.type == events.DELETED]
    outputs = [chat.output for chat in revisions]
    input_messages = _newest(chat.input or None for chat in revisions) or ()
    output_messages = _newest(output if _is_filled(output) else None for output in outputs) or _last(outputs)
    sent = as_sent(input_messages)
    input_messages, output_messages = messages_of_turn(input_messages, output_messages)
    created_at = _earliest(fact.credible(chat.created_at) for fact, chat in with_chat)
    return Turn(
        assistant_id=_newest(chat.assistant_id for chat in revisions),
        external_id=_newest(chat.external_id for chat in revisions),
        status=_newest(chat.status for chat in revisions),
        cost=_newest(chat.cost for chat in revisions),
        variables=_newest(chat.variables for chat in revisions),
        created_at=created_at,
        session_name=_newest(chat.session_name for chat in revisions),
        session_status=_newest(chat.session_status for chat in revisions),
        updated_at=_latest(fact.credible(chat.updated_at) for fact, chat in with_chat),
        answered_at=_earliest(fact.credible(chat.updated_at) for fact, chat in with_chat if _is_filled(chat.output)),
        occurred_at=_earliest(fact.credible(fact.occurred_at) for fact in ordered),
        first_received_at=min(fact.received_at for fact in ordered),
        deleted_at=_earliest(_deleted_at(fact) for fact in deletions),
        vanished_at=_earliest(_vanished_at(fact, created_at) for fact in deletions),
        source=ordered[0].source,
        messages=input_messages + output_messages,
        inputs=len(input_messages),
        revised_at=max((fact.known_at for fact in ordered if _has_content(fact)), default=ordered[0].known_at),
        sent=sent,
    )


def _turn_of(fact: Fact) -> Turn:
    """Return the turn that a single fact describes, the usual case, at a fraction of the cost of `fold`."""
    chat = fact.event.chat or events.EMPTY_CHAT
    is_deletion = fact.event.type == events.DELETED
    input_messages, output_messages = messages_of_turn(chat.input, chat.output)
    created_at, updated_at = fact.credible(chat.created_at), fact.credible(chat.updated_at)
    return Turn(
        assistant_id=chat.assistant_id,
        external_id=chat.external_id,
        status=chat.status,
        cost=chat.cost,
        variables=chat.variables,
        created_at=created_at,
        updated_at=updated_at,
        answered_at=updated_at if _is_filled(chat.output) else None,
        session_name=chat.session_name,
        session_status=chat.session_status,
        occurred_at=fact.credible(fact.occurred_at),
        first_received_at=fact.received_at,
        deleted_at=_deleted_at(fact) if is_deletion else None,
        vanished_at=_vanished_at(fact, created_at) if is_deletion else None,
        source=fact.source,
        messages=input_messages + output_messages,
        inputs=len(input_messages),
        revised_at=fact.known_at,
        sent=as_sent(chat.input),
    )


def _deleted_at(fact: Fact) -> datetime:
    return fact.credible(fact.occurred_at) or fact.revised_at


def _vanished_at(fact: Fact, created_at: datetime | None) -> datetime:
    """Return the time of a deletion, no later than its arrival, which replaces a time before the turn's creation."""
    deleted_at = _deleted_at(fact)
    is_possible = created_at is None or deleted_at >= created_at
    return min(deleted_at, fact.received_at) if is_possible else fact.received_at


def _has_content(fact: Fact) -> bool:
    chat = fact.event.chat
    return chat is not None and bool(chat.input or chat.output)


def _newest(values: Iterable[T | None]) -> T | None:
    return next(reversed([value for value in values if value is not None]), None)


def _earliest(values: Iterable[datetime | None]) -> datetime | None:
    return min((value for value in values if value is not None), default=None)


def _latest(values: Iterable[datetime | None]) -> datetime | None:
    return max((value for value in values if value is not None), default=None)


def _is_filled(output: tuple[Message, ...]) -> bool:
    return any(message.content.strip() for message in output)


def _last(outputs: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    return next((output for output in reversed(outputs) if output), ())
