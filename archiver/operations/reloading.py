"""Reload settings files when they change and on SIGHUP.

A file counts as changed when two consecutive checks find the same new content, so that a partly written file is not
read. The first check runs before the settings are read, so that no change in between is missed. Invalid settings
are reported, and the previous settings stay in use.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from pathlib import Path
from time import monotonic

import structlog

from archiver import settings, telemetry
from archiver.settings import Settings, SettingsError
from archiver.telemetry.duty_health import Duty, fault_location

log = structlog.get_logger(__name__)

CHECK_SECONDS = 2.0
REPORT_SECONDS = 60.0
_LARGEST = 1_048_576
# Not settings of the archiver, but read by the HTTP client when it is built.
_CERTIFICATES = ("SSL_CERT_FILE",)
_NO_FILE = "a pipe or device"


def block() -> None:
    """Block SIGHUP in this thread and its children until each is ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def look() -> Mapping[str, str]:
    """Return, by variable, a digest of the file that it names, or the reason why the file cannot be read."""
    names = [name for name in settings.file_names() if os.environ.get(name)]
    return {name: _digest(Path(os.environ[name])) for name in (*names, *filter(os.environ.get, _CERTIFICATES))}


def require_files(found: Mapping[str, str]) -> None:
    """Raise `SettingsError` if a setting is in a pipe or device, which blocks or is empty when read again.

    The null device is accepted: it is always empty.
    """
    for name, digest in found.items():
        if digest == _NO_FILE:
            raise SettingsError(f"{name}: {os.environ[name]} is not a regular file: name a regular file")


def _digest(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir() and not path.samefile(os.devnull):
            return _NO_FILE
        with path.open("rb") as file:
            return sha256(file.read(_LARGEST)).hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


class Reloading:
    """A watcher that reloads the settings when a file changes.

    `apply` puts new settings into effect, or raises `SettingsError` before it changes anything. `used` is the result
    of `look` before the current settings were read. `forward` passes SIGHUP on to other processes.
    """

    def __init__(
        self,
        apply: Callable[[Settings], Awaitable[None]],
        used: Mapping[str, str],
        forward: Callable[[], None] | None = None,
    ) -> None:
        self._apply, self._duty, self._forward = apply, Duty("settings"), forward
        self._used = self._before = used
        self._reload_requested = asyncio.Event()
        self._fault, self._reported_at = "", 0.0

    async def run(self, duty: Duty | None = None) -> None:
        """Check the files until cancelled. SIGHUP triggers a check if the event loop runs in the main thread.

        A second call detects the changes made since the first call was cancelled.
        """
        self._duty = duty or self._duty
        telemetry.settings_current.set(not self._fault)
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        while True:
            try:
                await asyncio.wait_for(self._reload_requested.wait(), CHECK_SECONDS)
            except TimeoutError:
                await self._look(is_asked=False)
            else:
                self._reload_requested.clear()
                await self._look(is_asked=True)
            if self._fault:
                self._report()
            else:
                self._duty.working()

    def _hang_up(self) -> None:
        self._reload_requested.set()
        if self._forward is not None:
            self._forward()

    async def _look(self, *, is_asked: bool) -> None:
        result = await asyncio.to_thread(look)
        is_settled, self._before = result == self._before, result
        # `serve` sets some settings for its child processes; these are in no file.
        is_changed = any(self._used.get(name) != digest for name, digest in result.items())
        if is_asked or (is_settled and is_changed):
            await self._reload(result)

    async def _reload(self, found: Mapping[str, str]) -> None:
        self._used = found
        try:
            require_files(found)
            await self._apply(settings.read())
        except SettingsError as error:
            self._note(str(error))
        except Exception as error:  # supervisor: the next change is read after any error
            self._note(f"{type(error).__name__} at {fault_location(error)}")
            log.exception("settings reload failed")
        else:
            self._note("")
            log.info("settings reloaded", pid=os.getpid())
        telemetry.settings_current.set(not self._fault)

    def _note(self, fault: str) -> None:
        if fault != self._fault:
            self._reported_at = 0.0
        self._fault = fault

    def _report(self) -> None:
        self._duty.failing(f"the previous settings stay in use: {self._fault}")
        if not self._reported_at or monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = monotonic()
            log.error("new settings rejected; previous settings stay in use", reason=self._fault)
