"""The random numbers of the simulator, which depend on the seed and their purpose, never on the order of calls."""

import random
import uuid


def seeded(*parts: object) -> random.Random:
    """Return the random number generator for the purpose that these parts name."""
    return random.Random("/".join(map(str, parts)))  # noqa: S311  # must repeat itself; guards nothing


def identifier(*parts: object) -> str:
    """Return the id for these parts: it looks like a random UUID, but is the same each time."""
    return str(uuid.UUID(int=seeded(*parts).getrandbits(128), version=4))
