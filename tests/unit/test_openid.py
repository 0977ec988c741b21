"""What proves a login with OpenID Connect, and what does not: against a provider over real sockets."""

import base64
import hmac
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import OctKey
from joserfc.jws import JWSRegistry
from pydantic import ValidationError

from archiver.console import openid
from archiver.console.accounts import Identity
from archiver.console.openid import attempt, provider
from archiver.console.openid.attempt import Attempt
from archiver.console.openid.checks import examine_provider
from archiver.console.openid.provider import Person, Provider, ProviderError, RefusedError
from archiver.settings import Settings, SettingsError, console_roles
from tests.support.identity_providers import (
    CLIENT_ID,
    CLIENT_SECRET,
    IdentityProvider,
    Sign,
    identity_provider,
    signed,
)

BACK = "http://127.0.0.1/console/oidc/callback"


@pytest.fixture
def there() -> Iterator[IdentityProvider]:
    with identity_provider(groups=["legal", "support"]) as running:
        yield running


def settings_for(there: IdentityProvider, **others: str) -> Settings:
    values = {
        "ISSUER": there.issuer,
        "CLIENT_ID": CLIENT_ID,
        "CLIENT_SECRET": CLIENT_SECRET,
        "ROLES": "legal=auditor",
    }
    return Settings(**{f"ARCHIVER_OIDC_{name}": value for name, value in (values | others).items()})  # type: ignore[arg-type]


async def log_in(there: IdentityProvider, used: Provider, begun: Attempt | None = None) -> Person:
    begun = begun or attempt.begin("")
    return await used.person(begun, BACK, await code_of(used, begun), None)


async def code_of(used: Provider, begun: Attempt) -> str:
    """The code that the provider gives to the browser of this attempt."""
    async with httpx2.AsyncClient(trust_env=False, verify=False) as browser:
        answer = await browser.get(await used.authorization_address(begun, BACK))
    back = httpx2.URL(answer.headers["location"])
    assert back.params["state"] == begun.state
    return str(back.params["code"])


async def test_a_login_gives_the_identity_and_the_groups(there: IdentityProvider) -> None:
    person = await log_in(there, Provider(settings_for(there)))
    assert person == Person(Identity(there.issuer, "1001", "Ada"), ("legal", "support"))


def without_signature(there: IdentityProvider, claims: dict[str, Any]) -> str:
    registry = JWSRegistry(algorithms=["none"])
    return jwt.encode({"alg": "none"}, claims, OctKey.import_key("x" * 32), registry=registry)


def signed_with_the_public_key(there: IdentityProvider, claims: dict[str, Any]) -> str:
    """By hand, because the library refuses to use a public key as a secret."""
    header = {"alg": "HS256", "kid": there.key.kid}
    parts = [base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=") for each in (header, claims)]
    proof = hmac.digest(there.key.as_pem(private=False), b".".join(parts), "sha256")
    return b".".join([*parts, base64.urlsafe_b64encode(proof).rstrip(b"=")]).decode()


def signed_with_the_client_secret(there: IdentityProvider, claims: dict[str, Any]) -> str:
    registry = JWSRegistry(algorithms=["HS256"])
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(CLIENT_SECRET), registry=registry)


def changed_after_signing(there: IdentityProvider, claims: dict[str, Any]) -> str:
    header, _, signature = signed(there, claims).split(".")
    return f"{header}.{signed(there, claims | {'groups': ['all']}).split('.')[1]}.{signature}"


@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
@pytest.mark.parametrize(
    "sign",
    [
        without_signature,
        signed_with_the_public_key,
        signed_with_the_client_secret,
        changed_after_signing,
        lambda *_: "no token",
        lambda *_: "e30.e30.e30",
        lambda *_: 5,
    ],
)
async def test_a_token_that_the_provider_did_not_sign_is_refused(sign: Sign, there: IdentityProvider) -> None:
    there.sign = sign
    with pytest.raises(RefusedError):
        await log_in(there, Provider(settings_for(there)))


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "of another attempt"},
        {"aud": "another client"},
        {"aud": [CLIENT_ID, "another client"]},  # without azp
        {"aud": [CLIENT_ID, "another client"], "azp": "another client"},
        {"aud": []},
        {"iss": "https://another.example"},
        {"exp": time.time() - 120},
        {"exp": "never"},
        {"iat": time.time() + 3_600},
        {"nbf": time.time() + 3_600},
        {"at_hash": "of another token"},
        {"sub": ""},
        {"sub": 5},
        {"sub": "a\nb"},
        {"sub": "a" * 256},
    ],
)
async def test_a_token_for_another_purpose_is_refused(claims: dict[str, Any], there: IdentityProvider) -> None:
    there.claims = claims
    with pytest.raises(RefusedError):
        await log_in(there, Provider(settings_for(there)))


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp", "iat", "nonce"])
async def test_a_token_without_a_required_claim_is_refused(name: str, there: IdentityProvider) -> None:
    there.without = name
    with pytest.raises(RefusedError):
        await log_in(there, Provider(settings_for(there)))


async def test_new_keys_of_the_provider_are_found_and_old_ones_end(there: IdentityProvider) -> None:
    used = Provider(settings_for(there))
    await log_in(there, used)
    await log_in(there, used)
    assert there.requests.count("/keys") == 1
    there.rotate()
    await log_in(there, used)
    assert there.requests.count("/keys") == 2
    former = IdentityProvider(issuer=there.issuer, key=there.key)
    former.rotate()
    there.sign = lambda _, claims: signed(former, claims)
    with pytest.raises(RefusedError):
        await log_in(there, used)


async def test_a_code_is_accepted_once_and_only_from_the_attempt_that_began_it(there: IdentityProvider) -> None:
    used, begun = Provider(settings_for(there)), attempt.begin("")
    code = await code_of(used, begun)
    await used.person(begun, BACK, code, None)
    with pytest.raises(RefusedError, match="invalid_grant"):
        await used.person(begun, BACK, code, None)
    with pytest.raises(RefusedError, match="invalid_grant"):
        await used.person(attempt.begin(""), BACK, await code_of(used, begun), None)


async def test_an_answer_of_another_issuer_is_refused(there: IdentityProvider) -> None:
    used, begun = Provider(settings_for(there)), attempt.begin("")
    with pytest.raises(RefusedError):
        await used.person(begun, BACK, await code_of(used, begun), "https://another.example")
    there.metadata = {"authorization_response_iss_parameter_supported": True}
    with pytest.raises(RefusedError):
        await log_in(there, Provider(settings_for(there)))


@pytest.mark.parametrize(
    "metadata",
    [{"issuer": "https://another.example"}, {"token_endpoint": 5}, {"jwks_uri": "none"}, {"scopes_supported": 5}],
)
async def test_metadata_that_cannot_be_used_are_named(metadata: dict[str, Any], there: IdentityProvider) -> None:
    there.metadata = metadata
    with pytest.raises(ProviderError):
        await Provider(settings_for(there)).check()


async def test_a_long_response_is_cut_off(there: IdentityProvider) -> None:
    there.padding = provider.MAX_BYTES
    with pytest.raises(ProviderError, match="exceeds"):
        await Provider(settings_for(there)).check()


async def test_a_provider_that_does_not_respond_is_given_up(
    there: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.wait = threading.Event()
    monkeypatch.setattr(provider, "CALL_SECONDS", 0.2)
    with pytest.raises(ProviderError, match=r"0\.2 s"):
        await Provider(settings_for(there)).check()


async def test_a_claim_with_one_group_and_one_of_another_name_are_read(there: IdentityProvider) -> None:
    there.claims = {"https://example.com/roles": "legal"}
    used = Provider(settings_for(there, GROUPS_CLAIM="https://example.com/roles"))
    assert (await log_in(there, used)).groups == ("legal",)


@pytest.mark.parametrize(
    ("issuer", "subject", "username", "plain"),
    [
        ("https://a.example", "1", "Ada.Lovelace@example.com", "ada.lovelace@example.com"),
        ("https://a.example", "2", "../<b>", "b-"),
        ("https://a.example", "3", "", "user"),
        ("https://a.example", "4", "a" + "é" * 100, "a" + "-" * 39),
    ],
)
def test_a_name_contains_what_identifies_the_person(issuer: str, subject: str, username: str, plain: str) -> None:
    name = Identity(issuer, subject, username).name
    assert name.split("~")[0] == plain
    assert (
        len({name, Identity(issuer, f"{subject}x", username).name, Identity(f"{issuer}x", subject, username).name})
        == 3
    )


def test_an_attempt_survives_its_cookie_and_leads_only_to_pages() -> None:
    begun = attempt.begin("/console/conversations?q=a")
    assert attempt.parse(begun.encode()) == begun
    assert len({begun.secret, begun.state, begun.nonce, begun.verifier, attempt.begin("").state}) == 5
    for address in (
        "https://example.com/console/",
        "//example.com/console/",
        "/\\example.com",
        "javascript:alert(1)",
    ):
        assert attempt.begin(address).following == "/console/"
        assert attempt.parse(Attempt(begun.secret, address).encode()) == Attempt(begun.secret, "/console/")
    for cookie in ("", ".", begun.secret, f"{begun.secret}.é", "a.b"):
        assert attempt.parse(cookie) is None or attempt.parse(cookie) == Attempt(begun.secret, "/console/")


@pytest.mark.parametrize("path", ["oidc", "oidc/callback?code=a", "login", "logout"])
def test_a_login_does_not_lead_to_a_page_that_begins_it_again(path: str) -> None:
    assert attempt.begin(f"/console/{path}").following == "/console/"


def test_the_first_group_with_a_role_decides() -> None:
    roles = console_roles.parse("legal=auditor, a=b=operator ,support=reader")
    assert roles == (("legal", "auditor"), ("a=b", "operator"), ("support", "reader"))
    assert console_roles.role_of(["support", "legal"], roles) == "auditor"
    assert console_roles.role_of(["Legal"], roles) is None


@pytest.mark.parametrize("value", ["legal", "=reader", "legal=owner", "legal=reader,legal=auditor"])
def test_roles_that_cannot_be_read_are_named(value: str) -> None:
    with pytest.raises(ValueError, match=r"GROUP=ROLE|a group twice"):
        console_roles.parse(value)


@pytest.mark.parametrize(
    "values",
    [
        {"ISSUER": "https://a.example"},
        {"CLIENT_SECRET": "secret"},
        {"ISSUER": "http://a.example", "CLIENT_ID": "a", "ROLES": "a=reader"},  # not on this machine
        {"ISSUER": "https://a.example?b", "CLIENT_ID": "a", "ROLES": "a=reader"},
    ],
)
def test_settings_of_a_provider_belong_together(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings(**{f"ARCHIVER_OIDC_{name}": value for name, value in values.items()})  # type: ignore[arg-type]


def test_without_authlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, there: IdentityProvider
) -> None:
    openid.require(settings_for(there))
    monkeypatch.setitem(sys.modules, "authlib.oidc.core", None)  # as if it were not installed
    openid.require(Settings())
    with pytest.raises(SettingsError, match=r"pip install 'callhq-archiver\[oidc\]'"):
        openid.require(settings_for(there))
    assert [each.verdict for each in examine_provider(settings_for(there))] == ["failure"]
