"""Locks that only the writer and the owner can take; jobs without NOTIFY."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

LOCKS = {
    "lock_placement": "Shared by all that record, exclusive for turns without a session.",
    "lock_sealing": "One sealer at a time.",
    "lock_publishing": "One publisher of the change feed at a time.",
}
# Workers poll. A NOTIFY fails once a login has filled the queue of notifications, and would then keep every job
# from being made.
NOTIFIERS = {
    "procrastinate_jobs_notify_queue_job_inserted_v1": (
        "AFTER INSERT ON archiver_jobs.procrastinate_jobs FOR EACH ROW"
        " WHEN ((new.status = 'todo'::archiver_jobs.procrastinate_job_status))"
        " EXECUTE FUNCTION archiver_jobs.procrastinate_notify_queue_job_inserted_v1()"
    ),
    "procrastinate_jobs_notify_queue_job_aborted_v1": (
        "AFTER UPDATE OF abort_requested ON archiver_jobs.procrastinate_jobs FOR EACH ROW"
        " WHEN ((old.abort_requested = false AND new.abort_requested = true"
        " AND new.status = 'doing'::archiver_jobs.procrastinate_job_status))"
        " EXECUTE FUNCTION archiver_jobs.procrastinate_notify_queue_abort_job_v1()"
    ),
}


def upgrade() -> None:
    for name, comment in LOCKS.items():
        op.execute(f"CREATE TABLE archiver_jobs.{name} ()")
        op.execute(f"COMMENT ON TABLE archiver_jobs.{name} IS 'Always empty; it is only locked. {comment}'")
    for name in NOTIFIERS:
        op.execute(f"DROP TRIGGER {name} ON archiver_jobs.procrastinate_jobs")


def downgrade() -> None:
    for name, definition in NOTIFIERS.items():
        op.execute(f"CREATE TRIGGER {name} {definition}")
    for name in reversed(LOCKS):
        op.execute(f"DROP TABLE archiver_jobs.{name}")
