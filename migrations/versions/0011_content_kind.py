"""What the content of a message is: a text, a refusal, a call of a tool or something else."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

SCHEMA = "archiver"


def upgrade() -> None:
    # A constant default rewrites no row.
    op.add_column(
        "messages",
        sa.Column(
            "content_kind",
            sa.Text(),
            nullable=False,
            server_default="text",
            comment="What content is: text, refusal, tool_call or other; the last two are no text.",
        ),
        schema=SCHEMA,
    )
    _create_view(with_kind=True)


def downgrade() -> None:
    op.execute("DROP VIEW analytics.messages")
    _create_view(with_kind=False)
    op.drop_column("messages", "content_kind", schema=SCHEMA)


# The column that is added to the view: after which text, and that text with it.
LAST = "c.deleted_at, m.in_history\n"
WITH_KIND = "c.deleted_at, m.in_history, m.content_kind\n"


def _create_view(*, with_kind: bool) -> None:
    script = op.get_context().script
    if script is None:
        raise RuntimeError("Alembic runs without its scripts: use archiver migrate.")
    meaning, query, comments = script.get_revision("0002").module.VIEWS["messages"]
    if with_kind:
        query = query.replace(LAST, WITH_KIND)
        if WITH_KIND not in query:
            raise RuntimeError("The view messages is not as this migration knows it.")
        comments = comments | {"content_kind": "What content is: text, refusal, tool_call or other."}
    op.execute(f"CREATE OR REPLACE VIEW analytics.messages AS {query}")
    op.execute(f"COMMENT ON VIEW analytics.messages IS '{meaning}'")
    for column, comment in comments.items():
        op.execute(f"COMMENT ON COLUMN analytics.messages.{column} IS '{comment}'")
