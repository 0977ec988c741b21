"""Sentences about the outcome of an action, shown on the next page, whose address contains only their name."""

from collections.abc import Mapping
from urllib.parse import urlencode

from starlette.responses import RedirectResponse, Response

from archiver.console import rendering

_SENTENCES: Mapping[str, str] = {
    "hold-placed": "The hold is in force.",
    "hold-released": "The hold is released.",
    "erased": "The content is erased. Later deliveries of it are refused.",
    "archived": "The delivery is archived, and has left the quarantine.",
    "still-quarantined": "The delivery still cannot be archived. Its reason is that of this attempt.",
    "refused-as-erased": "The delivery has left the quarantine. It is not archived: its content was erased.",
    "paused": "The subscription is paused.",
    "resumed": "The subscription is active.",
    "resumed-with-loss": "The subscription is active. Changes that are no longer in the feed are not delivered; the"
    " audit log has their number.",
    "retried": "The retry is scheduled for now.",
    "test-accepted": "The receiver accepted the test. Its circuit breaker is closed.",
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
