"""Render pages: templates, filters for untrusted text and for times, and the headers of every response."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import Response

from archiver.console.subscriptions import delivery_id
from archiver.console.word_diff import compare

FOLDER = Path(__file__).parent

# No page loads anything from another host, runs a script of its own text, or appears in a frame.
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

# Runs of a character that reorders or hides text. The joiners of words and of emoji are not among them.
_HIDDEN = re.compile(
    "([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\ufff9-\ufffb\U000e0000-\U000e007f])\\1*"
)


def visible(text: object) -> Markup:
    """Return the text as HTML in which controls, and characters that reorder or hide text, are shown as codes."""
    parts: list[Markup] = []
    at, source = 0, str(text)
    for match in _HIDDEN.finditer(source):
        name, count = unicodedata.name(match[1], "CONTROL CHARACTER"), len(match[0])
        code = f"U+{ord(match[1]):04X}" + (f", {count:,} times" if count > 1 else "")
        parts += [
            escape(source[at : match.start()]),
            Markup('<span class="hidden-character" title="{}">{}</span>').format(name, code),
        ]
        at = match.end()
    return Markup("").join([*parts, escape(source[at:])])


def snippet(text: str) -> Markup:
    """Return a snippet of the search as HTML, and mark the words between `**`, which were found."""
    parts = (visible(part) for part in text.split("**"))
    marked = (Markup("<mark>{}</mark>").format(part) if place % 2 else part for place, part in enumerate(parts))
    return Markup("").join(marked)


def moment(value: datetime | None) -> Markup:
    """Return a time in UTC as HTML; the script of the page shows it in the zone of the viewer."""
    if value is None:
        return Markup('<span class="none">none</span>')
    utc = value.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        f"{utc:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z", f"{utc:%Y-%m-%d %H:%M:%S} UTC"
    )


def number(value: float | Decimal | None) -> str:
    """Return a number with separators; a cost without trailing zeros."""
    if value is None:
        return ""
    return f"{value.normalize():,f}" if isinstance(value, Decimal) else f"{value:,}"


def conversation_path(session_id: str) -> str:
    """Return the address of a conversation, relative to /console/.

    The address of an id that a path cannot contain has it as a parameter: browsers resolve `.` and `..`.
    """
    if session_id in {".", ".."} or not session_id.isprintable():
        return f"conversation?id={quote(session_id, safe='')}"
    return f"conversations/{quote(session_id, safe='')}"


def asset(name: str) -> str:
    """Return the address of a file in `static`, which changes with its content."""
    return f"/console/static/{name}?{_digests[name]}"


_digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (FOLDER / "static").iterdir()}

_environment = Environment(
    loader=PackageLoader("archiver.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "visible": visible,
    "moment": moment,
    "number": number,
    "conversation_path": conversation_path,
    "delivery_id": delivery_id,
    "snippet": snippet,
    "word_diff": compare,
}
_environment.globals |= {"asset": asset}


def html(template: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """Return a page. Call it in a thread: a long page takes tens of milliseconds."""
    return Response(_environment.get_template(template).render(values), status, HEADERS, "text/html")
