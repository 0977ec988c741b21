"""The `archiver` command, also as `python -m archiver`."""

import sys


def main() -> None:
    """Answer `--version` at once; everything else needs the whole program."""
    if sys.argv[1:2] == ["--version"] and _print_version():
        return
    from archiver.cli import main as run  # noqa: PLC0415  # it takes more than a second

    run()


def _print_version() -> bool:
    """False where stdout does not take it: the program says why."""
    from archiver.version import describe  # noqa: PLC0415  # an import costs nothing until it is needed

    try:
        sys.stdout.write(f"{describe()}\n")
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
