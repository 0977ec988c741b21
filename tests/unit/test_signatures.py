"""Deliveries prove where they come from, or are refused; nothing that a stranger sends makes the check crash."""

import base64
import hmac
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
import time_machine
from hypothesis import assume, example, given
from hypothesis import strategies as st
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from archiver.inbound.signatures import REASONS, Reason, SignatureError, Verifier, key_id, verifier
from archiver.settings import SettingsError
from tests.support.signatures import (
    BASE64S,
    BODY,
    NOW,
    TEXTS,
    URL,
    asgi,
    ask,
    refusal,
    settings_of,
    signed,
    verifier_of,
)

ALL = "{method} {url} {svix-id}.{timestamp}.{body}"


@dataclass(frozen=True)
class Way:
    """A scheme with its options, and three secrets fit for it."""

    scheme: str
    secrets: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def verifier(self, *secrets: str) -> Verifier:
        return verifier_of(self.scheme, secrets or self.secrets, **dict(self.options))


def hmac_way(**options: Any) -> Way:
    secrets = BASE64S if options.get("secret_is_base64") else TEXTS
    return Way("hmac", secrets, tuple({"id_header": "x-id", **options}.items()))


SECRET, BEARER, STANDARD = Way("secret", TEXTS), Way("bearer", TEXTS), Way("standard", BASE64S)
SIGNED = [STANDARD] + [
    hmac_way(algorithm=algorithm, encoding=encoding, template=template, prefix=prefix, secret_is_base64=is_base64)
    for algorithm in ("sha256", "sha512", "sha1")
    for encoding in ("hex", "base64")
    for template in ("{body}", "{timestamp}.{body}", ALL)
    for prefix in ("", "sha256=")
    for is_base64 in (False, True)
]
PROVEN = [SECRET, BEARER, *SIGNED]
ways, signed_ways = st.sampled_from(PROVEN), st.sampled_from(SIGNED)


def signs_time(way: Way) -> bool:
    return way.scheme == "standard" or "{timestamp}" in dict(way.options).get("template", "")


TIMED = st.sampled_from([way for way in SIGNED if signs_time(way)])


# --- What the platform signs is accepted, and nothing near it


@given(ways, st.binary())
def test_i2_any_signed_body_is_accepted_and_names_its_secret(way: Way, body: bytes) -> None:
    check = way.verifier()
    assert ask(check, signed(check, body), body) == key_id(way.secrets[0])


@given(signed_ways, st.binary(min_size=1), st.data())
def test_i2_one_changed_bit_of_the_body_is_refused(way: Way, body: bytes, data: st.DataObject) -> None:
    check = way.verifier()
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    changed = bytearray(body)
    changed[bit // 8] ^= 1 << bit % 8
    assert refusal(check, asgi(signed(check, body)), bytes(changed)) == "bad_signature"


@given(signed_ways, st.binary(max_size=20), st.binary(min_size=1, max_size=5))
def test_i2_a_longer_or_a_shorter_body_is_refused(way: Way, body: bytes, more: bytes) -> None:
    check = way.verifier()
    assert refusal(check, asgi(signed(check, body)), body + more) == "bad_signature"
    assert refusal(check, asgi(signed(check, body + more)), body) == "bad_signature"


def proof(way: Way) -> str:
    """The header that proves a delivery."""
    names = {"secret": "x-webhook-secret", "bearer": "authorization", "standard": "webhook-signature"}
    return names.get(way.scheme, "x-signature")


def spelling(way: Way, value: bytes) -> bytes:
    """Values with the same spelling say the same: case of hex and of `Bearer`, padding and alphabet of base64."""
    if way.scheme == "bearer":
        return value[:6].lower() + value[6:].rstrip(b" ")
    if way.scheme == "secret":
        return value
    options = dict(way.options)
    prefix = str(options.get("prefix", "v1,")).encode()
    text = value.removeprefix(prefix)
    if options.get("encoding") == "hex":
        return prefix * value.startswith(prefix) + text.lower()
    return prefix * value.startswith(prefix) + text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")


@given(ways, st.data())
def test_i2_any_changed_byte_of_what_proves_it_is_refused(way: Way, data: st.DataObject) -> None:
    check = way.verifier()
    headers, name = signed(check), proof(way)
    value = headers.pop(name).encode()
    place = data.draw(st.integers(0, len(value) - 1))
    changed = value[:place] + bytes([data.draw(st.integers(0, 255))]) + value[place + 1 :]
    assume(spelling(way, changed) != spelling(way, value))
    assert refusal(check, [*asgi(headers), (name.encode(), changed)]) in {"bad_signature", "malformed_header"}


@pytest.mark.parametrize("way", PROVEN)
def test_i2_every_proper_prefix_of_what_proves_it_is_refused(way: Way) -> None:
    check = way.verifier()
    headers, name = signed(check), proof(way)
    value = headers.pop(name).encode()
    for end in range(len(value)):
        if spelling(way, value[:end]) != spelling(way, value):
            refusal(check, [*asgi(headers), (name.encode(), value[:end])])


@given(ways, st.binary(min_size=1))
def test_i2_what_proves_it_with_something_behind_is_refused(way: Way, more: bytes) -> None:
    check = way.verifier()
    headers, name = signed(check), proof(way)
    value = headers.pop(name).encode()
    assume(spelling(way, value + more) != spelling(way, value))
    # These begin the next signature.
    assume(not more.startswith(b" "))
    assume(way.scheme != "hmac" or not more.startswith(b","))
    assert refusal(check, [*asgi(headers), (name.encode(), value + more)]) in {"bad_signature", "malformed_header"}


@pytest.mark.parametrize("way", PROVEN)
def test_a_header_that_is_gone_empty_or_given_twice_is_refused(way: Way) -> None:
    check = way.verifier()
    headers = signed(check)
    for name in headers:
        others = asgi({key: value for key, value in headers.items() if key != name})
        assert refusal(check, others) == "missing_header"
        assert refusal(check, [*others, (name.encode(), b"")]) == "missing_header"
        if name != "webhook-signature":
            assert refusal(check, [*asgi(headers), (name.encode(), headers[name].encode())]) == "malformed_header"


@given(ways)
def test_another_secret_proves_nothing(way: Way) -> None:
    headers = signed(way.verifier(way.secrets[0]))
    assert refusal(way.verifier(*way.secrets[1:]), asgi(headers)) == "bad_signature"


@pytest.mark.parametrize("changed", ["method", "url", "x-id", "x-timestamp"])
def test_what_the_template_names_is_signed(changed: str) -> None:
    check = hmac_way(template=ALL).verifier()
    headers = signed(check)
    if changed in headers:
        headers[changed] = headers[changed][:-1] + "2"
    method, url = ("PUT" if changed == "method" else "POST"), (URL + "/" if changed == "url" else URL)
    with pytest.raises(SignatureError) as refused:
        check.verify(BODY, asgi(headers), method, url, NOW)
    assert refused.value.reason == "bad_signature"


def test_a_url_or_a_method_that_is_not_text_is_refused_without_a_crash() -> None:
    check = hmac_way(template=ALL).verifier()
    with pytest.raises(SignatureError):
        check.verify(BODY, asgi(signed(check)), "P\ud800ST", "https://\udcff", NOW)


@given(st.sampled_from(["{body}", "{timestamp}", "{svix-id}{url}", "{", "}}", "\\1"]))
def test_placeholders_inside_a_body_are_only_text(body: str) -> None:
    key, time, text = b"k", b"1614265330", body.encode()
    payload = b"POST " + URL.encode() + b" {timestamp}." + time + b"." + text
    headers = {"x-signature": hmac.digest(key, payload, "sha256").hex(), "x-timestamp": time.decode()}
    check = verifier_of("hmac", ("k",), template=ALL, id_header="x-id")
    assert ask(check, {**headers, "x-id": "{timestamp}"}, text) == key_id("k")


# --- Strangers


NAMES = [
    b"x-webhook-secret", b"authorization", b"x-signature", b"x-timestamp", b"x-id", b"webhook-id",
    b"webhook-timestamp", b"webhook-signature", b"svix-id", b"svix-timestamp", b"svix-signature", b"\xff",
]  # fmt: skip
PIECES = [b"v1,", b"v1a,", b"Bearer ", b"sha256=", b"1614265330", b" ", b",", b"=", b"ab" * 32, b"A" * 43]
VALUES = st.binary() | st.lists(st.sampled_from(PIECES) | st.binary(max_size=3)).map(b"".join)


@given(ways, st.lists(st.tuples(st.sampled_from(NAMES), VALUES)), st.binary())
def test_i2_strange_headers_and_bodies_are_refused_and_never_crash(
    way: Way, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    refusal(way.verifier(), headers, body)


@given(ways, st.data())
def test_i2_one_strange_header_among_good_ones_is_refused_and_never_crashes(way: Way, data: st.DataObject) -> None:
    check = way.verifier()
    headers = dict(asgi(signed(check)))
    name = data.draw(st.sampled_from([name for name in headers if name != b"host"]))
    changed = data.draw(VALUES)
    assume(spelling(way, changed) != spelling(way, headers[name]))
    refusal(check, list({**headers, name: changed}.items()))


# --- Rotation


@pytest.mark.parametrize("way", PROVEN)
@pytest.mark.parametrize("used", [0, 1, 2])
def test_i2_any_of_three_secrets_is_accepted_and_the_ledger_learns_which(way: Way, used: int) -> None:
    sender = way.verifier(way.secrets[used])
    assert ask(way.verifier(), signed(sender)) == key_id(way.secrets[used])


def test_a_key_id_is_eight_hex_characters_that_differ_between_secrets() -> None:
    ids = {key_id(secret) for secret in TEXTS + BASE64S}
    assert len(ids) == 6
    assert all(re.fullmatch("[0-9a-f]{8}", name) for name in ids)
    assert key_id("secret") == key_id(b"secret") == "63129d74"  # stored in ledgers: may not change


def test_a_secret_that_is_not_utf_8_is_taken_as_its_bytes() -> None:
    check = verifier_of("secret", ("caf\udce9",))  # how Python shows the byte 0xE9 of an environment variable
    name = check.verify(BODY, [(b"x-webhook-secret", b"caf\xe9")], "POST", URL, NOW)
    assert name == key_id(b"caf\xe9")
    assert check.sign(BODY, NOW, "msg_1", "POST", URL) == {"x-webhook-secret": "caf\udce9"}


# --- Time


@given(TIMED, st.integers(-300, 300), st.booleans())
@example(STANDARD, -300, False)
@example(STANDARD, 300, False)
def test_a_signed_time_within_the_tolerance_is_accepted(way: Way, offset: int, milliseconds: bool) -> None:
    check = way.verifier()
    headers = signed(check, now=(NOW + offset) * (1000 if milliseconds else 1))
    if milliseconds and way.scheme == "standard":  # the specification counts seconds
        assert refusal(check, asgi(headers)) == "stale_timestamp"
    else:
        assert ask(check, headers) == key_id(way.secrets[0])


@given(TIMED, st.sampled_from([-1, 1]), st.integers(301, 10**9), st.booleans())
@example(STANDARD, -1, 301, False)
@example(STANDARD, 1, 301, False)
def test_a_signed_time_outside_the_tolerance_is_refused(
    way: Way, direction: int, offset: int, milliseconds: bool
) -> None:
    check = way.verifier()
    headers = signed(check, now=(NOW + direction * offset) * (1000 if milliseconds else 1))
    assert refusal(check, asgi(headers)) == "stale_timestamp"


def test_the_tolerance_is_exact_to_the_fraction_and_is_a_setting() -> None:
    check = STANDARD.verifier()
    assert refusal(check, asgi(signed(check)), now=NOW + 300.001) == "stale_timestamp"
    strict = verifier(settings_of("standard", BASE64S[0], ARCHIVER_TIMESTAMP_TOLERANCE=5))
    assert ask(strict, signed(strict), now=NOW + 5) == key_id(BASE64S[0])
    assert refusal(strict, asgi(signed(strict)), now=NOW + 6) == "stale_timestamp"


@pytest.mark.parametrize("way", [STANDARD, hmac_way(template="{timestamp}.{body}")])
@pytest.mark.parametrize(
    "timestamp",
    ["+5", "-5", " 5", "5 ", "1e3", "NaN", "inf", "1614265330.0", "1_614_265_330", "0x60", "5\x00", "\u0661\u0662",
     "\u00b2", "9" * 16, "9" * 400, "9" * 5000],
)  # fmt: skip
def test_a_time_that_is_not_a_plain_number_is_refused_as_such(way: Way, timestamp: str) -> None:
    check = way.verifier()
    headers = signed(check)
    name = next(name for name in headers if name.endswith("timestamp"))
    assert refusal(check, asgi({**headers, name: timestamp})) == "malformed_timestamp"


@given(TIMED)
def test_the_time_is_looked_at_before_anything_is_hashed(way: Way) -> None:
    check = way.verifier()
    headers = {**signed(check, now=NOW - 301), proof(way): "neither this"}
    assert refusal(check, asgi(headers), b"nor this") == "stale_timestamp"


def test_a_template_without_a_time_asks_for_none() -> None:
    check = hmac_way(template="{body}").verifier()
    headers = signed(check)
    assert set(headers) == {"x-signature"}
    assert ask(check, {**headers, "x-timestamp": "nonsense"}, now=0) == key_id(TEXTS[0])


# --- Spellings that platforms use


@pytest.mark.parametrize("word", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_bearer_may_be_written_in_any_case(word: str) -> None:
    assert ask(BEARER.verifier(), {"authorization": f"{word} current-secret"}) == key_id("current-secret")


@pytest.mark.parametrize("value", ["current-secret", "Basic current-secret", "Bearercurrent-secret"])
def test_another_authorization_than_bearer_is_refused(value: str) -> None:
    assert refusal(BEARER.verifier(), asgi({"authorization": value})) == "malformed_header"


def test_the_header_of_the_secret_is_a_setting() -> None:
    check = verifier(settings_of("secret", "s", ARCHIVER_SECRET_HEADER="X-Vapi-Secret"))
    assert ask(check, {"x-vapi-secret": "s"}) == key_id("s")


def test_hex_may_be_in_upper_case() -> None:
    check = hmac_way().verifier()
    headers = signed(check)
    assert ask(check, {**headers, "x-signature": headers["x-signature"].upper()}) == key_id(TEXTS[0])


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_base64_may_be_url_safe_and_without_padding(algorithm: str) -> None:
    check = hmac_way(encoding="base64", template="{body}", algorithm=algorithm).verifier()
    key, bodies = TEXTS[0].encode(), (b"%d" % number for number in range(1000))
    body = next(body for body in bodies if {*b"+/"} <= {*base64.b64encode(hmac.digest(key, body, algorithm))})
    digest = hmac.digest(key, body, algorithm)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(digest).decode()
        assert ask(check, {"x-signature": text}, body) == key_id(TEXTS[0])
        assert ask(check, {"x-signature": text.rstrip("=")}, body) == key_id(TEXTS[0])


def test_a_signature_without_its_prefix_is_refused() -> None:
    check = hmac_way(prefix="sha256=", template="{body}").verifier()
    headers = signed(check)
    assert headers["x-signature"].startswith("sha256=")
    bare = headers["x-signature"].removeprefix("sha256=")
    assert refusal(check, asgi({"x-signature": bare})) == "malformed_header"


# RFC 4231, test cases 1, 2, 3, 6 and 7: key, data, HMAC-SHA-256, start of HMAC-SHA-512
RFC_4231 = [
    (
        b"\x0b" * 20,
        b"Hi There",
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        "87aa7cdea5ef619d",
    ),
    (
        b"Jefe",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        "164b7a7bfcf819e2",
    ),
    (
        b"\xaa" * 20,
        b"\xdd" * 50,
        "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
        "fa73b0089d56a284",
    ),
    (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        "80b24263c7c1a3eb",
    ),
    (
        b"\xaa" * 131,
        b"This is a test using a larger than block-size key and a larger than block-size data. "
        b"The key needs to be hashed before being used by the HMAC algorithm.",
        "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
        "e37b6a775dc87dba",
    ),
]


@pytest.mark.parametrize(("key", "data", "sha256", "sha512_start"), RFC_4231)
def test_hmac_agrees_with_rfc_4231(key: bytes, data: bytes, sha256: str, sha512_start: str) -> None:
    options: dict[str, Any] = {"template": "{body}", "secret_is_base64": True}
    secret = base64.b64encode(key).decode()
    assert ask(verifier_of("hmac", (secret,), **options), {"x-signature": sha256}, data) == key_id(secret)
    headers = signed(verifier_of("hmac", (secret,), algorithm="sha512", **options), data)
    assert headers["x-signature"].startswith(sha512_start)


# RFC 2202, test case 2
def test_hmac_sha1_agrees_with_rfc_2202() -> None:
    check = verifier_of("hmac", ("Jefe",), algorithm="sha1", template="{body}")
    headers = {"x-signature": "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"}
    assert ask(check, headers, b"what do ya want for nothing?") == key_id("Jefe")


# --- Standard Webhooks


PUBLISHED = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
PAYLOAD = b'{"test": 2432232314}'


def test_the_published_vector_is_accepted_and_reproduced() -> None:
    check = STANDARD.verifier()
    assert ask(check, PUBLISHED, PAYLOAD) == key_id(BASE64S[0])
    assert check.sign(PAYLOAD, NOW, "msg_p5jXN8AQM9LWM0D4loKWxJek", "POST", URL) == PUBLISHED


def test_svix_names_of_the_headers_are_accepted() -> None:
    svix = {name.replace("webhook-", "svix-"): value for name, value in PUBLISHED.items()}
    assert ask(STANDARD.verifier(), svix, PAYLOAD) == key_id(BASE64S[0])
    of_another = {**svix, "svix-signature": BAD}
    assert ask(STANDARD.verifier(), {**of_another, **PUBLISHED}, PAYLOAD) == key_id(BASE64S[0])


def test_the_two_families_of_names_are_not_mixed() -> None:
    mixed = {"svix-signature" if "signature" in name else name: value for name, value in PUBLISHED.items()}
    assert refusal(STANDARD.verifier(), asgi(mixed), PAYLOAD) == "missing_header"


def test_the_same_key_with_and_without_its_prefix_is_one_key() -> None:
    assert ask(STANDARD.verifier("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), PUBLISHED, PAYLOAD)


GOOD = PUBLISHED["webhook-signature"]
BAD = "v1," + base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    "value",
    [f"{BAD} {GOOD}", f"{GOOD} {BAD}", f"v1a,AAAA {GOOD}", f"nocomma {GOOD}", f"  {GOOD}  ", f", v1 v1, {GOOD}",
     " ".join([BAD] * 84 + [GOOD]), GOOD.rstrip("=")],
)  # fmt: skip
def test_one_good_signature_among_others_is_enough(value: str) -> None:
    assert ask(STANDARD.verifier(), {**PUBLISHED, "webhook-signature": value}, PAYLOAD) == key_id(BASE64S[0])


def test_signatures_may_come_in_several_headers() -> None:
    headers = asgi({**PUBLISHED, "webhook-signature": BAD})
    check = STANDARD.verifier()
    assert refusal(check, headers, PAYLOAD) == "bad_signature"
    name = check.verify(PAYLOAD, [*headers, (b"webhook-signature", GOOD.encode())], "POST", URL, NOW)
    assert name == key_id(BASE64S[0])


@pytest.mark.parametrize(
    "value",
    [
        "nocomma", "v1", "v1,", "v1,AAAA", " ".join([GOOD] * 86),
        *(GOOD.replace("v1,", version) for version in ("v1a,", "V1,", "v2,", "v1;", "v1, ", "")),
    ],
)  # fmt: skip
def test_a_signature_that_is_none_of_version_1_is_refused_as_malformed(value: str) -> None:
    headers = asgi({**PUBLISHED, "webhook-signature": value})
    assert refusal(STANDARD.verifier(), headers, PAYLOAD) == "malformed_header"


def test_i2_a_signed_text_cannot_be_cut_into_another_id_time_and_body() -> None:
    check = STANDARD.verifier()
    headers = check.sign(b"1614265331.{}", NOW, "msg", "POST", URL)
    shifted = {**headers, "webhook-id": "msg.1614265330", "webhook-timestamp": "1614265331"}
    assert refusal(check, asgi(shifted), b"{}") == "malformed_header"


ids = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGH_-0123456789", min_size=1)


@given(st.binary(min_size=1, max_size=64), ids, st.text())
def test_what_the_reference_library_signs_is_accepted(key: bytes, message_id: str, body: str) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    signature = Webhook(secret).sign(message_id, datetime.fromtimestamp(NOW, UTC), body)
    headers = {**PUBLISHED, "webhook-id": message_id, "webhook-signature": signature}
    assert ask(verifier_of("standard", (secret,)), headers, body.encode()) == key_id(secret)


@given(st.binary(min_size=1, max_size=64), ids, st.text())
def test_what_is_signed_here_is_accepted_by_the_reference_library(key: bytes, message_id: str, body: str) -> None:
    secret = base64.b64encode(key).decode().rstrip("=")
    headers = verifier_of("standard", (secret,)).sign(body.encode(), NOW, message_id, "POST", URL)
    with time_machine.travel(NOW, tick=False):
        Webhook(secret).verify(body, headers, json_parse=False)
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body + " ", headers, json_parse=False)


# --- No proof asked for


@given(st.binary(), st.lists(st.tuples(st.binary(), st.binary())))
def test_scheme_none_accepts_everything_and_warns(body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    check = verifier_of("none")
    assert signed(check) == {}
    assert check.verify(body, headers, "POST", URL, NOW) == "none"


# --- Settings that cannot work are refused before the first request


@pytest.mark.parametrize("scheme", ["secret", "bearer", "hmac", "standard"])
@pytest.mark.parametrize("secrets", ["", " ", ",", " , ,"])
def test_a_scheme_without_a_secret_is_refused_with_the_command_that_makes_one(scheme: str, secrets: str) -> None:
    with pytest.raises(SettingsError, match=r"^ARCHIVER_WEBHOOK_SECRETS is empty") as refused:
        verifier_of(scheme, (secrets,))
    assert f"scheme {scheme} needs a secret" in str(refused.value)
    assert 'python3 -c "import' in str(refused.value)


@pytest.mark.parametrize("way", PROVEN)
def test_the_advice_makes_a_secret_that_works(way: Way, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        verifier_of(way.scheme, (), **dict(way.options))
    advice = re.search(r'python3 -c "(.*)"', str(refused.value))
    assert advice
    exec(advice[1], {})
    secret = capsys.readouterr().out.strip()
    check = way.verifier(secret)
    assert ask(check, signed(check)) == key_id(secret)


@pytest.mark.parametrize(
    ("secret", "fault"),
    [
        ("not base64!", "is not base64"),
        ("whsec_not base64!", "is not base64"),
        ("whsec_abcde", "is not base64"),
        ("ab=cd", "is not base64"),
        ("g\u00fcltig", "is not base64"),
        ("whsec_", "is empty"),
        ("====", "is empty"),
    ],
)
@pytest.mark.parametrize("way", [STANDARD, hmac_way(secret_is_base64=True)])
def test_a_secret_that_does_not_decode_is_refused_by_its_number(way: Way, secret: str, fault: str) -> None:
    with pytest.raises(SettingsError) as refused:
        way.verifier(BASE64S[0], secret)
    assert str(refused.value).startswith(f"ARCHIVER_WEBHOOK_SECRETS: secret 2 {fault}")
    assert "b64encode" in str(refused.value)


def test_url_safe_keys_are_for_hmac_only() -> None:
    url_safe = base64.urlsafe_b64encode(b"\xfb\xff\xfe" * 8).decode()
    headers = signed(hmac_way(secret_is_base64=True).verifier(BASE64S[1]))
    assert ask(hmac_way(secret_is_base64=True).verifier(url_safe), headers) == key_id(url_safe)
    with pytest.raises(SettingsError, match="secret 1 is not base64"):
        STANDARD.verifier(url_safe)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{timestamp}.{Body}", "unknown placeholder '{Body}'"),
        ("{}{body}", "unknown placeholder '{}'"),
        ("{body}{nonce}", "unknown placeholder '{nonce}'"),
        ("{timestamp.{body}", "unknown placeholder '{timestamp.'"),
        ("{body}}", "unknown placeholder '}'"),
    ],
)
def test_an_unknown_placeholder_is_refused_with_a_list_of_the_known_ones(template: str, fault: str) -> None:
    with pytest.raises(SettingsError) as refused:
        verifier_of("hmac", TEXTS, template=template)
    assert str(refused.value).startswith(f"ARCHIVER_HMAC_TEMPLATE: {fault}")
    assert "{body}, {timestamp}, {method}, {url}, {svix-id}" in str(refused.value)


@pytest.mark.parametrize("template", ["", "{timestamp}", "body"])
def test_a_template_without_the_body_is_refused(template: str) -> None:
    with pytest.raises(SettingsError, match=r"^ARCHIVER_HMAC_TEMPLATE must contain \{body\}"):
        verifier_of("hmac", TEXTS, template=template)


def test_a_template_with_a_time_needs_the_header_of_the_time() -> None:
    with pytest.raises(SettingsError, match=r"^ARCHIVER_HMAC_TIMESTAMP_HEADER is empty.*\{timestamp\}"):
        verifier_of("hmac", TEXTS, timestamp_header="")
    timeless = verifier_of("hmac", TEXTS, timestamp_header="", template="{body}")
    assert ask(timeless, signed(timeless)) == key_id(TEXTS[0])


def test_a_template_with_an_id_needs_the_header_of_the_id() -> None:
    with pytest.raises(SettingsError, match=r"^ARCHIVER_HMAC_ID_HEADER is empty.*\{svix-id\}"):
        verifier_of("hmac", TEXTS, template="{svix-id}.{body}")


# --- Secrets stay secret


@pytest.mark.parametrize("way", PROVEN)
def test_no_secret_shows_in_a_verifier_or_in_a_refusal(way: Way) -> None:
    check = way.verifier()
    with pytest.raises(SignatureError) as refused:
        ask(check, {**signed(check), "x-webhook-secret": "guess", "authorization": "Bearer guess"}, b"other")
    shown = repr(check) + repr(refused.value) + str(refused.value)
    keys = [base64.b64decode(text.removeprefix("whsec_") + "==") for text in BASE64S]
    for secret in (*TEXTS, *BASE64S, *(repr(key) for key in keys), "guess"):
        assert secret not in shown


def test_a_refused_setting_does_not_reveal_the_secret() -> None:
    with pytest.raises(SettingsError) as refused:
        STANDARD.verifier("hunter2!")
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_a_refusal_names_its_reason_and_its_header() -> None:
    with pytest.raises(SignatureError) as refused:
        ask(SECRET.verifier(), {})
    assert str(refused.value) == (
        "The delivery does not prove that it comes from the platform. (missing_header: x-webhook-secret)"
    )
    assert get_args(Reason) == REASONS
