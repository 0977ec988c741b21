"""`archiver adopt`: accept a restored or promoted database in place of the previous one."""

import json

import click

from archiver import database, settings
from archiver.cli import connection, escaped, options
from archiver.database import identity
from archiver.ledger import audit_log


@click.command()
@options.actor_option
@options.yes_option
@options.json_option
def adopt(*, actor: str | None, yes: bool, as_json: bool) -> None:
    """Accept this database in place of the one that was served before.

    Workers then seal, publish and send follow-ups again. Run it only if this database replaces the previous one,
    never on a copy. A new epoch begins; the audit log records it.
    """
    configuration = settings.read()
    with connection.ready(configuration) as engine:
        guard = identity.Guard(configuration.home.resolve(), engine.url)
        with database.transaction(engine) as opened:
            reason, where = guard.examine(opened), connection.where(configuration, opened)
        if not reason and as_json:
            click.echo(json.dumps({"adopted": False, "epoch": None, "reason": None}))
            return
        if not reason:
            click.echo("Nothing to adopt: this database was served before or is new.")
            return
        click.echo(f"{escaped(where)}: {escaped(reason)}.", err=True)
        options.confirm("Replace the previous database, seal this ledger and send its follow-ups?", yes=yes)
        with database.transaction(engine) as opened:
            number = guard.adopt(opened)
            detail = {"epoch": number, "reason": reason}
            audit_log.insert_entry(opened, audit_log.ADOPT, actor or audit_log.actor(), None, detail)
        if as_json:
            click.echo(json.dumps({"adopted": True, **detail}))
        else:
            click.echo(f"Adopted. Epoch {number} begins.")
