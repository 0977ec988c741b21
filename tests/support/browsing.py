"""A browser of the console without a screen: it keeps cookies and sends the forms of the pages."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from tests.support.receivers import ANSWER_SECONDS

PASSWORD = "correct horse battery"


@dataclass
class Browser:
    """A client with cookies that follows no redirect by itself."""

    client: httpx2.Client

    def get(self, path: str) -> httpx2.Response:
        return self.client.get(path)

    def send(self, path: str, **fields: str) -> httpx2.Response:
        """Send a form."""
        return self.client.post(path, data=fields)

    def form_token(self, path: str) -> str:
        """The token in the first form of a page."""
        match = re.search(r'name="token" value="(\w+)"', self.get(path).text)
        assert match is not None
        return match[1]

    def log_in(self, name: str, password: str = PASSWORD, following: str = "") -> httpx2.Response:
        token = self.form_token("/console/login")
        return self.send("/console/login", token=token, name=name, password=password, next=following)


@contextmanager
def browsing(url: str, headers: Mapping[str, str] | None = None) -> Iterator[Browser]:
    """A browser whose addresses begin with this one."""
    with httpx2.Client(base_url=url, trust_env=False, timeout=ANSWER_SECONDS, headers=headers) as client:
        yield Browser(client)


@contextmanager
def logged_in(url: str, name: str) -> Iterator[Browser]:
    """A browser in which this user is logged in."""
    with browsing(url) as browser:
        assert browser.log_in(name).status_code == 303
        yield browser
