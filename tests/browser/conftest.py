"""A running demo with a user of each role, and a browser."""

import json
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.support.demos import furnish, running_demo
from tests.support.visitors import ARGUMENTS, MARKUP, Demo, Visitor


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo with a user of each role, something on each page, and a conversation with hostile content."""
    with running_demo(tmp_path_factory.mktemp("demo")) as found:
        chat = {"id": f"chat {MARKUP}", "sessionId": f"hostile {MARKUP}", "input": f"\u202e{MARKUP}" + "long " * 2000}
        assert found.post(json.dumps({"message": {"type": "chat.created", "chat": chat}}).encode()) == 200
        furnish(found)
        yield found


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
