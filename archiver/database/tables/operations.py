"""The tables in which processes report their own state. They are local: not distributed by session."""

from sqlalchemy import BigInteger, Column, Index, Integer, PrimaryKeyConstraint, Table, Text
from sqlalchemy.dialects.postgresql import JSON

from archiver.database.tables.archive import Time, metadata

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
    comment="Latest report of each worker; rows older than a day are deleted.",
)

duties = Table(
    "duties",
    metadata,
    Column("name", Text, nullable=False, comment="Duty that one worker at a time runs."),
    Column("begun_at", Time, nullable=False, comment="When a worker last began it, on the clock of Postgres."),
    PrimaryKeyConstraint("name", name="duties_pkey"),
    comment="When a worker last started each shared duty.",
)

epochs = Table(
    "epochs",
    metadata,
    Column("id", BigInteger, autoincrement=False, nullable=False, comment="1, 2, 3 …; the greatest is current."),
    Column(
        "system_identifier",
        Text,
        nullable=False,
        comment="System identifier of the cluster; empty if the user may not read it.",
    ),
    Column("database_oid", BigInteger, nullable=False, comment="Object id of the database."),
    Column("timeline", BigInteger, comment="Timeline when the epoch began."),
    Column("place", Text, comment="Identifier of the data files of an embedded database; null otherwise."),
    Column("cursor", BigInteger, nullable=False, comment="Newest change when the epoch began."),
    Column("began_at", Time, nullable=False, comment="When it began."),
    Column(
        "given",
        BigInteger,
        comment="Greatest cursor known to be assigned before, lost ones included; null in rows of older versions.",
    ),
    PrimaryKeyConstraint("id", name="epochs_pkey"),
    comment="Identity of this database; a row is added by the first process that serves it and by archiver adopt.",
)

epoch_faults = Table(
    "epoch_faults",
    metadata,
    Column("epoch_id", BigInteger, autoincrement=False, nullable=False, comment="Epoch in which it was found."),
    Column("host", Text, nullable=False, comment="Host name of the machine that found it."),
    Column(
        "reason", Text, nullable=False, comment="Rows that the machine saw committed and that the database lacks."
    ),
    Column("cursor", BigInteger, nullable=False, comment="Newest change that the machine saw in that epoch."),
    Column("found_at", Time, nullable=False, comment="When it was found, on the clock of Postgres."),
    PrimaryKeyConstraint("epoch_id", name="epoch_faults_pkey"),
    comment="Epochs in which the database lost rows: it is not served until archiver adopt starts a new epoch.",
)
