"""Version, commit and schema revision of this build, read only from files."""

from pathlib import Path

from archiver import __version__

_PACKAGE = Path(__file__).parent
_COMMIT_LENGTH = 40  # hexadecimal digits of a SHA-1; a repository may use SHA-256 with 64


def describe() -> str:
    """Return version, commit (if known) and schema revision."""
    parts = [f"archiver, version {__version__}"]
    if commit := _built_from() or _checked_out(_PACKAGE.parent):
        parts.append(f"commit {commit[:12]}")
    if revision := _schema():
        parts.append(f"schema {revision}")
    return ", ".join(parts)


def _schema() -> str | None:
    """Return the number of the newest migration; None if this installation has no migrations."""
    for folder in (_PACKAGE / "_migrations" / "versions", _PACKAGE.parent / "migrations" / "versions"):
        if names := [path.name for path in folder.glob("[0-9][0-9][0-9][0-9]_*.py")]:
            return max(names)[:4]
    return None


def _built_from() -> str | None:
    """Return the commit that the build wrote into the package, if any."""
    return _read(_PACKAGE / "_commit.txt")


def _checked_out(folder: Path) -> str | None:
    """Return the commit of a checkout; None if `folder` is not one.

    Source: https://git-scm.com/docs/gitrepository-layout.
    """
    place = folder / ".git"
    if not (folder / "pyproject.toml").is_file():
        return None  # installed with other packages; a repository around them is another project's
    if (text := _read(place)) and text.startswith("gitdir: "):
        place = folder / text.removeprefix("gitdir: ")
    head = _read(place / "HEAD") or ""
    if not head.startswith("ref: "):
        return _as_commit(head)
    name = head.removeprefix("ref: ")
    common = place / (_read(place / "commondir") or ".")
    return _as_commit(_read(common / name) or _read(place / name)) or _packed(common, name)


def _packed(common: Path, name: str) -> str | None:
    for line in (_read(common / "packed-refs") or "").splitlines():
        commit, _, reference = line.partition(" ")
        if reference == name:
            return _as_commit(commit)
    return None


def _as_commit(text: str | None) -> str | None:
    is_commit = text is not None and len(text) >= _COMMIT_LENGTH and all(each in "0123456789abcdef" for each in text)
    return text if is_commit else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeError):
        return None
