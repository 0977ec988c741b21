"""Reading many sessions: each once, each told of, whatever the leases and the platform do."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr

from archiver import reconcile
from archiver.callhq import UnauthorizedError
from archiver.database import database_url as parse_url
from archiver.database import run_in_transaction
from archiver.projection import leases
from archiver.reconcile import Reading, backfill
from archiver.settings import Settings
from archiver.worker import reconciling
from tests import servers
from tests.upstreams import API_KEY, CallHQ, simulated

pytestmark = [
    pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True),
    pytest.mark.anyio,
]


@pytest.fixture
def callhq() -> Iterator[CallHQ]:
    with simulated(history_latency=0.02) as callhq:
        yield callhq


def settings(callhq: CallHQ, key: str = API_KEY) -> Settings:
    return Settings.model_construct(callhq_api_url=f"{callhq.url}/api", callhq_api_key=SecretStr(key))


async def test_leases_that_are_about_to_end_are_taken_anew(
    database_url: str, callhq: CallHQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So short that a few sessions use one up; the constants alone are changed.
    monkeypatch.setattr(reconcile, "READ_SECONDS", 1.0)
    monkeypatch.setattr(reconcile, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(reconcile, "LEASE_SECONDS", 1.2)
    sessions = [callhq.session(f"s{n}", "ok") for n in range(60)]
    ids = [session.id for session in sessions]
    told: list[Reading] = []
    async with reconciling(settings(callhq), parse_url(database_url), concurrency=1) as (engine, reconciler, submit):
        await backfill.register(engine, submit, ids)
        outcomes = await reconciler.read_all(ids, told.append)
    assert outcomes == {"read": 60}
    assert Counter(reading.session_id for reading in told) == Counter(ids)
    said = {session.id: len(session.messages()) for session in sessions}
    assert all(reading.recovered == said[reading.session_id] for reading in told)


async def test_sessions_that_somebody_else_reads_are_left_to_them(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(10)]
    told: list[Reading] = []
    async with reconciling(settings(callhq), parse_url(database_url)) as (engine, reconciler, submit):
        await backfill.register(engine, submit, ids)
        until = datetime.max.replace(tzinfo=UTC)
        await run_in_transaction(engine, lambda c: leases.claim(c, ids[:3], until, until))
        assert await reconciler.read_all(ids, told.append) == {"read": 7, "busy": 3}
    assert {reading.session_id for reading in told if reading.outcome == "busy"} == set(ids[:3])


async def test_a_refused_key_gives_every_lease_back(database_url: str, callhq: CallHQ) -> None:
    ids = [callhq.session(f"s{n}", "ok").id for n in range(10)]
    async with reconciling(settings(callhq, "wrong"), parse_url(database_url)) as (engine, reconciler, submit):
        await backfill.register(engine, submit, ids)
        with pytest.raises(UnauthorizedError):
            await reconciler.read_all(ids)
        now = datetime.now(UTC)
        assert set(await run_in_transaction(engine, lambda c: leases.claim(c, ids, now, now))) == set(ids)
