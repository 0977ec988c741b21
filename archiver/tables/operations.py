"""What processes report about themselves. Local tables: none of them is distributed by session."""

from sqlalchemy import BigInteger, Column, Index, Integer, PrimaryKeyConstraint, Table, Text
from sqlalchemy.dialects.postgresql import JSON

from archiver.tables.archive import Time, metadata

workers = Table(
    "workers",
    metadata,
    Column("id", Text, nullable=False, comment="Host, process id and a random part."),
    Column("host", Text, nullable=False, comment="Host name of the machine."),
    Column("pid", Integer, nullable=False, comment="Process id there."),
    Column("version", Text, nullable=False, comment="Version of callhq-archiver."),
    Column("started_at", Time, nullable=False, comment="When the process started, on its own clock."),
    Column("beat_at", Time, nullable=False, comment="When it last reported, on the clock of Postgres."),
    Column(
        "duties",
        JSON,
        nullable=False,
        comment="Each duty: state (starting, running, failed, hanging or off), since when, why, restarts.",
    ),
    PrimaryKeyConstraint("id", name="workers_pkey"),
    Index("workers_beat_at_idx", "beat_at"),
    comment="What each worker last reported about its duties; rows that are a day old are deleted.",
)

duties = Table(
    "duties",
    metadata,
    Column("name", Text, nullable=False, comment="A duty that one worker at a time does."),
    Column("begun_at", Time, nullable=False, comment="When a worker last began it, on the clock of Postgres."),
    PrimaryKeyConstraint("name", name="duties_pkey"),
    comment="When duties that workers share were last begun.",
)

epochs = Table(
    "epochs",
    metadata,
    Column("id", BigInteger, autoincrement=False, nullable=False, comment="1, 2, 3 …; the last counts."),
    Column("system_identifier", Text, nullable=False, comment="Of the cluster; empty where the user may not ask."),
    Column("database_oid", BigInteger, nullable=False, comment="Object id of the database."),
    Column("timeline", BigInteger, comment="At its beginning."),
    Column("place", Text, comment="Which files an embedded database has; null of any other."),
    Column("cursor", BigInteger, nullable=False, comment="Newest change at its beginning."),
    Column("began_at", Time, nullable=False, comment="When it began."),
    Column(
        "given",
        BigInteger,
        comment="Greatest cursor known to be given before it, lost ones included; null in rows of older versions.",
    ),
    PrimaryKeyConstraint("id", name="epochs_pkey"),
    comment="Which database this is: begun by the first process that served it, and by archiver adopt.",
)

epoch_faults = Table(
    "epoch_faults",
    metadata,
    Column("epoch_id", BigInteger, autoincrement=False, nullable=False, comment="Epoch in which it was found."),
    Column("host", Text, nullable=False, comment="Host name of the machine that found it."),
    Column("reason", Text, nullable=False, comment="What the database lacks of what that machine saw committed."),
    Column("cursor", BigInteger, nullable=False, comment="Newest change that the machine saw in that epoch."),
    Column("found_at", Time, nullable=False, comment="When it was found, on the clock of Postgres."),
    PrimaryKeyConstraint("epoch_id", name="epoch_faults_pkey"),
    comment="Epochs in which the database went back: it is not served until archiver adopt begins another.",
)
