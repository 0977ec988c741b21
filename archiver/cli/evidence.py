"""What a check is held against, from outside the database: public keys, and seals that were copied elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import click
import msgspec
from click.core import ParameterSource
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from archiver import seals
from archiver.cli.output import Whole
from archiver.seals import KeyFileError, Seal

Command = TypeVar("Command", bound=Callable[..., Any])


def key_option(default: str = "") -> Callable[[Command], Command]:
    """`--key`; `default` is for the help."""
    return click.option(
        "--key",
        "key_files",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"Public key (PEM) that signs seals; several after a rotation. {default}",
    )


signed_since_option = click.option(
    "--signed-since",
    default=1,
    show_default=True,
    type=Whole(1),
    metavar="SEAL",
    help="With a key: the first seal that must be signed.",
)
against_option = click.option(
    "--against",
    type=click.File("rb"),
    metavar="FILE",
    help="Seals as `archiver seals export` wrote them elsewhere; - for stdin.",
)


def public_keys(key_files: tuple[Path, ...]) -> dict[str, Ed25519PublicKey]:
    """The keys in these files, by their ids. Wrong usage where signatures are asked for and no key is given."""
    if not key_files and is_given("signed_since"):
        raise click.UsageError("--signed-since checks signatures: give the public key too, --key FILE.")
    try:
        keys = [seals.public_key(file.read_text(encoding="utf-8", errors="replace")) for file in key_files]
    except KeyFileError as error:
        raise click.UsageError(f"--key: {error}.") from None
    return {seals.key_id(key): key for key in keys}


def is_given(parameter: str) -> bool:
    """Whether the option of this parameter is on the command line, if only with its default."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def require_seals(newest: Seal, **wanted: int | None) -> None:
    """Wrong usage where an option, by the name of its parameter, names a seal that is not there yet."""
    for parameter, number in wanted.items():
        if number is not None and number > newest.id and is_given(parameter):
            raise click.UsageError(f"There is no seal {number}: the newest is {newest.id}.")


class _Exported(msgspec.Struct):
    """What counts of a line of `archiver seals export`."""

    id: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    statement: str = ""
    key_id: str | None = None


def known_of(file: IO[bytes]) -> tuple[dict[int, bytes], dict[str, int]]:
    """The hashes of exported seals, by their numbers, and up to which id the newest of them seals each table."""
    heads: dict[int, bytes] = {}
    newest: _Exported | None = None
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            told = msgspec.json.decode(line, type=_Exported)
        except (ValueError, RecursionError):
            raise click.UsageError(
                f"--against: line {number} is no seal as `archiver seals export` prints."
            ) from None
        hashed = bytes.fromhex(told.hash)
        if heads.setdefault(told.id, hashed) != hashed:
            raise click.UsageError(
                f"--against: line {number} tells another hash of seal {told.id} than a line before."
            )
        if newest is None or told.id >= newest.id:
            newest = told
    if newest is None:
        raise click.UsageError("--against: there is no seal in it; `archiver seals export` writes them.")
    if not newest.statement:
        return heads, {}
    try:
        sealed = seals.chain.of_statement(newest.statement, heads[newest.id], newest.key_id, None)
    except (ValueError, OverflowError):
        raise click.UsageError(f"--against: the statement of seal {newest.id} is none of a seal.") from None
    return heads, sealed.through
