"""Checks that need no database: settings, CallHQ, disk."""

import asyncio
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from archiver.errors import sentence
from archiver.history.callhq import CallError, PauseRequestedError, UnauthorizedError, printable, probe
from archiver.inbound import signatures
from archiver.inbound.spool import (
    LOST,
    MIN_ROOM_BYTES,
    SPOOL_FOLDER,
    SpoolError,
    select_depth,
    select_foreign,
    select_lost,
    select_room,
    select_unfit,
    set_aside_files,
)
from archiver.operations.doctor.finding import Finding
from archiver.settings import Settings, SettingsError, unknown_variables

MIN_SECRET_LENGTH = 16  # characters


def examine_settings(configuration: Settings) -> Iterator[Finding]:
    """Check for unknown variables and weak secrets."""
    for name, suggestion in unknown_variables():
        advice = (
            f"Did you mean {suggestion}?"
            if suggestion
            else "Unset it, or look up the correct name in docs/settings.md."
        )
        yield Finding("settings", "warning", f"{name} is not a setting and has no effect.", advice)
    scheme = configuration.webhook_scheme
    try:
        signatures.verifier(configuration)
    except SettingsError as error:
        yield Finding("webhook secret", "failure", "Deliveries cannot be verified.", sentence(error))
        return
    if scheme == "none":
        yield Finding(
            "webhook secret",
            "warning",
            "Anyone who reaches the port can write to the archive.",
            "Set ARCHIVER_WEBHOOK_SCHEME and ARCHIVER_WEBHOOK_SECRETS.",
        )
        return
    key_ids = ", ".join(map(signatures.key_id, configuration.secrets))
    detail = f"Scheme {scheme}; key_id of each secret, in their order: {key_ids}."
    if any(len(secret) < MIN_SECRET_LENGTH for secret in configuration.secrets):
        yield Finding(
            "webhook secret",
            "warning",
            f"{detail} One secret is shorter than {MIN_SECRET_LENGTH} characters and can be guessed.",
            'Generate a longer one: python3 -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    else:
        yield Finding("webhook secret", "ok", detail)


def examine_platform(configuration: Settings) -> Finding:
    """Check with one call whether histories can be fetched."""
    if not configuration.callhq_api_key.get_secret_value():
        detail = "Histories are not fetched, and turns that webhooks lose stay lost: no API key is set."
        return Finding("CallHQ", "warning", detail, "Set CALLHQ_API_KEY, or CALLHQ_API_KEY_FILE.")
    place = printable(configuration.callhq_api_url)
    try:
        asyncio.run(probe(configuration.callhq_api_url, configuration.callhq_api_key))
    except SettingsError as error:
        return Finding("CallHQ", "failure", "CallHQ cannot be reached.", sentence(error))
    except UnauthorizedError:
        advice = "Set CALLHQ_API_KEY to a valid key of the account whose chats are archived."
        return Finding("CallHQ", "failure", f"{place} rejects the API key.", advice)
    except PauseRequestedError as error:
        return Finding("CallHQ", "warning", f"{place} is busy. {sentence(error)}", "Try again later.")
    except CallError as error:
        advice = "Check CALLHQ_API_URL, which must be like https://api.callhq.ai/api, and that it can be reached."
        return Finding("CallHQ", "failure", sentence(f"{place}: {error}"), advice)
    return Finding("CallHQ", "ok", f"{place} accepts the API key.")


def examine_spool(configuration: Settings) -> Iterator[Finding]:
    """Check whether the spool is usable, and report its events, losses and damaged files."""
    folder = configuration.home.resolve() / SPOOL_FOLDER
    try:
        if configuration.spool == "off":
            detail = "ARCHIVER_SPOOL is off: events are rejected while Postgres is unavailable, and may be lost."
            yield Finding("spool", "warning", detail, "Unset it, unless another queue is in front of this receiver.")
        else:
            yield _spool_room(folder, configuration.spool_bytes)
        yield from _foreign_files(folder)
        left = select_depth(folder)
    except SpoolError as error:
        yield Finding("spool", "failure", "While Postgres is unavailable, no event can be accepted.", sentence(error))
        return
    if left.events:
        yield Finding(
            "spooled",
            "warning",
            f"{left.events:,} events ({left.bytes / 1_000_000:,.1f} MB) are waiting in {folder} for Postgres.",
            "`archiver serve` with this ARCHIVER_HOME drains them when Postgres is available."
            " If it is running, see its log and /readyz; otherwise start it.",
        )
    if (lost := select_lost(folder)).since is not None:
        yield Finding(
            "spool losses",
            "failure",
            f"{lost.events:,} acknowledged events are missing from {folder} since"
            f" {lost.since:%Y-%m-%d %H:%M:%S} UTC: deleted, or lost by the disk.",
            "Run `archiver backfill`, which fetches the histories of their sessions; check the disk of ARCHIVER_HOME;"
            f" then remove {folder / LOST}.",
        )
    if unfit := select_unfit(folder):
        yield Finding(
            "spool files",
            "warning",
            f"These paths are not files, so the spool cannot use them: {', '.join(map(str, unfit))}.",
            "Remove them.",
        )
    if damaged_files := set_aside_files(folder):
        yield Finding(
            "spool files",
            "warning",
            "These spool files are damaged; their readable deliveries are archived:"
            f" {', '.join(map(str, damaged_files))}.",
            "Check the disk, then delete the files: they may contain message content.",
        )


def _foreign_files(folder: Path) -> Iterator[Finding]:
    if foreign := select_foreign(folder):
        place = shlex.quote(str(folder))
        yield Finding(
            "spool files",
            "warning" if os.geteuid() == 0 else "failure",  # root itself can drain them
            "`archiver serve` as the owner of the folder cannot drain the events of these spool files, which belong"
            f" to another user or deny access: {', '.join(f'{path} ({owner})' for path, owner in foreign.items())}.",
            f"Run as root: chown --reference={place} {place}/spool-*; chmod u+rw {place}/spool-*."
            " Then run commands only as the user of `archiver serve`, for example with sudo -u.",
        )


def _spool_room(folder: Path, required: int) -> Finding:
    room = select_room(folder)
    text = f"{folder} is writable, with room for {room / 1_000_000:,.1f} MB"
    if room < MIN_ROOM_BYTES:
        advice = "Free space on the disk of ARCHIVER_HOME, or set ARCHIVER_HOME to a folder on a larger disk."
        return Finding("spool", "failure", f"The disk of {folder} is full.", advice)
    if room < required:
        advice = "Free space on that disk, or lower ARCHIVER_SPOOL_BYTES."
        return Finding("spool", "warning", f"{text}, less than ARCHIVER_SPOOL_BYTES ({required:,}).", advice)
    return Finding("spool", "ok", f"{text}.")
