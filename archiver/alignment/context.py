"""What a turn repeats of the conversation before it: some clients send all of it, or the end of it, with each turn.

`own_messages` removes it by form alone: in an input, what stands up to the last answer before the user's words; in an
output, what stands up to the last of the user's words. `without_repeats` removes what only the history can show to be
a repeat. The ledger keeps the bytes.
"""

from collections.abc import Callable, Sequence

import msgspec

from archiver.alignment.candidates import ASIDES, PROMPTS
from archiver.alignment.shapes import USER, Line, Turn
from archiver.alignment.wording import Key, key_of, role_of
from archiver.events import Message

_PLACES = 64  # of an often repeated text that are looked at

Messages = tuple[Message, ...]


def own_messages(said: Messages, answered: Messages) -> tuple[Messages, Messages]:
    """Input and output of a turn without the conversation before it.

    Where there is no input, the user's last words in the output are it.
    """
    if len(said) > 1:
        said = said[_context_end(said) :]
    end = _last_of(answered, is_user=True) if len(answered) > 1 else 0
    if 0 < end < len(answered):
        if not said:
            begin = end
            while begin and role_of(answered[begin - 1].role) == USER:
                begin -= 1
            said = answered[begin:end]
        answered = answered[end:]
    return said, answered


def _context_end(said: Messages) -> int:
    """Where the new words begin: after the last answer that words of the user follow."""
    last = _last_of(said, is_user=True)
    return _last_of(said[:last], is_user=False)


def _last_of(messages: Messages, *, is_user: bool) -> int:
    """The index after the last message of the user, or after the last answer or call of a tool."""
    for index in range(len(messages), 0, -1):
        role = role_of(messages[index - 1].role)
        if (role == USER) if is_user else (role != USER and role not in PROMPTS):
            return index
    return 0


def without_repeats(turns: Sequence[Turn], lines: Sequence[Line]) -> list[Turn]:
    """The turns, given in order, without what they repeat as the `lines` of the history show.

    Leading inputs go if the history shows the others of them without these, next to what the turn was answered, and
    these before: single texts that recur elsewhere are no repeats. Those of a deleted turn stay: the history shows no
    turn to compare it with. Outputs stay: short answers are alike. A system message goes if an earlier turn has it,
    too, and the history shows it less often.
    """
    if not lines:
        return [*turns]
    keys = [key_of(line.role, line.content) for line in lines]
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    prompts: set[Key] = set()
    found = []
    for turn in turns:
        trimmed = _without_prompts(turn, prompts, places) if turn.inputs > 1 else turn
        if len(trimmed.messages) > 2 and not trimmed.is_deleted:  # noqa: PLR2004  # a question and its answer repeat nothing
            trimmed = _without_leading(trimmed, keys, places)
        found.append(trimmed)
    return found


def _without_prompts(turn: Turn, prompts: set[Key], places: dict[Key, list[int]]) -> Turn:
    kept = []
    for message in turn.messages[: turn.inputs]:
        key = key_of(message.role, message.content)
        if key[0] in PROMPTS:
            if key in prompts and len(places.get(key, ())) <= 1:
                continue
            prompts.add(key)
        kept.append(message)
    if len(kept) == turn.inputs or not kept:
        return turn
    return msgspec.structs.replace(turn, messages=(*kept, *turn.messages[turn.inputs :]), inputs=len(kept))


def _without_leading(turn: Turn, keys: Sequence[Key], places: dict[Key, list[int]]) -> Turn:
    said, answered = turn.messages[: turn.inputs], turn.messages[turn.inputs :]
    asked = [key_of(message.role, message.content) for message in said]
    replied = [key_of(message.role, message.content) for message in answered]

    def is_answered(lines: range) -> bool:
        after = _next_line(keys, range(lines.stop, len(keys)))
        return not replied or after in replied

    inputs = said[_surplus(asked, keys, places, is_answered) :]
    if len(inputs) == len(said):
        return turn
    return msgspec.structs.replace(turn, messages=inputs + answered, inputs=len(inputs))


def _next_line(keys: Sequence[Key], places: range) -> Key | None:
    return next((keys[place] for place in places if not _is_skipped(keys[place])), None)


def _is_skipped(key: Key) -> bool:
    return key[0] in ASIDES or not key[1]


def _surplus(
    told: Sequence[Key], keys: Sequence[Key], places: dict[Key, list[int]], is_own: Callable[[range], bool]
) -> int:
    """How many of the first of these messages are repeats. `is_own`: whether these lines may be the same turn's."""
    if len(told) < 2 or not all(content for _, content in told):  # noqa: PLR2004  # one alone repeats nothing
        return 0
    runs = [_run(told, keys, place) for place in places.get(told[-1], ())[:_PLACES]]
    own = [run for run in runs if run[0] == len(told) or is_own(run[1])]
    length, lines = max(own, default=(0, range(0)), key=lambda run: (run[0], -run[1].stop))
    missing = told[: len(told) - length]
    # Elsewhere in the history, and all of them before.
    if length and missing and all(any(other < lines.stop - 1 for other in places.get(key, ())) for key in missing):
        return len(missing)
    return 0


def _run(told: Sequence[Key], keys: Sequence[Key], place: int) -> tuple[int, range]:
    """How many of the last of these messages stand in a row that ends at this line, and its lines."""
    length, start = 1, place
    line = place - 1
    while length < len(told) and line >= 0:
        if keys[line] == told[-1 - length]:
            length, start = length + 1, line
        elif not _is_skipped(keys[line]):
            break
        line -= 1
    return length, range(start, place + 1)
