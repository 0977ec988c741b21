"""The tables of the console: its users and their logins. They are local: not distributed by session."""

from sqlalchemy import (
    CheckConstraint,
    Column,
    Index,
    LargeBinary,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)

from archiver.database.tables.archive import Time, metadata

users = Table(
    "users",
    metadata,
    Column("name", Text, nullable=False, comment="Name in the audit log; lower case."),
    Column("role", Text, nullable=False, comment="viewer, reader, auditor or operator."),
    Column(
        "password_hash",
        Text,
        comment="Argon2id hash of the password, with salt and parameters; null: a provider logs the user in.",
    ),
    Column("added_at", Time, nullable=False, comment="When the user was added."),
    Column("changed_at", Time, nullable=False, comment="Latest change of role, password or state."),
    Column("disabled_at", Time, comment="Since when the user may not log in; null: the user may."),
    Column("issuer", Text, comment="Identity provider of the user; null: the user has a password."),
    Column("subject", Text, comment="Identifier of the user at that provider (sub)."),
    PrimaryKeyConstraint("name", name="users_pkey"),
    CheckConstraint("role IN ('viewer', 'reader', 'auditor', 'operator')", name="users_role_known"),
    CheckConstraint(
        "(password_hash IS NULL) = (issuer IS NOT NULL) AND (issuer IS NULL) = (subject IS NULL)",
        name="users_identity_known",
    ),
    UniqueConstraint("issuer", "subject", name="users_identity_unique"),
    comment="People who may log in to the console.",
)

logins = Table(
    "logins",
    metadata,
    Column("token_digest", LargeBinary, nullable=False, comment="SHA-256 of the token in the browser's cookie."),
    Column("user_name", Text, nullable=False, comment="User."),
    Column("began_at", Time, nullable=False, comment="When the user logged in."),
    Column("seen_at", Time, nullable=False, comment="Latest request, to within a minute."),
    PrimaryKeyConstraint("token_digest", name="logins_pkey"),
    Index("logins_user_name_idx", "user_name"),
    comment="Current logins to the console; a row is deleted when its login ends.",
)
