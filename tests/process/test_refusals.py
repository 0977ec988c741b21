"""A request without valid credentials costs little: it is refused by its headers, and logged once a minute."""

import http.client
import json
import time
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from archiver.telemetry import Refusals
from tests.conftest import Cluster
from tests.support.payloads import SECRET, WEBHOOK, created
from tests.support.receivers import PATIENT, Receiver, serving, serving_with
from tests.support.sockets import connect, delivery, head, read
from tests.support.versions import on_one_version
from tests.support.waiting import until
from tests.support.webhooks import SCHEMES, signed


@pytest.fixture(scope="module")
def receiver(cluster: Cluster) -> Iterator[Receiver]:
    url = cluster.clone()
    with serving(url) as receiver:
        yield receiver
    cluster.drop(url)


@on_one_version
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("framing", ["content-length: 900000", "transfer-encoding: chunked"])
def test_i2_an_unauthenticated_request_is_refused_before_the_body_is_read(
    scheme: str, framing: str, database_url: str
) -> None:
    good, wrong = "b2xkIHNlY3JldCBvZiBhIHRlc3Q=", "d3Jvbmcgc2VjcmV0IG9mIGEgdGVzdA=="
    with serving(database_url, **SCHEMES[scheme], ARCHIVER_WEBHOOK_SECRETS=good) as receiver:
        called = receiver.url + WEBHOOK
        stale = signed(scheme, wrong, b"", called, time.time() - 400)
        for proof in ({}, stale):
            lines = [f"{name}: {value}" for name, value in proof.items()]
            with connect(receiver.port, head(framing, *lines).replace(SECRET.encode(), b"wrong")) as connection:
                answer = read(connection)
                assert (answer.status, answer.headers["connection"]) == (401, "close")
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    until(lambda: connection.sendall(b"x" * 65_536), "it is cut off")


@on_one_version
def test_a_client_that_still_sends_receives_the_response(database_url: str) -> None:
    body = b"x" * 20_000_000  # more than the sockets hold: most is sent after the answer
    constants = PATIENT | {"archiver.http.connections.LINGER_SECONDS": 60}
    with serving_with(constants, database_url) as receiver:
        connection = http.client.HTTPConnection("127.0.0.1", receiver.port, timeout=120)
        connection.request("POST", WEBHOOK, body, {"x-webhook-secret": "wrong"})
        assert connection.getresponse().status == 413
        connection.close()


@on_one_version
def test_a_small_body_may_follow_its_refusal(receiver: Receiver) -> None:
    with connect(receiver.port, head("content-length: 100", secret="wrong")) as connection:
        answer = read(connection)
        assert (answer.status, answer.headers["connection"]) == (401, None)
        connection.sendall(b"x" * 100 + delivery(created("after")))
        assert read(connection).status == 200


UNWANTED = 'archiver_connections_refused_total{reason="body_unwanted"}'


@on_one_version
def test_i12_a_refused_body_is_not_read_to_its_end(receiver: Receiver) -> None:
    with connect(receiver.port, head("content-length: 1000000000", path="/nowhere")) as connection:
        assert read(connection).status == 404
        before = receiver.metric(UNWANTED)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            until(lambda: connection.sendall(b"x" * 65_536), "it is cut off")
    assert receiver.metric(UNWANTED) == before + 1


def test_refusals_log_the_number_of_addresses_and_the_most_frequent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr("archiver.telemetry.monotonic", lambda: 60.0 * now)

    class Few(Refusals):
        ADDRESSES = 5

    refusals = Few()
    with capture_logs() as lines:

        def record(address: str) -> None:
            refusals.record(status="unauthenticated", reason="bad_signature", detail="", address=address)

        record("10.0.0.1")
        for number in range(20):
            record(f"10.0.0.{number}")
        for _ in range(3):
            record("10.0.0.2")
        for address in ("10.0.0.2", "10.0.0.9"):
            now += 1
            record(address)
    assert [(line["addresses"], line["most_from"]) for line in lines] == [
        (1, "10.0.0.1"),
        (5, "10.0.0.2"),
        (1, "10.0.0.9"),
    ]


@on_one_version
def test_a_refusal_in_the_log_has_the_address(database_url: str) -> None:
    with serving(database_url) as receiver:
        with connect(
            receiver.port, head("content-length: 2", secret="wrong") + b"{}", source="127.0.0.9"
        ) as connection:
            assert read(connection).status == 401
        (line,) = [json.loads(line) for line in receiver.stderr().splitlines() if "not archived" in line]
    assert (line["addresses"], line["most_from"]) == (1, "127.0.0.9")
