"""Signatures as other vendors make them, each made or checked by the vendor's own library where there is one.

GitHub and Shopify have none for Python: `gidgethub` and the worked example of GitHub's documents stand for the one,
`openssl` for the other.
"""

import base64
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gidgethub.sansio
import pytest
import time_machine
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from slack_sdk.signature import Clock, SignatureVerifier
from standardwebhooks import Webhook as StandardWebhook
from stripe import SignatureVerificationError, WebhookSignature
from svix.webhooks import Webhook as SvixWebhook
from svix.webhooks import WebhookVerificationError

from archiver.inbound.signatures import PRESETS, Verifier, key_id
from archiver.settings import SettingsError
from tests.support import edwards
from tests.support.signatures import BASE64S, BODY, NOW, TEXTS, asgi, ask, refusal, signed, verifier_of

AT = datetime.fromtimestamp(NOW, UTC)
SECRETS = {preset: BASE64S if preset == "svix" else TEXTS for preset in (*PRESETS, "svix")}


class At(Clock):
    """The instant at which everything here is signed."""

    def now(self) -> float:
        return NOW


def github(secret: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        gidgethub.sansio.validate_event(body, signature=headers["X-Hub-Signature-256".lower()], secret=secret)
    except gidgethub.ValidationFailure:
        return False
    return True


def stripe(secret: str, headers: dict[str, str], body: bytes) -> bool:
    with time_machine.travel(AT, tick=False):
        try:
            return bool(WebhookSignature.verify_header(body.decode(), headers["stripe-signature"], secret, 300))
        except SignatureVerificationError:
            return False


def slack(secret: str, headers: dict[str, str], body: bytes) -> bool:
    return SignatureVerifier(secret, At()).is_valid_request(body, headers)


def shopify(secret: str, headers: dict[str, str], body: bytes) -> bool:
    command = ["openssl", "dgst", "-sha256", "-mac", "hmac", "-macopt", f"hexkey:{secret.encode().hex()}", "-binary"]
    digest = subprocess.run(
        [shutil.which("openssl") or "openssl", *command[1:]], input=body, capture_output=True, check=True
    )
    return headers["x-shopify-hmac-sha256"] == base64.b64encode(digest.stdout).decode()


def svix(secret: str, headers: dict[str, str], body: bytes) -> bool:
    with time_machine.travel(AT, tick=False):
        try:
            SvixWebhook(secret).verify(body, headers)
        except WebhookVerificationError:
            return False
    return True


VENDORS: dict[str, Callable[[str, dict[str, str], bytes], bool]] = {
    "github": github,
    "stripe": stripe,
    "slack": slack,
    "shopify": shopify,
    "svix": svix,
}
bodies = st.text(max_size=60).map(str.encode)


@pytest.mark.parametrize("preset", VENDORS)
@settings(max_examples=25, deadline=None)
@given(body=bodies)
def test_what_we_sign_is_what_the_vendor_signs(preset: str, body: bytes) -> None:
    check = verifier_of(preset, SECRETS[preset])
    headers = signed(check, body)
    assert VENDORS[preset](SECRETS[preset][0], headers, body)
    assert not VENDORS[preset](SECRETS[preset][1], headers, body)
    assert not VENDORS[preset](SECRETS[preset][0], headers, body + b"x")
    assert ask(check, headers, body) == key_id(SECRETS[preset][0])


@pytest.mark.parametrize("preset", VENDORS)
@settings(max_examples=100, deadline=None)
@given(body=st.binary(min_size=1), data=st.data())
def test_i2_a_changed_body_is_refused(preset: str, body: bytes, data: st.DataObject) -> None:
    check = verifier_of(preset, SECRETS[preset])
    headers = asgi(signed(check, body))
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    changed = bytearray(body)
    changed[bit // 8] ^= 1 << bit % 8
    assert refusal(check, headers, bytes(changed)) == "bad_signature"
    assert refusal(verifier_of(preset, ("b" * 32,)), headers, body) == "bad_signature"


# --- What the vendor signs, as its own library or documents make it


def test_the_example_of_githubs_documents_is_accepted() -> None:
    check = verifier_of("github", ("It's a Secret to Everybody",))
    headers = {"x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"}
    assert ask(check, headers, b"Hello, World!") == key_id("It's a Secret to Everybody")
    assert refusal(check, asgi(headers), b"Hello, World?") == "bad_signature"
    sha1 = {"x-hub-signature": "sha1=" + "0" * 40}
    assert refusal(check, asgi(sha1), b"Hello, World!") == "missing_header"


def test_the_example_of_slacks_documents_is_accepted() -> None:
    secret = "8f742231b10e8888abcd99yyyzzz85a5"
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name="
        b"foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url="
        b"https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    headers = {
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    }
    check = verifier_of("slack", (secret,))
    assert ask(check, headers, body, now=1_531_420_618) == key_id(secret)
    assert refusal(check, asgi(headers), body, now=1_531_420_618 + 301) == "stale_timestamp"


def test_stripes_header_is_accepted_with_several_signatures_and_versions() -> None:
    secret, rotated, body = "whsec_old", "whsec_new", '{"id": "evt_1"}'
    with time_machine.travel(AT, tick=False):
        made = WebhookSignature.generate_signature_header(body, secret)
    time, signature = made.split(",")
    other = signed(verifier_of("stripe", (rotated,)), body.encode())["stripe-signature"].split(",")[1]
    check = verifier_of("stripe", (secret,))
    for header in (
        made,
        f"{time},{other},{signature}",
        f"{time},{signature},{other}",
        f"{time},v0={'0' * 64},{signature}",
        f"{signature},{time}",
        f"{time}, {other}, {signature}",
    ):
        assert ask(check, {"stripe-signature": header}, body.encode()) == key_id(secret)
    assert ask(verifier_of("stripe", (rotated, secret)), {"stripe-signature": made}, body.encode()) == key_id(secret)
    for header, reason in (
        (f"{time},{other}", "bad_signature"),
        (f"t={int(NOW) + 1},{signature}", "bad_signature"),
        (f"t={int(NOW) - 301},{signature}", "stale_timestamp"),
        (f"t={int(NOW) * 1000},{signature}", "stale_timestamp"),
        (f"{time},{time},{signature}", "malformed_header"),
        (f"t={int(NOW)},t=1,{signature}", "malformed_header"),
        (signature, "malformed_header"),
        (time, "malformed_header"),
        (f"{time},v0={signature[3:]}", "malformed_header"),
        (f"{time},xv1={signature[3:]}", "malformed_header"),
        (f"t=,{signature}", "malformed_header"),
        (f"t=x,{signature}", "malformed_timestamp"),
    ):
        assert refusal(check, asgi({"stripe-signature": header}), body.encode()) == reason


def test_a_header_like_stripes_can_be_configured() -> None:
    options = {
        "header": "x-sig",
        "prefix": "s=",
        "timestamp_header": "x-sig",
        "timestamp_prefix": "at=",
        "encoding": "base64",
    }
    check = verifier_of("hmac", TEXTS, **options)
    headers = signed(check)
    assert headers.keys() == {"x-sig"}
    assert headers["x-sig"].startswith(f"at={int(NOW)},s=")
    assert ask(check, headers) == key_id(TEXTS[0])


@pytest.mark.parametrize("prefix", ["", "sha256=", "v0=", "v1,", "HMAC "])
@pytest.mark.parametrize("separator", [",", " ", ", "])
@pytest.mark.parametrize("encoding", ["hex", "base64"])
def test_one_of_several_signatures_in_a_header_is_enough(prefix: str, separator: str, encoding: str) -> None:
    options: dict[str, Any] = {"template": "{body}", "prefix": prefix, "encoding": encoding}
    new, old = (signed(verifier_of("hmac", (secret,), **options))["x-signature"] for secret in TEXTS[:2])
    stray = f"{prefix}{'A' * 7}"
    check = verifier_of("hmac", TEXTS[1:2], **options)
    for values in ([old], [new, old], [old, new], [stray, new, old], [new, stray, old]):
        assert ask(check, {"x-signature": separator.join(values)}) == key_id(TEXTS[1])
    assert refusal(check, asgi({"x-signature": separator.join([new, new])})) == "bad_signature"
    assert refusal(check, asgi({"x-signature": separator.join([stray, stray])})) == "malformed_header"
    assert refusal(check, asgi({"x-signature": separator.join([old] * 200)})) == "malformed_header"


def test_svix_headers_are_accepted_as_the_library_makes_them() -> None:
    text = BODY.decode()
    made = SvixWebhook(BASE64S[0]).sign("msg_1", AT, text)
    headers = {"svix-id": "msg_1", "svix-timestamp": str(int(NOW)), "svix-signature": f"v1,{'A' * 43}= {made}"}
    check = verifier_of("svix", BASE64S)
    assert ask(check, headers) == key_id(BASE64S[0])
    assert ask(check, {name.replace("svix-", "webhook-"): value for name, value in headers.items()}) == key_id(
        BASE64S[0]
    )
    assert signed(check).keys() == headers.keys()
    late = headers | {"svix-timestamp": str(int(NOW * 1000))}
    assert refusal(check, asgi(late)) == "stale_timestamp"


# --- Standard Webhooks


def test_a_time_in_milliseconds_is_stale_under_standard_as_in_the_reference_library() -> None:
    at = str(int(NOW * 1000))
    signature = StandardWebhook(BASE64S[0]).sign("msg_1", datetime.fromtimestamp(NOW, UTC), BODY.decode())
    headers = {"webhook-id": "msg_1", "webhook-timestamp": at, "webhook-signature": signature}
    assert refusal(verifier_of("standard", BASE64S), asgi(headers)) == "stale_timestamp"
    check = verifier_of("hmac", TEXTS)
    assert ask(check, signed(check, now=NOW * 1000)) == key_id(TEXTS[0])


@dataclass(frozen=True)
class Pair:
    """An Ed25519 key of the platform, and its public half as it is given to receivers."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> str:
        raw = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return "whpk_" + base64.b64encode(raw).decode()

    def headers(self, body: bytes = BODY, at: int = int(NOW), message_id: str = "msg_1") -> dict[str, str]:
        signature = self.key.sign(f"{message_id}.{at}.".encode() + body)
        text = "v1a," + base64.b64encode(signature).decode()
        return {"webhook-id": message_id, "webhook-timestamp": str(at), "webhook-signature": text}


PAIR, OTHER = (Pair(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))


@pytest.fixture
def check() -> Verifier:
    return verifier_of("standard", (PAIR.public, BASE64S[0]))


def test_the_key_of_rfc_8032_is_read() -> None:
    """Section 7.1, test 2: what is signed there is no webhook, but the key is a key."""
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    pair = Pair(Ed25519PrivateKey.from_private_bytes(secret))
    assert pair.public == "whpk_" + base64.b64encode(bytes.fromhex(public)).decode()
    assert ask(verifier_of("standard", (pair.public,)), pair.headers()) == key_id(pair.public)


@given(st.binary())
def test_an_asymmetric_signature_is_accepted_over_these_bytes_alone(body: bytes) -> None:
    check = verifier_of("standard", (OTHER.public, PAIR.public.rstrip("=")))
    headers = PAIR.headers(body)
    assert ask(check, headers, body) == key_id(PAIR.public.rstrip("="))
    assert refusal(check, asgi(headers), body + b"x") == "bad_signature"


def test_symmetric_and_asymmetric_signatures_stand_side_by_side(check: Verifier) -> None:
    asymmetric, symmetric = PAIR.headers(), signed(verifier_of("standard", BASE64S[:1]))
    foreign = OTHER.headers()["webhook-signature"]
    for words, name in (
        ([asymmetric["webhook-signature"]], PAIR.public),
        ([foreign, asymmetric["webhook-signature"]], PAIR.public),
        ([symmetric["webhook-signature"]], BASE64S[0]),
        ([foreign, symmetric["webhook-signature"]], BASE64S[0]),
        (["v2,x", "v1a,", "v1,", asymmetric["webhook-signature"]], PAIR.public),
    ):
        assert ask(check, asymmetric | {"webhook-signature": " ".join(words)}) == key_id(name)


def test_a_delivery_that_only_looks_asymmetric_is_refused(check: Verifier) -> None:
    headers = PAIR.headers()
    signature = headers["webhook-signature"].removeprefix("v1a,")
    changed = ("B" if signature[0] == "A" else "A") + signature[1:]
    for value, reason in (
        (f"v1a,{changed}", "bad_signature"),
        (OTHER.headers()["webhook-signature"], "bad_signature"),
        (f"v1,{signature}", "malformed_header"),
        (f"v1a,{signature[:-4]}", "malformed_header"),
        (f"v1a,{signature[:-3]}{chr(ord(signature[-3]) + 1)}==", "malformed_header"),  # other spare bits, same bytes
        (f"v1a,{signature[:10]}!{signature[11:]}", "malformed_header"),
        (f"v1b,{signature}", "malformed_header"),
        (f"v1a{signature}", "malformed_header"),
    ):
        assert refusal(check, asgi(headers | {"webhook-signature": value})) == reason, value
    for name, value in (("webhook-id", "msg_2"), ("webhook-timestamp", str(int(NOW) + 1))):
        assert refusal(check, asgi(headers | {name: value})) == "bad_signature"
    assert refusal(check, asgi(PAIR.headers(at=int(NOW) - 301))) == "stale_timestamp"
    assert refusal(verifier_of("standard", BASE64S), asgi(headers)) == "malformed_header"


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("whpk_", "is empty"),
        ("whpk_AAAA", "is not an Ed25519 public key"),
        ("whpk_" + base64.b64encode(bytes(33)).decode(), "is not an Ed25519 public key"),
        ("whpk_!", "is not base64"),
        ("whsk_" + base64.b64encode(bytes(64)).decode(), "Use the matching public key"),
    ],
)
@pytest.mark.parametrize("scheme", ["standard", "svix"])
def test_a_key_that_is_none_is_an_error_that_does_not_quote_it(scheme: str, secret: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as error:
        verifier_of(scheme, (secret,))
    assert secret[5:] == "" or secret[5:] not in str(error.value)


def public(raw: bytes) -> str:
    return "whpk_" + base64.b64encode(raw).decode()


def written(signature: bytes) -> str:
    return base64.b64encode(signature).decode()


SEEDS = [bytes([number]) * 32 for number in range(3, 7)]
BODIES = [b"", b"{}", BODY, '{"text": "héllo 🙂"}'.encode(), b"\x00\xff\xfe not text", b"x" * 10_000]


@pytest.mark.parametrize("body", BODIES, ids=len)
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed[0])
@pytest.mark.parametrize("family", ["webhook", "svix"])
def test_signatures_of_an_independent_implementation_are_accepted(family: str, seed: bytes, body: bytes) -> None:
    at, message_id = str(int(NOW)), "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W"
    signature = edwards.sign(seed, f"{message_id}.{at}.".encode() + body)
    key = public(edwards.public_key(seed))
    headers = {
        f"{family}-id": message_id,
        f"{family}-timestamp": at,
        f"{family}-signature": f"v1a,{written(signature)}",
    }
    assert ask(verifier_of("standard", (BASE64S[0], key)), headers, body) == key_id(key)
    assert refusal(verifier_of("standard", (PAIR.public,)), asgi(headers), body) == "bad_signature"
    assert refusal(verifier_of("standard", (key,)), asgi(headers), body + b" ") == "bad_signature"
    halves = signature[:32], int.from_bytes(signature[32:], "little")
    more = halves[0] + (halves[1] + edwards.L).to_bytes(32, "little")  # the same modulo the order (RFC 8032, 5.1.7)
    headers[f"{family}-signature"] = f"v1a,{written(more)}"
    assert refusal(verifier_of("standard", (key,)), asgi(headers), body) == "bad_signature"


def low_order_keys() -> list[bytes]:
    """Each encoding of each point of low order, those that are not canonical included."""
    values = {
        (y | sign << 255).to_bytes(32, "little")
        for point in edwards.low_order()
        for y in (point[1], point[1] + edwards.P)
        if y < 2**255
        for sign in (0, 1)
    }
    return sorted(values)


@pytest.mark.parametrize("raw", low_order_keys(), ids=bytes.hex)
def test_a_key_of_low_order_under_which_anybody_can_sign_is_refused(raw: bytes) -> None:
    for secrets in ((public(raw),), (BASE64S[0], public(raw))):
        with pytest.raises(SettingsError, match="low-order"):
            verifier_of("standard", secrets)


def test_a_signature_of_points_of_low_order_proves_nothing() -> None:
    check = verifier_of("standard", (PAIR.public,))
    for point in low_order_keys():
        for scalar in (bytes(32), edwards.L.to_bytes(32, "little")):
            headers = PAIR.headers() | {"webhook-signature": f"v1a,{written(point + scalar)}"}
            assert refusal(check, asgi(headers)) == "bad_signature"


GOOD = PAIR.headers()["webhook-signature"]
SYMMETRIC = signed(verifier_of("standard", BASE64S[:1]))["webhook-signature"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        *[
            ({"webhook-timestamp": at}, "malformed_timestamp")
            for at in ("-1", "+1", "1.5", "1e9", " 1", "abc", "0x5")
        ],
        *[({"webhook-timestamp": at}, "malformed_timestamp") for at in ("1" * 16, "9" * 400, "1614265330.")],
        *[({"webhook-timestamp": at}, "stale_timestamp") for at in ("0", str(int(NOW * 1000)), "9" * 15)],
        ({"webhook-timestamp": ""}, "missing_header"),
        ({"webhook-id": ""}, "missing_header"),
        ({"webhook-id": "msg.1"}, "malformed_header"),
        ({"webhook-signature": ""}, "missing_header"),
        ({"webhook-signature": " "}, "malformed_header"),
        *[
            ({"webhook-signature": GOOD.replace("v1a", version)}, "malformed_header")
            for version in ("v1", "V1A", "v2a")
        ],
        ({"webhook-signature": GOOD.replace("v1a,", "v1a, ")}, "malformed_header"),
        ({"webhook-signature": GOOD.replace(",", ";")}, "malformed_header"),
        ({"webhook-signature": GOOD.removeprefix("v1a,")}, "malformed_header"),
        ({"webhook-signature": SYMMETRIC.replace("v1,", "v1a,")}, "malformed_header"),
        ({"webhook-signature": f"v1a,{written(bytes(63))}"}, "malformed_header"),
        ({"webhook-signature": f"v1a,{written(bytes(65))}"}, "malformed_header"),
        ({"webhook-signature": f"v1a,{written(bytes(64))}"}, "bad_signature"),
        ({"webhook-signature": f"{SYMMETRIC} v1a,{written(bytes(64))}"}, "bad_signature"),
        ({"webhook-signature": " ".join([f"v1a,{written(bytes(64))}"] * 16 + [GOOD])}, "bad_signature"),
    ],
)
def test_what_the_specification_does_not_allow_is_refused(changed: dict[str, str], reason: str) -> None:
    assert refusal(verifier_of("standard", (PAIR.public,)), asgi(PAIR.headers() | changed)) == reason


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (f"{SYMMETRIC} {GOOD}", PAIR.public),
        (f"{GOOD} {SYMMETRIC}", PAIR.public),
        (f"v1a,{written(bytes(64))} {GOOD}", PAIR.public),
        (f"  v3,x {GOOD}  v1,", PAIR.public),
        (GOOD.rstrip("="), PAIR.public),
    ],
)
def test_one_good_signature_among_several_is_enough(words: str, name: str) -> None:
    headers = PAIR.headers() | {"webhook-signature": words}
    assert ask(verifier_of("standard", (PAIR.public,)), headers) == key_id(name)
    assert ask(verifier_of("svix", (OTHER.public, PAIR.public)), headers) == key_id(name)


def test_a_public_key_signs_nothing() -> None:
    with pytest.raises(SettingsError, match="Signing needs a secret"):
        signed(verifier_of("standard", (PAIR.public,)))


def test_the_settings_page_has_each_preset_with_its_header() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8").lower()
    assert set(PRESETS) | {"svix"} == set(VENDORS)
    for preset, options in PRESETS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{preset}` |")]
        assert options["hmac_header"] in row
        assert f"`{options['hmac_template']}`" in row
        assert f"`{options['hmac_prefix']}`" in row or not options["hmac_prefix"]
