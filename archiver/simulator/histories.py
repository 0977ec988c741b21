"""History responses of the platform, with the faults of `faults`."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from archiver.simulator.faults import Faults, HistoryFault, history_fault
from archiver.simulator.seeds import seeded
from archiver.simulator.upstream import Session, UnknownError, Upstream

_STORM = 1  # seconds for which all history calls get 429
_SLOW = 2.0  # longest, in seconds
_HANGING = 120.0  # seconds after which every client has timed out
_PAUSES = frozenset[HistoryFault]({"slow", "hanging"})

SessionJson = dict[str, Any]


class Histories:
    """The responses to history calls, and their counts."""

    def __init__(self, upstream: Upstream, faults: Faults) -> None:
        self._upstream = upstream
        self._faults = faults
        self._calls: Counter[str] = Counter()  # by session; excludes those during another session's storm
        self._all = 0
        self._statuses: Counter[str] = Counter()
        self._played: Counter[str] = Counter()
        self._storm_ends = 0.0  # on the monotonic clock

    def report(self) -> dict[str, dict[str, int]]:
        """Return the number of history calls, of their responses and of their faults.

        A fault `busy` begins a storm; the other calls during it count as `storm`. A client that did not wait for the
        response counts under the status `none`.
        """
        return {
            "history": {"calls": self._all},
            "history_faults": dict(sorted(self._played.items())),
            "history_statuses": dict(sorted(self._statuses.items())),
        }

    async def answer(self, request: Request, session_id: str) -> Response:
        """Return the history of the session, or a fault."""
        self._all += 1
        await asyncio.sleep(self._faults.history_latency)
        response = await self._answer(request, session_id)
        self._statuses["none" if await request.is_disconnected() else str(response.status_code)] += 1
        return response

    async def _answer(self, request: Request, session_id: str) -> Response:
        if time.monotonic() < self._storm_ends:
            self._played["storm"] += 1
            return self._busy()
        try:
            session = self._upstream.session(session_id)
        except UnknownError as error:
            return _refusal(404, str(error))
        self._calls[session_id] += 1
        call = self._calls[session_id]
        fault = history_fault(self._faults, session_id, call)
        random = seeded(self._faults.seed, "history detail", session_id, call)
        if fault is None:
            return self._undisturbed(session)
        self._played[fault] += 1
        if fault in _PAUSES:
            await _stay(request, random.uniform(0.2, 1.0) * _SLOW if fault == "slow" else _HANGING)
            return self._undisturbed(session)
        if fault == "busy":
            self._storm_ends = time.monotonic() + _STORM
            return self._busy()
        return _DISTURBED[fault](session, random)

    def _undisturbed(self, session: Session) -> Response:
        age = (datetime.now(UTC) - session.created_at).total_seconds()
        if self._faults.lifetime is None or age < self._faults.lifetime:
            return _found(session.described(with_creation=False))
        if self._faults.expired in {"gone", "missing"}:
            return _refusal(410 if self._faults.expired == "gone" else 404, f"Session {session.id} has expired")
        session_json = {**session.described(with_creation=False), "status": "expired"}
        return _found(session_json if self._faults.expired == "full" else {**session_json, "messages": []})

    def _busy(self) -> Response:
        return _refusal(429, "Too many requests", {"retry-after": str(_STORM)})


async def _stay(request: Request, seconds: float) -> None:
    """Wait for `seconds`, or until the client disconnects."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await request.receive())["type"] != "http.disconnect":
                pass


def _found(session_json: SessionJson) -> Response:
    return JSONResponse({"message": "Session messages retrieved successfully", "session": session_json})


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"message": message}, status, headers)


def _missing(session: Session, _: Random) -> Response:
    return _refusal(404, f"Session {session.id} not found")


def _gone(session: Session, _: Random) -> Response:
    return _refusal(410, f"Session {session.id} is gone")


def _error(_: Session, __: Random) -> Response:
    return _refusal(500, "Internal server error")


def _empty(session: Session, _: Random) -> Response:
    return _found({**session.described(with_creation=False), "messages": []})


def _partial(session: Session, random: Random) -> Response:
    """Return the history without some messages at one end; a single message is omitted."""
    session_json = session.described(with_creation=False)
    messages = session_json["messages"]
    if messages:
        left_out = random.randint(1, max(1, len(messages) - 1))
        messages = messages[left_out:] if random.getrandbits(1) else messages[: len(messages) - left_out]
    return _found({**session_json, "messages": messages})


def _garbage(session: Session, random: Random) -> Response:
    whole = json.dumps({"session": session.described(with_creation=False)}).encode()
    body = random.choice(
        (
            b"",
            whole[: len(whole) // 2],
            b"\xff\xfe" + whole,
            b"<!doctype html><title>502 Bad Gateway</title>",
        )
    )
    return Response(body, media_type="application/json")


def _shape(session: Session, random: Random) -> Response:
    session_json = session.described(with_creation=False)
    without_messages = {name: value for name, value in session_json.items() if name != "messages"}
    return JSONResponse(
        random.choice(
            (
                None,
                [session_json],
                {"message": "ok"},
                {"session": None},
                {"session": "ok"},
                {"session": without_messages},
                {"session": {**session_json, "messages": None}},
                {"session": {**session_json, "messages": {"0": {"role": "user", "content": "ok"}}}},
                {"session": {**session_json, "messages": [{"role": "user"}]}},
                {"session": {**session_json, "messages": ["ok", None, 1]}},
            )
        )
    )


_DISTURBED: dict[HistoryFault, Callable[[Session, Random], Response]] = {
    "missing": _missing,
    "gone": _gone,
    "empty": _empty,
    "partial": _partial,
    "error": _error,
    "garbage": _garbage,
    "shape": _shape,
}
