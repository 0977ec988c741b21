"""The filter of conversations: words and qualifiers such as `coverage:repaired` and `cost>0.1`."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from archiver.errors import ArchiverError

MAX_LENGTH = 1_000  # characters of a filter
MAX_TERMS = 20
WORDS = "words"  # the field of terms without a qualifier


class FilterError(ArchiverError):
    """The filter cannot be understood; the message names the term and what is possible."""


class Filter(msgspec.Struct, frozen=True):
    """Conditions on a row of `analytics.sessions s`, joined by AND, with their values.

    `fields`: the names of the qualifiers, for the audit log, which must not contain what was searched for.
    """

    conditions: Sequence[str] = ()
    values: Mapping[str, Any] = {}
    fields: Sequence[str] = ()


_STATES = ("open", "complete", "repaired", "ambiguous", "unverified", "lost")


def _text(value: str) -> str:
    return value


def parse_moment(value: str) -> datetime:
    """Return a time, in UTC unless it names a zone. Raises `FilterError`."""
    try:
        result = datetime.fromisoformat(value.upper())
        return (result if result.tzinfo else result.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise FilterError(f"{value!r} is not a time: write 2024-01-15 or 2024-01-15T09:30:00Z.") from None


_MAX_EXPONENT = 20  # of a number in a filter


def _number(value: str) -> Decimal:
    try:
        result = Decimal(value)
    except InvalidOperation:
        raise FilterError(f"{value!r} is not a number.") from None
    if not result.is_finite() or abs(result.adjusted()) > _MAX_EXPONENT:
        raise FilterError(f"{value!r} is not a number.")
    return result


def _state(value: str) -> str:
    if value not in _STATES:
        raise FilterError(f"{value!r} is not a state of coverage: {', '.join(_STATES)}.")
    return value


def _answer(value: str) -> bool:
    if value not in {"yes", "no"}:
        raise FilterError(f"{value!r} is neither yes nor no.")
    return value == "yes"


class _Qualifier(msgspec.Struct, frozen=True):
    parse: Callable[[str], Any]
    condition: str  # with {name} for the value and {sign} for the comparison
    example: str
    signs: str = ":"


_COMPARED = ": > >= < <="
QUALIFIERS: Mapping[str, _Qualifier] = {
    "assistant": _Qualifier(_text, "s.assistant_id = :{name}", "assistant:asst_1"),
    "session": _Qualifier(_text, "s.session_id = :{name}", "session:ses_1"),
    "chat": _Qualifier(
        _text,
        "s.session_id IN (SELECT c.session_id FROM analytics.chats c WHERE c.chat_id = :{name})",
        "chat:chat_1",
    ),
    "coverage": _Qualifier(_state, "s.coverage = :{name}", "coverage:repaired"),
    "deleted": _Qualifier(_answer, "(s.deleted_chats > 0) = :{name}", "deleted:yes"),
    "repaired": _Qualifier(_answer, "(s.repaired_messages > 0) = :{name}", "repaired:yes"),
    "after": _Qualifier(parse_moment, "s.last_message_at >= :{name}", "after:2024-01-15"),
    "before": _Qualifier(parse_moment, "s.last_message_at < :{name}", "before:2024-02-01"),
    "cost": _Qualifier(_number, "s.cost {sign} :{name}", "cost>0.1", _COMPARED),
    "turns": _Qualifier(_number, "s.turns {sign} :{name}", "turns>=20", _COMPARED),
    "messages": _Qualifier(_number, "s.messages {sign} :{name}", "messages>40", _COMPARED),
}


def parse(query: str) -> Filter:
    """Return the conditions of a filter. Words without a qualifier must all occur in the first question.

    Raises `FilterError`.
    """
    conditions: list[str] = []
    values: dict[str, Any] = {}
    fields: list[str] = []
    for number, term in enumerate(_terms(query)):
        name = f"f{number}"
        if term.field is None:
            conditions.append(f"s.first_question ILIKE :{name}")
            values[name] = f"%{_escaped(term.value)}%"
            fields.append(WORDS)
        else:
            qualifier = _qualifier(term)
            sign = "=" if term.sign == ":" else term.sign
            conditions.append(qualifier.condition.format(name=name, sign=sign))
            values[name] = qualifier.parse(term.value)
            fields.append(term.field)
    return Filter(conditions, values, fields)


def _qualifier(term: "_Term") -> _Qualifier:
    qualifier = QUALIFIERS.get(term.field or "")
    if qualifier is None:
        raise FilterError(
            f"There is no qualifier {term.field!r}. Use {', '.join(QUALIFIERS)}; put words with a colon in quotes."
        )
    if term.sign not in qualifier.signs.split():
        raise FilterError(f"{term.field} takes no {term.sign!r}: write {qualifier.example}.")
    if not term.value:
        raise FilterError(f"{term.field} has no value: write {qualifier.example}.")
    return qualifier


class _Term(msgspec.Struct, frozen=True):
    """A word or phrase, or a value with its qualifier and sign."""

    field: str | None
    sign: str
    value: str


_TERM = re.compile(
    r"""(?:(?P<field>[A-Za-z][\w.-]*)(?P<sign>:|>=|<=|>|<)(?!//))?(?:"(?P<quoted>[^"]*)"|(?P<bare>[^\s"]*))"""
)


def _terms(query: str) -> list[_Term]:
    if len(query) > MAX_LENGTH:
        raise FilterError(f"A filter has at most {MAX_LENGTH:,} characters.")
    if query.count('"') % 2:
        raise FilterError('A quotation mark (") is not closed.')
    matches = (match for match in _TERM.finditer(query.replace("\0", "")) if match[0])
    terms = [_Term(match["field"], match["sign"] or "", match["quoted"] or match["bare"] or "") for match in matches]
    if len(terms) > MAX_TERMS:
        raise FilterError(f"A filter has at most {MAX_TERMS} terms.")
    return [term for term in terms if term.field is not None or term.value]


def _escaped(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)
