"""Run the `archiver` command, also as `python -m archiver`."""

import sys


def main() -> None:
    """Print the version for `--version` without importing the rest; run every other command."""
    if sys.argv[1:2] == ["--version"] and _print_version():
        return
    from archiver.cli import main as run  # noqa: PLC0415  # `--version` must not wait for the import of click

    run()


def _print_version() -> bool:
    """Print the version; return False if stdout does not accept it."""
    from archiver.version import describe  # noqa: PLC0415  # other commands must not wait for this import

    try:
        sys.stdout.write(f"{describe()}\n")
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
