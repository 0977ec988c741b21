"""What a turn repeats of the conversation before it: some clients send all of it, or the end of it, with each turn.

`own_messages` removes it by form alone: in an input, what stands up to the last answer before the user's words, and
after them the answer itself or a blank in its place; in an output, what stands up to the last of the user's words.
`without_repeats` removes what only the history can show to be a repeat. The ledger keeps the bytes.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from archiver.alignment.candidates import ASIDES, PROMPTS, SKEW
from archiver.alignment.shapes import USER, Line, Turn
from archiver.alignment.wording import Key, key_of, normal_role
from archiver.events import Message

_BLANK = frozenset({"text", "empty", "null"})  # shapes of a message that says nothing where its text is blank
_PLACES = 64  # of an often repeated text that are looked at

Messages = tuple[Message, ...]


def own_messages(said: Messages, answered: Messages) -> tuple[Messages, Messages]:
    """Input and output of a turn without the conversation before it.

    Where there is no input, the user's last words in the output are it.
    """
    if len(said) > 1:
        said = said[_context_end(said) :]
    end = _last_of(answered, is_user=True) if len(answered) > 1 else 0
    if 0 < end < len(answered) or (end and said and _ends_with(answered, _without_answer(said, ()))):
        if not said:
            begin = end
            while begin and normal_role(answered[begin - 1].role) == USER:
                begin -= 1
            said = answered[begin:end]
        answered = answered[end:]
    return _without_answer(said, answered) if len(said) > 1 else said, answered


def _without_answer(said: Messages, answered: Messages) -> Messages:
    """The input without what follows the user's words: blanks that await the answer, or the answer itself."""
    end = _last_of(said, is_user=True)
    after = said[end:]
    if not end or not after or any(normal_role(message.role) in ASIDES for message in after):
        return said
    filled = [message for message in after if message.content.strip() or message.shape not in _BLANK]
    return said[:end] if not filled or _keys(filled) == _keys(answered[: len(filled)]) else said


def _ends_with(answered: Messages, said: Messages) -> bool:
    """Whether an output repeats the conversation up to this input, and nothing was answered yet."""
    return len(answered) > len(said) and _keys(answered[-len(said) :]) == _keys(said)


def _keys(messages: Sequence[Message]) -> list[Key]:
    return [key_of(message.role, message.content) for message in messages]


def _context_end(said: Messages) -> int:
    """Where the new words begin: after the last answer that words of the user follow."""
    last = _last_of(said, is_user=True)
    return _last_of(said[:last], is_user=False)


def _last_of(messages: Messages, *, is_user: bool) -> int:
    """The index after the last message of the user, or after the last answer or call of a tool."""
    for index in range(len(messages), 0, -1):
        role = normal_role(messages[index - 1].role)
        if (role == USER) if is_user else (role != USER and role not in PROMPTS):
            return index
    return 0


def without_repeats(turns: Sequence[Turn], lines: Sequence[Line]) -> list[Turn]:
    """The turns, given in order, without what they repeat as the `lines` of the history show.

    Leading inputs go if the history shows the others of them without these, next to what the turn was answered, and
    these before: single texts that recur elsewhere are no repeats. Leading outputs go if a reading taken after the
    turn had said all answers the inputs with the others of them alone, and these are the last answers before. All of
    a deleted turn stays: the history shows no turn to compare it with. A system message goes if an earlier turn has
    it, too, and the history shows it less often.
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
            trimmed = _without_leading(trimmed, lines, keys, places)
            trimmed = _without_answers(trimmed, lines, keys, places)
        found.append(trimmed)
    return found


def restore_unproven(turns: Sequence[Turn], trimmed: Sequence[Turn], lines: Sequence[Line]) -> list[Turn]:
    """The `trimmed` turns; one is whole again if the transcript shows its repeats neither before it nor unclaimed.

    `turns` are the same ones, whole; `lines` is the transcript with the trimmed ones.
    """
    removed = {
        turn.chat_id: Counter(_keys(turn.messages)) - Counter(_keys(rest.messages))
        for turn, rest in zip(turns, trimmed, strict=True)
        if len(rest.messages) < len(turn.messages)
    }
    if not removed:
        return [*trimmed]
    keys = [key_of(line.role, line.content) for line in lines]
    shown = Counter(key for key, line in zip(keys, lines, strict=True) if line.chat_id is None)
    proven, seen = set(), set()
    for key, line in zip(keys, lines, strict=True):
        if line.chat_id in removed and line.chat_id not in seen and removed[line.chat_id] <= shown:
            proven.add(line.chat_id)
        seen.add(line.chat_id)
        shown[key] += line.chat_id is not None
    unproven = removed.keys() - proven
    return [turn if turn.chat_id in unproven else rest for turn, rest in zip(turns, trimmed, strict=True)]


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


def _could_show(turn: Turn, line: Line) -> bool:
    """Whether a reading that showed this line was taken after the turn began."""
    return line.last_read_at is not None and line.last_read_at >= turn.began_at - SKEW


def _could_show_all(turn: Turn, line: Line) -> bool:
    """Whether a reading that showed this line was taken after the turn had said all: an earlier one shows a part."""
    return line.last_read_at is not None and line.last_read_at >= turn.told_at


def _without_leading(turn: Turn, lines: Sequence[Line], keys: Sequence[Key], places: dict[Key, list[int]]) -> Turn:
    said, answered = turn.messages[: turn.inputs], turn.messages[turn.inputs :]
    asked, replied = _keys(said), _keys(answered)

    def is_answered(run: range) -> bool:
        after = _next_line(keys, range(run.stop, len(keys)))
        return _could_show(turn, lines[run.start]) and (not replied or after in replied)

    inputs = said[_surplus(asked, keys, places, is_answered) :]
    if len(inputs) == len(said):
        return turn
    return msgspec.structs.replace(turn, messages=inputs + answered, inputs=len(inputs))


def _without_answers(turn: Turn, lines: Sequence[Line], keys: Sequence[Key], places: dict[Key, list[int]]) -> Turn:
    """The turn without the answers to earlier ones that its output begins with."""
    asked, replied = _keys(turn.messages[: turn.inputs]), _keys(turn.messages[turn.inputs :])
    if not asked or len(replied) < 2 or not all(content for _, content in replied):  # noqa: PLR2004  # one is its own
        return turn
    surplus = []
    for place in places.get(asked[-1], ())[:_PLACES]:
        length, run = _run(asked, keys, place)
        if length < len(asked) or not _could_show_all(turn, lines[place]):
            continue
        shown = _answers(keys, range(run.stop, len(keys)))
        if shown == replied:
            return turn
        earlier = len(replied) - len(shown)
        is_end = 0 < earlier < len(replied) and shown == replied[earlier:]
        if is_end and _answers_before(keys, run.start, earlier) == replied[:earlier]:
            surplus.append(earlier)
    kept = turn.inputs + min(surplus, default=0)
    return msgspec.structs.replace(turn, messages=turn.messages[: turn.inputs] + turn.messages[kept:])


def _answers(keys: Sequence[Key], places: range) -> list[Key]:
    """What is answered from a line on, up to the next words of the user."""
    found = []
    for place in places:
        if keys[place][0] == USER:
            break
        if not _is_skipped(keys[place]):
            found.append(keys[place])
    return found


def _answers_before(keys: Sequence[Key], line: int, most: int) -> list[Key]:
    """The last answers before a line."""
    found: list[Key] = []
    for place in range(line - 1, -1, -1):
        if len(found) >= most:
            break
        if keys[place][0] != USER and not _is_skipped(keys[place]):
            found.append(keys[place])
    return found[::-1]


def _next_line(keys: Sequence[Key], places: range) -> Key | None:
    return next((keys[place] for place in places if not _is_skipped(keys[place])), None)


def _is_skipped(key: Key) -> bool:
    return key[0] in ASIDES or not key[1]


def _surplus(
    messages: Sequence[Key], keys: Sequence[Key], places: dict[Key, list[int]], is_own: Callable[[range], bool]
) -> int:
    """How many of the first of these messages are repeats. `is_own`: whether these lines may be the same turn's."""
    if len(messages) < 2 or not all(content for _, content in messages):  # noqa: PLR2004  # one alone repeats nothing
        return 0
    runs = [_run(messages, keys, place) for place in places.get(messages[-1], ())[:_PLACES]]
    own = [run for run in runs if run[0] == len(messages) or is_own(run[1])]
    for length, lines in sorted(own, key=lambda run: (-run[0], run[1].stop)):
        missing = messages[: len(messages) - length]
        # Elsewhere in the history, and all of them before; none, where it shows all.
        if all(any(other < lines.stop - 1 for other in places.get(key, ())) for key in missing):
            return len(missing)
    return 0


def _run(messages: Sequence[Key], keys: Sequence[Key], place: int) -> tuple[int, range]:
    """How many of the last of these messages stand in a row that ends at this line, and its lines."""
    length, start = 1, place
    line = place - 1
    while length < len(messages) and line >= 0:
        if keys[line] == messages[-1 - length]:
            length, start = length + 1, line
        elif not _is_skipped(keys[line]):
            break
        line -= 1
    return length, range(start, place + 1)
