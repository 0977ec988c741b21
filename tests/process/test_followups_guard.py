"""Permitted addresses of follow-ups and their signatures: no address is used unchecked."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import parse_headers
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from archiver import retry_after
from archiver.inbound.signatures import standard_webhooks
from archiver.outbound.followups import guard, schedule
from archiver.outbound.followups.guard import AddressRefusedError, HostNotFoundError, check, endpoint, reach
from archiver.outbound.followups.rate_limit import RateLimiter
from archiver.outbound.followups.sending import Attempt, Transport
from tests.support.followups import Receiver, receiving
from tests.support.guarded_receivers import certificate, to

FORBIDDEN = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.0.1",
    "192.0.0.192",
    "192.88.99.1",
    "168.63.129.16",
    "100.100.100.200",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "198.18.0.1",
    "192.0.2.1",
    "::",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "64:ff9b:1::1",
    "3fff::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "100::1",
    "2001:db8::1",
    "5f00::1",
    "4000::1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",
    "2001:0:808:808::",
    "2001:0:a9fe:a9fe::",
    "::a9fe:a9fe",
    "2606:4700::5efe:169.254.169.254",
    "2606:4700::200:5efe:169.254.169.254",
    "fd12::5efe:169.254.169.254",
    "fe80::5efe:8.8.8.8",
]
PRIVATE = [
    "127.0.0.1",
    "127.255.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "::1",
    "fc00::1",
    "fd12::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "::7f00:1",
    "2606:4700::5efe:10.0.0.1",
    "2606:4700:1:2:200:5efe:127.0.0.1",
    "fd12::5efe:8.8.8.8",
]
PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "172.32.0.1",
    "100.63.0.1",
    "2606:4700::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2606:4700::5efe:8.8.8.8",
    "2606:4700::5eff:10.0.0.1",
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_nothing_is_sent_to(address: str) -> None:
    assert reach(ip_address(address)) == "forbidden"
    with pytest.raises(AddressRefusedError):
        check([address], is_encrypted=True, allow_private=True)


@pytest.mark.parametrize("address", PRIVATE)
def test_only_where_it_is_allowed_something_is_sent_to(address: str) -> None:
    assert reach(ip_address(address)) == "private"
    with pytest.raises(AddressRefusedError, match="ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE"):
        check([address], is_encrypted=True, allow_private=False)
    assert check([address], is_encrypted=False, allow_private=True) == [str(ip_address(address))]


@pytest.mark.parametrize("address", PUBLIC)
def test_something_is_sent_only_encrypted_to(address: str) -> None:
    assert reach(ip_address(address)) == "public"
    assert check([address], is_encrypted=True, allow_private=False)
    with pytest.raises(AddressRefusedError, match="https"):
        check([address], is_encrypted=False, allow_private=True)


def test_of_several_addresses_every_one_is_checked() -> None:
    with pytest.raises(AddressRefusedError):
        check(["8.8.8.8", "10.0.0.1"], is_encrypted=True, allow_private=False)
    with pytest.raises(AddressRefusedError):
        check(["fe80::1%eth0"], is_encrypted=True, allow_private=True)


@given(st.ip_addresses())
def test_what_ipaddress_holds_for_not_global_is_never_public(address: IPv4Address | IPv6Address) -> None:
    if reach(address) == "public":
        assert _bare(address).is_global
        assert not address.is_multicast


def _bare(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    is_dressed = isinstance(address, IPv6Address) and (address.ipv4_mapped or address in ip_network("64:ff9b::/96"))
    return IPv4Address(int(address) & 0xFFFF_FFFF) if is_dressed else address


@given(st.ip_addresses(v=4))
def test_an_address_in_another_dress_is_the_same(address: IPv4Address) -> None:
    for dress in (f"::ffff:{address}", f"64:ff9b::{address}"):
        assert reach(ip_address(dress)) == reach(address)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "//example.com/",
        "example.com",
        "https://",
        "https:///path",
        "https://user:password@example.com/",
        "https://user@example.com/",
        "https://example.com/#part",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com/\r\nx: y",
        "https://example.com/" + "x" * 2_000,
    ],
)
def test_such_a_url_is_refused(url: str) -> None:
    with pytest.raises(AddressRefusedError) as refused:
        endpoint(url)
    assert "password@" not in str(refused.value)


def test_a_url_is_taken_apart_once() -> None:
    result = endpoint("https://[2606:4700::1]:8443/a%20b?c=d")
    assert (result.host, result.port, result.target) == ("2606:4700::1", 8443, b"/a%20b?c=d")
    assert (result.authority, result.origin) == ("[2606:4700::1]:8443", "https://[2606:4700::1]:8443")
    assert endpoint("http://crm.example.com/hook").origin == "http://crm.example.com"


# Connections


def send(
    url: str,
    resolve: guard.Resolve = guard.resolve,
    *,
    allow_private: bool = True,
    seconds: float = 15,
    trusted: ssl.SSLContext | None = None,
    times: int = 1,
) -> Attempt:
    async def once() -> Attempt:
        transport = Transport(
            endpoint(url),
            concurrency=1,
            allow_private=allow_private,
            seconds=seconds,
            trusted=trusted,
            resolve=resolve,
        )
        async with transport:
            for _ in range(times):
                attempt = await transport.send(to(url), "msg_1_1", b"{}")
            return attempt

    return asyncio.run(once())


def named(receiver: Receiver, host: str) -> str:
    return receiver.url.replace("127.0.0.1", host)


def test_the_connection_is_made_to_the_address_that_was_checked() -> None:
    asked = []

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    with receiving() as receiver:
        attempt = send(named(receiver, "nowhere.invalid") + "/x", resolve)
    assert attempt.status == 204
    assert receiver.got[0].headers["host"] == f"nowhere.invalid:{receiver.url.rpartition(':')[2]}"
    assert [host for host, _ in asked] == ["nowhere.invalid"]


def test_a_name_that_changes_its_mind_is_refused_at_the_next_connection() -> None:
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])

    def resolve(host: str, port: int) -> Sequence[str]:
        del host, port
        return next(answers)

    with receiving() as receiver:
        receiver.then(Response(status_code=204, headers={"connection": "close"}))
        attempt = send(named(receiver, "rebinding.invalid"), resolve, times=2)
    assert attempt.fault == "refused_address"
    assert len(receiver.got) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "0"])
def test_loopback_is_refused_however_it_is_written(host: str) -> None:
    with receiving() as receiver:
        url = named(receiver, host).replace("http:", "https:")
        attempt = send(url, allow_private=False)
    assert attempt.fault in {"refused_address", "unknown_host"}
    assert receiver.got == []


def test_an_unknown_host() -> None:
    def resolve(host: str, port: int) -> Sequence[str]:
        del port
        raise HostNotFoundError(host)

    assert send("https://nowhere.invalid/", resolve).fault == "unknown_host"
    assert send("https://nowhere.invalid/", lambda *_: []).fault == "unknown_host"


def test_a_receiver_that_is_not_there() -> None:
    with receiving() as receiver:
        url = receiver.url
    assert send(url).fault == "no_connection"


def test_a_receiver_that_hangs_is_not_waited_for() -> None:
    with receiving() as receiver:
        receiver.hangs = True
        assert send(receiver.url, seconds=0.3).fault == "timeout"


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with receiving() as receiver:
        assert send(receiver.url).status == 204


@contextmanager
def tls(path: Path) -> Iterator[int]:
    """A server that answers 204 to whatever it is sent, encrypted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with suppress(OSError):  # it was shut down
            while True:
                connection, _ = listener.accept()
                # Whoever does not trust the certificate leaves.
                with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
                    with encrypted.makefile("rb") as request:
                        request.readline()
                        request.read(int(parse_headers(request)["content-length"]))
                    encrypted.sendall(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def test_the_certificate_must_be_of_the_urls_host(tmp_path: Path) -> None:
    path = certificate(tmp_path, "crm.test")
    trusted = ssl.create_default_context(cafile=str(path))

    def resolve(host: str, port: int) -> Sequence[str]:
        del host, port
        return ["127.0.0.1"]

    with tls(path) as port:
        assert send(f"https://crm.test:{port}/", resolve, trusted=trusted).status == 204
        assert send(f"https://other.test:{port}/", resolve, trusted=trusted).fault == "bad_certificate"
        assert send(f"https://crm.test:{port}/", resolve).fault == "bad_certificate"


# Secrets and the schedule


@pytest.mark.parametrize("secret", ["", "whsec_", "secret", "whsec_%%%%", "whsec_" + "QUJD", "whsec_" + "QUJD" * 30])
def test_a_bad_secret_is_none(secret: str) -> None:
    with pytest.raises(standard_webhooks.SecretError) as refused:
        standard_webhooks.key(secret)
    assert "QUJD" not in str(refused.value)


def test_secrets_are_never_the_same() -> None:
    made = {standard_webhooks.make_secret() for _ in range(100)}
    assert len(made) == 100
    assert {len(standard_webhooks.key(each)) for each in made} == {32}


def test_the_backoff_takes_about_a_day_and_grows() -> None:
    longest = [schedule.backoff(number, None, lambda _, limit: limit) for number in range(1, schedule.ATTEMPTS)]
    assert longest == sorted(longest)
    assert 22 * 3600 < sum(longest) / 2 < 26 * 3600
    assert schedule.backoff(1, 500.0) == 500.0
    assert schedule.backoff(99, None, lambda _, limit: limit) == longest[-1]


@given(st.integers(0, 10_000))
def test_i12_a_receiver_is_left_alone_for_a_quarter_of_an_hour_at_most(failures: int) -> None:
    wait = schedule.probe_after(failures)
    assert (wait == 0.0) == (failures < schedule.OPEN_AFTER_FAILURES)
    assert wait <= 900


NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", None),
        ("120", 120.0),
        ("1.5", 1.5),
        (" 0 ", 0.0),
        ("-5", None),
        ("99999999999999999999", 86_400.0),
        ("Mon, 05 Jan 2026 12:01:00 GMT", 60.0),
        ("Mon, 05 Jan 2026 11:00:00 GMT", 0.0),
        ("Mon, 05 Jan 2027 12:01:00 GMT", 86_400.0),
        ("soon", None),
        ("١٢", None),
    ],
)
def test_retry_after_is_read_and_bounded(header: str, seconds: float | None) -> None:
    parsed = retry_after.parse(header, NOW)
    assert (parsed if parsed is None else min(parsed, schedule.MAX_RETRY_AFTER)) == seconds


def test_the_pace_is_even_and_kept_by_all_together() -> None:
    async def run() -> float:
        pace, loop = RateLimiter(200), asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(pace.acquire() for _ in range(41)))
        return loop.time() - began

    assert asyncio.run(run()) >= 40 / 200 - 0.051


def test_who_would_wait_for_too_long_is_sent_back() -> None:
    async def run() -> list[bool]:
        pace = RateLimiter(10, clock=lambda: 1.0)
        return await asyncio.gather(*(pace.acquire() for _ in range(30)))

    turns = asyncio.run(run())
    assert 10 <= sum(turns) <= 12
    assert turns == sorted(turns, reverse=True)
