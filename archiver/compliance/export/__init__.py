"""Export transcripts, with proofs of their origin that can be verified offline."""

from archiver.compliance.export.checking import Checked, check
from archiver.compliance.export.findings import Finding
from archiver.compliance.export.folder import FolderError
from archiver.compliance.export.manifest import FORMATS, PARQUET, Manifest, Parquet
from archiver.compliance.export.parquet import MissingLibraryError, WrongCursorError, update
from archiver.compliance.export.sealed import Keys
from archiver.compliance.export.selection import Selection, UnknownSelectionError, count
from archiver.compliance.export.spreadsheet import neutralise_cell
from archiver.compliance.export.writing import CompletedExport, ExportRequest, make

__all__ = [
    "FORMATS",
    "PARQUET",
    "Checked",
    "CompletedExport",
    "ExportRequest",
    "Finding",
    "FolderError",
    "Keys",
    "Manifest",
    "MissingLibraryError",
    "Parquet",
    "Selection",
    "UnknownSelectionError",
    "WrongCursorError",
    "check",
    "count",
    "make",
    "neutralise_cell",
    "update",
]
