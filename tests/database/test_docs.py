"""The documentation says what the program does: settings, routes, reasons, commands, tables."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from sqlalchemy import Engine, text

from archiver import events, settings
from archiver.cli import cli
from archiver.database import tables, transaction
from archiver.events import Event
from archiver.http import create
from archiver.inbound import signatures
from archiver.ledger import quarantine
from tests.support.ports import free_port
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_settings_page_lists_every_setting_with_its_default_and_meaning() -> None:
    expected = [[f"`{name}`", f"`{default}`" if default else "", text] for name, default, text in settings.table()]
    assert table_rows("settings.md", "All settings") == expected


def test_the_http_page_lists_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere/none")
    monkeypatch.setenv("ARCHIVER_WEBHOOK_SECRETS", "x" * 20)
    app = create(settings.read())
    page = (ROOT / "docs" / "http.md").read_text()
    for route in app.routes:
        assert f"{route.path}`" in page, route  # type: ignore[attr-defined]  # all of ours are Routes


def test_the_http_page_lists_every_reason_to_refuse_or_quarantine() -> None:
    listed = {row[0].strip("`") for row in table_rows("http.md", "Reasons")}
    assert listed == {
        *events.REASONS,
        *signatures.REASONS,
        "incomplete",
        "too_large",
        "not_storable",
        "too_slow",
        "not_processable",
    }


def told_at(path: str, value: object) -> dict[str, Any]:
    """A webhook that tells this value at a path of the table of fields."""
    document: dict[str, Any] = {"type": "chat.created", "chat": {"id": "1"}}
    if path.startswith("data.") or path == "chat.chatId":
        document["chat"] = {}
    if path.startswith("data."):
        document = {"type": "chat.created", "data": {"chat": {"id": "1"}}}
    *folders, name = path.split(".")
    inner = document
    for folder in folders:
        inner = inner.setdefault(folder, {})
    inner[name] = value
    return document


# Of each field: two values that differ in the archive, and what of the event tells them apart.
FIELDS: dict[str, tuple[object, object, Callable[[Event], object]]] = {
    "event type": ("chat.created", "chat.deleted", lambda event: event.type),
    "chat id": ("7", 8, lambda event: event.chat_id),
    "session id": ("s", 8, lambda event: event.session_id),
    "assistant": ("a", 8, lambda event: chat_of(event).assistant_id),
    "other id": ("x", 8, lambda event: chat_of(event).external_id),
    "status": ("open", 8, lambda event: chat_of(event).status),
    "question": ("one", [{"role": "user", "content": "two"}], lambda event: chat_of(event).input),
    "answer": ("one", [{"role": "tool", "content": [{"text": "two"}]}], lambda event: chat_of(event).output),
    "variables": ({"tier": "gold"}, {"tier": 2}, lambda event: chat_of(event).variables),
    "cost": (0.5, "1e-9", lambda event: chat_of(event).cost),
    "created": ("2024-01-15T09:30:00Z", 1_705_311_001, lambda event: chat_of(event).created_at),
    "updated": ("2024-01-15T09:30:00Z", "1705311001000", lambda event: chat_of(event).updated_at),
    "session's name": ("Call", 8, lambda event: chat_of(event).session_name),
    "session's status": ("open", 8, lambda event: chat_of(event).session_status),
    "time of the event": ("2024-01-15T09:30:00Z", 1_705_311_001, lambda event: event.occurred_at),
}


def chat_of(event: Event) -> events.Chat:
    assert event.chat is not None
    return event.chat


def read_at(path: str, value: object) -> Event:
    document = told_at(path, value)
    if path == "chatId":
        del document["chat"]["id"]
    if path == "event":
        del document["type"]
    event = events.parse(json.dumps(document).encode())
    assert isinstance(event, Event), (path, event)
    return event


def test_the_http_page_lists_every_field_and_its_place() -> None:
    rows = table_rows("http.md", "Envelopes")
    assert [row[0] for row in rows] == list(FIELDS)
    for field, where, _, _ in rows:
        one, other, part = FIELDS[field]
        for path in re.findall(r"`(.*?)`", where):
            seen = [part(read_at(path, value)) for value in (one, other)]
            assert seen[0], (field, path)
            assert seen[1], (field, path)
            assert seen[0] != seen[1], (field, path)


def test_the_http_page_names_every_key_that_the_parser_reads() -> None:
    section = (ROOT / "docs" / "http.md").read_text().split("## Envelopes", 1)[1].split("\n## ", 1)[0]
    looked_up = {
        name
        for file in (ROOT / "archiver" / "events").glob("*.py")
        for name in re.findall(r"\.get\(\"(\w+)\"\)", file.read_text())
    }
    assert len(looked_up) > 20
    assert not {name for name in looked_up if not re.search(rf"[`.]{name}[`.]", section)}


def test_the_development_page_names_files_that_exist_and_hold_the_names_in_brackets() -> None:
    page = (ROOT / "docs" / "development.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    named = re.findall(r"`((?:[a-z_]+/)[\w/.]*)`(?: \(((?:`\w+`(?:, )?)+)\))?", "\n".join(rows))
    assert len(named) > 100
    for path, names in named:
        (file,) = [each / path for each in (ROOT, ROOT / "archiver", ROOT / "tests") if (each / path).exists()]
        assert not [name for name in re.findall(r"\w+", names) if name not in file.read_text()], path


def commands(group: click.Group, prefix: str = "archiver") -> list[tuple[str, click.Command]]:
    result = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        result.append((f"{prefix} {name}", command))
        if isinstance(command, click.Group):
            result += commands(command, f"{prefix} {name}")
    return result


def test_the_command_page_lists_every_command_and_option() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for name, command in commands(cli):
        row = "\n".join(line for line in page.splitlines() if re.match(rf"\| `{name}[ `]", line)) or page
        assert f"`{name}" in row, name
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.opts[0] != "--help":
                assert any(option in row for option in parameter.opts), f"{name} {parameter.opts[0]}"


def test_the_command_page_names_the_fields_of_a_quarantined_delivery(engine: Engine) -> None:
    data = (ROOT / "docs" / "commands.md").read_text().split("`list --json` is", 1)[1].split("`show --json`", 1)[0]
    with transaction(engine) as connection:
        quarantine.upsert_quarantine(connection, [events.Delivery(events.parse(b"{"), datetime.now(UTC), None)])
        (row,) = quarantine.select_quarantine(connection)
    for name in row:
        assert f"`{name}`" in data, name


def test_the_data_model_page_lists_every_table_and_column() -> None:
    page = (ROOT / "docs" / "data-model.md").read_text()
    for table in tables.metadata.tables.values():
        section = page.split(f"### archiver.{table.name}\n", 1)[1].split("\n### ", 1)[0]
        listed = re.findall(r"^\| `(\w+)` \| (.*?) \|$", section, re.MULTILINE)
        assert listed == [(column.name, column.comment) for column in table.columns]


def test_the_data_model_page_lists_every_view_and_column(engine: Engine) -> None:
    page = (ROOT / "docs" / "data-model.md").read_text()
    with transaction(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT c.relname AS view, a.attname AS column, col_description(c.oid, a.attnum) AS meaning"
                " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " JOIN pg_attribute a ON a.attrelid = c.oid"
                " WHERE n.nspname = 'analytics' AND c.relkind = 'v' AND a.attnum > 0 ORDER BY 1, a.attnum"
            )
        ).all()
    for view, column, meaning in rows:
        section = page.split(f"### analytics.{view}\n", 1)[1].split("\n### ", 1)[0]
        assert f"| `{column}` | {meaning} |" in section, (view, column)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page shows curl lines")
def test_the_curl_lines_of_the_command_page_work_as_pasted(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    lines = page.rpartition("```sh\n")[2].partition("```")[0]
    assert "curl" in lines
    port = free_port()
    command = [sys.executable, "-m", "archiver", "simulate", "--port", str(port)]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as simulator:
        try:
            until(lambda: "runs at" in (tmp_path / "log").read_text(), "the simulator listens")
            script = f"set -e\n{lines.replace(':8100', f':{port}')}"
            process = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        finally:
            simulator.terminate()
    history, deleted, report = process.stdout.replace("}{", "}\n{").splitlines()
    assert "Hello" in history
    assert "Chat deleted successfully" in deleted
    assert "calls" in json.loads(report)["history"]
    assert process.stderr == ""
    # Nobody listens there any more.
    process = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_rows_of_a_table_have_the_cells_of_its_head(page: Path) -> None:
    width = 0
    for line in page.read_text().splitlines():
        cells = re.sub(r"`[^`]*`", "code", line)[1:-1].split("|") if line.startswith("|") else []
        assert not cells or not width or len(cells) == width, line
        width = len(cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_cell_has_fewer_than_30_words(page: Path) -> None:
    for line in page.read_text().splitlines():
        cells = re.sub(r"`[^`]*`", "code", line).strip("|").split(" | ") if line.startswith("|") else ()
        assert all(len(cell.split()) < 30 for cell in cells), line


def test_the_index_of_the_documentation_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").iterdir()} - {"README.md"} == linked


def anchors(page: Path) -> set[str]:
    """Return the fragments under which a viewer of Markdown finds the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)", page.read_text()):
        name, _, fragment = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


def locked(name: str) -> dict[str, str]:
    """The requirements of a lock file with their hashes, by the package."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    entries = re.split(r"^(?=\S)", "\n".join(lines), flags=re.MULTILINE)
    return {entry.partition("==")[0]: entry.strip() for entry in entries if entry.strip()}


def test_production_installs_what_the_tests_ran_on_and_no_more() -> None:
    tested, installed = locked("requirements.lock"), locked("requirements-runtime.lock")
    assert installed.items() < tested.items()
    result = tomllib.loads((ROOT / "pyproject.toml").read_text())
    expected = [*result["project"]["dependencies"], *result["dependency-groups"]["build"]]
    assert {re.split(r"[^\w-]", each)[0] for each in expected} <= {each.partition("[")[0] for each in installed}
    assert not {"pytest", "mypy", "ruff", "coverage", "hypothesis"} & installed.keys()
    assert "--require-hashes -r requirements-runtime.lock" in (ROOT / "README.md").read_text()


def test_the_console_shows_the_script_of_the_page_about_seals() -> None:
    page = (ROOT / "docs" / "seals.md").read_text()
    script = (ROOT / "archiver" / "console" / "templates" / "check_proof.txt").read_text()
    assert f"```python\n{script}```" in page
