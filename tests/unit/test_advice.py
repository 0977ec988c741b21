"""Errors of settings name the variable that the operator set, and say what to do."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from archiver import settings
from archiver.cli import failures
from archiver.compliance.seals import signing_key
from archiver.database import database_url, libpq_variables
from archiver.history.callhq.connections import connection_pool
from archiver.outbound.followups import guard

KEY = Ed25519PrivateKey.generate()
PLAIN = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
ENCRYPTED = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))


def seal_key(monkeypatch: pytest.MonkeyPatch, file: Path, content: bytes) -> Ed25519PrivateKey | None:
    file.write_bytes(content)
    monkeypatch.setenv("ARCHIVER_SEAL_KEY_FILE", str(file))
    return signing_key(settings.read())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "ARCHIVER_SEAL_KEY_FILE: not an Ed25519 private key in PEM"),
        (ENCRYPTED, "ARCHIVER_SEAL_KEY_FILE: the key is encrypted; keys with a password are not supported"),
    ],
)
def test_an_invalid_seal_key_names_the_setting_of_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(settings.SettingsError, match=message):
        seal_key(monkeypatch, tmp_path / "key", content)


def test_an_invalid_database_url_names_the_setting_of_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text("nonsense")
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(settings.SettingsError, match="DATABASE_URL_FILE: not a URL"):
        database_url("nonsense")


@pytest.mark.parametrize(
    ("option", "advice"), [("sslmod", "did you mean sslmode?"), ("_", "see the parameter key words")]
)
def test_an_unknown_connection_option_is_named(option: str, advice: str) -> None:
    with pytest.raises(settings.SettingsError) as error:
        database_url(f"postgresql://user:secret@host/name?{option}=require")
    assert str(error.value).startswith(f"DATABASE_URL: Postgres has no connection option '{option}'; {advice}")


def test_a_file_may_begin_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert seal_key(monkeypatch, tmp_path / "key", b"\xef\xbb\xbf" + PLAIN) is not None
    (tmp_path / "api-key").write_bytes(b"\xef\xbb\xbfkey-123\r\n")
    monkeypatch.setenv("CALLHQ_API_KEY_FILE", str(tmp_path / "api-key"))
    assert settings.read().callhq_api_key.get_secret_value() == "key-123"


def test_a_key_log_that_cannot_be_written_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/x")
    with pytest.raises(settings.SettingsError, match="To fix it, check SSLKEYLOGFILE in the environment"):
        connection_pool(1)


def test_statement_pooling_names_the_setting_of_pgbouncer() -> None:
    refusal = "transaction blocks not allowed in statement pooling mode"
    assert failures.explain_refusal(refusal) == (
        f"the database refused: {refusal}\n"
        "Set pool_mode = transaction (or session) in the configuration of PgBouncer."
    )


URL = "postgresql://someone:secret@db.example/callhq?sslmode=require"


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PGOPTIONS": "-c nonsense=1"}, ["PGOPTIONS"]),
        ({"PGSERVICE": "nowhere", "PGSERVICEFILE": "/nowhere"}, ["PGSERVICE", "PGSERVICEFILE"]),
        ({"PGSSLROOTCERT": "/nowhere", "PGTZ": "Nowhere"}, ["PGSSLROOTCERT", "PGTZ"]),
        ({"PGHOSTADDR": "192.0.2.1", "PGTARGETSESSIONATTRS": "any"}, ["PGHOSTADDR", "PGTARGETSESSIONATTRS"]),
        # The URL or the archiver gives these.
        ({"PGSSLMODE": "disable", "PGUSER": "another", "PGHOST": "elsewhere", "PGAPPNAME": "x"}, []),
        ({"PGOPTIONS": ""}, []),
    ],
)
def test_variables_of_libpq_that_apply_beside_the_url_are_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: list[str]
) -> None:
    for name in [each for each in os.environ if each.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", URL)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert libpq_variables(database_url(URL)) == named
    places = f"DATABASE_URL and in the environment {', '.join(named)}" if named else "DATABASE_URL"
    assert failures.explain_refusal("no") == (
        f"the database refused: no\nCheck {places}, then run `archiver doctor`."
    )


def test_a_key_log_that_keeps_follow_ups_from_being_sent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/x")
    with pytest.raises(
        settings.SettingsError, match=r"cannot be verified: .* check SSLKEYLOGFILE in the environment"
    ):
        guard.ssl_context()
