"""A running demo, and a window of a real browser in which a test visits its console."""

from dataclasses import dataclass

from playwright.sync_api import Page

from tests.support.browsing import PASSWORD

# In ids and content of the demo: if it ran, it would change the title of the page.
MARKUP = "<script>document.title='run'</script><img src=x onerror=document.title='run'>"


@dataclass
class Demo:
    """A running `archiver demo`: the address of its receiver, the URL of its database, and its user's password."""

    url: str
    database_url: str
    password: str


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
