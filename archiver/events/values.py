"""Single values of a document: ids, strings, costs, variables."""

import re
from decimal import Decimal
from typing import Any

from archiver.events.documents import Exact
from archiver.events.shapes import MAX_ID, UnreadableError

# prefix of internal keys, for turns known only from a history; ids of CallHQ must not begin with it
INTERNAL_PREFIX = "\x1f"
MAX_VARIABLE_DEPTH = 64
_MAX_COST_TEXT = 10_000  # characters; Postgres stores 16,383 digits after the point
_COST = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,9})?", re.ASCII | re.IGNORECASE)
_COST_FIELDS = ("total", "amount", "value", "cost", "totalCost", "total_cost", "usd")
_COST_MAGNITUDES = range(-30, 12)  # powers of ten
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def identifier(value: Any) -> str | None:
    """Return a string or an integer as an id; None for any other value and for blank strings.

    Raises `UnreadableError` if Postgres cannot store the id.
    """
    if isinstance(value, str):
        return storable_id(value) if value.strip() else None
    if isinstance(value, int) and not isinstance(value, bool):
        return storable_id(str(value))
    return None


def storable_id(value: str) -> str:
    """Return the id; raise `UnreadableError` if Postgres cannot store it."""
    # Replacing characters would let two ids collide, so an id that Postgres cannot store is rejected.
    if len(value) <= MAX_ID and value.isascii() and "\x00" not in value and value[0] != INTERNAL_PREFIX:
        return str(value)  # not `documents.Beyond`
    if (
        len(value) > MAX_ID
        or value[0] == INTERNAL_PREFIX
        or _UNSTORABLE.search(value)
        or len(value.encode()) > MAX_ID
    ):
        raise UnreadableError("unusable_id")
    return value


def label(value: Any) -> str | None:
    """Return a short string such as a name or a status; None if there is none."""
    if isinstance(value, str) and value:
        return storable(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def storable(text: str) -> str:
    """Return a copy for a Postgres text column: U+0000 and lone surrogates become U+FFFD."""
    if text.isascii() and "\x00" not in text:
        return str(text)  # not `documents.Beyond`
    return _UNSTORABLE.sub("\ufffd", text)


def cost_of(value: Any, levels: int = 3) -> Decimal | None:
    """Return the cost, or an object's total cost, with the digits that were sent; None unless plausible."""
    if isinstance(value, dict):
        result = (cost_of(value[name], levels - 1) for name in _COST_FIELDS if name in value) if levels else iter(())
        return next((cost for cost in result if cost is not None), None)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = (value.text if isinstance(value, Exact) else str(value)).strip()
    if len(text) > _MAX_COST_TEXT or not _COST.fullmatch(text):
        return None
    cost = Decimal(text)
    if not cost:
        return Decimal(0)
    return cost if cost.adjusted() in _COST_MAGNITUDES else None


def variables_of(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not value:
        return None
    cleaned: dict[str, Any] = _storable_json(value, MAX_VARIABLE_DEPTH)
    return cleaned


def _storable_json(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(k): _storable_json(v, depth - 1) for k, v in value.items()} if depth else None
    if isinstance(value, list):
        return [_storable_json(item, depth - 1) for item in value] if depth else None
    return float(value) if isinstance(value, Exact) else value
