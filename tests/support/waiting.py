"""Waiting for something real, with a deadline: the only sleep in the tests is between two looks."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], what: str, seconds: float = 600) -> Any:
    """Waits for something real to become true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.01)
    return value
