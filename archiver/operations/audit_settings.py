"""Record the effective settings in the audit log when they change."""

from typing import Any

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from archiver import database
from archiver.inbound import signatures
from archiver.ledger import audit_log
from archiver.settings import Settings

log = structlog.get_logger(__name__)


def record_settings(engine: Engine, configuration: Settings, part: str) -> None:
    """Record the settings of `part` (`serve` or `worker`) if they have changed. A failure is only logged."""
    try:
        with database.transaction(engine) as opened:
            audit_log.insert_settings_change(opened, audit_log.actor(), part, _values(configuration, part))
    except SQLAlchemyError as error:
        log.warning("settings not recorded in the audit log", reason=database.explain(error))


def _values(configuration: Settings, part: str) -> dict[str, Any]:
    """Return the settings of `part` for the audit log, with key ids instead of secrets."""
    erasing = {
        "on_delete": configuration.on_delete,
        "erase_after": configuration.erase_after,
        "retention_days": configuration.retention_days,
        "retention_by_assistant": configuration.retention_of_assistants,
        "retention_metadata_days": configuration.retention_metadata_days,
    }
    if part == "worker":
        return erasing
    is_insecure = configuration.webhook_scheme == "none"
    return erasing | {
        "webhook_scheme": configuration.webhook_scheme,
        "key_ids": [] if is_insecure else [signatures.key_id(secret) for secret in configuration.secrets],
        "insecure": is_insecure,
        "spool": configuration.spool,
    }
