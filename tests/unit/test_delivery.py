"""One struct for a delivery: its identity, its subject, and its content restored from a stored row."""

import hashlib
from datetime import UTC, datetime

import pytest

from archiver import events
from archiver.events import Content, Delivery, Event, Malformed, has_event, responses
from archiver.ledger import quarantine
from tests.support.payloads import created, deleted

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SESSION = responses.register({"id": "s1"})

WEBHOOK = Delivery(events.parse(created("c1", "s1")), NOW, "key")
MALFORMED = Delivery(events.parse(b"{"), NOW, "key")
REGISTRATION = Delivery(SESSION, NOW, None, responses.APPLICATION)
DELIVERIES: list[Delivery[Content]] = [WEBHOOK, MALFORMED, REGISTRATION]


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_the_content_is_restored_from_bytes_source_and_internal_identity(delivery: Delivery[Content]) -> None:
    assert events.restore(delivery.content.body, delivery.source, *delivery.internal) == delivery.content


def test_only_an_internal_fact_has_an_identity_beside_its_bytes() -> None:
    assert WEBHOOK.internal == MALFORMED.internal == (None, None, None)
    assert REGISTRATION.internal == (responses.REGISTERED, "s1", SESSION.dedupe_key)
    assert [has_event(each) for each in DELIVERIES] == [True, False, True]


def test_the_quarantine_knows_a_webhook_by_its_bytes_and_an_internal_fact_by_session_and_key() -> None:
    digests = [quarantine.digest_of(each) for each in DELIVERIES]
    assert digests == [
        hashlib.sha256(created("c1", "s1")).digest(),
        hashlib.sha256(b"{").digest(),
        hashlib.sha256(b"s1\0" + SESSION.dedupe_key).digest(),
    ]


def test_deliveries_of_one_session_or_one_unassigned_turn_wait_for_each_other() -> None:
    def subject(body: bytes) -> str:
        return Delivery(events.parse(body), NOW, "key").subject

    assert subject(created("c1", "s1")) == subject(deleted("c2", "s1")) == "s1"
    assert subject(created("c1", None)) == subject(deleted("c1", None)) != subject(created("c2", None))
    assert subject(b"{") == subject(b"{") != subject(b"[")
    assert isinstance(MALFORMED.content, Malformed)
    assert isinstance(WEBHOOK.content, Event)
