"""Cut lines of the history at the boundaries of the turns' messages, if the history joins or splits these.

A block consists of the user's messages between two answers, and of the answers up to the next user message. If a
block has the text of one turn or of several consecutive turns, but is divided differently, its lines are cut at the
boundaries of the turns' messages, and grouped by turn. Between two messages any white space is allowed, or none;
within a message the texts are equal. Turns that have all their lines without a cut are not considered.

If the webhook of one of several joined turns was lost, only line ends show the boundaries of messages: a turn is
found by its question and its answer, each between two line ends, if no other turn has the same question and no other
line of the user contains it.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, takewhile

import msgspec

from archiver.archive.transcript.candidates import ASIDES, SKEW, Match
from archiver.archive.transcript.placement import Placement
from archiver.archive.transcript.shapes import USER, TranscriptLine, TurnMessages
from archiver.archive.transcript.wording import Key, fragments_of, text_key
from archiver.events import Message

_TRIES = 128  # comparisons of turns with one block
_PREFIX = 12  # characters by which the first turn of a block is looked up
_PLACES = 16  # turns with the same beginning that are tried
_BEFORE, _AFTER = 2, 6  # turns around the last one that may come next: reported times may be in the wrong order
_TRIALS = 2
_MAX_FRAGMENTS = 256  # of one block

Place = Callable[[Sequence[TranscriptLine]], Placement]


class _Text(msgspec.Struct, frozen=True):
    """Consecutive messages: their text without spaces, the offset of each end, and those of spaces in messages."""

    text: str
    ends: list[int]
    spaces: frozenset[int]
    roles: frozenset[str]

    def is_same(self, other: "_Text", size: int) -> bool:
        """Return whether the first `size` characters are the same except for white space between messages."""
        if not self.text.startswith(other.text[:size]) or len(other.text) < size:
            return False
        if size and self.roles != other.roles:
            return False
        ends, other_ends = {0, *self.ends}, {0, *other.ends}
        different = {place for place in self.spaces ^ other.spaces if place < size}
        return all(place in (other_ends if place in self.spaces else ends) for place in different)


class _Block(msgspec.Struct, frozen=True):
    """Lines `start` to `end`: those of the user, then the answers."""

    start: int
    end: int
    user: list[int]
    answers: list[int]


class _Shown(msgspec.Struct, frozen=True):
    """The history, and the turns to find in it."""

    lines: Sequence[TranscriptLine]
    keys: Sequence[Key]
    turns: Sequence[TurnMessages]

    def text(self, places: Sequence[int]) -> _Text:
        return _text([self.keys[place] for place in places])

    def fragments(self, places: Sequence[int]) -> list["_Fragment"]:
        return [
            _Fragment(place, text, text_key(self.lines[place].role, text))
            for place in places
            for text in fragments_of(self.lines[place].content)
        ]


class _Fragment(msgspec.Struct, frozen=True):
    """A part of a line between two line ends."""

    line: int
    text: str
    key: Key


class _Part(msgspec.Struct, frozen=True):
    """The inputs and outputs of a turn."""

    turn: int
    inputs: list[Message]
    outputs: list[Message]
    asked: _Text
    answered: _Text


class _Cut(msgspec.Struct, frozen=True):
    """The lines that replace a block, and the indexes of those that turns must claim."""

    block: _Block
    lines: list[TranscriptLine]
    own: list[int]


def place_recut(
    lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], place: Place
) -> tuple[Sequence[TranscriptLine], Placement]:
    """Return the lines, cut as the turns are if the turns then claim them, and the placement of the turns."""
    placement = place(lines)
    cuts = [*_cuts(lines, turns, placement)]
    for _ in range(_TRIALS):
        if not cuts:
            break
        result, places = _apply(lines, cuts)
        recut = place(result)
        claimed = {line for match in recut.matches.values() for _, line in match.pairs}
        proven = [cut for cut, at in zip(cuts, places, strict=True) if claimed >= {at + each for each in cut.own}]
        if len(proven) == len(cuts):
            return result, recut
        cuts = proven
    return lines, placement


def _apply(lines: Sequence[TranscriptLine], cuts: Sequence[_Cut]) -> tuple[list[TranscriptLine], list[int]]:
    result: list[TranscriptLine] = []
    places, end = [], 0
    for cut in cuts:
        result += lines[end : cut.block.start]
        places.append(len(result))
        result += cut.lines
        end = cut.block.end
    return [*result, *lines[end:]], places


def _cuts(lines: Sequence[TranscriptLine], turns: Sequence[TurnMessages], placement: Placement) -> Iterator[_Cut]:
    """Yield the cuts of the blocks that need one, in order."""
    settled = {turn: match for turn, match in placement.matches.items() if match.is_full and not match.jumps}
    if len(settled) == len(turns):
        return
    shown = _Shown(lines, [text_key(line.role, line.content) for line in lines], turns)
    used: set[int] = set()
    search = _Search(shown, settled, used)
    if not search.has_turns:
        return
    # A turn without an answer may also be between the question and the answer of another.
    answered = {turn: match for turn, match in settled.items() if turns[turn].inputs < len(turns[turn].messages)}
    unsettled = {match.start for turn, match in placement.matches.items() if turn not in settled}
    wider = _Search(shown, answered, used) if unsettled and len(answered) < len(settled) else None
    owners = {match.start: turn for turn, match in settled.items()}
    low = 0
    for block in _blocks(shown.keys):
        before, low = low, max([low, *(owners[line] for line in block.user if line in owners)])
        cut = search.cut(block, low)
        if cut is None and wider is not None and not unsettled.isdisjoint(block.user):
            cut = wider.cut(block, before)
        cut = cut or search.cut_shared(block)
        if cut:
            yield cut


def _blocks(keys: Sequence[Key]) -> Iterator[_Block]:
    user: list[int] = []
    answers: list[int] = []
    for line, (role, content) in enumerate(keys):
        if role in ASIDES or not content:
            continue
        if role != USER:
            answers.append(line)
            continue
        if answers and user:
            yield _Block(user[0], line, user, answers)
        if answers:
            user, answers = [], []
        user.append(line)
    if user:
        yield _Block(user[0], len(keys), user, answers)


def _text(keys: Sequence[Key]) -> _Text:
    ends, spaces = list[int](), set[int]()
    size = 0
    words = list[str]()
    for _, content in keys:
        for number, word in enumerate(content.split(" ")):
            if number:
                spaces.add(size)
            size += len(word)
            words.append(word)
        ends.append(size)

    return _Text("".join(words), ends, frozenset(spaces), frozenset(role for role, _ in keys))


def _part(number: int, turn: TurnMessages) -> _Part | None:
    """Return the texts of a turn; None unless it has inputs, all from the user, and no outputs from the user."""
    keyed = [(message, text_key(message.role, message.content)) for message in turn.messages]
    filled = [(index, message, key) for index, (message, key) in enumerate(keyed) if key[1] and key[0] not in ASIDES]
    inputs = [(message, key) for index, message, key in filled if index < turn.inputs]
    outputs = [(message, key) for index, message, key in filled if index >= turn.inputs]
    if not inputs or {key[0] for _, key in inputs} != {USER} or any(key[0] == USER for _, key in outputs):
        return None
    return _Part(
        number,
        [message for message, _ in inputs],
        [message for message, _ in outputs],
        _text([key for _, key in inputs]),
        _text([key for _, key in outputs]),
    )


class _Share(msgspec.Struct, frozen=True):
    """A turn, and the ranges of fragments in a block's questions and answers that belong to it."""

    part: _Part
    asked: range
    answered: range


class _Search:
    """A search for the turns that a block consists of, among those that are not settled; each is found once."""

    def __init__(self, shown: _Shown, settled: Mapping[int, Match], used: set[int]) -> None:
        self._shown = shown
        self._turns = shown.turns
        self._owned = {line for match in settled.values() for line in range(match.start, match.end)}
        self._used = used
        self._tries = 0
        self._parts = [
            part
            for turn, each in enumerate(shown.turns)
            if turn not in settled and not each.is_deleted and (part := _part(turn, each))
        ]
        self._by_prefix: defaultdict[str, list[int]] = defaultdict(list)
        for index, part in enumerate(self._parts):
            self._by_prefix[part.asked.text[:_PREFIX]].append(index)

    @property
    def has_turns(self) -> bool:
        return bool(self._parts)

    def cut(self, block: _Block, low: int) -> _Cut | None:
        """Return the cut of a block; None if no turns have its text, or if it is divided as they are.

        Settled turns without an answer may precede those of the block.
        """
        free = self._free(block)
        if free is None:
            return None
        found = self._find(free, low)
        cut = _cut(free, found, self._shown.lines, self._shown.keys)
        if cut:
            self._used.update(part.turn for part in found)
        return cut

    def cut_shared(self, block: _Block) -> _Cut | None:
        """Return the cut of a block that joins messages of these turns and of turns whose webhooks were lost."""
        free = self._free(block)
        if free is None or not any("\n" in self._shown.lines[line].content for line in [*free.user, *free.answers]):
            return None
        asked, answered = self._shown.fragments(free.user), self._shown.fragments(free.answers)
        shares = self._shares(asked, answered) if len(asked) + len(answered) <= _MAX_FRAGMENTS else []
        pieces = _shared_pieces(shares, asked, answered, self._shown.lines)
        if len({piece.line for piece in pieces}) == len(pieces):
            return None
        self._used.update(share.part.turn for share in shares)
        return _replaced(free, pieces, self._shown.lines)

    def _free(self, block: _Block) -> _Block | None:
        """Return the block without leading turns that are settled; None if no question is left."""
        user = [*takewhile(lambda line: line not in self._owned, reversed(block.user))][::-1]
        return msgspec.structs.replace(block, start=user[0], user=user) if user else None

    def _shares(self, asked: Sequence[_Fragment], answered: Sequence[_Fragment]) -> list[_Share]:
        """Return the turns that certainly have some of these fragments, in order."""
        result: list[_Share] = []
        answers = [fragment.key for fragment in answered]
        after = 0
        for start, fragment in enumerate(asked):
            known = [each for each in self._by_fragment.get(fragment.key, ()) if each.turn not in self._used]
            if len(known) != 1 or self._counts[fragment.key] > 1:
                continue
            questions, own = _keys(known[0].inputs), _keys(known[0].outputs)
            stop = start + len(questions)
            found = [place for place in range(after, len(answers)) if own == answers[place : place + len(own)]]
            if own and len(found) == 1 and questions == [each.key for each in asked[start:stop]]:
                after = found[0] + len(own)
                result.append(_Share(known[0], range(start, stop), range(found[0], after)))
        return result

    @cached_property
    def _by_fragment(self) -> dict[Key, list[_Part]]:
        result: dict[Key, list[_Part]] = {}
        for part in self._parts:
            result.setdefault(_keys(part.inputs)[0], []).append(part)
        return result

    @cached_property
    def _counts(self) -> Counter[Key]:
        """Return how often each fragment of the user occurs in the history."""
        places = [place for place, key in enumerate(self._shown.keys) if key[0] == USER]
        return Counter(fragment.key for fragment in self._shown.fragments(places))

    def _find(self, block: _Block, low: int) -> list[_Part]:
        """Return the turns with the text of the block, preferably from turn `low` on; empty if there are none."""
        asked, answered = self._shown.text(block.user), self._shown.text(block.answers)
        line = self._shown.lines[block.start]
        self._tries = _TRIES
        firsts = [first for first in self._firsts(asked.text, low) if self._could_show(first, line)]
        for first in firsts:
            found = self._chain([first], asked, answered, line)
            if found:
                return found
        for first in firsts:
            if asked.is_same(self._parts[first].asked, max(len(asked.text), len(self._parts[first].asked.text))):
                return [self._parts[first]]
        return []

    def _firsts(self, text: str, low: int) -> list[int]:
        prefixes = (text[:size] for size in range(1, min(_PREFIX, len(text)) + 1))
        result = []
        for prefix in prefixes:
            indexes = self._by_prefix.get(prefix, [])
            at = bisect_left(indexes, low, key=lambda index: self._parts[index].turn)
            result += indexes[max(0, at - _PLACES // 2) : at + _PLACES]
        unused = (index for index in result if self._parts[index].turn not in self._used)
        return sorted(unused, key=lambda index: (self._parts[index].turn < low, index))

    def _could_show(self, index: int, line: TranscriptLine) -> bool:
        began_at = self._turns[self._parts[index].turn].began_at
        return line.last_read_at is not None and line.last_read_at >= began_at - SKEW

    def _chain(self, chain: list[int], asked: _Text, answered: _Text, line: TranscriptLine) -> list[_Part] | None:
        """Return turns with the text of the block that begin with `chain`; None if there are none.

        The next turns are tried in order of their times.
        """
        self._tries -= 1
        parts = [self._parts[index] for index in chain]
        questions, answers = _joined([part.asked for part in parts]), _joined([part.answered for part in parts])
        if self._tries < 0 or not asked.text.startswith(questions.text):
            return None
        if not _is_beginning(answers, answered, is_open=not parts[-1].outputs):
            return None
        if len(questions.text) == len(asked.text):
            is_answered = len(answers.text) >= len(answered.text) or not parts[-1].outputs
            return parts if is_answered and asked.is_same(questions, len(asked.text)) else None
        for index in self._next(chain):
            if self._could_show(index, line):
                found = self._chain([*chain, index], asked, answered, line)
                if found:
                    return found
        return None

    def _next(self, chain: Sequence[int]) -> Iterator[int]:
        last = chain[-1]
        for index in [*range(last + 1, last + 1 + _AFTER), *range(last - 1, last - 1 - _BEFORE, -1)]:
            if 0 <= index < len(self._parts) and index not in chain and self._parts[index].turn not in self._used:
                apart = self._turns[self._parts[last].turn].began_at - self._turns[self._parts[index].turn].began_at
                if apart <= 2 * SKEW:
                    yield index


def _joined(texts: Sequence[_Text]) -> _Text:
    if len(texts) == 1:
        return texts[0]
    ends, spaces, size = list[int](), set[int](), 0
    for each in texts:
        ends += [size + end for end in each.ends]
        spaces |= {size + space for space in each.spaces}
        size += len(each.text)
    roles = frozenset[str]().union(*(each.roles for each in texts))
    return _Text("".join(each.text for each in texts), ends, frozenset(spaces), roles)


def _is_beginning(answers: _Text, answered: _Text, *, is_open: bool) -> bool:
    """Return whether the answers and those of the block agree as far as both extend; `is_open`: more may follow."""
    size = min(len(answers.text), len(answered.text))
    if not answers.is_same(answered, size):
        return False
    return not is_open or size == len(answered.text) or size == 0 or size in answered.ends


def _cut(block: _Block, parts: Sequence[_Part], lines: Sequence[TranscriptLine], keys: Sequence[Key]) -> _Cut | None:
    """Return the lines of the block, cut as the turns are; None if no cut is needed."""
    asked = _pieces(block.user, [part.inputs for part in parts], lines, keys)
    answered = _pieces(block.answers, [part.outputs for part in parts], lines, keys)
    if len(parts) <= 1 and not any(piece.is_cut for piece in [*asked, *answered]):
        return None
    ordered = [
        piece for number in [*range(len(parts)), None] for piece in [*asked, *answered] if piece.turn == number
    ]
    return _replaced(block, ordered, lines)


def _replaced(block: _Block, pieces: Sequence["_Piece"], lines: Sequence[TranscriptLine]) -> _Cut:
    result, own, done = list[TranscriptLine](), list[int](), block.start
    reached = {*block.user, *block.answers}
    is_shared = len({piece.turn for piece in pieces}) > 1
    for piece in pieces:
        # A line that webhooks often omit stays before the line that it precedes.
        result += [lines[line] for line in range(done, piece.line) if line not in reached]
        done = max(done, piece.line + 1)
        if piece.turn is not None and (piece.is_cut or is_shared):
            own.append(len(result))
        result.append(piece.shown)
    result += [lines[line] for line in range(done, block.end) if line not in reached]
    return _Cut(block, result, own)


def _shared_pieces(
    shares: Sequence[_Share],
    asked: Sequence[_Fragment],
    answered: Sequence[_Fragment],
    lines: Sequence[TranscriptLine],
) -> list["_Piece"]:
    """Return the lines of each turn and, between them, those of lost turns: their questions, then their answers.

    Empty if an answer, but no question, precedes the first turn.
    """
    result: list[_Piece] = []
    question = answer = 0
    for number, share in enumerate(shares):
        if not question and not share.asked.start and share.answered.start:
            return []
        result += _lost(asked[question : share.asked.start], lines)
        result += _lost(answered[answer : share.answered.start], lines)
        own = [*asked[share.asked.start : share.asked.stop], *answered[share.answered.start : share.answered.stop]]
        for message in [*share.part.inputs, *share.part.outputs]:
            size = len(fragments_of(message.content))
            text = "\n".join(fragment.text for fragment in own[:size])
            shown = _cut_line(message, text, [lines[own[0].line]])
            result.append(_Piece(shown, own[0].line, number, is_cut=True))
            own = own[size:]
        question, answer = share.asked.stop, share.answered.stop
    return result + _lost(asked[question:], lines) + _lost(answered[answer:], lines)


def _lost(fragments: Sequence[_Fragment], lines: Sequence[TranscriptLine]) -> list["_Piece"]:
    """Return these fragments of lost turns, those of one line as one piece."""
    result = []
    for line, group in groupby(fragments, lambda fragment: fragment.line):
        text = "\n".join(fragment.text for fragment in group)
        is_whole = text == "\n".join(fragments_of(lines[line].content))
        shown = lines[line] if is_whole else msgspec.structs.replace(lines[line], content=text)
        result.append(_Piece(shown, line, None, is_cut=not is_whole))
    return result


def _keys(messages: Sequence[Message]) -> list[Key]:
    return [text_key(message.role, text) for message in messages for text in fragments_of(message.content)]


class _Piece(msgspec.Struct, frozen=True):
    """A line to show, the first history line that it comes from, and its turn (by its number in the block)."""

    shown: TranscriptLine
    line: int
    turn: int | None
    is_cut: bool


def _pieces(
    places: Sequence[int],
    messages: Sequence[Sequence[Message]],
    lines: Sequence[TranscriptLine],
    keys: Sequence[Key],
) -> list[_Piece]:
    """Return these lines, cut at the boundaries of the messages of each turn."""
    flat = [(number, message) for number, own in enumerate(messages) for message in own]
    line_ends = _text([keys[line] for line in places]).ends
    ends = _text([text_key(message.role, message.content) for _, message in flat]).ends
    common = sorted({*line_ends} & {*ends}) if _is_alike(places, flat, keys) else []
    result = []
    line_at = message_at = 0
    for end in common:
        line_to, message_to = line_ends.index(end, line_at) + 1, ends.index(end, message_at) + 1
        shared, own = places[line_at:line_to], flat[message_at:message_to]
        is_cut = len(shared) > 1 or len(own) > 1
        texts = _slices([lines[line].content for line in shared], [message.content for _, message in own])
        for (number, message), text in zip(own, texts, strict=True):
            first = lines[shared[0]]
            shown = (
                _cut_line(message, text, [lines[line] for line in shared])
                if is_cut
                else msgspec.structs.replace(first, is_reworded=first.is_reworded or len(messages) > 1)
            )
            result.append(_Piece(shown, shared[0], number, is_cut))
        line_at, message_at = line_to, message_to
    return result + [_Piece(lines[line], line, None, is_cut=False) for line in places[line_at:]]


def _is_alike(places: Sequence[int], flat: Sequence[tuple[int, Message]], keys: Sequence[Key]) -> bool:
    one, other = (
        _text([keys[line] for line in places]),
        _text([text_key(message.role, message.content) for _, message in flat]),
    )
    return one.is_same(other, min(len(one.text), len(other.text)))


def _cut_line(message: Message, text: str, lines: Sequence[TranscriptLine]) -> TranscriptLine:
    """Return a line with the content of the message, and the history's text of it if that differs."""
    return msgspec.structs.replace(
        lines[0],
        content=message.content,
        kind=message.kind,
        is_reworded=True,
        history_content=text if text != message.content else None,
    )


def _slices(shown: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Return the part of the shown texts, joined by line feeds, that belongs to each content."""
    whole = "\n".join(shown)
    if len(contents) == 1:
        return [whole]
    places = [place for place, character in enumerate(whole) if not character.isspace()]
    sizes = [sum(not character.isspace() for character in content) for content in contents]
    if sum(sizes) != len(places):  # also written differently: entities, Unicode forms
        return [*contents]
    result, at = [], 0
    for size in sizes:
        result.append(whole[places[at] : places[at + size - 1] + 1])
        at += size
    return result
