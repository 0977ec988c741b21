"""Which visitor a login attempt counts for, also behind a reverse proxy (I12)."""

import asyncio
import contextlib
from collections.abc import Iterable

import pytest
from starlette.requests import Request

from archiver.console.attempts import (
    MAX_FAILURES,
    MAX_FAILURES_OF_NETWORK,
    MAX_WAITING_OF_ADDRESS,
    MAX_WAITING_OF_PROXY,
    Attempts,
    TooManyAttemptsError,
)
from archiver.console.visitors import Visitor, visitor_of

PROXY = "127.0.0.1"


def request_from(peer: str, *forwarded: str) -> Request:
    headers = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    return Request({"type": "http", "client": (peer, 1), "headers": headers})


@pytest.mark.parametrize(
    ("peer", "forwarded", "allowed", "expected"),
    [
        ("192.0.2.1", (), None, Visitor("192.0.2.1")),
        ("192.0.2.1", ("198.51.100.7",), None, Visitor("192.0.2.1")),
        (PROXY, ("198.51.100.7",), None, Visitor("198.51.100.7")),
        ("::1", ("2001:db8::1",), None, Visitor("2001:db8::1")),
        (PROXY, ("203.0.113.9, 198.51.100.7",), None, Visitor("198.51.100.7")),
        (PROXY, ("203.0.113.9", "198.51.100.7"), None, Visitor("198.51.100.7")),
        (PROXY, ("198.51.100.7, 127.0.0.1",), None, Visitor("198.51.100.7")),
        ("10.0.0.2", ("198.51.100.7, 10.0.0.3",), "10.0.0.0/8", Visitor("198.51.100.7")),
        ("10.0.0.2", ("203.0.113.9, 198.51.100.7",), "*", Visitor("198.51.100.7")),
        (PROXY, (), None, Visitor(PROXY, is_shared=True)),
        (PROXY, ("198.51.100.7, unknown",), None, Visitor(PROXY, is_shared=True)),
        (PROXY, ("",), None, Visitor(PROXY, is_shared=True)),
    ],
)
def test_a_trusted_proxy_names_the_visitor_and_no_one_else_does(
    peer: str, forwarded: tuple[str, ...], allowed: str | None, expected: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", allowed)
    assert visitor_of(request_from(peer, *forwarded)) == expected


async def _waiting(attempts: Attempts, visitor: Visitor) -> int:
    """How many attempts of a visitor may wait while another one is checked."""
    ending = asyncio.Event()

    async def wait(number: int) -> None:
        async with attempts.turn(visitor, f"name{number}"):
            await ending.wait()

    tasks = [asyncio.create_task(wait(number)) for number in range(40)]
    await asyncio.sleep(0)
    ending.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return sum(not isinstance(each, TooManyAttemptsError) for each in results)


def test_i12_a_proxy_without_names_of_visitors_may_have_more_logins_wait() -> None:
    assert asyncio.run(_waiting(Attempts(), Visitor("192.0.2.1"))) == MAX_WAITING_OF_ADDRESS
    assert asyncio.run(_waiting(Attempts(), Visitor(PROXY, is_shared=True))) == MAX_WAITING_OF_PROXY


def test_i12_one_visitor_of_a_proxy_does_not_lock_out_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archiver.console.attempts.REST_SECONDS", 0)

    async def attempt() -> None:
        attempts, attacker, user = Attempts(), Visitor("203.0.113.9"), Visitor("198.51.100.7")
        for _ in range(MAX_FAILURES):
            async with attempts.turn(attacker, "ada"):
                await attempts.failed(attacker, "ada")
        with pytest.raises(TooManyAttemptsError):
            async with attempts.turn(attacker, "ada"):
                pass
        async with attempts.turn(user, "ada"):
            attempts.succeeded(user, "ada")

    asyncio.run(attempt())


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("testclient", "testclient"),
    ],
)
def test_addresses_that_one_person_chooses_count_as_one(address: str, network: str) -> None:
    assert Visitor(address).network == network


async def _fail(attempts: Attempts, visitors: Iterable[Visitor], names: Iterable[str]) -> int:
    """How many attempts fail before the visitors must wait."""
    failed = 0
    with contextlib.suppress(TooManyAttemptsError):
        for visitor, name in zip(visitors, names, strict=True):
            async with attempts.turn(visitor, name):
                await attempts.failed(visitor, name)
            failed += 1
    return failed


async def test_many_names_and_many_addresses_of_a_network_give_no_more_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("archiver.console.attempts.REST_SECONDS", 0)
    names = [f"name{number}" for number in range(200)]
    one = Visitor("192.0.2.1")
    assert await _fail(Attempts(), [one] * 200, names) == MAX_FAILURES_OF_NETWORK
    attempts = Attempts()
    assert await _fail(attempts, [Visitor(f"2001:db8::{number:x}") for number in range(200)], ["ada"] * 200) == 5
    async with attempts.turn(Visitor("2001:db8:0:1::1"), "ada"):  # another network
        attempts.succeeded(one, "ada")
    proxy = Visitor(PROXY, is_shared=True)
    assert await _fail(Attempts(), [proxy] * 200, names) == 200
