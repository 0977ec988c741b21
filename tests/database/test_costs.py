"""The cost of a turn, with the digits that were sent, on every path through the archive."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from archiver import events
from archiver.archive.rebuild import rebuild
from archiver.compliance.seals import select_seal
from archiver.database import transaction
from archiver.events import Event
from archiver.outbound.followups.deliveries import Due
from archiver.outbound.followups.payloads import select_bodies
from tests.support import servers
from tests.support.exports import make
from tests.support.histories import START, TIMING, Archive, answer

on_one_version = pytest.mark.parametrize("cluster", servers.versions()[:1], indirect=True)

# As it is sent, and as Postgres writes the numeric.
COSTS = {
    "0.1234567890123456789": "0.1234567890123456789",
    '"0.1234567890123456789"': "0.1234567890123456789",
    '"0.10"': "0.10",
    "0.10": "0.10",
    "1.000000000000000000000000000001": "1.000000000000000000000000000001",
    "99999999999.99999999999999999999": "99999999999.99999999999999999999",
    "1e-7": "0.0000001",
    "1.50E+3": "1500",
    '"12.5e-20"': "0.000000000000000000125",
    "0.30000000000000004": "0.30000000000000004",
    "0.1000000000000000055511151231257827": "0.1000000000000000055511151231257827",
    "0." + "1234567890" * 60: "0." + "1234567890" * 60,
    '"0.' + "1234567890" * 60 + '"': "0." + "1234567890" * 60,
    "-0.0000000000000000000001": "-0.0000000000000000000001",
    "0": "0",
    "0.000": "0",
    "-0.0": "0",
    "3": "3",
    '{"total": 0.1234567890123456789, "currency": "USD"}': "0.1234567890123456789",
    '{"amount": "0.10"}': "0.10",
    '{"usd": {"value": 7.25}}': "7.25",
}


def body(number: int, cost: str, extra: str = "") -> bytes:
    return (
        f'{{"type": "chat.created", "chat": {{"id": "c{number}", "sessionId": "session-1", "input": "q{number}",'
        f' "output": "a{number}", "cost": {cost}{extra}}}}}'
    ).encode()


def cost_of(cost: str, extra: str = "") -> Decimal | None:
    read = events.parse(body(0, cost, extra))
    assert isinstance(read, Event)
    assert read.chat is not None
    return read.chat.cost


@settings(deadline=None)
@given(st.decimals(Decimal(-(10**11)), Decimal(10**11), allow_nan=False, allow_infinity=False, places=25))
@example(Decimal("0.1234567890123456789"))
def test_every_digit_is_read(cost: Decimal) -> None:
    for sent in (f"{cost:f}", f'"{cost:f}"', f"{cost:E}"):
        for extra in ("", ', "x": "\\ud800"', ', "x": NaN'):  # the latter take the other decoder
            read = cost_of(sent, extra)
            assert read == cost
            assert not cost or str(read) == str(Decimal(sent.strip('"')))


@pytest.mark.parametrize(
    "cost",
    ['"1_000"', '"0x10"', '"1,5"', '"٣"', '"$1"', '"."', '"e5"', '"1e"', '"--1"', '{"total": []}', "[1]", '"1e-99"'],
)
def test_what_is_no_number_is_no_cost(cost: str) -> None:
    assert cost_of(cost) is None


def test_a_cost_that_is_nested_too_deeply_is_none() -> None:
    assert cost_of('{"total": ' * 150 + "1" + "}" * 150) is None


@on_one_version
def test_costs_reach_the_archive_the_export_and_follow_ups_with_all_their_digits(
    engine: Engine, tmp_path: Path
) -> None:
    archive = Archive(engine)
    for number, cost in enumerate(COSTS):
        archive.webhook(number, body(number, cost))
    shown = "SELECT cost::text FROM analytics.chats ORDER BY substr(chat_id, 2)::integer"
    remaining = [(text,) for text in COSTS.values()]
    assert archive.rows(shown) == remaining
    total = sum(map(Decimal, COSTS.values()), Decimal(0))
    assert archive.rows("SELECT cost FROM analytics.conversations") == [(pytest.approx(total, abs=Decimal("1e-9")),)]
    texts = [
        message for number in range(len(COSTS)) for message in (("user", f"q{number}"), ("assistant", f"a{number}"))
    ]
    archive.reading(100, answer(*texts))
    assert archive.rows(shown) == remaining
    list(rebuild(engine, TIMING))
    assert archive.rows(shown) == remaining

    make(engine, tmp_path / "export")
    exported = (tmp_path / "export" / "chats.jsonl").read_text()
    result = [json.loads(line, parse_float=str, parse_int=str) for line in exported.splitlines()]
    assert {chat["chat_id"]: chat["cost"] for chat in result} == {
        f"c{number}": cost for number, cost in enumerate(COSTS.values())
    }
    with (tmp_path / "export" / "chats.csv").open() as file:
        assert all(any(cost in line for line in file.read().splitlines()) for cost in ["0.1234567890123456789"])

    due = [
        Due(1, number, "chat.created", "session-1", f"c{number}", None, START, 0, 0) for number in range(len(COSTS))
    ]
    with transaction(engine) as connection:
        bodies = select_bodies(connection, due, select_seal)
    for number, cost in enumerate(COSTS.values()):
        data = json.loads(bodies[number], parse_float=Decimal, parse_int=Decimal)
        assert data["data"]["chat"]["cost"] == Decimal(cost)


# Numbers of equal value in one group, all others different; each as a JSON number or a text.
DISTINCT = [
    ["0.1", "0.10", "1e-1", "0.10000000000000001", "0.1000000000000000055511151231257827"],
    ["0.1000000000000000000001"],
    ["0.1000000000000000000002", "1000000000000000000002e-22"],
    ["1e400", "10e399", "1E400", "1.0e+400"],
    ['"1e400"'],
    ["1e401"],
    ["-1e999"],
    ["-1e998"],
    ["1e-400"],
    ["2e-400"],
    ["0.0", "0e5"],
    ["-0.0"],
    ["9007199254740993.0"],
    ["9007199254740992.0", "9007199254740992e0"],
    ["1" * 400],
    ["1" * 399 + "2"],
    ["1" * 401],
    ["1" * 400 + "2"],
    [f'"{"1" * 401}"'],
    ["0." + "1" * 900],
    ["0." + "1" * 899 + "2"],
    ["1e99999999999999999999"],
    ["1e99999999999999999998"],
    ['"Infinity"', "Infinity"],
    ["-Infinity"],
    ['"-infinity"'],
    ["NaN", '"NaN"'],
]


@pytest.mark.parametrize("extra", ["", ', "x": "\\ud800"', f', "x": {2**70}'], ids=["usual", "surrogate", "long"])
def test_i3_deliveries_that_differ_in_a_number_are_different_facts(extra: str) -> None:
    keys = []
    for group in DISTINCT:
        read = [events.parse(body(1, cost, extra)) for cost in group]
        (key,) = {each.dedupe_key for each in read if isinstance(each, Event)}
        keys.append(key)
    assert len(set(keys)) == len(DISTINCT)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 40), st.integers(0, 30))
@example(2**-24, 1, 0)  # 16 digits of it are a tie
def test_i3_writers_that_print_a_double_differently_report_one_fact(value: float, digits: int, shift: int) -> None:
    printed = {repr(value), f"{value:.16e}", f"{value:.{16 + digits}e}", f"{Decimal(value):e}"}
    read = [events.parse(body(1, cost)) for cost in printed]
    assert len({each.dedupe_key for each in read if isinstance(each, Event)}) == 1
    mantissa, exponent = f"{Decimal(value):.{1_100 + shift}e}".split("e")
    other = events.parse(body(1, f"{mantissa}7e{exponent}"))  # a digit behind all digits of the double
    assert isinstance(other, Event)
    assert other.dedupe_key not in {each.dedupe_key for each in read if isinstance(each, Event)}


@on_one_version
def test_i4_a_cost_that_cannot_be_stored_leaves_the_turn_and_its_bytes(engine: Engine) -> None:
    archive = Archive(engine)
    sent = [
        body(number, cost) for number, cost in enumerate(["1e400", "-1e999", "9" * 400, '"NaN"', "NaN", "1e-400"])
    ]
    for number, each in enumerate(sent):
        archive.webhook(number, each)
    assert archive.rows("SELECT cost FROM analytics.chats") == [(None,)] * len(sent)
    assert archive.rows("SELECT messages, cost FROM analytics.conversations") == [(2 * len(sent), None)]
    assert {bytes(row[0]) for row in archive.rows("SELECT body FROM archiver.events")} == set(sent)


# Bodies and their dedupe keys, as the version of November 2026 computed them.
LANDED = {
    b'{"type":"chat.created","timestamp":0.37,"chat":{"v":{"a":[-2.414002E+20,0.07243628666754276]},"id":"c0","cost":219,'
    b'"createdAt":0.08594723368917168,"assistantOverrides":{"variableValues":{"p":-0}}}}': (
        "e20e50d08eaabe5fb1252512d8a721dcc439d37359c2cd7f3ab909461ef01132"
    ),
    b'{"type":"chat.created","timestamp":-4.260494E+25,"chat":{"x":"\\ud800","id":"c2","cost":79e-71,'
    b'"createdAt":0.57442371025867101,"assistantOverrides":{"variableValues":{"p":3.6967297937384553e+115}}}}': (
        "7ccdf66c7566442c5344f88ef096a104cda4789ae79f80e743bfc233e8f12702"
    ),
    b'{"type":"chat.created","timestamp":-61e-83,"chat":{"id":"c5","cost":12063059843798851584.0000,"createdAt":-32e-32,'
    b'"assistantOverrides":{"variableValues":{"p":0.14567639245798059}}}}': (
        "2ea88638fdd3bb8549a4ef3a8f7663409778f8258236da970b0912591867e9c6"
    ),
    b'{"type":"chat.created","timestamp":401,"chat":{"v":{"a":[973,0.45664372220287475]},"id":"c6","cost":NaN,'
    b'"createdAt":1.0,"assistantOverrides":{"variableValues":{"p":6.597432204635068e+185}}}}': (
        "78ef0d2ce96054d44c687e1dbf9407b9df7541c59cd797bc51d3628ec94a5aec"
    ),
}


@pytest.mark.parametrize(("sent", "key"), LANDED.items(), ids=range(len(LANDED)))
def test_i3_the_key_of_a_fact_is_that_of_earlier_versions(sent: bytes, key: str) -> None:
    read = events.parse(sent)
    assert isinstance(read, Event)
    assert read.dedupe_key.hex() == key
