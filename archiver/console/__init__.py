"""The console: pages for operators, compliance officers and analysts, served below /console."""

from archiver.console.application import routes

__all__ = ["routes"]
