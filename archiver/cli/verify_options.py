"""Options for checks against external evidence: public keys and exported seals."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import click
import msgspec
from click.core import ParameterSource
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver.cli.output import Whole
from archiver.compliance import seals
from archiver.compliance.seals import KeyFileError, Seal

Command = TypeVar("Command", bound=Callable[..., Any])


def key_option(default: str = "") -> Callable[[Command], Command]:
    """Return the option `--key`; `default` is shown in --help."""
    return click.option(
        "--key",
        "key_files",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"Public key (PEM) that verifies seals; may be repeated after a rotation. {default}",
    )


signed_since_option = click.option(
    "--signed-since",
    default=1,
    show_default=True,
    type=Whole(1),
    metavar="SEAL",
    help="With --key: the first seal that must be signed.",
)
against_option = click.option(
    "--against",
    type=click.File("rb"),
    metavar="FILE",
    help="Output of an earlier `archiver seals export`; - reads stdin.",
)


def public_keys(key_files: tuple[Path, ...]) -> dict[str, Ed25519PublicKey]:
    """Return the keys by id; fail with a usage error if a file is invalid, or for --signed-since without a key."""
    if not key_files and is_on_command_line("signed_since"):
        raise click.UsageError("--signed-since requires a public key: add --key FILE")
    try:
        keys = [seals.public_key(file.read_text(encoding="utf-8", errors="replace")) for file in key_files]
    except KeyFileError as error:
        raise click.UsageError(f"--key: {error}") from None
    return {seals.key_id(key): key for key in keys}


def is_on_command_line(parameter: str) -> bool:
    """Return whether the option is on the command line, even with its default value."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def check_seal_exists(newest: Seal, **seal_options: int | None) -> None:
    """Fail with a usage error if an option names a seal that does not exist yet."""
    for parameter, number in seal_options.items():
        if number is not None and number > newest.id and is_on_command_line(parameter):
            raise click.UsageError(f"seal {number} does not exist; {_newest(newest)}")


def _newest(newest: Seal) -> str:
    return f"the newest is {newest.id}" if newest.id else "there is no seal yet"


class _ExportedSeal(msgspec.Struct):
    """The relevant fields of a line of `archiver seals export`."""

    id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    statement: str = ""
    key_id: str | None = None


def read_known_seals(file: IO[bytes]) -> tuple[dict[int, bytes], dict[str, int]]:
    """Return the hashes of exported seals by seal id, and the last id of each table that the newest one covers."""
    heads: dict[int, bytes] = {}
    newest: _ExportedSeal | None = None
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            exported = msgspec.json.decode(line, type=_ExportedSeal)
        except (ValueError, RecursionError):
            raise click.UsageError(f"--against: line {number} is not output of `archiver seals export`") from None
        hashed = bytes.fromhex(exported.hash)
        if heads.setdefault(exported.id, hashed) != hashed:
            raise click.UsageError(
                f"--against: line {number} has a different hash for seal {exported.id} than an earlier line"
            )
        if newest is None or exported.id >= newest.id:
            newest = exported
    if newest is None:
        raise click.UsageError("--against: the file contains no seal; create it with `archiver seals export`")
    if not newest.statement:
        return heads, {}
    try:
        sealed = seals.chain.seal_from_statement(newest.statement, heads[newest.id], newest.key_id, None)
    except (ValueError, OverflowError):
        raise click.UsageError(f"--against: the statement of seal {newest.id} is malformed") from None
    return heads, sealed.through
