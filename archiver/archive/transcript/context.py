"""Remove from a turn the earlier conversation that some clients send again with it.

`messages_of_turn` uses only the form of the turn. From an input it removes the messages up to the last answer before
the user's messages, and a repeated or blank answer after them. From an output it removes the messages up to the
user's last message. With the history as proof, `oldest_first` reverses an input that was sent newest first, and
`without_repeats` removes repeats. The ledger retains all bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from archiver.archive.transcript.candidates import ASIDES, PROMPTS, SKEW
from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.wording import ASSISTANT, Key, normal_role, text_key
from archiver.events import Message

_BLANK = frozenset({"text", "empty", "null"})  # shapes of a message that has no content if its text is blank
_PLACES = 64  # of a frequently repeated text that are examined
_EXCHANGE = 2  # a question and its answer, which repeat nothing
_ENDS = 32  # messages at each end of an input that are compared with the history

Messages = tuple[Message, ...]


def messages_of_turn(input_messages: Messages, output_messages: Messages) -> tuple[Messages, Messages]:
    """Return input and output of a turn without the earlier conversation.

    If there is no input, the user's last messages in the output are the input.
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


def as_sent(input_messages: Messages) -> Messages:
    """Return the part of an input that `oldest_first` needs.

    It is the whole input, or both ends of a long one; empty for a single message.
    """
    if len(input_messages) <= 2 * _ENDS:
        return input_messages if len(input_messages) > 1 else ()
    return input_messages[:_ENDS] + input_messages[-_ENDS:]


def _without_answer(input_messages: Messages, output_messages: Messages) -> Messages:
    """Return the input without blank or repeated answers after the last user message."""
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
    """Return the index after the user's last message if `is_user`, otherwise after the last answer or tool message.

    0 if there is none.
    """
    for index in range(len(messages), 0, -1):
        role = normal_role(messages[index - 1].role)
        if (role == USER) if is_user else (role != USER and role not in PROMPTS):
            return index
    return 0


class _Shown:
    """The lines of a history, by text."""

    def __init__(self, lines: Sequence[TranscriptLine]) -> None:
        self.lines = lines
        self.keys = [text_key(line.role, line.content) for line in lines]
        self.places: dict[Key, list[int]] = {}
        for place, key in enumerate(self.keys):
            self.places.setdefault(key, []).append(place)


def oldest_first(
    turns: Sequence[TurnMessages], lines: Sequence[TranscriptLine]
) -> tuple[list[TurnMessages], set[str]]:
    """Return the turns, in the given order, and the chat ids of those whose input fits the history in both orders.

    An input was sent newest first if the history shows its first message before an answer of the turn and the others
    earlier, and more of its messages match in succession in this order than in the order in which they were sent.
    """
    if not lines or not any(turn.sent for turn in turns):
        return [*turns], set()
    shown = _Shown(lines)
    result, undecided = [], set[str]()
    for turn in turns:
        other = _reversed(turn)
        backwards = _length_shown(turn, turn.sent[::-1], shown) if other else 0
        forwards = _length_shown(turn, turn.sent, shown) if backwards else 0
        result.append(other if other and backwards > forwards else turn)
        if 0 < backwards == forwards and turn.inputs < len(turn.messages):
            undecided.add(turn.chat_id)
    return result, undecided


def _reversed(turn: TurnMessages) -> TurnMessages | None:
    """Return the turn with the input that it has if that was sent newest first; None if the input is the same."""
    if not turn.sent or turn.is_deleted:
        return None
    outputs = turn.messages[turn.inputs :]
    inputs, _ = messages_of_turn(turn.sent[::-1], outputs)
    if not inputs or _keys(inputs) == _keys(turn.messages[: turn.inputs]):
        return None
    return msgspec.structs.replace(turn, messages=inputs + outputs, inputs=len(inputs))


def _length_shown(turn: TurnMessages, sent: Messages, shown: _Shown) -> int:
    """Return how many messages of an input the history shows in succession before an answer of the turn.

    The result is 0 if the other messages are not shown earlier, unless the history may have lost them at its head.
    """
    said = [key for key in _keys(sent[: _last_of(sent, is_user=True)]) if not _is_skipped(key)]
    has_context = any(role != USER for role, _ in said)
    longest = 0
    for place in shown.places.get(said[-1], ())[:_PLACES] if said else ():
        length, run = _run(said, shown.keys, place)
        if _is_answered(turn, run, shown) and (
            (has_context and run.start == 0) or _stand_before(said[:-length], run, shown)
        ):
            longest = max(longest, length)
    return longest


def without_repeats(turns: Sequence[TurnMessages], lines: Sequence[TranscriptLine]) -> list[TurnMessages]:
    """Return the turns, in the given order, without content that the history shows as a repeat.

    Leading inputs are removed if the history shows the other inputs without them, next to an answer of the turn, and
    the removed ones earlier: single texts that recur elsewhere are not repeats. Leading outputs are removed if a
    reading after the end of the turn shows only the other outputs as answers to the inputs, and the removed ones are
    the last answers before these inputs. A deleted turn remains complete: the history shows no turn to compare it
    with. A system message is removed if an earlier turn also has it, and the history shows it at most once.
    """
    if not lines:
        return [*turns]
    shown = _Shown(lines)
    prompts: set[Key] = set()
    result = []
    for turn in turns:
        trimmed = _without_prompts(turn, prompts, shown.places) if turn.inputs > 1 else turn
        if len(trimmed.messages) > _EXCHANGE and not trimmed.is_deleted:
            trimmed = _without_leading(trimmed, shown)
            trimmed = _without_answers(trimmed, shown)
        result.append(trimmed)
    return result


def restore_unproven(
    turns: Sequence[TurnMessages], trimmed: Sequence[TurnMessages], lines: Sequence[TranscriptLine]
) -> list[TurnMessages]:
    """Return the trimmed turns; a turn is restored if the transcript does not confirm its repeats.

    `turns` are the same turns, untrimmed; `lines` is the transcript of the trimmed turns.
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
    """Return whether all removed texts are shown; for a user's text, an answer with the same text also counts."""
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


def _is_answered(turn: TurnMessages, run: range, shown: _Shown) -> bool:
    """Return whether an answer of the turn, if it has any, follows these lines in a reading that could show it."""
    answers = _keys(turn.messages[turn.inputs :])
    after = _next_line(shown.keys, range(run.stop, len(shown.keys)))
    return _could_show(turn, shown.lines[run.start]) and (not answers or after in answers)


def _without_leading(turn: TurnMessages, shown: _Shown) -> TurnMessages:
    said, output_messages = turn.messages[: turn.inputs], turn.messages[turn.inputs :]
    inputs = said[_surplus(_keys(said), shown, lambda run: _is_answered(turn, run, shown)) :]
    if len(inputs) == len(said):
        return turn
    return msgspec.structs.replace(turn, messages=inputs + output_messages, inputs=len(inputs))


def _without_answers(turn: TurnMessages, shown: _Shown) -> TurnMessages:
    """Return the turn without the answers to earlier turns with which its output begins."""
    question_keys, answer_keys = _keys(turn.messages[: turn.inputs]), _keys(turn.messages[turn.inputs :])
    if not question_keys or len(answer_keys) <= 1 or not all(content for _, content in answer_keys):
        return turn
    surplus = []
    for place in shown.places.get(question_keys[-1], ())[:_PLACES]:
        length, run = _run(question_keys, shown.keys, place)
        if length < len(question_keys) or not _could_show_all(turn, shown.lines[place]):
            continue
        answers = _answers(shown.keys, range(run.stop, len(shown.keys)))
        if answers == answer_keys:
            return turn
        earlier = len(answer_keys) - len(answers)
        is_end = 0 < earlier < len(answer_keys) and answers == answer_keys[earlier:]
        if is_end and _answers_before(shown.keys, run.start, earlier) == answer_keys[:earlier]:
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


def _surplus(messages: Sequence[Key], shown: _Shown, is_own: Callable[[range], bool]) -> int:
    """Return how many leading messages are repeats. `is_own`: whether lines may belong to this turn."""
    if len(messages) <= 1 or not all(content for _, content in messages):
        return 0
    runs = [_run(messages, shown.keys, place) for place in shown.places.get(messages[-1], ())[:_PLACES]]
    own = [run for run in runs if run[0] == len(messages) or is_own(run[1])]
    for length, lines in sorted(own, key=lambda run: (-run[0], run[1].stop)):
        missing = messages[: len(messages) - length]
        # Each missing message must occur earlier in the history. If none is missing, none is a repeat.
        if _stand_before(missing, lines, shown):
            return len(missing)
    return 0


def _stand_before(missing: Sequence[Key], run: range, shown: _Shown) -> bool:
    """Return whether each of these messages is shown before the last line of a run."""
    return all(any(other < run.stop - 1 for other in _places_of_either(key, shown.places)) for key in missing)


def _places_of_either(key: Key, places: dict[Key, list[int]]) -> Iterator[int]:
    """Yield the lines with this text and role; for a user's text, also the assistant's.

    A message that was sent without a role counts as the user's.
    """
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
