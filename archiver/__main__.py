"""Run the `archiver` command, also as `python -m archiver`."""

import sys


def main() -> None:
    """Answer `--version` without importing the rest; run every other command."""
    if sys.argv[1:2] == ["--version"] and _print_version():
        return
    from archiver.cli import main as run  # noqa: PLC0415  # it takes more than a second

    run()


def _print_version() -> bool:
    """Print the version; return False if stdout cannot take it."""
    from archiver.version import describe  # noqa: PLC0415  # an import costs nothing until it is needed

    try:
        sys.stdout.write(f"{describe()}\n")
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
