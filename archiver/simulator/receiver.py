"""A real `archiver serve` in its own process, for the duration of an `async with`."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from archiver.errors import ArchiverError

_READY = 60.0  # seconds, including migrations
_POLL = 0.05
_GRACE = 15.0  # seconds between SIGTERM and SIGKILL
_LINES = 20  # of its output, shown if it fails
# The program exits with this process, even after SIGKILL, because its standard input is then closed.
_PROGRAM = """
import os, signal, sys, threading

def end_with_input():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_input, daemon=True).start()
sys.argv[0] = "archiver"
from archiver.cli import main
main()
"""


class ReceiverError(ArchiverError):
    """`archiver serve` or `archiver backfill` failed; the message ends with its output."""


@contextlib.asynccontextmanager
async def receiving(database_url: str, secret: str, log: Path) -> AsyncIterator[str]:
    """Yield the URL of a receiver that is ready. It migrates the database; its output goes to `log`."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROGRAM, "serve", "--host", "127.0.0.1", "--port", str(port), "--migrate"),
            env=_environment(
                DATABASE_URL=database_url,
                ARCHIVER_WEBHOOK_SECRETS=secret,
                ARCHIVER_HOME=str(log.parent),
                ARCHIVER_CONSOLE_ACTS="on",
                ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE="true",
            ),
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C must not reach it, so that it completes accepted requests
        )
    try:
        await _until_ready(process, url, log)
        yield url
    finally:
        await _end(process)


async def backfilled(database_url: str, api: str, session_ids: Sequence[str]) -> dict[str, Any]:
    """Run `archiver backfill --json` for these sessions and return its output. Raises `ReceiverError`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "archiver", "backfill", "--file", "-", "--json"),
        env=_environment(DATABASE_URL=database_url, CALLHQ_API_URL=api, CALLHQ_API_KEY="demo"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, complaints = await process.communicate("\n".join(session_ids).encode())
    finally:
        await _end(process)
    if process.returncode != 0:
        raise ReceiverError(f"`archiver backfill` exited with code {process.returncode}.\n{complaints.decode()}")
    figures: dict[str, Any] = json.loads(output)
    return figures


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _environment(**values: str) -> Mapping[str, str]:
    """Return the environment of this process without settings of a real deployment."""
    environment = ("ARCHIVER_", "CALLHQ_", "DATABASE_URL", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(environment)} | values


async def _until_ready(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    try:
        async with asyncio.timeout(_READY), httpx2.AsyncClient(trust_env=False) as http:
            while process.returncode is None and not await _is_ready(http, url):  # noqa: ASYNC110  # another process has no Event
                await asyncio.sleep(_POLL)
    except TimeoutError:
        raise ReceiverError(f"`archiver serve` was not ready within {_READY:.0f} s.\n{_tail(log)}") from None
    if process.returncode is not None:
        raise ReceiverError(f"`archiver serve` exited with code {process.returncode}.\n{_tail(log)}")


async def _is_ready(http: httpx2.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(f"{url}/readyz")).is_success
    except httpx2.TransportError:
        return False


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _GRACE)
    except TimeoutError:
        process.kill()
        await process.wait()


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, maxlen=_LINES)).strip()
