"""When two messages say the same although they are not written the same.

`key_of` removes differences that carry no meaning: names and letter case of roles, and what `events.normal` removes.
Two messages with one key are the same wherever they stand.
"""

from archiver.alignment.shapes import USER
from archiver.events.normal import normal_text

Key = tuple[str, str]  # role and content, without differences that carry no meaning

ASSISTANT = "assistant"
_ROLES = {
    **dict.fromkeys(("user", "human", "customer", "client", "caller", "visitor", "end_user"), USER),
    **dict.fromkeys(("assistant", "ai", "bot", "model", "agent", "chatbot"), ASSISTANT),
}


def role_of(role: str) -> str:
    """The role, `user` and `assistant` by one name each."""
    return _ROLES.get(role) or _ROLES.get(folded := role.strip().lower()) or folded


def key_of(role: str, content: str) -> Key:
    """What two messages have in common if they are the same message."""
    return role_of(role), normal_text(content)
