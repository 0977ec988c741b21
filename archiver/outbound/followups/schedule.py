"""Retry schedule and circuit breaker of deliveries. Pure."""

import random
from collections.abc import Callable
from datetime import timedelta

ATTEMPTS = 14  # after which a delivery is dead
MAX_RETRY_AFTER = 86_400.0  # seconds that a receiver may request
OPEN_AFTER_FAILURES = 5  # consecutive failures, after which one delivery at a time probes the receiver
PAUSE_AFTER = timedelta(days=7)  # without a success; then the subscription is paused

# Maximum wait in seconds after the attempt with that number; on average half of it, a day in total.
_BACKOFF = (10, 30, 90, 270, 810, 2_430, 7_290, 21_870, *[28_800] * 5)
_INITIAL_PROBE_PAUSE, _MAX_PROBE_PAUSE = 5.0, 900.0

Choose = Callable[[float, float], float]


def backoff(number: int, retry_after: float | None = None, choose: Choose = random.uniform) -> float:
    """Return the seconds from the failed attempt of this number (1, 2, 3 …) to the next.

    Full jitter, so that deliveries that failed together are not retried together; never sooner than `retry_after`.
    """
    limit = _BACKOFF[min(number, len(_BACKOFF)) - 1]
    return max(choose(1.0, limit), retry_after or 0.0)


def probe_after(failures: int, choose: Choose = random.uniform) -> float:
    """Return the seconds for which the circuit stays open after this many consecutive failures; 0 while closed."""
    if failures < OPEN_AFTER_FAILURES:
        return 0.0
    limit = min(_INITIAL_PROBE_PAUSE * 2 ** min(failures - OPEN_AFTER_FAILURES, 20), _MAX_PROBE_PAUSE)
    return choose(limit / 2, limit)
