"""The console as people use it, in a real browser."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe

from archiver.console import lists
from archiver.console.permissions import GRANTED, Permission
from archiver.settings.console_roles import ROLES, Role
from tests.support.visitors import MARKUP, Demo, Visitor

LISTS = {f"/console/{each.path}": each.permission for each in lists.LISTINGS} | {"/console/settings": "operation"}
DETAILS: dict[Permission, list[str]] = {
    "content": ["/console/conversations/session-by-hand"],
    "evidence": ["/console/events/1", "/console/proofs/1"],
    "bodies": ["/console/quarantine/1"],
    "operation": ["/console/followups/1", "/console/doctor"],
    "preservation": ["/console/hold", "/console/erase?session_id=session-by-hand"],
}
PHONE = {"viewport": {"width": 375, "height": 800}}
DARK = {"color_scheme": "dark"}
SEE_ALL: tuple[Role, ...] = ("auditor", "operator")
WITHOUT_SCRIPT = {"java_script_enabled": False}


def pages(role: Role) -> list[str]:
    """The pages that a role sees."""
    granted = GRANTED[role]
    found = ["/console/", *(path for path, permission in LISTS.items() if permission in granted)]
    if "content" in granted:
        found.append(f"/console/conversations/{quote(f'hostile {MARKUP}', safe='')}")
    return found + [path for permission, paths in DETAILS.items() if permission in granted for path in paths]


@pytest.mark.parametrize("visitor", [{}, WITHOUT_SCRIPT], indirect=True, ids=["with script", "without"])
def test_an_auditor_finds_a_repaired_conversation_and_proves_a_line(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.open("/console/conversations?q=coverage%3Arepaired")
    page.fill("#name", "auditor")
    page.fill("#password", "correct horse battery")
    page.click("text=Log in >> nth=-1")
    page.wait_for_selector("table.list")
    assert page.url.endswith("/console/conversations?q=coverage%3Arepaired")  # which can be shared
    assert {*page.locator("td.state").all_inner_texts()} == {"repaired"}
    page.click("table.list tbody td:first-child a >> nth=0")
    assert page.locator("ol.transcript .message").count() > 0
    assert page.locator("ol.transcript .gap").count() > 0
    page.click("section[aria-labelledby=ledger] a:text-is('proof') >> nth=0")
    script = page.locator("pre.bytes").first.inner_text()
    with page.expect_download() as downloading:
        page.click("a:text-is('the proof')")
    proof = tmp_path / "proof.json"
    downloading.value.save_as(proof)
    process = subprocess.run(
        [sys.executable, "-c", script], input=proof.read_bytes(), capture_output=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert b"is in seal" in process.stdout
    page.click("text=Log out")
    page.wait_for_selector("#password")
    assert not visitor.faults


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("visitor", [{}, PHONE], indirect=True, ids=["wide", "phone"])
def test_every_page_fits_and_runs_nothing_of_others(visitor: Visitor, role: Role) -> None:
    visitor.log_in(role)
    for path in pages(role):
        assert visitor.open(path) == 200, path
        width = visitor.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0, f"{path} scrolls sideways by {width}"
        assert visitor.page.title() != "run"
    assert not visitor.faults


@pytest.mark.parametrize("visitor", [{}, DARK], indirect=True, ids=["light", "dark"])
def test_every_page_is_accessible(visitor: Visitor) -> None:
    """With the two roles that together see every page."""
    seen: set[str] = set()
    for role in SEE_ALL:
        visitor.log_in(role)
        for path in pages(role):
            if path not in seen:
                visitor.open(path)
                found = Axe().run(visitor.page).response["violations"]
                assert not [_summary(each) for each in found if each["impact"] in {"serious", "critical"}], path
        seen.update(pages(role))
        visitor.log_out()
    assert seen == {path for role in ROLES for path in pages(role)}


def _summary(violation: dict[str, Any]) -> str:
    return f"{violation['id']}: {[node['target'] for node in violation['nodes']]}"


def test_the_demo_names_a_user_who_sees_the_evidence(visitor: Visitor, demo: Demo) -> None:
    visitor.log_in("demo", demo.password)
    assert visitor.open("/console/seals") == 200
    assert not visitor.faults


def test_the_login_page_is_accessible(visitor: Visitor) -> None:
    visitor.open("/console/login")
    found = Axe().run(visitor.page).response["violations"]
    assert not [_summary(each) for each in found if each["impact"] in {"serious", "critical"}]
    assert not visitor.faults


def test_the_keyboard_alone_filters_and_opens_a_conversation(visitor: Visitor) -> None:
    page = visitor.page
    visitor.log_in("reader")
    visitor.open("/console/conversations")
    page.keyboard.press("/")
    page.keyboard.type("turns>0")
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/conversations?q=turns*")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("?")
    page.wait_for_selector("#shortcuts[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#shortcuts:not([open])", state="attached")
    page.keyboard.press("o")
    page.wait_for_selector("ol.transcript")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    assert not visitor.faults


def test_times_are_in_the_zone_of_the_viewer(visitor: Visitor) -> None:
    visitor.log_in("reader")
    shown = visitor.page.locator("time").first
    assert shown.get_attribute("title").endswith("UTC")
    assert not shown.inner_text().endswith("UTC")


def test_an_operator_retries_a_quarantined_event(visitor: Visitor) -> None:
    page = visitor.page
    visitor.log_in("operator")
    visitor.open("/console/quarantine")
    page.click("tr:has-text('not_storable') td:first-child a")
    assert "question of chat-retried" in page.locator("pre.bytes").inner_text()
    page.click("button:text-is('Retry')")
    page.wait_for_selector("text=The delivery is archived")
    assert page.locator("tr:has-text('not_storable')").count() == 0
    visitor.open("/console/conversations/session-retried")
    assert page.locator("ol.transcript .message").count() == 2
    assert not visitor.faults


@pytest.mark.parametrize("visitor", [WITHOUT_SCRIPT], indirect=True, ids=["without script"])
def test_an_operator_pauses_and_resumes_a_follow_up(visitor: Visitor) -> None:
    page = visitor.page
    visitor.log_in("operator")
    visitor.open("/console/followups")
    page.click("table.list tbody td:first-child a >> nth=0")
    page.click("button:text-is('Pause')")
    page.wait_for_selector("text=The subscription is paused.")
    page.click("button:text-is('Resume')")
    page.wait_for_selector("text=The subscription is active.")
    assert page.locator("h1 .badge").inner_text() != "paused"
    assert not visitor.faults


def test_an_auditor_holds_a_conversation_which_then_cannot_be_erased(visitor: Visitor) -> None:
    page = visitor.page
    visitor.log_in("auditor")
    visitor.open("/console/conversations/session-by-hand")
    page.click("text=Place a hold")
    page.fill("#reason", "case 7")
    page.press("#reason", "Enter")
    page.wait_for_selector("text=The hold is in force.")
    visitor.open("/console/conversations/session-by-hand")
    assert "Under legal hold" in page.locator("section[aria-labelledby=preserved]").inner_text()
    page.click("main >> text=Erase")
    assert "is under legal hold" in page.locator("[role=alert]").inner_text()
    assert page.locator("text=Erase for good").count() == 0
    assert not visitor.faults


def test_a_user_chooses_columns_and_shares_them_in_the_address(visitor: Visitor) -> None:
    page = visitor.page
    visitor.log_in("reader")
    visitor.open("/console/conversations?q=coverage%3Arepaired")
    page.click("summary:text-is('Columns')")
    page.check("text=Of the user")
    page.uncheck("label:has-text('First question')")
    page.click("button:text-is('Show')")
    page.wait_for_url("**column=user_messages**")
    headings = page.locator("table.list thead th").all_inner_texts()
    assert "Of the user" in headings
    assert "First question" not in headings
    assert "q=coverage%3Arepaired" in page.url
    assert not visitor.faults
