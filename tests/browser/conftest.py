"""A running demo with a user of each role, and a browser."""

import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, sync_playwright

from archiver.console.accounts import ROLES
from tests.support import processes
from tests.support.browsing import PASSWORD
from tests.support.receivers import archiver
from tests.support.visitors import MARKUP, Demo, Visitor
from tests.support.waiting import until

# The browser loads only what the tests open.
ARGUMENTS = [
    f"--{each}"
    for each in (
        *("no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    )
]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    log = folder / "log"
    environment = os.environ | {"ARCHIVER_HOME": str(folder / "home"), "COLUMNS": "200"}
    command = ["demo", "--conversations", "40"]
    process = processes.start(command, environment, stdout=log, stderr=log, is_apart=True)
    try:
        until(lambda: "Press Ctrl-C" in log.read_text() or process.poll() is not None, "the demo has started")
        text = log.read_text()
        assert process.poll() is None, text
        match = re.search(r"DATABASE_URL='([^']+)'", text)
        secret = re.search(r"x-webhook-secret: ([^']+)'", text)
        url = re.search(r"(http://127\.0\.0\.1:\d+)/webhooks", text)
        assert match is not None
        assert secret is not None
        assert url is not None
        password = re.search(r"log in as demo with password (\S+)", text)
        assert password is not None
        found = Demo(url[1], match[1], password[1])
        _prepare(found, secret[1], folder)
        yield found
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(demo: Demo, secret: str, folder: Path) -> None:
    """Add a user of each role and a conversation with hostile content, and seal all of it."""
    file = folder / "password"
    file.write_text(PASSWORD)
    for role in ROLES:
        command = ("users", "add", role, "--role", role, "--password-file", str(file))
        assert archiver(*command, database_url=demo.database_url).returncode == 0, shlex.join(command)
    chat = {"id": f"chat {MARKUP}", "sessionId": f"hostile {MARKUP}", "input": f"\u202e{MARKUP}" + "long " * 2000}
    body = {"message": {"type": "chat.created", "chat": chat}}
    headers = {"x-webhook-secret": secret}
    response = httpx2.post(f"{demo.url}/webhooks/callhq", json=body, headers=headers, trust_env=False)
    assert response.status_code == 200
    assert archiver("seal", database_url=demo.database_url).returncode == 0


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "install chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visitor(demo: Demo, chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Visitor]:
    """A window; a test may choose `color_scheme`, `viewport` and `java_script_enabled` as its parameter."""
    context = chromium.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type in {"error", "warning"} else None)
    page.on("request", lambda each: None if each.url.startswith(demo.url) else faults.append(each.url))
    yield Visitor(page, demo.url, faults)
    context.close()
