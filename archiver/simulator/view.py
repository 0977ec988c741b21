"""Draw the demo in the terminal: steps, progress, the table, and the commands to try next."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from archiver.simulator.webhooks import Record

_SHOWN = 20  # differences
_EVERY = 2.0  # seconds between two lines if there is no terminal


class View:
    """The output of the demo: on a terminal with a live bar, elsewhere with a line every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print one line without wrapping or colour, because it may be copied."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, conversations: int, record: Record) -> Iterator["Bar"]:
        """Yield the progress bar; call its `advance` after each conversation."""
        if not self._console.is_terminal:
            yield Bar(self, None, conversations, record)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            yield Bar(self, progress, conversations, record)

    def results(
        self,
        figures: Sequence[tuple[str, str]],
        compared_with: str,
        problems: Sequence[str],
        *,
        has_delivered: bool = True,
    ) -> None:
        """Print the table, the verdict, and at most `_SHOWN` differences."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, figure in figures:
            table.add_row(name, figure)
        if problems:
            verdict, style = f"{len(problems)} differences", "bold red"
        elif has_delivered:
            verdict, style = "equal, message for message", "bold green"
        else:
            verdict, style = "nothing was delivered", "bold yellow"
        table.add_row(f"archive compared with {compared_with}", verdict, style=style)
        self._console.print(table)
        for problem in problems[:_SHOWN]:
            self.say(f"  {problem}")
        if len(problems) > _SHOWN:
            self.say(f"  and {len(problems) - _SHOWN} more")

    def print_next_steps(
        self, *, receiver: str, secret: str, password: str, api: str, psql: str, database_url: str
    ) -> None:
        """Print commands to try while everything is running."""
        chat = {
            "id": "chat-by-hand",
            "sessionId": "session-by-hand",
            "input": "Did it arrive?",
            "output": [{"role": "assistant", "content": "It did."}],
        }
        body = json.dumps({"message": {"type": "chat.created", "chat": chat}})
        header = f"x-webhook-secret: {secret}"
        query = "SELECT position, role, content FROM analytics.messages WHERE session_id = 'session-by-hand'"
        pages = urlsplit(receiver)._replace(path="/console/").geturl()
        self.say(f"\nOpen the console at {pages} and log in as demo with password {password}")
        self.say(f"\nWebhooks are received at {receiver}. Send one:\n")
        self.say(f"  curl {receiver} -H {shlex.quote(header)} -d {shlex.quote(body)}\n")
        self.say(f"Look at it:\n\n  {psql} -c {shlex.quote(query)}\n")
        beside = Path(sys.executable).with_name("archiver")
        program = shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(sys.executable)} -m archiver"
        self.say(f"Ask the archiver:\n\n  DATABASE_URL={shlex.quote(database_url)} {program} status\n")
        self.say(f"The simulated CallHQ is at {api} (any x-api-key); chats sent to it arrive in the archive too.")
        self.say("Press Ctrl-C to stop everything.")


class Bar:
    """The progress of the conversations and of their webhooks."""

    def __init__(self, view: View, progress: Progress | None, total: int, record: Record) -> None:
        self._view = view
        self._progress = progress
        self._total = total
        self._record = record
        self._ended = 0
        self._drawn_at = time.monotonic()
        self._task = progress.add_task(self._describe(), total=total) if progress else None

    def advance(self) -> None:
        """Count a finished conversation."""
        self._ended += 1
        if time.monotonic() - self._drawn_at >= _EVERY or self._progress is not None:
            self._render()

    def end(self) -> None:
        """Draw the bar one last time: every webhook was answered or abandoned, so it agrees with the table."""
        self._render()

    def _render(self) -> None:
        self._drawn_at = time.monotonic()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._ended, description=self._describe())
        else:
            self._view.say(f"  {self._ended} of {self._total} conversations; {self._describe()}")

    def _describe(self) -> str:
        """Describe the platform's webhooks, without the invalid deliveries."""
        report = self._record.report()
        answers = report.get("answers", {})
        sent = self._record.total("sent") - report.get("types", {}).get("other", 0)
        return f"{sent} sent, {answers.get('stored', 0)} stored, {answers.get('duplicate', 0)} duplicates"
