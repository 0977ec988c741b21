"""Pause a duty that follows the feed while events arrive at full rate, so that receiving stays fast."""

KEEPING_UP = 0.5  # share of the time that a duty may take to keep up with the feed
YIELDING = 0.1  # share of the time that it may take while keeping up would need more than that


class Pace:
    """The pace of a duty, from the rate of new changes and the time that it needs to process one.

    While the duty would need more than half of the time to keep up, it falls behind on purpose, and catches up when
    fewer events arrive: receiving needs the same processors, and the senders of events wait for it.
    """

    def __init__(self) -> None:
        self._newest: int | None = None
        self._seen_at = 0.0

    def pause(self, newest: int, processed: int, seconds: float, now: float) -> float:
        """Return the seconds to pause after a page of `processed` changes that took `seconds`.

        `newest`: the newest cursor of the feed at `now`, in seconds on a monotonic clock.
        """
        before, since = self._newest, now - self._seen_at
        self._newest, self._seen_at = newest, now
        if before is None or since <= 0 or not processed:
            return 0.0
        arriving = (newest - before) / since
        share = arriving * seconds / processed
        return seconds * (1 / YIELDING - 1) if share > KEEPING_UP else 0.0
