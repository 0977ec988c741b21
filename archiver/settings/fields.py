"""Define the settings in one typed table, each with its default, its meaning and its limits."""

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from archiver.settings import console_roles, variables
from archiver.settings.console_roles import Role
from archiver.settings.sources import FileSource
from archiver.settings.variables import Variable

MAX_DAYS = 36_600  # maximum retention

WebhookScheme = Literal[
    "secret", "bearer", "hmac", "standard", "github", "stripe", "slack", "shopify", "svix", "none"
]


def _env(name: str, default: Any, help_text: str, **limits: Any) -> Any:
    """Define a field that is read from the environment variable `name`."""
    return Field(default=default, validation_alias=AliasChoices(name), description=help_text, **limits)


class Settings(BaseSettings):
    """The settings of a process; create them with `read()`."""

    model_config = SettingsConfigDict(case_sensitive=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: SecretStr | None = _env(
        "DATABASE_URL",
        None,
        "Postgres to archive into; `postgres://` and `postgresql://` are both accepted, as are several hosts: "
        "`postgresql://USER@HOST1:5432,HOST2:5432/DATABASE?target_session_attrs=read-write`. "
        "Unset: an embedded Postgres under `ARCHIVER_HOME`.",
    )
    home: Path = _env(
        "ARCHIVER_HOME",
        Path(".archiver"),
        "Folder of the embedded database and of the spool, relative to the working directory.",
    )
    webhook_scheme: WebhookScheme = _env(
        "ARCHIVER_WEBHOOK_SCHEME",
        "secret",
        "How deliveries are authenticated: `secret`, `bearer`, `hmac`, `standard` (Standard Webhooks), a preset "
        "(`github`, `stripe`, `slack`, `shopify`, `svix`), or `none` (only with `--insecure`).",
    )
    webhook_secrets: SecretStr = _env(
        "ARCHIVER_WEBHOOK_SECRETS",
        SecretStr(""),
        "Comma-separated secrets, all accepted, so that one can be rotated. Without any, `serve` needs `--insecure`.",
    )
    secret_header: str = _env("ARCHIVER_SECRET_HEADER", "x-webhook-secret", "Header of scheme `secret`.")
    hmac_algorithm: Literal["sha256", "sha512", "sha1"] = _env(
        "ARCHIVER_HMAC_ALGORITHM", "sha256", "Scheme `hmac`: `sha256`, `sha512` or `sha1`."
    )
    hmac_header: str = _env("ARCHIVER_HMAC_HEADER", "x-signature", "Scheme `hmac`: header of the signature.")
    hmac_timestamp_header: str = _env(
        "ARCHIVER_HMAC_TIMESTAMP_HEADER", "x-timestamp", "Scheme `hmac`: header of the signed time."
    )
    hmac_timestamp_prefix: str = _env(
        "ARCHIVER_HMAC_TIMESTAMP_PREFIX",
        "",
        "Scheme `hmac`: text before the signed time if its header contains other entries too, such as `t=`.",
    )
    hmac_id_header: str = _env(
        "ARCHIVER_HMAC_ID_HEADER",
        "",
        "Scheme `hmac`: header whose value replaces `{svix-id}` in the template, such as `svix-id`.",
    )
    hmac_prefix: str = _env(
        "ARCHIVER_HMAC_PREFIX", "", "Scheme `hmac`: text before the signature, such as `sha256=`."
    )
    hmac_encoding: Literal["hex", "base64"] = _env(
        "ARCHIVER_HMAC_ENCODING", "hex", "Scheme `hmac`: `hex` or `base64`."
    )
    hmac_template: str = _env(
        "ARCHIVER_HMAC_TEMPLATE",
        "{timestamp}.{body}",
        "Scheme `hmac`: the signed text, composed of `{body}`, `{timestamp}`, `{method}`, `{url}` and `{svix-id}`.",
    )
    hmac_secret_is_base64: bool = _env(
        "ARCHIVER_HMAC_SECRET_IS_BASE64", False, "Scheme `hmac`: the secrets are base64-encoded keys."
    )
    timestamp_tolerance: int = _env(
        "ARCHIVER_TIMESTAMP_TOLERANCE",
        300,
        "Seconds by which a signed time may differ from the clock of the receiver, in either direction.",
        gt=0,
        le=86_400,
    )
    max_body: int = _env(
        "ARCHIVER_MAX_BODY",
        1_048_576,
        "Bytes of the largest accepted body; a larger one gets 413.",
        gt=0,
        le=256 * 1_048_576,
    )
    callhq_api_key: SecretStr = _env(
        "CALLHQ_API_KEY", SecretStr(""), "Key for CallHQ's API; without one no history is read."
    )
    callhq_api_url: str = _env("CALLHQ_API_URL", "https://api.callhq.ai/api", "CallHQ's API.")
    reconcile_after: int = _env(
        "ARCHIVER_RECONCILE_AFTER",
        300,
        "Seconds of quiet after a session's last event before its history is read.",
        gt=0,
        le=7 * 86_400,
    )
    session_lifetime: int = _env(
        "ARCHIVER_SESSION_LIFETIME",
        86_400,
        "Seconds after which a session expires at CallHQ; its history is read once more before then.",
        gt=0,
        le=366 * 86_400,
    )
    history_concurrency: int = _env(
        "ARCHIVER_HISTORY_CONCURRENCY",
        8,
        "Histories that one worker reads at a time; at most half of them for sessions whose previous reading failed.",
        gt=0,
        le=256,
    )
    history_rate: float = _env(
        "ARCHIVER_HISTORY_RATE",
        0,
        "Maximum history calls of one worker per second; 0: no limit.",
        ge=0,
        allow_inf_nan=False,
    )
    api_token: SecretStr = _env(
        "ARCHIVER_API_TOKEN", SecretStr(""), "Bearer token of `POST /sessions`; without one that route returns 404."
    )
    seal_every: int = _env(
        "ARCHIVER_SEAL_EVERY", 60, "Seconds between two seals of the new rows in the ledger.", gt=0, le=86_400
    )
    seal_key: SecretStr = _env(
        "ARCHIVER_SEAL_KEY",
        SecretStr(""),
        "Ed25519 private key (PEM) that signs the seals, and the manifests of exports, best given as "
        "`ARCHIVER_SEAL_KEY_FILE`; without one seals are chained, not signed.",
    )
    queue_events: int = _env(
        "ARCHIVER_QUEUE_EVENTS",
        10_000,
        "Events of one process that may wait for a commit (503 above).",
        gt=0,
    )
    queue_bytes: int = _env(
        "ARCHIVER_QUEUE_BYTES",
        64 * 1_048_576,
        "Bytes of one process that may wait for a commit (503 above); a single event always may.",
        gt=0,
    )
    console: Literal["on", "off"] = _env(
        "ARCHIVER_CONSOLE",
        "on",
        "`on`: `serve` also serves the console at `/console`, for users that `archiver users add` adds; `off`: it "
        "does not.",
    )
    console_acts: Literal["on", "off"] = _env(
        "ARCHIVER_CONSOLE_ACTS",
        "off",
        "`on`: users of the pages may also place and release holds, order erasures, retry deliveries and pause "
        "follow-ups, as their roles allow; `off`: the pages only read.",
    )
    read_database_url: SecretStr | None = _env(
        "ARCHIVER_READ_DATABASE_URL",
        None,
        "Postgres from which the console reads, such as a replica; unset: that of `DATABASE_URL`.",
    )
    oidc_issuer: str = _env(
        "ARCHIVER_OIDC_ISSUER",
        "",
        "Address of an OpenID Connect provider whose users may log in to the console; needs the extra `oidc`. Unset: "
        "only users that `archiver users add` adds.",
    )
    oidc_client_id: str = _env("ARCHIVER_OIDC_CLIENT_ID", "", "Client id of the console at that provider.")
    oidc_client_secret: SecretStr = _env(
        "ARCHIVER_OIDC_CLIENT_SECRET",
        SecretStr(""),
        "Client secret of the console at that provider; without one it is a public client, which only PKCE protects.",
    )
    oidc_roles: str = _env(
        "ARCHIVER_OIDC_ROLES",
        "",
        "Roles of groups of that provider, such as `legal=auditor,support=reader`; the first entry that applies to a "
        "user decides. Roles: `viewer`, `reader`, `auditor`, `operator`.",
    )
    oidc_groups_claim: str = _env(
        "ARCHIVER_OIDC_GROUPS_CLAIM", "groups", "Claim of the ID token that contains the groups of a user."
    )
    spool: Literal["on", "off"] = _env(
        "ARCHIVER_SPOOL",
        "on",
        "`on`: deliveries that Postgres does not accept go to disk under `ARCHIVER_HOME`, and later to Postgres; "
        "`off`: they are rejected (503).",
    )
    spool_bytes: int = _env(
        "ARCHIVER_SPOOL_BYTES",
        1_073_741_824,
        "Bytes of the largest spool of one process (503 above).",
        ge=1_048_576,
    )
    max_connections: int = _env(
        "ARCHIVER_MAX_CONNECTIONS",
        2_000,
        "Connections of one process that may be open at the same time (503 above).",
        gt=0,
        le=100_000,
    )
    client_timeout: int = _env(
        "ARCHIVER_CLIENT_TIMEOUT",
        10,
        "Seconds that a client may take to send a request's headers; three times that to send its body "
        "(408 above) and to read its response.",
        gt=0,
        le=3_600,
    )
    batch_events: int = _env("ARCHIVER_BATCH_EVENTS", 500, "Maximum events in one transaction.", gt=0, le=1_000)
    prepared_statements: bool | None = _env(
        "ARCHIVER_PREPARED_STATEMENTS",
        None,
        "Prepare repeated statements. Unset: prepare them unless a connection pooler such as PgBouncer is found. "
        "`true` prepares them behind PgBouncer from 1.22 with `max_prepared_statements` above 0; `false` never does.",
    )
    on_delete: Literal["keep", "erase"] = _env(
        "ARCHIVER_ON_DELETE",
        "keep",
        "What happens to a turn that `chat.deleted` names: `keep` its content under a tombstone, or `erase` it.",
    )
    erase_after: int = _env(
        "ARCHIVER_ERASE_AFTER",
        0,
        "Seconds after the deletion of a turn at which `ARCHIVER_ON_DELETE=erase` erases it.",
        ge=0,
        le=3_660 * 86_400,
    )
    retention_days: int = _env(
        "ARCHIVER_RETENTION_DAYS",
        0,
        "Days after a session's last event at which its content is erased; 0: never.",
        ge=0,
        le=MAX_DAYS,
    )
    retention_by_assistant: str = _env(
        "ARCHIVER_RETENTION_BY_ASSISTANT",
        "",
        "Other periods for some assistants, in days, such as `as_1=30,as_2=365`; the longest applies if "
        "several took part.",
    )
    retention_metadata_days: int = _env(
        "ARCHIVER_RETENTION_METADATA_DAYS",
        0,
        "Days after the last event of an erased session at which the rest of it is deleted, once sealed; 0: never.",
        ge=0,
        le=MAX_DAYS,
    )
    changes_days: int = _env(
        "ARCHIVER_CHANGES_DAYS",
        30,
        "Days for which the change feed, `analytics.changes`, keeps changes; 0: forever.",
        ge=0,
        le=MAX_DAYS,
    )
    search: Literal["on", "off"] = _env(
        "ARCHIVER_SEARCH",
        "on",
        "`on`: workers index the messages for `analytics.search`; `off`: they delete the index, once no worker with "
        "`on` has run for a minute.",
    )
    search_language: str = _env(
        "ARCHIVER_SEARCH_LANGUAGE",
        "simple",
        "Text search configuration of Postgres, such as `english`; `simple` finds words as written. An index "
        "keeps its language until `ARCHIVER_SEARCH=off` deletes it.",
    )
    followups_rate: float = _env(
        "ARCHIVER_FOLLOWUPS_RATE",
        200,
        "Maximum follow-ups that one worker sends per second, over all subscriptions; 0: no limit.",
        ge=0,
        allow_inf_nan=False,
    )
    followups_days: int = _env(
        "ARCHIVER_FOLLOWUPS_DAYS",
        14,
        "Days for which finished deliveries of follow-ups and their attempts are kept.",
        gt=0,
        le=MAX_DAYS,
    )
    followups_allow_private: bool = _env(
        "ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE",
        False,
        "Allow follow-ups to loopback and private addresses, and plain `http` to these.",
    )
    analytics_variables: str = _env(
        "ARCHIVER_ANALYTICS_VARIABLES",
        "",
        "Variables of turns that become columns of `analytics.sessions`, and of `analytics.variable_rollups`, such "
        "as `customerTier,seats:number`; `archiver migrate` adds and removes them. "
        "Types: `text` (default), `number`, `boolean`, `time`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _env(
        "ARCHIVER_LOG_LEVEL",
        "info",
        "Lowest level of log lines that are written: `debug`, `info`, `warning` or `error`.",
    )
    log_format: Literal["auto", "json", "text"] = _env(
        "ARCHIVER_LOG_FORMAT", "auto", "`json`, `text`, or `auto`: text on a terminal, JSON elsewhere."
    )

    @field_validator("secret_header", "hmac_header", "hmac_timestamp_header", "hmac_id_header")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.strip().lower()

    @field_validator("secret_header", "hmac_header")
    @classmethod
    def _is_named(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("secret_header", "hmac_header", "hmac_timestamp_header", "hmac_id_header")
    @classmethod
    def _is_header_name(cls, value: str) -> str:
        """Accept a token of RFC 9110, 5.6.2, the only form of a header name."""
        if value and not _TOKEN.fullmatch(value):
            raise ValueError("must be the name of a header: letters, digits and hyphens, such as x-signature")
        if value in _FRAMING:
            raise ValueError("must not be a header that HTTP itself uses, such as content-length")
        return value

    @field_validator("hmac_prefix", "hmac_timestamp_prefix")
    @classmethod
    def _may_begin_a_header(cls, value: str) -> str:
        if value and (not value.isascii() or not value.isprintable() or value.startswith(" ")):
            raise ValueError("must contain only printable ASCII characters, and not start with a space")
        return value

    @field_validator("callhq_api_key", "api_token")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value().strip()
        if not text.isascii() or not text.isprintable():
            raise ValueError("must be printable ASCII, on one line")
        return value

    @field_validator("api_token")
    @classmethod
    def _is_one_word(cls, value: SecretStr) -> SecretStr:
        if " " in value.get_secret_value().strip():
            raise ValueError("must not contain a space: a bearer token is one word")
        return value

    @model_validator(mode="after")
    def _secrets_fit_a_header(self) -> "Settings":
        if self.webhook_scheme in {"secret", "bearer"}:
            for number, secret in enumerate(self.secrets, start=1):
                if any(ord(each) < 32 or ord(each) == 127 for each in secret):  # noqa: PLR2004  # ASCII's controls
                    raise ValueError(
                        f"ARCHIVER_WEBHOOK_SECRETS: secret {number} contains a line break or a control character,"
                        " which a header cannot contain; separate secrets with commas"
                    )
        return self

    @field_validator(
        "webhook_scheme",
        "hmac_algorithm",
        "hmac_encoding",
        "log_level",
        "log_format",
        "console",
        "console_acts",
        "spool",
        "on_delete",
        "search",
        mode="before",
    )
    @classmethod
    def _in_lower_case(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("oidc_issuer")
    @classmethod
    def _is_issuer(cls, value: str) -> str:
        value = value.strip()
        is_local = value.startswith("http://") and urlsplit(value).hostname in _LOOPBACK
        if value and not ((value.startswith("https://") or is_local) and _has_host(value)):
            raise ValueError("must be like https://login.example.com, with TLS unless it is on this machine")
        return value

    @field_validator("oidc_client_secret")
    @classmethod
    def _may_be_sent(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().isascii() or not (value.get_secret_value() or " ").isprintable():
            raise ValueError("must be printable ASCII, on one line")
        return value

    @field_validator("oidc_roles")
    @classmethod
    def _are_roles(cls, value: str) -> str:
        console_roles.parse(value)
        return value

    @model_validator(mode="after")
    def _has_whole_provider(self) -> "Settings":
        needed = {
            "ARCHIVER_OIDC_ISSUER": self.oidc_issuer,
            "ARCHIVER_OIDC_CLIENT_ID": self.oidc_client_id,
            "ARCHIVER_OIDC_ROLES": self.roles_of_groups,
        }
        absent = [name for name, value in needed.items() if not value]
        if absent and (len(absent) < len(needed) or self.oidc_client_secret.get_secret_value()):
            raise ValueError(f"{', '.join(needed)} belong together; not set: {', '.join(absent)}")
        return self

    @field_validator("callhq_api_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        value = value.strip()
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        if not _has_host(value):
            raise ValueError("must be like https://api.callhq.ai/api")
        return value.rstrip("/")

    @field_validator("home", mode="before")
    @classmethod
    def _is_somewhere(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("set, but empty: unset it to use .archiver in the working directory")
        return value

    @field_validator("home")
    @classmethod
    def _may_be_a_folder(cls, value: Path) -> Path:
        whole = value.absolute()
        for place in (whole, *whole.parents):
            if os.path.isfile(place):  # noqa: PTH113  # `Path.is_file` raises if a folder denies access
                raise ValueError(f"{place} is a file; name a folder")
        return value

    @field_validator("database_url", "read_database_url")
    @classmethod
    def _is_not_blank(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        # An empty variable was probably meant to name a database.
        if value is not None and not value.get_secret_value().strip():
            otherwise = "the embedded Postgres" if info.field_name == "database_url" else "that of DATABASE_URL"
            raise ValueError(f"set, but empty: unset it to use {otherwise}")
        return value

    @field_validator("retention_by_assistant")
    @classmethod
    def _is_days_by_assistant(cls, value: str) -> str:
        _days_by_assistant(value)
        return value

    @field_validator("analytics_variables")
    @classmethod
    def _are_columns(cls, value: str) -> str:
        variables.parse(value)
        return value

    @model_validator(mode="after")
    def _keeps_metadata_longest(self) -> "Settings":
        days = self.retention_metadata_days
        content = [self.retention_days, *self.retention_of_assistants.values()]
        if days and (not self.retention_days or max(content) > days):
            raise ValueError(
                "ARCHIVER_RETENTION_METADATA_DAYS: must be 0, or at least ARCHIVER_RETENTION_DAYS (0 there: never)"
                " and each value of ARCHIVER_RETENTION_BY_ASSISTANT"
            )
        return self

    @property
    def retention_of_assistants(self) -> dict[str, int]:
        """Return the days for which content is kept, by assistant id, for assistants with a different period."""
        return _days_by_assistant(self.retention_by_assistant)

    @property
    def roles_of_groups(self) -> tuple[tuple[str, Role], ...]:
        """Return the groups of the identity provider, each with its role, in the order of the setting."""
        return console_roles.parse(self.oidc_roles)

    @property
    def promoted_variables(self) -> tuple[Variable, ...]:
        """Return the variables that become columns of `analytics.sessions`, in the order of the setting."""
        return variables.parse(self.analytics_variables)

    @property
    def expires(self) -> bool:
        """Return whether any content expires."""
        return bool(self.retention_days or any(self.retention_of_assistants.values()))

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return the webhook secrets without empty ones."""
        parts = self.webhook_secrets.get_secret_value().split(",")
        return tuple(part.strip() for part in parts if part.strip())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the environment and the files that it names."""
        del dotenv_settings, file_secret_settings
        return init_settings, FileSource(settings_cls), env_settings


_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
# Headers of connection, framing and routing (RFC 9110, 7.2 to 7.8; RFC 9112, 6), which clients and proxies set.
_FRAMING = frozenset(
    ("connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade")
)


def _has_host(url: str) -> bool:
    """Return whether a URL has a host, no invalid port or character, and neither query nor fragment."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    has_gaps = any(each.isspace() or not each.isprintable() for each in url)
    return bool(parts.hostname) and has_port and not has_gaps and not parts.query and not parts.fragment


def _days_by_assistant(value: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for part in filter(None, (each.strip() for each in value.split(","))):
        assistant_id, _, days = part.rpartition("=")
        if not assistant_id.strip() or not days.strip().isdecimal() or int(days) > MAX_DAYS:
            raise ValueError("write ASSISTANT=DAYS, separated by commas, such as as_1=30,as_2=365")
        if assistant_id.strip() in values:
            raise ValueError("names an assistant twice: keep one entry")
        values[assistant_id.strip()] = int(days)
    return values
