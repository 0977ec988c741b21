"""Let users choose that a page loads itself again; the script of the page does so."""

from collections.abc import Sequence

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request

from archiver.console.addresses import address_of

PARAMETER = "refresh"
SECONDS = (5, 15)


class Refresh(msgspec.Struct, frozen=True):
    """The seconds after which a page loads itself again, 0 for never; the choices, each with its address."""

    seconds: int
    choices: Sequence[tuple[int, str]]


def refresh_of(request: Request) -> Refresh:
    """Return the choice in the address of a page, and the addresses with the other choices."""
    path = request.scope["path"].removeprefix("/console/")
    choices = [(seconds, address_of(path, _with(request.query_params, seconds))) for seconds in (0, *SECONDS)]
    return Refresh(seconds_of(request), choices)


def seconds_of(request: Request) -> int:
    """Return the seconds that the address chooses; 0 if it chooses none."""
    text = request.query_params.get(PARAMETER, "")
    return next((seconds for seconds in SECONDS if text == str(seconds)), 0)


def _with(parameters: QueryParams, seconds: int) -> dict[str, str | list[str]]:
    given: dict[str, str | list[str]] = {
        name: parameters.getlist(name) for name in parameters if name not in {PARAMETER, "done"}
    }
    return given | ({PARAMETER: str(seconds)} if seconds else {})
