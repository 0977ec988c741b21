"""The platform's webhook sender: signs, sends with a few retries, and records.

The faults of `faults` take effect here: webhooks are lost, sent again or held back.
"""

import asyncio
import contextlib
import json
import ssl
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

import httpx2

from archiver import retry_after
from archiver.inbound.signatures import Verifier
from archiver.settings import SettingsError
from archiver.simulator.faults import DELETED, Fault, Webhook

ATTEMPTS = 3
_PARALLEL = 16  # requests, and connections
_UNFINISHED = 10_000  # webhooks; a call that would cause more waits
_MAX_KEPT = 200_000  # deliveries whose bytes are kept
_IDLE = 2.0  # seconds that an unused connection is kept; servers keep it longer, so none is used while it closes
_TIMEOUT = 10.0  # seconds for one response
_INITIAL_PAUSE, _MAX_PAUSE = 0.1, 2.0  # seconds between attempts
_HOLD = 1.0  # longest, in seconds
_DELAY = 1.0  # longest, in seconds

Outcome = Literal["lost", "accepted", "refused", "unanswered"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery and its outcome: `lost` on purpose, `accepted` with 2xx, `refused` with another status, or
    `unanswered` after all attempts. `answer`: the `status` in the response body, if any.
    """

    type: str
    chat: Mapping[str, Any]
    body: bytes
    faults: frozenset[Fault]
    is_copy: bool
    outcome: Outcome
    status: int | None
    answer: str
    attempts: int


class Record:
    """A record of the deliveries: counts of all, and the latest 200,000 themselves."""

    def __init__(self) -> None:
        self.deliveries: deque[Delivery] = deque(maxlen=_MAX_KEPT)
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, delivery: Delivery) -> None:
        """Record a delivery."""
        self.deliveries.append(delivery)
        outcome = "lost" if delivery.outcome == "lost" else "sent"
        self._counts["totals"].update(["copies"] if delivery.is_copy else [], **{outcome: 1})
        self._counts["totals"]["attempts"] += delivery.attempts
        self._counts["outcomes"][delivery.outcome] += 1
        self._counts["types"][delivery.type] += 1
        self._counts["statuses"][str(delivery.status or "none")] += 1
        self._counts["answers"][delivery.answer or "none"] += 1
        self._counts["faults"].update(delivery.faults)

    def total(self, name: Literal["sent", "lost", "copies", "attempts"]) -> int:
        """Return the number of deliveries sent (including copies), deliveries lost on purpose, copies or attempts."""
        return self._counts["totals"][name]

    def report(self) -> dict[str, dict[str, int]]:
        """Return all counts, by category."""
        return {name: dict(sorted(counts.items())) for name, counts in sorted(self._counts.items())}


def _trusted() -> ssl.SSLContext:
    """Return the system's authorities, or those in SSL_CERT_FILE; no proxy variable is used."""
    try:
        return httpx2.create_ssl_context()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"certificates cannot be verified, see SSL_CERT_FILE and SSL_CERT_DIR: {error}"
        ) from error


class Sender:
    """A sender of webhooks to one URL. Use it in `async with`; without a URL, it sends nothing."""

    def __init__(self, url: str | None, verifier: Verifier, record: Record) -> None:
        self.record = record
        self._url = url
        self.verifier = verifier
        self._room = asyncio.Semaphore(_UNFINISHED)
        self._slots = asyncio.Semaphore(_PARALLEL)
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: defaultdict[tuple[str, str], asyncio.Event] = defaultdict(asyncio.Event)
        self._hurry = asyncio.Event()
        self._client = httpx2.AsyncClient(
            timeout=_TIMEOUT,
            limits=httpx2.Limits(
                max_connections=_PARALLEL, max_keepalive_connections=_PARALLEL, keepalive_expiry=_IDLE
            ),
            verify=_trusted() if url and url.lower().startswith("https:") else True,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def submit(self, webhooks: Sequence[Webhook]) -> None:
        """Send these webhooks in the background; wait only if too many are unfinished."""
        if self._url is None:
            return
        for webhook in webhooks:
            await self._room.acquire()
            task = asyncio.create_task(self._run(webhook))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    async def drain(self) -> None:
        """Send held webhooks immediately, and wait until everything submitted so far is finished."""
        self._hurry.set()
        for event in self._held.values():
            event.set()
        await asyncio.gather(*self._tasks)
        self._held.clear()
        self._hurry.clear()

    async def send(self, body: bytes, signer: Verifier | None) -> Delivery:
        """Send these bytes as one delivery, signed by `signer` if there is one."""
        answer = await self._post(body, signer)
        return self._note(Webhook("other", "", "", {}, frozenset(), 0, False, False, 0.0), body, answer, False)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._room.release()
        self._tasks.discard(task)

    async def _run(self, webhook: Webhook) -> None:
        body = _envelope(webhook)
        if "loss" in webhook.faults:
            self._note(webhook, body, _Answer("lost", None, "", 0), False)
            return
        await self._hold(webhook)
        copies = [_envelope(webhook, n + 1) if webhook.copies_differ else body for n in range(webhook.copies)]
        if webhook.copies_at_once:
            await asyncio.gather(
                self._sending(webhook, body, False), *[self._sending(webhook, c, True) for c in copies]
            )
        else:
            await self._sending(webhook, body, False)
            for copy in copies:
                await self._sending(webhook, copy, True)
        self._release(webhook)

    async def _hold(self, webhook: Webhook) -> None:
        if "delay" in webhook.faults:
            await self._wait(self._hurry, webhook.delay * _DELAY)
        if "deletion_before_creation" in webhook.faults:
            await self._wait(self._held["deletion", webhook.chat_id], _HOLD)
        elif "reorder" in webhook.faults:
            await self._wait(self._held["session", webhook.session_id], _HOLD)

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        if not self._hurry.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), seconds)

    def _release(self, webhook: Webhook) -> None:
        """Release deliveries that waited for this one."""
        keys = [("session", webhook.session_id)]
        if webhook.type == DELETED:
            keys.append(("deletion", webhook.chat_id))
        for key in keys:
            if event := self._held.pop(key, None):
                event.set()

    async def _sending(self, webhook: Webhook, body: bytes, is_copy: bool) -> None:
        async with self._slots:
            self._note(webhook, body, await self._post(body, self.verifier), is_copy)

    async def _post(self, body: bytes, signer: Verifier | None) -> "_Answer":
        message_id = f"msg_{uuid.uuid4().hex}"
        answer = _Answer("unanswered", None, "", 0)
        for attempt in range(1, ATTEMPTS + 1):
            answer, pause = await self._attempt(body, signer, message_id, attempt)
            if pause is None or attempt == ATTEMPTS:
                break
            await asyncio.sleep(pause)
        return answer

    async def _attempt(
        self, body: bytes, signer: Verifier | None, message_id: str, attempt: int
    ) -> tuple["_Answer", float | None]:
        """Send one request; return the answer, and the pause before a retry (None: do not retry)."""
        url = self._url or ""
        headers = {"content-type": "application/json"}
        if signer is not None:
            headers |= signer.sign(body, time.time(), message_id, "POST", url)
        pause = min(_INITIAL_PAUSE * 2**attempt, _MAX_PAUSE)
        try:
            response = await self._client.post(url, content=body, headers=headers)
        except httpx2.TransportError:
            return _Answer("unanswered", None, "", attempt), pause
        outcome: Outcome = "accepted" if response.is_success else "refused"
        answer = _Answer(outcome, response.status_code, _word(response), attempt)
        if response.status_code != httpx2.codes.TOO_MANY_REQUESTS and not response.is_server_error:
            return answer, None
        seconds = retry_after.parse(response.headers.get("retry-after", ""), datetime.now(UTC))
        return answer, min(pause if seconds is None else seconds, _MAX_PAUSE)

    def _note(self, webhook: Webhook, body: bytes, answer: "_Answer", is_copy: bool) -> Delivery:
        delivery = Delivery(
            type=webhook.type,
            chat=webhook.chat,
            body=body,
            faults=webhook.faults,
            is_copy=is_copy,
            outcome=answer.outcome,
            status=answer.status,
            answer=answer.word,
            attempts=answer.attempts,
        )
        self.record.add(delivery)
        return delivery


@dataclass(frozen=True, slots=True)
class _Answer:
    outcome: Outcome
    status: int | None
    word: str
    attempts: int


def _envelope(webhook: Webhook, copy: int = 0) -> bytes:
    """Return the body; each copy has a later time, as if it had been built again."""
    milliseconds = int(time.time() * 1000) + copy
    message: dict[str, Any] = {"type": webhook.type, "timestamp": milliseconds, "chat": webhook.chat}
    if assistant_id := webhook.chat.get("assistantId"):
        message["assistant"] = {"id": assistant_id, "name": "Front desk"}
        message["customer"] = {"number": "+12025550143"}
    return json.dumps({"message": message}, ensure_ascii=False).encode()


def _word(response: httpx2.Response) -> str:
    """Return the `status` in a JSON response, such as `stored`."""
    try:
        answer = response.json()
    except ValueError:
        return ""
    return str(answer.get("status", ""))[:40] if isinstance(answer, dict) else ""
