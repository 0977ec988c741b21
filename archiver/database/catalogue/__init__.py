"""The detailed schema of the database, compared with the one that this version expects."""

from archiver.database.catalogue.comparing import FILE, read_expected, repair, select_differences
from archiver.database.catalogue.difference import Difference
from archiver.database.catalogue.reading import Catalogue, encode, read

__all__ = ["FILE", "Catalogue", "Difference", "encode", "read", "read_expected", "repair", "select_differences"]
