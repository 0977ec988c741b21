"""Sentences about the outcome of an action, shown on the next page, whose address contains their signed name."""

import hmac
from collections.abc import Mapping
from urllib.parse import urlencode

from starlette.responses import RedirectResponse, Response

from archiver.console import rendering
from archiver.console.logins import Login

PROOF_CHARACTERS = 32

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


def sentence_of(signed: str, login: Login) -> str:
    """Return the sentence of an outcome; empty unless an action of this login led to it.

    Otherwise a link of others could make a page say what did not happen.
    """
    outcome, _, proof = signed.partition(".")
    is_genuine = hmac.compare_digest(proof.encode(), _proof(outcome, login).encode())
    return _SENTENCES.get(outcome, "") if is_genuine else ""


def leads_to(path: str, outcome: str, login: Login) -> Response:
    """Return the redirect from an action to a page, relative to /console/, which shows the outcome."""
    if outcome not in _SENTENCES:
        raise ValueError(f"no sentence for {outcome}")
    separator = "&" if "?" in path else "?"
    signed = urlencode({"done": f"{outcome}.{_proof(outcome, login)}"})
    return RedirectResponse(f"/console/{path}{separator}{signed}", 303, rendering.HEADERS)


def _proof(outcome: str, login: Login) -> str:
    """Return what only the pages of this login know of an outcome."""
    return hmac.digest(login.form_token.encode(), outcome.encode(), "sha256").hex()[:PROOF_CHARACTERS]
