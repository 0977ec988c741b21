"""The console over real sockets: logins, what each role sees, what is recorded, and injection."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import quote

import httpx2
import psycopg
import pytest

from archiver.console import lists
from archiver.console.permissions import GRANTED, Permission
from archiver.settings.console_roles import ROLES, Role
from tests.conftest import Cluster
from tests.support import processes, servers
from tests.support.browsing import PASSWORD, Browser, browsing, logged_in
from tests.support.commands import failed
from tests.support.erasures import record
from tests.support.feeds import publish
from tests.support.files import whole_lines
from tests.support.payloads import SECRET, created
from tests.support.receivers import Receiver, archiver, serving
from tests.support.waiting import until
from tests.support.webhooks import rows

# What is tested here stands in front of Postgres: one version of it is enough.
pytestmark = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
SESSION = f"session {MARKUP}"
PAGES: dict[str, Permission] = {
    "/console/": "figures",
    **{f"/console/{each.path}": each.permission for each in lists.LISTINGS},
    "/console/settings": "operation",
    "/console/conversations/session-1": "content",
    "/console/events/1": "evidence",
    "/console/events/1/body": "evidence",
    "/console/proofs/1": "evidence",
    "/console/quarantine/1": "bodies",
    "/console/quarantine/1/body": "bodies",
}


@pytest.fixture(scope="module")
def receiver(cluster: Cluster, url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """A receiver with a user of each role, two conversations, and a seal."""
    file = tmp_path_factory.mktemp("console") / "password"
    file.write_text(f"{PASSWORD}\n")
    for role in ROLES:
        add(url, file, role, role)
    with serving(url) as receiver:
        assert receiver.post(created("chat-1", "session-1")).status_code == 200
        fields: dict[str, Any] = {"input": f"\u202e{MARKUP}", "sessionName": MARKUP, "assistantId": MARKUP}
        assert receiver.post(created(f"chat {MARKUP}", SESSION, **fields)).status_code == 200
        assert receiver.post(b"{").status_code == 422
        assert archiver("seal", database_url=url).returncode == 0
        engine = cluster.engine(url)
        publish(engine)
        engine.dispose()
        yield receiver


def add(url: str, file: Path, name: str, role: Role) -> None:
    process = archiver("users", "add", name, "--role", role, "--password-file", str(file), database_url=url)
    assert process.returncode == 0, process.stderr


@pytest.fixture
def browser(receiver: Receiver) -> Iterator[Browser]:
    with browsing(receiver.url) as browser:
        yield browser


@pytest.fixture(scope="module")
def auditor(receiver: Receiver) -> Iterator[Browser]:
    """A browser in which the auditor stays logged in."""
    with logged_in(receiver.url, "auditor") as browser:
        yield browser


def execute(url: str, statement: LiteralString) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


# Who gets in


@pytest.mark.parametrize("path", PAGES)
def test_without_a_login_every_page_leads_to_the_login_page(path: str, browser: Browser) -> None:
    response = browser.get(path)
    assert response.status_code == 303
    assert response.headers["location"].startswith("/console/login")
    assert not response.text


@pytest.mark.parametrize(
    "path", [f"/console/{each.path}.{form}" for each in lists.LISTINGS for form in ("json", "csv")]
)
def test_without_a_login_a_twin_is_refused(path: str, browser: Browser) -> None:
    assert browser.get(path).status_code == 401


def test_a_login_leads_back_to_the_wanted_page(browser: Browser) -> None:
    wanted = browser.get("/console/conversations?q=coverage:open").headers["location"]
    assert "coverage" in browser.get(wanted).text
    response = browser.log_in("reader", following="/console/conversations?q=coverage:open")
    assert (response.status_code, response.headers["location"]) == (303, "/console/conversations?q=coverage:open")


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example/console/",
        "/\\evil.example",
        "javascript:alert(1)",
        "/webhooks",
        "/console/\n",
    ],
)
def test_a_login_leads_to_no_other_place(elsewhere: str, browser: Browser) -> None:
    assert browser.log_in("reader", following=elsewhere).headers["location"] == "/console/"


def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(browser: Browser) -> None:
    responses = [browser.log_in("reader", "wrong password"), browser.log_in("unknown", PASSWORD)]
    assert [each.status_code for each in responses] == [401, 401]
    assert responses[0].text == responses[1].text
    assert "archiver_console=" not in str(responses[0].headers)


def test_i12_after_five_wrong_passwords_a_name_waits_and_others_do_not(browser: Browser) -> None:
    for _ in range(5):
        assert browser.log_in("guessed", "wrong password").status_code == 401
    response = browser.log_in("guessed", "wrong password")
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 300
    assert browser.log_in("viewer").status_code == 303


def test_the_cookie_is_hidden_from_scripts_and_other_sites(receiver: Receiver, browser: Browser) -> None:
    cookie = browser.log_in("reader").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/console" in cookie
    assert "Secure" not in cookie
    with browsing(receiver.url, {"x-forwarded-proto": "https"}) as behind_tls:
        assert "Secure" in behind_tls.get("/console/login").headers["set-cookie"]


def test_a_login_begins_with_a_new_token(browser: Browser) -> None:
    browser.client.cookies.set("archiver_console", "a-token-of-an-attacker", path="/console")
    browser.log_in("reader")
    tokens = [each.value for each in browser.client.cookies.jar if each.name == "archiver_console"]
    assert len(set(tokens)) == len(tokens)
    with browsing(str(browser.client.base_url)) as attacker:
        attacker.client.cookies.set("archiver_console", "a-token-of-an-attacker", path="/console")
        assert attacker.get("/console/").status_code == 303


def test_logging_out_ends_the_login_everywhere(receiver: Receiver, browser: Browser) -> None:
    browser.log_in("reader")
    with browsing(receiver.url) as copy:
        copy.client.cookies.update(browser.client.cookies)
        assert copy.get("/console/").status_code == 200
        response = browser.send("/console/logout", token=browser.form_token("/console/"))
        assert (response.status_code, response.headers["location"]) == (303, "/console/login")
        assert copy.get("/console/").status_code == 303


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_a_form_of_another_site_is_refused(token: str, auditor: Browser) -> None:
    assert auditor.send("/console/logout", token=token).status_code == 403
    assert auditor.get("/console/").status_code == 200


def test_another_site_cannot_log_its_visitor_in(browser: Browser) -> None:
    response = browser.send("/console/login", token="0" * 64, name="reader", password=PASSWORD)
    assert response.status_code == 403
    assert browser.get("/console/").status_code == 303


def test_a_form_is_bounded(browser: Browser) -> None:
    browser.get("/console/login")
    assert browser.send("/console/login", token="0" * 64, name="x" * 20_000).status_code == 413


def test_a_disabled_user_is_out_at_once_and_a_new_password_ends_the_logins(
    receiver: Receiver, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    add(url, file, "leaving", "reader")
    with browsing(receiver.url) as browser:
        assert browser.log_in("leaving").status_code == 303
        file.write_text("another good password")
        reset = archiver("users", "reset", "leaving", "--password-file", str(file), database_url=url)
        assert reset.returncode == 0, reset.stderr
        assert browser.get("/console/").status_code == 303
        assert browser.log_in("leaving").status_code == 401
        assert browser.log_in("leaving", "another good password").status_code == 303
        assert archiver("users", "disable", "leaving", database_url=url).returncode == 0
        assert browser.get("/console/").status_code == 303
        assert browser.log_in("leaving", "another good password").status_code == 401


def test_the_console_can_be_off(database_url: str) -> None:
    with serving(database_url, ARCHIVER_CONSOLE="off") as receiver:
        assert receiver.get("/console/").status_code == 404
        assert receiver.get("/console/login").status_code == 404


# What each role sees


@pytest.mark.parametrize("role", ROLES)
def test_each_role_sees_its_pages_and_no_others(role: Role, browser: Browser) -> None:
    browser.log_in(role)
    expected = {path: 200 if permission in GRANTED[role] else 403 for path, permission in PAGES.items()}
    assert {path: browser.get(path).status_code for path in PAGES} == expected


@pytest.mark.parametrize("form", ["", ".json", ".csv"])
def test_a_viewer_sees_no_content(form: str, browser: Browser) -> None:
    browser.log_in("viewer")
    response = browser.get(f"/console/conversations{form}")
    assert "session-1" in response.text
    assert "question of" not in response.text
    browser.log_in("reader")
    assert "question of" in browser.get(f"/console/conversations{form}").text


def test_a_viewer_cannot_find_out_content_by_filtering(browser: Browser) -> None:
    browser.log_in("viewer")
    response = browser.get("/console/conversations.json?q=question")
    assert response.status_code == 400
    assert "session-1" not in response.text


def test_every_response_has_the_headers_that_protect_it(auditor: Browser) -> None:
    for path in [*PAGES, "/console/login", "/console/nothing", "/console/audit.csv", "/console/static/console.js"]:
        headers = auditor.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        is_public = path.startswith("/console/static/")
        assert headers["cache-control"] == ("public, max-age=31536000, immutable" if is_public else "no-store")


# Addresses and content that a page cannot contain as they are


@pytest.mark.parametrize(
    "path", ["events/" + "9" * 5_000, "events/" + "9" * 20, "events/-1", "proofs/x", "proofs/1.json/"]
)
def test_an_address_that_names_nothing_gets_a_page(path: str, auditor: Browser) -> None:
    response = auditor.get(f"/console/{path}")
    assert response.status_code == 404
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["audit?kind=%00", "quarantine?reason=%00", "conversations/%00", "audit?after=%FF"])
def test_i12_characters_that_postgres_has_not_get_a_page_and_no_fault(path: str, auditor: Browser) -> None:
    assert auditor.get(f"/console/{path}").status_code in {400, 404}


@pytest.mark.parametrize("session_id", [".", "..", "a/b", "a%2Fb", "line\nbreak", "ü ?#&"])
def test_the_list_leads_to_every_conversation(session_id: str, cluster: Cluster, url: str, auditor: Browser) -> None:
    engine = cluster.engine(url)
    record(engine, created(f"chat of {session_id}", session_id))
    publish(engine)
    engine.dispose()
    page = auditor.client.get("/console/conversations", params={"q": f'session:"{session_id}"'}).text
    links = re.findall(r'href="(/console/conversations?[/?][^"]+)"', page)
    (link,) = [html.unescape(each) for each in links if "after" not in each and "q=" not in each]
    response = auditor.get(link)
    assert response.status_code == 200
    assert html.escape(f"question of chat of {session_id}".split("\n")[0]) in response.text


def test_i12_a_page_shows_a_part_of_a_huge_message(cluster: Cluster, url: str, auditor: Browser) -> None:
    engine = cluster.engine(url)
    record(engine, created("huge", "huge", input="\u200b" * 300_000 + "x" * 300_000))
    engine.dispose()
    response = auditor.get("/console/conversations/huge")
    assert response.status_code == 200
    assert len(response.content) < 50_000
    assert "600,000 characters" in response.text
    assert "U+200B, 1,000 times" in response.text


# The pages in a process of their own


def test_the_console_alone_has_the_pages_and_no_webhook_and_reads_its_files_again(
    url: str, database_url: str, receiver: Receiver, tmp_path: Path
) -> None:
    del receiver  # it has the users
    log, file = tmp_path / "log", tmp_path / "url"
    file.write_text(url)
    environment = {"DATABASE_URL_FILE": str(file), "ARCHIVER_READ_DATABASE_URL": url, "ARCHIVER_LOG_FORMAT": "json"}
    command = ["console", "--port", "0"]
    process = processes.start(command, os.environ | environment, stdout=log, stderr=log, is_apart=True)
    try:
        until(lambda: "console started" in whole_lines(log), "the console has started")
        (line,) = [line for line in whole_lines(log).splitlines() if "console started" in line]
        address = json.loads(line)["url"].removesuffix("/console/")
        with browsing(address) as browser:
            until(lambda: _answers(browser), "the console answers")
            assert browser.log_in("reader").status_code == 303
            assert "question of" in browser.get("/console/conversations/session-1").text
            assert browser.send("/webhooks/callhq").status_code == 404
            file.write_text(database_url)  # which has no logins
            process.send_signal(signal.SIGHUP)
            until(lambda: "settings reloaded" in whole_lines(log), "the console has read its files again")
            assert browser.get("/console/").status_code == 303
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def _answers(browser: Browser) -> bool:
    with suppress(httpx2.TransportError):
        return browser.get("/console/login").status_code == 200
    return False


# What is recorded


def test_every_view_of_content_is_in_the_audit_log_before_it_is_sent(url: str, auditor: Browser) -> None:
    for path in (
        "/console/conversations/session-1",
        "/console/conversations?q=secretword",
        "/console/conversations.csv",
        "/console/events/1",
        "/console/events/1/body",
    ):
        assert auditor.get(path).status_code == 200
    query = "SELECT kind, detail FROM archiver.acts WHERE actor = 'auditor@console' ORDER BY id DESC LIMIT 5"
    assert rows(url, query)[::-1] == [
        ("console.view", {"session_id": "session-1"}),
        ("console.search", {"list": "conversations", "fields": ["words"]}),
        ("console.download", {"list": "conversations", "fields": []}),
        ("console.view", {"event": 1}),
        ("console.download", {"event": 1}),
    ]
    assert rows(url, "SELECT count(*) FROM archiver.acts WHERE detail::text LIKE '%%secretword%%'") == [(0,)]


def test_no_content_is_sent_if_the_view_cannot_be_recorded(database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    add(database_url, file, "reader", "reader")
    with serving(database_url) as receiver, browsing(receiver.url) as browser:
        receiver.post(created())
        browser.log_in("reader")
        execute(database_url, "ALTER TABLE archiver.acts RENAME TO elsewhere")
        response = browser.get("/console/conversations/session-1")
        execute(database_url, "ALTER TABLE archiver.elsewhere RENAME TO acts")
        assert response.status_code == 503
        assert "question of" not in response.text
        assert browser.get("/console/conversations/session-1").status_code == 200


# What cannot be injected


def test_content_and_ids_are_text_and_never_markup(auditor: Browser) -> None:
    link = json.loads(auditor.get("/console/conversations.json").content)["rows"]
    assert SESSION in [row["session_id"] for row in link]
    for path in [*PAGES, f"/console/conversations/{quoted(SESSION)}", f"/console/conversations?q={quoted(MARKUP)}"]:
        text = auditor.get(path).text
        assert "<script>alert" not in text
        assert "<img" not in text
    page = auditor.get(f"/console/conversations/{quoted(SESSION)}").text
    assert "<script>alert" in html.unescape(page)
    assert "U+202E" in page
    assert "\u202e" not in page


def quoted(text: str) -> str:
    return quote(text, safe="")


@pytest.mark.parametrize(
    "q",
    [
        "coverage:nonsense",
        "cost>lots",
        "cost:1e999999999",
        "after:yesterday",
        '"unclosed',
        "foo:bar",
        "deleted:maybe",
        "after>2024-01-01",
        "session:",
        "x" * 1001,
        " ".join("x" * 21),
    ],
)
def test_a_filter_that_cannot_be_understood_gets_a_sentence(q: str, auditor: Browser) -> None:
    response = auditor.client.get("/console/conversations", params={"q": q})
    assert response.status_code == 400
    assert 'role="alert"' in response.text


@pytest.mark.parametrize("q", ["'; DROP TABLE archiver.chats; --", "%' OR 1=1 --", ":f0", "\0", "session:%", "a\\"])
def test_a_filter_is_a_value_and_never_sql(q: str, auditor: Browser) -> None:
    response = auditor.client.get("/console/conversations.json", params={"q": q})
    assert response.status_code == 200, response.text
    if q != "\0":
        assert response.json()["rows"] == []


@pytest.mark.parametrize("after", ["x", "-1", "9" * 30, "2024-01-15", "²", "1; --"])
def test_a_wrong_key_of_a_page_gets_an_answer(after: str, auditor: Browser) -> None:
    for each in lists.LISTINGS:
        if each.permission in GRANTED["auditor"]:
            response = auditor.client.get(f"/console/{each.path}.json", params={"after": after})
            assert response.status_code in {200, 400}, (each.path, response.text)


# Evidence


def test_the_bytes_of_an_event_are_exact(url: str, auditor: Browser) -> None:
    ((event_id, body),) = rows(url, "SELECT id, body FROM archiver.events WHERE chat_id = 'chat-1'")
    response = auditor.get(f"/console/events/{event_id}/body")
    assert response.content == body
    assert response.headers["content-type"] == "application/octet-stream"
    assert "attachment" in response.headers["content-disposition"]


def test_the_script_of_the_proof_page_checks_its_proof(auditor: Browser, tmp_path: Path) -> None:
    page = auditor.get("/console/proofs/1").text
    script = html.unescape(page.split('<pre class="bytes" tabindex="0">', 1)[1].split("</pre>", 1)[0])
    proof = auditor.get("/console/proofs/1.json").content
    (tmp_path / "check_proof.py").write_text(script)
    command = [sys.executable, str(tmp_path / "check_proof.py")]
    process = subprocess.run(command, input=proof, capture_output=True, check=False)
    assert process.returncode == 0, process.stderr
    assert b"event 1 is in seal 1" in process.stdout
    changed = proof.replace(b'"index":0', b'"index":1')
    assert changed != proof
    assert subprocess.run(command, input=changed, capture_output=True, check=False).returncode != 0


# Settings


def test_the_settings_page_shows_no_secret(browser: Browser) -> None:
    browser.log_in("operator")
    response = browser.get("/console/settings.json")
    values = {row["name"]: row["value"] for row in response.json()["rows"]}
    assert values["ARCHIVER_WEBHOOK_SECRETS"] == values["DATABASE_URL"] == "set (secret)"
    assert values["ARCHIVER_WEBHOOK_SCHEME"] == "secret"
    assert SECRET not in browser.get("/console/settings").text + response.text


def test_an_operator_sees_the_findings_of_doctor(browser: Browser) -> None:
    browser.log_in("operator")
    assert 'href="/console/doctor"' in browser.get("/console/settings").text
    page = browser.get("/console/doctor")
    assert page.status_code == 200
    assert "Reached " in page.text
    assert SECRET not in page.text


def test_a_page_that_refreshes_itself_keeps_no_login_alive(url: str, browser: Browser) -> None:
    browser.log_in("operator")
    minutes = (
        "SELECT round(extract(epoch FROM now() - seen_at) / 60) FROM archiver.logins WHERE user_name = 'operator'"
    )
    execute(url, "UPDATE archiver.logins SET seen_at = now() - interval '20 min' WHERE user_name = 'operator'")
    page = browser.get("/console/followups?refresh=5").text
    assert 'data-seconds="5"' in page
    assert 'href="/console/followups?refresh=15"' in page
    assert {20} == {int(row[0]) for row in rows(url, minutes)}
    browser.get("/console/followups")
    assert 0 in {int(row[0]) for row in rows(url, minutes)}
    assert "data-seconds" not in browser.get("/console/conversations?refresh=5").text  # each view would be recorded


# The command


def test_a_user_is_added_once_with_a_good_name_and_password(url: str, receiver: Receiver, tmp_path: Path) -> None:
    del receiver
    file = tmp_path / "password"
    file.write_text(PASSWORD)

    def attempt(*arguments: str) -> str:
        return failed(archiver("users", *arguments, database_url=url))

    given = ("--password-file", str(file))
    assert "user reader exists" in attempt("add", "reader", "--role", "reader", *given)
    assert "cannot be a user name" in attempt("add", "A B", "--role", "reader", *given)
    assert "no user 'missing'" in attempt("reset", "missing", *given)
    assert "no user 'missing'" in attempt("disable", "missing")
    file.write_text("short")
    assert "12 to 1,024 characters; this one has 5" in attempt("add", "new", "--role", "reader", *given)
    assert "cannot read the password" in attempt("add", "new", "--role", "reader", "--password-file", "/none/such")
    listed = json.loads(archiver("users", "list", "--json", database_url=url).stdout)
    assert {*ROLES} <= {each["name"] for each in listed}
    assert "argon2" not in str(listed)


def test_the_page_of_the_parts_exists_only_in_development(auditor: Browser) -> None:
    assert auditor.get("/console/style").status_code == 404


def test_the_first_page_has_figures_by_day_or_by_hour_and_says_what_is_estimated(auditor: Browser, url: str) -> None:
    def slots(path: str) -> int:
        return auditor.get(path).text.count('class="slot"') // 4

    assert (slots("/console/"), slots("/console/?by=hour"), slots("/console/?by=year")) == (30, 48, 30)
    assert "not counted yet" in auditor.get("/console/").text
    execute(url, "ANALYZE archiver.summaries")
    assert re.search(r"about \d", auditor.get("/console/").text)
