"""A small provider of OpenID Connect with real sockets and keys, which does what a test says."""

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID, CLIENT_SECRET = "archive", "secret of the client"
_KEYS = [RSAKey.generate_key(2048, {"kid": kid, "use": "sig", "alg": "RS256"}) for kid in ("first", "second")]

Sign = Callable[["IdentityProvider", dict[str, Any]], str]


def signed(provider: "IdentityProvider", claims: dict[str, Any]) -> str:
    """An ID token as a provider signs it."""
    return jwt.encode({"alg": "RS256", "kid": provider.key.kid}, claims, provider.key)


@dataclass
class IdentityProvider:
    """Its address, the person who is logged in there, and what it does.

    `wait` holds back its answers; `held` of them wait.
    """

    issuer: str = ""
    person: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)  # beside those of the person, or instead of them
    without: str = ""  # the claim that a token lacks
    sign: Sign = signed
    key: RSAKey = field(default_factory=lambda: _KEYS[0])
    metadata: dict[str, Any] = field(default_factory=dict)
    padding: int = 0  # bytes before each answer
    wait: threading.Event | None = None
    held: int = 0
    is_down: bool = False
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def rotate(self) -> None:
        """Sign with another key, and publish only that."""
        self.key = _KEYS[self.key is _KEYS[0]]

    def respond(self, path: str, query: Mapping[str, str], form: Mapping[str, str]) -> tuple[int, Any]:
        self.requests.append(path)
        if self.is_down:
            return 500, {}
        if path == "/.well-known/openid-configuration":
            return 200, self._metadata()
        if path == "/keys":
            return 200, {"keys": [self.key.as_dict(private=False), {"kty": "new", "kid": "unknown"}]}
        if path == "/authorize":
            return self._authorize(query)
        return self._exchange(form) if path == "/token" else (404, {})

    def _metadata(self) -> dict[str, Any]:
        places = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
        return {
            "issuer": self.issuer,
            **{name: f"{self.issuer}/{path}" for name, path in places.items()},
            "scopes_supported": ["openid", "profile", "groups", "address"],
            "id_token_signing_alg_values_supported": ["RS256", "HS256", "none"],
            **self.metadata,
        }

    def _authorize(self, query: Mapping[str, str]) -> tuple[int, Any]:
        assert query["response_type"] == "code"
        assert query["client_id"] == CLIENT_ID
        assert query["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(8)
        self.codes[code] = dict(query)
        return 302, f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def _exchange(self, form: Mapping[str, str]) -> tuple[int, Any]:
        begun = self.codes.pop(form["code"], None)
        if begun is None or begun["redirect_uri"] != form["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != begun["code_challenge"]:
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 60, "nonce": begun["nonce"]}
        claims |= self.person | self.claims
        claims.pop(self.without, None)
        return 200, {"access_token": "a", "token_type": "Bearer", "id_token": self.sign(self, claims)}


@contextmanager
def identity_provider(**person: Any) -> Iterator[IdentityProvider]:
    """A running provider, at which this person is logged in."""
    provider = IdentityProvider(person={"sub": "1001", "preferred_username": "Ada", **person})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            expected = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
            assert self.headers["authorization"] == f"Basic {expected}"
            body = self.rfile.read(int(self.headers["content-length"]))
            self._respond(dict(parse_qsl(body.decode())))

        def _respond(self, form: Mapping[str, str]) -> None:
            parts = urlsplit(self.path)
            if provider.wait is not None:
                provider.held += 1
                provider.wait.wait(60)
                provider.held -= 1
            status, answer = provider.respond(parts.path, dict(parse_qsl(parts.query)), form)
            self.send_response(status)
            body = b" " * provider.padding + json.dumps(answer).encode()
            if status == 302:
                self.send_header("location", answer)
                body = b""
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that left

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    provider.issuer = f"http://127.0.0.1:{server.server_port}"
    try:
        yield provider
    finally:
        if provider.wait is not None:
            provider.wait.set()
        server.shutdown()
        server.server_close()
        thread.join()
