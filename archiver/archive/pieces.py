"""History responses in pieces: each message of a session is stored once.

A growing history repeats all its earlier messages. So a response that is not stored as bytes is stored as a frame
(the bytes before the messages, between two of them, and after them) and runs of messages, numbered in the order in
which the session's responses first showed them. Frame and runs reproduce the exact bytes; the digest in the ledger
proves it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

import msgspec
from sqlalchemy import Connection, text

from archiver.database import RawStatement
from archiver.events import Message, responses
from archiver.events.responses import SessionSnapshot

# Bytes that the responses of one session may occupy in the ledger as received. Beyond that all are stored in pieces:
# otherwise each superseded response would leave dead space of its size in the table.
MIN_SPLIT_BYTES = 32_768

_MIN_PIECE_BYTES = 256  # minimum bytes of already stored messages that are worth a separate run
_MAX_PLACES = 32  # places that are searched for such messages

FRAME = 3  # parts of a frame

Run = tuple[int, int]  # numbers of its first and its last piece


class Split(msgspec.Struct, frozen=True):
    """The bytes of a response, split into its frame and its messages."""

    frame: tuple[bytes, bytes, bytes]  # before the messages, between two of them, after them
    messages: list[bytes]


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def split(session_id: str, body: bytes) -> Split | None:
    """Return the frame and the messages of a response; None if it could not be reassembled byte for byte."""
    # msgspec rejects half a surrogate pair; its replacement here has the same length.
    masked = _SURROGATE.sub(rb"\\u00", body)
    for array in _arrays(masked):
        result = _split_at(body, masked, bytes(array))
        if result is not None and _is_faithful(session_id, body, result):
            return result
    return None


def _arrays(body: bytes) -> Iterable[msgspec.Raw]:
    """Yield the values in a response that may be the array of its messages."""
    document = _object(msgspec.Raw(body))
    for place in (document, _object(document.get("data"))):
        for candidate in (_object(place.get("session")), place):
            if "messages" in candidate:
                yield candidate["messages"]


def _object(raw: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    try:
        return {} if raw is None else _members(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _split_at(body: bytes, masked: bytes, array: bytes) -> Split | None:
    try:
        items = [bytes(item) for item in _items(array)]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    place = masked.find(array)
    if not items or place < 0:
        return None
    bounds = []
    for item in items:
        start = masked.find(item, place)
        place = start + len(item)
        bounds.append((start, place))
    between = {body[end:start] for (_, end), (start, _) in zip(bounds, islice(bounds, 1, None), strict=False)}
    if len(between) > 1:
        return None
    frame = (body[: bounds[0][0]], between.pop() if between else b",", body[bounds[-1][1] :])
    return Split(frame, [body[start:end] for start, end in bounds])


def _is_faithful(session_id: str, body: bytes, found: Split) -> bool:
    if found.frame[0] + found.frame[1].join(found.messages) + found.frame[2] != body:
        return False
    messages = [message for each in found.messages for message in responses.message(each)]
    return parse_snapshot(session_id, found.frame, messages) == responses.parse_snapshot(
        responses.READ, session_id, body
    )


def parse_snapshot(session_id: str, frame: Sequence[bytes], messages: Iterable[Message]) -> SessionSnapshot:
    """Return the content of a response that consists of this frame and these messages."""
    own = tuple(messages)
    without = responses.parse_snapshot(responses.READ, session_id, frame[0] + frame[2], len(own))
    return msgspec.structs.replace(without, messages=own)


def is_part(messages: Sequence[bytes], of: Sequence[bytes]) -> bool:
    """Return whether `messages` are a contiguous part of `of`; at most `_MAX_PLACES` places are tried."""
    last = len(of) - len(messages)
    between = (start for start in range(last + 1) if of[start] == messages[0])
    return any(of[start : start + len(messages)] == messages for start in islice(between, _MAX_PLACES))


class PieceIndex:
    """The stored pieces of one session by number, and the pieces to add."""

    def __init__(self, session_id: str, digests: Sequence[bytes]) -> None:
        self._session_id = session_id
        self._digests = list(digests)  # of the pieces 1, 2, 3 …
        self._places: defaultdict[bytes, list[int]] = defaultdict(list)
        for number, digest in enumerate(digests, 1):
            self._places[digest].append(number)
        self.new: list[dict[str, Any]] = []

    def runs(self, messages: Sequence[bytes]) -> list[Run]:
        """Return these messages as runs of pieces; add pieces for those that are unknown or not worth a separate run.

        It takes one pass, even with repeats. A history to which lines were only added is one run, so that all
        responses together take as much space as the messages that were new in each.
        """
        digests = [_digest(message) for message in messages]
        result: list[Run] = []
        place = 0
        while place < len(messages):
            number, length = self._best(digests, place, result[-1][1] + 1 if result else 1)
            is_next = bool(result) and number == result[-1][1] + 1
            worth = sum(map(len, messages[place : place + length]))
            if length and (is_next or not result or worth >= _MIN_PIECE_BYTES):
                end = number + length - 1
            else:
                number = end = self._add(messages[place], digests[place])
                is_next, length = bool(result) and number == result[-1][1] + 1, 1
            result[-1:] = [(result[-1][0], end)] if is_next else [*result[-1:], (number, end)]
            place += length
        return result

    def _best(self, digests: Sequence[bytes], place: int, following: int) -> tuple[int, int]:
        """Return the first piece and the length of the run of these messages from `place` on.

        It is the run at the piece `following` if there is one, otherwise the longest. The length is 0 without a run.
        """
        if length := self._common(digests, place, following):
            return following, length
        numbers = self._places.get(digests[place], ())
        lengths = ((self._common(digests, place, number), number) for number in islice(numbers, _MAX_PLACES))
        length, number = max(lengths, default=(0, 0))
        return number, length

    def _common(self, digests: Sequence[bytes], place: int, number: int) -> int:
        length, limit = 0, min(len(digests) - place, len(self._digests) - number + 1)
        while length < limit and self._digests[number - 1 + length] == digests[place + length]:
            length += 1
        return length

    def _add(self, message: bytes, digest: bytes) -> int:
        self._digests.append(digest)
        number = len(self._digests)
        self._places[digest].append(number)
        self.new.append({"session_id": self._session_id, "number": number, "digest": digest, "content": message})
        return number


def _digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()[:16]


_SELECT_DIGESTS = RawStatement("SELECT number, digest FROM archiver.pieces WHERE session_id = $1 ORDER BY number")


def select_known(connection: Connection, session_id: str) -> PieceIndex:
    """Return the index of a session's stored pieces. Requires the lock on the session's row."""
    return PieceIndex(session_id, [bytes(row.digest) for row in _SELECT_DIGESTS.execute(connection, session_id)])


_INSERT = text(
    "INSERT INTO archiver.pieces (session_id, number, digest, content)"
    " VALUES (:session_id, :number, :digest, :content)"
)


def insert_new(connection: Connection, known: PieceIndex) -> None:
    """Insert the pieces that `PieceIndex.runs` added."""
    if known.new:
        connection.execute(_INSERT, known.new)
        known.new = []


_SELECT_CONTENTS = text(
    """
    SELECT session_id, number, content FROM archiver.pieces
     WHERE session_id = ANY (:session_ids) ORDER BY session_id, number
    """
)


def select_contents(connection: Connection, session_ids: Sequence[str]) -> Mapping[str, Mapping[int, bytes]]:
    """Return the pieces of these sessions, by session and number."""
    result: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
    if session_ids:
        for row in connection.execute(_SELECT_CONTENTS, {"session_ids": list(session_ids)}):
            result[row.session_id][row.number] = bytes(row.content)
    return result


_SELECT_USED = text(
    """
    SELECT DISTINCT session_id FROM archiver.events
     WHERE session_id = ANY (:session_ids) AND runs IS NOT NULL
    """
)
_DELETE = text("DELETE FROM archiver.pieces WHERE session_id = ANY (:session_ids)")


def delete_unused(connection: Connection, session_ids: Sequence[str]) -> None:
    """Delete the pieces of each of these sessions that no longer has a response stored in pieces."""
    if session_ids:
        used = set(connection.scalars(_SELECT_USED, {"session_ids": list(session_ids)}))
        connection.execute(_DELETE, {"session_ids": [each for each in session_ids if each not in used]})


class ResponseAssembler:
    """The pieces of one session, from which its responses are reassembled."""

    def __init__(self, contents: Mapping[int, bytes]) -> None:
        self._numbers = sorted(contents)
        self._index = {number: index for index, number in enumerate(self._numbers)}
        self._contents = [contents[number] for number in self._numbers]
        # By separator: all pieces joined with it, and the offset of each piece. A run is a slice of this.
        self._rows: dict[bytes, tuple[memoryview, list[int]]] = {}

    def parts(self, frame: Sequence[bytes], runs: Sequence[int]) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a response, in parts. Raises `LookupError` if a piece is missing."""
        before, between, after = frame
        row, starts = self._row(bytes(between))
        yield before
        for place, (first, last) in enumerate(pairs(runs)):
            if place:
                yield between
            start, end = self._index[first], self._index[last]
            if end - start != last - first or end < start:
                raise LookupError(first)
            yield row[starts[start] : starts[end] + len(self._contents[end])]
        yield after

    def _row(self, between: bytes) -> tuple[memoryview, list[int]]:
        if between not in self._rows:
            lengths = (len(content) + len(between) for content in self._contents)
            starts = [*accumulate(lengths, initial=0)]
            self._rows[between] = memoryview(between.join(self._contents)), starts
        return self._rows[between]


def pairs(runs: Sequence[int]) -> Iterable[Run]:
    """Return the runs that a ledger row stores as a flat list of numbers."""
    return zip(runs[::2], runs[1::2], strict=False)


def is_prefix(runs: Sequence[int], of: Sequence[int]) -> bool:
    """Return whether the messages of the runs `runs` are the first messages of the runs `of`."""
    last = len(runs) - 1
    return 0 < last < len(of) and list(runs[:last]) == list(of[:last]) and runs[last] <= of[last]


def numbers(runs: Iterable[Run]) -> list[int]:
    """Return runs as a flat list of numbers: the inverse of `pairs`."""
    return [number for run in runs for number in run]
