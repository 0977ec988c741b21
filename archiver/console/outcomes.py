"""Sentences about the outcome of an action, on the page to which it leads. The address contains only a name."""

from collections.abc import Mapping
from urllib.parse import urlencode

from starlette.responses import RedirectResponse, Response

from archiver.console import rendering

_SENTENCES: Mapping[str, str] = {
    "hold-placed": "The hold is in force.",
    "hold-released": "The hold is released.",
    "erased": "The content is erased. Later deliveries of it are refused.",
    "erasure-ordered": "The erasure is ordered: deliveries of it are refused from now on. A worker erases the content"
    " within the hour.",
}


def sentence_of(outcome: str) -> str:
    """Return the sentence of an outcome; empty for an unknown one."""
    return _SENTENCES.get(outcome, "")


def leads_to(path: str, outcome: str) -> Response:
    """Return the redirect from an action to a page, relative to /console/, which shows the outcome."""
    if outcome not in _SENTENCES:
        raise ValueError(f"no sentence for {outcome}")
    separator = "&" if "?" in path else "?"
    return RedirectResponse(f"/console/{path}{separator}{urlencode({'done': outcome})}", 303, rendering.HEADERS)
