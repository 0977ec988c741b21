"""Create the deliveries of one subscription from the feed; slow sessions do not delay the others.

A slow change is skipped together with all later changes of its subject, so that their order is kept. The cursor of
the subscription stays before the first skipped change until its deliveries exist.
"""

from collections.abc import Mapping, Sequence
from time import monotonic

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from archiver.outbound.followups import subscriptions
from archiver.outbound.followups.deferred import STATEMENT_SECONDS, DeferredQueue, DeferredWork, Reason, slow
from archiver.outbound.followups.fanout import (
    PAGE,
    Page,
    advance,
    fan_out,
    fan_out_subject,
    search,
    select_subject,
)
from archiver.outbound.followups.subscriptions import Subscription

POLL_SECONDS = 0.5  # approximate time per transaction for reading the feed
SPLIT, SEARCH_SPLIT = 32, 8  # divisor of the number of changes per statement after a timeout


class Slow(msgspec.Struct, frozen=True):
    """A skipped subject: the cursor up to which its deliveries exist, and why it is slow."""

    through: int
    reason: Reason


class Position(msgspec.Struct, frozen=True):
    """The position in the feed. `base`: the cursor of the subscription.

    `ahead`: the cursor up to which all deliveries exist, except those of slow subjects.
    """

    base: int = 0
    ahead: int = 0
    slow: Mapping[str, Slow] = {}

    def of(self, cursor: int) -> "Position":
        """Return this position, or a new one if the cursor of the subscription was changed."""
        if self.slow and self.base <= cursor < self.ahead:
            return self
        return Position(cursor, cursor)


class Reader:
    """A reader of the feed for one subscription.

    A cycle calls `begin`, then in its transaction `start` and `read_page`, and `commit` afterwards.
    """

    def __init__(self, deferred: DeferredQueue) -> None:
        self._deferred = deferred
        self._page = PAGE
        self._narrow_until = 0  # up to this cursor, fewer changes are examined per statement
        self._back: dict[str, int] = {}  # subjects whose deliveries were created separately, up to this cursor
        self._returning: dict[str, int] = {}  # subjects that rejoin in this cycle
        self.position = Position()

    def begin(self) -> None:
        """Start or restart a cycle."""
        self._returning = dict(self._back)

    def commit(self, subscription: Subscription, position: Position) -> None:
        """Continue from this position in the next cycle, and defer slow subjects."""
        self.position = position
        for subject in self._returning:
            del self._back[subject]
        for subject, why in position.slow.items():
            if subject not in self._back:
                self._deferred.add(MakeRest(self, subscription, subject, why.through), why.reason)

    def read_page(
        self, connection: Connection, leased: Subscription, position: Position, room: int
    ) -> tuple[Page | None, Position]:
        """Examine the next page of the feed, as large as time allows; None if it took too long."""
        limit = min(self._page, room)
        try:
            with connection.begin_nested():
                page = self._make(connection, leased, position, limit)
        except DBAPIError as error:
            if (reason := slow(error)) is None:
                raise
            return None, self._narrow(connection, position, limit, reason)
        if page is None:
            self._narrow_search(connection, position, limit)
            return None, position
        if page.through >= self._narrow_until and leased.filter.contains is None:
            self._page = PAGE
        return page, msgspec.structs.replace(position, ahead=page.through)

    def _make(self, connection: Connection, leased: Subscription, position: Position, limit: int) -> Page | None:
        deferred, advances = tuple(position.slow), not position.slow
        if leased.filter.contains is None:
            return fan_out(connection, leased, position.ahead, limit, deferred=deferred, advances=advances)
        began = monotonic()
        page = search(
            connection,
            leased,
            position.ahead,
            limit,
            deferred=deferred,
            advances=advances,
            statement_seconds=STATEMENT_SECONDS,
        )
        if page is not None and monotonic() - began > POLL_SECONDS:
            self._page = max(1, self._page // 2)
        elif page is not None and monotonic() - began < POLL_SECONDS / 4:
            self._page = min(PAGE, self._page * 2)
        return page

    def _narrow(self, connection: Connection, position: Position, limit: int, reason: Reason) -> Position:
        """Examine fewer changes per statement from now on; if a single change is too slow, skip its subject."""
        limit = self._narrow_search(connection, position, limit, SPLIT)
        if limit > 1:
            self._narrow_until = position.ahead + limit
            return position
        result = select_subject(connection, position.ahead)
        if result is None:
            return position
        cursor, subject = result
        slow_ones = {**position.slow, subject: Slow(position.ahead, reason)}
        return msgspec.structs.replace(position, ahead=cursor, slow=slow_ones)

    def _narrow_search(
        self, connection: Connection, position: Position, limit: int, split: int = SEARCH_SPLIT
    ) -> int:
        held = subscriptions.select_newest_cursor(connection) - position.ahead  # the feed has no gaps
        limit = min(limit, held)
        self._page = max(1, limit // split)
        return limit

    def start(self, connection: Connection, leased: Subscription) -> Position:
        """Return the position to continue from. A subject whose deliveries exist rejoins, unless it is still slow."""
        position = self.position.of(leased.cursor)
        left = dict(position.slow)
        reason: Reason | None = None
        for subject, through in self._returning.items():
            if subject not in left:
                continue
            if reason is None:  # one slow subject is enough for a transaction
                reason = self._make_rest(connection, leased, subject, through, position.ahead)
            if reason is None:
                del left[subject]
            else:
                left[subject] = Slow(through, reason)
        if position.slow and not left:
            advance(connection, leased.id, position.ahead)
        return msgspec.structs.replace(position, slow=left)

    def _make_rest(
        self, connection: Connection, leased: Subscription, subject: str, through: int, ahead: int
    ) -> Reason | None:
        """Create the missing deliveries of this subject up to `ahead`; return the reason if that takes too long."""
        try:
            with connection.begin_nested():
                while (page := fan_out_subject(connection, leased, subject, after=through, until=ahead)).examined:
                    through = page.through
        except DBAPIError as error:
            if (reason := slow(error)) is None:
                raise
            return reason
        return None

    def rejoin(self, subject: str, through: int) -> None:
        """Record that the deliveries of this subject exist up to this cursor."""
        self._back[subject] = through


class MakeRest(DeferredWork):
    """The creation of the deliveries of one slow subject, from a cursor up to the position of the reader."""

    def __init__(self, reader: Reader, subscription: Subscription, subject: str, through: int) -> None:
        self.key = ("changes", (subject,))
        self._reader, self._subscription, self._subject, self._through = reader, subscription, subject, through
        self._until, self._size, self._is_new = 0, PAGE, True

    def run(self, connection: Connection) -> int:
        """Create some deliveries; return the cursor reached, or 0 if no change is left."""
        if not self._is_new:  # the last attempt failed
            self._size = 1
        self._is_new = False
        self._until = self._reader.position.ahead
        page = fan_out_subject(
            connection,
            self._subscription,
            self._subject,
            after=self._through,
            until=self._until,
            limit=self._size,
        )
        return page.through if page.examined else 0

    def succeeded(self, answer: int) -> bool:
        """Continue after the created deliveries; return whether all are created."""
        self._is_new = True
        if answer:
            self._through = answer
            return False
        self._reader.rejoin(self._subject, self._until)
        return True

    def divided(self) -> Sequence[DeferredWork]:
        """Return no parts: one subject is never divided."""
        return ()
