"""Real `archiver` processes: one that serves, from its start to the end of its last child, and short commands."""

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tests.support import processes
from tests.support.files import whole_lines
from tests.support.payloads import SECRET, WEBHOOK
from tests.support.processes import AnyProcess
from tests.support.servers import as_writer
from tests.support.waiting import until

COMMAND_SECONDS = 600
STOP_SECONDS = 120
ANSWER_SECONDS = 120

# Deliveries go to the spool when Postgres has not answered for this long: no shorter than a machine may stall.
_SPOOL_AFTER = (
    "archiver.inbound.SPOOL_AFTER_SECONDS",
    "archiver.inbound.fallback.SPOOL_AFTER_SECONDS",
    "archiver.inbound.writing.EXCLUSIVE_SECONDS",
)
PATIENT: dict[str, float] = dict.fromkeys(_SPOOL_AFTER, 60.0)
AS_IN_PRODUCTION: dict[str, float] = {}


def archiver(
    *arguments: str, database_url: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """One command from start to end, with nothing in its environment that the test did not say."""
    ended = archiver_raw(*arguments, database_url=database_url, **environment)
    return subprocess.CompletedProcess(ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def archiver_raw(
    *arguments: str, database_url: str | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """As `archiver`, with the bytes that it printed."""
    with tempfile.TemporaryDirectory(prefix="archiver-command-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        environment = _environment(database_url, environment)
        process = processes.start(arguments, environment, stdout=stdout, stderr=stderr, seconds=COMMAND_SECONDS)
        code = process.wait()
        return subprocess.CompletedProcess(arguments, code, stdout.read_bytes(), stderr.read_bytes())


def _environment(database_url: str | None, settings: Mapping[str, str]) -> dict[str, str]:
    values = {} if database_url is None else {"DATABASE_URL": database_url}
    return {**os.environ, **values, **settings}


@dataclass
class Receiver:
    """A running `archiver serve`."""

    process: AnyProcess
    log: Path
    url: str = ""
    _client: httpx2.Client = field(default_factory=lambda: httpx2.Client(trust_env=False, timeout=ANSWER_SECONDS))

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def stderr(self) -> str:
        return whole_lines(self.log)

    def get(self, path: str) -> httpx2.Response:
        try:
            return self._client.get(self.url + path)
        except (httpx2.ReadError, httpx2.RemoteProtocolError):  # the idle connection was being closed at that moment
            return self._client.get(self.url + path)

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> httpx2.Response:
        """One delivery, with the secret of the tests unless `headers` say otherwise."""
        proof = {"x-webhook-secret": SECRET} if headers is None else headers
        return self._client.post(self.url + WEBHOOK, content=body, headers=proof)

    def metric(self, name: str) -> float:
        """The value of one series, labels and all; 0 where it is not there."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").text.splitlines())
        return sum(float(value) for series, _, value in lines if series == name)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _find(self) -> bool:
        """Whether it says which port it took; one that ended instead will never."""
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}: {self.stderr()}"
        for line in self.stderr().splitlines():
            if '"receiver started"' in line:
                self.url = json.loads(line)["url"].removesuffix(WEBHOOK)
        return bool(self.url)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}: {self.stderr()}"
        with suppress(httpx2.TransportError):
            return self.get("/readyz").status_code == 200
        return False

    def __enter__(self) -> "Receiver":
        until(self._find, "serve tells its address")
        until(self._is_ready, "serve is ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        # Its own session holds its children too, whatever became of their parent.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def starting(database_url: str | None, *options: str, **environment: str) -> Iterator[Receiver]:
    """`archiver serve` on a free port, not waited for; kills what is left of it in the end."""
    start = partial(processes.start, constants=PATIENT)
    with _started(start, database_url, options, environment) as receiver:
        yield receiver


@contextmanager
def executing(database_url: str | None, *options: str, **environment: str) -> Iterator[Receiver]:
    """As `starting`, for a measurement: not forked from a process that has imported the program."""
    with _started(processes.execute, database_url, options, environment) as receiver:
        yield receiver


@contextmanager
def _started(
    start: Callable[..., AnyProcess],
    database_url: str | None,
    options: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[Receiver]:
    with tempfile.TemporaryDirectory(prefix="archiver-serve-") as folder:
        Path(folder).chmod(0o711)  # else, as root, the data would lie elsewhere, and outlive it
        log = Path(folder) / "stderr"
        own = {"ARCHIVER_WEBHOOK_SECRETS": SECRET, "ARCHIVER_LOG_FORMAT": "json", "ARCHIVER_HOME": f"{folder}/home"}
        settings = {**own, **environment}
        if "CALLHQ_API_KEY" not in settings and "--worker" not in options:
            options = ("--no-worker", *options)  # it would be a process more, of no use to most tests
        url = database_url if database_url is None or "--migrate" in options else as_writer(database_url)
        arguments = ["serve", "--port", "0", *options]
        process = start(arguments, _environment(url, settings), stdout=log, stderr=log, is_apart=True)
        receiver = Receiver(process, log)
        try:
            yield receiver
        finally:
            receiver.__exit__()


@contextmanager
def serving(database_url: str | None, *options: str, **environment: str) -> Iterator[Receiver]:
    """`archiver serve` on a free port, ready to receive."""
    with starting(database_url, *options, **environment) as receiver:
        yield receiver.__enter__()


@contextmanager
def serving_with(
    constants: Mapping[str, float], database_url: str, *options: str, **environment: str
) -> Iterator[Receiver]:
    """As `serving`, with other values of constants: see `processes.start`."""
    start = partial(processes.start, constants=constants)
    with _started(start, database_url, options, environment) as receiver:
        yield receiver.__enter__()


def begin(port: int, body: bytes, length: int | None = None) -> socket.socket:
    """An authentic delivery, sent, its answer not awaited; `length` is the one told, if not that of `body`."""
    connection = socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    result = len(body) if length is None else length
    head = (
        f"POST {WEBHOOK} HTTP/1.1\r\nhost: archiver\r\nx-webhook-secret: {SECRET}\r\ncontent-length: {result}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def answer(connection: socket.socket) -> tuple[int, Any]:
    """What the receiver says to what was begun."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def has_read_all(port: int, connections: int) -> bool:
    """Whether the process behind a port accepted so many connections, and read all that was sent on them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    own = [line for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"]  # 01: established
    return len(own) >= connections and all(line[4].endswith(":00000000") for line in own)


def deliver(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict[str, Any]]:
    """One delivery over a connection of the sender's own, kept alive: cheaper than a client in a load test."""
    connection.request("POST", WEBHOOK, body, {"x-webhook-secret": SECRET, "content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())
