"""Users of the console who log in with an identity provider, and have no password."""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

SCHEMA = "archiver"
KNOWN = "(password_hash IS NULL) = (issuer IS NOT NULL) AND (issuer IS NULL) = (subject IS NULL)"
# Each comment, and the one before.
COMMENTS = {
    "name": ("Name in the audit log; lower case.", "Name for the login; lower case."),
    "password_hash": (
        "Argon2id hash of the password, with salt and parameters; null: a provider logs the user in.",
        "Argon2id hash of the password, with salt and parameters.",
    ),
}


def upgrade() -> None:
    for name, comment in (
        ("issuer", "Identity provider of the user; null: the user has a password."),
        ("subject", "Identifier of the user at that provider (sub)."),
    ):
        op.add_column("users", sa.Column(name, sa.Text(), comment=comment), schema=SCHEMA)
    op.alter_column("users", "password_hash", nullable=True, schema=SCHEMA)
    op.create_check_constraint("users_identity_known", "users", KNOWN, schema=SCHEMA)
    op.create_unique_constraint("users_identity_unique", "users", ["issuer", "subject"], schema=SCHEMA)
    for column, (comment, _) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN archiver.users.{column} IS '{comment}'")


def downgrade() -> None:
    for column, (_, comment) in COMMENTS.items():
        op.execute(f"COMMENT ON COLUMN archiver.users.{column} IS '{comment}'")
    op.execute(
        "DELETE FROM archiver.logins WHERE user_name IN (SELECT name FROM archiver.users WHERE password_hash IS NULL)"
    )
    op.execute("DELETE FROM archiver.users WHERE password_hash IS NULL")
    op.drop_constraint("users_identity_unique", "users", schema=SCHEMA)
    op.drop_constraint("users_identity_known", "users", schema=SCHEMA)
    op.alter_column("users", "password_hash", nullable=False, schema=SCHEMA)
    for name in ("subject", "issuer"):
        op.drop_column("users", name, schema=SCHEMA)
