"""Errors of settings name the variable that the operator set, and say what to do."""

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
from archiver.database import database_url
from archiver.history.callhq.connections import connection_pool

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


def test_a_file_may_begin_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert seal_key(monkeypatch, tmp_path / "key", b"\xef\xbb\xbf" + PLAIN) is not None
    (tmp_path / "api-key").write_bytes(b"\xef\xbb\xbfkey-123\r\n")
    monkeypatch.setenv("CALLHQ_API_KEY_FILE", str(tmp_path / "api-key"))
    assert settings.read().callhq_api_key.get_secret_value() == "key-123"


def test_a_key_log_that_cannot_be_written_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs")
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/x")
    with pytest.raises(settings.SettingsError, match="To fix it, check SSLKEYLOGFILE in the environment"):
        connection_pool(1)


def test_statement_pooling_names_the_setting_of_pgbouncer() -> None:
    refusal = "transaction blocks not allowed in statement pooling mode"
    assert failures.explain_refusal(refusal) == (
        f"The database refused: {refusal}\n"
        "Set pool_mode = transaction (or session) in the configuration of PgBouncer."
    )
