"""Runs the migrations on the connection that `archiver.schema` hands over: one at a time, with bounded waits."""

from alembic import context

from archiver.database import tables
from archiver.database.schema import VERSION_TABLE

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("Run `archiver migrate`: it takes the lock and sets the timeouts. See docs/development.md.")

context.configure(
    connection=connection,
    target_metadata=tables.metadata,
    include_schemas=True,
    include_name=lambda name, kind, _: kind != "schema" or name == tables.SCHEMA,
    version_table=VERSION_TABLE,
    version_table_schema=tables.SCHEMA,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
