"""Texts in every encoding of their characters."""


def of_every_character(text: str) -> str:
    """JSON as a writer that escapes every character of a string may write it."""
    return '{"id": "' + "".join(f"\\u{unit:04X}" for unit in memoryview(text.encode("utf-16-le")).cast("H")) + '"}'
