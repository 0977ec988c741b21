"""Metrics and structured logs. No message content, body or secret ever enters either."""

import logging
import os
import sys
import traceback
from collections import Counter as Counting
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, Literal, cast

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.metrics_core import Metric

FRAMES = 6  # of a traceback, the innermost
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# The library looks when it is imported, and counts in that folder or, told of it later, by itself.
_IS_SHARED = MULTIPROCESS_FOLDER in os.environ

received = Counter("archiver_received_total", "Webhook requests, by answer and reason.", ["status", "reason"])
duplicates = Counter("archiver_duplicates_total", "Deliveries of facts that the ledger already held.")
refused_erased = Counter(
    "archiver_refused_erased_total", "Deliveries that were not kept, because what they speak of was erased."
)
destruction_refused = Counter(
    "archiver_destruction_refused_total",
    "Runs of a duty that destroyed nothing for its age, because a clock is in doubt, by reason.",
    ["reason"],
)
batch_events = Histogram(
    "archiver_batch_events",
    "Events that shared one transaction.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
commit_seconds = Histogram(
    "archiver_commit_seconds",
    "Seconds from the opening of a batch's transaction to its commit.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
commit_failures = Counter(
    "archiver_commit_failures_total", "Transactions that did not commit, by SQLSTATE.", ["sqlstate"]
)
slow_events = Counter(
    "archiver_slow_events_total",
    "Events that were written alone, because transactions took too long with them, by what became of them.",
    ["status"],
)
unreadable_facts = Counter(
    "archiver_unreadable_facts_total", "Ledger rows that this version cannot read again, by reason.", ["reason"]
)
messages_without_text = Counter(
    "archiver_messages_without_text_total",
    "Messages of stored webhooks in which no text was found, by what they are instead.",
    ["shape"],
)
repaired_messages = Counter(
    "archiver_repaired_messages_total", "Messages that history supplied: webhooks were lost. Alert when it grows."
)
readings = Counter("archiver_readings_total", "Sessions read, by what the answer was.", ["outcome"])
reading_seconds = Histogram(
    "archiver_reading_seconds",
    "Seconds from a call for a history to its answer, retries and pauses included.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
pauses = Counter("archiver_pauses_total", "Pauses that CallHQ asked for, by its answer.", ["reason"])
followup_attempts = Counter(
    "archiver_followup_attempts_total",
    "Attempts at follow-ups, by what became of the delivery: delivered, failed (it is tried again) or dead.",
    ["result"],
)
followup_seconds = Histogram(
    "archiver_followup_attempt_seconds",
    "Seconds that an attempt at a follow-up took.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15),
)
followup_waits = Counter(
    "archiver_followup_waits_total", "Times that sending follow-ups waited for the database, or was started again."
)
followup_set_aside = Counter(
    "archiver_followup_set_aside_total",
    "Pieces of work on follow-ups that were set aside (locked, too_slow); each is tried again alone.",
    ["reason"],
)
followup_aside = Gauge(
    "archiver_followup_aside", "Pieces of work on follow-ups that are set aside.", multiprocess_mode="livesum"
)
followup_oldest = Gauge(
    "archiver_followup_oldest_age_seconds",
    "Age of the oldest change that a subscription at work has not been told.",
    multiprocess_mode="livemostrecent",
)
followup_pending = Gauge(
    "archiver_followup_pending", "Deliveries that wait, or are tried again.", multiprocess_mode="livemostrecent"
)
followup_paused = Gauge(
    "archiver_followup_paused_subscriptions", "Subscriptions that are paused.", multiprocess_mode="livemostrecent"
)
followup_failing = Gauge(
    "archiver_followup_failing_subscriptions",
    "Subscriptions at work whose latest attempt failed.",
    multiprocess_mode="livemostrecent",
)
followup_defects = Counter(
    "archiver_followup_defects_total", "Attempts that failed here, for no reason of the receiver: see the log."
)
queue_events = Gauge("archiver_queue_events", "Events waiting for a commit.", multiprocess_mode="livesum")
queue_bytes = Gauge("archiver_queue_bytes", "Bytes of the events waiting.", multiprocess_mode="livesum")
spool_events = Gauge(
    "archiver_spool_events", "Events on the spool, waiting for the database.", multiprocess_mode="livesum"
)
spool_bytes = Gauge("archiver_spool_bytes", "Bytes of the events on the spool.", multiprocess_mode="livesum")
spool_age = Gauge(
    "archiver_spool_oldest_age_seconds", "Age of the oldest event on the spool.", multiprocess_mode="livemax"
)
missed_turns = Gauge(
    "archiver_turns_without_webhook",
    "Turns that histories have shown since the latest webhook of a turn. From 3 on webhooks no longer arrive: alert.",
    multiprocess_mode="livemostrecent",
)
spool_lost = Gauge(
    "archiver_spool_lost_events",
    "Acknowledged events that a disk or a person took from the spool; see archiver doctor. Alert above 0.",
    multiprocess_mode="livemax",
)
sealing = Gauge(
    "archiver_sealing_timestamp_seconds",
    "Unix time when all that was settled had last been sealed; 0 before. Alert when it grows old.",
    multiprocess_mode="livemax",
)
connections = Gauge("archiver_connections", "Open connections.", multiprocess_mode="livesum")
connections_refused = Counter(
    "archiver_connections_refused_total",
    "Connections that were ended for what their clients did, by reason.",
    ["reason"],
)
last_event = Gauge(
    "archiver_last_event_timestamp_seconds",
    "Unix time of the last event that this server committed; 0 before the first.",
    multiprocess_mode="livemax",
)
clock_difference = Gauge(
    "archiver_clock_difference_seconds",
    "By how much the clock of this machine is ahead of the database's; negative: behind. Alert beyond a minute.",
    multiprocess_mode="livemostrecent",
)
times_ahead = Gauge(
    "archiver_times_ahead",
    "Due times that were further ahead than they can be, and were made due at the last look, once a minute.",
    multiprocess_mode="livemostrecent",
)
lock_waiters = Gauge(
    "archiver_lock_waiting_sessions",
    "Sessions that wait for a lock on the archiver's tables, for seconds. Alert when it stays above 0.",
    multiprocess_mode="livemax",
)
settings_current = Gauge(
    "archiver_settings_current",
    "1 while the settings in use are those of their files; 0 while changed files cannot be used.",
    multiprocess_mode="livemin",
)
worker_up = Gauge(
    "archiver_worker_up",
    "1 while a duty of the worker works, 0 while it fails or hangs; without a series it is off or no worker runs.",
    ["duty"],
    multiprocess_mode="livemin",
)
worker_restarts = Counter(
    "archiver_worker_restarts_total", "Times that a duty of the worker was started again after a fault.", ["duty"]
)
heartbeat_failures = Counter(
    "archiver_heartbeat_failures_total", "Reports of a worker that the database did not take, by reason.", ["reason"]
)
identity_unreadable = Counter(
    "archiver_identity_unreadable_total",
    "Looks at which database this is that could not read or remember a part.",
    ["part"],
)
quarantine_searched = Counter(
    "archiver_quarantine_searched_total", "Quarantined bodies that were decoded to find what is to be erased."
)
published_changes = Counter("archiver_changes_published_total", "Changes of the archive that the feed has told.")
notify_failures = Counter(
    "archiver_notify_failures_total",
    "Pages of changes that went without NOTIFY: somebody who listens sleeps in a transaction.",
)
outbox_transactions = Gauge(
    "archiver_outbox_transactions", "Transactions whose changes are not published yet.", multiprocess_mode="livemax"
)
outbox_age = Gauge(
    "archiver_outbox_oldest_age_seconds", "Age of the oldest change not published yet.", multiprocess_mode="livemax"
)


class Refusals:
    """Log lines about deliveries that were not archived: the first of a kind at once, then one now and then."""

    SECONDS = 60.0
    ADDRESSES = 1_000  # remembered at a time, over all kinds

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], float] = {}
        self._since: Counting[tuple[str, str]] = Counting()
        self._addresses: Counting[tuple[tuple[str, str], str]] = Counting()

    def tell(self, *, status: str, reason: str, detail: str, address: str = "") -> None:
        """One more; `detail` is a sentence without content, `address` the sender's where that is of interest."""
        kind, now = (status, reason), monotonic()
        self._since[kind] += 1
        if address and ((kind, address) in self._addresses or len(self._addresses) < self.ADDRESSES):
            self._addresses[kind, address] += 1
        if now - self._told.get(kind, -self.SECONDS) < self.SECONDS:
            return
        self._told[kind] = now
        count = self._since.pop(kind)
        structlog.get_logger(__name__).warning(
            "not archived", status=status, reason=reason, detail=detail, count=count, **self._whence(kind)
        )

    def _whence(self, kind: tuple[str, str]) -> dict[str, Any]:
        """From how many addresses since the last line, at least, and from which most; forgotten thereby."""
        found = Counting(
            {address: self._addresses[each, address] for each, address in self._addresses if each == kind}
        )
        for address in found:
            del self._addresses[kind, address]
        return {"addresses": len(found), "most_from": found.most_common(1)[0][0]} if found else {}


refusals = Refusals()


class Recurring:
    """A warning that is written at once, and then at most once a minute with the number of times since the last."""

    SECONDS = 60.0

    def __init__(self, event: str) -> None:
        self._event = event
        self._written_at = -self.SECONDS
        self._count = 0

    def warn(self, **fields: Any) -> None:
        """Count one more; `fields` are those of the newest. They hold no content."""
        self._count += 1
        now = monotonic()
        if now - self._written_at >= self.SECONDS:
            structlog.get_logger(__name__).warning(self._event, count=self._count, **fields)
            self._written_at, self._count = now, 0


def metrics() -> bytes:
    """All metrics as Prometheus text, summed over the processes of one `serve`."""
    if MULTIPROCESS_FOLDER not in os.environ:
        return generate_latest()
    _forget_dead_processes(Path(os.environ[MULTIPROCESS_FOLDER]))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # the library leaves it untyped
    return generate_latest(registry if _IS_SHARED else cast("CollectorRegistry", _Together(REGISTRY, registry)))


class _Together:
    """A process that counts by itself, and those beside it that share a folder, as one registry."""

    def __init__(self, *registries: CollectorRegistry) -> None:
        self._registries = registries

    def collect(self) -> Iterable[Metric]:
        """Each series once: of gauges of the greatest the greatest, else the sum."""
        families: dict[str, Metric] = {}
        for family in chain.from_iterable(registry.collect() for registry in self._registries):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            series = {(each.name, *sorted(each.labels.items())): each for each in known.samples}
            for sample in family.samples:
                key = (sample.name, *sorted(sample.labels.items()))
                of_both = [sample.value, *([series[key].value] if key in series else [])]
                series[key] = sample._replace(value=max(of_both) if family.name in _GREATEST else sum(of_both))
            known.samples = list(series.values())
        return families.values()


_GREATEST = {family.name for gauge in (spool_age, sealing, last_event) for family in gauge.describe()}


def _forget_dead_processes(folder: Path) -> None:
    """A receiver that was killed waits for no commit any more."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]  # the library leaves it untyped
        except PermissionError:
            continue


def configure_logs(level: str, log_format: Literal["auto", "json", "text"]) -> None:
    """One line an event on stderr, ours and the libraries' alike."""
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if as_text else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _tell_error_without_content,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for talkative in ("alembic", "uvicorn", "procrastinate", "httpx2", "httpcore2"):  # we say what matters
        logging.getLogger(talkative).setLevel(max(root.level, logging.WARNING))
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its callers log that a call failed, once a minute
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def _tell_error_without_content(_: Any, __: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """An error's type and where it was raised; its text and its locals could quote a message."""
    given = line.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        line["error"] = type(error).__name__
        line["where"] = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return line
