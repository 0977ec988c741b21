"""A running demo, and a window of a real browser in which a test visits its console."""

from dataclasses import dataclass

import httpx2
from playwright.sync_api import Page

from tests.support.browsing import PASSWORD

# In ids and content of the demo: if it ran, it would change the title of the page.
MARKUP = "<script>document.title='run'</script><img src=x onerror=document.title='run'>"

# The browser loads only what the tests open.
ARGUMENTS = [
    f"--{each}"
    for each in (
        *("no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    )
]


@dataclass
class Demo:
    """A running `archiver demo`: its receiver's address and secret, its database, and its user's password."""

    url: str
    database_url: str
    password: str
    secret: str

    def post(self, body: bytes) -> int:
        """Deliver a webhook; return the status of the answer."""
        headers = {"x-webhook-secret": self.secret}
        return httpx2.post(f"{self.url}/webhooks/callhq", content=body, headers=headers, trust_env=False).status_code


@dataclass
class Visitor:
    """A browser window. `faults`: errors of its pages and requests to other hosts."""

    page: Page
    url: str
    faults: list[str]

    def open(self, path: str) -> int:
        """Open a page; return its status."""
        response = self.page.goto(self.url + path)
        assert response is not None
        return int(response.status)

    def log_in(self, name: str, password: str = PASSWORD) -> None:
        self.open("/console/login")
        self.page.fill("#name", name)
        self.page.fill("#password", password)
        self.page.press("#password", "Enter")
        self.page.wait_for_selector("text=Log out")

    def log_out(self) -> None:
        self.page.click("text=Log out")
        self.page.wait_for_selector("#password")
