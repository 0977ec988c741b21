"""Use a provider of OpenID Connect: its metadata, its keys, and its tokens. The only module that uses `authlib`.

The rules: OpenID Connect Core 1.0 (3.1), OpenID Connect Discovery 1.0 (4), RFC 7636 (PKCE), RFC 9207 (`iss`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import httpx2
import msgspec
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from archiver.console.accounts import Identity
from archiver.console.openid.attempt import Attempt
from archiver.errors import ArchiverError
from archiver.settings import Settings, SettingsError, libraries

CALL_SECONDS = 10.0  # for all calls of one step of a login
MAX_BYTES = 1_048_576  # of a response
METADATA_SECONDS = 3_600.0  # for which metadata and keys are used
LEEWAY_SECONDS = 60  # between the clocks
MAX_TEXT = 255  # characters of a subject (OpenID Connect Core 1.0, 2), and of a username
# Signed with the private key of the provider: none is signed with a secret that both know, or not at all.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519")
_KEY_TYPES = frozenset(("RSA", "EC", "OKP"))


class ProviderError(ArchiverError):
    """The provider cannot be reached, or its response cannot be used."""


class RefusedError(ArchiverError):
    """The provider refuses the code, or its ID token proves no login of this attempt."""


class Person(msgspec.Struct, frozen=True):
    """What an ID token says of the person who logged in."""

    identity: Identity
    groups: tuple[str, ...]


class _Metadata(msgspec.Struct, frozen=True):
    """What is used of the metadata of a provider."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    scopes_supported: tuple[str, ...] = ()
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False


class _Known(msgspec.Struct, frozen=True):
    """Metadata and keys, and when they were read."""

    metadata: _Metadata
    keys: KeySet
    read_at: float


class Provider:
    """The provider that the settings name. Raises `SettingsError` if no HTTP client can be built."""

    def __init__(self, configuration: Settings) -> None:
        self.issuer = configuration.oidc_issuer
        self._client_id = configuration.oidc_client_id
        self._client_secret = configuration.oidc_client_secret.get_secret_value().strip()
        self._groups_claim = configuration.oidc_groups_claim
        self._known: _Known | None = None
        self._reading = asyncio.Lock()
        try:
            self._trusted = httpx2.create_ssl_context()
        except (OSError, ValueError) as error:
            advice = libraries.advice_on(error, libraries.TLS)
            raise SettingsError(
                f"the HTTP client for ARCHIVER_OIDC_ISSUER cannot be built: {libraries.describe(error)}."
                f" To fix it, {advice}."
            ) from error

    async def authorization_address(self, attempt: Attempt, redirect_uri: str) -> str:
        """Return the address at which the person logs in. Raises `ProviderError`."""
        async with self._calling() as client:
            metadata = (await self._read(client)).metadata
        offered = {self._groups_claim, "profile"} & set(metadata.scopes_supported)
        address, _ = client.create_authorization_url(
            metadata.authorization_endpoint,
            state=attempt.state,
            nonce=attempt.nonce,
            code_verifier=attempt.verifier,
            redirect_uri=redirect_uri,
            scope=" ".join(["openid", *sorted(offered)]),
        )
        return str(address)

    async def person(self, attempt: Attempt, redirect_uri: str, code: str, issuer: str | None) -> Person:
        """Return who logged in, for the code in the answer of the provider, and its `iss` if it has one.

        Raises `ProviderError` and `RefusedError`.
        """
        async with self._calling() as client:
            known = await self._read(client)
            is_required = known.metadata.authorization_response_iss_parameter_supported
            if issuer != self.issuer and (is_required or issuer is not None):
                raise RefusedError("the answer is of another issuer")
            tokens = await self._exchange(client, known.metadata, attempt, redirect_uri, code)
            id_token = tokens.get("id_token")
            if not isinstance(id_token, str):
                raise RefusedError("the provider returned no ID token")
            try:
                decoded = _decode(id_token, known.keys)
            except (InvalidKeyIdError, BadSignatureError):  # the provider may have new keys
                known = await self._read(client, is_fresh=True)
                decoded = _refusing(lambda: _decode(id_token, known.keys))
            except (JoseError, ValueError, TypeError, RecursionError) as error:
                raise RefusedError(f"invalid ID token: {libraries.describe(error)}") from None
        claims = self._validate(decoded, attempt, tokens.get("access_token"))
        return self._person(claims)

    async def check(self) -> str:
        """Read metadata and keys; return what is there. Raises `ProviderError`."""
        async with self._calling() as client:
            known = await self._read(client)
        return f"{self.issuer} is available, with {len(known.keys.keys)} keys for signatures."

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[Any]:
        """Yield a client for one step of a login, and limit the time of its calls. Raises `ProviderError`."""
        client = AsyncOAuth2Client(
            client_id=self._client_id,
            client_secret=self._client_secret or None,
            code_challenge_method="S256",
            verify=self._trusted,
            headers={"user-agent": "callhq-archiver", "accept": "application/json", "accept-encoding": "identity"},
            timeout=CALL_SECONDS,
            follow_redirects=False,
            event_hooks={"response": [_limit]},
        )
        try:
            async with asyncio.timeout(CALL_SECONDS), client:
                yield client
        except TimeoutError:
            raise ProviderError(f"no complete response after {CALL_SECONDS:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ProviderError(libraries.describe(error)) from None

    async def _read(self, client: Any, *, is_fresh: bool = False) -> _Known:
        """Return metadata and keys, read again if they are old. `is_fresh`: read them now."""
        async with self._reading:
            known = self._known
            if known is not None and not is_fresh and monotonic() - known.read_at < METADATA_SECONDS:
                return known
            at = monotonic()
            place = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
            metadata = _converted(await _document(client, place))
            if metadata.issuer != self.issuer:
                raise ProviderError(f"its metadata are of the issuer {metadata.issuer!r}, not {self.issuer!r}")
            for address in (metadata.authorization_endpoint, metadata.token_endpoint, metadata.jwks_uri):
                if not address.startswith("https://") and not self.issuer.startswith("http://"):
                    raise ProviderError(f"its metadata name an address without TLS: {address!r}")
            self._known = _Known(metadata, _keys(await _document(client, metadata.jwks_uri)), at)
            return self._known

    async def _exchange(
        self, client: Any, metadata: _Metadata, attempt: Attempt, redirect_uri: str, code: str
    ) -> Mapping[str, Any]:
        """Return the tokens for a code."""
        methods = metadata.token_endpoint_auth_methods_supported
        if self._client_secret and "client_secret_basic" not in methods and "client_secret_post" in methods:
            client.token_endpoint_auth_method = "client_secret_post"  # noqa: S105  # the name of a method
        try:
            tokens: Mapping[str, Any] = await client.fetch_token(
                metadata.token_endpoint,
                grant_type="authorization_code",
                code=code,
                code_verifier=attempt.verifier,
                redirect_uri=redirect_uri,
            )
        except OAuthError as error:
            raise RefusedError(f"the provider refuses the code: {str(error.error)[:MAX_TEXT]}") from None
        except (ValueError, RecursionError) as error:
            raise ProviderError(f"its tokens cannot be read: {libraries.describe(error)}") from None
        return tokens

    def _validate(self, decoded: jwt.Token, attempt: Attempt, access_token: object) -> Mapping[str, Any]:
        options = {
            "iss": {"essential": True, "value": self.issuer},
            "aud": {"essential": True, "value": self._client_id},
        }
        params = {"nonce": attempt.nonce, "client_id": self._client_id}
        if isinstance(access_token, str):
            params["access_token"] = access_token
        claims: Any = CodeIDToken(decoded.claims, decoded.header, options, params)
        _refusing(lambda: claims.validate(leeway=LEEWAY_SECONDS))
        return decoded.claims

    def _person(self, claims: Mapping[str, Any]) -> Person:
        subject = claims["sub"]
        if not subject or len(subject) > MAX_TEXT or not subject.isascii() or not subject.isprintable():
            raise RefusedError("the ID token has an invalid subject")
        names = [claims.get(name) for name in ("preferred_username", "email")]
        username = next((name for name in names if isinstance(name, str)), "")[:MAX_TEXT]
        groups = claims.get(self._groups_claim, [])
        groups = groups if isinstance(groups, list) else [groups]
        return Person(
            Identity(self.issuer, subject, username), tuple(each for each in groups if isinstance(each, str))
        )


def _refusing(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except (JoseError, ValueError, TypeError, RecursionError) as error:
        raise RefusedError(f"invalid ID token: {libraries.describe(error)}") from None


def _decode(id_token: str, keys: KeySet) -> jwt.Token:
    registry = JWSRegistry(algorithms=ALGORITHMS, strict_check_header=False)
    return jwt.decode(id_token, keys, registry=registry)


async def _document(client: Any, address: str) -> Any:
    response: httpx2.Response = await client.request("GET", address, withhold_token=True)
    if response.status_code != httpx2.codes.OK:
        raise ProviderError(f"it returned {response.status_code} to GET {address}")
    try:
        return msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        raise ProviderError(f"its response to GET {address} is not JSON") from None


def _converted(document: Any) -> _Metadata:
    try:
        return msgspec.convert(document, _Metadata)
    except msgspec.ValidationError as error:
        raise ProviderError(f"its metadata are incomplete: {error}") from None


def _keys(document: Any) -> KeySet:
    """Return the keys for signatures; keys of other kinds and uses are left out."""
    listed = document.get("keys") if isinstance(document, dict) else None
    usable = [
        each
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict) and each.get("kty") in _KEY_TYPES and each.get("use", "sig") == "sig"
    ]
    try:
        return KeySet.import_key_set({"keys": usable})
    except (JoseError, ValueError, TypeError) as error:
        raise ProviderError(f"its keys cannot be used: {libraries.describe(error)}") from None


async def _limit(response: httpx2.Response) -> None:
    """Let no response be longer than `MAX_BYTES`, even if it is compressed although that was not allowed."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ProviderError("its response is compressed")
    stream = response.stream
    if isinstance(stream, httpx2.AsyncByteStream):
        response.stream = _Limited(stream)


class _Limited(httpx2.AsyncByteStream):
    """A stream that ends with an error after `MAX_BYTES`."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = 0
        async for part in self._stream:
            length += len(part)
            if length > MAX_BYTES:
                raise ProviderError(f"its response exceeds {MAX_BYTES:,} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
