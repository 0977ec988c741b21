"""Select one subscription with its newest deliveries, or one delivery with its request and its attempts."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping

from archiver.compliance import seals
from archiver.outbound.followups import payloads, review
from archiver.outbound.followups.deliveries import Due, State, message_id

DELIVERIES = 100  # on the page of a subscription
MAX_REQUEST = 200_000  # characters of a request


class SubscriptionPage(msgspec.Struct, frozen=True):
    """A subscription and its newest deliveries, each with its latest attempt."""

    row: Mapping[str, Any]
    deliveries: Sequence[RowMapping]


class DeliveryPage(msgspec.Struct, frozen=True):
    """A delivery: the request that a retry would send now, and its attempts, oldest first."""

    row: Mapping[str, Any]
    request: str
    attempts: Sequence[Mapping[str, Any]]


def select_subscription(connection: Connection, subscription_id: int, state: State | None) -> SubscriptionPage | None:
    """Return a subscription with its newest deliveries in this state, or in any; None if it does not exist."""
    found = review.select_subscriptions(connection, subscription_id)
    if not found:
        return None
    rows = review.select_deliveries(connection, subscription_id=subscription_id, state=state, limit=DELIVERIES)
    return SubscriptionPage(found[0], rows)


def select_delivery(connection: Connection, subscription_id: int, cursor: int) -> DeliveryPage | None:
    """Return a delivery; None if it does not exist."""
    found = review.select_delivery(connection, subscription_id, cursor)
    if found is None:
        return None
    due = Due(**{name: found[name] for name in Due.__struct_fields__})
    body = payloads.select_bodies(connection, [due], seals.select_seal)[cursor]
    attempts = review.select_attempts(connection, subscription_id, cursor)
    return DeliveryPage({**found, "message_id": due.message_id}, body.decode()[:MAX_REQUEST], attempts)


def delivery_id(row: Mapping[str, Any]) -> str:
    """Return the `webhook-id` of a delivery."""
    at: datetime = row["changed_at"]
    return message_id(row["subscription_id"], row["cursor"], at)
