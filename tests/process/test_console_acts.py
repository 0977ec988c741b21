"""What users may change in the console: by which role, under which name, and with which confirmation."""

from collections.abc import Iterator

import pytest

from archiver.console import accounts
from archiver.console.accounts import ROLES, Role
from archiver.database import transaction
from tests.conftest import Cluster
from tests.support import servers
from tests.support.browsing import PASSWORD, Browser, browsing
from tests.support.erasures import record
from tests.support.payloads import created
from tests.support.receivers import Receiver, serving
from tests.support.webhooks import rows

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

ACTIONS: dict[str, Role] = {
    "/console/hold": "auditor",
    "/console/holds/1/release": "auditor",
    "/console/erase": "auditor",
}


@pytest.fixture(scope="module")
def receiver(cluster: Cluster, url: str) -> Iterator[Receiver]:
    """A receiver that lets users act, as the owner of the database, with a user of each role."""
    add_users(cluster, url)
    with serving(url, "--migrate", ARCHIVER_CONSOLE_ACTS="on") as receiver:
        yield receiver


def add_users(cluster: Cluster, url: str) -> None:
    engine, password_hash = cluster.engine(url), accounts.hash_password(PASSWORD)
    with transaction(engine) as connection:
        for role in ROLES:
            accounts.insert_user(connection, role, role, password_hash, "test")
    engine.dispose()


@pytest.fixture(scope="module")
def auditor(receiver: Receiver) -> Iterator[Browser]:
    with browsing(receiver.url) as browser:
        assert browser.log_in("auditor").status_code == 303
        yield browser


def act(browser: Browser, path: str, **fields: str) -> tuple[int, str]:
    """Send the form of an action; return the status, and the redirect or the text."""
    response = browser.send(path, token=browser.form_token("/console/"), **fields)
    return response.status_code, response.headers.get("location", response.text)


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
    assert "The hold is in force." in auditor.get(location).text
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
