"""What users may change in the console: by which role, under which name, and with which confirmation."""

import html
import re
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from starlette.responses import Response

from archiver import events
from archiver.console import accounts, quarantined
from archiver.database import transaction
from archiver.ledger import quarantine
from archiver.settings.console_roles import ROLES, Role
from tests.conftest import Cluster
from tests.support import servers
from tests.support.browsing import PASSWORD, Browser, browsing, logged_in
from tests.support.erasures import record
from tests.support.feeds import publish
from tests.support.followups import receiving, sending, subscribe
from tests.support.payloads import created
from tests.support.receivers import Receiver, serving
from tests.support.waiting import until
from tests.support.webhooks import rows

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

ACTIONS: dict[str, Role] = {
    "/console/hold": "auditor",
    "/console/holds/1/release": "auditor",
    "/console/erase": "auditor",
    "/console/quarantine/1/retry": "operator",
    "/console/followups/1/pause": "operator",
    "/console/followups/1/resume": "operator",
    "/console/followups/1/test": "operator",
    "/console/followups/1/retry": "operator",
    "/console/deliveries/msg_1_1_0/retry": "operator",
}


@pytest.fixture(scope="module")
def receiver(cluster: Cluster, url: str) -> Iterator[Receiver]:
    """A receiver that lets users act, as the owner of the database, with a user of each role."""
    add_users(cluster, url)
    with serving(
        url,
        "--migrate",
        ARCHIVER_CONSOLE_ACTS="on",
        ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE="true",
        ARCHIVER_LOG_LEVEL="debug",
    ) as receiver:
        yield receiver


def add_users(cluster: Cluster, url: str) -> None:
    engine, password_hash = cluster.engine(url), accounts.hash_password(PASSWORD)
    with transaction(engine) as connection:
        for role in ROLES:
            accounts.insert_user(connection, role, role, password_hash, "test")
    engine.dispose()


@pytest.fixture(scope="module")
def auditor(receiver: Receiver) -> Iterator[Browser]:
    with logged_in(receiver.url, "auditor") as browser:
        yield browser


@pytest.fixture(scope="module")
def operator(receiver: Receiver) -> Iterator[Browser]:
    with logged_in(receiver.url, "operator") as browser:
        yield browser


def act(browser: Browser, path: str, **fields: str) -> tuple[int, str]:
    """Send the form of an action; return the status, and the redirect without its proof, or the text."""
    response = browser.send(path, token=browser.form_token("/console/"), **fields)
    if "location" not in response.headers:
        return response.status_code, response.text
    location, proofs = re.subn(r"\.[0-9a-f]{32}$", "", response.headers["location"])
    assert proofs == 1
    return response.status_code, location


def entries(url: str, kind: str) -> list[tuple[object, ...]]:
    return rows(url, f"SELECT actor, reason FROM archiver.acts WHERE kind = '{kind}' ORDER BY id")


def has_content(url: str, session_id: str) -> bool:
    query = f"SELECT count(*) FROM archiver.events WHERE session_id = '{session_id}' AND body IS NOT NULL"
    return rows(url, query) != [(0,)]


def record_turn(cluster: Cluster, url: str, session_id: str) -> None:
    engine = cluster.engine(url)
    record(engine, created(f"chat of {session_id}", session_id))
    engine.dispose()


# Who may act


@pytest.mark.parametrize("role", ROLES)
def test_an_action_is_forbidden_to_other_roles(role: Role, url: str, receiver: Receiver) -> None:
    with browsing(receiver.url) as browser:
        assert act_without_login(browser) == dict.fromkeys(ACTIONS, 401)
        browser.log_in(role)
        before = rows(url, "SELECT count(*) FROM archiver.acts WHERE kind NOT LIKE 'console.%%'")
        statuses = {path: act(browser, path)[0] for path in ACTIONS}
        assert {path for path, status in statuses.items() if status != 403} == {
            path for path, allowed in ACTIONS.items() if allowed == role
        }
        assert rows(url, "SELECT count(*) FROM archiver.acts WHERE kind NOT LIKE 'console.%%'") == before


def act_without_login(browser: Browser) -> dict[str, int]:
    return {path: browser.send(path, token="0" * 64).status_code for path in ACTIONS}


@pytest.mark.parametrize("path", ACTIONS)
def test_an_action_needs_a_form_of_this_login(path: str, auditor: Browser) -> None:
    assert auditor.send(path, token="0" * 64, reason="r").status_code == 403
    assert auditor.send(path, reason="r").status_code == 403


def test_without_the_setting_an_action_does_not_exist(cluster: Cluster, database_url: str) -> None:
    add_users(cluster, database_url)
    with serving(database_url) as receiver, browsing(receiver.url) as browser:
        browser.log_in("auditor")
        status, text = act(browser, "/console/hold", session_id="s", reason="r")
        assert status == 404
        assert "ARCHIVER_CONSOLE_ACTS=on" in text
        page = browser.get("/console/holds").text
        assert "archiver hold add" in page
        assert 'href="/console/hold"' not in page
        assert rows(database_url, "SELECT count(*) FROM archiver.holds") == [(0,)]


# Holds


def test_i8_a_hold_is_placed_and_released_under_the_name_of_the_user(url: str, auditor: Browser) -> None:
    status, location = act(auditor, "/console/hold", session_id="held-1", since="2024-01-15", reason="case 7")
    assert (status, location) == (303, "/console/holds?done=hold-placed")
    (hold,) = [row for row in auditor.get("/console/holds.json").json()["rows"] if row["session_id"] == "held-1"]
    assert hold["author"] == "auditor@console"
    assert 'action="/console/holds/' in auditor.get(f"/console/holds/{hold['id']}").text
    assert act(auditor, f"/console/holds/{hold['id']}/release", reason="")[0] == 400
    assert act(auditor, f"/console/holds/{hold['id']}/release", reason="case closed")[0] == 303
    status, text = act(auditor, f"/console/holds/{hold['id']}/release", reason="again")
    assert (status, "is not in force" in text) == (409, True)
    assert entries(url, "hold.add")[-1] == ("auditor@console", "case 7")
    assert entries(url, "hold.release")[-1] == ("auditor@console", "case closed")


@pytest.mark.parametrize(
    "fields",
    [
        {"reason": "nothing to hold"},
        {"reason": "r", "session_id": "x" * 2_000},
        {"reason": "r", "session_id": "\0"},
        {"reason": "r", "since": "yesterday"},
        {"reason": "r", "since": "2024-01-02", "until": "2024-01-01"},
        {"reason": "r" * 1_001, "session_id": "s"},
    ],
)
def test_a_hold_that_cannot_be_placed_gets_a_sentence(fields: dict[str, str], url: str, auditor: Browser) -> None:
    before = entries(url, "hold.add")
    assert act(auditor, "/console/hold", **fields)[0] in {400, 409}
    assert entries(url, "hold.add") == before


def test_a_database_user_without_the_right_gets_the_command_that_does_it(cluster: Cluster, database_url: str) -> None:
    add_users(cluster, database_url)
    with serving(database_url, ARCHIVER_CONSOLE_ACTS="on") as receiver, browsing(receiver.url) as browser:
        browser.log_in("auditor")
        status, text = act(browser, "/console/hold", session_id="s", reason="r")
        assert status == 409
        assert "archiver hold add" in text


# Erasures


def test_i8_an_erasure_shows_what_it_finds_and_needs_the_typed_id(
    cluster: Cluster, url: str, auditor: Browser
) -> None:
    record_turn(cluster, url, "erased-1")
    page = auditor.get("/console/erase?session_id=erased-1").text
    assert "<dt>Messages</dt><dd>2</dd>" in page
    assert "type <code>erased-1</code>" in page
    fields = {"session_id": "erased-1", "reason": "request of the customer"}
    assert act(auditor, "/console/erase", **fields, confirmation="erased-2")[0] == 400
    assert has_content(url, "erased-1")
    status, location = act(auditor, "/console/erase", **fields, confirmation="erased-1")
    assert (status, location) == (303, "/console/conversations/erased-1?done=erased")
    assert not has_content(url, "erased-1")
    assert "This conversation was erased" in auditor.get(location).text
    assert entries(url, "erase")[-1] == ("auditor@console", "request of the customer")
    assert "erased-1" in auditor.get("/console/erasures").text


def test_i8_a_hold_stops_an_erasure_and_the_refusal_is_recorded(cluster: Cluster, url: str, auditor: Browser) -> None:
    record_turn(cluster, url, "kept-1")
    act(auditor, "/console/hold", session_id="kept-1", reason="case 8")
    page = auditor.get("/console/erase?session_id=kept-1").text
    assert "under legal hold" in page
    assert "Erase for good" not in page
    status, text = act(auditor, "/console/erase", session_id="kept-1", reason="r", confirmation="kept-1")
    assert (status, "under legal hold" in text) == (409, True)
    assert has_content(url, "kept-1")
    assert entries(url, "erase.refused")[-1] == ("auditor@console", "r")


def test_i8_one_turn_is_erased_and_the_others_stay(cluster: Cluster, url: str, auditor: Browser) -> None:
    engine = cluster.engine(url)
    record(engine, created("turn-1", "partly"), created("turn-2", "partly"))
    engine.dispose()
    fields = {"chat_id": "turn-1", "reason": "r", "confirmation": "turn-1"}
    assert act(auditor, "/console/erase", **fields)[1] == "/console/erasures?done=erased"
    left = rows(url, "SELECT chat_id FROM archiver.events WHERE session_id = 'partly' AND body IS NOT NULL")
    assert left == [("turn-2",)]


@pytest.mark.parametrize("session_id", ["ü?#&", "<b>x</b>", "two words"])
def test_an_id_that_is_hard_to_type_is_confirmed_with_a_word(
    session_id: str, cluster: Cluster, url: str, auditor: Browser
) -> None:
    record_turn(cluster, url, session_id)
    page = auditor.client.get("/console/erase", params={"session_id": session_id}).text
    assert "type <code>erase</code>" in page
    assert act(auditor, "/console/erase", session_id=session_id, reason="r", confirmation="erase")[0] == 303
    assert not has_content(url, session_id)


# The quarantine


def quarantine_body(cluster: Cluster, url: str, body: bytes) -> int:
    engine = cluster.engine(url)
    with transaction(engine) as connection:
        delivery = events.Delivery(events.parse(body), datetime.now(UTC), "key")
        (quarantine_id,) = quarantine.upsert_quarantine(connection, [delivery], quarantine.NOT_STORABLE, "by hand")
    engine.dispose()
    return quarantine_id


def test_i4_a_quarantined_delivery_that_can_be_archived_is_archived(
    cluster: Cluster, url: str, operator: Browser
) -> None:
    quarantine_id = quarantine_body(cluster, url, created("retried-1", "retried"))
    page = operator.get(f"/console/quarantine/{quarantine_id}").text
    assert "question of retried-1" in page
    assert "archiver doctor" in page
    status, location = act(operator, f"/console/quarantine/{quarantine_id}/retry")
    assert (status, location) == (303, "/console/quarantine?done=archived")
    assert has_content(url, "retried")
    assert act(operator, f"/console/quarantine/{quarantine_id}/retry")[0] == 404
    query = "SELECT actor, detail ->> 'quarantine' FROM archiver.acts WHERE kind = 'quarantine.retry' ORDER BY id"
    assert rows(url, query) == [("operator@console", str(quarantine_id))]


def test_i4_a_quarantined_delivery_that_cannot_be_archived_stays(
    cluster: Cluster, url: str, operator: Browser
) -> None:
    body = b'{"<script>alert(1)</script>' + b"x" * 5_000
    quarantine_id = quarantine_body(cluster, url, body)
    status, location = act(operator, f"/console/quarantine/{quarantine_id}/retry")
    assert (status, location) == (303, f"/console/quarantine/{quarantine_id}?done=still-quarantined")
    page = operator.get(location).text
    assert "The body is not JSON." in page
    assert "<script>alert" not in page
    assert operator.get(f"/console/quarantine/{quarantine_id}/body").content == body
    binary = quarantine_body(cluster, url, b"\xff\x00\xfe")
    assert "ff 00 fe" in operator.get(f"/console/quarantine/{binary}").text
    viewed = rows(url, "SELECT kind, detail ->> 'quarantine' FROM archiver.acts WHERE detail ->> 'quarantine' <> ''")
    assert {("console.view", str(quarantine_id)), ("console.download", str(quarantine_id))} <= {*viewed}


def test_every_reason_has_an_explanation_and_advice(cluster: Cluster) -> None:
    del cluster
    assert {*quarantined.EXPLANATIONS} == {*quarantined.ADVICE} == {*quarantine.REASONS}


def test_a_page_says_what_an_action_of_this_login_did_and_nothing_else(
    receiver: Receiver, auditor: Browser, url: str
) -> None:
    token = auditor.form_token("/console/")
    response = auditor.send("/console/hold", token=token, session_id="said-1", reason="case 9")
    address = response.headers["location"]
    said = "The hold is in force."
    assert said in auditor.get(address).text
    _, proof = address.split(".")
    for crafted in ("hold-placed", "hold-placed.", f"hold-placed.{'0' * 32}", f"erased.{proof}", "hold-placed.é"):
        page = auditor.client.get("/console/holds", params={"done": crafted})
        assert page.status_code == 200
        assert 'class="done"' not in page.text
    with logged_in(receiver.url, "auditor") as other:
        assert said not in other.get(address).text


# Follow-ups


def test_an_operator_pauses_resumes_and_tests_a_subscription(cluster: Cluster, url: str, operator: Browser) -> None:
    engine = cluster.engine(url)
    with receiving() as receiver:
        path = f"/console/followups/{subscribe(engine, receiver.url)}"
        assert act(operator, f"{path}/pause", reason="maintenance") == (303, f"{path}?done=paused")
        assert "maintenance" in operator.get(path).text
        assert act(operator, f"{path}/resume") == (303, f"{path}?done=resumed")
        assert act(operator, f"{path}/test") == (303, f"{path}?done=test-accepted")
        assert [each.payload["type"] for each in receiver.got] == ["followups.test"]
        receiver.always(503)
        status, text = act(operator, f"{path}/test")
        assert (status, "returned 503 (not_2xx)" in text) == (409, True)
    engine.dispose()
    assert entries(url, "followups.pause") == [("operator@console", "maintenance")]
    assert entries(url, "followups.resume") == [("operator@console", None)]
    assert entries(url, "followups.test") == [("operator@console", None)] * 2
    assert act(operator, "/console/followups/999/pause")[0] == 409


def test_an_operator_sees_a_delivery_and_retries_it(cluster: Cluster, url: str, operator: Browser) -> None:
    engine = cluster.engine(url)
    record(engine, created("followed-1", "followed"))
    publish(engine)
    with receiving() as receiver:
        receiver.always(Response("<script>alert(1)</script>", 503))
        subscription_id = subscribe(engine, receiver.url, "chat.created")
        with sending(url):
            until(lambda: bool(attempts(url)), "there is an attempt")
    engine.dispose()
    page = operator.get(f"/console/followups/{subscription_id}").text
    links = re.findall(r'href="(/console/deliveries/\w+)"', page)
    assert links
    delivery = next(text for text in (operator.get(link).text for link in links) if "followed-1" in text)
    assert '"content":"question of followed-1"' in html.unescape(delivery)
    assert "not_2xx" in delivery
    assert "<script>alert" not in delivery
    assert act(operator, f"{links[0]}/retry") == (303, f"{links[0]}?done=retried")
    assert act(operator, f"/console/followups/{subscription_id}/retry")[0] == 303
    assert entries(url, "followups.retry")[-1] == ("operator@console", None)
    assert act(operator, f"/console/deliveries/msg_{subscription_id}_99999_0/retry")[0] == 409
    assert operator.get("/console/deliveries/nonsense").status_code == 404


def attempts(url: str) -> list[tuple[object, ...]]:
    return rows(url, "SELECT 1 FROM archiver.attempts WHERE status = 503")


# The parts of the pages, in development


def test_the_page_of_the_parts_shows_them_to_developers(auditor: Browser) -> None:
    page = auditor.get("/console/style")
    assert page.status_code == 200
    assert all(each in page.text for each in ("Colours", "Badges", "U+202E", 'class="bar"', "A deleted answer"))
