"""Random conversations whose truth is known: what was said, what webhooks delivered, what readings returned.

Texts are few, so that turns repeat each other. Webhooks are lost, histories hold lines that no webhook reports, turns
are reported before all of their output exists, turns are deleted, and readings are cut at either end.
"""

import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import overload

import msgspec

from archiver.archive.transcript import HistoryMessages, TurnMessages, transcript
from archiver.events import Message

START = datetime(2024, 1, 15, tzinfo=UTC)
ASIDES = ("tool", "system")
SKEW = 40  # seconds by which a reported time is wrong at most, where times are skewed
SHORT = ("ok", "yes", "no", "thanks")


class Words(Sequence[str]):
    """Texts of which `short` in a hundred are short ones that recur, and all others are different."""

    def __init__(self, short: int) -> None:
        self._short = short

    def __len__(self) -> int:
        return 10**9

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            raise TypeError(number)
        return SHORT[number // 100 % len(SHORT)] if number % 100 < self._short else f"text {number}"


DISTINCT, REALISTIC = Words(0), Words(15)


class Conversation(msgspec.Struct):
    """`truth` is the final history: each message and the chat that it belongs to, None where no webhook arrived."""

    truth: list[tuple[Message, str | None]]
    turns: list[TurnMessages]
    readings: list[HistoryMessages]


class _Spoken(msgspec.Struct):
    began: float
    inputs: list[Message]
    outputs: list[Message]  # with lines that no webhook reports
    reported: int  # so many messages of the output, asides not counted, were there when the webhook was sent
    is_lost: bool
    deleted: float | None = None
    messages: list[Message] = []

    def answers(self) -> list[Message]:
        return [message for message in self.outputs if message.role not in ASIDES]


def conversation(rng: random.Random, *, is_skewed: bool = False, words: Sequence[str] | None = None) -> Conversation:
    """One conversation, of `words` or of a few that recur.

    `is_skewed`: its turns report times that are wrong by up to `SKEW` seconds.
    """
    words = words or [*SHORT, *(f"text {number}" for number in range(36))][: rng.choice([1, 2, 4, 40])]
    spoken = _spoken(rng, words)
    greeting = [Message("assistant", "Welcome")] * (rng.random() < 0.2)
    end = spoken[-1].began + 600 if spoken else 600.0
    readings = [*_early_readings(rng, spoken, greeting, end), _reading(spoken, greeting, end)]
    turns = [_turn(rng, number, each, is_skewed=is_skewed) for number, each in enumerate(spoken) if not each.is_lost]
    rng.shuffle(turns)
    truth: list[tuple[Message, str | None]] = [(message, None) for message in greeting]
    for number, each in enumerate(spoken):
        chat_id = None if each.is_lost else f"C{number}"
        truth += [(message, chat_id) for message in _shown(each, end)]
    return Conversation(truth, turns, readings)


def _spoken(rng: random.Random, words: Sequence[str]) -> list[_Spoken]:
    loss = rng.choice([0.0, 0.2, 0.4])
    pause = rng.choice([5.0, 30.0, 90.0])
    partial, aside = rng.choice([0.0, 0.0, 0.2]), rng.choice([0.0, 0.0, 0.2])
    moment, spoken = 0.0, []
    for _ in range(rng.randint(1, 8)):
        moment += rng.uniform(0.5, 1.5) * pause
        inputs = [Message("user", rng.choice(words)) for _ in range(rng.choice([1, 1, 1, 1, 2]))]
        outputs: list[Message] = []
        for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2])):
            if rng.random() < aside:
                outputs.append(Message(rng.choice(ASIDES), "looking it up"))
            outputs.append(Message("assistant", rng.choice(words)))
        answers = sum(message.role not in ASIDES for message in outputs)
        reported = rng.randint(0, answers) if rng.random() < partial else answers
        each = _Spoken(moment, inputs, outputs, reported, rng.random() < loss)
        if rng.random() < 0.05 and not each.is_lost:
            each.deleted = moment + rng.uniform(1, 400)
        spoken.append(each)
    for each in spoken:
        # Whether history still shows a deleted turn or another one that was lost and says the same, nothing can show.
        if any(other.is_lost and _could_be(each, other) for other in spoken):
            each.deleted = None
    return spoken


def _could_be(one: _Spoken, other: _Spoken) -> bool:
    """Whether what was reported of the one fits the other."""
    return one.inputs == other.inputs and other.answers()[: one.reported] == one.answers()[: one.reported]


def _shown(each: _Spoken, moment: float) -> list[Message]:
    if each.began > moment or (each.deleted is not None and each.deleted <= moment):
        return []
    return each.inputs + each.outputs


def _reading(spoken: list[_Spoken], greeting: list[Message], moment: float) -> HistoryMessages:
    messages = [*greeting, *(message for each in spoken for message in _shown(each, moment))]
    return HistoryMessages(tuple(messages), START + timedelta(seconds=moment))


def _early_readings(
    rng: random.Random, spoken: list[_Spoken], greeting: list[Message], end: float
) -> list[HistoryMessages]:
    """Up to two readings on the way, whole or the newest lines alone."""
    result = []
    for moment in sorted(rng.uniform(0, end - 300) for _ in range(rng.choice([0, 0, 1, 2]))):
        whole = _reading(spoken, greeting, moment)
        first = rng.randint(0, len(whole.messages)) if rng.random() < 0.2 else 0
        result.append(msgspec.structs.replace(whole, messages=whole.messages[first:]))
    return result


def _turn(rng: random.Random, number: int, each: _Spoken, *, is_skewed: bool) -> TurnMessages:
    began = START + timedelta(seconds=each.began + (rng.uniform(-SKEW, SKEW) if is_skewed else 0))
    messages = (*each.inputs, *each.answers()[: each.reported])
    return TurnMessages(f"C{number}", messages, len(each.inputs), began, began, each.deleted is not None)


class Verdict(msgspec.Struct):
    """How a transcript differs from the truth.

    `misplaced` are the chats with a line that is not theirs, or without one that is; `reported` is whether the
    transcript says so: a line of it is ambiguous, or a turn is in no reading. `surplus` counts the lines that the
    latest reading does not show; those of deleted turns, and all where turns were deleted, are none.
    `is_needless`: it is ambiguous, but no turn fits any lines but its own.
    """

    misplaced: frozenset[str]
    is_reported: bool
    is_ambiguous: bool
    is_needless: bool
    surplus: int


def judge(conversation: Conversation) -> Verdict:
    """Align a conversation and compare the result with its truth."""
    lines = transcript(conversation.turns, conversation.readings)
    shown = [line for line in lines if line.in_history]
    assert [(line.role, line.content) for line in shown] == [
        (texts.role, texts.content) for texts, _ in conversation.truth
    ]
    assigned = [line.chat_id for line in shown]
    true = [chat_id for _, chat_id in conversation.truth]
    misplaced = {chat for pair in zip(assigned, true, strict=True) if pair[0] != pair[1] for chat in pair if chat}
    read = {line.chat_id for line in lines if line.first_read_at is not None}
    is_ambiguous = any(line.is_ambiguous for line in lines)
    is_missing = any(turn.chat_id not in read for turn in conversation.turns if not turn.is_deleted)
    has_deleted = any(turn.is_deleted for turn in conversation.turns)
    return Verdict(
        misplaced=frozenset(misplaced),
        is_reported=is_ambiguous or is_missing,
        is_ambiguous=is_ambiguous,
        is_needless=is_ambiguous
        and not has_deleted
        and not any(_fits_elsewhere(each, conversation) for each in conversation.turns),
        surplus=0 if has_deleted else len(lines) - len(shown),
    )


def _fits_elsewhere(turn: TurnMessages, conversation: Conversation) -> bool:
    """Whether its messages stand, in order and up to the next words of the user, at another line than its first."""
    texts = [message for message, _ in conversation.truth]
    own = next((place for place, (_, chat_id) in enumerate(conversation.truth) if chat_id == turn.chat_id), -1)
    return any(_fits(turn.messages, texts[place:]) for place in range(len(texts)) if place != own)


def _fits(messages: Sequence[Message], said: Sequence[Message]) -> bool:
    if said[:1] != [*messages[:1]]:
        return False
    result = 0
    for each in said:
        if result < len(messages) and each == messages[result]:
            result += 1
        elif each.role == "user":
            break
    return result == len(messages)


class Tally(msgspec.Struct):
    """What many conversations came to."""

    conversations: int = 0
    ambiguous: int = 0
    misplaced: int = 0  # and reported
    wrong: list[int] = msgspec.field(default_factory=list)  # seeds of those with an error that is not reported
    needless: list[int] = msgspec.field(default_factory=list)  # seeds of those that are ambiguous without a reason

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations: {len(self.wrong)} wrong, {self.ambiguous:,} ambiguous, of which"
            f" {self.misplaced:,} are not as they were and {len(self.needless)} have no reason to be"
        )


def tally(seeds: Iterable[int], *, is_skewed: bool = False, words: Sequence[str] | None = None) -> Tally:
    """Judge one conversation a seed."""
    result = Tally()
    for seed in seeds:
        verdict = judge(conversation(random.Random(seed), is_skewed=is_skewed, words=words))
        result.conversations += 1
        result.ambiguous += verdict.is_ambiguous
        if verdict.is_needless:
            result.needless.append(seed)
        if verdict.surplus or (verdict.misplaced and not verdict.is_reported):
            result.wrong.append(seed)
        else:
            result.misplaced += bool(verdict.misplaced)
    return result
