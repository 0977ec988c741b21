"""`archiver` processes, forked from one that has imported the program: importing it costs more than most of them do.

A forked process differs from `python -m archiver` in what the start of Python decides: the tests about that start
one of their own.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType

_IMPORTED = [
    "archiver.cli.failures",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "archiver.http.connections",
    "archiver.http.listening",
]

suspended: dict[str, str] = {}  # settings of coverage, while a test is not traced

# Reads a line of JSON for each process to start, answers with its pid, and writes its exit code to a file so named.
_PARENT = """
import atexit, gc, importlib, json, os, signal, sys, threading, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
from archiver.cli import COMMANDS, main

for command, _ in COMMANDS.values():
    importlib.import_module("archiver.cli." + command.split(":")[0])
gc.freeze()


def start(request):
    arguments, environment, files = request["arguments"], request["environment"], request["files"]
    if request["is_apart"]:
        os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(request["seconds"])
    if not request["is_traced"]:
        sys.settrace(None)
        threading.settrace(None)
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | (os.O_APPEND if number else 0), 0o600), number)
    os.closerange(3, 1024)
    for constant, value in request["constants"].items():
        module, _, name = constant.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["archiver", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if not request["seconds"]:  # as at the end of Python: joins its children, reports its coverage
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def reap():
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with open(f"{pid}.new", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(f"{pid}.new", str(pid))


woken, waker = os.pipe()
os.set_blocking(waker, False)
signal.set_wakeup_fd(waker)
signal.signal(signal.SIGCHLD, lambda *_: None)
import select

unread = b""
while True:
    ready, _, _ = select.select([0, woken], [], [])
    if woken in ready:
        os.read(woken, 4096)
        reap()
    if 0 in ready:
        piece = os.read(0, 65536)
        if not piece:
            os._exit(0)
        *lines, unread = (unread + piece).split(b"\\n")
        for line in lines:
            request = json.loads(line)
            if not (pid := os.fork()):
                start(request)
            if os.path.exists(str(pid)):  # of an earlier process with this pid
                os.unlink(str(pid))
            os.write(1, f"{pid}\\n".encode())
"""


class Process:
    """A process that was started: what `subprocess.Popen` has of the same names."""

    def __init__(self, pid: int, ended: Path) -> None:
        self.pid, self._ended = pid, ended
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and self._ended.exists():
            self.returncode = int(self._ended.read_text())
            self._ended.unlink()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it has ended; raises `subprocess.TimeoutExpired` after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("archiver", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended in between
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


AnyProcess = Process | subprocess.Popen[bytes]


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdout: Path | str,
    stderr: Path | str,
    is_apart: bool = False,
    seconds: int = 0,
    constants: Mapping[str, float] = MappingProxyType({}),
) -> AnyProcess:
    """`archiver` with these arguments and no other environment; `is_apart`: in a session of its own.

    Its output is appended to files. SIGALRM ends it after so many `seconds`, if there are any. It is forked unless
    the environment changes where Python imports from. `constants`: other values of constants of modules, such as
    `archiver.http.connections.GRACE_SECONDS`, in a process that is forked, and not in its children.
    """
    if environment.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
        return execute(arguments, environment, stdout=stdout, stderr=stderr, is_apart=is_apart)
    parent, ended = _parent()
    for path in (stdout, stderr):
        Path(path).touch()
    request = {
        "arguments": arguments,
        "environment": dict(environment),
        "files": [os.devnull, str(stdout), str(stderr)],
        "is_apart": is_apart,
        "seconds": seconds,
        "constants": dict(constants),
        # The coverage of a process that an alarm ends is never reported.
        "is_traced": not suspended and not seconds,
        "folder": os.getcwd(),  # noqa: PTH109
    }
    assert parent.stdin
    assert parent.stdout
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    pid = int(parent.stdout.readline())
    return Process(pid, ended / str(pid))


def execute(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdout: Path | str,
    stderr: Path | str,
    is_apart: bool = False,
) -> subprocess.Popen[bytes]:
    """As `start`, but `python -m archiver` from its very beginning."""
    with Path(stdout).open("ab") as out, Path(stderr).open("ab") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "archiver", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=is_apart,
        )


@cache
def _parent() -> tuple[subprocess.Popen[str], Path]:
    folder = tempfile.TemporaryDirectory(prefix="archiver-ended-")
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT, *_IMPORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder.name,
        env={**os.environ, **suspended, "PYTHONPATH": str(Path(__file__).parents[2])},
    )

    def stop() -> None:
        process.communicate()  # the end of its input is its end
        folder.cleanup()

    atexit.register(stop)
    return process, Path(folder.name)
