"""Check the files of an export in Parquet against its manifest. Needs no Parquet library."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from archiver.compliance.export import manifest
from archiver.compliance.export.findings import Finding
from archiver.compliance.export.manifest import Counts, Manifest
from archiver.compliance.export.reading import NoFileError, compare, measured


def check_files(folder: Path, manifest_record: Manifest) -> Iterator[Finding]:
    """Yield each missing, additional and changed file, and counts that differ from the listed rows."""
    known = {*manifest_record.files, manifest.MANIFEST, manifest.DIGEST}
    if manifest_record.signed_by is not None:
        known.add(manifest.SIGNATURE)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            yield Finding(name.encode("utf-8", "replace").decode(), "extra")
    rows: Counter[str] = Counter()
    for name, file in sorted(manifest_record.files.items()):
        rows[name.partition("/")[0]] += file.rows
        try:
            found = measured(folder / name)
        except NoFileError as error:
            yield Finding(name, str(error))
            continue
        yield from compare(name, file, msgspec.structs.replace(found, rows=file.rows))
    if Counts(**rows, quarantined=manifest_record.counts.quarantined) != manifest_record.counts:
        yield Finding(manifest.MANIFEST, "counts")
