"""The result of a demo run: figures and problems, computed without I/O."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archiver.simulator.archive_reader import Holdings
from archiver.simulator.comparison import Archive, ArchivedMessage, differences, expected
from archiver.simulator.invalid_deliveries import QUARANTINED, UNAUTHENTICATED, InvalidDelivery
from archiver.simulator.webhooks import Delivery


@dataclass(frozen=True, slots=True)
class Run:
    """The deliveries of one run with their responses, and the duration in seconds."""

    webhooks: Sequence[Delivery]
    invalid_deliveries: Sequence[tuple[InvalidDelivery, Delivery]]
    seconds: float

    @property
    def accepted(self) -> list[Delivery]:
        """Return the webhooks accepted with 2xx, with which the archive is compared."""
        return [delivery for delivery in self.webhooks if delivery.outcome == "accepted"]


def problems(run: Run, holdings: Holdings) -> list[str]:
    """Return each problem as a sentence; empty if the archive and the rejections are as expected."""
    return [
        *differences(_expected(run), holdings.archive),
        *_ledger(run, holdings),
        *_refusals(run),
        *_quarantine(run, holdings),
    ]


def figures(run: Run, holdings: Holdings) -> list[tuple[str, str]]:
    """Return the rows of the table: name and figure."""
    sent = [delivery for delivery in run.webhooks if delivery.outcome != "lost"]
    answers = [delivery.answer for delivery in run.accepted]
    statuses = [delivery.status for _, delivery in run.invalid_deliveries]
    transcripts = holdings.archive.messages.values()
    rows = [
        ("webhooks sent", len(sent)),
        ("lost on the way, on purpose", len(run.webhooks) - len(sent)),
        ("duplicates among those sent", sum(delivery.is_copy for delivery in sent)),
        ("stored", answers.count("stored")),
        ("recognised as duplicates", answers.count("duplicate")),
        ("quarantined (422)", statuses.count(QUARANTINED)),
        ("refused (401)", statuses.count(UNAUTHENTICATED)),
        ("conversations archived", len(holdings.archive.conversations)),
        ("messages archived", sum(map(len, transcripts))),
        ("chats deleted", sum(chat.is_deleted for chat in holdings.archive.chats)),
    ]
    rate = len(run.accepted) / run.seconds if run.seconds else 0.0
    return [
        *((name, f"{count:,}") for name, count in rows),
        ("events per second, customers included", f"{rate:,.0f}"),
    ]


def history_figures(
    archived: Mapping[str, Sequence[ArchivedMessage]], backfill: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return the rows of the table: name and figure."""
    coverage: Mapping[str, int] = backfill["coverage"]
    rate = backfill["sessions"] / backfill["seconds"] if backfill["seconds"] else 0.0
    return [
        ("histories read", f"{backfill['sessions']:,}"),
        ("messages that webhooks had lost, recovered", f"{backfill['recovered_messages']:,}"),
        ("messages archived", f"{sum(map(len, archived.values())):,}"),
        *((f"sessions now {state}", f"{count:,}") for state, count in sorted(coverage.items())),
        ("histories per second", f"{rate:,.0f}"),
    ]


def _expected(run: Run) -> Archive:
    return expected((delivery.type, delivery.chat) for delivery in run.accepted)


def _ledger(run: Run, holdings: Holdings) -> Iterable[str]:
    facts = {json.dumps([delivery.type, delivery.chat], sort_keys=True) for delivery in run.accepted}
    if holdings.facts != len(facts):
        yield f"ledger: {holdings.facts} facts, but {len(facts)} different ones were delivered"
    attempts = sum(delivery.attempts for delivery in run.webhooks)
    # An attempt whose response was lost may have been stored, so with retries there may be more.
    if not len(run.accepted) <= holdings.deliveries <= attempts:
        yield f"ledger: counts {holdings.deliveries} deliveries, but {len(run.accepted)} were accepted"
    if not holdings.positions_ok:
        yield "messages: the positions of a session are not 1, 2, 3 …"


def _refusals(run: Run) -> Iterable[str]:
    for delivery in run.webhooks:
        if delivery.outcome in {"refused", "unanswered"}:
            yield f"webhook {delivery.type} of chat {delivery.chat.get('id')}: {delivery.outcome} ({delivery.status})"
    for invalid, delivery in run.invalid_deliveries:
        if delivery.status != invalid.status:
            yield f"invalid delivery of {len(invalid.body)} bytes: response {delivery.status}, not {invalid.status}"


def _quarantine(run: Run, holdings: Holdings) -> Iterable[str]:
    bodies = {invalid.body for invalid, _ in run.invalid_deliveries if invalid.status == QUARANTINED}
    if missing := len(bodies - holdings.quarantined):
        yield f"quarantine: {missing} of {len(bodies)} broken deliveries cannot be found again byte for byte"
    if extra := len(holdings.quarantined - bodies):
        yield f"quarantine: {extra} deliveries that were not broken"
