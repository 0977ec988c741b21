"""The filter of conversations: words and qualifiers such as `coverage:repaired` and `cost>0.1`."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from archiver.archive.coverage import STATES
from archiver.errors import ArchiverError
from archiver.settings.variables import Variable

MAX_LENGTH = 1_000  # characters of a filter
MAX_TERMS = 20
WORDS = "words"  # the field of terms without a qualifier


class FilterError(ArchiverError):
    """The filter cannot be understood; the message names the term and what is possible."""


class Filter(msgspec.Struct, frozen=True):
    """Conditions on a row of `analytics.sessions s`, joined by AND, with their values.

    `words`: words and phrases that must occur. `fields`: the names of the qualifiers, for the audit log, which must
    not contain what was searched for. `shows_content`: whether the result reveals content.
    """

    conditions: Sequence[str] = ()
    values: Mapping[str, Any] = {}
    words: Sequence[str] = ()
    fields: Sequence[str] = ()
    shows_content: bool = False

    @property
    def search(self) -> str:
        """Return the words as a query of `analytics.search`, in which each is a phrase."""
        return " ".join(f'"{word}"' for word in self.words)


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
    if value not in STATES:
        raise FilterError(f"{value!r} is not a state of coverage. Use one of {', '.join(STATES)}.")
    return value


def _answer(value: str) -> bool:
    if value not in {"yes", "no"}:
        raise FilterError(f"{value!r} is neither yes nor no.")
    return value == "yes"


class Qualifier(msgspec.Struct, frozen=True):
    """A qualifier: how its value is parsed, and its condition, with {name} for the value and {sign}."""

    parse: Callable[[str], Any]
    condition: str
    example: str
    signs: str = ":"
    shows_content: bool = False


_COMPARED = ": > >= < <="
HELD = "held"  # the qualifier, and the parameter with the ids of the held conversations
# In parentheses: it must not change which conversations a page is about.
_IS_HELD = f"(s.session_id IN (SELECT json_array_elements_text(:{HELD})))"
QUALIFIERS: Mapping[str, Qualifier] = {
    "assistant": Qualifier(_text, "s.assistant_id = :{name}", "assistant:asst_1"),
    "session": Qualifier(_text, "s.session_id = :{name}", "session:ses_1"),
    "chat": Qualifier(
        _text,
        "s.session_id IN (SELECT c.session_id FROM analytics.chats c WHERE c.chat_id = :{name})",
        "chat:chat_1",
    ),
    "coverage": Qualifier(_state, "s.coverage = :{name}", "coverage:repaired"),
    "deleted": Qualifier(_answer, "(s.deleted_chats > 0) = :{name}", "deleted:yes"),
    "held": Qualifier(_answer, f"{_IS_HELD} = :{{name}}", "held:yes", shows_content=True),
    "repaired": Qualifier(_answer, "(s.repaired_messages > 0) = :{name}", "repaired:yes"),
    "after": Qualifier(parse_moment, "s.last_message_at >= :{name}", "after:2024-01-15"),
    "before": Qualifier(parse_moment, "s.last_message_at < :{name}", "before:2024-02-01"),
    "cost": Qualifier(_number, "s.cost {sign} :{name}", "cost>0.1", _COMPARED),
    "turns": Qualifier(_number, "s.turns {sign} :{name}", "turns>=20", _COMPARED),
    "messages": Qualifier(_number, "s.messages {sign} :{name}", "messages>40", _COMPARED),
}


_OF_TYPE: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "text": (_text, "Premium", ":"),
    "number": (_number, "10", _COMPARED),
    "boolean": (_answer, "yes", ":"),
    "time": (parse_moment, "2024-01-15", _COMPARED),
}


def qualifiers_of(variables: Sequence[Variable]) -> Mapping[str, Qualifier]:
    """Return all qualifiers: those of each archive, and those of the promoted variables, by the name of their column.

    A name that several have means the first.
    """
    return {**QUALIFIERS, **{each.column: _qualifier_of(each) for each in variables if each.column not in QUALIFIERS}}


def _qualifier_of(variable: Variable) -> Qualifier:
    parse_value, example, signs = _OF_TYPE[variable.type]
    condition = f's."{variable.column}" {{sign}} :{{name}}'
    return Qualifier(parse_value, condition, f"{variable.column}:{example}", signs, shows_content=True)


def parse(query: str, variables: Sequence[Variable] = ()) -> Filter:
    """Return the conditions of a filter, which may name promoted variables. Raises `FilterError`."""
    qualifiers = qualifiers_of(variables)
    columns = {each.name: each.column for each in variables}
    conditions: list[str] = []
    values: dict[str, Any] = {}
    words: list[str] = []
    fields: list[str] = []
    shows_content = False
    for number, term in enumerate(_terms(query)):
        if term.field is None:
            words.append(term.value)
            fields.append(WORDS)
            shows_content = True
            continue
        field = term.field if term.field in qualifiers else columns.get(term.field, term.field)
        qualifier = _qualifier(msgspec.structs.replace(term, field=field), qualifiers)
        name, sign = f"f{number}", "=" if term.sign == ":" else term.sign
        conditions.append(qualifier.condition.format(name=name, sign=sign))
        values[name] = qualifier.parse(term.value)
        fields.append(field)
        shows_content = shows_content or qualifier.shows_content
    return Filter(conditions, values, words, fields, shows_content)


def of_first_question(words: Sequence[str]) -> tuple[Sequence[str], Mapping[str, str]]:
    """Return conditions, with their values, by which each word occurs in the first question."""
    names = [f"w{number}" for number in range(len(words))]
    conditions = [f"s.first_question ILIKE :{name}" for name in names]
    return conditions, {name: f"%{_escaped(word)}%" for name, word in zip(names, words, strict=True)}


def _qualifier(term: "_Term", qualifiers: Mapping[str, Qualifier]) -> Qualifier:
    qualifier = qualifiers.get(term.field or "")
    if qualifier is None:
        raise FilterError(
            f"There is no qualifier {term.field!r}. Use {', '.join(qualifiers)}; put words with a colon in quotes."
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


def term(field: str, value: str) -> str:
    """Return the term of a filter by which a field has this value; a value with quotation marks becomes a prefix."""
    plain = value.split('"', 1)[0]
    return f'{field}:"{plain}"' if plain != value or not _BARE.fullmatch(plain) else f"{field}:{plain}"


_BARE = re.compile(r"[^\s\"]+")


def _escaped(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)
