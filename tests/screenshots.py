"""Make the pictures of the console in docs/screenshots from a demo: `make screenshots`.

Look at each of them before you commit it.
"""

import shutil
import sys
import tempfile
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from archiver.settings.console_roles import Role
from tests.support.demos import TOLD, furnish, running_demo
from tests.support.visitors import ARGUMENTS, Demo, Visitor

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "screenshots"
MAX_BYTES = 150_000  # of a picture

WIDE = {"viewport": {"width": 1200, "height": 740}}
PHONE = {"viewport": {"width": 390, "height": 844}}
DARK = {"color_scheme": "dark"}
COLUMNS = "".join(
    f"&column={name}"
    for name in ("match", "last_message_at", "coverage", "turns", "messages", "repaired_messages", "cost")
)
PICTURES: dict[str, tuple[Role, str, dict[str, Any]]] = {
    "conversations": ("auditor", f"/console/conversations?q=coverage%3Arepaired+repair{COLUMNS}", WIDE),
    "conversation": ("auditor", f"/console/conversations/{TOLD}", WIDE),
    "conversation-dark": ("auditor", f"/console/conversations/{TOLD}", WIDE | DARK),
    "conversation-phone": ("auditor", f"/console/conversations/{TOLD}", PHONE),
    "quarantine": ("operator", "/console/quarantine?reason=not_storable", WIDE),
    "erase": ("auditor", f"/console/erase?session_id={TOLD}", WIDE | DARK),
    "proof": ("auditor", "/console/proofs/1", PHONE | DARK),
}


def take(browser: Browser, demo: Demo) -> None:
    """Take all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, (role, path, options) in PICTURES.items():
        context = browser.new_context(**options, locale="en-GB", timezone_id="Europe/Berlin")
        visitor = Visitor(context.new_page(), demo.url, [])
        visitor.log_in(role)
        visitor.open(path)
        if name == "quarantine":
            visitor.page.click("table.list tbody td:first-child a")
            visitor.page.wait_for_selector("pre.bytes")
        picture = as_webp(browser, visitor.page.screenshot())
        if len(picture) > MAX_BYTES:
            sys.exit(f"{name} has {len(picture):,} bytes")
        (FOLDER / f"{name}.webp").write_bytes(picture)
        context.close()


def as_webp(browser: Browser, png: bytes) -> bytes:
    """Convert a picture in a page, because Playwright writes no WebP."""
    page = browser.new_page()
    url = page.evaluate(_CONVERT, f"data:image/png;base64,{b64encode(png).decode()}")
    page.close()
    return b64decode(url.partition(",")[2])


_CONVERT = """async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/webp", 0.85);
}"""


def main() -> None:
    """Start a demo, and take all pictures of it."""
    executable = shutil.which("chromium")
    folder = Path(tempfile.mkdtemp(prefix="archiver-screenshots-"))
    with running_demo(folder) as demo, sync_playwright() as playwright:
        furnish(demo)
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        take(browser, demo)
        browser.close()


if __name__ == "__main__":
    main()
