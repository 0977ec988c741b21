"""Metrics and structured logs. Neither contains message content, bodies or secrets."""

import logging
import os
import sys
import traceback
from collections import Counter as Counting
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, Literal, cast

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.metrics_core import Metric

FRAMES = 6  # innermost frames of a traceback
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# The library reads the variable when it is imported; a later value has no effect.
_IS_SHARED = MULTIPROCESS_FOLDER in os.environ

received = Counter("archiver_received_total", "Webhook requests, by response and reason.", ["status", "reason"])
duplicates = Counter("archiver_duplicates_total", "Redelivered facts that the ledger already contained.")
refused_erased = Counter(
    "archiver_refused_erased_total", "Deliveries refused because their session or turn is erased."
)
destruction_refused = Counter(
    "archiver_destruction_refused_total",
    "Retention runs stopped because a clock is in doubt, by reason.",
    ["reason"],
)
batch_events = Histogram(
    "archiver_batch_events",
    "Events per transaction.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
commit_seconds = Histogram(
    "archiver_commit_seconds",
    "Seconds from the start of a batch's transaction to its commit.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
commit_failures = Counter("archiver_commit_failures_total", "Failed transactions, by SQLSTATE.", ["sqlstate"])
slow_events = Counter(
    "archiver_slow_events_total",
    "Events written separately because they slowed a batch, by outcome.",
    ["status"],
)
unreadable_facts = Counter(
    "archiver_unreadable_facts_total", "Ledger rows that this version cannot parse, by reason.", ["reason"]
)
messages_without_text = Counter(
    "archiver_messages_without_text_total",
    "Messages of stored webhooks without text, by kind.",
    ["shape"],
)
repaired_messages = Counter(
    "archiver_repaired_messages_total",
    "Messages recovered from history because a webhook was lost. Alert when it increases.",
)
readings = Counter("archiver_readings_total", "History readings, by outcome.", ["outcome"])
reading_seconds = Histogram(
    "archiver_reading_seconds",
    "Seconds from a history call to its response, including retries and pauses.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
pauses = Counter("archiver_pauses_total", "Pauses requested by CallHQ, by response status.", ["reason"])
followup_attempts = Counter(
    "archiver_followup_attempts_total",
    "Delivery attempts of follow-ups, by resulting state: delivered, failed (will be retried) or dead.",
    ["result"],
)
followup_seconds = Histogram(
    "archiver_followup_attempt_seconds",
    "Duration of a follow-up delivery attempt in seconds.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15),
)
followup_waits = Counter(
    "archiver_followup_waits_total", "Times that a follow-up sender waited for the database or was restarted."
)
followup_set_aside = Counter(
    "archiver_followup_set_aside_total",
    "Follow-up work deferred, by reason (locked, too_slow); each item is retried separately.",
    ["reason"],
)
followup_aside = Gauge("archiver_followup_aside", "Follow-up work currently deferred.", multiprocess_mode="livesum")
followup_oldest = Gauge(
    "archiver_followup_oldest_age_seconds",
    "Age of the oldest change not yet delivered to an active subscription.",
    multiprocess_mode="livemostrecent",
)
followup_pending = Gauge(
    "archiver_followup_pending",
    "Pending deliveries, including those waiting for a retry.",
    multiprocess_mode="livemostrecent",
)
followup_paused = Gauge(
    "archiver_followup_paused_subscriptions", "Paused subscriptions.", multiprocess_mode="livemostrecent"
)
followup_failing = Gauge(
    "archiver_followup_failing_subscriptions",
    "Active subscriptions whose latest attempt failed.",
    multiprocess_mode="livemostrecent",
)
followup_defects = Counter(
    "archiver_followup_defects_total",
    "Delivery attempts that failed because of a defect of the archiver: see the log.",
)
queue_events = Gauge("archiver_queue_events", "Events waiting for a commit.", multiprocess_mode="livesum")
queue_bytes = Gauge("archiver_queue_bytes", "Bytes of events waiting for a commit.", multiprocess_mode="livesum")
spool_events = Gauge("archiver_spool_events", "Events in the spool.", multiprocess_mode="livesum")
spool_bytes = Gauge("archiver_spool_bytes", "Bytes of events in the spool.", multiprocess_mode="livesum")
spool_age = Gauge(
    "archiver_spool_oldest_age_seconds", "Age of the oldest event in the spool.", multiprocess_mode="livemax"
)
missed_turns = Gauge(
    "archiver_turns_without_webhook",
    "Turns in histories since the latest webhook, or all without one. At 3 or more, webhooks do not arrive: alert.",
    multiprocess_mode="livemostrecent",
)
spool_lost = Gauge(
    "archiver_spool_lost_events",
    "Acknowledged events missing from the spool; see `archiver doctor`. Alert above 0.",
    multiprocess_mode="livemax",
)
sealing = Gauge(
    "archiver_sealing_timestamp_seconds",
    "Unix time when all settled rows were last sealed; 0 before. Alert when it grows old.",
    multiprocess_mode="livemax",
)
connections = Gauge("archiver_connections", "Open connections.", multiprocess_mode="livesum")
connections_refused = Counter(
    "archiver_connections_refused_total",
    "Connections closed because of client behaviour, by reason.",
    ["reason"],
)
last_event = Gauge(
    "archiver_last_event_timestamp_seconds",
    "Unix time of the last committed webhook; absent before the first.",
    multiprocess_mode="livemax",
)
clock_difference = Gauge(
    "archiver_clock_difference_seconds",
    "Seconds by which this machine's clock is ahead of the database's; negative if behind. Alert beyond 60.",
    multiprocess_mode="livemostrecent",
)
times_ahead = Gauge(
    "archiver_times_ahead",
    "Implausibly late due times corrected by the last check (once a minute).",
    multiprocess_mode="livemostrecent",
)
lock_waiters = Gauge(
    "archiver_lock_waiting_sessions",
    "Sessions waiting for a lock on the archiver's tables for several seconds. Alert when it stays above 0.",
    multiprocess_mode="livemax",
)
settings_current = Gauge(
    "archiver_settings_current",
    "1 if the settings in use match their files; 0 if changed files are invalid.",
    multiprocess_mode="livemin",
)
settings_current.set(1)  # a process begins with the settings of its files
worker_up = Gauge(
    "archiver_worker_up",
    "1 if a worker duty works, 0 if it fails or hangs; no series if it is off or no worker runs.",
    ["duty"],
    multiprocess_mode="livemin",
)
worker_restarts = Counter("archiver_worker_restarts_total", "Restarts of a worker duty after a fault.", ["duty"])
heartbeat_failures = Counter(
    "archiver_heartbeat_failures_total", "Worker reports that the database did not store, by reason.", ["reason"]
)
identity_unreadable = Counter(
    "archiver_identity_unreadable_total",
    "Database identity checks that were incomplete.",
    ["part"],
)
quarantine_searched = Counter(
    "archiver_quarantine_searched_total", "Quarantined bodies decoded to search for erased content."
)
published_changes = Counter("archiver_changes_published_total", "Changes published to the feed.")
notify_failures = Counter(
    "archiver_notify_failures_total",
    "Pages of changes published without NOTIFY because the notification queue is full.",
)
outbox_transactions = Gauge(
    "archiver_outbox_transactions",
    "Committed transactions whose changes are not yet published.",
    multiprocess_mode="livemax",
)
outbox_age = Gauge(
    "archiver_outbox_oldest_age_seconds", "Age of the oldest unpublished change.", multiprocess_mode="livemax"
)
sessions_set_aside = Counter(
    "archiver_sessions_set_aside_total",
    "Failed attempts to store the derived rows of a session.",
)
search_lag = Gauge(
    "archiver_search_lag_seconds",
    "Age of the oldest change that the search index lacks; 0 if none.",
    multiprocess_mode="livemostrecent",
)
search_partial = Counter(
    "archiver_search_partial_total", "Messages of which only the first 100,000 characters were indexed."
)
search_skipped = Counter(
    "archiver_search_skipped_total", "Turns that Postgres could not index for search: see the log."
)


class Refusals:
    """A writer of rate-limited log lines about deliveries that were not archived."""

    SECONDS = 60.0
    ADDRESSES = 1_000  # remembered at a time, over all kinds

    def __init__(self) -> None:
        self._logged_at: dict[tuple[str, str], float] = {}
        self._since: Counting[tuple[str, str]] = Counting()
        self._addresses: Counting[tuple[tuple[str, str], str]] = Counting()

    def record(self, *, status: str, reason: str, detail: str, address: str = "") -> None:
        """Count one delivery. `detail`: a sentence without content. `address`: the sender's, if it is relevant."""
        kind, now = (status, reason), monotonic()
        self._since[kind] += 1
        if address and ((kind, address) in self._addresses or len(self._addresses) < self.ADDRESSES):
            self._addresses[kind, address] += 1
        if now - self._logged_at.get(kind, -self.SECONDS) < self.SECONDS:
            return
        self._logged_at[kind] = now
        count = self._since.pop(kind)
        structlog.get_logger(__name__).warning(
            "delivery not archived",
            status=status,
            reason=reason,
            detail=detail,
            count=count,
            **self._address_fields(kind),
        )

    def _address_fields(self, kind: tuple[str, str]) -> dict[str, Any]:
        """Return log fields about the addresses of a kind, and reset their counts."""
        result = Counting(
            {address: self._addresses[each, address] for each, address in self._addresses if each == kind}
        )
        for address in result:
            del self._addresses[kind, address]
        return {"addresses": len(result), "most_from": result.most_common(1)[0][0]} if result else {}


refusals = Refusals()


class Recurring:
    """A warning that is logged immediately, then at most once a minute with a count."""

    SECONDS = 60.0

    def __init__(self, event: str) -> None:
        self._event = event
        self._written_at = -self.SECONDS
        self._count = 0

    def warn(self, **fields: Any) -> None:
        """Count one occurrence, and log if a line is due. `fields` describe this occurrence, without content."""
        self._count += 1
        now = monotonic()
        if now - self._written_at >= self.SECONDS:
            structlog.get_logger(__name__).warning(self._event, count=self._count, **fields)
            self._written_at, self._count = now, 0


def metrics() -> bytes:
    """Return all metrics as Prometheus text, summed over the processes of one `serve`.

    The time of the last event is absent while unknown: as 0, an alert on its age would fire.
    """
    return _metrics().replace(b"\narchiver_last_event_timestamp_seconds 0.0\n", b"\n")


def _metrics() -> bytes:
    if MULTIPROCESS_FOLDER not in os.environ:
        return generate_latest()
    _delete_dead_processes(Path(os.environ[MULTIPROCESS_FOLDER]))
    registry = CollectorRegistry()
    registry.register(_FolderCollector())
    return generate_latest(registry if _IS_SHARED else cast("CollectorRegistry", _MergedRegistry(REGISTRY, registry)))


class _FolderCollector:
    """Metrics of the processes that share a folder."""

    def collect(self) -> Iterable[Metric]:
        """Yield each family. Skip empty files, which a process has just created: the library fails on them."""
        files = [str(file) for file in Path(os.environ[MULTIPROCESS_FOLDER]).glob("*.db") if _size(file)]
        return multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-any-return,no-untyped-call]  # not typed there


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # the gauges of an exited process
        return 0


class _MergedRegistry:
    """Metrics of this process and of the processes that share a folder, as one registry."""

    def __init__(self, *registries: CollectorRegistry) -> None:
        self._registries = registries

    def collect(self) -> Iterable[Metric]:
        """Yield each series once: the maximum or the minimum for some gauges, otherwise the sum."""
        families: dict[str, Metric] = {}
        for family in chain.from_iterable(registry.collect() for registry in self._registries):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            series = {(each.name, *sorted(each.labels.items())): each for each in known.samples}
            for sample in family.samples:
                key = (sample.name, *sorted(sample.labels.items()))
                of_both = [sample.value, *([series[key].value] if key in series else [])]
                series[key] = sample._replace(value=_MERGES.get(family.name, sum)(of_both))
            known.samples = list(series.values())
        return families.values()


# The functions that merge the gauges set in both registries. The others are set in one of them, and 0 in the other.
_MERGES: dict[str, Callable[[list[float]], float]] = {
    family.name: merge
    for gauge, merge in ((spool_age, max), (sealing, max), (last_event, max), (settings_current, min))
    for family in gauge.describe()
}


def _delete_dead_processes(folder: Path) -> None:
    """Remove the gauges of exited processes, because a killed receiver no longer waits for commits."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]  # the library leaves it untyped
        except PermissionError:
            continue


def configure_logs(level: str, log_format: Literal["auto", "json", "text"]) -> None:
    """Make the archiver and its libraries log one line per event to stderr."""
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
                _format_error_without_content,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # the archiver logs the relevant events itself
    for noisy_logger in ("alembic", "uvicorn", "procrastinate", "httpx2", "httpcore2"):
        logging.getLogger(noisy_logger).setLevel(max(root.level, logging.WARNING))
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


def _format_error_without_content(_: Any, __: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Format an error as type and location; its message could quote content."""
    given = line.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        line["error"] = type(error).__name__
        line["where"] = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return line
