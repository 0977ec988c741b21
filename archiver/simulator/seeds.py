"""Everything random in the simulator: drawn from the seed and the name of what it is for, so never from the order."""

import random
import uuid


def seeded(*parts: object) -> random.Random:
    """Return a source of numbers that belongs to what these parts name."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311  # must repeat itself; guards nothing


def identifier(*parts: object) -> str:
    """Return the id of what these parts name: it looks like a random UUID, and is the same each time."""
    return str(uuid.UUID(int=seeded(*parts).getrandbits(128), version=4))
