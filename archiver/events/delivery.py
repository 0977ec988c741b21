"""A delivery: its content, time of arrival and source. One struct from the wire to the ledger."""

import hashlib
from datetime import datetime
from typing import Generic, TypeGuard, TypeVar

import msgspec

from archiver.events.shapes import Event, Malformed

WEBHOOK = "webhook"  # source of deliveries that upstream sends

Content = Event | Malformed
ContentT_co = TypeVar("ContentT_co", bound=Content, covariant=True)
Identity = tuple[str | None, str | None, bytes | None]  # type, session_id, dedupe_key


class Delivery(msgspec.Struct, Generic[ContentT_co], frozen=True, gc=False):
    """An authenticated delivery with arrival time, key id, source and number of deliveries.

    The ledger accepts a `Delivery[Event]`; a `Delivery[Malformed]` is quarantined.
    """

    content: ContentT_co
    received_at: datetime
    key_id: str | None
    source: str = WEBHOOK
    count: int = 1

    @property
    def internal(self) -> Identity:
        """Return the identity of an internal fact, such as a history response; all None for a webhook."""
        content = self.content
        if self.source == WEBHOOK or isinstance(content, Malformed):
            return None, None, None
        return content.type, content.session_id, content.dedupe_key

    @property
    def subject(self) -> str:
        """Return the key of deliveries that must not be stored concurrently: their session or unassigned turn."""
        event = self.content
        if isinstance(event, Malformed):
            return f"\0{hashlib.sha256(event.body).hexdigest()}"
        return event.session_id or f"\0{event.chat_id or event.dedupe_key.hex()}"


def has_event(delivery: Delivery[Content]) -> TypeGuard[Delivery[Event]]:
    """Return whether the body of the delivery could be parsed."""
    return isinstance(delivery.content, Event)
