"""Deliver changes of the archive to receivers (I11).

Each subscription consumes the change feed with its own cursor. The feed is the queue: it is written with the archive
and has no gaps. The table `deliveries` contains only the current part of it.
"""

from archiver.outbound.followups.dispatcher import CONNECTIONS, Followups
from archiver.outbound.followups.subscriptions import select_consumed

__all__ = ["CONNECTIONS", "Followups", "select_consumed"]
