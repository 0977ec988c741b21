"""What the quarantine holds about what is to be erased, and about nothing that a hold in force covers.

Its bytes could not be read: whatever they mention, they may be about.
"""

from collections.abc import Collection, Sequence

import msgspec
from sqlalchemy import Connection, RowMapping, text

from archiver import quarantine
from archiver.erasure import mentions
from archiver.erasure.holds import covering, is_any_in_force, select_holds
from archiver.erasure.targets import Target, marks

Variables = Collection[tuple[str, str]]  # names with values


class Found(msgspec.Struct, frozen=True):
    """Ids of rows: those that name what is to be erased, and those that only tell such a variable."""

    naming: Sequence[int] = ()
    telling: Sequence[int] = ()


def select_found(connection: Connection, targets: Sequence[Target], variables: Variables = ()) -> Found:
    """What is about these, or tells such a variable; held or not. Reads the whole quarantine."""
    naming: list[int] = []
    if targets:
        is_about = mentions.of_any(marks(connection, targets))
        # A history answer tells all of its session, and says whose it is beside its bytes.
        sessions = {each.session_id for each in targets} - {""}
        naming = quarantine.select_mentioning(connection, is_about, sessions)
    telling = {
        row_id
        for name, value in variables
        for row_id in quarantine.select_mentioning(connection, mentions.of_variable(name, value))
    }
    return Found(naming, sorted(telling - set(naming)))


def select_free(connection: Connection, found: Found) -> list[int]:
    """Those that may go: of what only tells a variable none as long as anything is held, which may be whose it is.

    Exact under the lock of `ledger.lock_placement`, beside which nobody places a hold.
    """
    if not is_any_in_force(connection):
        return sorted({*found.naming, *found.telling})
    holds = select_holds(connection, released=False)
    sessions = [Target(each["session_id"]) for each in holds if each["session_id"] is not None]
    values = {each["value"] for each in holds} - {None, ""}
    is_held = mentions.of_any(marks(connection, sessions) | values)
    return [
        row["id"]
        for row in quarantine.select_bodies(connection, found.naming)
        if not is_held(bytes(row["body"])) and not covering(connection, _named(connection, row))
    ]


# What the archive knows by any of these ids.
_SELECT_NAMED = text(
    """
    WITH told AS MATERIALIZED (SELECT json_array_elements_text(:ids) AS id)
    SELECT s.session_id, '' AS chat_id FROM archiver.sessions s
     WHERE s.session_id <> '' AND s.session_id IN (SELECT id FROM told)
    UNION
    SELECT c.session_id, CASE WHEN c.session_id = '' THEN c.chat_id ELSE '' END FROM archiver.chats c
     WHERE c.chat_id IN (SELECT id FROM told)
    """
)


def _named(connection: Connection, row: RowMapping) -> list[Target]:
    ids = mentions.ids(bytes(row["body"])) | ({row["session_id"]} if row["session_id"] else set())
    named = connection.execute(_SELECT_NAMED, {"ids": msgspec.json.encode(sorted(ids)).decode()})
    return [Target(row.session_id, row.chat_id) for row in named]


def delete_found(connection: Connection, found: Found) -> int:
    """Remove those that may go; answers how many there were."""
    return quarantine.delete_rows(connection, select_free(connection, found))


def delete_mentioning(connection: Connection, targets: Sequence[Target]) -> int:
    """Remove what is about these, as far as its bytes tell, and may go; answers how many there were."""
    return delete_found(connection, select_found(connection, targets))
