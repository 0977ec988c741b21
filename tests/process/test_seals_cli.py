"""`archiver seal`, `verify`, `prove` and `seals` as commands, and the worker that seals."""

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.conftest import Cluster
from tests.support import servers
from tests.support.payloads import created
from tests.support.receivers import archiver, serving
from tests.support.waiting import until

SCRIPT = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "seals.md").read_text(), re.DOTALL)[
    0
]


on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)


@pytest.fixture
def url(database_url: str) -> str:
    """An archive of three events."""
    with serving(database_url) as receiver:
        for name in "abc":
            assert receiver.post(created(name, "s")).json()["status"] == "stored"
    return database_url


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A signing key; its public half beside it as `.pub`."""
    made = Ed25519PrivateKey.generate()
    file = tmp_path / "seal.key"
    file.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    file.with_suffix(".pub").write_bytes(public)
    return file


def forge(url: str, statement: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(statement)


def ok(*arguments: str, url: str, **settings: str) -> str:
    ended = archiver(*arguments, database_url=url, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_sequence_that_was_set_back_is_reported_instead_of_a_seal_without_new_events(
    url: str, tmp_path: Path
) -> None:
    """As after logical replication, which does not copy sequences. The writer, too, notices."""
    ok("seal", url=url)
    with psycopg.connect(url) as connection:
        connection.execute("SELECT setval('archiver.events_id_seq', 1, false)")
    writer = servers.as_writer(url)
    with serving(writer, "--worker", ARCHIVER_SEAL_EVERY="1", ARCHIVER_HOME=str(tmp_path)) as receiver:
        assert receiver.post(created("d", "s")).json()["status"] == "stored"
        until(lambda: "archiver.events_id_seq would assign" in receiver.stderr(), "the worker logs the sequence")
    remedy = "SELECT setval('archiver.events_id_seq', 3);"
    for command in (["seal"], ["doctor"], ["migrate", "--check"]):
        for database_url in (url, writer):
            ended = archiver(*command, database_url=database_url, ARCHIVER_WEBHOOK_SECRETS="x" * 32)
            assert ended.returncode == 1, (command, ended.stdout)
            assert remedy in " ".join((ended.stdout + ended.stderr).split())
    ok("migrate", "--repair", url=url)
    with serving(url) as receiver:
        assert receiver.post(created("e", "s")).json()["status"] == "stored"
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT id FROM archiver.events WHERE chat_id = 'e'").fetchone() == (4,)
    assert "seal 2" in ok("seal", url=url)
    ended = archiver("verify", database_url=url)
    assert ended.returncode == 1
    assert "event 1" in ended.stderr


def test_i9_a_forged_event_is_named_and_exits_1(url: str) -> None:
    assert "seal 1: 4 leaves" in ok("seal", url=url)  # and what settings serve began with
    assert "No new rows since the last seal" in ok("seal", url=url)
    assert "3 events in 1 seal; 0 events not yet sealed." in ok("verify", url=url)
    data = json.loads(ok("verify", "--json", url=url))
    assert (data["ok"], data["events"], data["seals"], data["findings"]) == (True, 3, 1, [])
    forge(url, r"UPDATE archiver.events SET body = '\x7b7d' WHERE chat_id = 'b'")
    ended = archiver("verify", database_url=url)
    assert ended.returncode == 1
    assert "event 2, sealed by 1: its body differs from the received one" in ended.stderr
    data = json.loads(archiver("verify", "--json", database_url=url).stdout)
    assert [(item["table"], item["id"], item["fault"]) for item in data["findings"]] == [
        ("events", 2, "body_changed")
    ]


def proof_of(url: str, event: int) -> dict[str, Any]:
    proof: dict[str, Any] = json.loads(ok("prove", str(event), url=url))
    return proof


def check(proof: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """By the script of the documentation, without anything of ours."""
    return subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT], input=json.dumps(proof), capture_output=True, text=True, check=False
    )


def test_a_proof_is_checked_by_the_script_of_the_documentation(url: str) -> None:
    assert len(SCRIPT.strip().splitlines()) <= 22
    ok("seal", url=url)
    for event, chat_id in enumerate("abc", 1):
        checked = check(proof_of(url, event))
        assert checked.returncode == 0, checked.stderr
        with psycopg.connect(url) as connection:
            salt, body = connection.execute(
                "SELECT salt, body FROM archiver.events WHERE id = %s", [event]
            ).fetchone() or (b"", b"")
        assert f"body_digest {sha256(salt + body).hexdigest()} chat.created webhook s {chat_id}" in (checked.stdout)


@pytest.mark.parametrize("part", ["leaf", "path", "statement", "hash", "index"])
def test_the_script_of_the_documentation_refuses_a_forged_proof(url: str, part: str) -> None:
    ok("seal", url=url)
    proof = proof_of(url, 2)
    forged = {
        "leaf": proof["leaf"][:-1] + ("0" if proof["leaf"][-1] != "0" else "1"),
        "path": proof["path"][::-1],
        "statement": proof["statement"].replace("sealed_at 20", "sealed_at 19"),
        "hash": "0" * 64,
        "index": 0,
    }
    assert check(proof).returncode == 0
    assert check(proof | {part: forged[part]}).returncode != 0


def test_an_event_that_is_not_sealed_has_no_proof(url: str) -> None:
    for event, advice in ((1, "is not sealed yet: run `archiver seal`"), (99, "event 99 does not exist")):
        ended = archiver("prove", str(event), database_url=url)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert advice in ended.stderr


def test_signatures_are_made_and_checked(url: str, key: Path) -> None:
    ok("seal", url=url, ARCHIVER_SEAL_KEY_FILE=str(key))
    assert "signed by" in ok("verify", "--key", str(key.with_suffix(".pub")), url=url)
    assert "not checked: give --key" in ok("verify", url=url)
    assert json.loads(ok("verify", "--json", url=url, ARCHIVER_SEAL_KEY_FILE=str(key)))["signatures_checked"]
    stranger = key.with_name("other.pub")
    stranger.write_bytes(
        Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    ok("verify", "--key", str(stranger), "--key", str(key.with_suffix(".pub")), url=url)
    ended = archiver("verify", "--key", str(stranger), database_url=url)
    assert ended.returncode == 1
    assert "seal 1: it is signed by a key that was not given" in ended.stderr


@on_one_version
def test_unsigned_seals_after_a_signed_one_are_reported_and_can_be_excluded(url: str, key: Path) -> None:
    public = ["--key", str(key.with_suffix(".pub"))]
    ok("seal", url=url, ARCHIVER_SEAL_KEY_FILE=str(key))
    with serving(url) as receiver:
        for name in "de":  # `seal` ran with a key once; who seals otherwise has none
            assert receiver.post(created(name, "s")).json()["status"] == "stored"
            ok("seal", url=url)
        warned = seals_finding(url)
        assert receiver.post(created("f", "s")).json()["status"] == "stored"
    assert (warned["verdict"], warned["detail"]) == (
        "warning",
        "Seals after 1 are unsigned, although earlier ones are signed.",
    )
    assert "ARCHIVER_SEAL_KEY" in warned["advice"]
    for given, unsigned in (((), [2]), (public, [2, 3])):
        data = json.loads(archiver("verify", "--json", *given, database_url=url).stdout)
        assert [(item["id"], item["fault"]) for item in data["findings"]] == [(n, "unsigned") for n in unsigned]
    ok("seal", url=url, ARCHIVER_SEAL_KEY_FILE=str(key))
    assert seals_finding(url)["verdict"] == "ok"
    elsewhere = key.with_name("seals.jsonl")
    elsewhere.write_text(ok("seals", "export", url=url))
    told_of = ok("verify", "--since", "2", *public, "--signed-since", "4", "--against", str(elsewhere), url=url)
    assert "Compared with 4 seals exported earlier." in told_of
    ended = archiver("verify", *public, "--signed-since", "5", database_url=url)
    assert (ended.returncode, "seal 5 does not exist; the newest is 4" in ended.stderr) == (2, True)


def seals_finding(url: str) -> dict[str, str]:
    ended = archiver("doctor", "--json", database_url=url, ARCHIVER_WEBHOOK_SECRETS="hunter2-hunter2-hunter2")
    return next(item for item in json.loads(ended.stdout) if item["check"] == "seals")


def test_a_private_key_is_refused_where_seals_are_checked(key: Path) -> None:
    for command in (["verify"], ["export", "--check", str(key.parent)]):
        ended = archiver(*command, "--key", str(key), database_url="postgresql://127.0.0.1:1/none")
        assert ended.returncode == 2
        texts = " ".join(ended.stderr.split())
        assert "--key: this is a private key" in texts
        assert "openssl pkey -in seal.key -pubout -out seal.pub" in texts


def test_signatures_cannot_be_asked_for_without_a_key(tmp_path: Path) -> None:
    for command in (["verify"], ["export", "--check", str(tmp_path)]):
        ended = archiver(*command, "--signed-since", "1", database_url="postgresql://127.0.0.1:1/none")
        assert ended.returncode == 2
        assert "requires a public key: add --key FILE" in " ".join(ended.stderr.split())


@pytest.mark.parametrize("command", ["seal", "verify", "worker", "serve"])
def test_an_invalid_key_is_reported_at_once(command: str, tmp_path: Path) -> None:
    (tmp_path / "no.key").write_text("hello")
    ended = archiver(
        command,
        database_url="postgresql://127.0.0.1:1/none",
        ARCHIVER_SEAL_KEY_FILE=str(tmp_path / "no.key"),
        ARCHIVER_WEBHOOK_SECRETS="s",
    )
    assert ended.returncode == 1
    assert "ARCHIVER_SEAL_KEY_FILE: not an Ed25519 private key in PEM: create one with openssl" in ended.stderr


def test_exported_seals_pin_the_chain(url: str, tmp_path: Path) -> None:
    ok("seal", url=url)
    elsewhere = tmp_path / "seals.jsonl"
    elsewhere.write_text(ok("seals", "export", url=url))
    assert json.loads(elsewhere.read_text())["hash"] in ok("seals", "list", "--json", url=url)
    assert json.loads(elsewhere.read_text())["hash"] in ok("seals", "list", url=url)
    ok("verify", "--against", str(elsewhere), url=url)
    forge(url, "DELETE FROM archiver.seals")
    ok("verify", url=url)
    ended = archiver("verify", "--against", str(elsewhere), database_url=url)
    assert ended.returncode == 1
    assert "seal 1: its row is missing" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["verify", "--since", "7"], "seal 7 does not exist; there is no seal yet"),
        (["verify", "--against", __file__], "--against: line 1 is not output"),
        (["seals", "export", "--since", "1" + "0" * 20], "is not in the range 0<=x<=9223372036854775807"),
        (["verify", "--key", __file__], "--key: not an Ed25519 public key in PEM: create it with openssl pkey"),
    ],
)
def test_wrong_usage_is_reported(database_url: str, arguments: list[str], advice: str) -> None:
    ended = archiver(*arguments, database_url=database_url)
    assert ended.returncode == 2
    assert advice in " ".join(ended.stderr.split())


HASH = "00" * 32
NO_SEALS = {
    "line 1 is not output": [
        b"\xff\xfe",
        b'{"id": 1, "hash": "\xff"}',
        b"[" * 100_000,
        b'{"id": ' * 100_000,
        b"7",
        *(
            f'{{"id": {number}, "hash": "{HASH}"}}'.encode()
            for number in ("1e400", "1.7", "0", "-1", "true", '"1"', str(2**63), "9" * 5000)
        ),
        b'{"id": 1, "hash": "00"}',
        b'{"id": 1, "hash": "' + b"0g" * 32 + b'"}',
    ],
    "the file contains no seal": [b"", b"\n \n"],
    "line 2 has a different hash for seal 1": [
        f'{{"id": 1, "hash": "{HASH}"}}\n{{"id": 1, "hash": "{HASH[2:]}01"}}'.encode()
    ],
}


@on_one_version
def test_what_holds_no_seals_is_wrong_usage(cluster: Cluster, tmp_path: Path) -> None:
    del cluster  # which says for which version this is
    file = tmp_path / "seals.jsonl"
    for fault, contents in NO_SEALS.items():
        for content in contents:
            file.write_bytes(content)
            for command in (["verify"], ["export", "--check", str(tmp_path)]):
                ended = archiver(*command, "--against", str(file), database_url="postgresql://127.0.0.1:1/none")
                assert ended.returncode == 2, (content[:80], ended.stderr)
                assert f"--against: {fault}" in " ".join(ended.stderr.split()), content[:80]


@on_one_version
def test_the_number_of_compared_exported_seals_is_printed(url: str, tmp_path: Path) -> None:
    ok("seal", url=url)
    elsewhere = tmp_path / "seals.jsonl"
    elsewhere.write_text(ok("seals", "export", url=url))
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO archiver.acts (at, actor, kind, detail) VALUES (now(), 'x', 'y', '{}')")
    ok("seal", url=url)
    assert "Compared" not in ok("verify", "--since", "2", url=url)
    assert "Compared with 1 seal exported earlier." in ok(
        "verify", "--since", "2", "--against", str(elsewhere), url=url
    )
    data = json.loads(ok("verify", "--since", "2", "--against", str(elsewhere), "--json", url=url))
    assert (data["compared"], data["ok"]) == (1, True)
    seal = json.loads(elsewhere.read_text())
    elsewhere.write_text(json.dumps(seal | {"hash": HASH}))
    ended = archiver("verify", "--since", "2", "--against", str(elsewhere), database_url=url)
    assert ended.returncode == 1
    assert "seal 1: it differs from the seal exported earlier under this number" in ended.stderr


def test_the_worker_beside_serve_seals_without_a_key_for_histories(database_url: str) -> None:
    with serving(database_url, "--worker", ARCHIVER_SEAL_EVERY="1") as receiver:
        receiver.post(created())

        def is_sealed() -> bool:
            return bool(json.loads(ok("verify", "--json", url=database_url))["events"])

        until(is_sealed, "the event is sealed")
        until(lambda: '"seal created"' in receiver.stderr(), "and the log says so")
        assert receiver.stop() == 0


@on_one_version
def test_the_worker_finds_a_database_whose_path_has_spaces(tmp_path: Path, cluster: Cluster) -> None:
    del cluster  # which says for which version this is
    home = tmp_path / "my archive"
    with serving(None, "--worker", ARCHIVER_SEAL_EVERY="1", ARCHIVER_HOME=str(home)) as receiver:
        receiver.post(created())
        until(lambda: '"seal created"' in receiver.stderr(), "the event is sealed")
        # What the receiver counts, and what the worker does.
        assert receiver.metric("archiver_batch_events_sum") == 1
        assert receiver.metric('archiver_batch_events_bucket{le="+Inf"}') == 1
        until(lambda: receiver.metric("archiver_sealing_timestamp_seconds") > 0, "the worker's are told with them")


def test_i8_i9_what_was_erased_leaves_the_seals_whole(url: str) -> None:
    ok("seal", url=url)
    ok("erase", "--chat", "b", "--reason", "asked for", "--yes", url=url)
    assert json.loads(ok("verify", "--json", url=url))["ok"]
    ok("erase", "--session", "s", "--reason", "asked for", "--yes", url=url)
    ok("seal", url=url)
    data = json.loads(ok("verify", "--json", url=url))
    assert (data["ok"], data["events"], data["unsealed"]) == (True, 3, 0)
    assert check(proof_of(url, 2)).returncode == 0
