"""Make the names of files durable: an fsync of a file does not cover its entry in the folder (fsync(2))."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make created, renamed and removed files of the folder durable. Raises `OSError`."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
