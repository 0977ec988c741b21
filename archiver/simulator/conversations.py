"""Simulated customers and assistants, determined by a seed, without a language model.

The texts contain content that breaks archives: repeated short answers, other scripts, right-to-left text, emoji,
quotes, line breaks. Every name is invented.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from archiver.simulator.seeds import identifier, seeded

MAX_TURNS = 9
_DELETED = 0.06  # share of turns that the customer deletes immediately
_TWO_OUTPUTS = 0.15
_SHOWN = 80  # characters of an earlier message that a reply repeats

_COMPANIES = ("Example Plumbing", "Sample Dental", "Demo Energy", "Beispiel & Söhne", "Ejemplo «Ñandú» S.A.")
_SERVICES = ("repair", "appointment", "billing", "delivery", "new contract")
_TIERS = ("basic", "silver", "gold")
_OPENINGS = (
    "Hello, I need help with my {service}.",
    "Hi! Is anybody there? It is about a {service}",
    "Good morning,\nI wrote last week about the {service}.\n\nNobody answered.",
    "مرحبا، أحتاج إلى مساعدة من فضلك",
    "שלום, יש לי שאלה על החשבון",
    "こんにちは。予約を変更したいです。",
    "Guten Tag, können Sie mir weiterhelfen? Es geht um „{service}“.",
    "¿Me pueden ayudar con mi {service}? ¡Gracias! 🙏",
)
_FOLLOWING = (
    "ok",
    "ok",
    "ok",
    "thanks",
    "thanks",
    "Yes",
    "no",
    "👍",
    "👩‍👩‍👧‍👦 we are four 🏳️‍🌈",
    "Can you repeat what I asked first?",
    "It costs \"too much\", they said: 'twice' as much\\more; see {{variable}} & <b>this</b>",
    "Line one\r\nline two\n\tindented line three\n",
    "My number is +1 202 555 0143, the reference is 000123.",
    "What does the {service} cost?",
    "Mixed: العربية and English and עברית, in one line",
    "Zalgo: h̷e̸l̶l̷o, astral: \U0001d4b3\U00010348, e + accent: e\u0301 is not é",
    "DROP TABLE chats; -- just kidding",
    "   leading and trailing spaces   ",
    "null",
    "I am waiting since " + "a very " * 200 + "long time.",
)
_THANKS = frozenset({"ok", "thanks", "yes", "no", "👍"})


@dataclass(frozen=True, slots=True)
class CustomerMessage:
    """One message of the customer; `is_deleted`: the customer deletes it immediately."""

    text: str
    is_deleted: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """One customer's messages in a session."""

    name: str
    assistant_id: str
    variables: Mapping[str, Any]
    lines: tuple[CustomerMessage, ...]


def conversations(seed: int, count: int) -> Iterator[Conversation]:
    """Yield the same `count` conversations for the same seed; a longer run begins like a shorter one."""
    for number in range(count):
        yield _conversation(seeded(seed, "conversation", number), seed, number)


def _conversation(random: Random, seed: int, number: int) -> Conversation:
    service = random.choice(_SERVICES)
    company = random.choice(_COMPANIES)
    texts = [random.choice(_OPENINGS), *random.choices(_FOLLOWING, k=random.randrange(MAX_TURNS))]
    lines = tuple(CustomerMessage(text.replace("{service}", service), random.random() < _DELETED) for text in texts)
    return Conversation(
        name=f"{company}: {service} #{number + 1}",
        assistant_id=identifier(seed, "assistant", company),
        variables={"companyName": company, "serviceType": service, "customerTier": random.choice(_TIERS)},
        lines=lines,
    )


def reply(
    question: str, earlier: Sequence[Mapping[str, str]], variables: Mapping[str, Any], random: Random
) -> list[dict[str, str]]:
    """Return the assistant's messages, one or two, from the earlier messages and the variables of the session."""
    contents = [
        _answer(question, [message["content"] for message in earlier if message["role"] == "user"], variables)
    ]
    if random.random() < _TWO_OUTPUTS:
        contents.append("Is there anything else I can do?")
    return [{"role": "assistant", "content": content} for content in contents]


def _answer(question: str, earlier: Sequence[str], variables: Mapping[str, Any]) -> str:
    company = variables.get("companyName", "our office")
    service = variables.get("serviceType", "request")
    if not earlier:
        priority = " You have priority." if variables.get("customerTier") == "gold" else ""
        return f"Welcome to {company}! I am looking at your {service}.{priority} What happened?"
    if question.strip().lower() in _THANKS:
        return "You are welcome."
    if "repeat" in question or "?" in question:
        return f"You began with “{_short(earlier[0])}”; for the {service} at {company} I note that this is urgent."
    return f"Noted: “{_short(question)}” (your message {len(earlier) + 1} about the {service})."


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
