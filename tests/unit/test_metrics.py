"""Requests for metrics that wait share one result, which is never older than the request."""

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.metrics_core import Metric
from starlette.requests import Request

from archiver.http.metrics import Metrics

SERIES = "archiver_test_latest"


class Readings:
    """A collector that counts how often the metrics are read."""

    count = 0

    def collect(self) -> Iterator[Metric]:
        self.count += 1
        yield from ()


@pytest.fixture
def readings() -> Iterator[Readings]:
    result = Readings()
    REGISTRY.register(result)
    result.count = 0
    yield result
    REGISTRY.unregister(result)


@pytest.fixture
def latest() -> Iterator[Gauge]:
    result = Gauge(SERIES, "A value that the test sets.")
    yield result
    REGISTRY.unregister(result)


async def request(metrics: Metrics) -> bytes:
    return bytes((await metrics.respond(Request({"type": "http"}))).body)


@pytest.mark.anyio
async def test_i12_requests_for_metrics_that_wait_share_one_result(readings: Readings) -> None:
    metrics = Metrics()
    first = await asyncio.gather(*(request(metrics) for _ in range(100)))
    assert (readings.count, len(set(first))) == (1, 1)
    await asyncio.gather(*(request(metrics) for _ in range(100)))
    assert readings.count == 2


@pytest.mark.anyio
async def test_metrics_are_never_older_than_the_request(latest: Gauge) -> None:
    metrics = Metrics()
    for number in range(5):
        latest.set(number)
        assert f"{SERIES} {number}.0\n".encode() in await request(metrics)


@pytest.mark.anyio
async def test_a_request_that_is_cancelled_takes_no_other_with_it() -> None:
    metrics = Metrics()
    tasks = [asyncio.create_task(request(metrics)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert all(await asyncio.gather(*tasks[1:]))
