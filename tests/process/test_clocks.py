"""Clocks: leases and due times that were stored while a clock was ahead."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from archiver import database
from archiver.archive import DEFAULT_TIMING
from archiver.database import clock, transaction
from archiver.history import leases
from archiver.outbound.followups import subscriptions
from archiver.worker.clock_recovery import make_impossible_times_due
from tests.support.observations import record
from tests.support.payloads import created
from tests.support.receivers import archiver
from tests.support.rows import execute, rows

ON_ONE_VERSION = True  # nothing here depends on the version of Postgres


@pytest.mark.parametrize(("ahead", "is_free"), [("30 seconds", False), ("1 day", True), ("-1 second", True)])
def test_a_lease_that_is_further_ahead_than_a_lease_lasts_is_free(engine: Engine, ahead: str, is_free: bool) -> None:
    record(engine, created("c1", "s1"))
    execute(engine, f"UPDATE archiver.sessions SET leased_until = now() + interval '{ahead}' WHERE session_id = 's1'")
    with transaction(engine) as connection:
        now = database.now()
        assert set(leases.claim(connection, ["s1"], now, now + leases.LEASE)) == ({"s1"} if is_free else set())


@pytest.mark.parametrize(("ahead", "is_free"), [("10 seconds", False), ("1 day", True)])
def test_the_lease_of_a_subscription_likewise(engine: Engine, ahead: str, is_free: bool) -> None:
    values = {"url": "https://example.com/", "events": ["chat.created"], "is_ordered": False, "concurrency": 1}
    with transaction(engine) as connection:
        secret = {"secret": "whsec_MTIzNDU2Nzg5MDEyMzQ1Ng=="}
        one = subscriptions.insert_subscription(connection, values | secret, None)
        connection.execute(
            text(
                "UPDATE archiver.subscriptions SET leased_by = 'another',"
                f" leased_until = now() + interval '{ahead}' WHERE id = {one}"
            )
        )
    with transaction(engine) as connection:
        assert (subscriptions.lease(connection, one, "me") is not None) is is_free


def test_due_times_further_ahead_than_any_can_be_are_due_now_and_doctor_names_them(
    engine: Engine, database_url: str
) -> None:
    record(engine, created("c1", "s1"))
    execute(engine, "UPDATE archiver.sessions SET reconcile_at = now() + interval '400 days' WHERE session_id = 's1'")
    shown = archiver("doctor", database_url=database_url).stdout
    assert "the next reading of a session" in " ".join(shown.split())
    with transaction(engine) as connection:
        assert make_impossible_times_due(connection, DEFAULT_TIMING) == 1
    with transaction(engine) as connection:
        assert make_impossible_times_due(connection, DEFAULT_TIMING) == 0
    assert rows(engine, "SELECT reconcile_at <= now() FROM archiver.sessions WHERE session_id = 's1'") == [(True,)]


def test_the_databases_clock_is_known_after_a_transaction_and_bounds_what_a_machine_says(engine: Engine) -> None:
    with transaction(engine) as connection:
        at = connection.scalar(text("SELECT clock_timestamp()"))
        assert at is not None
        assert abs(database.now() - at) < timedelta(seconds=10)
        tomorrow, yesterday = at + timedelta(days=1), at - timedelta(days=1)
        assert clock.at_most_now(yesterday) == yesterday
        assert clock.at_most_now(tomorrow) < at + timedelta(minutes=2)
