"""The demo: its comparison finds planted differences; it runs, ends and cleans up."""

import io
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from rich.console import Console

from archiver import embedded
from archiver.embedded.postmaster import is_running
from archiver.simulator import comparison
from archiver.simulator import run as demo
from archiver.simulator.archive_reader import Holdings
from archiver.simulator.comparison import Archive, ArchivedMessage, ChatRow, TranscriptMessage, differences, expected
from archiver.simulator.faults import Faults
from archiver.simulator.invalid_deliveries import InvalidDelivery, invalid_deliveries
from archiver.simulator.upstream import Session, Upstream
from archiver.simulator.verdict import Run, figures, problems
from archiver.simulator.view import View
from archiver.simulator.webhooks import Delivery, Outcome
from tests.support.waiting import until as wait_for


def chat(number: int, session: str = "s1", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "sessionId": session,
        "input": "ok",
        "output": [{"role": "assistant", "content": f"Answer {number}"}],
        "cost": 0.25,
        "createdAt": f"2026-01-01T00:00:{number:02}.000Z",
        "updatedAt": f"2026-01-01T00:00:{number:02}.500Z",
        "assistantOverrides": {"variableValues": {"customerTier": "gold"}},
    } | changes


def early(number: int) -> dict[str, Any]:
    return chat(number, output=[], updatedAt=f"2026-01-01T00:00:{number:02}.000Z")


DELIVERED = [
    *(("chat.created", chat(number)) for number in (1, 2, 3)),
    ("chat.created", early(2)),
    ("chat.created", chat(4, "s2")),
    ("chat.deleted", {"id": "c3"}),
]


def held() -> Archive:
    return expected(DELIVERED)


def test_what_is_expected_follows_from_the_deliveries():
    archive = held()
    assert archive.messages["s1"] == [
        TranscriptMessage("c1", "user", "ok", False),
        TranscriptMessage("c1", "assistant", "Answer 1", False),
        TranscriptMessage("c2", "user", "ok", False),
        TranscriptMessage("c2", "assistant", "Answer 2", False),
        TranscriptMessage("c3", "user", "ok", True),
        TranscriptMessage("c3", "assistant", "Answer 3", True),
    ]
    [first, *_] = archive.chats
    assert first == ChatRow("s1", "c1", False, Decimal("0.25"), {"customerTier": "gold"})
    figures = {row.session_id: row[1:] for row in archive.conversations}
    assert figures == {"s1": (3, 6, 3, 3, Decimal("0.75"), 1), "s2": (1, 2, 1, 1, Decimal("0.25"), 0)}


def test_the_order_and_the_number_of_deliveries_do_not_matter():
    for seed in range(20):
        again = random.Random(seed).sample(DELIVERED * 2, k=len(DELIVERED) * 2)
        assert differences(held(), expected(again)) == []


def test_a_deletion_alone_is_a_turn_without_messages():
    archive = expected([("chat.deleted", {"id": "c1", "sessionId": "s1"}), ("chat.deleted", {"id": "c2"})])
    assert archive.messages == {}
    assert [row[:3] for row in archive.chats] == [("s1", "c1", True), ("", "c2", True)]
    assert [row.session_id for row in archive.conversations] == ["s1"]


def _swap(archive: Archive) -> None:
    texts = archive.messages["s1"]
    texts[0], texts[1] = texts[1], texts[0]


def _move(archive: Archive) -> None:
    texts = archive.messages["s1"]
    archive.messages["s1"] = [*texts[2:4], *texts[:2], *texts[4:]]


def _content(archive: Archive) -> None:
    archive.messages["s1"][1] = archive.messages["s1"][1]._replace(content="Answer 1 ")


def _undelete(archive: Archive) -> None:
    archive.messages["s1"][4:] = [texts._replace(is_deleted=False) for texts in archive.messages["s1"][4:]]


def _undelete_chat(archive: Archive) -> None:
    archive.chats[2] = archive.chats[2]._replace(is_deleted=False)


def _double(archive: Archive) -> None:
    archive.messages["s1"].insert(0, archive.messages["s1"][0])


def _foreign(archive: Archive) -> None:
    archive.messages["s9"] = [TranscriptMessage("c9", "user", "Hello", False)]


def _cost(archive: Archive) -> None:
    archive.chats[0] = archive.chats[0]._replace(cost=Decimal("0.26"))


def _total(archive: Archive) -> None:
    archive.conversations[0] = archive.conversations[0]._replace(messages=7)


PLANTED: list[tuple[Callable[[Archive], object], list[str]]] = [
    (lambda archive: archive.messages["s1"].pop(1), ["chat c1, assistant 'Answer 1' is missing"]),
    (lambda archive: archive.messages.pop("s2"), ["chat c4, user 'ok' is missing", "'Answer 4' is missing"]),
    (_swap, ["order: chat c1, assistant 'Answer 1' is at position 1, where chat c1, user 'ok' belongs"]),
    (_move, ["order: chat c2, user 'ok' is at position 1, where chat c1, user 'ok' belongs"]),
    (_content, ["chat c1, assistant 'Answer 1' reads 'Answer 1 '"]),
    (_undelete, ["'ok' is not marked as deleted", "'Answer 3' is not marked as deleted"]),
    (_undelete_chat, ["chat s1 c3: is_deleted is False, not True"]),
    (_double, ["chat c1, user 'ok' was never delivered"]),
    (_foreign, ["session s9: chat c9, user 'Hello' was never delivered"]),
    (_cost, ["chat s1 c1: cost is 0.26, not 0.25"]),
    (_total, ["messages is 7, not"]),
    (lambda archive: archive.chats.pop(), ["chat s2 c4 is missing"]),
    (lambda archive: archive.chats.append(archive.chats[0]), ["chat s1 c1: 2 rows"]),
    (lambda archive: archive.conversations.clear(), ["conversation s1 is missing", "conversation s2 is missing"]),
]


@pytest.mark.parametrize(("plant", "told"), PLANTED)
def test_a_planted_difference_is_found_and_nothing_else(plant, told):
    expected, item = held(), held()
    assert differences(expected, item) == []
    plant(item)
    lines = differences(expected, item)
    assert len(lines) == len(told), lines
    for line, piece in zip(lines, told, strict=True):
        assert piece in line


def delivery(kind: str, told: dict[str, Any], outcome: Outcome = "accepted", status: int | None = 200) -> Delivery:
    return Delivery(kind, told, b"", frozenset(), False, outcome, status, "stored", 1)


INVALID = [
    (invalid, replace(delivery("other", {}), status=invalid.status, body=invalid.body))
    for invalid in invalid_deliveries(1)
]
RUN = Run([*[delivery(kind, told) for kind, told in DELIVERED]], INVALID, seconds=2.0)
BROKEN = frozenset(invalid.body for invalid, _ in INVALID if invalid.status == 422)
HELD = Holdings(held(), facts=6, deliveries=6, quarantined=BROKEN, positions_ok=True)


def test_a_faultless_run_has_no_problems():
    assert problems(RUN, HELD) == []
    result = dict(figures(RUN, HELD))
    assert (result["webhooks sent"], result["stored"], result["chats deleted"]) == ("6", "6", "1")
    assert (result["quarantined (422)"], result["refused (401)"]) == (f"{len(BROKEN)}", "4")
    assert result["events per second, customers included"] == "3"


REFUSED = delivery("chat.created", chat(7), "refused", 503)
LOST = delivery("chat.created", chat(7), "lost", None)


@pytest.mark.parametrize(
    ("run", "holdings", "told"),
    [
        (replace(RUN, webhooks=[*RUN.webhooks, REFUSED]), HELD, "webhook chat.created of chat c7: refused (503)"),
        (
            replace(RUN, invalid_deliveries=[(InvalidDelivery(b"", "none", 401), delivery("other", {}))]),
            HELD,
            "response 200, not 401",
        ),
        (RUN, replace(HELD, facts=7, deliveries=7), "7 facts, but 6"),
        (RUN, replace(HELD, deliveries=5), "counts 5 deliveries, but 6"),
        (RUN, replace(HELD, quarantined=frozenset()), "cannot be found again byte for byte"),
        (RUN, replace(HELD, quarantined=BROKEN | {b"more"}), "1 deliveries that were not broken"),
        (RUN, replace(HELD, positions_ok=False), "positions"),
        (RUN, replace(HELD, archive=Archive()), "is missing"),
    ],
)
def test_every_kind_of_problem_is_reported(run, holdings, told):
    assert any(told in line for line in problems(run, holdings))


def test_what_was_lost_on_purpose_is_not_missed():
    assert problems(replace(RUN, webhooks=[*RUN.webhooks, LOST]), HELD) == []


def test_many_differences_are_cut_short():
    out = io.StringIO()
    View(Console(file=out)).results([], "the platform", [f"difference {number}" for number in range(50)])
    assert "50 differences" in out.getvalue()
    assert "and 30 more" in out.getvalue()


ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from archiver.simulator.run import run
sys.exit(run(exit_when_done=sys.argv[2] == "exit", seed=3, conversations=int(sys.argv[3]), loss=float(sys.argv[4]),
             duplicates=0.2, home=Path(sys.argv[1]), console=Console(width=120)))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a home") / "de mo"


def start(home: Path, how: str, conversations: int = 12, loss: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(home), how, str(conversations), str(loss)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process: subprocess.Popen[str], piece: str) -> str:
    """What it wrote up to the line that holds `piece`."""
    written = ""
    for line in process.stdout or ():
        written += line
        if piece in line:
            return written
    raise AssertionError(f"{piece!r} never came:\n{written}")


def processes_of(home: Path) -> Iterator[str]:
    """Command lines and environments that name this home."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        # The embedded server's socket folder is in the receiver's DATABASE_URL, percent-encoded.
        if os.fsencode(home) in text or os.fsencode(home).replace(b" ", b"%20") in text:
            yield text.decode(errors="replace").replace("\0", " ")


def assert_nothing_left(home: Path) -> None:
    """The watchdog of the embedded server may take a moment."""
    wait_for(lambda: not [*processes_of(home)], "nothing is left")


def as_curl_would(words: list[str]) -> httpx2.Response:
    """`curl URL -H HEADER -d BODY`, for machines without curl."""
    program, url, *options = words
    assert (program, options[0], options[2], len(options)) == ("curl", "-H", "-d", 4)
    name, _, value = options[1].partition(": ")
    headers = {name: value, "content-type": "application/x-www-form-urlencoded"}
    return httpx2.post(url, content=options[3], headers=headers, trust_env=False, timeout=120)


@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_the_demo_runs_to_its_end_and_the_archive_is_what_was_delivered(home, loss):
    process = start(home, "exit", conversations=40, loss=loss)
    written, _ = process.communicate(timeout=240)
    assert process.returncode == 0, written
    assert "equal, message for message" in written
    result = dict(re.findall(r"│ (\S[^│]*?)\s+│\s+([\d,]+) │", written))
    assert (result["lost on the way, on purpose"] != "0") == (loss > 0)
    sent, stored, again = (result[name] for name in ("webhooks sent", "stored", "recognised as duplicates"))
    assert f"  40 of 40 conversations; {sent} sent, {stored} stored, {again} duplicates\n" in written
    assert_nothing_left(home)


def test_where_everything_is_lost_the_histories_supply_all_of_it(home):
    process = start(home, "exit", conversations=2, loss=1.0)
    written, _ = process.communicate(timeout=240)
    assert process.returncode == 0, written
    assert "nothing was delivered" in written
    # And then the histories supply all of it.
    assert written.count("equal, message for message") == 1


def receiver_of(demo_pid: int) -> int | None:
    """The pid of its `archiver serve`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == demo_pid and b"\0serve\0" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.parametrize("moment", ["Starting archiver serve", "The simulated CallHQ at"])
def test_kill_9_leaves_nothing_running(home, moment):
    with start(home, "stay", conversations=1000) as process:
        until(process, moment)
        receiver = wait_for(lambda: receiver_of(process.pid), "the receiver starts")
        process.kill()
        process.wait()
    wait_for(lambda: not is_running(receiver), "the receiver ends")
    assert_nothing_left(home)


def test_the_demo_stays_and_what_it_invites_to_works(home):
    with start(home, "stay") as process:
        written = until(process, "Press Ctrl-C to stop everything")
        curl = next(line for line in written.splitlines() if line.startswith("  curl "))
        psql = next(line for line in written.splitlines() if "psql" in line)
        answer = as_curl_would(shlex.split(curl))
        shown = subprocess.run(shlex.split(psql), check=True, capture_output=True, text=True)
        asked = next(line for line in written.splitlines() if line.endswith(" status"))
        status = subprocess.run(asked, shell=True, check=True, capture_output=True, text=True)
        second = start(home, "exit")
        refused, _ = second.communicate(timeout=240)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=240)
    assert (answer.status_code, answer.json()["status"]) == (200, "stored")
    assert "Did it arrive?" in shown.stdout
    assert re.search(r"^sessions +13 ", status.stdout, re.MULTILINE)
    assert str(Path(sys.executable).with_name("archiver")) in asked
    assert (second.returncode, "another demo is running" in refused, "Starting" in refused) == (1, True, False)
    assert (process.returncode, rest) == (0, "Stopped.\n")
    assert_nothing_left(home)


@pytest.mark.parametrize(
    "moment", ["Starting Postgres", "Starting archiver serve", "The simulated CallHQ at", " of "]
)
def test_a_signal_at_any_moment_ends_everything(home, moment):
    with start(home, "stay", conversations=1000) as process:
        until(process, moment)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=240)
    assert rest.splitlines()[-1] == "Stopped before the archive could be compared."
    assert process.returncode == 1
    assert_nothing_left(home)


def test_an_archive_that_was_changed_afterwards_is_reported(home):
    """The table says so, and so does the exit code; the change is made while the demo runs."""
    with start(home, "exit", conversations=300) as process:
        until(process, "The simulated CallHQ at")
        with embedded.running(home) as postgres:
            spoil(postgres.database_url(demo.DATABASE))
        rest, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "reads 'spoilt'" in rest
    assert_nothing_left(home)


def spoil(url: str) -> None:
    """Every message that is archived reads otherwise, once in a while."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION archiver.spoil() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.content LIKE 'Noted:%' THEN NEW.content := 'spoilt'; END IF; RETURN NEW; END $$"
        )
        connection.execute(
            "CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON archiver.messages"
            " FOR EACH ROW EXECUTE FUNCTION archiver.spoil()"
        )
        connection.execute("UPDATE archiver.messages SET content = content")  # those that were archived before


def test_an_unusable_home_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = io.StringIO()
    code = demo.run(
        exit_when_done=True,
        seed=1,
        conversations=1,
        loss=0,
        duplicates=0,
        home=tmp_path / "file" / "demo",
        console=Console(file=out),
    )
    assert code == 1
    assert "ARCHIVER_HOME" in out.getvalue()


@pytest.mark.parametrize("wrong", [{"conversations": 0}, {"conversations": 10_001}, {"loss": 2}, {"duplicates": -1}])
def test_wrong_numbers_are_refused(wrong, tmp_path):
    given: dict[str, Any] = {"conversations": 1, "loss": 0, "duplicates": 0} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        demo.run(exit_when_done=True, seed=1, home=tmp_path, console=Console(file=io.StringIO()), **given)


# The archive against the platform


def spoken(*inputs: str) -> Session:
    upstream = Upstream(Faults(seed=1))
    session = upstream.create_session("s", "a")
    for texts in inputs:
        upstream.create_chat(session.id, texts, None)
    return session


def lines_of(session: Session) -> list[ArchivedMessage]:
    return [
        ArchivedMessage(chat_id, message["role"], message["content"], "webhook", True)
        for chat_id, chat in session.chats.items()
        for message in [{"role": "user", "content": chat["input"]}, *chat["output"]]
    ]


def test_an_archive_that_is_the_platform_differs_in_nothing():
    session = spoken("ok", "ok", "thanks")
    deleted = ArchivedMessage("deleted upstream", "user", "gone", "webhook", False)
    assert comparison.history_differences([session], {session.id: [*lines_of(session), deleted]}) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0]._replace(content="edited"), *lines[1:]],
        lambda lines: [lines[0]._replace(in_history=False), *lines[1:]],
        lambda lines: [*lines, ArchivedMessage(None, "user", "made up", "history", False)],
        lambda lines: [],
    ],
)
def test_every_difference_from_the_platform_is_reported(spoil):
    session = spoken("ok", "ok", "thanks")
    result = comparison.history_differences([session], {session.id: spoil(lines_of(session))})
    assert result
    assert all(session.id in line for line in result)


def test_a_session_unknown_to_the_platform_is_reported():
    assert comparison.history_differences([], {"invented": [ArchivedMessage("c", "user", "x", "webhook", True)]})
