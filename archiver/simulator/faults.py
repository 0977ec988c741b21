"""Faults of webhooks and history calls, determined by a seed.

The faults of a webhook depend on the seed, the chat's id and the kind of event; the fault of a history call depends
on the seed, the session's id and the number of the call. Neither depends on earlier events, so the same conversations
have the same faults at any concurrency.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from archiver.simulator.seeds import seeded

CREATED = "chat.created"
DELETED = "chat.deleted"

Fault = Literal[
    "loss",
    "duplicates",
    "reorder",
    "delay",
    "deletion_before_creation",
    "output_missing_at_creation",
    "bare_deletion",
]
HistoryFault = Literal[
    "missing",
    "gone",
    "empty",
    "partial",
    "busy",
    "error",
    "slow",
    "hanging",
    "garbage",
    "shape",
]
Expired = Literal["gone", "missing", "empty", "full"]

_MIXED: tuple[HistoryFault, ...] = ("busy", "error", "slow", "hanging", "garbage")  # none alters the content


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The probability of each fault, from 0 to 1: per webhook that can have it, per history call, or per assistant.

    A history call has at most one fault, so these probabilities must add up to at most 1. Raises `ValueError`
    otherwise.
    """

    loss: float = 0.0  # never sent
    duplicates: float = 0.0  # sent once or twice more, in a new envelope or in the same, concurrently or later
    reorder: float = 0.0  # held until a later webhook of its session has arrived
    delay: float = 0.0  # held for a while
    deletion_before_creation: float = 0.0  # the creation is held until the deletion has arrived, if there is one
    output_missing_at_creation: float = 0.0  # sent without output first, then again with it and a newer updatedAt
    bare_deletion: float = 0.0  # the deletion contains only the chat id, not even its session

    history_missing: float = 0.0  # 404, although the session exists
    history_gone: float = 0.0  # 410, although the session exists
    history_empty: float = 0.0  # no messages
    history_partial: float = 0.0  # the first or the last messages are omitted
    history_busy: float = 0.0  # 429 with Retry-After, to this history call and to all others for a moment
    history_error: float = 0.0  # 500
    history_slow: float = 0.0  # a delayed response
    history_hanging: float = 0.0  # no response before every client has timed out
    history_garbage: float = 0.0  # a body that is not JSON
    history_shape: float = 0.0  # JSON of an unexpected shape

    greeting: float = 0.0  # of assistants: each of their sessions begins with a greeting that belongs to no chat

    lifetime: float | None = None  # seconds from a session's creation until its history has expired
    expired: Expired = "gone"  # the response to a history call after that
    keep_deleted: bool = False  # a deleted chat stays in the history
    history_latency: float = 0.0  # seconds that each history response takes
    seed: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name not in _NO_PROBABILITY and not 0 <= getattr(self, each.name) <= 1:
                raise ValueError(f"{each.name} must be a probability from 0 to 1")
        if sum(getattr(self, f"history_{name}") for name in get_args(HistoryFault)) > _ALL:
            raise ValueError("history_…: these probabilities add up to more than 1")


_NO_PROBABILITY = frozenset({"seed", "lifetime", "expired", "keep_deleted", "history_latency"})
_ALL = 1 + 1e-9  # 1, with a tolerance for rounding


def with_history_faults(faults: Faults, share: float) -> Faults:
    """Return `faults` with this share of history calls slow or failing; none changes the content."""
    shares: dict[str, Any] = {f"history_{name}": share / len(_MIXED) for name in _MIXED}
    return replace(faults, **shares)


def history_fault(faults: Faults, session_id: str, call: int) -> HistoryFault | None:
    """Return the fault of this call for a session's history, or None; calls count from 1."""
    left = seeded(faults.seed, "history", session_id, call).random()
    for name in get_args(HistoryFault):
        left -= getattr(faults, f"history_{name}")
        if left < 0:
            result: HistoryFault = name
            return result
    return None


def has_greeting(faults: Faults, assistant_id: str) -> bool:
    """Return whether this assistant begins its sessions with a greeting."""
    return seeded(faults.seed, "greeting", assistant_id).random() < faults.greeting


@dataclass(frozen=True, slots=True)
class Webhook:
    """One event as the platform intends to send it. `copies`: how often it is sent again."""

    type: str
    session_id: str
    chat_id: str
    chat: Mapping[str, Any]
    faults: frozenset[Fault]
    copies: int
    copies_differ: bool
    copies_at_once: bool
    delay: float  # as a share of the longest delay


def created(faults: Faults, chat: Mapping[str, Any]) -> list[Webhook]:
    """Return the webhooks of a new chat: one, or two if its output arrives later."""
    common: set[Fault] = set()
    random = seeded(faults.seed, "created", chat["id"])
    if random.random() < faults.deletion_before_creation:
        common.add("deletion_before_creation")
    if random.random() >= faults.output_missing_at_creation:
        return [_webhook(faults, CREATED, chat, chat, common)]
    common.add("output_missing_at_creation")
    early = {**chat, "output": [], "status": "in_progress", "updatedAt": chat["createdAt"]}
    if random.getrandbits(1):
        del early["output"]
    return [
        _webhook(faults, CREATED, chat, chat_json, common, key=key)
        for key, chat_json in (("early", early), ("late", chat))
    ]


def deleted(faults: Faults, chat: Mapping[str, Any]) -> list[Webhook]:
    """Return the webhook of a deletion: it has no content, and sometimes only the id."""
    random = seeded(faults.seed, "deleted", chat["id"])
    is_bare = random.random() < faults.bare_deletion
    names = ("id",) if is_bare else ("id", "sessionId", "assistantId")
    chat_json = {name: chat[name] for name in names if name in chat}
    return [_webhook(faults, DELETED, chat, chat_json, {"bare_deletion"} if is_bare else set())]


def _webhook(
    faults: Faults,
    kind: str,
    chat: Mapping[str, Any],
    chat_json: Mapping[str, Any],
    found: set[Fault],
    *,
    key: str = "",
) -> Webhook:
    random = seeded(faults.seed, kind, key, chat["id"])
    drawn: dict[Fault, bool] = {
        "loss": random.random() < faults.loss,
        "duplicates": random.random() < faults.duplicates,
        "reorder": random.random() < faults.reorder,
        "delay": random.random() < faults.delay,
    }
    return Webhook(
        type=kind,
        session_id=chat.get("sessionId", ""),
        chat_id=chat["id"],
        chat=chat_json,
        faults=frozenset(found | {name for name, happens in drawn.items() if happens}),
        copies=random.choice((1, 1, 2)) if drawn["duplicates"] else 0,
        copies_differ=bool(random.getrandbits(1)),
        copies_at_once=bool(random.getrandbits(1)),
        delay=random.uniform(0.2, 1.0),
    )
