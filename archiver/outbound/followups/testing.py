"""Send a test message to a receiver."""

import secrets
from datetime import UTC, datetime

from archiver.outbound.followups import guard, sending
from archiver.outbound.followups.payloads import encode
from archiver.outbound.followups.sending import Attempt
from archiver.outbound.followups.subscriptions import Subscription


async def send_test(subscription: Subscription, *, allow_private: bool) -> Attempt:
    """Send a `followups.test` message now, and return the result."""
    body = encode("followups.test", datetime.now(UTC), {"subscription": subscription.id})
    message_id = f"msg_{subscription.id}_test_{secrets.token_hex(8)}"
    try:
        where = guard.endpoint(subscription.url)
    except guard.AddressRefusedError:
        return Attempt.refused()
    async with sending.Transport(where, concurrency=1, allow_private=allow_private) as transport:
        return await transport.send(subscription, message_id, body)
