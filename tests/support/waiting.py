"""Waiting for something real, with a deadline: the only sleep in the tests is between two looks."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], what: str, seconds: float = 600) -> Any:
    """Waits for something real to become true, and returns it.

    It looks less often the longer it waits: most looks are queries, which take time from what is waited for.
    """
    deadline, pause = time.monotonic() + seconds, 0.01
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)
    return value
