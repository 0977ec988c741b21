"""Follow-ups: deliver changes of the archive to receivers (I11).

Each subscription is a consumer of the change feed with a cursor of its own. The feed is the queue: it is written with
the archive, without gaps; `deliveries` holds only what is at hand of it.
"""

from archiver.outbound.followups.dispatcher import CONNECTIONS, Followups
from archiver.outbound.followups.subscriptions import select_consumed

__all__ = ["CONNECTIONS", "Followups", "select_consumed"]
