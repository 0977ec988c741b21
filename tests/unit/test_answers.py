"""The table from errors to HTTP answers."""

import inspect
import json
from types import ModuleType

import pytest
from starlette.requests import Request

from archiver import inbound
from archiver.errors import ArchiverError, SettingsError
from archiver.events.responses import InvalidRegistrationError
from archiver.http import answers, bodies
from archiver.inbound import UnavailableError, signatures

ERRORS: list[Exception] = [
    signatures.SignatureError("stale_timestamp", b"webhook-timestamp"),
    bodies.BodyTooLargeError(1_000),
    InvalidRegistrationError("The body is not JSON."),
]
ERRORS += [kind() for kind in answers.ERRORS if kind not in map(type, ERRORS)]


@pytest.mark.parametrize("module", [bodies, inbound, signatures])
def test_every_error_that_a_route_may_raise_has_an_answer(module: ModuleType) -> None:
    public = {kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Exception)}
    assert public
    assert public - {ArchiverError, SettingsError} <= {*answers.ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_answer_says_what_is_wrong_and_carries_the_headers_of_its_code(error: Exception) -> None:
    answer = answers.answer_to(error)
    response = answer.response()
    content = json.loads(bytes(response.body))
    assert content["detail"].endswith((".", ")"))
    assert content["reason"] == (answer.reason or answer.status)
    assert ("retry-after" in response.headers) == (response.status_code == 503)
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)


async def test_a_route_that_raises_is_answered_from_the_table() -> None:
    response = await answers.respond(Request({"type": "http"}), UnavailableError())
    assert (response.status_code, json.loads(bytes(response.body))["status"]) == (503, "unavailable")
