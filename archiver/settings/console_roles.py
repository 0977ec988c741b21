"""Roles of the console's users, and which groups of an identity provider have them."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

Role = Literal["viewer", "reader", "auditor", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)


def parse(value: str) -> tuple[tuple[str, Role], ...]:
    """Return the groups and their roles in a comma-separated list of GROUP=ROLE. Raises `ValueError`."""
    result = tuple(_entries(value))
    if len(dict(result)) < len(result):
        raise ValueError("names a group twice: keep one entry")
    return result


def _entries(value: str) -> Iterator[tuple[str, Role]]:
    for part in filter(None, (each.strip() for each in value.split(","))):
        group, _, name = (each.strip() for each in part.rpartition("="))
        role = next((each for each in ROLES if each == name), None)
        if not group or role is None:
            raise ValueError(f"write GROUP=ROLE, separated by commas; roles are {', '.join(ROLES)}")
        yield group, role


def role_of(groups: Sequence[str], roles: Sequence[tuple[str, Role]]) -> Role | None:
    """Return the role of the first entry whose group is among these; None if there is none."""
    return next((role for group, role in roles if group in groups), None)
