"""The attempt of a browser to log in with a provider, kept in a cookie of that browser alone."""

import base64
import binascii
import hashlib
import hmac
import secrets

import msgspec

from archiver.console.addresses import HOME, local_address
from archiver.console.logins import is_token

MAX_ADDRESS = 2_000  # characters of the page to which a login leads


class Attempt(msgspec.Struct, frozen=True):
    """A random secret of the browser, and the page to which the login leads.

    State, nonce and verifier (RFC 6749, 10.12; OpenID Connect Core 1.0, 3.1.2.1; RFC 7636, 4.1) follow from the
    secret, so that no process stores what visitors begin. None of them reveals the secret or another of them.
    """

    secret: str
    following: str

    @property
    def state(self) -> str:
        """Return the value that ties the answer of the provider to this browser."""
        return self._derived(b"state")

    @property
    def nonce(self) -> str:
        """Return the value that ties the ID token to this attempt."""
        return self._derived(b"nonce")

    @property
    def verifier(self) -> str:
        """Return the value without which the provider gives nothing for the code."""
        return self._derived(b"verifier")

    def _derived(self, purpose: bytes) -> str:
        digest = hmac.digest(self.secret.encode(), purpose, hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def is_answered_by(self, state: str) -> bool:
        """Return whether the state in an answer is that of this attempt."""
        return hmac.compare_digest(state.encode(), self.state.encode())

    def encode(self) -> str:
        """Return the value of the cookie."""
        return f"{self.secret}.{base64.urlsafe_b64encode(self.following.encode()).decode()}"


def begin(following: str) -> Attempt:
    """Return a new attempt, which leads to a page of the console."""
    address = local_address(following)
    return Attempt(secrets.token_urlsafe(32), address if len(address) <= MAX_ADDRESS else HOME)


def parse(cookie: str) -> Attempt | None:
    """Return the attempt in a cookie; None if there is none."""
    secret, _, encoded = cookie.partition(".")
    if not is_token(secret):
        return None
    try:
        return Attempt(secret, local_address(base64.urlsafe_b64decode(encoded).decode()))
    except (binascii.Error, ValueError):
        return None
