"""Keep a folder of Parquet files up to date: one file per day and table, rewritten when its rows change.

The first run writes every day and records the cursor of the change feed. A later run reads the changes after that
cursor and writes the days that contain rows of the changed sessions, before or after the change. So the next run
after an erasure removes the erased content from the folder.
"""

from archiver.compliance.export.parquet.checking import check_files
from archiver.compliance.export.parquet.days import WrongCursorError
from archiver.compliance.export.parquet.files import MissingLibraryError
from archiver.compliance.export.parquet.updating import update

__all__ = ["MissingLibraryError", "WrongCursorError", "check_files", "update"]
