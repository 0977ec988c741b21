"""What the pages may change: each action calls the use case of a command, under the name of its user."""

from archiver.console.actions.erasures import Erasures
from archiver.console.actions.followups import Followups
from archiver.console.actions.holds import Holds
from archiver.console.actions.retries import Retries
from archiver.console.actions.running import Runner

__all__ = ["Erasures", "Followups", "Holds", "Retries", "Runner"]
