"""The console as people use it, in a real browser."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe

from archiver.console import lists
from archiver.console.accounts import ROLES, Role
from archiver.console.permissions import GRANTED
from tests.support.visitors import MARKUP, Demo, Visitor

LISTS = {f"/console/{each.path}": each.permission for each in lists.LISTINGS} | {"/console/settings": "operation"}
PHONE = {"viewport": {"width": 375, "height": 800}}
DARK = {"color_scheme": "dark"}
WITHOUT_SCRIPT = {"java_script_enabled": False}


def pages(role: Role) -> list[str]:
    """The pages that a role sees."""
    granted = GRANTED[role]
    found = ["/console/", *(path for path, permission in LISTS.items() if permission in granted)]
    if "content" in granted:
        found.append(f"/console/conversations/{quote(f'hostile {MARKUP}', safe='')}")
    return found + (["/console/events/1", "/console/proofs/1"] if "evidence" in granted else [])


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
@pytest.mark.parametrize("visitor", [{}, DARK, PHONE], indirect=True, ids=["light", "dark", "phone"])
def test_every_page_is_accessible_fits_and_runs_nothing_of_others(visitor: Visitor, role: Role) -> None:
    visitor.log_in(role)
    for path in pages(role):
        assert visitor.open(path) == 200, path
        width = visitor.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0, f"{path} scrolls sideways by {width}"
        assert visitor.page.title() != "run"
        found = Axe().run(visitor.page).response["violations"]
        assert not [_summary(each) for each in found if each["impact"] in {"serious", "critical"}], path
    assert not visitor.faults


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
    page.keyboard.press("Enter")
    page.wait_for_selector("ol.transcript")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    assert not visitor.faults


def test_times_are_in_the_zone_of_the_viewer(visitor: Visitor) -> None:
    visitor.log_in("reader")
    shown = visitor.page.locator("time").first
    assert shown.get_attribute("title").endswith("UTC")
    assert not shown.inner_text().endswith("UTC")
