"""Exports: transcripts for people and programs, with what proves offline where they come from."""

from archiver.export.checking import Checked, check
from archiver.export.findings import Finding
from archiver.export.folder import FolderError
from archiver.export.making import Made, Wanted, make
from archiver.export.manifest import FORMATS, Manifest
from archiver.export.sealed import Keys
from archiver.export.selection import Selection, UnknownError, count

__all__ = [
    "FORMATS",
    "Checked",
    "Finding",
    "FolderError",
    "Keys",
    "Made",
    "Manifest",
    "Selection",
    "UnknownError",
    "Wanted",
    "check",
    "count",
    "make",
]
