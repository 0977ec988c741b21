"""`archiver --version` and `--help`, at once: they import little and cost little."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from archiver import __version__, version
from archiver.cli import COMMANDS, cli
from archiver.database import schema

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkout(folder: Path, files: dict[str, str]) -> Path:
    (folder / "pyproject.toml").write_text("")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_it_names_version_and_schema_revision() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "archiver", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert printed == f"{version.describe()}\n"
    assert printed.startswith(f"archiver, version {__version__}, ")
    assert f", schema {schema.head()}\n" in printed


def test_it_loads_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; sys.argv = ['archiver', '--version']; import archiver.__main__ as program; program.main();"
        " print(sorted(name for name in sys.modules if name.startswith(('click', 'sqlalchemy', 'alembic'))))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU time of one run of Python, the least of five."""
    times = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)


@pytest.mark.parametrize("option", ["--version", "--help", "-h"])
def test_version_and_help_cost_at_most_eight_times_the_cpu_of_an_empty_program(option: str) -> None:
    assert cpu_seconds("-m", "archiver", option) <= 8 * cpu_seconds("-c", "pass")


@pytest.mark.parametrize("option", ["--version", "--help", "-h"])
def test_version_and_help_import_no_command(option: str) -> None:
    program = (
        "import atexit, sys; from archiver.cli import main;"
        " atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr));"
        f" sys.argv = ['archiver', {option!r}]; main()"
    )
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stderr.split()
    assert {name for name in modules if name.startswith("archiver")} <= {
        "archiver",
        "archiver.cli",
        "archiver.errors",
        "archiver.version",
    }
    assert not {"sqlalchemy", "psycopg", "alembic", "rich", "msgspec", "pydantic", "structlog"} & set(modules)


def test_an_unknown_command_is_answered_with_similar_ones() -> None:
    ended = subprocess.run([sys.executable, "-m", "archiver", "serv"], capture_output=True, text=True, check=False)
    assert (ended.returncode, "'serve'" in ended.stderr) == (2, True)


def test_a_completion_prints_no_version() -> None:
    typed = {"COMP_WORDS": "archiver --version ver", "COMP_CWORD": "2", "_ARCHIVER_COMPLETE": "bash_complete"}
    program = "import sys; sys.argv = ['archiver']; from archiver.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | typed, capture_output=True, text=True, check=False
    )
    assert ended.stdout.split() == ["plain,verify"]


def test_the_help_has_the_first_sentence_of_each_command() -> None:
    context = click.Context(cli)
    assert list(COMMANDS) == sorted(COMMANDS)
    for name, (_, summary) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert summary == command.get_short_help_str(limit=1000)


def test_audit_has_an_older_name() -> None:
    context = click.Context(cli)
    assert cli.get_command(context, "acts") is cli.get_command(context, "audit")


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": f"{COMMIT}\n"},
        {".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": f"{COMMIT}\n"},
        {
            ".git/HEAD": "ref: refs/heads/main\n",
            ".git/packed-refs": f"# pack-refs with: peeled\n{'f' * 40} refs/heads/other\n{COMMIT} refs/heads/main\n",
        },
        {
            ".git": "gitdir: elsewhere/worktrees/one\n",
            "elsewhere/worktrees/one/HEAD": "ref: refs/heads/branch\n",
            "elsewhere/worktrees/one/commondir": "../..\n",
            "elsewhere/refs/heads/branch": f"{COMMIT}\n",
        },
    ],
)
def test_the_commit_of_a_checkout_is_known(files: dict[str, str], tmp_path: Path) -> None:
    assert version._checked_out(checkout(tmp_path, files)) == COMMIT


@pytest.mark.parametrize(
    "files",
    [
        {},
        {".git/HEAD": "ref: refs/heads/none\n"},
        {".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": "damaged\n"},
        {".git": "gitdir: nowhere\n"},
    ],
)
def test_an_unknown_commit_is_left_out(files: dict[str, str], tmp_path: Path) -> None:
    assert version._checked_out(checkout(tmp_path, files)) is None


def test_the_repository_around_an_installation_is_another_projects(tmp_path: Path) -> None:
    checkout(tmp_path, {".git/HEAD": COMMIT})
    (tmp_path / "pyproject.toml").unlink()
    assert version._checked_out(tmp_path) is None


def test_the_changelog_has_the_version_under_what_is_unreleased() -> None:
    headings = [line for line in Path("CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert headings[0] == "## Unreleased"
    assert headings[1].split()[1] == project["version"] == __version__
