"""Serve an ASGI app on a port of this process for the duration of an `async with`; `simulate` serves the platform."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import httpx2
import uvicorn
from pydantic import SecretStr
from starlette.types import ASGIApp

from archiver.inbound import signatures
from archiver.settings import Settings, SettingsError
from archiver.simulator.faults import Faults
from archiver.simulator.platform import Platform, create
from archiver.simulator.webhooks import Record, Sender

_GRACE = 3  # seconds for requests in progress
_DRAIN = 5.0  # seconds for webhooks in progress
_BACKLOG = 512
STOPPING = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """A server that reports when it listens, and leaves signals to its caller."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, host: str, port: int) -> AsyncIterator[str]:
    """Serve the app during the block, and yield its URL; port 0 selects a free one.

    Raises `OSError` if the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=_BACKLOG) as listener:
        # asyncio omits this option if the socket does not state its protocol; then each response takes 40 ms longer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=_GRACE
        )
        server = _Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await server.listening.wait()
            name = f"[{host}]" if family == socket.AF_INET6 else host
            yield f"http://{name}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


@contextlib.contextmanager
def stopping(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` on the first Ctrl-C or SIGTERM; ignore later ones."""
    loop = asyncio.get_running_loop()
    is_stopping = False

    def once() -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            stop()

    for number in STOPPING:
        loop.add_signal_handler(number, once)
    try:
        yield
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)


def with_secret(settings: Settings, secret: str) -> Settings:
    """Return the same settings with only this webhook secret."""
    return settings.model_copy(update={"webhook_secrets": SecretStr(secret)})


def _check(webhook_url: str | None) -> None:
    if webhook_url is None:
        return
    try:
        url = httpx2.URL(webhook_url)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise SettingsError("the webhook URL must be like http://127.0.0.1:8000/webhooks/callhq")


def simulate(
    settings: Settings,
    *,
    host: str,
    port: int,
    webhook_url: str | None,
    faults: Faults,
    api_key: str | None,
    announce: Callable[[str], object],
) -> int:
    """Run the simulated platform until Ctrl-C or SIGTERM; `announce` is called with its URL when it listens.

    Webhooks are signed according to `settings`. Raises `SettingsError` without a secret or for an invalid URL, and
    `OSError` if the port is not available.
    """
    _check(webhook_url)
    signing = settings if webhook_url else settings.model_copy(update={"webhook_scheme": "none"})
    verifier = signatures.verifier(signing)
    verifier.sign(b"", 0, "m", "POST", "")  # raises if the scheme can only verify

    async def until_stopped() -> int:
        stop = asyncio.Event()
        sender = Sender(webhook_url, verifier, Record())
        with stopping(stop.set):
            async with serving(create(Platform(sender, faults, api_key)), host, port) as url:
                announce(url)
                await stop.wait()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(sender.drain(), _DRAIN)
        return 0

    return asyncio.run(until_stopped())
