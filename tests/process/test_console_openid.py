"""A login with a provider of OpenID Connect, over real sockets: who gets in, as whom, and what others read."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from archiver.console import accounts
from archiver.database import transaction
from tests.conftest import Cluster
from tests.support import servers
from tests.support.browsing import PASSWORD, Browser, browsing
from tests.support.identity_providers import CLIENT_ID, CLIENT_SECRET, IdentityProvider, identity_provider
from tests.support.receivers import Receiver, archiver, serving
from tests.support.waiting import until
from tests.support.webhooks import rows

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

BEGIN = "/console/oidc"
_visitors = count(1)


@pytest.fixture(scope="module")
def running() -> Iterator[IdentityProvider]:
    with identity_provider() as provider:
        yield provider


@pytest.fixture
def provider(running: IdentityProvider) -> IdentityProvider:
    """The provider, at which Ada is logged in, of a group that is the reader here."""
    running.person = {"sub": "1001", "preferred_username": "ada", "groups": ["staff", "support"]}
    running.claims, running.is_down, running.wait = {}, False, None
    return running


def settings_for(provider: IdentityProvider) -> dict[str, str]:
    values = {"ISSUER": provider.issuer, "CLIENT_ID": CLIENT_ID, "CLIENT_SECRET": CLIENT_SECRET}
    values["ROLES"] = "legal=auditor,support=reader"
    return {f"ARCHIVER_OIDC_{name}": value for name, value in values.items()}


@pytest.fixture(scope="module")
def receiver(cluster: Cluster, url: str, running: IdentityProvider) -> Iterator[Receiver]:
    engine, password_hash = cluster.engine(url), accounts.hash_password(PASSWORD)
    with transaction(engine) as connection:
        accounts.insert_user(connection, "ada", "operator", password_hash, "test")
    engine.dispose()
    with serving(url, **settings_for(running)) as receiver:
        yield receiver


@pytest.fixture
def browser(receiver: Receiver) -> Iterator[Browser]:
    """A browser at an address of its own, behind a proxy on this machine."""
    with browsing(receiver.url, {"x-forwarded-for": f"192.0.2.{next(_visitors)}"}) as browser:
        yield browser


def answer_of(browser: Browser, following: str = "") -> str:
    """Go to the provider; return the address to which it leads back, below that of the receiver."""
    there = browser.get(f"{BEGIN}?next={following}").headers["location"]
    back = urlsplit(httpx2.get(there, trust_env=False).headers["location"])
    assert f"http://{back.netloc}" == str(browser.client.base_url)
    return f"{back.path}?{back.query}"


def log_in(browser: Browser, following: str = "") -> httpx2.Response:
    return browser.get(answer_of(browser, following))


def test_a_login_leads_to_the_wanted_page_with_the_role_of_the_first_group(
    provider: IdentityProvider, browser: Browser, url: str
) -> None:
    assert f'href="{BEGIN}?next=' in browser.get("/console/login").text
    begun = browser.get(f"{BEGIN}?next=/console/conversations")
    asked = parse_qs(urlsplit(begun.headers["location"]).query)
    assert asked["scope"] == ["openid groups profile"]
    assert begun.headers["set-cookie"].lower().endswith("httponly; max-age=600; path=/console/oidc; samesite=lax")
    response = log_in(browser, "/console/conversations")
    assert response.status_code == 200
    assert '<meta http-equiv="refresh" content="0; url=/console/conversations">' in response.text
    cookies = {each.partition("=")[0]: each for each in response.headers.get_list("set-cookie")}
    assert cookies["archiver_console"].lower().endswith("; httponly; path=/console; samesite=strict")
    assert "max-age=0" in cookies["archiver_console_oidc"].lower()
    page = browser.get("/console/conversations")
    name = accounts.Identity(provider.issuer, "1001", "ada").name
    assert f'{name} <span class="quiet">(reader)</span>' in page.text
    assert browser.get("/console/audit").status_code == 403
    entry = rows(url, "SELECT actor, detail FROM archiver.acts WHERE kind = 'console.login' ORDER BY id DESC LIMIT 1")
    assert entry == [(f"{name}@console", {"issuer": provider.issuer, "subject": "1001", "role": "reader"})]


def test_over_tls_the_cookies_and_the_address_to_lead_back_to_are_of_tls(
    provider: IdentityProvider, browser: Browser
) -> None:
    begun = browser.client.get(BEGIN, headers={"x-forwarded-proto": "https", "host": "archive.example"})
    asked = parse_qs(urlsplit(begun.headers["location"]).query)
    assert asked["redirect_uri"] == ["https://archive.example/console/oidc/callback"]
    assert "secure" in begun.headers["set-cookie"].lower()
    assert browser.client.get(BEGIN, headers={"host": "a/b@c"}).status_code == 400


def test_a_user_with_a_password_and_the_same_name_is_another_user(
    provider: IdentityProvider, browser: Browser, url: str
) -> None:
    query = "SELECT role, password_hash FROM archiver.users WHERE name = 'ada'"
    before = rows(url, query)
    assert log_in(browser).status_code == 200
    assert rows(url, query) == before
    assert browser.get("/console/followups").status_code == 403  # as the operator would not
    name = accounts.Identity(provider.issuer, "1001", "ada").name
    with browsing(str(browser.client.base_url), {"x-forwarded-for": "198.51.100.1"}) as other:
        assert other.log_in(name, "").status_code == 401
        assert other.log_in("ada").status_code == 303


def test_a_person_with_another_subject_and_the_same_username_is_another_user(
    provider: IdentityProvider, browser: Browser, url: str
) -> None:
    assert log_in(browser).status_code == 200
    provider.person |= {"sub": "1002", "groups": ["legal"]}
    assert log_in(browser).status_code == 200
    query = "SELECT subject, role FROM archiver.users WHERE subject IN ('1001', '1002') ORDER BY subject"
    assert rows(url, query) == [("1001", "reader"), ("1002", "auditor")]


def test_a_user_without_a_group_that_has_a_role_is_refused_and_earlier_logins_end(
    provider: IdentityProvider, browser: Browser, receiver: Receiver
) -> None:
    provider.person |= {"sub": "1003"}
    assert log_in(browser).status_code == 200
    provider.person |= {"groups": ["staff"]}
    with browsing(receiver.url, {"x-forwarded-for": "198.51.100.2"}) as other:
        refused = log_in(other)
        assert refused.status_code == 403
        assert "none of your groups has a role" in refused.text
        assert "archiver_console=" not in refused.headers.get("set-cookie", "")
    assert browser.get("/console/").status_code == 303
    assert "no group with a role" in receiver.stderr()


def test_another_group_gives_another_role_at_the_next_login(
    provider: IdentityProvider, browser: Browser, url: str
) -> None:
    provider.person |= {"sub": "1004"}
    assert log_in(browser).status_code == 200
    assert browser.get("/console/audit").status_code == 403
    provider.person |= {"groups": ["support", "legal"], "preferred_username": "countess"}
    assert log_in(browser).status_code == 200
    assert browser.get("/console/audit").status_code == 200
    assert rows(
        url, "SELECT count(*), max(role), min(name) LIKE 'ada~%%' FROM archiver.users WHERE subject = '1004'"
    ) == [(1, "auditor", True)]


def test_a_disabled_user_is_refused_and_has_no_password_to_set(
    provider: IdentityProvider, browser: Browser, url: str, tmp_path: Path
) -> None:
    provider.person |= {"sub": "1005"}
    assert log_in(browser).status_code == 200
    name = accounts.Identity(provider.issuer, "1005", "ada").name
    assert archiver("users", "disable", name, database_url=url).returncode == 0
    assert browser.get("/console/").status_code == 303
    refused = log_in(browser)
    assert (refused.status_code, "disabled" in refused.text) == (403, True)
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    reset = archiver("users", "reset", name, "--password-file", str(file), database_url=url)
    assert (reset.returncode, "no password" in reset.stderr) == (1, True)
    listed = json.loads(archiver("users", "list", "--json", database_url=url).stdout)
    assert [each["issuer"] for each in listed if each["name"] == name] == [provider.issuer]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda answer: answer.replace("state=", "state=x"), 400),
        (lambda answer: re.sub("state=[^&]*", "", answer), 400),
        (lambda answer: re.sub("code=[^&]*", "code=guessed", answer), 403),
        (lambda answer: re.sub("code=[^&]*", "", answer), 403),
        (lambda answer: f"{answer}&code=another", 403),
        (lambda answer: f"{answer}&iss=https://another.example", 403),
        (lambda answer: f"{answer}&error=access_denied", 403),
    ],
)
def test_a_changed_answer_logs_no_one_in(change, status: int, provider: IdentityProvider, browser: Browser) -> None:
    response = browser.get(change(answer_of(browser)))
    assert response.status_code == status
    assert "archiver_console=" not in response.headers.get("set-cookie", "")
    assert browser.get("/console/").status_code == 303


def test_an_answer_in_another_browser_or_again_logs_no_one_in(
    provider: IdentityProvider, browser: Browser, receiver: Receiver
) -> None:
    answer = answer_of(browser)
    with browsing(receiver.url, {"x-forwarded-for": "198.51.100.3"}) as other:
        assert other.get(answer).status_code == 400
        log_in(other)
        assert other.get(answer).status_code == 400
    attempt = browser.client.cookies["archiver_console_oidc"]
    assert browser.get(answer).status_code == 200
    browser.client.cookies.clear()
    browser.client.cookies.set("archiver_console_oidc", attempt, path="/console/oidc")
    assert browser.get(answer).status_code == 403


def test_an_earlier_login_of_the_browser_ends_and_no_token_is_taken_over(
    provider: IdentityProvider, browser: Browser
) -> None:
    log_in(browser)
    first = browser.client.cookies["archiver_console"]
    log_in(browser)
    assert browser.client.cookies["archiver_console"] != first
    browser.client.cookies.clear()
    browser.client.cookies.set("archiver_console", first, path="/console")
    assert browser.get("/console/").status_code == 303


@pytest.mark.parametrize("following", ["https://example.com/", "//example.com/", "/\\example.com", "/metrics"])
def test_a_login_leads_to_no_other_site(following: str, provider: IdentityProvider, browser: Browser) -> None:
    assert 'content="0; url=/console/"' in log_in(browser, following).text


def test_after_wrong_codes_an_address_waits(provider: IdentityProvider, browser: Browser) -> None:
    answers = [browser.get(re.sub("code=[^&]*", "code=guessed", answer_of(browser))).status_code for _ in range(5)]
    assert answers == [403] * 5
    refused = browser.get(BEGIN)
    assert (refused.status_code, refused.headers["retry-after"].isdecimal()) == (429, True)


def test_without_the_provider_a_page_has_an_id_that_is_in_the_log_and_passwords_work(
    cluster: Cluster, url: str, provider: IdentityProvider, browser: Browser, receiver: Receiver
) -> None:
    answer = answer_of(browser)
    provider.is_down = True
    refused = browser.get(answer)
    assert refused.status_code == 503
    number = re.search("id ([0-9a-f]{8})", refused.text)
    assert number is not None
    lines = [json.loads(line) for line in receiver.stderr().splitlines() if number[1] in line]
    assert [(line["event"], line["issuer"]) for line in lines] == [("identity provider unavailable", provider.issuer)]
    assert browser.log_in("ada").status_code == 303


def test_doctor_names_a_provider_that_does_not_respond(provider: IdentityProvider, url: str) -> None:
    def finding() -> dict[str, str]:
        process = archiver("doctor", "--json", database_url=url, **settings_for(provider))
        found: dict[str, str] = next(each for each in json.loads(process.stdout) if each["check"] == "OpenID Connect")
        return found

    assert finding()["verdict"] == "ok"
    provider.is_down = True
    assert finding()["verdict"] == "failure"


def test_a_slow_provider_keeps_no_other_page_waiting(
    provider: IdentityProvider, browser: Browser, receiver: Receiver
) -> None:
    answer, provider.wait = answer_of(browser), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(browser.get, answer)
        until(lambda: provider.held == 1, "the exchange of the code is held back")
        assert receiver.get("/healthz").status_code == 200
        with browsing(receiver.url, {"x-forwarded-for": "198.51.100.4"}) as other:
            assert other.log_in("ada").status_code == 303
        assert not waiting.done()
        provider.wait.set()
        assert waiting.result().status_code == 200
