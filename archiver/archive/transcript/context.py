"""Remove from a turn the earlier conversation that some clients send again with it.

`messages_of_turn` removes it by form alone. From an input it removes the messages up to the last answer before the
user's messages, and a repeated or blank answer after them. From an output it removes the messages up to the last one
of the user. `without_repeats` removes repeats that only the history proves. The ledger keeps the bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from archiver.archive.transcript.candidates import ASIDES, PROMPTS, SKEW
from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.wording import ASSISTANT, Key, normal_role, text_key
from archiver.events import Message

_BLANK = frozenset({"text", "empty", "null"})  # shapes of a message that says nothing where its text is blank
_PLACES = 64  # of an often repeated text that are looked at
_EXCHANGE = 2  # a question and its answer, which repeat nothing

Messages = tuple[Message, ...]


def messages_of_turn(input_messages: Messages, output_messages: Messages) -> tuple[Messages, Messages]:
    """Return input and output of a turn without the earlier conversation.

    Where there is no input, the user's last words in the output are it.
    """
    if len(input_messages) > 1:
        input_messages = input_messages[_context_end(input_messages) :]
    end = _last_of(output_messages, is_user=True) if len(output_messages) > 1 else 0
    if 0 < end < len(output_messages) or (
        end and input_messages and _ends_with(output_messages, _without_answer(input_messages, ()))
    ):
        if not input_messages:
            begin = end
            while begin and normal_role(output_messages[begin - 1].role) == USER:
                begin -= 1
            input_messages = output_messages[begin:end]
        output_messages = output_messages[end:]
    return _without_answer(input_messages, output_messages) if len(
        input_messages
    ) > 1 else input_messages, output_messages


def _without_answer(input_messages: Messages, output_messages: Messages) -> Messages:
    """Return the input without trailing blanks or answers after the last user message."""
    end = _last_of(input_messages, is_user=True)
    after = input_messages[end:]
    if not end or not after or any(normal_role(message.role) in ASIDES for message in after):
        return input_messages
    filled = [message for message in after if message.content.strip() or message.shape not in _BLANK]
    return (
        input_messages[:end]
        if not filled or _keys(filled) == _keys(output_messages[: len(filled)])
        else input_messages
    )


def _ends_with(output_messages: Messages, input_messages: Messages) -> bool:
    """Return whether the output only repeats the conversation up to this input."""
    return len(output_messages) > len(input_messages) and _keys(output_messages[-len(input_messages) :]) == _keys(
        input_messages
    )


def _keys(messages: Sequence[Message]) -> list[Key]:
    return [text_key(message.role, message.content) for message in messages]


def _context_end(input_messages: Messages) -> int:
    """Return the index at which the new input begins: after the last answer followed by a user message."""
    last = _last_of(input_messages, is_user=True)
    return _last_of(input_messages[:last], is_user=False)


def _last_of(messages: Messages, *, is_user: bool) -> int:
    """Return the index after the last message of the user, or after the last answer or call of a tool."""
    for index in range(len(messages), 0, -1):
        role = normal_role(messages[index - 1].role)
        if (role == USER) if is_user else (role != USER and role not in PROMPTS):
            return index
    return 0


def without_repeats(turns: Sequence[TurnMessages], lines: Sequence[TranscriptLine]) -> list[TurnMessages]:
    """Return the turns, in the given order, without content that the history shows as a repeat.

    Leading inputs go if the history shows the others of them without these, next to what the turn was answered, and
    these before: single texts that recur elsewhere are no repeats. Leading outputs go if a reading taken after the
    turn had said all answers the inputs with the others of them alone, and these are the last answers before. All of
    a deleted turn stays: the history shows no turn to compare it with. A system message goes if an earlier turn has
    it, too, and the history shows it less often.
    """
    if not lines:
        return [*turns]
    keys = [text_key(line.role, line.content) for line in lines]
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    prompts: set[Key] = set()
    result = []
    for turn in turns:
        trimmed = _without_prompts(turn, prompts, places) if turn.inputs > 1 else turn
        if len(trimmed.messages) > _EXCHANGE and not trimmed.is_deleted:
            trimmed = _without_leading(trimmed, lines, keys, places)
            trimmed = _without_answers(trimmed, lines, keys, places)
        result.append(trimmed)
    return result


def restore_unproven(
    turns: Sequence[TurnMessages], trimmed: Sequence[TurnMessages], lines: Sequence[TranscriptLine]
) -> list[TurnMessages]:
    """Return the trimmed turns; a turn is restored if the transcript does not confirm its repeats.

    `turns` are the same ones, whole; `lines` is the transcript with the trimmed ones.
    """
    removed = {
        turn.chat_id: Counter(_keys(turn.messages)) - Counter(_keys(rest.messages))
        for turn, rest in zip(turns, trimmed, strict=True)
        if len(rest.messages) < len(turn.messages)
    }
    if not removed:
        return [*trimmed]
    keys = [text_key(line.role, line.content) for line in lines]
    shown = Counter(key for key, line in zip(keys, lines, strict=True) if line.chat_id is None)
    proven, seen = set(), set()
    for key, line in zip(keys, lines, strict=True):
        if line.chat_id in removed and line.chat_id not in seen and _contains(shown, removed[line.chat_id]):
            proven.add(line.chat_id)
        seen.add(line.chat_id)
        shown[key] += line.chat_id is not None
    unproven = removed.keys() - proven
    return [turn if turn.chat_id in unproven else rest for turn, rest in zip(turns, trimmed, strict=True)]


def _contains(shown: Counter[Key], removed: Counter[Key]) -> bool:
    """Return whether all that was removed is shown; of the user, an answer with the same text counts, too."""
    missing = removed - shown
    left = shown - removed
    return all(role == USER and number <= left[ASSISTANT, text] for (role, text), number in missing.items())


def _without_prompts(turn: TurnMessages, prompts: set[Key], places: dict[Key, list[int]]) -> TurnMessages:
    remaining = []
    for message in turn.messages[: turn.inputs]:
        key = text_key(message.role, message.content)
        if key[0] in PROMPTS:
            if key in prompts and len(places.get(key, ())) <= 1:
                continue
            prompts.add(key)
        remaining.append(message)
    if len(remaining) == turn.inputs or not remaining:
        return turn
    return msgspec.structs.replace(turn, messages=(*remaining, *turn.messages[turn.inputs :]), inputs=len(remaining))


def _could_show(turn: TurnMessages, line: TranscriptLine) -> bool:
    """Return whether a reading that showed this line was taken after the turn began."""
    return line.last_read_at is not None and line.last_read_at >= turn.began_at - SKEW


def _could_show_all(turn: TurnMessages, line: TranscriptLine) -> bool:
    """Return whether a reading that showed this line was taken after the end of the turn, so that it is complete."""
    return line.last_read_at is not None and line.last_read_at >= turn.revised_at


def _without_leading(
    turn: TurnMessages, lines: Sequence[TranscriptLine], keys: Sequence[Key], places: dict[Key, list[int]]
) -> TurnMessages:
    said, output_messages = turn.messages[: turn.inputs], turn.messages[turn.inputs :]
    question_keys, answer_keys = _keys(said), _keys(output_messages)

    def is_answered(run: range) -> bool:
        after = _next_line(keys, range(run.stop, len(keys)))
        return _could_show(turn, lines[run.start]) and (not answer_keys or after in answer_keys)

    inputs = said[_surplus(question_keys, keys, places, is_answered) :]
    if len(inputs) == len(said):
        return turn
    return msgspec.structs.replace(turn, messages=inputs + output_messages, inputs=len(inputs))


def _without_answers(
    turn: TurnMessages, lines: Sequence[TranscriptLine], keys: Sequence[Key], places: dict[Key, list[int]]
) -> TurnMessages:
    """Return the turn without the answers to earlier ones that its output begins with."""
    question_keys, answer_keys = _keys(turn.messages[: turn.inputs]), _keys(turn.messages[turn.inputs :])
    if not question_keys or len(answer_keys) <= 1 or not all(content for _, content in answer_keys):
        return turn
    surplus = []
    for place in places.get(question_keys[-1], ())[:_PLACES]:
        length, run = _run(question_keys, keys, place)
        if length < len(question_keys) or not _could_show_all(turn, lines[place]):
            continue
        shown = _answers(keys, range(run.stop, len(keys)))
        if shown == answer_keys:
            return turn
        earlier = len(answer_keys) - len(shown)
        is_end = 0 < earlier < len(answer_keys) and shown == answer_keys[earlier:]
        if is_end and _answers_before(keys, run.start, earlier) == answer_keys[:earlier]:
            surplus.append(earlier)
    remaining = turn.inputs + min(surplus, default=0)
    return msgspec.structs.replace(turn, messages=turn.messages[: turn.inputs] + turn.messages[remaining:])


def _answers(keys: Sequence[Key], places: range) -> list[Key]:
    """Return the answers from a line up to the next user message."""
    result = []
    for place in places:
        if keys[place][0] == USER:
            break
        if not _is_skipped(keys[place]):
            result.append(keys[place])
    return result


def _answers_before(keys: Sequence[Key], line: int, limit: int) -> list[Key]:
    """Return the latest answers before a line."""
    result: list[Key] = []
    for place in range(line - 1, -1, -1):
        if len(result) >= limit:
            break
        if keys[place][0] != USER and not _is_skipped(keys[place]):
            result.append(keys[place])
    return result[::-1]


def _next_line(keys: Sequence[Key], places: range) -> Key | None:
    return next((keys[place] for place in places if not _is_skipped(keys[place])), None)


def _is_skipped(key: Key) -> bool:
    return key[0] in ASIDES or not key[1]


def _surplus(
    messages: Sequence[Key], keys: Sequence[Key], places: dict[Key, list[int]], is_own: Callable[[range], bool]
) -> int:
    """Return how many leading messages are repeats. `is_own`: whether lines may belong to this turn."""
    if len(messages) <= 1 or not all(content for _, content in messages):
        return 0
    runs = [_run(messages, keys, place) for place in places.get(messages[-1], ())[:_PLACES]]
    own = [run for run in runs if run[0] == len(messages) or is_own(run[1])]
    for length, lines in sorted(own, key=lambda run: (-run[0], run[1].stop)):
        missing = messages[: len(messages) - length]
        # Elsewhere in the history, and all of them before; none, where it shows all.
        if all(any(other < lines.stop - 1 for other in _places_of_either(key, places)) for key in missing):
            return len(missing)
    return 0


def _places_of_either(key: Key, places: dict[Key, list[int]]) -> Iterator[int]:
    """Yield the lines with this text: of its role and, for the user, of the assistant: a text may have no role."""
    yield from places.get(key, ())
    if key[0] == USER:
        yield from places.get((ASSISTANT, key[1]), ())


def _run(messages: Sequence[Key], keys: Sequence[Key], place: int) -> tuple[int, range]:
    """Return how many trailing messages match consecutive lines that end at this line, and those lines."""
    length, start = 1, place
    line = place - 1
    while length < len(messages) and line >= 0:
        if keys[line] == messages[-1 - length]:
            length, start = length + 1, line
        elif not _is_skipped(keys[line]):
            break
        line -= 1
    return length, range(start, place + 1)
