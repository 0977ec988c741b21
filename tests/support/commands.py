"""Output of commands."""

from subprocess import CompletedProcess


def output_of(process: CompletedProcess[str]) -> str:
    """All that a command printed, line breaks that only fit a terminal taken out."""
    assert "Traceback" not in process.stderr
    return " ".join((process.stdout + process.stderr).split())


def failed(process: CompletedProcess[str]) -> str:
    """What a command that failed said, to people, on stderr."""
    text = output_of(process)
    assert process.returncode == 1, text
    assert process.stdout == ""
    return text
